"""Rows that share prompts, and attention in them by hand."""

from __future__ import annotations

import numpy as np
import torch

from flexrec.policy.packing import pack_rankings


def random_rows(seed: int):
    """Rows of one or more prompts, of rankings of unequal lengths, some of them empty."""
    rng = np.random.default_rng(seed)
    generations = int(rng.integers(1, 5))
    prompts = [rng.integers(1, 9, rng.integers(1, 8)).tolist() for _ in range(rng.integers(1, 5))]
    same = int(rng.integers(0, 6))
    lengths = [same] * (len(prompts) * generations) if seed % 3 == 0 else rng.integers(0, 6, len(prompts) * generations)
    answers = [rng.integers(1, 9, length) for length in lengths]
    rows = pack_rankings(prompts, answers, num_generations=generations, per_row=int(rng.integers(1, 5)))
    part, ranking = rows.part_of, rows.ranking_of
    index = torch.arange(part.shape[1])
    seen = (part[:, :, None] == part[:, None, :]) & (index[:, None] >= index) & (part >= 0)[:, :, None]
    return rows, seen & ((ranking[:, None, :] < 0) | (ranking[:, :, None] == ranking[:, None, :]))


def by_hand(query, key, value, seen, scale):
    """(B, L, H, D): a softmax over what ``seen`` says, and 0 where that is nothing."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (scale * query @ key.transpose(2, 3)).masked_fill(~seen[:, None], -1e300)
    return (scores.softmax(-1) * seen[:, None] @ value).transpose(1, 2)


def states(shape, heads=4, key_heads=2, size=8, dtype=torch.float64):
    torch.manual_seed(1)
    return [torch.randn(shape[0], h, shape[1], size, dtype=dtype).mul(3) for h in (heads, key_heads, key_heads)]
