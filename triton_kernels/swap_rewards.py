"""Launcher of the swap reward kernels: one launch for every metric of the table and every credit but "policy".

Which kernel computes a metric follows from its form (``flexrec.metrics.Family``); what each derives and how many bytes
it moves stands in its file. The host does no torch operation in front of the launch: discount tables are made once per
metric and K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from flexrec.triton_kernels.aot import Variant
from flexrec.triton_kernels.swap_cascade import swap_cascade_kernel
from flexrec.triton_kernels.swap_linear import swap_linear_kernel
from flexrec.triton_kernels.swap_lists import (
    CREDITS,
    GAIN,
    GAINS,
    IDEAL,
    NORMALISERS,
    NUM_WARPS,
    WIDTHS,
    Tiles,
    accumulator_of,
    discounts_on,
    is_quads,
    on_device,
    pointer_types,
    sorted_discounts_on,
    swap_table_on,
    tiles_of,
    top_of,
)
from flexrec.triton_kernels.swap_relevance import swap_average_precision_kernel, swap_first_kernel

from flexrec.metrics import Metric, parse_metric

KERNELS = {
    "linear": swap_linear_kernel,
    "first": swap_first_kernel,
    "average_precision": swap_average_precision_kernel,
    "cascade": swap_cascade_kernel,
}
MAX_SIZE = 16384  # longest list: beyond, more tiles would have to be compiled


def constants_of(
    metric: Metric, credit: str, size: int, tiles: Tiles, with_variance: bool, gains: torch.dtype
) -> dict[str, Any]:
    """Compile-time arguments of the kernel of ``metric`` but for QUADS, by name."""
    definition = metric.definition
    constants: dict[str, Any] = {
        "CREDIT": CREDITS[credit].value,
        "ACCUMULATOR": accumulator_of(gains),
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "INNER": tiles.inner,
        "TILES": tiles.tiles,
    }
    if definition.form == "linear":
        is_probability = with_variance and definition.gain == "binary"
        constants["GAIN_KIND"] = GAIN.value if is_probability else GAINS[definition.gain].value
        constants["NORMALISER"] = NORMALISERS[definition.normaliser].value
        constants["TOP"] = top_of(metric, tiles)
    elif definition.form == "cascade":
        constants["MAX_GAIN"] = metric.max_gain or 0.0
    return constants


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
    tiles = tiles_of(size, gains.element_size())
    constants = constants_of(metric, credit, size, tiles, variance is not None, gains.dtype)
    arguments: list[Any] = [
        gains,
        rewards,
        discounts_on(metric, size, gains.device, dtype),
        lengths,
        num_ranked,
        rows,
        size,
        gains.stride(0),
        max_ranked,
    ]
    strides = (gains.stride(0),)
    if metric.definition.form == "linear":
        order = table = None
        if constants["NORMALISER"] == IDEAL.value:
            order = sorted_discounts_on(metric, size, tiles, gains.device, dtype)
        if credit == "swap" and lengths is None and num_ranked is None and variance is None:
            table = swap_table_on(metric, size, max_ranked, gains.device, dtype)
        if variance is not None:
            variance = variance if variance.stride(1) == 1 else variance.contiguous()
        variance_stride = 0 if variance is None else variance.stride(0)
        strides += (variance_stride,)
        arguments += [order, table, variance, spread, variance_stride, metric.cutoff or 0]
    grid = (triton.cdiv(rows, tiles.block_n),)
    with on_device(gains):
        KERNELS[metric.definition.form][grid](
            *arguments, QUADS=is_quads(size, *strides), **constants, num_warps=NUM_WARPS
        )
    return rewards, spread


def variants() -> Iterator[Variant]:
    """Every tile that the launcher chooses, in the heaviest form of each kernel, and what changes its shape."""
    fp32, fp64, bf16 = torch.float32, torch.float64, torch.bfloat16
    widest = 4 * WIDTHS[-1]
    for size, dtype in ((WIDTHS[0], fp32), (WIDTHS[1], fp32), (widest, fp32), (widest, fp64)):
        yield _variant("ndcg_burges", "swap", size, dtype, variance=True)
        for name in ("mrr", "map", "err"):
            yield _variant(name, "noncausal", size, dtype)
    yield _variant("ndcg", "swap", WIDTHS[1], fp32, ragged=False)
    yield _variant("ndcg@10", "noncausal", widest, bf16)


def _variant(
    name: str, credit: str, size: int, dtype: torch.dtype, *, ragged: bool = True, variance: bool = False
) -> Variant:
    metric, tiles = parse_metric(name), tiles_of(size, dtype.itemsize)
    read, written = pointer_types(dtype)
    types = {"gains_ptr": read, "rewards_ptr": written, "discounts_ptr": written}
    types |= dict.fromkeys(("rows", "size", "gains_stride", "max_ranked"), "i32")
    constants = constants_of(metric, credit, size, tiles, variance, dtype) | {"QUADS": True}
    optional = {"lengths_ptr": "*i64" if ragged else None, "num_ranked_ptr": "*i64" if ragged else None}
    if metric.definition.form == "linear":
        types |= {"variance_stride": "i32", "cutoff": "i32"}
        optional["sorted_discounts_ptr"] = written if constants["NORMALISER"] == IDEAL.value else None
        optional["table_ptr"] = written if credit == "swap" and not ragged else None
        optional |= {"variance_ptr": read if variance else None, "spread_ptr": written if variance else None}
    types |= {argument: kind for argument, kind in optional.items() if kind is not None}
    constants |= {argument: None for argument, kind in optional.items() if kind is None}
    form = f"{'ragged ' if ragged else ''}{'with variance ' if variance else ''}{read[1:]}"
    shape = f"{tiles.block_n}x{tiles.block_k}" + (f"x{tiles.tiles}" if tiles.tiles > 1 else "")
    kernel = KERNELS[metric.definition.form]
    return Variant(f"swap_rewards {name} {credit} {form} {shape}", kernel, types, constants, NUM_WARPS)
