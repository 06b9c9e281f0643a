"""A model of rankings as tokens that enumerates every well-formed completion, and random tasks to hold it against."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st


@dataclass
class Spelled:
    """One ranking, spelled: its tokens, and for every rank where its item begins and ends."""

    ranking: tuple[int, ...]
    tokens: list[int]
    spans: list[tuple[int, int]]


class Language:
    """All well-formed completions of one row, by enumeration: slow and beyond doubt."""

    def __init__(self, candidates: list[list[int]], separator: list[int], end: list[int], num_ranked: int) -> None:
        self.candidates = candidates
        self.spellings = []
        for ranking in itertools.permutations(range(len(candidates)), num_ranked):
            tokens: list[int] = []
            spans = []
            for rank, item in enumerate(ranking):
                spans.append((len(tokens), len(tokens) + len(candidates[item])))
                tokens = tokens + candidates[item] + (separator if rank < num_ranked - 1 else end)
            self.spellings.append(Spelled(ranking, tokens, spans))

    def consistent(self, prefix: list[int]) -> list[Spelled]:
        return [s for s in self.spellings if s.tokens[: len(prefix)] == prefix]

    def allowed(self, prefix: list[int]) -> list[int]:
        return sorted({s.tokens[len(prefix)] for s in self.consistent(prefix) if len(s.tokens) > len(prefix)})

    def forced(self, prefix: list[int]) -> list[int]:
        run: list[int] = []
        while len(allowed := self.allowed(prefix + run)) == 1:
            run += allowed
        return run

    def read(self, tokens: list[int]) -> Spelled | None:
        """What a whole completion says: the ranking whose item is the longer where two first differ."""
        exact = [s for s in self.spellings if s.tokens == tokens]
        return min(exact, key=lambda s: ([-len(self.candidates[i]) for i in s.ranking], s.ranking), default=None)

    def never_begins_another(self) -> bool:
        """Whether no completion is the beginning of another, so that it is known when one is finished."""
        rows = sorted(s.tokens for s in self.spellings)
        return all(a == b or b[: len(a)] != a for a, b in itertools.pairwise(rows))

    def placed(self, prefix: list[int]) -> tuple[int, ...]:
        """Items that are certain after `prefix`: of equal sequences the first left, so the least ranking."""
        consistent = self.consistent(prefix)
        least = min(s.ranking for s in consistent)
        for rank in range(len(least)):
            spans = {s.spans[rank] for s in consistent}
            if len(spans) > 1 or spans.pop()[1] > len(prefix):
                return least[:rank]
        return least

    def below(self, prefix: list[int], ranking: tuple[int, ...], rank: int) -> set[int]:
        return {s.ranking[rank] for s in self.consistent(prefix) if s.ranking[:rank] == ranking[:rank]}


def may_fork(candidates: list[list[int]], separator: list[int], end: list[int], num_ranked: int) -> bool:
    tails = ([separator] if num_ranked >= 2 else []) + ([end] if num_ranked < len(candidates) else [])
    """Whether a token may go on with a candidate and close one, so that a beginning can be read in two ways."""
    return any(
        len(a) < len(b) and b[: len(a)] == a and (not tail or tail[0] == b[len(a)])
        for a, b in itertools.permutations(candidates, 2)
        for tail in tails
    )


def parse_model(
    tokens: list[int], language: Language, separator: list[int], end: list[int], num_ranked: int
) -> tuple[list[int], bool, int, int, int, list[int]]:
    """The documented rule, with lists: (ranking, valid, repeated, missing, unknown, item_ids)."""
    spelling = language.read(tokens)
    if spelling is not None:
        item_ids = [-1] * len(tokens)
        for rank, (begin, stop) in enumerate(spelling.spans):
            item_ids[begin:stop] = [rank] * (stop - begin)
        return list(spelling.ranking), True, 0, 0, 0, item_ids
    # What it is made of: mentions ("m"), separators ("s"), ends ("e") and unknown stretches ("u").
    kinds, mentions = "", []
    i = 0
    while i < len(tokens):
        tail = max(len(t) if tokens[i : i + len(t)] == t else 0 for t in (separator, end))
        matches = [c for c in language.candidates if tokens[i : i + len(c)] == c]
        if matches and not (kinds.endswith("m") and tail):
            mentions.append((i, max(matches, key=len)))
            kinds, i = kinds + "m", i + len(mentions[-1][1])
        elif tail:
            kinds, i = kinds + ("s" if tokens[i : i + tail] == separator else "e"), i + tail
        else:
            kinds, i = kinds + ("" if kinds.endswith("u") else "u"), i + 1

    # The longest run of mentions joined by separators, the last of equals; all mentions where none are joined.
    runs: list[list[int]] = []
    between = re.split("m", kinds)[1:-1]
    for mention in range(len(mentions)):
        if mention > 0 and between[mention - 1].startswith("s") and between[mention - 1].endswith("s"):
            runs[-1].append(mention)
        else:
            runs.append([mention])
    run = max(reversed(runs), key=len, default=[])
    if len(run) < 2 or not separator:
        run = list(range(len(mentions)))

    item_ids, mentioned, ranking = [-1] * len(tokens), [], []
    repeated = 0
    for begin, item in (mentions[mention] for mention in run):
        left = [k for k, c in enumerate(language.candidates) if c == item and k not in mentioned]
        if not left:
            repeated += 1
        elif len(ranking) < num_ranked:
            item_ids[begin : begin + len(item)] = [len(ranking)] * len(item)
            ranking.append(left[0])
        mentioned += left[:1]
    missing = num_ranked - len(ranking)
    rest = [k for k in range(len(language.candidates)) if k not in mentioned]
    return (ranking + rest)[:num_ranked], False, repeated, missing, kinds.count("u"), item_ids


@dataclass
class Task:
    candidates: list[list[list[int]]]
    separator: list[int]
    end: list[int]
    num_ranked: Any
    num_generations: int

    @property
    def row_candidates(self) -> list[list[list[int]]]:
        return [c for c in self.candidates for _ in range(self.num_generations)]

    @property
    def counts(self) -> list[int]:
        given = self.num_ranked if isinstance(self.num_ranked, list) else [self.num_ranked] * len(self.row_candidates)
        return [len(c) if t is None else min(t, len(c)) for t, c in zip(given, self.row_candidates, strict=True)]

    @property
    def options(self) -> dict[str, Any]:
        return {
            "separator": self.separator,
            "end": self.end,
            "num_ranked": self.num_ranked,
            "num_generations": self.num_generations,
        }

    @property
    def may_fork(self) -> bool:
        rows = zip(self.row_candidates, self.counts, strict=True)
        return any(may_fork(c, self.separator, self.end, t) for c, t in rows)

    @property
    def has_certain_end(self) -> bool:
        """By what is sure to suffice: all candidates are ranked, or the end begins with a token of its own."""
        ids = {token for candidates in self.candidates for tokens in candidates for token in tokens}
        own_end = bool(self.end) and self.end[0] not in ids | set(self.separator)
        return own_end or all(len(c) == t for c, t in zip(self.row_candidates, self.counts, strict=True))

    def languages(self) -> list[Language]:
        rows = zip(self.row_candidates, self.counts, strict=True)
        return [Language(c, self.separator, self.end, t) for c, t in rows]


def token_lists(max_token: int, min_size: int, max_size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, max_token), min_size=min_size, max_size=max_size)


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """Few token ids, so that duplicates, prefixes and separators inside items are common."""
    candidates = draw(st.lists(st.lists(token_lists(3, 1, 3), min_size=1, max_size=4), min_size=1, max_size=3))
    num_generations = draw(st.integers(1, 2))
    lengths = [len(c) for c in candidates for _ in range(num_generations)]
    num_ranked = draw(
        st.one_of(st.none(), st.integers(1, max(lengths)), st.tuples(*[st.integers(1, n) for n in lengths]).map(list))
    )
    return Task(candidates, draw(token_lists(5, 0, 2)), draw(token_lists(5, 0, 2)), num_ranked, num_generations)


def plain_tasks() -> st.SearchStrategy[Task]:
    """Every beginning can be read in one way only."""
    return tasks().filter(lambda task: not task.may_fork)


def certain_tasks() -> st.SearchStrategy[Task]:
    """Beginnings may be read in several ways, but it is known when one is finished."""
    return tasks().filter(lambda task: not task.may_fork or task.has_certain_end)


def csr_rows(values: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [values[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def draw_rankings(task: Task, data: st.DataObject) -> np.ndarray:
    rankings = np.full((len(task.counts), max(task.counts)), -1)
    for row, (candidates, count) in enumerate(zip(task.row_candidates, task.counts, strict=True)):
        rankings[row, :count] = data.draw(st.permutations(range(len(candidates))))[:count]
    return rankings


def sampled_long_lists(num_rows: int, seed: int) -> tuple[list[list[list[int]]], np.random.Generator]:
    """Ragged lists beyond one 64-bit word of candidates, titles sharing prefixes, some twice."""
    rng = np.random.default_rng(seed)
    candidates = []
    for _ in range(num_rows):
        size = int(rng.integers(1, 150))
        titles = [rng.integers(0, 12, size=rng.integers(1, 7)).tolist() for _ in range(size)]
        candidates.append(titles + titles[: size // 10])
    return candidates, rng
