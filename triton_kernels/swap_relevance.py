"""Triton kernels of the metrics that ask for the first relevant item (mrr, hit_rate) or for all of them (map).

The closed forms are derived in ``flexrec/ops/swap_rewards_torch.py``. As computed here, with w in {0, 1}:

First relevant item at rank f, the second at s, C relevant items, d the discount (d_s = 0 without a second):

    causal sum:      C (d_f - d_k) before f;   at f the sum of d_f - max(d_j, d_s) over irrelevant j > f;   0 behind.
    non-causal sum:  the same, and A = sum over j < f of d_f - d_j at every relevant rank,
                     d_f - max(d_k, d_s) at irrelevant ranks behind f.

Average precision: S = E_k - E_j where a relevant item stands before an irrelevant one, F_j - F_k the other way round;
E_i = d_i c_i - H_i and F_i = E_i + d_i with c_i and H_i the sums of w and d w up to rank i. Differences feel no
constant, so E_i is taken as d_i c_i + (sum of d w behind i): from the end of the list, as everything else here, and
small where few items remain. c_i = C - (relevant items behind i) is exact.

Bytes per gain: its own size read, 4 written (float64: 8). Each further look at a list comes from the cache: two for
the first relevant item, one for average precision (two for non-causal and sequence credit).
"""

from __future__ import annotations

import triton
import triton.language as tl
from flexrec.triton_kernels.swap_lists import (
    INDEPENDENT,
    NONCAUSAL,
    RANK,
    SEQUENCE,
    SWAP,
    is_one_of,
    list_bounds,
    load_item,
    load_tile,
    store_tile,
    sums_behind,
    two_sums_behind,
)


@triton.jit
def _relevant(
    gains_ptr, row, stride, tile, exists, length, ACCUMULATOR: tl.constexpr, BLOCK_K: tl.constexpr, INNER: tl.constexpr
):
    """(BLOCK_N, BLOCK_K) 1 at relevant ranks of a tile, else 0."""
    gains = load_tile(gains_ptr, row, stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)  # (BLOCK_N, BLOCK_K)
    return tl.where(gains > 0.0, 1.0, 0.0).to(ACCUMULATOR)  # (BLOCK_N, BLOCK_K)


