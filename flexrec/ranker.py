"""A trained run that answers requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flexrec.data.lists import Catalogue, RankingList
from flexrec.decoding.options import Decoding
from flexrec.decoding.rollout import Rollout, best_of
from flexrec.decoding.sample import sample_rankings, search_rankings
from flexrec.evaluation.evaluate import check_outputs
from flexrec.experiment.config import EMBEDDED
from flexrec.experiment.needs import known_needs, renamed, untrained, wordings_of
from flexrec.experiment.run_folder import RunFolder
from flexrec.task.descriptions import Item, Token, title_words
from flexrec.task.mixtures import find_need, is_mixture
from flexrec.task.needs import Need
from flexrec.task.prompts import shown_text, strongest_risers

MAX_TOKENS = 2**16  # of prompts that are decoded together, padding included


class Ranker:
    """A trained run, loaded from its folder, that ranks the candidates of requests.

    A request is a dictionary: ``need`` (a known name, a mixture of such, or an instruction in words), ``candidates``
    (a list of ``{"id": .., "title": .., "topics": [..]}``; ids alone where they are in a catalogue), and ``history``
    (ids, or dictionaries like the candidates', oldest first; ``"liked": false`` marks what was seen and not liked,
    ``"interest"`` says from 0 to 1 how much it was, and is null where nobody knows) or ``user`` (whose history the run
    has logged).

    Items that the run was not trained with are ranked by what their titles and topics say. Other keys are left alone,
    so that an asker's own may stand in a request; one that is nearly one of these is warned of.

    Args:
        items: a catalogue of further items, to be asked for by their ids; where it has an id of the run's, it counts.
        needs: made in Python, to be known by their names beside the run's own.
    """

    def __init__(self, folder: str | Path, items: Catalogue | None = None, needs: Sequence[Need] = ()) -> None:
        run = RunFolder(folder)
        self.info, self.model, self.builder = run.load()
        self._needs = known_needs(kept=self.info.own_needs, made=needs)
        self._wordings = wordings_of(self.info, self._needs)
        trained_with, self._trend, self._rises = run.read_catalogue()
        catalogues = [catalogue for catalogue in (trained_with, items) if catalogue is not None]
        self._items = {item_id: (catalogue, i) for catalogue in catalogues for item_id, i in catalogue.index.items()}
        # Of each column, where it stands for numbers or texts, what stands for nothing.
        self._columns = {
            name: (values.dtype, "" if values.dtype == object else np.nan)
            for catalogue in catalogues
            for name, values in catalogue.columns.items()
        }
        self._histories, self._popularity = run.read_histories(), run.read_popularity()

    def rank(
        self,
        requests: Sequence[dict[str, Any]],
        decoding: Decoding | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> list[dict[str, Any]]:
        """Answer requests together: ``{"ranking": [{"id", "probability"}, ..]}`` each, best first, and ``"warning"``
        where the need is not one that the run was trained on.

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
                items, ids, repeated = self._candidates(request)
                trend = np.array([self._trend.get(item.id, 0.0) for item in items])
                rising = [items[j] for j in strongest_risers(trend)]
                history, interest = self._history(request)
                query = self._query(request)
                wording, warning = self._wording(request)
                marks = self.builder.marks_in(*self._as_list(history, items, trend, query))
                prompt, _ = self.builder.prompt(
                    wording,
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
            warnings = "; ".join(part for part in (*_misspelt(request), repeated, warning) if part)
            readable.append(_Readable(i, ids, prompt, tokens, warnings))
        for part in _together(readable, max(decoding.num_beams, decoding.best_of)):
            rollout = self._decode([one.prompt for one in part], [one.tokens for one in part], decoding, generator)
            check_outputs(rollout)
            for one, ranking, logprobs in zip(part, rollout.rankings, rollout.logprobs, strict=True):
                answers[one.position] = {
                    "ranking": [
                        {"id": one.ids[c], "probability": round(float(np.exp(lp)), 6)}
                        for c, lp in zip(ranking, logprobs, strict=True)
                        if c >= 0
                    ],
                    **({"warning": one.warning} if one.warning else {}),
                }
        return answers

    def _as_list(
        self, history: list[Item], candidates: list[Item], trend: np.ndarray, query: str
    ) -> tuple[RankingList, Catalogue]:
        """A request as data sets have their lists, with a catalogue of its items alone; an item may be in it twice."""
        items = [*history, *candidates]
        columns = {}
        for name, (dtype, nothing) in self._columns.items():
            known = (self._items.get(item.id, (None, 0)) for item in items)
            values = [nothing if of is None else of.columns.get(name, {i: nothing})[i] for of, i in known]
            columns[name] = np.array(values, dtype=dtype)
        catalogue = Catalogue(
            tuple(map(str, range(len(items)))),
            tuple(item.title for item in items),
            tuple(item.topics for item in items),
            columns,
        )
        at, popularity = np.arange(len(items)), [self._popularity.get(item.id, 0.0) for item in candidates]
        lst = RankingList(
            user=-1,
            time=0.0,
            history=at[: len(history)],
            candidates=at[len(history) :],
            interest=np.full(len(candidates), np.nan, dtype=np.float32),
            popularity=np.array(popularity, dtype=np.float32),
            trend=trend.astype(np.float32),
            query=query,
        )
        return lst, catalogue

    def _check_length(self, prompt: list[Token], tokens: list[list[Token]], decoding: Decoding) -> None:
        """Raise a ValueError where the model has no positions for the prompt and the longest answer to it."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        ranks = min(decoding.num_ranked or self.info.num_ranked or len(tokens), len(tokens))
        longest = max(map(len, tokens)) + len(self.builder.separator)
        answer = 0 if self._one_pass(decoding) else ranks * longest + len(self.builder.end)
        if self.builder.reasoning:
            answer += self.builder.reasoning["max_reasoning_tokens"] + len(self.builder.reasoning["reasoning_end"])
        needed = len(prompt) + answer
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
            if self.builder.reasoning:
                raise ValueError("this run reasons before it ranks, which beams do not: leave out num_beams")
            found = search_rankings(self.model, prompts, candidates, num_beams=decoding.num_beams, **common)
            return Rollout(found.rankings[:: decoding.num_beams], found.logprobs[:: decoding.num_beams])
        sampled = sample_rankings(
            self.model,
            prompts,
            candidates,
            num_generations=decoding.best_of,
            greedy=not decoding.samples,
            top_p=decoding.top_p or 1.0,
            one_pass=self._one_pass(decoding),
            **self.builder.reasoning,
            generator=generator,
            **common,
        )
        return best_of(sampled, decoding.best_of)

    def _one_pass(self, decoding: Decoding) -> bool:
        return (decoding.mode or self.info.mode) == "one-pass"

    def _wording(self, request: dict[str, Any]) -> tuple[str, str]:
        """The words of the request's need, and what to beware of."""
        need = request.get("need")
        if not isinstance(need, str) or not need.strip():
            raise ValueError("'need' must be the name of a need or an instruction in words")
        text = need.strip()
        if text in self._needs or " " not in text or (is_mixture(text) and any(name in text for name in self._needs)):
            found = find_need(text, self._needs)
            return found.wordings[0], "; ".join([*renamed([text], self._needs), *untrained([found], self.info)])
        return need, self._new_words(text)

    def _new_words(self, text: str) -> str:
        """A warning where most words of an instruction are new to a model that knows none but those of its training."""
        if self.info.model != EMBEDDED or not self._wordings or text in self._wordings:
            return ""
        known = {word for wording in self._wordings for word in title_words(wording)}
        words = title_words(text)
        new = [word for word in words if word not in known]
        if 2 * len(new) <= len(words):
            return ""
        return (
            f"{len(new)} of the {len(words)} words of the need are new to the model ({', '.join(new[:5])}): it was "
            f"trained on the needs {', '.join(self.info.needs)} and understands words like those of their wordings"
        )

    def _query(self, request: dict[str, Any]) -> str:
        query = request.get("query", "")
        if not isinstance(query, str):
            raise ValueError(f"'query' must be what is searched for, in words, got {_shown(query)}")
        if request.get("need") == "search" and not query.strip():
            raise ValueError("the need 'search' takes a 'query', in words")
        return query

    def _candidates(self, request: dict[str, Any]) -> tuple[list[Item], list[Any], str]:
        """The candidates, their ids as they came, and what to beware of: one that is given again counts once."""
        given = request.get("candidates")
        if not isinstance(given, list) or not given:
            raise ValueError("'candidates' must be a list of at least one {'id': .., 'title': ..}")
        items = [self._item(entry, f"candidates[{j}]") for j, entry in enumerate(given)]
        ids = [entry["id"] if isinstance(entry, dict) else entry for entry in given]
        first = {item.id: j for j, item in reversed(list(enumerate(items)))}
        once = sorted(first.values())
        repeated = sorted({item.id for j, item in enumerate(items) if first[item.id] != j})
        warning = f"'candidates' has the id {repeated[0]!r} more than once: the first counts" if repeated else ""
        return [items[j] for j in once], [ids[j] for j in once], warning

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


def _misspelt(request: dict[str, Any]) -> list[str]:
    """A warning for every key that means nothing and is nearly one that does; others are the asker's own."""
    found = []
    for key in request:
        if key not in KEYS and (meant := get_close_matches(key, KEYS, n=1, cutoff=0.7)):
            found.append(f"{_shown(key)} means nothing in a request and was ignored: {meant[0]!r}?")
    return found


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


KEYS = ("need", "user", "history", "candidates", "query")  # of a request


class _Readable(NamedTuple):
    """A request that can be answered."""

    position: int
    ids: list[Any]  # (K,) of the candidates, as they came
    prompt: list[Token]
    tokens: list[list[Token]]
    warning: str  # or nothing


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
