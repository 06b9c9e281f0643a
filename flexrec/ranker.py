"""Ranking with a model: greedy rankings of examples, and a trained run that answers requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from flexrec.decoding.sample import Rollout, best_of, sample_rankings, search_rankings
from flexrec.policy.lora import load_model
from flexrec.task.examples import Example
from flexrec.task.needs import get_need
from flexrec.task.prompts import Item, PromptBuilder, strongest_risers

RUN_FILE = "flexrec.json"


def rank_examples(
    model: Any,
    examples: Sequence[Example],
    builder: PromptBuilder,
    *,
    num_ranked: int | None = None,
    batch_size: int = 128,
    description: str | None = None,
) -> list[np.ndarray]:
    """The most probable item at every rank, greedily: one array of candidate indices per example.

    Args:
        description: shown beside a progress bar; None shows none.
    """
    rankings: list[np.ndarray] = []
    starts = range(0, len(examples), batch_size)
    for start in tqdm(starts, desc=description, disable=description is None, leave=False):
        part = examples[start : start + batch_size]
        rollout = sample_rankings(
            model,
            [example.prompt for example in part],
            [example.candidates for example in part],
            separator=builder.separator,
            end=builder.end,
            num_ranked=num_ranked,
            greedy=True,
        )
        rankings += [row[row >= 0] for row in rollout.rankings]
    return rankings


@dataclass(frozen=True)
class Decoding:
    """How a policy's answer is found. By default greedily: at every rank the most probable item.

    Attributes:
        num_beams: with more than one, beam search for the most probable ranking.
        best_of: sample so many rankings and answer with the most probable of them.
        temperature, top_p: sample at this temperature (default: that of training), and among the most probable tokens
            that reach ``top_p`` together. Either makes an answer a sample.
        num_ranked: rank the first so many only (default: as in training).
    """

    num_beams: int = 1
    best_of: int = 1
    temperature: float | None = None
    top_p: float | None = None
    num_ranked: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_beams", "best_of", "num_ranked"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.num_beams > 1 and self.samples:
            raise ValueError("num_beams searches and best_of, temperature and top_p sample: choose one of the two")

    @property
    def samples(self) -> bool:
        """Whether chance has a part in the answer."""
        return self.best_of > 1 or self.temperature is not None or self.top_p is not None


@dataclass(frozen=True)
class RunInfo:
    """What a run's folder says about how its model is to be prompted, and what it was trained on."""

    encoding: str
    show_titles: bool
    show_rising: bool
    max_history: int
    num_ranked: int | None
    temperature: float
    dataset: str
    data: str | None
    needs: list[str]
    seed: int

    def save(self, folder: Path) -> None:
        (folder / RUN_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RunInfo:
        path = folder / RUN_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not the folder of a finished run: it has no {RUN_FILE}")
        return cls(**json.loads(path.read_text()))


class Ranker:
    """A trained run, loaded from its folder, that ranks the candidates of requests.

    A request is a dictionary: ``need`` (a known name, or an instruction in words), ``candidates`` (a list of
    ``{"id": .., "title": ..}``), and ``history`` (ids, or dictionaries like the candidates', oldest first; ``"liked":
    false`` marks what was seen and not liked) or ``user`` (whose history the run has logged).
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.info = RunInfo.load(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = load_model(folder, self.tokenizer).eval()
        if torch.cuda.is_available():
            self.model.to("cuda")
        self.builder = PromptBuilder(
            self.tokenizer,
            encoding=self.info.encoding,
            show_titles=self.info.show_titles,
            show_rising=self.info.show_rising,
        )
        catalogue = json.loads((folder / "catalogue.json").read_text())
        self._titles: dict[str, str] = dict(zip(catalogue["ids"], catalogue["titles"], strict=True))
        self._trend: dict[str, float] = catalogue["trend"]
        self._histories: dict[str, list[str]] = json.loads((folder / "histories.json").read_text())

    def rank(
        self,
        requests: Sequence[dict[str, Any]],
        decoding: Decoding = Decoding(),
        *,
        generator: torch.Generator | None = None,
    ) -> list[dict[str, Any]]:
        """Answer requests together: ``{"ranking": [{"id", "probability"}, ..]}`` each, best first.

        ``probability`` is that of the item at its rank, given those above it and all that remain, at the temperature
        of training, or of ``decoding``. A malformed request gets ``{"error": why}``; the others are answered.

        Args:
            generator: randomness of samples, on the model's device.
        """
        answers: list[dict[str, Any]] = [{} for _ in requests]
        prompts, candidates, readable = [], [], []
        for i, request in enumerate(requests):
            try:
                items = self._candidates(request)
                trend = np.array([self._trend.get(item.id, 0.0) for item in items])
                rising = [items[j] for j in strongest_risers(trend)]
                history, liked = self._history(request)
                prompt, _ = self.builder.prompt(self._wording(request), history, items, liked=liked, rising=rising)
                tokens = self.builder.candidate_tokens(items)
            except ValueError as error:
                answers[i] = {"error": str(error)}
                continue
            prompts.append(prompt)
            candidates.append(tokens)
            readable.append((i, items))
        if prompts:
            rollout = self._decode(prompts, candidates, decoding, generator)
            for (i, items), ranking, logprobs in zip(readable, rollout.rankings, rollout.logprobs, strict=True):
                answers[i] = {
                    "ranking": [
                        {"id": items[c].id, "probability": round(float(np.exp(lp)), 6)}
                        for c, lp in zip(ranking, logprobs, strict=True)
                        if c >= 0
                    ]
                }
        return answers

    def _decode(
        self,
        prompts: list[list[int]],
        candidates: list[list[list[int]]],
        decoding: Decoding,
        generator: torch.Generator | None,
    ) -> Rollout:
        """One ranking per prompt."""
        common: dict[str, Any] = {
            "separator": self.builder.separator,
            "end": self.builder.end,
            "num_ranked": decoding.num_ranked or self.info.num_ranked,
            "temperature": decoding.temperature or self.info.temperature,
        }
        if decoding.num_beams > 1:
            found = search_rankings(self.model, prompts, candidates, num_beams=decoding.num_beams, **common)
            return Rollout(found.rankings[:: decoding.num_beams], found.logprobs[:: decoding.num_beams])
        sampled = sample_rankings(
            self.model,
            prompts,
            candidates,
            num_generations=decoding.best_of,
            greedy=not decoding.samples,
            top_p=decoding.top_p or 1.0,
            generator=generator,
            **common,
        )
        return best_of(sampled, decoding.best_of)

    def _wording(self, request: dict[str, Any]) -> str:
        need = request.get("need")
        if not isinstance(need, str) or not need.strip():
            raise ValueError("'need' must be the name of a need or an instruction in words")
        return need if " " in need.strip() else get_need(need.strip()).wordings[0]

    def _candidates(self, request: dict[str, Any]) -> list[Item]:
        given = request.get("candidates")
        if not isinstance(given, list) or not given:
            raise ValueError("'candidates' must be a list of at least one {'id': .., 'title': ..}")
        items = [self._item(entry, f"candidates[{j}]") for j, entry in enumerate(given)]
        repeated = {item.id for item in items if sum(other.id == item.id for other in items) > 1}
        if repeated:
            raise ValueError(f"'candidates' has the id {sorted(repeated)[0]!r} more than once")
        return items

    def _history(self, request: dict[str, Any]) -> tuple[list[Item], list[bool]]:
        """The latest items of the history, and which of them were liked."""
        if "history" in request:
            given = request["history"]
            if not isinstance(given, list):
                raise ValueError("'history' must be a list of ids or of {'id': .., 'title': ..}, oldest first")
            where = "history"
        elif "user" in request:
            user = str(request["user"])
            if user not in self._histories:
                raise ValueError(f"user {user!r} is not in the log of this run: give a 'history' instead")
            given, where = self._histories[user], "the user's history"
        else:
            raise ValueError("a request needs a 'history' (may be empty) or a 'user'")
        items = [self._item(entry, f"{where}[{j}]") for j, entry in enumerate(given)]
        liked = [bool(entry.get("liked", True)) if isinstance(entry, dict) else True for entry in given]
        return items[-self.info.max_history :], liked[-self.info.max_history :]

    def _item(self, entry: Any, where: str = "item") -> Item:
        if isinstance(entry, dict):
            if entry.get("id") is None:
                raise ValueError(f"'{where}' has no 'id'")
            item_id = str(entry["id"])
            title = entry.get("title")
        elif isinstance(entry, (str, int)):
            item_id, title = str(entry), None
        else:
            raise ValueError(f"'{where}' must be an id or {{'id': .., 'title': ..}}, got {type(entry).__name__}")
        if title is None:
            title = self._titles.get(item_id)
        if title is None:
            raise ValueError(f"'{where}' has no 'title', and the id {item_id!r} is not in the run's catalogue")
        if not isinstance(title, str):
            raise ValueError(f"the title of '{where}' must be a string, got {type(title).__name__}")
        return Item(item_id, title)
