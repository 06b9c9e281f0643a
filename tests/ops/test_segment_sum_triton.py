"""Sums of rows by token, in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from flexrec.triton_kernels.segment_sum import sum_by_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 40, 3000])
def test_sums_by_token(count, dtype, device):
    """In float32, rounded once; as many rows as there were, so that nobody waits for how many tokens are different."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 25, (count,), generator=generator).to(device)
    rows = (torch.randint(-8, 9, (count, 33), generator=generator) / 8.0).to(device)  # whose sums are exact
    found, sums = sum_by_token(tokens, rows, dtype)
    used = tokens.unique()
    assert found.shape == (count,)
    assert found[: len(used)].tolist() == used.tolist()
    assert (found[len(used) :] == (used[-1] if count else 0)).all()
    assert not sums[len(used) :].any()
    assert sums.dtype == dtype
    expected = torch.zeros(25, 33, dtype=torch.float64, device=device).index_add_(0, tokens, rows.double())
    error = (sums[: len(used)].double() - expected[used]).abs()
    assert (error <= (0 if dtype == torch.float32 else 2**-7) * expected[used].abs()).all()
