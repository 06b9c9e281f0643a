"""RankingState against a model that enumerates every well-formed completion."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.rankings import RankingState, inverse_permutation, parse_rankings

sys.path.insert(0, str(Path(__file__).parent))

from enumeration import Task, certain_tasks, csr_rows, sampled_long_lists, tasks


@settings(deadline=None, max_examples=300)
@given(tasks())
def test_lists_are_refused_whose_end_is_not_certain(task: Task) -> None:
    refusal = ""
    try:
        assert len(RankingState(task.candidates, **task.options)) == len(task.row_candidates)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert re.search(r"candidates\[\d\]: candidate \d is a prefix of candidate \d, .* choose an end that", refusal)
        assert task.may_fork
        assert not task.has_certain_end
    else:
        assert all(language.never_begins_another() for language in task.languages())


@settings(deadline=None, max_examples=150)
@given(certain_tasks(), st.data())
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
            placed = rankings[row][: (rankings[row] >= 0).sum()].tolist()
            assert (rankings[row, len(placed) :] == -1).all()
            if not task.may_fork:
                assert tuple(placed) == language.placed(prefix)
            for spelled in language.consistent(prefix):  # what is certain is so whatever comes
                assert list(language.read(spelled.tokens).ranking[: len(placed)]) == placed
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
        least = language.read(prefix).ranking
        assert state.rankings()[row].tolist() == [*least, *[-1] * (max(task.counts) - len(least))]


@settings(deadline=None, max_examples=100)
@given(certain_tasks(), st.data())
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