@triton.jit
def swap_first_kernel(
    gains_ptr,  # (N, K)
    rewards_ptr,  # (N, K)
    discounts_ptr,  # (K,)
    lengths_ptr,  # (N,) int64 or None
    num_ranked_ptr,  # (N,) int64 or None
    rows,
    size,
    gains_stride,  # between rows, in elements
    max_ranked,
    CREDIT: tl.constexpr,
    QUADS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INNER: tl.constexpr,
    TILES: tl.constexpr,
):
    if QUADS:  # tells the compiler that rows are a multiple of four long, hence 16-byte accesses
        size, gains_stride = size // 4 * 4, gains_stride // 4 * 4
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # (BLOCK_N, 1)
    exists = row < rows  # (BLOCK_N, 1)
    length, shown = list_bounds(lengths_ptr, num_ranked_ptr, row, exists, size, max_ranked)  # (BLOCK_N or 1, 1)

    none = TILES * BLOCK_K  # the rank of an item that is not there
    first = tl.full([BLOCK_N, 1], none, tl.int32)  # (BLOCK_N, 1)
    second = tl.full([BLOCK_N, 1], none, tl.int32)  # (BLOCK_N, 1)
    count = tl.zeros([BLOCK_N, 1], dtype=ACCUMULATOR)  # (BLOCK_N, 1)
    for tile in range(TILES):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
        w = _relevant(gains_ptr, row, gains_stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)
        place = tl.where(w > 0.0, k, none)  # (BLOCK_N, BLOCK_K)
        tile_first = tl.min(place, axis=1, keep_dims=True)  # (BLOCK_N, 1)
        tile_second = tl.min(tl.where(place > tile_first, place, none), axis=1, keep_dims=True)  # (BLOCK_N, 1)
        second = tl.minimum(tl.minimum(second, tile_second), tl.maximum(first, tile_first))  # (BLOCK_N, 1)
        first = tl.minimum(first, tile_first)  # (BLOCK_N, 1)
        count += tl.sum(w, axis=1, keep_dims=True)  # (BLOCK_N, 1)
    d_first = load_item(discounts_ptr, row, 0, first, exists, shown, ACCUMULATOR)  # (BLOCK_N, 1)
    d_second = load_item(discounts_ptr, row, 0, second, exists, shown, ACCUMULATOR)  # (BLOCK_N, 1)

    rises = tl.zeros([BLOCK_N, 1], dtype=ACCUMULATOR)  # (BLOCK_N, 1), sum over ranks before the first relevant one
    falls = tl.zeros([BLOCK_N, 1], dtype=ACCUMULATOR)  # (BLOCK_N, 1), sum over irrelevant ranks behind it
    if is_one_of(CREDIT, SWAP, NONCAUSAL):
        for tile in range(TILES):
            k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
            w = _relevant(gains_ptr, row, gains_stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)
            d = load_tile(discounts_ptr, row, 0, tile, exists, shown, ACCUMULATOR, BLOCK_K, INNER)  # (BLOCK_N, BLOCK_K)
            rise = tl.where(k < first, d_first - d, 0.0)  # (BLOCK_N, BLOCK_K)
            is_fall = (k > first) & (k < length) & (w == 0.0)  # (BLOCK_N, BLOCK_K)
            fall = tl.where(is_fall, d_first - tl.maximum(d, d_second), 0.0)  # (BLOCK_N, BLOCK_K)
            rises += tl.sum(rise, axis=1, keep_dims=True)  # (BLOCK_N, 1)
            falls += tl.sum(fall, axis=1, keep_dims=True)  # (BLOCK_N, 1)

    for tile in range(TILES):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
        if is_one_of(CREDIT, SWAP, NONCAUSAL):
            d = load_tile(discounts_ptr, row, 0, tile, exists, shown, ACCUMULATOR, BLOCK_K, INNER)  # (BLOCK_N, BLOCK_K)
            rewards = tl.where(k < first, count * (d_first - d), 0.0)  # (BLOCK_N, BLOCK_K)
            rewards = tl.where(k == first, falls, rewards)  # (BLOCK_N, BLOCK_K)
            others = length - 1 - k  # (BLOCK_N or 1, BLOCK_K)
            if CREDIT == NONCAUSAL:
                w = _relevant(gains_ptr, row, gains_stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)
                fall = tl.where(k > first, d_first - tl.maximum(d, d_second), 0.0)  # (BLOCK_N, BLOCK_K)
                rewards += tl.where(w > 0.0, rises, fall)  # (BLOCK_N, BLOCK_K)
                others = length - 1 + tl.zeros_like(k)  # (BLOCK_N or 1, BLOCK_K)
            rewards = rewards / tl.maximum(others, 1).to(ACCUMULATOR)  # (BLOCK_N, BLOCK_K)
        elif CREDIT == INDEPENDENT:
            rewards = tl.where(k == first, d_first, 0.0)  # (BLOCK_N, BLOCK_K)
        elif CREDIT == RANK:
            rewards = tl.where(k <= first, d_first, 0.0)  # (BLOCK_N, BLOCK_K)
        else:
            rewards = d_first + tl.zeros([1, BLOCK_K], dtype=ACCUMULATOR)  # (BLOCK_N, BLOCK_K)
        rewards = tl.where((k < shown) & (count > 0.0), rewards, 0.0)  # (BLOCK_N, BLOCK_K)
        store_tile(rewards_ptr, rewards, row, size, tile, exists, BLOCK_K, INNER)


