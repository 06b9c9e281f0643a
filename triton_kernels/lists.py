"""What the swap reward kernels share: how a program reads its lists, and what a metric makes of a gain.

A program holds BLOCK_N lists and walks over each in TILES tiles of BLOCK_K ranks, so that neither its registers nor
the time to compile it grow with the list. A value of each list has shape (BLOCK_N, 1), a value of each rank
(1, BLOCK_K), a value of each item (BLOCK_N, BLOCK_K). Lengths are (1, 1) where all lists have the same; whatever then
depends on the rank alone is (1, BLOCK_K), computed once for all lists of the program.

The discounts of a metric are a table (K,), made on the host in float64, 0 beyond the cutoff: it stays in the cache and
spares the kernels a logarithm per rank.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from flexrec.metrics import Metric, discount_table
from flexrec.triton_kernels.launch import ceil_div

SWAP, NONCAUSAL, INDEPENDENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
RANK, SEQUENCE = tl.constexpr(3), tl.constexpr(4)
CREDITS = {"swap": SWAP, "noncausal": NONCAUSAL, "independent": INDEPENDENT, "rank": RANK, "sequence": SEQUENCE}
GAIN, BURGES, SCALED, BINARY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
GAINS = {"gain": GAIN, "burges": BURGES, "burges_scaled": SCALED, "stop": SCALED, "binary": BINARY}
ONE, IDEAL, RELEVANT, CUTOFF = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NORMALISERS = {"one": ONE, "ideal": IDEAL, "relevant": RELEVANT, "cutoff": CUTOFF}
LINEAR, FIRST, AVERAGE_PRECISION, CASCADE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
FORMS = {"linear": LINEAR, "first": FIRST, "average_precision": AVERAGE_PRECISION, "cascade": CASCADE}

LN2 = tl.constexpr(0.6931471805599453)

NUM_WARPS = 4
WIDTHS = (32, 128, 256)  # ranks per tile: few, to compile few; longer lists take several of the widest


class Tiles(NamedTuple):
    """How a program covers its lists: lists per program, ranks per tile, tiles per list; powers of two."""

    block_n: int
    block_k: int
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
    return Tiles(32 * NUM_WARPS // lanes, block_k, triton.next_power_of_2(ceil_div(size, block_k)))


@triton.constexpr_function
def inner_of(block_n: int, block_k: int, itemsize: int) -> int:
    """Consecutive ranks of a list that its threads read at once, 16 bytes each: INNER, see ``load_tile``."""
    lanes = 32 * NUM_WARPS // block_n
    return min(block_k, lanes * (16 // itemsize))


def _top_of(metric: Metric, tiles: Tiles) -> int:
    """How many of the largest gains the normaliser needs, as a power of two; 0 where it needs none in order."""
    if metric.definition.normaliser != "ideal":
        return 0
    padded = tiles.block_k * tiles.tiles
    return padded if metric.cutoff is None else min(padded, max(2, triton.next_power_of_2(metric.cutoff)))


class Call(NamedTuple):
    """What a kernel over lists is launched with, whatever it computes.

    Attributes:
        arguments: its first ones, up to ``cutoff``.
        constants: what the metric and the shape of the lists say, by name.
        grid: programs.
    """

    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    grid: tuple[int]


def call_on(
    gains: torch.Tensor,
    out: torch.Tensor,
    metric: Metric,
    lengths: torch.Tensor | None,
    num_ranked: torch.Tensor | None,
    max_ranked: int,
    *strides: int,
) -> Call:
    """The call on gains (N, K) whose rows are contiguous; ``strides`` are those of other matrices that it reads."""
    rows, size = gains.shape
    tiles, definition = tiles_of(size, gains.element_size()), metric.definition
    discounts, order = discounts_on(metric, size, out.device, out.dtype), None
    if definition.normaliser == "ideal":
        inner = inner_of(tiles.block_n, tiles.block_k, gains.element_size())
        order = sorted_discounts_on(metric, size, tiles.block_k, inner, out.device, out.dtype)
    lists = (gains, out, discounts, lengths, num_ranked, rows, size, gains.stride(0), max_ranked)
    constants = {
        "FORM": FORMS[definition.form].value,
        "GAIN_KIND": GAINS[definition.gain].value,
        "NORMALISER": NORMALISERS[definition.normaliser].value,
        "MAX_GAIN": metric.max_gain or 0.0,
        "TOP": _top_of(metric, tiles),
        "QUADS": all(length % 4 == 0 for length in (size, gains.stride(0), *strides)),
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "TILES": tiles.tiles,
    }
    return Call((*lists, order, metric.cutoff or 0), constants, (ceil_div(rows, tiles.block_n),))


@lru_cache(maxsize=256)
def discounts_on(metric: Metric, size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(size,) the discount of each rank, 0 beyond the cutoff. Cached: do not write to it."""
    return _copied(_cut_discounts(metric, size), device, dtype)


