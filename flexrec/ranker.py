"""A trained run that answers requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flexrec.data.lists import Catalogue
from flexrec.decoding.options import Decoding
from flexrec.decoding.sample import Rollout, best_of, sample_rankings, search_rankings
from flexrec.evaluation.evaluate import check_outputs
from flexrec.experiment.run_folder import RunFolder
from flexrec.task.descriptions import Item, Token, query_match
from flexrec.task.needs import get_need, novelty_of
from flexrec.task.prompts import shown_text, strongest_risers

MAX_TOKENS = 2**16  # of prompts that are decoded together, padding included


class Ranker:
    """A trained run, loaded from its folder, that ranks the candidates of requests.

    A request is a dictionary: ``need`` (a known name, or an instruction in words), ``candidates`` (a list of
    ``{"id": .., "title": .., "topics": [..]}``; ids alone where they are in a catalogue), and ``history`` (ids, or
    dictionaries like the candidates', oldest first; ``"liked": false`` marks what was seen and not liked,
    ``"interest"`` says from 0 to 1 how much it was, and is null where nobody knows) or ``user`` (whose history the run
    has logged).

    Items that the run was not trained with are ranked by what their titles and topics say.

    Args:
        items: a catalogue of further items, to be asked for by their ids; where it has an id of the run's, it counts.
    """

    def __init__(self, folder: str | Path, items: Catalogue | None = None) -> None:
        run = RunFolder(folder)
        self.info, self.model, self.builder = run.load()
        trained_with, self._trend, self._rises = run.read_catalogue()
        catalogues = [catalogue for catalogue in (trained_with, items) if catalogue is not None]
        self._items = {item_id: (catalogue, i) for catalogue in catalogues for item_id, i in catalogue.index.items()}
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
        readable: list[_Readable] = []
        for i, request in enumerate(requests):
            try:
                check_text(request)
                items = self._candidates(request)
                trend = np.array([self._trend.get(item.id, 0.0) for item in items])
                rising = [items[j] for j in strongest_risers(trend)]
                history, interest = self._history(request)
                query = self._query(request)
                match = query_match(query, [item.title for item in items])
                marks = self.builder.marks_of(trend, _novelty(history, items), match)
                prompt, _ = self.builder.prompt(
                    self._wording(request),
                    history,
                    items,
                    interest=interest,
                    rising=rising,
                    rises=[self._rises[item.id] for item in rising] if self._rises else None,
                    marks=marks,
                    query=query,
                )
                tokens = self.builder.candidate_tokens(items, marks)
                self.builder.check_answers(tokens, decoding.num_ranked or self.info.num_ranked)
                self._check_length(prompt, tokens, decoding)
            except ValueError as error:
                answers[i] = {"error": str(error)}
                continue
            ids = [entry["id"] if isinstance(entry, dict) else entry for entry in request["candidates"]]
            readable.append(_Readable(i, ids, prompt, tokens))
        for part in _together(readable, max(decoding.num_beams, decoding.best_of)):
            rollout = self._decode([one.prompt for one in part], [one.tokens for one in part], decoding, generator)
            check_outputs(rollout)
            for one, ranking, logprobs in zip(part, rollout.rankings, rollout.logprobs, strict=True):
                answers[one.position] = {
                    "ranking": [
                        {"id": one.ids[c], "probability": round(float(np.exp(lp)), 6)}
                        for c, lp in zip(ranking, logprobs, strict=True)
                        if c >= 0
                    ]
                }
        return answers

    def _check_length(self, prompt: list[Token], tokens: list[list[Token]], decoding: Decoding) -> None:
        """Raise a ValueError where the model has no positions for the prompt and the longest answer to it."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        ranks = min(decoding.num_ranked or self.info.num_ranked or len(tokens), len(tokens))
        longest = max(map(len, tokens)) + len(self.builder.separator)
        needed = len(prompt) + ranks * longest + len(self.builder.end)
        if limit is not None and needed > limit:
            raise ValueError(
                f"the request takes {needed} tokens ({len(prompt)} of the prompt, up to {needed - len(prompt)} of the "
                f"answer), and the model has {limit} positions: give fewer candidates, or shorter titles"
            )

    def _decode(
        self,
        prompts: list[list[Token]],
        candidates: list[list[list[Token]]],
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

    def _query(self, request: dict[str, Any]) -> str:
        query = request.get("query", "")
        if not isinstance(query, str):
            raise ValueError(f"'query' must be what is searched for, in words, got {_shown(query)}")
        if request.get("need") == "search" and not query.strip():
            raise ValueError("the need 'search' takes a 'query', in words")
        return query

    def _candidates(self, request: dict[str, Any]) -> list[Item]:
        given = request.get("candidates")
        if not isinstance(given, list) or not given:
            raise ValueError("'candidates' must be a list of at least one {'id': .., 'title': ..}")
        items = [self._item(entry, f"candidates[{j}]") for j, entry in enumerate(given)]
        counts = Counter(item.id for item in items)
        repeated = [item_id for item_id, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"'candidates' has the id {min(repeated)!r} more than once")
        return items

    def _history(self, request: dict[str, Any]) -> tuple[list[Item], list[float]]:
        """The latest items of the history, and the interest in them, NaN where it is not known."""
        if self.info.max_history == 0 and "user" not in request:  # the run's data have no histories
            request = {"history": [], **request}
        if "history" in request:
            given = request["history"]
            if not isinstance(given, list):
                raise ValueError("'history' must be a list of ids or of {'id': .., 'title': ..}, oldest first")
            where = "history"
        elif "user" in request:
            user = _id(request["user"], "user")
            if user not in self._histories:
                raise ValueError(f"user {user!r} is not in the log of this run: give a 'history' instead")
            given, where = self._histories[user], "the user's history"
        else:
            raise ValueError("a request needs a 'history' (may be empty) or a 'user'")
        items = [self._item(entry, f"{where}[{j}]") for j, entry in enumerate(given)]
        interest = [_interest(entry, f"{where}[{j}]") for j, entry in enumerate(given)]
        shown = max(0, len(items) - self.info.max_history)
        return items[shown:], interest[shown:]

    def _item(self, entry: Any, where: str) -> Item:
        title, topics = None, None
        if isinstance(entry, dict):
            if entry.get("id") is None:
                raise ValueError(f"'{where}' has no 'id'")
            item_id, title, topics = _id(entry["id"], f"{where}.id"), entry.get("title"), entry.get("topics")
        else:
            item_id = _id(entry, where)
        catalogue, index = self._items.get(item_id, (None, 0))
        if title is None and catalogue is not None:
            title = catalogue.titles[index]
        if title is None:
            raise ValueError(f"'{where}' has no 'title', and the id {item_id!r} is not in the run's catalogue")
        if not isinstance(title, str):
            raise ValueError(f"the title of '{where}' must be a string, got {type(title).__name__}")
        if topics is None:
            topics = () if catalogue is None else catalogue.topics[index]
        elif not isinstance(topics, list) or not all(isinstance(topic, str) for topic in topics):
            raise ValueError(f"the topics of '{where}' must be a list of strings, got {_shown(topics)}")
        topics = tuple(dict.fromkeys(topics))
        if self.builder.show == ("title",):
            return Item(item_id, title, topics)
        columns = {} if catalogue is None else {name: values[index] for name, values in catalogue.columns.items()}
        given = entry if isinstance(entry, dict) else {}
        for name in set(self.builder.show) & set(given) - {"title", "category"}:
            value = given[name]
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError(f"{name!r} of '{where}' must be a text or a number, got {_shown(value)}")
            columns[name] = value if isinstance(value, str) else float(value)
        return Item(item_id, title, topics, shown_text(self.builder.show, title, topics, columns))


def _interest(entry: Any, where: str) -> float:
    """How much an item of a history was liked: an id alone was."""
    if not isinstance(entry, dict):
        return 1.0
    if "interest" in entry:
        if "liked" in entry:
            raise ValueError(f"'{where}' says 'liked' and 'interest': give one of the two")
        value = entry["interest"]
        if value is None:
            return float("nan")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"'interest' of '{where}' must lie in [0, 1] or be null, got {_shown(value)}")
        return float(value)
    liked = entry.get("liked", True)
    if not isinstance(liked, bool):
        raise ValueError(f"'liked' of '{where}' must be true or false, got {_shown(liked)}")
    return float(liked)


