"""What the swap reward kernels share: how a program reads its lists, and what a metric makes of a gain.

A program holds BLOCK_N lists and walks over each in TILES tiles of BLOCK_K ranks, so that neither its registers nor
the time to compile it grow with the list. A value of each list has shape (BLOCK_N, 1), a value of each rank
(1, BLOCK_K), a value of each item (BLOCK_N, BLOCK_K). Lengths are (1, 1) where all lists have the same; whatever then
depends on the rank alone is (1, BLOCK_K), computed once for all lists of the program.

The discounts of a metric are a table (K,), made on the host in float64, 0 beyond the cutoff: it stays in the cache and
spares the kernels a logarithm per rank.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from flexrec.metrics import Metric, discount_table

SWAP, NONCAUSAL, INDEPENDENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
RANK, SEQUENCE = tl.constexpr(3), tl.constexpr(4)
CREDITS = {"swap": SWAP, "noncausal": NONCAUSAL, "independent": INDEPENDENT, "rank": RANK, "sequence": SEQUENCE}
GAIN, BURGES, SCALED, BINARY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
GAINS = {"gain": GAIN, "burges": BURGES, "burges_scaled": SCALED, "stop": SCALED, "binary": BINARY}
ONE, IDEAL, RELEVANT, CUTOFF = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NORMALISERS = {"one": ONE, "ideal": IDEAL, "relevant": RELEVANT, "cutoff": CUTOFF}

LN2 = tl.constexpr(0.6931471805599453)

NUM_WARPS = 4
WIDTHS = (32, 128, 256)  # ranks per tile: few, to compile few; longer lists take several of the widest


@dataclass(frozen=True)
class Tiles:
    """How a program covers its lists.

    Args:
        block_n, block_k, tiles: lists per program, ranks per tile, tiles per list; powers of two.
        inner: consecutive ranks that a sort reads at once, see ``swap_sort.load_to_sort``.
    """

    block_n: int
    block_k: int
    inner: int
    tiles: int


@lru_cache(maxsize=1024)
def tiles_of(size: int, itemsize: int) -> Tiles:
    """Tiles for lists of ``size`` gains of ``itemsize`` bytes.

    A list is held by few threads of one warp, 16 items to each (8 in the widest tiles, 4 in float64): most steps of a
    sort or a sum then work within a thread, and nothing is spilled.
    """
    widths = WIDTHS[1:2] if itemsize == 8 else WIDTHS
    block_k = next((width for width in widths if width >= size), widths[-1])
    items = 4 if itemsize == 8 else 8 if block_k == WIDTHS[-1] else 16
    lanes = min(32, max(4, block_k // items))
    inner = min(block_k, lanes * (16 // itemsize))  # 16 bytes per thread
    return Tiles(32 * NUM_WARPS // lanes, block_k, inner, triton.next_power_of_2(triton.cdiv(size, block_k)))


def top_of(metric: Metric, tiles: Tiles) -> int:
    """How many of the largest gains the normaliser needs, as a power of two; 0 where it needs none in order."""
    if metric.definition.normaliser != "ideal":
        return 0
    padded = tiles.block_k * tiles.tiles
    return padded if metric.cutoff is None else min(padded, max(2, triton.next_power_of_2(metric.cutoff)))


def accumulator_of(gains: torch.dtype) -> tl.dtype:
    """What sums are accumulated in."""
    return tl.float64 if gains == torch.float64 else tl.float32


def pointer_types(gains: torch.dtype) -> tuple[str, str]:
    """Triton's types of what is read and of what is written."""
    read = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16"}[gains]
    return read, "*fp64" if gains == torch.float64 else "*fp32"


def is_quads(*lengths: int) -> bool:
    """Whether rows of these lengths all begin at a multiple of four elements."""
    return all(length % 4 == 0 for length in lengths)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU tensor's device the current one, if it is not."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@triton.constexpr_function
def log2(power_of_two: int) -> int:
    """The exponent, at compile time."""
    return power_of_two.bit_length() - 1


