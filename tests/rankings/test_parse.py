"""parse_rankings against its documented rule, applied to lists."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.rankings import parse_rankings, validate_rankings

sys.path.insert(0, str(Path(__file__).parent))

from enumeration import Task, parse_model, tasks


@settings(deadline=None, max_examples=200)
@given(tasks(), st.data())
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


def test_the_longest_run_is_the_ranking_and_the_last_of_equals() -> None:
    """Candidates 1 .. 4, separator 9, end 8, anything else unknown."""
    for completion, ranking, unknown in [
        ([3, 7, 1, 7, 2, 9, 1, 9, 3], [1, 0, 2], 2),
        ([1, 9, 2, 7, 3, 9, 4], [2, 3], 1),  # the last of equals
        ([1, 9, 2, 9, 3, 7, 4, 9, 2], [0, 1, 2], 1),  # the longest
        ([4, 7, 1, 9, 7, 9, 2], [0, 1], 2),  # an item that is unknown ends no run
        ([4, 7, 1, 9, 7, 2, 9, 3], [1, 2], 2),  # what is not between separators does
        ([4, 9, 1, 8, 2, 9, 3], [1, 2], 0),  # and so does the end
        ([3, 7, 1, 7, 2], [2, 0, 1], 2),  # nothing is joined
        ([7], [], 1),
        ([], [], 0),
    ]:
        parsed = parse_rankings([completion], [[[1], [2], [3], [4]]], separator=[9], end=[8])
        found = 4 - int(parsed.missing[0])
        assert (parsed.ranking[0, :found].tolist(), int(parsed.unknown[0])) == (ranking, unknown)
        assert not parsed.valid[0]
    parsed = parse_rankings([[3, 7, 1, 2]], [[[1], [2], [3], [4]]])  # without a separator all are
    assert parsed.ranking.tolist() == [[2, 0, 1, 3]]


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
