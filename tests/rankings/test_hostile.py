"""Mistakes and hostile input of RankingState, CandidateTries, parse_rankings and encode_rankings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.rankings import (
    CandidateTries,
    RankingState,
    encode_rankings,
    parse_rankings,
    validate_rankings,
)

sys.path.insert(0, str(Path(__file__).parent))

from enumeration import csr_rows

# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RankingState([[[1]], []]), ValueError, r"candidates\[1\] is empty"),
        (lambda: RankingState([[[1], []]]), ValueError, r"candidates\[0\]\[1\] is an empty token sequence"),
        (
            lambda: RankingState([[[1, -2]]]),
            ValueError,
            r"candidates\[0\]\[0\] must hold token ids .* got -2 at index 1",
        ),
        (lambda: RankingState([[[1]]], separator=[-1]), ValueError, "separator must hold token ids"),
        (lambda: RankingState([[[2**31]]]), ValueError, "got 2147483648 at index 0"),
        (lambda: RankingState([["ab"]]), TypeError, r"candidates\[0\]\[0\] must be a sequence of token ids, got str"),
        (lambda: RankingState([[1, 2]]), TypeError, r"candidates\[0\]\[0\] must be a sequence of token ids, got int"),
        (
            lambda: RankingState([[[1.5]]]),
            TypeError,
            r"candidates\[0\]\[0\]\[0\] must be an integer token id, got float",
        ),
        (lambda: RankingState(None), TypeError, "candidates must be a sequence of candidate lists, got NoneType"),
        (lambda: RankingState([[[1]]], num_ranked=2), ValueError, "num_ranked must lie between 1 and .* got 2"),
        (lambda: RankingState([[[1]]], num_ranked=0), ValueError, "num_ranked must lie between 1 and .* got 0"),
        (lambda: RankingState([[[1]], [[1]]], num_ranked=[1, 2]), ValueError, "1 in row 1.* got 2"),
        (lambda: RankingState([[[1]]], num_ranked=[1, 1]), ValueError, "one entry per row, that is 1, got 2"),
        (lambda: RankingState([[[1]]], num_ranked=1.0), TypeError, "num_ranked must be an int, got float"),
        (lambda: RankingState([[[1]]], num_generations=0), ValueError, "num_generations must be at least 1"),
        (lambda: RankingState([[[1]]]).advance([1, 1]), ValueError, r"tokens must have shape \(1,\)"),
        (lambda: RankingState([[[1]]]).advance([1.0]), TypeError, "tokens must hold integers, got float64"),
        (lambda: RankingState([[[1]]]).advance([1], [0, 2]), ValueError, "offsets must rise from 0 to .* 1"),
        (lambda: RankingState([[[1]]]).advance([1], [0]), ValueError, r"offsets must have shape \(2,\)"),
        (lambda: RankingState([[[1]]]).allowed_bitmask(0), ValueError, "vocab_size must exceed"),
        (lambda: parse_rankings([[1], [1]], [[[1]]]), ValueError, "one row per ranking, 1, got 2"),
        (lambda: parse_rankings([[1.0]], [[[1]]]), TypeError, r"completions\[0\] must hold integers"),
        (lambda: parse_rankings([[1]], [[[1]]], completion_mask=[[1]]), ValueError, "completions as a padded"),
        (
            lambda: parse_rankings(np.ones((1, 2), int), [[[1]]], completion_mask=[[1]]),
            ValueError,
            r"completion_mask must have the shape of completions, \(1, 2\), got \(1, 1\)",
        ),
        (lambda: encode_rankings([[[1], [2]]], [[0]]), ValueError, "row 0 ranks 1 items, expected 2"),
        (lambda: encode_rankings([[[1], [2]]], [[0, 0]]), ValueError, "row 0, rank 1: candidate 0 is already"),
        (lambda: encode_rankings([[[1], [2]]], [[0, 1]], num_ranked=1), ValueError, "ranks 2 items, expected 1"),
        (lambda: encode_rankings([[[1]]], [[0], [0]]), ValueError, "one row per ranking, 1, got 2"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_long_allowed_set_is_abbreviated() -> None:
    with pytest.raises(
        ValueError, match=r"token 77 is not allowed; allowed: 0, 1, 2, 3, 4, 5, 6, 7, .. \(20 tokens\)$"
    ):
        RankingState([[[k] for k in range(20)]]).advance([77])


def test_no_rows() -> None:
    state = RankingState([])
    assert state.allowed()[1].tolist() == [0]
    assert state.rankings().shape == (0, 0)
    state.advance([])
    assert parse_rankings([], []).ranking.shape == (0, 0)
    assert encode_rankings([], np.zeros((0, 0), dtype=int)).offsets.tolist() == [0]


def test_candidates_may_be_arrays_and_tensors() -> None:
    array = np.arange(12).reshape(2, 3, 2)
    expected = csr_rows(*RankingState(array.tolist()).allowed())
    assert csr_rows(*RankingState(array).allowed()) == expected
    assert csr_rows(*RankingState(torch.tensor(array)).allowed()) == expected


# ---------------------------------------------------------------------------------------------- prepared candidates


def flat_arrays(candidates: list[list[list[int]]]) -> tuple[list[int], list[int], list[int]]:
    sequences = [tokens for lst in candidates for tokens in lst]
    return (
        [token for tokens in sequences for token in tokens],
        np.cumsum([0, *map(len, sequences)]).tolist(),
        np.cumsum([0, *map(len, candidates)]).tolist(),
    )


CANDIDATES = [[[1, 2], [1, 3], [4]], [[5]], [[1], [1, 9]]]
OPTIONS: dict[str, Any] = {"separator": [7], "end": [8], "num_generations": 2}


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_prepared_candidates_do_what_lists_do(dtype: Any) -> None:
    tokens, sequence_offsets, list_offsets = flat_arrays(CANDIDATES)
    rankings = [[2, 0, 1], [0, 1, 2], [0, -1, -1], [0, -1, -1], [0, 1, -1], [1, 0, -1]]
    expected = encode_rankings(CANDIDATES, rankings, **OPTIONS)
    completions = csr_rows(expected.tokens, expected.offsets)
    for tries in (
        CandidateTries(CANDIDATES),
        CandidateTries.from_arrays(np.array(tokens, dtype=dtype), sequence_offsets, torch.tensor(list_offsets)),
    ):
        assert len(tries) == 3
        for mine, theirs in zip(encode_rankings(tries, rankings, **OPTIONS), expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert parse_rankings(completions, tries, **OPTIONS).valid.all()
        state = RankingState(tries, **OPTIONS)
        assert state.max_token == 9
        assert state.max_length == max(map(len, completions))
        np.testing.assert_array_equal(state.allowed()[0], RankingState(CANDIDATES, **OPTIONS).allowed()[0])


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        (([1, 2], [0, 1, 3], [0, 2]), ValueError, "sequence_offsets must rise from 0 to 2"),
        (([1, 2], [0, 2, 1, 2], [0, 3]), ValueError, "sequence_offsets must rise from 0 to 2"),
        (([1, 2], [1, 2], [0, 1]), ValueError, "sequence_offsets must rise from 0 to 2"),
        (([1, 2], [], [0]), ValueError, "sequence_offsets must rise from 0 to 2"),
        (([1, 2], [0, 1, 2], [0, 3]), ValueError, "list_offsets must rise from 0 to 2"),
        (([1, 2], [0, 1, 2], [0, 0, 2]), ValueError, r"candidates\[0\] is empty"),
        (([1, 2], [0, 1, 1, 2], [0, 3]), ValueError, r"candidates\[0\]\[1\] is an empty token sequence"),
        (([1, -2], [0, 1, 2], [0, 2]), ValueError, "tokens must hold token ids from 0 .* got -2 at index 1"),
        (([1, 2**31], [0, 1, 2], [0, 2]), ValueError, "got 2147483648 at index 1"),
        (([1.0, 2.0], [0, 1, 2], [0, 2]), TypeError, "tokens must hold integers, got float64"),
        (([[1, 2]], [0, 1, 2], [0, 2]), ValueError, "tokens must have 1 dimension"),
    ],
)
def test_bad_arrays(arrays: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CandidateTries.from_arrays(*arrays)


# ------------------------------------------------------------------------------------ lost rows, restarts, shown bits


def test_a_lost_row_allows_nothing_until_it_is_restarted() -> None:
    state = RankingState([[[1], [2], [3]]], num_generations=3)
    state.advance([1, 9, 3], strict=False)
    assert csr_rows(*state.allowed()) == [[2, 3], [], [1, 2]]
    assert csr_rows(*state.forced())[1] == []
    state.advance([2, 1, 2])  # lost rows ignore what they are fed
    np.testing.assert_array_equal(state.rankings(), [[0, 1, -1], [-1, -1, -1], [2, 1, -1]])
    state.advance([3, 1, 1])
    assert state.done().tolist() == [True, False, True]
    state.restart([True, True, False])
    assert csr_rows(*state.allowed()) == [[1, 2, 3], [1, 2, 3], []]
    state.restart()
    assert csr_rows(*state.allowed()) == [[1, 2, 3]] * 3
    for rows in ([1, 0, 0], [True], [[True, False, False]]):
        with pytest.raises(ValueError, match=r"rows must be \(3,\) booleans"):
            state.restart(rows)


def test_reused_bits_equal_new_ones_at_every_step() -> None:
    rng = np.random.default_rng(0)
    candidates = [[rng.integers(0, 300, size=3).tolist() for _ in range(20)] for _ in range(5)]
    state = RankingState(candidates, separator=[301])
    while not state.done().all():
        shown = state.allowed_bitmask(320, reuse=True)
        assert not shown.flags.writeable
        np.testing.assert_array_equal(shown, state.allowed_bitmask(320))
        assert state.allowed_bitmask(400, reuse=True).shape == (5, 13)  # another vocabulary: other bits
        np.testing.assert_array_equal(state.allowed_bitmask(320, reuse=True), state.allowed_bitmask(320))
        state.advance([int(rng.choice(ids)) if ids else 0 for ids in csr_rows(*state.allowed())])
    assert not state.allowed_bitmask(320, reuse=True).any()


# ------------------------------------------------------------------------------------------------------ hostile input

HUGE = st.sampled_from([-(2**63), -1, 0, 1, 31999, 2**31 - 1, 2**31, 2**63 - 1])
ANY_TOKEN = st.one_of(st.integers(0, 4), st.integers(0, 4), HUGE)


@settings(deadline=None, max_examples=150)
@given(
    candidates=st.lists(st.lists(st.lists(ANY_TOKEN, max_size=6), max_size=8), max_size=4),
    separator=st.lists(ANY_TOKEN, max_size=3),
    end=st.lists(ANY_TOKEN, max_size=3),
    num_ranked=st.one_of(st.none(), HUGE, st.integers(-1, 5)),
    num_generations=st.one_of(st.integers(0, 3), st.just(2**63 - 1)),
)
def test_hostile_candidates_are_refused_or_work(
    candidates: Any, separator: Any, end: Any, num_ranked: Any, num_generations: int
) -> None:
    """A ValueError with a reason, or a state that ends in permutations."""
    state, refusal = None, ""
    try:
        state = RankingState(
            candidates, separator=separator, end=end, num_ranked=num_ranked, num_generations=num_generations
        )
    except ValueError as error:
        refusal = str(error)
    if state is None:
        assert any(name in refusal for name in ("candidates", "separator", "end", "num_ranked", "num_generations"))
        return
    for _ in range(state.max_length):
        state.advance([ids[0] if ids else -1 for ids in csr_rows(*state.allowed())])
    assert state.done().all()
    validate_rankings(state.rankings(), [len(c) for c in candidates for _ in range(num_generations)])


@settings(deadline=None, max_examples=100)
@given(
    completions=st.lists(st.lists(ANY_TOKEN, max_size=60), min_size=6, max_size=6),
    repeats=st.integers(1, 400),
)
def test_every_completion_gets_a_ranking(completions: list[list[int]], repeats: int) -> None:
    candidates = [[[0], [0, 1], [0, 1, 0, 2]], [[2**31 - 1], [3], [3]], [[1, 1, 1, 1, 2], [1], [4, 4]]]
    options: dict[str, Any] = {"separator": [4], "end": [4, 4], "num_generations": 2}
    parsed = parse_rankings([row * repeats for row in completions], candidates, **options)
    validate_rankings(parsed.ranking, [3] * 6)
    assert (parsed.ranking >= 0).all()
    assert ((parsed.item_ids >= -1) & (parsed.item_ids < 3)).all()


def test_candidates_of_a_hundred_thousand_tokens() -> None:
    """Prefixes of one another, and completions that nearly match them: linear, so quick."""
    longest = 100_000
    candidates = [[[1] * (longest - k) + [2 + k] for k in range(4)] + [[1] * (longest // 2)]]
    options: dict[str, Any] = {"separator": [9]}
    state = RankingState(candidates, **options)
    assert len(state.forced()[0]) == longest // 2
    encoded = encode_rankings(candidates, [[4, 3, 2, 1, 0]], **options)
    parsed = parse_rankings([encoded.tokens, [1] * 500_000], candidates * 2, **options)
    assert parsed.valid.tolist() == [True, False]
    assert parsed.ranking.tolist() == [[4, 3, 2, 1, 0], [4, 0, 1, 2, 3]]
    assert parsed.repeated.tolist() == [0, 9]
