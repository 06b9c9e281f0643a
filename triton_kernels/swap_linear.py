"""Triton kernel of the metrics that are linear in the term gain: dcg, ndcg, recall, precision, rbp; with variance.

Derivation. R = sum d_k w_k / Z (d the discount, w the term gain, Z the normaliser), so S[k, j] = (d_k - d_j)(w_k - w_j)
/ Z feels no constant added to w or to d. With x the term gain less that of the list's last rank, e the discount less
that of the last rank shown, and sums over the pool and k itself, m items (j >= k for causal swaps, all j for non-causal
ones; j = k adds 0),

    r_k = [ e_k (m x_k - sum x_j) - (x_k sum e_j - sum e_j x_j) ] / ((m - 1) Z).

Centring is what lets float32 serve: gains of 1e4 + noise would leave three digits of the noise in the sums, and the
discounts of a list's end differ by little. The centres are the list's own values, so that ties give exactly 0, and
binary gains with equal discounts exact sums. The scans run from the end of the list, so that their error at rank k is
relative to what lies behind k and is divided by m - 1 with it.

Variance, for independent variances v_k of the term gains and Z held fixed (exact; first order where the term gain is
2^g - 1, whose v is that of the gain times its squared slope): r_k has the weight mean_j (d_k - d_j) on w_k and
-(d_k - d_j) / (m - 1) on w_j, hence

    Var[r_k] = [ (m e_k - sum e_j)^2 v_k + e_k^2 sum v_j - 2 e_k sum e_j v_j + sum e_j^2 v_j ] / ((m - 1) Z)^2.

Both are sums of e_k - e_j and its square that have been multiplied out, and what they lose of their digits grows with
e_k, which is of use at shown ranks alone: hence the last of these is the centre. Where all shown ranks weigh the same
(recall, precision) it makes e_k 0 there, and what is left is a sum over what is not shown; centred at the discount of
what is not shown, 0, it would be a difference of sums over the whole list.

Where all lists have one length and no variance is asked for, e, its sums and 1 / (m - 1) of causal swaps are a table,
made in float64 (and e centred at the list's last rank).

Bytes per gain: its own size read, 4 written (float64: 8); 8 more with variance. For each list 8 for ``lengths`` and
for ``num_ranked`` where given. A second look at a list (largest gain, normaliser, totals) comes from the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flexrec.triton_kernels.lists import (
    INDEPENDENT,
    NONCAUSAL,
    RANK,
    SEQUENCE,
    SWAP,
    discounts_of,
    gains_of,
    is_one_of,
    load_item,
    load_tile,
    ranks_of,
    store_tile,
    term_gains,
    term_variances,
    terms_of,
)
from flexrec.triton_kernels.scans import sums_behind, two_sums_behind
from flexrec.triton_kernels.sort import inverse_norm


class Tile(NamedTuple):
    """Of a tile, (BLOCK_N, BLOCK_K) each: x and e as derived above, and the variance of the term gains (or 0)."""

    x: Any
    e: Any
    v: Any


class Sums(NamedTuple):
    """Sums of x, e, e x, v, e v and e^2 v over some items of each list."""

    x: Any
    e: Any
    ex: Any
    v: Any
    ev: Any
    eev: Any


@triton.jit
def _load(lists, variance_ptr, variance_stride, table_ptr, tile, terms, last_w, last_d, GAIN_KIND: tl.constexpr):
    """The ``Tile``; ``last_w`` and ``last_d`` (BLOCK_N, 1) are the centres of x and e, whose centre is in ``table``."""
    inside = ranks_of(lists, tile) < lists.length  # (BLOCK_N or 1, BLOCK_K)
    gains = gains_of(lists, tile)
    x = tl.where(inside, term_gains(gains, terms, GAIN_KIND) - last_w, 0.0)
    if table_ptr is None:
        d = discounts_of(lists, tile)
    else:
        d = load_tile(lists, table_ptr, 0, tile, lists.length)
    e = tl.where(inside, d - last_d, 0.0)
    v = tl.zeros_like(gains)
    if variance_ptr is not None:
        v = load_tile(lists, variance_ptr, variance_stride, tile, lists.length)
        v = term_variances(v, gains, terms, GAIN_KIND)
    return Tile(x, e, v)


@triton.jit
def _with(sums, tile):
    """``Sums`` (BLOCK_N, 1) with those of a tile added."""
    x, e, v = tile.x, tile.e, tile.v
    return Sums(
        sums.x + tl.sum(x, axis=1, keep_dims=True),
        sums.e + tl.sum(e, axis=1, keep_dims=True),
        sums.ex + tl.sum(e * x, axis=1, keep_dims=True),
        sums.v + tl.sum(v, axis=1, keep_dims=True),
        sums.ev + tl.sum(e * v, axis=1, keep_dims=True),
        sums.eev + tl.sum(e * e * v, axis=1, keep_dims=True),
    )


@triton.jit
def _two_sums(a, b, total_a, total_b, CREDIT: tl.constexpr):
    """Sums over the pool and the item itself; the totals are those of the list, or of the tiles behind this one."""
    if is_one_of(CREDIT, SWAP, RANK):
        behind_a, behind_b = two_sums_behind(a, b)
        total_a, total_b = a + behind_a + total_a, b + behind_b + total_b  # (BLOCK_N, BLOCK_K)
    return total_a, total_b


@triton.jit
def swap_linear(
    lists,
    rewards_ptr,  # (N, K)
    sorted_discounts_ptr,  # (BLOCK_K,) or None, if the normaliser is IDEAL
    cutoff,  # 0: none
    table_ptr,  # (3, K) or None: e, its sums and 1 / (m - 1), where all lists have the same and no variance
    variance_ptr,  # (N, K) or None
    spread_ptr,  # (N, K) or None, variance of the rewards
    variance_stride,
    CREDIT: tl.constexpr,
    GAIN_KIND: tl.constexpr,
    NORMALISER: tl.constexpr,
    TOP: tl.constexpr,
    TILES: tl.constexpr,
):
    """Rewards of the lists of a program, and their variance where that of the gains is given."""
    zero, length = lists.zero, lists.length
    terms = terms_of(lists, GAIN_KIND, 0.0, True, TILES)
    inverse = inverse_norm(lists, rewards_ptr, sorted_discounts_ptr, cutoff, terms, GAIN_KIND, NORMALISER, TOP, TILES)

    last_w, last_d = zero, zero
    if is_one_of(CREDIT, SWAP, NONCAUSAL):
        last_w = term_gains(load_item(lists, lists.gains_ptr, lists.stride, length - 1, length), terms, GAIN_KIND)
        if table_ptr is None:
            last_d = load_item(lists, lists.discounts_ptr, 0, lists.shown - 1, lists.shown)

    sums = Sums(zero, zero, zero, zero, zero, zero)
    if is_one_of(CREDIT, NONCAUSAL, SEQUENCE):  # the pool is the list: its totals first
        for tile in range(TILES):
            found = _load(lists, variance_ptr, variance_stride, table_ptr, tile, terms, last_w, last_d, GAIN_KIND)
            sums = _with(sums, found)

    for i in range(TILES):
        tile = TILES - 1 - i
        k = ranks_of(lists, tile)
        found = _load(lists, variance_ptr, variance_stride, table_ptr, tile, terms, last_w, last_d, GAIN_KIND)
        x, e, v = found.x, found.e, found.v
        is_ranked = k < lists.shown  # (BLOCK_N or 1, BLOCK_K)
        pool_x, pool_ex = _two_sums(x, e * x, sums.x, sums.ex, CREDIT)  # (BLOCK_N, BLOCK_K or 1), as all of the pool
        pool_e, pool_eev, pool_v, pool_ev = sums.e, sums.eev, sums.v, sums.ev
        if variance_ptr is not None:
            pool_v, pool_ev = _two_sums(v, e * v, sums.v, sums.ev, CREDIT)
            pool_e, pool_eev = _two_sums(e, e * e * v, sums.e, sums.eev, CREDIT)
        elif table_ptr is None and is_one_of(CREDIT, SWAP, RANK):
            pool_e = e + sums_behind(e) + sums.e
        if is_one_of(CREDIT, SWAP, NONCAUSAL):
            if CREDIT == SWAP:
                m = length - k  # (BLOCK_N or 1, BLOCK_K)
            else:
                m = length + tl.zeros_like(k)
            if table_ptr is not None:
                pool_e = load_tile(lists, table_ptr + lists.size, 0, tile, length)
                share = load_tile(lists, table_ptr + 2 * lists.size, 0, tile, length)
            else:
                share = 1.0 / tl.maximum(m - 1, 1).to(zero.dtype)
            m = m.to(zero.dtype)
            rewards = e * (m * x - pool_x) - (x * pool_e - pool_ex)
            rewards = rewards * share
        elif CREDIT == INDEPENDENT:
            rewards = e * x
        else:
            rewards = pool_ex + tl.zeros_like(x)
        rewards = tl.where(is_ranked, rewards * inverse, 0.0)
        store_tile(lists, rewards_ptr, rewards, tile)
        if variance_ptr is not None:
            if is_one_of(CREDIT, SWAP, NONCAUSAL):
                own = m * e - pool_e
                others = (e * e * pool_v - 2.0 * e * pool_ev) + pool_eev  # >= 0 but for rounding
                spread = (own * own * v + tl.maximum(others, 0.0)) * (share * share)
            elif CREDIT == INDEPENDENT:
                spread = e * e * v
            else:
                spread = pool_eev + tl.zeros_like(x)
            spread = tl.where(is_ranked, spread * inverse * inverse, 0.0)
            store_tile(lists, spread_ptr, spread, tile)
        if TILES > 1 and is_one_of(CREDIT, SWAP, RANK):  # carried to the tile before
            sums = _with(sums, found)
