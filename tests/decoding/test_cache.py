"""The cache that grows with what is decoded."""

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicLayer

from flexrec.decoding.cache import _GrowingLayer


@pytest.mark.parametrize("seed", range(3))
def test_a_growing_cache_holds_what_a_copied_one_does(seed):
    """After tokens have been appended, rows repeated and rows reordered, in any order."""
    rng, ours, plain = np.random.default_rng(seed), _GrowingLayer(), DynamicLayer()
    rows = 2
    for _ in range(20):
        action = rng.choice(["append", "append", "append", "repeat", "reorder"])
        if action == "append":
            states = torch.randn(rows, 3, int(rng.integers(1, 4)), 5)
            for held, expected in zip(ours.update(states, -states), plain.update(states, -states), strict=True):
                assert torch.equal(held, expected)
        elif ours.keys is not None and action == "reorder":
            index = torch.from_numpy(rng.integers(0, rows, size=rows))
            ours.reorder_cache(index)
            plain.reorder_cache(index)
        elif ours.keys is not None and rows < 8:
            ours.batch_repeat_interleave(2)
            plain.batch_repeat_interleave(2)
            rows *= 2
