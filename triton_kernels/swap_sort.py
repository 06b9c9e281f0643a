"""The normaliser of each list: constants, the number of relevant items, or the value of the best order.

The best order needs the gains sorted, and a kernel that reads and writes each gain once can afford some 35 integer
operations per gain before it is late for the memory. Hence

- Gains are >= 0, so their order is that of their bits as integers: a comparison and exchange is one minimum or maximum.
- The bitonic network in the form whose comparators all point one way (the first step of each merge compares mirror
  images): which of the two an element keeps is known at compile time wherever its partner lies in the same thread.
- The order in which elements enter a sort is free. ``load_to_sort`` makes the network's low bits, which most of its
  steps exchange over, registers of one thread.

At 128 gains, 16 in each thread, that is 28 steps, 22 of them within a thread: 34 minima or maxima and 9 shuffles per
gain in the sm_90 code, where ``tl.sort`` of a tile with one warp per list takes 56 operations and 16 shuffles.

With a cutoff at n only the n largest count (rounded up to TOP, a power of two): groups of TOP are sorted, and each
merge of two keeps the upper half. TOP >= K sorts the list.

Lists of several tiles with TOP beyond one tile: tiles are sorted in registers and merged through ``scratch``, a row of
K numbers per list, in the same network; its exchanges over a tile or more go through the cache, 8 bytes read and
written per gain and step, of which there are log2(TILES) (log2(TILES) + 1) / 2. The padding of the last tile is
smaller than all gains and stays behind them in this form of the network, so it needs no room in ``scratch``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flexrec.triton_kernels.swap_lists import (
    CUTOFF,
    IDEAL,
    RELEVANT,
    load_tile,
    log2,
    partner,
    term_gains,
)


@triton.jit
def _larger_first(x, other, BIT: tl.constexpr):
    """Of each element and the other one, the larger to the column whose bit is 0."""
    is_second = ((tl.arange(0, x.shape[1]) >> BIT) & 1)[None, :] == 1  # (1, C)
    return tl.where(is_second, tl.minimum(x, other), tl.maximum(x, other))  # (R, C)


@triton.jit
def _mirror(x, BITS: tl.constexpr):
    """Each group of 2^BITS columns in reverse."""
    for bit in tl.static_range(BITS):
        x = partner(x, bit)  # (R, C)
    return x


@triton.jit
def _merge(x, BITS: tl.constexpr):
    """Sort each group of 2^BITS columns that rises then falls, or falls then rises, in descending order."""
    for i in tl.static_range(BITS):
        x = _larger_first(x, partner(x, BITS - 1 - i), BITS - 1 - i)  # (R, C)
    return x


@triton.jit
def _sort(x, BITS: tl.constexpr):
    """Sort each group of 2^BITS columns in descending order."""
    for bits in tl.static_range(1, BITS + 1):
        x = _merge(_larger_first(x, _mirror(x, bits), bits - 1), bits - 1)  # (R, C)
    return x


@triton.jit
def _largest(x, BITS: tl.constexpr, TOP_BITS: tl.constexpr):
    """(R, 2^TOP_BITS) the largest of each row of 2^BITS, in descending order."""
    x = _sort(x, TOP_BITS)  # (R, C), groups of 2^TOP_BITS in order
    for _ in tl.static_range(BITS - TOP_BITS):
        is_second = ((tl.arange(0, x.shape[1]) >> TOP_BITS) & 1)[None, :] == 1  # (1, C)
        pairs = tl.where(is_second, _mirror(x, TOP_BITS), x)  # (R, C)
        pairs = pairs.reshape(x.shape[0], x.shape[1] >> (TOP_BITS + 1), 2, 1 << TOP_BITS)
        x = tl.max(pairs, axis=2).reshape(x.shape[0], x.shape[1] // 2)  # (R, C / 2)
        x = _merge(x, TOP_BITS)  # (R, C / 2)
    return x


@triton.jit
def load_to_sort(
    gains_ptr,
    row,
    stride,
    exists,
    length,
    tile,
    ACCUMULATOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INNER: tl.constexpr,
):
    """(BLOCK_N, BLOCK_K) integers that order as the gains of a tile do, in another order."""
    BITS: tl.constexpr = tl.int64 if ACCUMULATOR.primitive_bitwidth == 64 else tl.int32
    gains = load_tile(gains_ptr, row, stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)  # (BLOCK_N, BLOCK_K)
    # Chunks are registers of one thread (see ``load_tile``): they become the network's lowest bits.
    chunks = gains.to(BITS, bitcast=True).reshape(row.shape[0], BLOCK_K // INNER, INNER)
    return chunks.permute(0, 2, 1).reshape(row.shape[0], BLOCK_K)  # (BLOCK_N, BLOCK_K)


@triton.jit
def in_tile_order(x, INNER: tl.constexpr):
    """Undo the reordering of ``load_to_sort``, so that a sorted tile meets a table read by ``load_tile``."""
    chunks = x.reshape(x.shape[0], INNER, x.shape[1] // INNER)  # (BLOCK_N, INNER, BLOCK_K / INNER)
    return chunks.permute(0, 2, 1).reshape(x.shape[0], x.shape[1])  # (BLOCK_N, BLOCK_K)


@triton.jit
def _dcg(ordered, start, discounts_ptr, size, top, GAIN_KIND: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """(R, 1) discounted sum of sorted gains (R, C), given as integers, the first of them at rank ``start``."""
    k = start + tl.arange(0, ordered.shape[1])[None, :]  # (1, C)
    w = term_gains(ordered.to(ACCUMULATOR, bitcast=True), top, GAIN_KIND)  # (R, C)
    return tl.sum(w * tl.load(discounts_ptr + k, mask=k < size, other=0.0), axis=1, keep_dims=True)


@triton.jit
def _exchange(scratch_ptr, row, size, exists, first, second):
    """Put the larger of two elements of ``scratch`` first; ``first`` < ``second`` are columns (1, C)."""
    both = exists & (second < size)  # (BLOCK_N, C)
    a = tl.load(scratch_ptr + row * size + first, mask=both, other=0.0)  # (BLOCK_N, C)
    b = tl.load(scratch_ptr + row * size + second, mask=both, other=0.0)  # (BLOCK_N, C)
    tl.store(scratch_ptr + row * size + first, tl.maximum(a, b), mask=both)
    tl.store(scratch_ptr + row * size + second, tl.minimum(a, b), mask=both)


@triton.jit
def _merge_tiles(
    scratch_ptr, row, size, exists, LEVELS: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr
):
    """Sort the rows of ``scratch``, whose tiles are in order; the last merge within tiles is left to the reader."""
    INTEGER: tl.constexpr = tl.int64 if scratch_ptr.dtype.element_ty == tl.float64 else tl.int32
    column = tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
    for level in range(LEVELS):  # groups of 2^level tiles are in order
        half = 1 << level  # tiles
        for pair in range(TILES // 2):
            group = (pair // half) * (2 * half) * BLOCK_K  # where the two groups begin
            offset = (pair % half) * BLOCK_K + column  # (1, BLOCK_K)
            last = 2 * half * BLOCK_K - 1
            _exchange(scratch_ptr, row, size, exists, group + offset, group + last - offset)
        tl.debug_barrier()
        for step in range(LEVELS):
            if step < level:
                stride = half >> (step + 1)  # tiles
                for pair in range(TILES // 2):
                    first = ((pair // stride) * 2 * stride + pair % stride) * BLOCK_K + column  # (1, BLOCK_K)
                    _exchange(scratch_ptr, row, size, exists, first, first + stride * BLOCK_K)
                tl.debug_barrier()
        if level < LEVELS - 1:
            for tile in range(TILES):
                address = scratch_ptr + row * size + tile * BLOCK_K + column  # (BLOCK_N, BLOCK_K)
                mask = exists & (tile * BLOCK_K + column < size)  # (BLOCK_N, BLOCK_K)
                x = tl.load(address, mask=mask, other=0.0).to(INTEGER, bitcast=True)  # (BLOCK_N, BLOCK_K)
                x = _merge(x, BITS)  # (BLOCK_N, BLOCK_K)
                tl.store(address, x.to(scratch_ptr.dtype.element_ty, bitcast=True), mask=mask)
            tl.debug_barrier()


@triton.jit
def _ideal(
    gains_ptr,
    scratch_ptr,
    discounts_ptr,
    sorted_discounts_ptr,
    row,
    stride,
    exists,
    length,
    size,
    top,
    GAIN_KIND: tl.constexpr,
    TOP: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INNER: tl.constexpr,
    TILES: tl.constexpr,
):
    """(BLOCK_N, 1) the value of the best order. Needs ``scratch`` (N, size) where TOP > BLOCK_K."""
    BITS: tl.constexpr = log2(BLOCK_K)
    INTEGER: tl.constexpr = tl.int64 if ACCUMULATOR.primitive_bitwidth == 64 else tl.int32
    if TOP == BLOCK_K and TILES == 1:
        x = load_to_sort(gains_ptr, row, stride, exists, length, 0, ACCUMULATOR, BLOCK_K, INNER)  # (BLOCK_N, BLOCK_K)
        x = in_tile_order(_sort(x, BITS), INNER).to(ACCUMULATOR, bitcast=True)  # (BLOCK_N, BLOCK_K)
        # (BLOCK_N, BLOCK_K): the table has a value for every position of the tile
        d = load_tile(
            sorted_discounts_ptr, row, 0, 0, exists, BLOCK_K + tl.zeros_like(length), ACCUMULATOR, BLOCK_K, INNER
        )
        ideal = tl.sum(term_gains(x, top, GAIN_KIND) * d, axis=1, keep_dims=True)  # (BLOCK_N, 1)
    elif TOP <= BLOCK_K:
        TOP_BITS: tl.constexpr = log2(TOP)
        best = tl.zeros([row.shape[0], TOP], dtype=INTEGER)  # (BLOCK_N, TOP)
        for tile in range(TILES):
            x = load_to_sort(gains_ptr, row, stride, exists, length, tile, ACCUMULATOR, BLOCK_K, INNER)
            x = _largest(x, BITS, TOP_BITS)  # (BLOCK_N, TOP)
            if TILES > 1:
                x = _merge(tl.maximum(best, _mirror(x, TOP_BITS)), TOP_BITS)  # (BLOCK_N, TOP)
            best = x  # (BLOCK_N, TOP)
        ideal = _dcg(best, 0, discounts_ptr, size, top, GAIN_KIND, ACCUMULATOR)  # (BLOCK_N, 1)
    else:
        column = tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
        for tile in range(TILES):
            x = load_to_sort(gains_ptr, row, stride, exists, length, tile, ACCUMULATOR, BLOCK_K, INNER)
            x = _sort(x, BITS).to(ACCUMULATOR, bitcast=True)  # (BLOCK_N, BLOCK_K)
            k = tile * BLOCK_K + column  # (1, BLOCK_K)
            tl.store(scratch_ptr + row * size + k, x, mask=exists & (k < size))
        tl.debug_barrier()
        _merge_tiles(scratch_ptr, row, size, exists, log2(TILES), BITS, BLOCK_K, TILES)
        ideal = tl.zeros(row.shape, dtype=ACCUMULATOR)  # (BLOCK_N, 1)
        for tile in range(TILES):
            k = tile * BLOCK_K + column  # (1, BLOCK_K)
            x = tl.load(scratch_ptr + row * size + k, mask=exists & (k < size), other=0.0)  # (BLOCK_N, BLOCK_K)
            x = _merge(x.to(INTEGER, bitcast=True), BITS)  # (BLOCK_N, BLOCK_K)
            ideal += _dcg(x, tile * BLOCK_K, discounts_ptr, size, top, GAIN_KIND, ACCUMULATOR)  # (BLOCK_N, 1)
        tl.debug_barrier()  # scratch is the caller's again
    return ideal


@triton.jit
def inverse_norm(
    gains_ptr,
    scratch_ptr,
    discounts_ptr,
    sorted_discounts_ptr,
    row,
    stride,
    exists,
    length,
    size,
    cutoff,
    top,
    GAIN_KIND: tl.constexpr,
    NORMALISER: tl.constexpr,
    TOP: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INNER: tl.constexpr,
    TILES: tl.constexpr,
):
    """(BLOCK_N, 1) 1 / normaliser of each list, 0 where that is 0."""
    norm = tl.full(row.shape, 1.0, ACCUMULATOR)  # (BLOCK_N, 1)
    if NORMALISER == IDEAL:
        norm = _ideal(
            gains_ptr,
            scratch_ptr,
            discounts_ptr,
            sorted_discounts_ptr,
            row,
            stride,
            exists,
            length,
            size,
            top,
            GAIN_KIND,
            TOP,
            ACCUMULATOR,
            BLOCK_K,
            INNER,
            TILES,
        )  # (BLOCK_N, 1)
    elif NORMALISER == RELEVANT:
        norm = tl.zeros(row.shape, dtype=ACCUMULATOR)  # (BLOCK_N, 1)
        for tile in range(TILES):
            gains = load_tile(gains_ptr, row, stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)
            norm += tl.sum(term_gains(gains, top, GAIN_KIND), axis=1, keep_dims=True)  # (BLOCK_N, 1)
    elif NORMALISER == CUTOFF:
        if cutoff > 0:
            norm = norm * cutoff  # (BLOCK_N, 1)
        else:
            norm = norm * length.to(ACCUMULATOR)  # (BLOCK_N, 1)
    return tl.where(norm > 0.0, 1.0 / tl.where(norm > 0.0, norm, 1.0), 0.0)  # (BLOCK_N, 1)