def _novelty(history: list[Item], candidates: list[Item]) -> np.ndarray:
    """(K,) how new the topics of each candidate are to the history, as in training."""
    items = [*history, *candidates]
    numbers = tuple(map(str, range(len(items))))  # an item may be in both
    catalogue = Catalogue(numbers, tuple(item.title for item in items), tuple(item.topics for item in items))
    at = np.arange(len(items))
    return novelty_of(at[: len(history)], at[len(history) :], catalogue)


class _Readable(NamedTuple):
    """A request that can be answered."""

    position: int
    ids: list[Any]  # (K,) of the candidates, as they came
    prompt: list[Token]
    tokens: list[list[Token]]


def _together(requests: Sequence[_Readable], copies: int) -> Iterator[list[_Readable]]:
    """Parts of the requests, in order, whose prompts take at most ``MAX_TOKENS`` tokens, or are single ones."""
    part: list[_Readable] = []
    longest = 0
    for request in requests:
        longest = max(longest, len(request.prompt))
        if part and longest * (len(part) + 1) * copies > MAX_TOKENS:
            yield part
            part, longest = [], len(request.prompt)
        part.append(request)
    if part:
        yield part


def check_text(request: Any) -> None:
    """Raise a ValueError where a string anywhere in the request is no text: half of a surrogate pair."""
    waiting = [request]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"half of a surrogate pair is no text, got {_shown(value)}")


def _id(value: Any, where: str) -> str:
    """An id as the catalogue knows it: strings and whole numbers are ids."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"'{where}' must be an id, a string or a whole number, got {_shown(value)}")
    return str(value)


def _shown(value: Any) -> str:
    """A value for a message: short, on one line, and text."""
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
