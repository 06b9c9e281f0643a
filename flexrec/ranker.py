"""A trained run that answers requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexrec.decoding.options import Decoding
from flexrec.decoding.sample import Rollout, best_of, sample_rankings, search_rankings
from flexrec.evaluation.evaluate import check_outputs
from flexrec.experiment.run_folder import RunFolder
from flexrec.task.needs import get_need, novelty_of
from flexrec.task.prompts import Item, strongest_risers


class Ranker:
    """A trained run, loaded from its folder, that ranks the candidates of requests.

    A request is a dictionary: ``need`` (a known name, or an instruction in words), ``candidates`` (a list of
    ``{"id": .., "title": ..}``), and ``history`` (ids, or dictionaries like the candidates', oldest first; ``"liked":
    false`` marks what was seen and not liked) or ``user`` (whose history the run has logged).
    """

    def __init__(self, folder: str | Path) -> None:
        run = RunFolder(folder)
        self.info, self.model, self.builder = run.load()
        self._catalogue, self._trend = run.read_catalogue()
        self._histories = run.read_histories()

    def rank(
        self,
        requests: Sequence[dict[str, Any]],
        decoding: Decoding | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> list[dict[str, Any]]:
        """Answer requests together: ``{"ranking": [{"id", "probability"}, ..]}`` each, best first.

        ``probability`` is that of the item at its rank, given those above it and all that remain, at the temperature
        of training, or of ``decoding``. A malformed request gets ``{"error": why}``; the others are answered.

        Args:
            decoding: how answers are found; default: greedily.
            generator: randomness of samples, on the model's device.
        """
        decoding = decoding or Decoding()
        answers: list[dict[str, Any]] = [{} for _ in requests]
        prompts, candidates, marks, readable = [], [], [], []
        for i, request in enumerate(requests):
            try:
                items = self._candidates(request)
                trend = np.array([self._trend.get(item.id, 0.0) for item in items])
                rising = [items[j] for j in strongest_risers(trend)]
                history, liked = self._history(request)
                prompt, _ = self.builder.prompt(self._wording(request), history, items, liked=liked, rising=rising)
                tokens = self.builder.candidate_tokens(items)
                described = self._marks(items, history, trend)
            except ValueError as error:
                answers[i] = {"error": str(error)}
                continue
            prompts.append(prompt)
            candidates.append(tokens)
            marks.append(described)
            readable.append((i, items))
        if prompts:
            rollout = self._decode(prompts, candidates, marks if self.builder.marked else None, decoding, generator)
            check_outputs(rollout)
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
        marks: Any,
        decoding: Decoding,
        generator: torch.Generator | None,
    ) -> Rollout:
        """One ranking per prompt."""
        common: dict[str, Any] = {
            "marks": marks,
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

    def _marks(self, items: list[Item], history: list[Item], trend: np.ndarray) -> list[list[int]] | None:
        """What describes each candidate; items that have marks are all in the catalogue."""
        if not self.builder.marked:
            return None
        shown, ranked = (
            np.array([self._catalogue.index[item.id] for item in group], dtype=np.int64) for group in (history, items)
        )
        return self.builder.marks_of(trend, novelty_of(shown, ranked, self._catalogue))

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
            index = self._catalogue.index.get(item_id)
            title = None if index is None else self._catalogue.titles[index]
        if title is None:
            raise ValueError(f"'{where}' has no 'title', and the id {item_id!r} is not in the run's catalogue")
        if not isinstance(title, str):
            raise ValueError(f"the title of '{where}' must be a string, got {type(title).__name__}")
        return Item(item_id, title)
