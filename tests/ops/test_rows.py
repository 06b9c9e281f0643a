"""Rows of gradients on a CPU."""

from __future__ import annotations

import pytest
import torch

from flexrec.numba_kernels.rows import fresh_zeros


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3000, 129), (1, 1), (0, 7)])
def test_fresh_zeros(dtype, shape):
    """Contiguous whatever the weight is, and whoever had the memory before."""
    for _ in range(3):
        zeros = fresh_zeros(torch.empty(shape[::-1], dtype=dtype).T)
        assert zeros.shape == shape
        assert zeros.dtype == dtype
        assert zeros.is_contiguous()
        assert not zeros.any()
        zeros.fill_(1.0)
        assert (zeros == 1).all()
