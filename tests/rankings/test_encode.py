"""encode_rankings against enumeration, stepping and parsing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.rankings import EncodedRankings, RankingState, encode_rankings, parse_rankings

sys.path.insert(0, str(Path(__file__).parent))

from enumeration import Task, certain_tasks, csr_rows, draw_rankings, plain_tasks, sampled_long_lists


def decisions(encoded: EncodedRankings) -> Iterator[tuple[int, int, int, int, list[int], list[list[int]]]]:
    below = csr_rows(encoded.below_items, encoded.below_offsets)
    for m in range(len(encoded.targets)):
        a, b = encoded.allowed_offsets[m : m + 2]
        scalars = (encoded.decision_rows, encoded.decision_positions, encoded.decision_ranks, encoded.targets)
        yield (*(int(x[m]) for x in scalars), encoded.allowed_ids[a:b].tolist(), below[a:b])  # type: ignore[misc]


@settings(deadline=None, max_examples=150)
@given(plain_tasks(), st.data())
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


@settings(deadline=None, max_examples=150)
@given(certain_tasks().filter(lambda task: task.may_fork), st.data())
def test_decisions_where_a_beginning_can_be_read_in_several_ways(task: Task, data: st.DataObject) -> None:
    rankings = draw_rankings(task, data)
    languages = task.languages()
    spelled, read = [], []
    for row, language in enumerate(languages):
        ranking = tuple(rankings[row, : task.counts[row]].tolist())
        spelled.append(next(s for s in language.spellings if s.ranking == ranking))
        read.append(language.read(spelled[-1].tokens).ranking)

    def items(row: int, ranking: tuple[int, ...]) -> list[list[int]]:
        return [task.row_candidates[row][item] for item in ranking]

    other = [row for row, s in enumerate(spelled) if items(row, s.ranking) != items(row, read[row])]
    if other:
        with pytest.raises(ValueError, match=rf"rankings: row {other[0]} is spelled as another ranking is"):
            encode_rankings(task.candidates, rankings, **task.options)
        rankings[other] = [[*read[row], *[-1] * (rankings.shape[1] - len(read[row]))] for row in other]
    encoded = encode_rankings(task.candidates, rankings, **task.options)
    completions = csr_rows(encoded.tokens, encoded.offsets)
    assert completions == [s.tokens for s in spelled]
    parsed = parse_rankings(completions, task.candidates, **task.options)
    assert parsed.valid.all()

    state = RankingState(task.candidates, **task.options)
    found = {(row, position): rest for row, position, *rest in decisions(encoded)}
    for position in range(max(map(len, completions))):
        certain = (state.rankings() >= 0).sum(axis=1)
        for row, allowed in enumerate(csr_rows(*state.allowed())):
            assert ((row, position) in found) == (len(allowed) > 1)
            if len(allowed) < 2:
                continue
            rank, target, ids, below = found[row, position]
            assert (rank, target, ids) == (certain[row], completions[row][position], allowed)
            for token, branch in zip(ids, below, strict=True):
                before = tuple(rankings[row, :rank].tolist())
                of_language = languages[row].below([*completions[row][:position], token], before, rank)
                assert branch == sorted(set(branch))
                assert set(branch) <= of_language
                assert branch
                assert token != target or rankings[row, rank] in branch
        state.advance([tokens[position] if position < len(tokens) else 0 for tokens in completions])
    assert state.done().all()
    np.testing.assert_array_equal(state.rankings(), parsed.ranking)


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
