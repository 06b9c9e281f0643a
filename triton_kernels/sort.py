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

from flexrec.triton_kernels.lists import CUTOFF, IDEAL, RELEVANT, gains_of, load_tile, term_gains
from flexrec.triton_kernels.scans import log2, partner, sum_of_rows


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
def load_to_sort(lists, tile):
    """(BLOCK_N, BLOCK_K) integers that order as the gains of a tile do, in another order."""
    BITS: tl.constexpr = tl.int64 if lists.zero.dtype.primitive_bitwidth == 64 else tl.int32
    INNER: tl.constexpr = lists.first_ranks.shape[2]
    gains = gains_of(lists, tile)  # (BLOCK_N, BLOCK_K)
    # Chunks are registers of one thread (see ``load_tile``): they become the network's lowest bits.
    chunks = gains.to(BITS, bitcast=True).reshape(gains.shape[0], gains.shape[1] // INNER, INNER)
    return chunks.permute(0, 2, 1).reshape(gains.shape[0], gains.shape[1])


@triton.jit
def in_tile_order(x, INNER: tl.constexpr):
    """Undo the reordering of ``load_to_sort``, so that a sorted tile meets a table read by ``load_tile``."""
    chunks = x.reshape(x.shape[0], INNER, x.shape[1] // INNER)  # (BLOCK_N, INNER, BLOCK_K / INNER)
    return chunks.permute(0, 2, 1).reshape(x.shape[0], x.shape[1])  # (BLOCK_N, BLOCK_K)


@triton.jit
def _dcg(lists, ordered, start, terms, GAIN_KIND: tl.constexpr):
    """(R, 1) discounted sum of sorted gains (R, C), given as integers, the first of them at rank ``start``."""
    k = start + tl.arange(0, ordered.shape[1])[None, :]  # (1, C)
    w = term_gains(ordered.to(lists.zero.dtype, bitcast=True), terms, GAIN_KIND)  # (R, C)
    return sum_of_rows(w * tl.load(lists.discounts_ptr + k, mask=k < lists.size, other=0.0))


@triton.jit
def _load_scratch(lists, scratch_ptr, column):
    """(BLOCK_N, C) entries of ``scratch`` at columns (1, C), 0 beyond its rows."""
    return tl.load(scratch_ptr + lists.row * lists.size + column, mask=lists.exists & (column < lists.size), other=0.0)


@triton.jit
def _store_scratch(lists, scratch_ptr, column, x):
    tl.store(scratch_ptr + lists.row * lists.size + column, x, mask=lists.exists & (column < lists.size))


@triton.jit
def _exchange(lists, scratch_ptr, first, second):
    """Put the larger of two elements of ``scratch`` first; ``first`` < ``second`` are columns (1, C)."""
    both = lists.exists & (second < lists.size)  # (BLOCK_N, C)
    place = scratch_ptr + lists.row * lists.size  # (BLOCK_N, 1)
    a = tl.load(place + first, mask=both, other=0.0)  # (BLOCK_N, C)
    b = tl.load(place + second, mask=both, other=0.0)
    tl.store(place + first, tl.maximum(a, b), mask=both)
    tl.store(place + second, tl.minimum(a, b), mask=both)


@triton.jit
def _merge_tiles(lists, scratch_ptr, LEVELS: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr):
    """Sort the rows of ``scratch``, whose tiles are in order; the last merge within tiles is left to the reader."""
    INTEGER: tl.constexpr = tl.int64 if lists.zero.dtype == tl.float64 else tl.int32
    BLOCK_K: tl.constexpr = 1 << BITS
    column = tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
    for level in range(LEVELS):  # groups of 2^level tiles are in order
        half = 1 << level  # tiles
        for pair in range(TILES // 2):
            group = (pair // half) * (2 * half) * BLOCK_K  # where the two groups begin
            offset = (pair % half) * BLOCK_K + column  # (1, BLOCK_K)
            last = 2 * half * BLOCK_K - 1
            _exchange(lists, scratch_ptr, group + offset, group + last - offset)
        tl.debug_barrier()
        for step in range(LEVELS):
            if step < level:
                stride = half >> (step + 1)  # tiles
                for pair in range(TILES // 2):
                    first = ((pair // stride) * 2 * stride + pair % stride) * BLOCK_K + column  # (1, BLOCK_K)
                    _exchange(lists, scratch_ptr, first, first + stride * BLOCK_K)
                tl.debug_barrier()
        if level < LEVELS - 1:
            for tile in range(TILES):
                k = tile * BLOCK_K + column  # (1, BLOCK_K)
                x = _merge(_load_scratch(lists, scratch_ptr, k).to(INTEGER, bitcast=True), BITS)  # (BLOCK_N, BLOCK_K)
                _store_scratch(lists, scratch_ptr, k, x.to(lists.zero.dtype, bitcast=True))
            tl.debug_barrier()


@triton.jit
def _ideal(
    lists, scratch_ptr, sorted_discounts_ptr, terms, GAIN_KIND: tl.constexpr, TOP: tl.constexpr, TILES: tl.constexpr
):
    """(BLOCK_N, 1) the value of the best order. Needs ``scratch`` (N, size) where TOP > BLOCK_K."""
    INNER: tl.constexpr = lists.first_ranks.shape[2]
    BLOCK_K: tl.constexpr = lists.first_ranks.shape[0] * INNER
    BITS: tl.constexpr = log2(BLOCK_K)
    INTEGER: tl.constexpr = tl.int64 if lists.zero.dtype.primitive_bitwidth == 64 else tl.int32
    if TOP == BLOCK_K and TILES == 1:
        x = in_tile_order(_sort(load_to_sort(lists, 0), BITS), INNER).to(lists.zero.dtype, bitcast=True)
        # The table has a value for every position of the tile.
        d = load_tile(lists, sorted_discounts_ptr, 0, 0, tl.zeros_like(lists.length) + BLOCK_K)  # (BLOCK_N, BLOCK_K)
        ideal = tl.sum(term_gains(x, terms, GAIN_KIND) * d, axis=1, keep_dims=True)
    elif TOP <= BLOCK_K:
        TOP_BITS: tl.constexpr = log2(TOP)
        best = tl.zeros([lists.row.shape[0], TOP], dtype=INTEGER)  # (BLOCK_N, TOP)
        for tile in range(TILES):
            x = _largest(load_to_sort(lists, tile), BITS, TOP_BITS)  # (BLOCK_N, TOP)
            if TILES > 1:
                x = _merge(tl.maximum(best, _mirror(x, TOP_BITS)), TOP_BITS)
            best = x
        ideal = _dcg(lists, best, 0, terms, GAIN_KIND)
    else:
        column = tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
        for tile in range(TILES):
            x = _sort(load_to_sort(lists, tile), BITS).to(lists.zero.dtype, bitcast=True)  # (BLOCK_N, BLOCK_K)
            _store_scratch(lists, scratch_ptr, tile * BLOCK_K + column, x)
        tl.debug_barrier()
        _merge_tiles(lists, scratch_ptr, log2(TILES), BITS, TILES)
        ideal = lists.zero
        for tile in range(TILES):
            x = _load_scratch(lists, scratch_ptr, tile * BLOCK_K + column).to(INTEGER, bitcast=True)
            ideal += _dcg(lists, _merge(x, BITS), tile * BLOCK_K, terms, GAIN_KIND)
        tl.debug_barrier()  # scratch is the caller's again
    return ideal


@triton.jit
def inverse_norm(
    lists,
    scratch_ptr,
    sorted_discounts_ptr,
    cutoff,
    terms,
    GAIN_KIND: tl.constexpr,
    NORMALISER: tl.constexpr,
    TOP: tl.constexpr,
    TILES: tl.constexpr,
):
    """(BLOCK_N, 1) 1 / normaliser of each list, 0 where that is 0, for sums of scaled term gains."""
    norm = lists.zero + 1.0
    if NORMALISER == IDEAL:
        norm = _ideal(lists, scratch_ptr, sorted_discounts_ptr, terms, GAIN_KIND, TOP, TILES)
    elif NORMALISER == RELEVANT:
        norm = lists.zero
        for tile in range(TILES):
            norm += tl.sum(term_gains(gains_of(lists, tile), terms, GAIN_KIND), axis=1, keep_dims=True)
    elif NORMALISER == CUTOFF:
        if cutoff > 0:
            norm = norm * cutoff
        else:
            norm = norm * lists.length.to(norm.dtype)
    inverse = tl.where(norm > 0.0, 1.0 / tl.where(norm > 0.0, norm, 1.0), 0.0)
    if NORMALISER != IDEAL and NORMALISER != RELEVANT:  # which are scaled themselves
        inverse = inverse * terms.unscale
    return inverse