@lru_cache(maxsize=256)
def discounts_on(metric: Metric, size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(size,) the discount of each rank, 0 beyond the cutoff. Cached: do not write to it."""
    return torch.from_numpy(_cut_discounts(metric, size)).to(device=device, dtype=dtype)


@lru_cache(maxsize=256)
def swap_table_on(metric: Metric, size: int, shown: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(3, size), of causal swaps in lists that all have ``size`` items of which ``shown`` are shown: each rank's
    discount less that of the last rank, the sum of these from the rank on, and 1 / (items behind it)."""
    discount = _cut_discounts(metric, size)
    discount[shown:] = 0.0
    centred = discount - discount[-1]
    behind = np.maximum(np.arange(size - 1, -1, -1), 1)
    table = np.stack([centred, centred[::-1].cumsum()[::-1], 1.0 / behind])
    return torch.from_numpy(table).to(device=device, dtype=dtype)


@lru_cache(maxsize=256)
def sorted_discounts_on(
    metric: Metric, size: int, tiles: Tiles, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """(block_k,) the same in the order in which ``swap_sort.in_tile_order`` leaves a sorted tile; 0 beyond ``size``."""
    table = np.zeros(tiles.block_k)
    table[:size] = _cut_discounts(metric, size)[: tiles.block_k]
    table = table.reshape(tiles.inner, -1).T.reshape(-1)
    return torch.from_numpy(table.copy()).to(device=device, dtype=dtype)


def _cut_discounts(metric: Metric, size: int) -> np.ndarray:
    table = discount_table(metric, size).copy()
    if metric.cutoff is not None:
        table[metric.cutoff :] = 0.0
    return table


@triton.constexpr_function
def is_one_of(value: int, first: int, second: int) -> bool:
    """Whether a choice is one of two, at compile time."""
    return value in (first, second)


@triton.jit
def list_bounds(lengths_ptr, num_ranked_ptr, row, exists, size, max_ranked):
    """Candidates and shown ranks of each list: (BLOCK_N, 1), or (1, 1) where all have the same."""
    length = tl.zeros([1, 1], dtype=tl.int32) + size  # (1, 1)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + row, mask=exists, other=0).to(tl.int32)  # (BLOCK_N, 1)
    shown = tl.minimum(length, max_ranked)  # (BLOCK_N, 1)
    if num_ranked_ptr is not None:
        shown = tl.minimum(shown, tl.load(num_ranked_ptr + row, mask=exists, other=0).to(tl.int32))  # (BLOCK_N, 1)
    return length, shown


@triton.jit
def tile_ranks(tile, BLOCK_K: tl.constexpr, INNER: tl.constexpr):
    """(BLOCK_K / INNER, 1, INNER) the ranks (from 0) of a tile, in the shape that ``load_tile`` reads them in."""
    chunk = tl.arange(0, BLOCK_K // INNER)[:, None, None]  # (BLOCK_K / INNER, 1, 1)
    return tile * BLOCK_K + chunk * INNER + tl.arange(0, INNER)[None, None, :]  # (BLOCK_K / INNER, 1, INNER)


@triton.jit
def load_tile(
    pointer, row, stride, tile, exists, length, ACCUMULATOR: tl.constexpr, BLOCK_K: tl.constexpr, INNER: tl.constexpr
):
    """(BLOCK_N, BLOCK_K) values of a tile of each list, 0 outside of the list.

    Read as (chunks, lists, INNER), so that a thread gets all chunks of one list, 16 bytes of each, and few threads
    share a list: what follows works mostly on registers of one thread, and yet whole sectors are read. Tables of
    ranks (K,) are read the same way, with stride 0, which keeps everything in one layout.
    """
    k = tile_ranks(tile, BLOCK_K, INNER)  # (chunks, 1, INNER)
    inside = exists[None] & (k < length[None])  # (chunks, BLOCK_N, INNER)
    x = tl.load(pointer + row[None] * stride + k, mask=inside, other=0.0)  # (chunks, BLOCK_N, INNER)
    return x.to(ACCUMULATOR).permute(1, 0, 2).reshape(row.shape[0], BLOCK_K)  # (BLOCK_N, BLOCK_K)


@triton.jit
def store_tile(pointer, x, row, size, tile, exists, BLOCK_K: tl.constexpr, INNER: tl.constexpr):
    """Write x (BLOCK_N, BLOCK_K) to a tile of rows of ``size``, as ``load_tile`` reads."""
    k = tile_ranks(tile, BLOCK_K, INNER)  # (chunks, 1, INNER)
    x = x.reshape(row.shape[0], BLOCK_K // INNER, INNER).permute(1, 0, 2)  # (chunks, BLOCK_N, INNER)
    tl.store(pointer + row[None] * size + k, x, mask=exists[None] & (k < size))


@triton.jit
def load_item(pointer, row, stride, k, exists, length, ACCUMULATOR: tl.constexpr):
    """(BLOCK_N, 1) the value at rank k (BLOCK_N, 1) of each list, 0 outside of it."""
    inside = exists & (k >= 0) & (k < length)  # (BLOCK_N, 1)
    return tl.load(pointer + row * stride + k, mask=inside, other=0.0).to(ACCUMULATOR)  # (BLOCK_N, 1)


@triton.jit
def partner(x, BIT: tl.constexpr):
    """(R, C) the element whose column differs in one bit: a register or a shuffle, once the compiler is through."""
    BITS: tl.constexpr = tl.int64 if x.dtype.primitive_bitwidth == 64 else tl.int32
    pairs = x.to(BITS, bitcast=True).reshape(x.shape[0], x.shape[1] >> (BIT + 1), 2, 1 << BIT)
    pairs = tl.sum(pairs, axis=2, keep_dims=True) - pairs  # integers wrap: exact
    return pairs.reshape(x.shape[0], x.shape[1]).to(x.dtype, bitcast=True)  # (R, C)


@triton.jit
def _sums_beyond(x, LATER: tl.constexpr):
    """``sums_beyond`` by pairs, fours, eights .. : log2(C) additions per element."""
    column = tl.arange(0, x.shape[1])[None, :]  # (1, C)
    beyond, group = tl.zeros_like(x), x  # (R, C)
    for bit in tl.static_range(log2(x.shape[1])):
        other = partner(group, bit)  # (R, C)
        is_second = (column >> bit) & 1 == 1  # (1, C)
        beyond += tl.where(is_second != LATER, other, 0.0)  # (R, C)
        group += other  # (R, C)
    return beyond


@triton.jit
def sums_beyond(x, LATER: tl.constexpr):
    """(R, C) the sum of what lies behind each column (or before it, unless LATER).

    Within quarters of registers first, then over the sums of these. Not ``tl.cumsum(reverse=True)``, which turns rows
    round by shuffles, nor total minus prefix, which would carry the rounding of the whole list into ranks with few
    candidates behind them.
    """
    fours = x.reshape(x.shape[0], x.shape[1] // 4, 4)  # (R, C / 4, 4)
    far = _sums_beyond(tl.sum(fours, axis=2), LATER)  # (R, C / 4)
    near = _sums_beyond(x.reshape(x.shape[0] * x.shape[1] // 4, 4), LATER).reshape(x.shape[0], x.shape[1] // 4, 4)
    return (near + far[:, :, None]).reshape(x.shape[0], x.shape[1])  # (R, C)


@triton.jit
def sums_behind(x):
    """(R, C) the sum of what lies behind each column."""
    return sums_beyond(x, True)


@triton.jit
def two_sums_behind(a, b):
    """``sums_behind`` of two tensors as one of twice the rows: half the operations to compile."""
    both = tl.join(a, b).permute(2, 0, 1).reshape(2 * a.shape[0], a.shape[1])  # (2 R, C)
    return sums_behind(both).reshape(2, a.shape[0], a.shape[1]).permute(1, 2, 0).split()  # (R, C) twice


@triton.jit
def term_gains(gains, top, KIND: tl.constexpr):
    """What the metric makes of each gain; ``top`` (BLOCK_N, 1) matters to SCALED only."""
    if KIND == BINARY:
        w = tl.where(gains > 0.0, 1.0, 0.0).to(gains.dtype)  # (BLOCK_N, BLOCK_K)
    elif KIND == GAIN:
        w = gains  # (BLOCK_N, BLOCK_K)
    elif KIND == BURGES:
        w = tl.where(gains < 0.125, _exp2_minus_1(gains), tl.exp2(gains) - 1.0)  # (BLOCK_N, BLOCK_K)
    else:  # (2^g - 1) / 2^top, and 2^g never formed
        small = _exp2_minus_1(gains) * tl.exp2(-top)  # (BLOCK_N, BLOCK_K)
        w = tl.where(gains < 0.125, small, tl.exp2(gains - top) - tl.exp2(-top))  # (BLOCK_N, BLOCK_K)
    return w


@triton.jit
def term_slopes(gains, top, KIND: tl.constexpr):
    """Derivative of the term gain by the gain: of 2^g, ln 2 x 2^g."""
    if KIND == BURGES:
        slope = LN2 * tl.exp2(gains)  # (BLOCK_N, BLOCK_K)
    else:
        slope = LN2 * tl.exp2(gains - top)  # (BLOCK_N, BLOCK_K)
    return slope


@triton.jit
def _exp2_minus_1(gains):
    # For gains below 1/8, where the subtraction would lose digits. TERMS of the series leave less than a rounding.
    TERMS: tl.constexpr = 11 if gains.dtype == tl.float64 else 6
    y = tl.minimum(gains, 0.125) * LN2  # (BLOCK_N, BLOCK_K)
    series = tl.full(gains.shape, 1.0, gains.dtype)  # (BLOCK_N, BLOCK_K)
    for i in tl.static_range(TERMS):
        series = 1.0 + y * series * (1.0 / (TERMS + 1 - i))  # (BLOCK_N, BLOCK_K)
    return y * series


@triton.jit
def largest_gain(
    gains_ptr,
    row,
    stride,
    exists,
    length,
    ACCUMULATOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INNER: tl.constexpr,
    TILES: tl.constexpr,
):
    """(BLOCK_N, 1) the largest gain of each list, 0 for an empty one."""
    top = tl.zeros(row.shape, dtype=ACCUMULATOR)  # (BLOCK_N, 1)
    for tile in range(TILES):
        gains = load_tile(gains_ptr, row, stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)
        top = tl.maximum(top, tl.max(gains, axis=1, keep_dims=True))  # (BLOCK_N, 1)
    return top
