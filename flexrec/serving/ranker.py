"""A trained run that answers requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flexrec.data.lists import Catalogue
from flexrec.decoding.one_pass import first_choices
from flexrec.decoding.options import Decoding
from flexrec.decoding.rollout import Rollout, best_of
from flexrec.decoding.sample import sample_rankings, search_rankings
from flexrec.evaluation.evaluate import check_outputs
from flexrec.experiment.config import EMBEDDED
from flexrec.experiment.export import folder_of, write_export
from flexrec.experiment.needs import known_needs, renamed, untrained, wordings_of
from flexrec.experiment.run_folder import RunFolder
from flexrec.rankings.reasoning import ReasoningTokens
from flexrec.serving.items import KnownItems
from flexrec.serving.requests import check_text, id_of, interest_of, misspelt, shown, top_n_of
from flexrec.serving.windows import given_id, rank_in_windows
from flexrec.task.descriptions import Item, Token, title_words
from flexrec.task.mixtures import find_need, is_mixture
from flexrec.task.needs import Need
from flexrec.task.prompts import strongest_risers

MAX_TOKENS = 2**16  # of prompts that are decoded together, padding included
MAX_REQUESTS = 64  # that a stream waits for


class Ranker:
    """A trained run, loaded from its folder, that ranks the candidates of requests.

    A request is a dictionary: ``need`` (a known name, a mixture of such, or an instruction in words, which
    ``{"words": ..}`` is however short), ``candidates`` (a list of ``{"id": .., "title": .., "topics": [..]}``; ids or
    titles alone where they are in a catalogue, titles once), and ``history`` (the same, oldest first; ``"liked":
    false`` marks what was seen and not liked, ``"interest"`` says from 0 to 1 how much it was, and is null where nobody
    knows) or ``user`` (whose history the run has logged). With ``top_n`` the answer is the best so many.

    Items that the run was not trained with are ranked by what their titles and topics say. Other keys are left alone,
    so that an asker's own may stand in a request; one that is nearly one of these is warned of.

    Args:
        items: a catalogue of further items, to be asked for by their ids; where it has an id of the run's, it counts.
        needs: made in Python, to be known by their names beside the run's own.

    Example:
        >>> ranker = flexrec.Ranker.from_pretrained("runs/first")
        >>> request = {"need": "interest", "history": ["17", "4"], "candidates": ["8", "9", "21"], "top_n": 2}
        >>> (answer,) = ranker.rank([request])
        >>> len(answer["ranking"]), sorted(answer["ranking"][0])
        (2, ['id', 'probability', 'score'])
    """

    def __init__(self, folder: str | Path, items: Catalogue | None = None, needs: Sequence[Need] = ()) -> None:
        run = RunFolder(folder)
        self.info, self.model, self.builder = run.load()
        self._needs = known_needs(kept=self.info.own_needs, made=needs)
        self._wordings = wordings_of(self.info, self._needs)
        trained_with, self._trend, self._rises = run.read_catalogue()
        catalogues = [catalogue for catalogue in (trained_with, items) if catalogue is not None]
        self._known = KnownItems(catalogues, run.read_popularity(), self.builder.show)
        self._folder, self._histories = run, run.read_histories()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        items: Catalogue | None = None,
        needs: Sequence[Need] = (),
        *,
        revision: str | None = None,
    ) -> Ranker:
        """The ranker of a run's folder, of what :meth:`save_pretrained` wrote, or of a repository of the hub.

        Args:
            name: a folder; where there is none of this name, ``"owner/name"`` at the hub, which is fetched once.
            revision: a branch, tag or commit of the repository.

        Raises:
            FileNotFoundError: no folder, and no repository that could be reached.
        """
        return cls(folder_of(name, revision), items, needs)

    def save_pretrained(self, folder: str | Path, *, histories: bool = True) -> None:
        """Write what ranking needs, and nothing else of the run, with its card (README.md): what may be put on a hub.

        Args:
            histories: with what the users of the log had, by which requests may name a ``user``; leave it out where
                that is nobody's business.

        Raises:
            FileExistsError: the folder exists and is not empty.
        """
        write_export(self._folder, Path(folder), self.model, self.builder.tokenizer, self.info, histories=histories)

    @cached_property
    def needs(self) -> dict[str, Need]:
        """Needs by name, those that the run was trained on first."""
        trained = {name: find_need(name, self._needs) for name in self.info.needs if self._is_known(name)}
        return {**trained, **self._needs}

    @property
    def users(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """The last items of every logged user, ``{"id", "interest"}`` each, oldest first."""
        return self._histories

    @cached_property
    def items(self) -> dict[str, Item]:
        """The items that may be asked for by their ids."""
        return self._known.all()

    def id_titled(self, title: str) -> str | None:
        """The id of the one item of this title; None where there is none, or more than one."""
        return self._known.id_titled(title)

    def _is_known(self, name: str) -> bool:
        try:
            return bool(find_need(name, self._needs))
        except ValueError:  # made in Python
            return False

    def rank(
        self,
        requests: Sequence[dict[str, Any]],
        decoding: Decoding | None = None,
        *,
        top_n: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[dict[str, Any]]:
        """Answer requests together: ``{"ranking": [{"id", "probability", "score"}, ..]}`` each, best first, and
        ``"warning"`` where the need is not one that the run was trained on.

        ``probability`` is that of the item at its rank, given those above it and all that remain, at the temperature
        of training, or of ``decoding``; the last one's is 1. ``score`` is the probability that the item would be the
        first of all candidates: it can be compared down the list. A malformed request gets ``{"error": why}``; the
        others are answered. What a strategy has ranked by windows has no numbers for items, but ``calls``, how many
        windows that took.

        Args:
            decoding: how answers are found; default: greedily.
            top_n: the best so many only, where a request does not say it itself.
            generator: randomness of samples, on the model's device.
        """
        decoding = decoding or Decoding()
        if decoding.strategy is not None:
            return self._in_windows(requests, decoding, top_n, generator)
        return self._answers([self._read(request, decoding, top_n) for request in requests], decoding, generator)

    def stream(
        self,
        requests: Iterable[dict[str, Any]],
        decoding: Decoding | None = None,
        *,
        top_n: int | None = None,
        generator: torch.Generator | None = None,
        batch_tokens: int = 2**14,
    ) -> Iterator[dict[str, Any]]:
        """Answers in the order of the requests, as :meth:`rank` gives them, as soon as a batch is answered.

        Args:
            requests: may be endless: what has not come yet is not waited for by more than a batch.
            batch_tokens: requests are ranked together until their prompts take so many tokens, padding included.
        """
        decoding = decoding or Decoding()
        if decoding.strategy is not None:
            for request in requests:
                yield from self._in_windows([request], decoding, top_n, generator)
            return
        part: list[_Readable | dict[str, Any]] = []
        longest = 0
        for request in requests:
            one = self._read(request, decoding, top_n)
            length = max(longest, len(one.prompt) if isinstance(one, _Readable) else 0)
            if part and (length * (len(part) + 1) > batch_tokens or len(part) == MAX_REQUESTS):
                yield from self._answers(part, decoding, generator)
                part, length = [], len(one.prompt) if isinstance(one, _Readable) else 0
            part.append(one)
            longest = length
        yield from self._answers(part, decoding, generator)

    def score(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What each candidate is worth at first sight, in one pass over the prompts: nothing is decoded.

        Answers are ``{"scores": [{"id", "score"}, ..], "tokens": of the prompt}`` in the order of the candidates, with
        ``"warning"`` or ``{"error": why}`` as :meth:`rank` has them. Scores of a list sum to 1.
        """
        read = [self._read(request, Decoding(num_ranked=1), None) for request in requests]
        answers = [one if isinstance(one, dict) else {} for one in read]
        for part in _together(read, 1):
            reasoning = None
            if self.builder.reasoning:  # comes before the first choice
                prompts, tokens = [one.prompt for one in part], [one.tokens for one in part]
                reasoning = self._decode(prompts, tokens, Decoding(), None, 1).reasoning
            for one, scores in zip(part, self._first(part, Decoding(), reasoning), strict=True):
                listed = [{"id": i, "score": _short(p)} for i, p in zip(one.ids, scores.tolist(), strict=True)]
                answers[one.position] = {"scores": listed, "tokens": len(one.prompt), **one.said()}
        return answers

    def _in_windows(
        self,
        requests: Sequence[dict[str, Any]],
        decoding: Decoding,
        top_n: int | None,
        generator: torch.Generator | None,
    ) -> list[dict[str, Any]]:
        """Those with more candidates than a window by the strategy, the others as they are."""
        plainly = replace(decoding, strategy=None, window=Decoding.window, step=None)
        answers: list[dict[str, Any]] = [{} for _ in requests]
        long: list[tuple[int, list[Any], str, int | None]] = []  # position, candidates, warning, best so many
        short = []
        for i, request in enumerate(requests):
            try:
                items, ids, repeated = self._candidates(request if isinstance(request, dict) else {})
                best = top_n_of(request.get("top_n", top_n))
            except ValueError:  # which a plain request says as well
                short.append(i)
                continue
            if len(items) <= decoding.window:
                short.append(i)
                continue
            given = {self._known.item(entry, "candidates").id: entry for entry in reversed(request["candidates"])}
            named = [
                {**entry, "id": own} if isinstance(entry := given[item.id], dict) else entry
                for item, own in zip(items, ids, strict=True)
            ]
            long.append((i, named, repeated, best))
        at_once = self.rank([requests[i] for i in short], plainly, top_n=top_n, generator=generator)
        for i, answer in zip(short, at_once, strict=True):
            answers[i] = answer
        if long:
            without = [{name: value for name, value in requests[i].items() if name != "top_n"} for i, *_ in long]
            found = rank_in_windows(
                without,
                [named for _, named, _, _ in long],
                decoding,
                lambda asked, how: self.rank(asked, how, generator=generator),
            )
            for (i, _, repeated, best), answer in zip(long, found, strict=True):
                if "ranking" in answer:
                    answer["ranking"] = answer["ranking"][:best]
                    if warning := "; ".join(part for part in (repeated, answer.pop("warning", "")) if part):
                        answer["warning"] = warning
                answers[i] = answer
        return answers

    def _read(self, request: Any, decoding: Decoding, top_n: int | None) -> _Readable | dict[str, Any]:
        """The request as the model takes it, or its error."""
        try:
            if not isinstance(request, dict):
                raise ValueError(f"a request is a dictionary, got {type(request).__name__}")
            check_text(request)
            items, ids, repeated = self._candidates(request)
            trend = np.array([self._trend.get(item.id, 0.0) for item in items])
            rising = [items[j] for j in strongest_risers(trend)]
            history, interest = self._history(request)
            query = self._query(request)
            wording, warning = self._wording(request)
            marks = self.builder.marks_in(*self._known.as_list(history, items, trend, query))
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
            best = top_n_of(request.get("top_n", top_n))
        except ValueError as error:
            return {"error": str(error)}
        warnings = "; ".join(part for part in (*misspelt(request), repeated, warning) if part)
        return _Readable(ids, prompt, tokens, warnings, best)

    def _answers(
        self,
        read: Sequence[_Readable | dict[str, Any]],
        decoding: Decoding,
        generator: torch.Generator | None,
    ) -> list[dict[str, Any]]:
        answers = [one if isinstance(one, dict) else {} for one in read]
        for part in _together(read, max(decoding.num_beams, decoding.best_of)):
            prompts, tokens = [one.prompt for one in part], [one.tokens for one in part]
            ranks = decoding.num_ranked or self.info.num_ranked
            if not decoding.samples and decoding.num_beams == 1 and all(one.top_n for one in part):
                asked = max(one.top_n for one in part if one.top_n)  # greedily, the first ranks know of no others
                ranks = min(ranks or asked, asked)
            rollout = self._decode(prompts, tokens, decoding, generator, ranks)
            check_outputs(rollout)
            firsts = self._first(part, decoding, rollout.reasoning)
            for one, ranking, logprobs, first in zip(part, rollout.rankings, rollout.logprobs, firsts, strict=True):
                answers[one.position] = {
                    "ranking": [
                        {"id": one.ids[c], "probability": round(float(np.exp(lp)), 6), "score": _short(first[c])}
                        for c, lp in zip(ranking, logprobs, strict=True)
                        if c >= 0
                    ][: one.top_n],
                    **one.said(),
                }
        return answers

    def _first(
        self, part: Sequence[_Readable], decoding: Decoding, reasoning: ReasoningTokens | None
    ) -> list[np.ndarray]:
        """(K,) of each request, how probable every candidate is to be the first, after what was reasoned."""
        said = [[]] * len(part) if reasoning is None else [row.tolist() for row in reasoning.tokens]
        return first_choices(
            self.model,
            [[*one.prompt, *row] for one, row in zip(part, said, strict=True)],
            [one.tokens for one in part],
            separator=self.builder.separator,
            end=self.builder.end,
            temperature=decoding.temperature or self.info.temperature,
        )

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
        ranks: int | None,
    ) -> Rollout:
        """One ranking per prompt, of at most so many ranks."""
        common: dict[str, Any] = {
            "separator": self.builder.separator,
            "end": self.builder.end,
            "num_ranked": ranks,
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
        in_words = isinstance(need, dict) and set(need) == {"words"}
        if isinstance(need, dict) and in_words:
            need = need["words"]
        if not isinstance(need, str) or not need.strip():
            raise ValueError("'need' must be the name of a need or an instruction in words")
        text = need.strip()
        if in_words:
            return need, self._new_words(text)
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
            raise ValueError(f"'query' must be what is searched for, in words, got {shown(query)}")
        if request.get("need") == "search" and not query.strip():
            raise ValueError("the need 'search' takes a 'query', in words")
        return query

    def _candidates(self, request: dict[str, Any]) -> tuple[list[Item], list[Any], str]:
        """The candidates, their ids as they came, and what to beware of: one that is given again counts once."""
        given = request.get("candidates")
        if not isinstance(given, list) or not given:
            raise ValueError("'candidates' must be a list of at least one {'id': .., 'title': ..}")
        items = [self._known.item(entry, f"candidates[{j}]") for j, entry in enumerate(given)]
        # A null is no id: who gives it with a title names the item by its title.
        own = [given_id(entry) for entry in given]
        ids = [item.id if one is None else one for one, item in zip(own, items, strict=True)]
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
            user = id_of(request["user"], "user")
            if user not in self._histories:
                raise ValueError(f"user {user!r} is not in the log of this run: give a 'history' instead")
            given, where = self._histories[user], "the user's history"
        else:
            raise ValueError("a request needs a 'history' (may be empty) or a 'user'")
        items = [self._known.item(entry, f"{where}[{j}]") for j, entry in enumerate(given)]
        interest = [interest_of(entry, f"{where}[{j}]") for j, entry in enumerate(given)]
        shown = max(0, len(items) - self.info.max_history)
        return items[shown:], interest[shown:]


class _Readable(NamedTuple):
    """A request that can be answered."""

    ids: list[Any]  # (K,) of the candidates, as they came
    prompt: list[Token]
    tokens: list[list[Token]]
    warning: str  # or nothing
    top_n: int | None  # the best so many are asked for
    position: int = -1  # among those that are answered together

    def said(self) -> dict[str, str]:
        return {"warning": self.warning} if self.warning else {}


def _together(read: Sequence[_Readable | dict[str, Any]], copies: int) -> Iterator[list[_Readable]]:
    """Parts of the requests, in order, whose prompts take at most ``MAX_TOKENS`` tokens, or are single ones."""
    part: list[_Readable] = []
    longest = 0
    for position, request in enumerate(read):
        if isinstance(request, dict):
            continue
        longest = max(longest, len(request.prompt))
        if part and longest * (len(part) + 1) * copies > MAX_TOKENS:
            yield part
            part, longest = [], len(request.prompt)
        part.append(request._replace(position=position))
    if part:
        yield part


def _short(score: Any) -> float:
    """Six digits that count, so that small ones can be told apart."""
    return float(f"{float(score):.6g}")
