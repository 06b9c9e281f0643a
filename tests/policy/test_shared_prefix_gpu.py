"""Attention without a mask by the kernels of the GPU that is there."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from prefix_rows import by_hand, random_rows, states

from flexrec.policy import shared_prefix
from flexrec.policy.shared_prefix import shared_prefix_attention


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("key_heads", "size"), [(2, 64), (2, 128), (3, 80)])
def test_this_gpus_own_kernels(dtype, key_heads, size):
    device = torch.device("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shared_prefix.kernels_agree.__wrapped__(device, dtype, key_heads, size)
    for seed in range(6):
        rows, seen = random_rows(seed)
        exact = states(rows.input_ids.shape, heads=2 * key_heads, key_heads=key_heads, size=size)
        exact = [x.to(dtype).double().requires_grad_() for x in exact]
        half = [x.detach().to(device, dtype).requires_grad_() for x in exact]
        expected = by_hand(*exact, seen, size**-0.5)
        on_gpu = replace(rows, input_ids=rows.input_ids.to(device))
        found = shared_prefix_attention(*half, on_gpu.layout(), size**-0.5)
        grad = torch.randn_like(expected) * (rows.part_of >= 0)[:, :, None, None]
        ours = found, *torch.autograd.grad(found, half, grad.to(device, dtype))
        theirs = expected, *torch.autograd.grad(expected, exact, grad)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.cpu().double() - b).abs().max() <= 0.03 * b.abs().max()
