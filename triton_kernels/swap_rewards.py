"""Triton kernel of swap rewards: one launch for every metric of the table and every credit but "policy".

What computes a metric follows from its form (``flexrec.metrics.Family``); what each derives and how many bytes it
moves stands in its file. The host does no torch operation in front of the launch: discount tables are made once per
metric and K.
"""

from __future__ import annotations

import torch
import triton.language as tl

from flexrec.metrics import Metric
from flexrec.triton_kernels.launch import kernel, launch
from flexrec.triton_kernels.lists import (
    AVERAGE_PRECISION,
    CREDITS,
    FIRST,
    GAIN,
    LINEAR,
    NUM_WARPS,
    call_on,
    lists_of_program,
    swap_table_on,
)
from flexrec.triton_kernels.swap_cascade import swap_cascade
from flexrec.triton_kernels.swap_linear import swap_linear
from flexrec.triton_kernels.swap_relevance import swap_average_precision, swap_first

MAX_SIZE = 16384  # longest list: beyond, more tiles would have to be compiled


@kernel
def swap_rewards_kernel(
    gains_ptr,  # (N, K)
    rewards_ptr,  # (N, K) written
    discounts_ptr,  # (K,)
    lengths_ptr,  # (N,) int64 or None
    num_ranked_ptr,  # (N,) int64 or None
    rows,
    size,
    stride,  # of gains, between rows, in elements
    max_ranked,
    sorted_discounts_ptr,  # (BLOCK_K,) or None, if the normaliser is IDEAL
    cutoff,  # 0: none
    table_ptr,  # this and the rest for LINEAR only, see there
    variance_ptr,
    spread_ptr,
    variance_stride,
    CREDIT: tl.constexpr,
    FORM: tl.constexpr,
    GAIN_KIND: tl.constexpr,
    NORMALISER: tl.constexpr,
    MAX_GAIN: tl.constexpr,  # 0: the list's own
    TOP: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program: BLOCK_N lists."""
    lists = lists_of_program(
        gains_ptr, discounts_ptr, lengths_ptr, num_ranked_ptr, rows, size, stride, max_ranked, QUADS, BLOCK_N, BLOCK_K
    )
    if FORM == LINEAR:
        if QUADS:
            variance_stride = variance_stride // 4 * 4
        swap_linear(
            lists,
            rewards_ptr,
            sorted_discounts_ptr,
            cutoff,
            table_ptr,
            variance_ptr,
            spread_ptr,
            variance_stride,
            CREDIT,
            GAIN_KIND,
            NORMALISER,
            TOP,
            TILES,
        )
    elif FORM == FIRST:
        swap_first(lists, rewards_ptr, CREDIT, TILES)
    elif FORM == AVERAGE_PRECISION:
        swap_average_precision(lists, rewards_ptr, CREDIT, TILES)
    else:
        swap_cascade(lists, rewards_ptr, CREDIT, MAX_GAIN, TILES)


def swap_rewards(
    gains: torch.Tensor,
    metric: Metric,
    credit: str,
    *,
    lengths: torch.Tensor | None = None,
    num_ranked: torch.Tensor | None = None,
    max_ranked: int,
    variance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the kernel of a built-in metric.

    Args:
        gains: (N, K) float16, bfloat16, float32 or float64, rank order, any strides; K <= MAX_SIZE.
        metric, credit: as for ``flexrec.swap_rewards``; no ``credit="policy"``.
        lengths, num_ranked: (N,) int64 or None; ``max_ranked`` bounds both.
        variance: (N, K) of the gains, for linear metrics only; binary ones then read gains as probabilities.

    Returns:
        (N, K) rewards and their variance (or None), float64 for float64 gains, else float32; accumulated in that dtype.
    """
    rows, size = gains.shape
    dtype = torch.float64 if gains.dtype == torch.float64 else torch.float32
    if gains.stride(1) != 1:
        gains = gains.contiguous()
    rewards = torch.empty((rows, size), dtype=dtype, device=gains.device)
    spread = None if variance is None else torch.empty_like(rewards)
    if rows == 0 or size == 0:
        return rewards, spread
    if variance is not None and variance.stride(1) != 1:
        variance = variance.contiguous()
    variance_stride = 0 if variance is None else variance.stride(0)
    call, table = call_on(gains, rewards, metric, lengths, num_ranked, max_ranked, variance_stride), None
    if variance is not None and metric.definition.gain == "binary":
        call.constants["GAIN_KIND"] = GAIN.value  # probabilities
    is_table = metric.definition.form == "linear" and credit == "swap"
    if is_table and lengths is None and num_ranked is None and variance is None:
        table = swap_table_on(metric, size, max_ranked, gains.device, dtype)
    arguments = (*call.arguments, table, variance, spread, variance_stride, CREDITS[credit].value)
    launch(swap_rewards_kernel, call.grid, *arguments, **call.constants, num_warps=NUM_WARPS)
    return rewards, spread