@triton.jit
def _precision_tile(
    gains_ptr,
    discounts_ptr,
    row,
    stride,
    tile,
    exists,
    length,
    shown,
    count,
    ones_later,
    hits_later,
    ACCUMULATOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INNER: tl.constexpr,
):
    """w, d, c, E, and the relevant items behind each rank, (BLOCK_N, BLOCK_K) each.

    ``count`` (BLOCK_N, 1) are all relevant items; ``ones_later`` and ``hits_later`` (BLOCK_N, 1) the sums of w and d w
    over later tiles.
    """
    w = _relevant(gains_ptr, row, stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)  # (BLOCK_N, BLOCK_K)
    d = load_tile(discounts_ptr, row, 0, tile, exists, shown, ACCUMULATOR, BLOCK_K, INNER)  # (BLOCK_N, BLOCK_K)
    ones_behind, hits_behind = two_sums_behind(w, d * w)  # (BLOCK_N, BLOCK_K)
    ones = ones_behind + ones_later  # (BLOCK_N, BLOCK_K)
    c = count - ones  # (BLOCK_N, BLOCK_K)
    e = d * c + (hits_behind + hits_later)  # (BLOCK_N, BLOCK_K)
    return w, d, c, e, ones


@triton.jit
def swap_average_precision_kernel(
    gains_ptr,  # (N, K)
    rewards_ptr,  # (N, K)
    discounts_ptr,  # (K,)
    lengths_ptr,  # (N,) int64 or None
    num_ranked_ptr,  # (N,) int64 or None
    rows,
    size,
    gains_stride,  # between rows, in elements
    max_ranked,
    CREDIT: tl.constexpr,
    QUADS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INNER: tl.constexpr,
    TILES: tl.constexpr,
):
    if QUADS:  # tells the compiler that rows are a multiple of four long, hence 16-byte accesses
        size, gains_stride = size // 4 * 4, gains_stride // 4 * 4
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # (BLOCK_N, 1)
    exists = row < rows  # (BLOCK_N, 1)
    length, shown = list_bounds(lengths_ptr, num_ranked_ptr, row, exists, size, max_ranked)  # (BLOCK_N or 1, 1)
    zero = tl.zeros([BLOCK_N, 1], dtype=ACCUMULATOR)  # (BLOCK_N, 1)
    count = zero  # (BLOCK_N, 1)
    for tile in range(TILES):
        w = _relevant(gains_ptr, row, gains_stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)
        count += tl.sum(w, axis=1, keep_dims=True)  # (BLOCK_N, 1)
    inverse = 1.0 / tl.maximum(count, 1.0)  # (BLOCK_N, 1), of a list without relevant items all rewards are 0 anyhow

    ones_later, hits_later = zero, zero  # (BLOCK_N, 1), sums over the tiles behind
    sum_we, sum_f, value = zero, zero, zero  # (BLOCK_N, 1), totals: of E at relevant, of F at irrelevant ranks, and R
    if is_one_of(CREDIT, NONCAUSAL, SEQUENCE):
        for i in range(TILES):
            tile = TILES - 1 - i
            k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
            w, d, c, e, ones = _precision_tile(
                gains_ptr,
                discounts_ptr,
                row,
                gains_stride,
                tile,
                exists,
                length,
                shown,
                count,
                ones_later,
                hits_later,
                ACCUMULATOR,
                BLOCK_K,
                INNER,
            )  # (BLOCK_N, BLOCK_K)
            is_irrelevant = (k < length) & (w == 0.0)  # (BLOCK_N, BLOCK_K)
            sum_we += tl.sum(w * e, axis=1, keep_dims=True)  # (BLOCK_N, 1)
            sum_f += tl.sum(tl.where(is_irrelevant, e + d, 0.0), axis=1, keep_dims=True)  # (BLOCK_N, 1)
            value += tl.sum(w * d * c, axis=1, keep_dims=True)  # (BLOCK_N, 1)
            ones_later += tl.sum(w, axis=1, keep_dims=True)  # (BLOCK_N, 1)
            hits_later += tl.sum(d * w, axis=1, keep_dims=True)  # (BLOCK_N, 1)

    ones_later, hits_later = zero, zero  # (BLOCK_N, 1)
    e_later, f_later, terms_later = zero, zero, zero  # (BLOCK_N, 1): E at irrelevant, F at relevant ranks, terms
    for i in range(TILES):
        tile = TILES - 1 - i
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
        w, d, c, e, ones = _precision_tile(
            gains_ptr,
            discounts_ptr,
            row,
            gains_stride,
            tile,
            exists,
            length,
            shown,
            count,
            ones_later,
            hits_later,
            ACCUMULATOR,
            BLOCK_K,
            INNER,
        )  # (BLOCK_N, BLOCK_K)
        f = e + d  # (BLOCK_N, BLOCK_K)
        term = w * d * c  # (BLOCK_N, BLOCK_K)
        zero_e = tl.where((k < length) & (w == 0.0), e, 0.0)  # (BLOCK_N, BLOCK_K)
        one_f = w * f  # (BLOCK_N, BLOCK_K)
        if is_one_of(CREDIT, SWAP, NONCAUSAL):
            n = (length - 1 - k).to(ACCUMULATOR)  # (BLOCK_N or 1, BLOCK_K)
            e_behind, f_behind = two_sums_behind(zero_e, one_f)  # (BLOCK_N, BLOCK_K)
            back = (n - ones) * e - (e_behind + e_later)  # (BLOCK_N, BLOCK_K)
            forward = (f_behind + f_later) - ones * f  # (BLOCK_N, BLOCK_K)
            rewards = tl.where(w > 0.0, back, forward)  # (BLOCK_N, BLOCK_K)
            if CREDIT == NONCAUSAL:
                ones_before = c - w  # (BLOCK_N, BLOCK_K)
                zeros_before = k.to(ACCUMULATOR) - ones_before  # (BLOCK_N, BLOCK_K)
                zero_f = tl.where((k < length) & (w == 0.0), f, 0.0)  # (BLOCK_N, BLOCK_K)
                zero_f_behind, one_e_behind = two_sums_behind(zero_f, w * e)  # (BLOCK_N, BLOCK_K)
                f_before = sum_f - (zero_f_behind + zero_f)  # (BLOCK_N, BLOCK_K)
                e_before = sum_we - (one_e_behind + w * e)  # (BLOCK_N, BLOCK_K)
                rewards += tl.where(w > 0.0, zeros_before * f - f_before, e_before - ones_before * e)
                sum_f -= tl.sum(zero_f, axis=1, keep_dims=True)  # (BLOCK_N, 1)
                sum_we -= tl.sum(w * e, axis=1, keep_dims=True)  # (BLOCK_N, 1)
                n = (length - 1 + tl.zeros_like(k)).to(ACCUMULATOR)  # (BLOCK_N or 1, BLOCK_K)
            rewards = rewards / tl.maximum(n, 1.0)  # (BLOCK_N, BLOCK_K)
        elif CREDIT == INDEPENDENT:
            rewards = term  # (BLOCK_N, BLOCK_K)
        elif CREDIT == RANK:
            rewards = term + sums_behind(term) + terms_later  # (BLOCK_N, BLOCK_K)
        else:
            rewards = value + tl.zeros_like(w)  # (BLOCK_N, BLOCK_K)
        rewards = tl.where(k < shown, rewards * inverse, 0.0)  # (BLOCK_N, BLOCK_K)
        store_tile(rewards_ptr, rewards, row, size, tile, exists, BLOCK_K, INNER)
        if TILES > 1:  # carried to the tile before
            ones_later += tl.sum(w, axis=1, keep_dims=True)  # (BLOCK_N, 1)
            hits_later += tl.sum(d * w, axis=1, keep_dims=True)  # (BLOCK_N, 1)
            e_later += tl.sum(zero_e, axis=1, keep_dims=True)  # (BLOCK_N, 1)
            f_later += tl.sum(one_f, axis=1, keep_dims=True)  # (BLOCK_N, 1)
            terms_later += tl.sum(term, axis=1, keep_dims=True)  # (BLOCK_N, 1)
