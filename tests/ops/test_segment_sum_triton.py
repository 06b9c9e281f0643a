"""Sums of rows by token, in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from flexrec.triton_kernels.segment_sum import add_by_token, sum_by_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 40, 3000])
def test_sums_by_token(count, dtype, device):
    """In float32, rounded once, without repeats being counted, which would wait for the GPU; and into a table."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 25, (count,), generator=generator).to(device)
    rows = (torch.randint(-8, 9, (count, 33), generator=generator) / 8.0).to(device)  # whose sums are exact
    found, sums = sum_by_token(tokens, rows, dtype)
    assert found.tolist() == sorted(tokens.tolist())
    assert sums.dtype == dtype
    repeated = torch.cat([found.new_zeros(1, dtype=torch.bool), found[1:] == found[:-1]])[:count]
    assert not sums[repeated].any()
    expected = torch.zeros(25, 33, dtype=torch.float64, device=device).index_add_(0, tokens, rows.double())
    loss = 0 if dtype == torch.float32 else 2**-7  # which the interpreter cuts off
    assert ((sums.double() - expected[found])[~repeated].abs() <= loss * expected[found[~repeated]].abs()).all()
    table = torch.full((20, 33), 0.5, dtype=dtype, device=device)  # five tokens fewer
    add_by_token(tokens - 2, rows, table)  # and two from before it
    wanted = 0.5 + expected[2:22]
    assert ((table.double() - wanted).abs() <= loss * wanted.abs()).all()


def test_a_token_beyond_32_bits_is_none_of_the_table(device):
    """Tokens are sorted as int32; 2**32 + 1 is not 1. Rows are wider than a tile."""
    rows = torch.ones(4, 1100, device=device)
    table = torch.zeros(3, 1100, device=device)
    add_by_token(torch.tensor([1, 2**32 + 1, -(2**32) + 2, 1], device=device), rows, table)
    assert torch.equal(table, torch.tensor([0.0, 2.0, 0.0], device=device)[:, None].expand(3, 1100))
