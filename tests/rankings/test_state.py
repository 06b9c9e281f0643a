"""RankingState, parse_rankings and encode_rankings against a model that enumerates every well-formed completion."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.rankings import (
    EncodedRankings,
    RankingState,
    encode_rankings,
    inverse_permutation,
    parse_rankings,
    validate_rankings,
)

# ---------------------------------------------------------------------------------------------------------- the model


@dataclass
class Spelling:
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
            self.spellings.append(Spelling(ranking, tokens, spans))

    def consistent(self, prefix: list[int]) -> list[Spelling]:
        return [s for s in self.spellings if s.tokens[: len(prefix)] == prefix]

    def allowed(self, prefix: list[int]) -> list[int]:
        return sorted({s.tokens[len(prefix)] for s in self.consistent(prefix) if len(s.tokens) > len(prefix)})

    def forced(self, prefix: list[int]) -> list[int]:
        run: list[int] = []
        while len(allowed := self.allowed(prefix + run)) == 1:
            run += allowed
        return run

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


def is_ambiguous(candidates: list[list[int]], separator: list[int], end: list[int], num_ranked: int) -> bool:
    tails = ([separator] if num_ranked >= 2 else []) + ([end] if num_ranked < len(candidates) else [])
    return any(
        len(a) < len(b) and b[: len(a)] == a and (not tail or tail[0] == b[len(a)])
        for a, b in itertools.permutations(candidates, 2)
        for tail in tails
    )


def parse_model(
    tokens: list[int], language: Language, separator: list[int], end: list[int], num_ranked: int
) -> tuple[list[int], bool, int, int, int, list[int]]:
    """The documented rule, with lists: (ranking, valid, repeated, missing, unknown, item_ids)."""
    exact = [s for s in language.spellings if s.tokens == tokens]
    if exact:
        spelling = min(exact, key=lambda s: s.ranking)
        item_ids = [-1] * len(tokens)
        for rank, (begin, stop) in enumerate(spelling.spans):
            item_ids[begin:stop] = [rank] * (stop - begin)
        return list(spelling.ranking), True, 0, 0, 0, item_ids
    item_ids, mentioned, ranking = [-1] * len(tokens), [], []
    repeated = unknown = i = 0
    after_mention = in_unknown = False
    while i < len(tokens):
        tail = max(len(t) if tokens[i : i + len(t)] == t else 0 for t in (separator, end))
        matches = [c for c in language.candidates if tokens[i : i + len(c)] == c]
        if matches and not (after_mention and tail):
            item = max(matches, key=len)
            left = [k for k, c in enumerate(language.candidates) if c == item and k not in mentioned]
            if not left:
                repeated += 1
            elif len(ranking) < num_ranked:
                item_ids[i : i + len(item)] = [len(ranking)] * len(item)
                ranking.append(left[0])
            mentioned += left[:1]
            after_mention, in_unknown, i = True, False, i + len(item)
        elif tail:
            after_mention, in_unknown, i = False, False, i + tail
        else:
            unknown += not in_unknown
            after_mention, in_unknown, i = False, True, i + 1
    missing = num_ranked - len(ranking)
    rest = [k for k in range(len(language.candidates)) if k not in mentioned]
    return (ranking + rest)[:num_ranked], False, repeated, missing, unknown, item_ids


# ------------------------------------------------------------------------------------------------------- strategies


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
    def ambiguous(self) -> bool:
        rows = zip(self.row_candidates, self.counts, strict=True)
        return any(is_ambiguous(c, self.separator, self.end, t) for c, t in rows)

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


def unambiguous_tasks() -> st.SearchStrategy[Task]:
    return tasks().filter(lambda task: not task.ambiguous)


def csr_rows(values: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [values[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def draw_rankings(task: Task, data: st.DataObject) -> np.ndarray:
    rankings = np.full((len(task.counts), max(task.counts)), -1)
    for row, (candidates, count) in enumerate(zip(task.row_candidates, task.counts, strict=True)):
        rankings[row, :count] = data.draw(st.permutations(range(len(candidates))))[:count]
    return rankings


# ------------------------------------------------------------------------------------------------- the state's walk


@settings(deadline=None, max_examples=150)
@given(tasks())
def test_exactly_the_ambiguous_candidates_are_refused(task: Task) -> None:
    if task.ambiguous:
        with pytest.raises(ValueError, match=r"is a prefix of candidate \d+, .* choose another (separator|end)"):
            RankingState(task.candidates, **task.options)
    else:
        assert len(RankingState(task.candidates, **task.options)) == len(task.row_candidates)


@settings(deadline=None, max_examples=150)
@given(unambiguous_tasks(), st.data())
def test_every_walk_is_in_the_language(task: Task, data: st.DataObject) -> None:
    languages = task.languages()
    state = RankingState(task.candidates, **task.options)
    prefixes: list[list[int]] = [[] for _ in languages]
    while not state.done().all():
        allowed = csr_rows(*state.allowed())
        forced = csr_rows(*state.forced())
        bitmask = np.unpackbits(state.allowed_bitmask(40).view(np.uint8), axis=1, bitorder="little")
        rankings = state.rankings()
        for row, (language, prefix) in enumerate(zip(languages, prefixes, strict=True)):
            assert allowed[row] == language.allowed(prefix)
            assert np.flatnonzero(bitmask[row]).tolist() == allowed[row]
            assert forced[row] == language.forced(prefix)
            assert state.done()[row] == (not allowed[row])
            placed = language.placed(prefix)
            assert rankings[row].tolist() == [*placed, *[-1] * (rankings.shape[1] - len(placed))]
        if data.draw(st.booleans(), label="jump"):
            state.advance(*state.forced())
            for prefix, run in zip(prefixes, forced, strict=True):
                prefix += run
        else:
            # Finished rows ignore what they are fed.
            tokens = [data.draw(st.sampled_from(ids)) if ids else 10**12 for ids in allowed]
            state.advance(tokens)
            for prefix, ids, token in zip(prefixes, allowed, tokens, strict=True):
                prefix += [token] if ids else []
    for row, (language, prefix) in enumerate(zip(languages, prefixes, strict=True)):
        least = min(s.ranking for s in language.spellings if s.tokens == prefix)
        assert state.rankings()[row].tolist() == [*least, *[-1] * (max(task.counts) - len(least))]


@settings(deadline=None, max_examples=100)
@given(unambiguous_tasks(), st.data())
def test_a_rejected_token_changes_nothing(task: Task, data: st.DataObject) -> None:
    state = RankingState(task.candidates, **task.options)
    for _ in range(data.draw(st.integers(0, 6))):
        state.advance([data.draw(st.sampled_from(ids)) if ids else 0 for ids in csr_rows(*state.allowed())])
    open_rows = np.flatnonzero(~state.done())
    if len(open_rows) == 0:
        return
    allowed = csr_rows(*state.allowed())
    before = (*state.allowed(), *state.forced(), state.done(), state.rankings())
    bad_row = data.draw(st.sampled_from(open_rows.tolist()))
    bad_token = data.draw(st.integers(-3, 8).filter(lambda t: t not in allowed[bad_row]))
    tokens = [ids[-1] if ids else 0 for ids in allowed]
    tokens[bad_row] = bad_token
    with pytest.raises(ValueError, match=rf"row {bad_row}, step \d+: token {bad_token} is not allowed; allowed: \d+"):
        state.advance(tokens)
    for old, new in zip(before, (*state.allowed(), *state.forced(), state.done(), state.rankings()), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_rejected_run_changes_nothing() -> None:
    """Items placed before the bad token, in its row and in others, are taken back."""
    state = RankingState([[[k] for k in range(70)]], separator=[99], num_generations=3)
    state.advance([0, 69, 5])
    before = (*state.allowed(), state.rankings())
    with pytest.raises(ValueError, match="row 1, step 4: token 69 is not allowed; allowed: 1, 2, "):
        state.advance([99, 1, 99, 2, 99, 0, 99, 69, 99, 6], [0, 4, 8, 10])
    for old, new in zip(before, (*state.allowed(), state.rankings()), strict=True):
        np.testing.assert_array_equal(old, new)
    state.advance([99, 1, 99, 2, 99, 0, 99, 68, 99], [0, 4, 8, 9])
    np.testing.assert_array_equal(state.rankings()[:, :4], [[0, 1, 2, -1], [69, 0, 68, -1], [5, -1, -1, -1]])
    assert csr_rows(*state.allowed())[2] == [k for k in range(70) if k != 5]


def sampled_long_lists(num_rows: int, seed: int) -> tuple[list[list[list[int]]], np.random.Generator]:
    """Ragged lists beyond one 64-bit word of candidates, titles sharing prefixes, some twice."""
    rng = np.random.default_rng(seed)
    candidates = []
    for _ in range(num_rows):
        size = int(rng.integers(1, 150))
        titles = [rng.integers(0, 12, size=rng.integers(1, 7)).tolist() for _ in range(size)]
        candidates.append(titles + titles[: size // 10])
    return candidates, rng


@pytest.mark.parametrize("num_ranked", [None, 20])
def test_long_lists_end_in_permutations(num_ranked: int | None) -> None:
    candidates, rng = sampled_long_lists(24, seed=3)
    options: dict[str, Any] = {"separator": [90, 3], "end": [91], "num_ranked": num_ranked, "num_generations": 2}
    state = RankingState(candidates, **options)
    rows: list[list[int]] = [[] for _ in range(len(state))]
    while not state.done().all():
        tokens = [int(rng.choice(ids)) if ids else -1 for ids in csr_rows(*state.allowed())]
        state.advance(tokens)
        for row, token in zip(rows, tokens, strict=True):
            row += [token] if token >= 0 else []
    rankings = state.rankings()
    sizes = np.repeat([len(c) for c in candidates], 2)
    ranks = inverse_permutation(rankings, sizes)
    expected = sizes if num_ranked is None else np.minimum(sizes, num_ranked)
    np.testing.assert_array_equal((ranks >= 0).sum(axis=1), expected)
    parsed = parse_rankings(rows, candidates, **options)
    assert parsed.valid.all()
    np.testing.assert_array_equal(parsed.ranking, rankings)


def test_rows_of_one_prompt_share_candidates_and_nothing_else() -> None:
    state = RankingState([[[1], [2], [3]], [[4], [5]]], num_generations=2)
    state.advance([1, 2, 4, 5])
    assert csr_rows(*state.allowed()) == [[2, 3], [1, 3], [5], [4]]
    np.testing.assert_array_equal(state.rankings(), [[0, -1, -1], [1, -1, -1], [0, -1, -1], [1, -1, -1]])
    state.advance([3, 3, 5, 4])
    np.testing.assert_array_equal(state.rankings(), [[0, 2, -1], [1, 2, -1], [0, 1, -1], [1, 0, -1]])
    assert state.done().tolist() == [False, False, True, True]


def test_bitmask_uses_the_sign_bit_and_finished_rows_are_empty() -> None:
    state = RankingState([[[31], [32]], [[0]]])
    np.testing.assert_array_equal(state.allowed_bitmask(33), np.array([[-(2**31), 1], [1, 0]], dtype=np.int32))
    state.advance(*state.forced())
    np.testing.assert_array_equal(state.allowed_bitmask(33)[1], [0, 0])
    with pytest.raises(ValueError, match=r"vocab_size must exceed every token id .* got 32 with token 32"):
        state.allowed_bitmask(32)


def test_end_may_continue_a_candidate_that_is_never_in_doubt() -> None:
    """With every candidate ranked the last item is known, so an end that looks like a continuation is no ambiguity."""
    candidates, options = [[[1], [1, 2]]], {"separator": [9], "end": [2]}
    state = RankingState(candidates, **options)
    state.advance([9] if 9 in state.allowed()[0] else [1])
    state.advance([2])
    np.testing.assert_array_equal(state.forced()[0], [9, 1, 2])
    parsed = parse_rankings([[1, 2, 9, 1, 2]], candidates, **options)
    assert parsed.valid[0]
    np.testing.assert_array_equal(parsed.item_ids, [[0, 0, -1, 1, -1]])


# ----------------------------------------------------------------------------------------------------------- parsing


@settings(deadline=None, max_examples=200)
@given(unambiguous_tasks(), st.data())
def test_any_completion_is_read_by_the_documented_rule(task: Task, data: st.DataObject) -> None:
    languages = task.languages()
    completions = []
    for language in languages:
        tokens = data.draw(st.sampled_from(language.spellings)).tokens
        at = data.draw(st.integers(0, len(tokens)))
        cut = data.draw(st.integers(0, 2))
        completions.append(data.draw(st.sampled_from([tokens, tokens[:at] + tokens[at + cut :]])))
        junk = data.draw(st.lists(st.integers(-1, 6), max_size=8))
        at = data.draw(st.integers(0, len(completions[-1])))
        completions[-1] = completions[-1][:at] + junk + completions[-1][at:]
    parsed = parse_rankings(completions, task.candidates, **task.options)
    assert parsed.ranking.shape == (len(languages), max(task.counts))
    assert parsed.item_ids.shape == (len(languages), max(map(len, completions)))
    for row, (language, tokens, count) in enumerate(zip(languages, completions, task.counts, strict=True)):
        expected = parse_model(tokens, language, task.separator, task.end, count)
        length = len(tokens)
        assert (
            parsed.ranking[row, :count].tolist(),
            bool(parsed.valid[row]),
            *(int(x[row]) for x in (parsed.repeated, parsed.missing, parsed.unknown)),
            parsed.item_ids[row, :length].tolist(),
        ) == expected
        assert (parsed.ranking[row, count:] == -1).all()
        assert (parsed.item_ids[row, length:] == -1).all()
    validate_rankings(parsed.ranking, [len(c) for c in task.row_candidates])


def test_free_text_with_other_separators() -> None:
    """Index labels "[1]" .. "[12]" as characters, in prose."""
    labels = [[ord(c) for c in f"[{i}]"] for i in range(1, 13)]
    text = "Sure! [3] > [12] > [1], then [3] again and [13]."
    parsed = parse_rankings([[ord(c) for c in text]], [labels], separator=[ord(","), ord(" ")], end=[0])
    assert parsed.ranking[0].tolist() == [2, 11, 0, 1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert not parsed.valid[0]
    assert (parsed.repeated[0], parsed.missing[0]) == (1, 9)
    assert parsed.unknown[0] == 5  # "Sure! ", " > ", " > ", "then ", " again and [13]."
    assert [text[i] for i in np.flatnonzero(parsed.item_ids[0] == 1)] == list("[12]")


def test_mentions_beyond_the_last_rank_are_ignored() -> None:
    parsed = parse_rankings([[1, 9, 2, 9, 3]], [[[1], [2], [3], [4]]], separator=[9], num_ranked=2)
    assert parsed.ranking.tolist() == [[0, 1]]
    assert [int(x[0]) for x in (parsed.valid, parsed.repeated, parsed.missing, parsed.unknown)] == [0, 0, 0, 0]
    assert parsed.item_ids.tolist() == [[0, -1, 1, -1, -1]]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_padded_completions_equal_ragged_ones(as_tensor: bool) -> None:
    candidates = [[[1], [2, 3]], [[4], [5]]]
    padded = np.array([[0, 0, 2, 3, 9, 1], [5, 9, 4, 7, 7, 7]])
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    arguments = (torch.tensor(padded), torch.tensor(mask)) if as_tensor else (padded, mask)
    parsed = parse_rankings(arguments[0], candidates, separator=[9], completion_mask=arguments[1])
    ragged = parse_rankings([[2, 3, 9, 1], [5, 9, 4]], candidates, separator=[9])
    assert parsed.valid.all()
    np.testing.assert_array_equal(parsed.ranking, ragged.ranking)
    np.testing.assert_array_equal(parsed.item_ids, [[-1, -1, 0, 0, -1, 1], [0, -1, 1, -1, -1, -1]])
    assert not parse_rankings(padded, candidates, separator=[9]).valid.any()


def test_adversarial_junk_is_read_quickly() -> None:
    """Every position begins a long match that fails: the worst case."""
    candidates = [[[1] * 5_000 + [k] for k in range(2, 5)]]
    started = time.perf_counter()
    parsed = parse_rankings([[1] * 200_000], candidates, separator=[1] * 5_000 + [5])
    assert time.perf_counter() - started < 2.0  # a billion comparisons if every position were tried
    assert parsed.missing[0] == 3


# ---------------------------------------------------------------------------------------------------------- encoding


def decisions(encoded: EncodedRankings) -> Iterator[tuple[int, int, int, int, list[int], list[list[int]]]]:
    below = csr_rows(encoded.below_items, encoded.below_offsets)
    for m in range(len(encoded.targets)):
        a, b = encoded.allowed_offsets[m : m + 2]
        scalars = (encoded.decision_rows, encoded.decision_positions, encoded.decision_ranks, encoded.targets)
        yield (*(int(x[m]) for x in scalars), encoded.allowed_ids[a:b].tolist(), below[a:b])  # type: ignore[misc]


@settings(deadline=None, max_examples=150)
@given(unambiguous_tasks(), st.data())
def test_encoding_agrees_with_stepping_and_parsing(task: Task, data: st.DataObject) -> None:
    rankings = draw_rankings(task, data)
    encoded = encode_rankings(task.candidates, rankings, **task.options)
    completions = csr_rows(encoded.tokens, encoded.offsets)
    languages = task.languages()

    without_sets = encode_rankings(task.candidates, rankings, **task.options, with_allowed=False)
    for name, array in without_sets._asdict().items():
        expected = getattr(encoded, name)
        if name.startswith(("allowed", "below")):
            expected = [0] if name.endswith("offsets") else []
        np.testing.assert_array_equal(array, expected)

    # By enumeration: the tokens, and what lies below every allowed token.
    for row, language in enumerate(languages):
        ranking = tuple(rankings[row, : task.counts[row]].tolist())
        assert [s.tokens for s in language.spellings if s.ranking == ranking] == [completions[row]]
    by_place = {}
    for row, position, rank, target, allowed, below in decisions(encoded):
        by_place[row, position] = allowed
        assert target == completions[row][position]
        for token, items in zip(allowed, below, strict=True):
            prefix = [*completions[row][:position], token]
            assert items == sorted(languages[row].below(prefix, tuple(rankings[row].tolist()), rank))
            assert items

    # By stepping: the same allowed sets, and forced everywhere else.
    state = RankingState(task.candidates, **task.options)
    for position in range(max(map(len, completions))):
        for row, allowed in enumerate(csr_rows(*state.allowed())):
            assert by_place.pop((row, position), allowed if len(allowed) < 2 else None) == allowed
        state.advance([tokens[position] if position < len(tokens) else 0 for tokens in completions])
    assert state.done().all()
    assert not by_place

    # By parsing: the way back, up to candidates that nobody can tell apart.
    parsed = parse_rankings(completions, task.candidates, **task.options)
    assert parsed.valid.all()
    np.testing.assert_array_equal(parsed.ranking, state.rankings())
    for row, candidates in enumerate(task.row_candidates):
        for mine, theirs in zip(rankings[row], parsed.ranking[row], strict=True):
            assert mine == theirs == -1 or candidates[mine] == candidates[theirs]
        np.testing.assert_array_equal(
            encoded.item_ids[encoded.offsets[row] : encoded.offsets[row + 1]],
            parsed.item_ids[row, : len(completions[row])],
        )


def test_single_token_items_have_one_decision_per_rank_but_the_last() -> None:
    encoded = encode_rankings([[[7], [5], [6]]], [[2, 0, 1]], separator=[9], end=[8])
    assert encoded.tokens.tolist() == [6, 9, 7, 9, 5, 8]
    assert list(decisions(encoded)) == [
        (0, 0, 0, 6, [5, 6, 7], [[1], [2], [0]]),
        (0, 2, 1, 7, [5, 7], [[1], [0]]),
    ]
    assert encoded.item_ids.tolist() == [0, -1, 1, -1, 2, -1]


def test_results_do_not_depend_on_threads() -> None:
    """A batch large enough for several threads equals its rows one by one."""
    candidates, rng = sampled_long_lists(150, seed=5)
    rankings = np.full((150, max(map(len, candidates))), -1)
    for row, titles in enumerate(candidates):
        rankings[row, : len(titles)] = rng.permutation(len(titles))
    options: dict[str, Any] = {"separator": [90], "end": [91]}
    encoded = encode_rankings(candidates, rankings, **options)
    ones = [encode_rankings([c], r[None], **options) for c, r in zip(candidates, rankings, strict=True)]
    for name in ("tokens", "item_ids", "targets", "decision_positions", "allowed_ids", "below_items"):
        np.testing.assert_array_equal(getattr(encoded, name), np.concatenate([getattr(one, name) for one in ones]))
    for name in ("offsets", "allowed_offsets", "below_offsets"):
        counts = np.concatenate([np.diff(getattr(one, name)) for one in ones])
        np.testing.assert_array_equal(np.diff(getattr(encoded, name)), counts)


# ------------------------------------------------------------------------------------------- permutations


@settings(deadline=None, max_examples=50)
@given(unambiguous_tasks(), st.data())
def test_inverse_permutation(task: Task, data: st.DataObject) -> None:
    rankings = draw_rankings(task, data)
    sizes = [len(c) for c in task.row_candidates]
    ranks = inverse_permutation(rankings, sizes)
    assert ranks.shape == (len(sizes), max(sizes))
    for row, ranking in enumerate(rankings.tolist()):
        for candidate, rank in enumerate(ranks[row].tolist()):
            assert rank == (ranking.index(candidate) if candidate in ranking else -1)


# ----------------------------------------------------------------------------------------------------------- threads


def test_the_gil_is_released() -> None:
    """While one thread parses, another goes on running Python."""
    tokens = np.ones((1, 6_000_000), dtype=np.int64)
    candidates = [[[1] * 300 + [2]]]
    interval: list[float] = []

    def parse() -> None:
        started = time.perf_counter()
        parse_rankings(tokens, candidates)
        interval.extend((started, time.perf_counter()))

    thread = threading.Thread(target=parse)
    thread.start()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    started, ended = interval
    assert ended - started > 0.1, "too quick to tell"
    middle = [t for t in ticks if started + (ended - started) / 4 < t < ended - (ended - started) / 4]
    assert len(middle) >= 5


def test_threads_with_a_state_each_and_with_one_in_common() -> None:
    candidates, _ = sampled_long_lists(8, seed=7)
    options: dict[str, Any] = {"separator": [90], "end": [91]}
    common = RankingState(candidates, **options)
    rankings: list[np.ndarray] = []

    def walk() -> None:
        state = RankingState(candidates, **options)
        while not state.done().all():
            state.advance([ids[-1] if ids else 0 for ids in csr_rows(*state.allowed())])
            common.advance(*common.forced())
            ids, offsets = common.allowed()
            assert offsets[-1] == len(ids)
        rankings.append(state.rankings())

    threads = [threading.Thread(target=walk) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rankings) == 3
    for other in rankings[1:]:
        np.testing.assert_array_equal(rankings[0], other)
