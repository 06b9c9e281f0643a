"""Triton kernel of the metrics that are linear in the term gain: dcg, ndcg, recall, precision, rbp; with variance.

Derivation. R = sum d_k w_k / Z (d the discount, w the term gain, Z the normaliser), so S[k, j] = (d_k - d_j)(w_k - w_j)
/ Z feels no constant added to w or to d. With x and e the two less their value at the list's last rank, and sums over
the pool and k itself, m items (j >= k for causal swaps, all j for non-causal ones; j = k adds 0),

    r_k = [ e_k (m x_k - sum x_j) - (x_k sum e_j - sum e_j x_j) ] / ((m - 1) Z).

Centring is what lets float32 serve: gains of 1e4 + noise would leave three digits of the noise in the sums, and the
discounts of a list's end differ by little. The centre is one of the list's own values, so that ties give exactly 0, and
binary gains with equal discounts exact sums. The scans run from the end of the list, so that their error at rank k is
relative to what lies behind k and is divided by m - 1 with it.

Variance, for independent variances v_k of the term gains and Z held fixed (exact; first order where the term gain is
2^g - 1, whose v is that of the gain times its squared slope): r_k has the weight mean_j (d_k - d_j) on w_k and
-(d_k - d_j) / (m - 1) on w_j, hence

    Var[r_k] = [ (m e_k - sum e_j)^2 v_k + e_k^2 sum v_j - 2 e_k sum e_j v_j + sum e_j^2 v_j ] / ((m - 1) Z)^2.

Where all lists have one length and no variance is asked for, e, its sums and 1 / (m - 1) of causal swaps are a table,
made in float64.

Bytes per gain: its own size read, 4 written (float64: 8); 8 more with variance. For each list 8 for ``lengths`` and
for ``num_ranked`` where given. A second look at a list (largest gain, normaliser, totals) comes from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flexrec.triton_kernels.swap_lists import (
    BURGES,
    INDEPENDENT,
    NONCAUSAL,
    RANK,
    SCALED,
    SEQUENCE,
    SWAP,
    is_one_of,
    largest_gain,
    list_bounds,
    load_item,
    load_tile,
    store_tile,
    sums_behind,
    term_gains,
    term_slopes,
    two_sums_behind,
)
from flexrec.triton_kernels.swap_sort import inverse_norm


@triton.jit
def _linear_tile(
    gains_ptr,
    variance_ptr,
    e_ptr,
    row,
    gains_stride,
    variance_stride,
    tile,
    exists,
    length,
    e_length,
    top,
    last_w,
    last_d,
    GAIN_KIND: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INNER: tl.constexpr,
):
    """Term gains less ``last_w``, e, and variances of the term gains (or 0).

    e are the first ``e_length`` values at ``e_ptr``, and 0 further on, less ``last_d``.
    """
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
    gains = load_tile(gains_ptr, row, gains_stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)
    x = tl.where(k < length, term_gains(gains, top, GAIN_KIND) - last_w, 0.0)  # (BLOCK_N, BLOCK_K)
    d = load_tile(e_ptr, row, 0, tile, exists, e_length, ACCUMULATOR, BLOCK_K, INNER)  # (BLOCK_N, BLOCK_K)
    e = tl.where(k < length, d - last_d, 0.0)  # (BLOCK_N, BLOCK_K)
    v = tl.zeros_like(gains)  # (BLOCK_N, BLOCK_K)
    if variance_ptr is not None:
        v = load_tile(variance_ptr, row, variance_stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)
        if is_one_of(GAIN_KIND, BURGES, SCALED):
            slope = term_slopes(gains, top, GAIN_KIND)  # (BLOCK_N, BLOCK_K)
            v = v * slope * slope  # (BLOCK_N, BLOCK_K)
    return x, e, v


@triton.jit
def _totals(x, e, v):
    """Sums over a tile, (BLOCK_N or 1, 1) each, of all that rewards and their variance need."""
    return (
        tl.sum(x, axis=1, keep_dims=True),
        tl.sum(e, axis=1, keep_dims=True),
        tl.sum(e * x, axis=1, keep_dims=True),
        tl.sum(v, axis=1, keep_dims=True),
        tl.sum(e * v, axis=1, keep_dims=True),
        tl.sum(e * e * v, axis=1, keep_dims=True),
    )


@triton.jit
def _sums(x, total, CREDIT: tl.constexpr):
    """Sum over the pool and the item itself: ``total`` is that of the list, or of the tiles behind this one."""
    if is_one_of(CREDIT, SWAP, RANK):
        total = x + sums_behind(x) + total  # (BLOCK_N, BLOCK_K)
    return total


@triton.jit
def _two_sums(a, b, total_a, total_b, CREDIT: tl.constexpr):
    """``_sums`` of two at once."""
    if is_one_of(CREDIT, SWAP, RANK):
        behind_a, behind_b = two_sums_behind(a, b)  # (BLOCK_N, BLOCK_K)
        total_a, total_b = a + behind_a + total_a, b + behind_b + total_b  # (BLOCK_N, BLOCK_K)
    return total_a, total_b


@triton.jit
def swap_linear_kernel(
    gains_ptr,  # (N, K)
    rewards_ptr,  # (N, K)
    discounts_ptr,  # (K,)
    lengths_ptr,  # (N,) int64 or None
    num_ranked_ptr,  # (N,) int64 or None
    rows,
    size,
    gains_stride,  # between rows, in elements
    max_ranked,
    sorted_discounts_ptr,  # (BLOCK_K,) or None, if the normaliser is IDEAL
    table_ptr,  # (3, K) or None: e, its sums and 1 / (m - 1), where all lists have the same and no variance
    variance_ptr,  # (N, K) or None
    spread_ptr,  # (N, K) or None, variance of the rewards
    variance_stride,
    cutoff,  # 0: none
    CREDIT: tl.constexpr,
    GAIN_KIND: tl.constexpr,
    NORMALISER: tl.constexpr,
    TOP: tl.constexpr,
    QUADS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INNER: tl.constexpr,
    TILES: tl.constexpr,
):
    if QUADS:  # tells the compiler that rows are a multiple of four long, hence 16-byte accesses
        size, gains_stride, variance_stride = size // 4 * 4, gains_stride // 4 * 4, variance_stride // 4 * 4
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # (BLOCK_N, 1)
    exists = row < rows  # (BLOCK_N, 1)
    length, shown = list_bounds(lengths_ptr, num_ranked_ptr, row, exists, size, max_ranked)  # (BLOCK_N or 1, 1)
    top = tl.zeros([BLOCK_N, 1], dtype=ACCUMULATOR)  # (BLOCK_N, 1)
    if GAIN_KIND == SCALED:
        top = largest_gain(gains_ptr, row, gains_stride, exists, length, ACCUMULATOR, BLOCK_K, INNER, TILES)
    inverse = inverse_norm(
        gains_ptr,
        rewards_ptr,
        discounts_ptr,
        sorted_discounts_ptr,
        row,
        gains_stride,
        exists,
        length,
        size,
        cutoff,
        top,
        GAIN_KIND,
        NORMALISER,
        TOP,
        ACCUMULATOR,
        BLOCK_K,
        INNER,
        TILES,
    )  # (BLOCK_N, 1)

    last_w = tl.zeros([BLOCK_N, 1], dtype=ACCUMULATOR)  # (BLOCK_N, 1)
    last_d = tl.zeros([BLOCK_N, 1], dtype=ACCUMULATOR)  # (BLOCK_N, 1)
    if is_one_of(CREDIT, SWAP, NONCAUSAL):
        last = load_item(gains_ptr, row, gains_stride, length - 1, exists, length, ACCUMULATOR)  # (BLOCK_N, 1)
        last_w = term_gains(last, top, GAIN_KIND)  # (BLOCK_N, 1)
        if table_ptr is None:
            last_d = load_item(discounts_ptr, row, 0, length - 1, exists, shown, ACCUMULATOR)  # (BLOCK_N, 1)
    e_ptr, e_length = discounts_ptr, shown
    if table_ptr is not None:
        e_ptr, e_length = table_ptr, length

    zero = tl.zeros([BLOCK_N, 1], dtype=ACCUMULATOR)  # (BLOCK_N, 1)
    sum_x, sum_e, sum_ex, sum_v, sum_ev, sum_eev = zero, zero, zero, zero, zero, zero  # (BLOCK_N, 1)
    if is_one_of(CREDIT, NONCAUSAL, SEQUENCE):  # the pool is the list: its totals first
        for tile in range(TILES):
            x, e, v = _linear_tile(
                gains_ptr,
                variance_ptr,
                e_ptr,
                row,
                gains_stride,
                variance_stride,
                tile,
                exists,
                length,
                e_length,
                top,
                last_w,
                last_d,
                GAIN_KIND,
                ACCUMULATOR,
                BLOCK_K,
                INNER,
            )  # (BLOCK_N, BLOCK_K)
            t_x, t_e, t_ex, t_v, t_ev, t_eev = _totals(x, e, v)  # (BLOCK_N or 1, 1)
            sum_x, sum_e, sum_ex = sum_x + t_x, sum_e + t_e, sum_ex + t_ex  # (BLOCK_N or 1, 1)
            sum_v, sum_ev, sum_eev = sum_v + t_v, sum_ev + t_ev, sum_eev + t_eev  # (BLOCK_N, 1)

    for i in range(TILES):
        tile = TILES - 1 - i
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
        x, e, v = _linear_tile(
            gains_ptr,
            variance_ptr,
            e_ptr,
            row,
            gains_stride,
            variance_stride,
            tile,
            exists,
            length,
            e_length,
            top,
            last_w,
            last_d,
            GAIN_KIND,
            ACCUMULATOR,
            BLOCK_K,
            INNER,
        )  # (BLOCK_N, BLOCK_K)
        is_ranked = k < shown  # (BLOCK_N or 1, BLOCK_K)
        pool_x, pool_ex = _two_sums(x, e * x, sum_x, sum_ex, CREDIT)  # (BLOCK_N, BLOCK_K or 1)
        pool_e, pool_eev, pool_v, pool_ev = sum_e, sum_eev, sum_v, sum_ev  # (BLOCK_N, 1)
        if variance_ptr is not None:
            pool_v, pool_ev = _two_sums(v, e * v, sum_v, sum_ev, CREDIT)  # (BLOCK_N, BLOCK_K or 1)
            pool_e, pool_eev = _two_sums(e, e * e * v, sum_e, sum_eev, CREDIT)  # (BLOCK_N, BLOCK_K or 1)
        elif table_ptr is None:
            pool_e = _sums(e, sum_e, CREDIT)  # (BLOCK_N, BLOCK_K or 1)
        if is_one_of(CREDIT, SWAP, NONCAUSAL):
            if CREDIT == SWAP:
                m = length - k  # (BLOCK_N or 1, BLOCK_K)
            else:
                m = length + tl.zeros_like(k)  # (BLOCK_N or 1, BLOCK_K)
            if table_ptr is not None:
                pool_e = load_tile(table_ptr + size, row, 0, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)
                share = load_tile(table_ptr + 2 * size, row, 0, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)
            else:
                share = 1.0 / tl.maximum(m - 1, 1).to(ACCUMULATOR)  # (BLOCK_N or 1, BLOCK_K)
            m = m.to(ACCUMULATOR)  # (BLOCK_N or 1, BLOCK_K)
            rewards = e * (m * x - pool_x) - (x * pool_e - pool_ex)  # (BLOCK_N, BLOCK_K)
            rewards = rewards * share  # (BLOCK_N, BLOCK_K)
        elif CREDIT == INDEPENDENT:
            rewards = e * x  # (BLOCK_N, BLOCK_K)
        else:
            rewards = pool_ex + tl.zeros_like(x)  # (BLOCK_N, BLOCK_K)
        rewards = tl.where(is_ranked, rewards * inverse, 0.0)  # (BLOCK_N, BLOCK_K)
        store_tile(rewards_ptr, rewards, row, size, tile, exists, BLOCK_K, INNER)
        if variance_ptr is not None:
            if is_one_of(CREDIT, SWAP, NONCAUSAL):
                own = m * e - pool_e  # (BLOCK_N or 1, BLOCK_K)
                others = (e * e * pool_v - 2.0 * e * pool_ev) + pool_eev  # (BLOCK_N, BLOCK_K), >= 0 but for rounding
                spread = (own * own * v + tl.maximum(others, 0.0)) * (share * share)  # (BLOCK_N, BLOCK_K)
            elif CREDIT == INDEPENDENT:
                spread = e * e * v  # (BLOCK_N, BLOCK_K)
            else:
                spread = pool_eev + tl.zeros_like(x)  # (BLOCK_N, BLOCK_K)
            spread = tl.where(is_ranked, spread * (inverse * inverse), 0.0)  # (BLOCK_N, BLOCK_K)
            store_tile(spread_ptr, spread, row, size, tile, exists, BLOCK_K, INNER)
        if TILES > 1 and is_one_of(CREDIT, SWAP, RANK):  # carried to the tile before
            t_x, t_e, t_ex, t_v, t_ev, t_eev = _totals(x, e, v)  # (BLOCK_N or 1, 1)
            sum_x, sum_e, sum_ex = sum_x + t_x, sum_e + t_e, sum_ex + t_ex  # (BLOCK_N or 1, 1)
            sum_v, sum_ev, sum_eev = sum_v + t_v, sum_ev + t_ev, sum_eev + t_eev  # (BLOCK_N, 1)
