"""Triton kernel of err: the user stops at rank k with probability theta_k, having got there with probability P_k.

The closed forms are derived in ``flexrec/ops/swap_reference.py``. With d_k = 1/k, theta = (2^g - 1) / 2^g_max,
x = theta - theta_1 (differences feel no constant, so ties give exactly 0) and n items behind rank k

    causal sum = P_k B_k,  B_k = d_k (n x_k - sum x_j) - x_k Gamma^1_k + Gamma^x_k,    sum over j > k,
    Gamma^y_{k-1} = (1 - theta_k) Gamma^y_k + d_k (y_k + theta_k sum over j > k of y_j),      y = 1 and y = x,
    non-causal sum = P_k B_k + L^x_k - x_k L^1_k,
    L^y_k = sum over j < k of (P_j y_j d_j - C^y_j d_j theta_j) - C^y_k d_k,
    C^y_{k+1} = (1 - theta_k) C^y_k + P_k y_k.

What R is worth from rank k on to a user who gets there, V_k = d_k theta_k + (1 - theta_k) V_{k+1}, gives the rest:
P_k d_k theta_k (independent), P_k V_k (rank), V_1 (sequence).

All recurrences are chains of maps t -> m t + a, which are composed in pairs, fours, eights ..: nothing is ever divided
by a product of (1 - theta), which underflows.

B runs from the end of the list, P and C from its beginning. Lists of several tiles keep B in ``rewards`` in between.

Bytes per gain: its own size read, 4 written (float64: 8); in several tiles B is written and read besides, and the list
read once more, from the cache as a rule.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flexrec.triton_kernels.lists import (
    NONCAUSAL,
    RANK,
    SCALED,
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
    terms_of,
)
from flexrec.triton_kernels.scans import Maps, compose, products_before, sums_behind, sums_beyond


class Tile(NamedTuple):
    """Of a tile: theta, x and d as derived above, (BLOCK_N, BLOCK_K) each, and the ranks k (1, BLOCK_K)."""

    theta: Any
    x: Any
    d: Any
    k: Any


class Later(NamedTuple):
    """Gamma^1 (or V in its place), Gamma^x, and the sum of x behind a tile, (BLOCK_N, 1) each."""

    gamma_1: Any
    gamma_x: Any
    x: Any


class Earlier(NamedTuple):
    """P, C^1, C^x, and the sums that L^1 and L^x have got before a tile, (BLOCK_N, 1) each."""

    reach: Any
    c_1: Any
    c_x: Any
    lost_1: Any
    lost_x: Any


@triton.jit
def _load(lists, tile, terms, first):
    """The ``Tile``; ``first`` (BLOCK_N, 1) is theta at the first rank."""
    k = ranks_of(lists, tile)
    inside = k < lists.length
    theta = tl.where(inside, term_gains(gains_of(lists, tile), terms, SCALED), 0.0)
    return Tile(theta, tl.where(inside, theta - first, 0.0), discounts_of(lists, tile), k)


@triton.jit
def _behind(lists, found, later, CREDIT: tl.constexpr):
    """B (or V, or the terms) of a tile (BLOCK_N, BLOCK_K), and what is ``Later`` to the tile before."""
    theta, x, d = found.theta, found.x, found.d
    n = tl.maximum(lists.length - 1 - found.k, 0).to(theta.dtype)  # (BLOCK_N or 1, BLOCK_K)
    m = 1.0 - theta
    gamma_1, gamma_x = later.gamma_1, later.gamma_x
    if is_one_of(CREDIT, SWAP, NONCAUSAL):
        x_behind = sums_behind(x) + later.x
        inside = found.k < lists.length
        a = tl.where(inside, d * (1.0 + theta * n), 0.0)
        b = tl.where(inside, d * (x + theta * x_behind), 0.0)
        chain, row = compose(Maps(m, a, b), True)
        behind = d * (n * x - x_behind)
        behind -= x * (chain.m * gamma_1 + chain.a) - (chain.m * gamma_x + chain.b)
        if CREDIT == SWAP:
            behind = behind / tl.maximum(n, 1.0)
        gamma_1, gamma_x = row.m * gamma_1 + row.a, row.m * gamma_x + row.b
    else:
        behind = d * theta
        if is_one_of(CREDIT, RANK, SEQUENCE):
            chain, row = compose(Maps(m, behind, behind), True)
            behind += m * (chain.m * gamma_1 + chain.a)
            gamma_1 = row.m * gamma_1 + row.a
    return behind, Later(gamma_1, gamma_x, later.x + tl.sum(x, axis=1, keep_dims=True))


@triton.jit
def _before(found, earlier, CREDIT: tl.constexpr):
    """P and the sum over j < k (0 unless non-causal) of a tile (BLOCK_N, BLOCK_K), and the next one's ``Earlier``."""
    theta, x, d = found.theta, found.x, found.d
    before, row_product = products_before(1.0 - theta)
    p = before * earlier.reach
    total = tl.zeros_like(p)
    c_1, c_x, lost_1, lost_x = earlier.c_1, earlier.c_x, earlier.lost_1, earlier.lost_x
    if CREDIT == NONCAUSAL:
        chain, row = compose(Maps(1.0 - theta, p, p * x), False)
        here_1, here_x = chain.m * c_1 + chain.a, chain.m * c_x + chain.b  # C
        c_1, c_x = row.m * c_1 + row.a, row.m * c_x + row.b
        added_1 = d * (p - here_1 * theta)  # to L^1 and L^x
        added_x = d * (p * x - here_x * theta)
        l_1 = sums_beyond(added_1, False) + lost_1 - here_1 * d
        l_x = sums_beyond(added_x, False) + lost_x - here_x * d
        total = l_x - x * l_1
        lost_1 += tl.sum(added_1, axis=1, keep_dims=True)
        lost_x += tl.sum(added_x, axis=1, keep_dims=True)
    return p, total, Earlier(earlier.reach * row_product, c_1, c_x, lost_1, lost_x)


@triton.jit
def swap_cascade(lists, rewards_ptr, CREDIT: tl.constexpr, MAX_GAIN: tl.constexpr, TILES: tl.constexpr):
    """Rewards of the lists of a program; MAX_GAIN 0: the list's own."""
    zero = lists.zero
    terms = terms_of(lists, SCALED, MAX_GAIN, False, TILES)
    start = tl.zeros(lists.row.shape, dtype=tl.int32)
    first = term_gains(load_item(lists, lists.gains_ptr, lists.stride, start, lists.length), terms, SCALED)

    later = Later(zero, zero, zero)
    if TILES > 1:
        for i in range(TILES):
            tile = TILES - 1 - i
            behind, later = _behind(lists, _load(lists, tile, terms, first), later, CREDIT)
            store_tile(lists, rewards_ptr, behind, tile)
        tl.debug_barrier()

    earlier = Earlier(zero + 1.0, zero, zero, zero, zero)
    for tile in range(TILES):
        found = _load(lists, tile, terms, first)
        if TILES > 1:
            behind = load_tile(lists, rewards_ptr, lists.size, tile, lists.length)
        else:
            behind, later = _behind(lists, found, later, CREDIT)
        if CREDIT == SEQUENCE:
            rewards = later.gamma_1 + tl.zeros_like(found.x)  # V at the first rank
        else:
            p, total, earlier = _before(found, earlier, CREDIT)
            rewards = p * behind + total
            if CREDIT == NONCAUSAL:
                rewards = rewards / tl.maximum(lists.length - 1, 1).to(zero.dtype)
        rewards = tl.where(found.k < lists.shown, rewards, 0.0)
        store_tile(lists, rewards_ptr, rewards, tile)
