"""The rank of every candidate, and rankings that are none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.rankings import inverse_permutation, validate_rankings

sys.path.insert(0, str(Path(__file__).parent))

from enumeration import Task, draw_rankings, plain_tasks


@settings(deadline=None, max_examples=50)
@given(plain_tasks(), st.data())
def test_inverse_permutation(task: Task, data: st.DataObject) -> None:
    rankings = draw_rankings(task, data)
    sizes = [len(c) for c in task.row_candidates]
    ranks = inverse_permutation(rankings, sizes)
    assert ranks.shape == (len(sizes), max(sizes))
    for row, ranking in enumerate(rankings.tolist()):
        for candidate, rank in enumerate(ranks[row].tolist()):
            assert rank == (ranking.index(candidate) if candidate in ranking else -1)


@pytest.mark.parametrize(
    ("rankings", "message"),
    [
        ([[0, 1], [1, 1]], "row 1, rank 1: candidate 1 is already at rank 0"),
        ([[0, 3]], r"row 0, rank 1: candidate 3 is out of range, expected 0 .. 2"),
        ([[-2, 0]], "row 0, rank 0: candidate -2 is out of range"),
        ([[0, -1, 1]], "row 0, rank 2: candidate 1 after a rank that is open"),
        (
            np.array([[0, 2**64 - 1]], dtype=np.uint64),
            r"rankings must hold integers below 2\*\*63, got 18446744073709551615",
        ),
        ([0, 1], r"rankings must have 2 dimension\(s\), got shape \(2,\)"),
    ],
)
def test_bad_rankings(rankings: Any, message: str) -> None:
    for check in (inverse_permutation, validate_rankings):
        with pytest.raises(ValueError, match=message):
            check(rankings, 3)