@lru_cache(maxsize=256)
def swap_table_on(metric: Metric, size: int, shown: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(3, size), of causal swaps in lists that all have ``size`` items of which ``shown`` are shown: each rank's
    discount less that of the last rank, the sum of these from the rank on, and 1 / (items behind it)."""
    discount = _cut_discounts(metric, size)
    discount[shown:] = 0.0
    centred = discount - discount[-1]
    behind = np.maximum(np.arange(size - 1, -1, -1), 1)
    table = np.stack([centred, centred[::-1].cumsum()[::-1], 1.0 / behind])
    return _copied(table, device, dtype)


@lru_cache(maxsize=256)
def sorted_discounts_on(
    metric: Metric, size: int, block_k: int, inner: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """(block_k,) discounts in the order in which ``sort.in_tile_order`` leaves a sorted tile; 0 beyond ``size``."""
    table = np.zeros(block_k)
    table[:size] = _cut_discounts(metric, size)[:block_k]
    return _copied(table.reshape(inner, -1).T.reshape(-1), device, dtype)


def _copied(table: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The table on a device.

    Raises:
        RuntimeError: while a CUDA graph is captured, which can hold no copy from the host's memory.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"swap rewards need a table of {table.shape[-1]} discounts on {device}, which cannot be copied there while "
            "a CUDA graph is captured; call them once with the same metric, K and num_ranked before the capture"
        )
    return torch.from_numpy(np.ascontiguousarray(table)).to(device=device, dtype=dtype)


def _cut_discounts(metric: Metric, size: int) -> np.ndarray:
    table = discount_table(metric, size).copy()
    if metric.cutoff is not None:
        table[metric.cutoff :] = 0.0
    return table


class Lists(NamedTuple):
    """The lists of one program.

    Attributes:
        gains_ptr, stride: gains (N, K), and from one row to the next, in elements.
        discounts_ptr: (K,).
        size: K.
        row, exists: (BLOCK_N, 1) which list, and whether there is one.
        length, shown: candidates and shown ranks of each list, (BLOCK_N, 1), or (1, 1) where all have the same.
        first_ranks: (BLOCK_K / INNER, 1, INNER) the ranks (from 0) of the first tile, in the shape that it is read in.
        zero: (BLOCK_N, 1) in the dtype that sums are accumulated in.
    """

    gains_ptr: Any
    stride: Any
    discounts_ptr: Any
    size: Any
    row: Any
    exists: Any
    length: Any
    shown: Any
    first_ranks: Any
    zero: Any


@triton.constexpr_function
def is_one_of(value: int, first: int, second: int) -> bool:
    """Whether a choice is one of two, at compile time."""
    return value in (first, second)


@triton.jit
def lists_of_program(
    gains_ptr,
    discounts_ptr,
    lengths_ptr,
    num_ranked_ptr,
    rows,
    size,
    stride,
    max_ranked,
    QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The ``Lists`` of this program. QUADS: rows are a multiple of four long, hence 16-byte accesses."""
    if QUADS:
        size, stride = size // 4 * 4, stride // 4 * 4
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # (BLOCK_N, 1)
    exists = row < rows
    length = tl.zeros([1, 1], dtype=tl.int32) + size  # (1, 1)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + row, mask=exists, other=0).to(tl.int32)  # (BLOCK_N, 1)
    shown = tl.minimum(length, max_ranked)
    if num_ranked_ptr is not None:
        shown = tl.minimum(shown, tl.load(num_ranked_ptr + row, mask=exists, other=0).to(tl.int32))  # (BLOCK_N, 1)
    INNER: tl.constexpr = inner_of(BLOCK_N, BLOCK_K, gains_ptr.dtype.element_ty.primitive_bitwidth // 8)
    chunk = tl.arange(0, BLOCK_K // INNER)[:, None, None]
    first_ranks = chunk * INNER + tl.arange(0, INNER)[None, None, :]  # (BLOCK_K / INNER, 1, INNER)
    zero = tl.zeros([BLOCK_N, 1], dtype=tl.float64 if gains_ptr.dtype.element_ty == tl.float64 else tl.float32)
    return Lists(gains_ptr, stride, discounts_ptr, size, row, exists, length, shown, first_ranks, zero)


@triton.jit
def ranks_of(lists, tile):
    """(1, BLOCK_K) the ranks (from 0) of a tile."""
    BLOCK_K: tl.constexpr = lists.first_ranks.shape[0] * lists.first_ranks.shape[2]
    return tl.arange(0, BLOCK_K)[None, :] + tile * BLOCK_K


@triton.jit
def load_tile(lists, pointer, stride, tile, length):
    """(BLOCK_N, BLOCK_K) values of a tile of each list, 0 beyond ``length``; ``stride`` 0 for a table of ranks (K,).

    Read as (chunks, lists, INNER), so that a thread gets all chunks of one list, 16 bytes of each, and few threads
    share a list: what follows works mostly on registers of one thread, and yet whole sectors are read. Tables are read
    the same way, which keeps everything in one layout.
    """
    BLOCK_K: tl.constexpr = lists.first_ranks.shape[0] * lists.first_ranks.shape[2]
    k = lists.first_ranks + tile * BLOCK_K  # (chunks, 1, INNER)
    inside = lists.exists[None] & (k < length[None])  # (chunks, BLOCK_N, INNER)
    x = tl.load(pointer + lists.row[None] * stride + k, mask=inside, other=0.0)
    return x.to(lists.zero.dtype).permute(1, 0, 2).reshape(lists.row.shape[0], BLOCK_K)  # (BLOCK_N, BLOCK_K)


@triton.jit
def gains_of(lists, tile):
    """(BLOCK_N, BLOCK_K) the gains of a tile, 0 outside of the lists."""
    return load_tile(lists, lists.gains_ptr, lists.stride, tile, lists.length)


@triton.jit
def discounts_of(lists, tile):
    """(BLOCK_N, BLOCK_K) the discounts of a tile, 0 at ranks that are not shown."""
    return load_tile(lists, lists.discounts_ptr, 0, tile, lists.shown)


@triton.jit
def store_tile(lists, pointer, x, tile):
    """Write x (BLOCK_N, BLOCK_K) to a tile of rows of ``size``, as ``load_tile`` reads."""
    INNER: tl.constexpr = lists.first_ranks.shape[2]
    k = lists.first_ranks + tile * x.shape[1]  # (chunks, 1, INNER)
    x = x.reshape(x.shape[0], x.shape[1] // INNER, INNER).permute(1, 0, 2)  # (chunks, BLOCK_N, INNER)
    tl.store(pointer + lists.row[None] * lists.size + k, x, mask=lists.exists[None] & (k < lists.size))


@triton.jit
def load_item(lists, pointer, stride, k, length):
    """(BLOCK_N, 1) the value at rank k (BLOCK_N or 1, 1) of each list, 0 outside of it."""
    inside = lists.exists & (k >= 0) & (k < length)
    return tl.load(pointer + lists.row * stride + k, mask=inside, other=0.0).to(lists.zero.dtype)


class Terms(NamedTuple):
    """How gains become term gains, (BLOCK_N, 1) each.

    Attributes:
        top: the largest gain; matters to SCALED only.
        scale, unscale: a power of two that term gains are multiplied by, and its inverse. It brings the largest of a
            list to between 1 and 4, so that squares of gains of 1e-20 or 1e30 are no 0 and no infinity in float32.
    """

    top: Any
    scale: Any
    unscale: Any


@triton.jit
def terms_of(lists, KIND: tl.constexpr, MAX_GAIN: tl.constexpr, SCALES: tl.constexpr, TILES: tl.constexpr):
    """The ``Terms`` of each list. MAX_GAIN: the top, or 0: the list's own; SCALES: whether scale may be not 1."""
    one = lists.zero + 1.0
    top = lists.zero + MAX_GAIN
    if MAX_GAIN == 0.0 and (KIND == SCALED or (SCALES and KIND != BINARY)):
        for tile in range(TILES):
            top = tl.maximum(top, tl.max(gains_of(lists, tile), axis=1, keep_dims=True))
    terms = Terms(top, one, one)
    if SCALES and KIND != BINARY:
        BITS: tl.constexpr = tl.int64 if one.dtype == tl.float64 else tl.int32
        MANTISSA: tl.constexpr = 52 if one.dtype == tl.float64 else 23
        MOST: tl.constexpr = 2046 if one.dtype == tl.float64 else 254  # exponents a and MOST - a are those of inverses
        exponent = MOST - (term_gains(top, terms, KIND).to(BITS, bitcast=True) >> MANTISSA)
        exponent = tl.minimum(tl.maximum(exponent, 1), MOST - 1)
        scale = (exponent << MANTISSA).to(one.dtype, bitcast=True)
        terms = Terms(top, scale, ((MOST - exponent) << MANTISSA).to(one.dtype, bitcast=True))
    return terms


@triton.jit
def term_gains(gains, terms, KIND: tl.constexpr):
    """What the metric makes of each gain, times ``terms.scale`` unless BINARY. Same shape as ``gains``."""
    if KIND == BINARY:
        w = tl.where(gains > 0.0, 1.0, 0.0).to(gains.dtype)
    elif KIND == GAIN:
        w = gains * terms.scale
    elif KIND == BURGES:
        w = _exp2_minus_1(gains, terms.scale)
    else:  # (2^g - 1) / 2^top, and no large power ever formed
        w = _exp2_minus_1(tl.minimum(gains, 64.0), terms.scale * tl.exp2(-terms.top))
        w = tl.where(gains < 64.0, w, tl.exp2(gains - terms.top) * terms.scale)
    return w


@triton.jit
def term_variances(variance, gains, terms, KIND: tl.constexpr):
    """Variance of the term gains: that of the gains times the squared slope, of 2^g ln 2 x 2^g."""
    slope = terms.scale
    if KIND == BURGES:
        slope = LN2 * tl.exp2(gains) * terms.scale
    elif KIND == SCALED:
        slope = LN2 * tl.exp2(gains - terms.top) * terms.scale
    return variance * slope * slope


@triton.jit
def _exp2_minus_1(x, scale):
    """(2^x - 1) scale. A GPU's 2^x is good to 2 units in the last place, which are many once 1 is subtracted.

    With x = n + f, n whole and |f| <= 1/2: 2^n (2^f - 1) + (2^n - 1), the former by its series, of which TERMS leave
    less than a rounding. Powers of whole numbers are exact.
    """
    TERMS: tl.constexpr = 13 if x.dtype == tl.float64 else 7
    whole = tl.floor(x + 0.5)
    y = (x - whole) * LN2
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(TERMS):
        series = 1.0 + y * series * (1.0 / (TERMS + 1 - i))
    power = tl.exp2(whole)
    return power * ((x - whole) * scale * LN2 * series) + (power - 1.0) * scale
