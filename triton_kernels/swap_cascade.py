"""Triton kernel of err: the user stops at rank k with probability theta_k, having got there with probability P_k.

The closed forms are derived in ``flexrec/ops/swap_rewards_torch.py``. With d_k = 1/k, theta = (2^g - 1) / 2^g_max,
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

import triton
import triton.language as tl
from flexrec.triton_kernels.swap_lists import (
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
    log2,
    partner,
    store_tile,
    sums_behind,
    sums_beyond,
    term_gains,
)


@triton.jit
def products_before(x):
    """(R, C) the product of what lies before each column, and (R, 1) that of the row."""
    column = tl.arange(0, x.shape[1])[None, :]  # (1, C)
    before, group = tl.full(x.shape, 1.0, x.dtype), x  # (R, C)
    for bit in tl.static_range(log2(x.shape[1])):
        other = partner(group, bit)  # (R, C)
        before *= tl.where((column >> bit) & 1 == 1, other, 1.0)  # (R, C)
        group *= other  # (R, C)
    return before, tl.max(group, axis=1, keep_dims=True)  # all columns have the row's product


@triton.jit
def _compose(m, a, b, LATER: tl.constexpr):
    """Chains of maps t -> m t + a and t -> m t + b: those of the columns behind each (or before it, unless LATER).

    The column next to the one in question is the last to be applied.

    Returns:
        m, a, b of the chain beyond each column, (R, C) each, and of the whole row, (R, 1) each.
    """
    column = tl.arange(0, m.shape[1])[None, :]  # (1, C)
    chain_m, chain_a, chain_b = tl.full(m.shape, 1.0, m.dtype), tl.zeros_like(a), tl.zeros_like(b)  # (R, C)
    for bit in tl.static_range(log2(m.shape[1])):
        other_m, other_a, other_b = partner(m, bit), partner(a, bit), partner(b, bit)  # (R, C)
        is_outer = ((column >> bit) & 1 == 1) != LATER  # (1, C), applied after the partner's
        chain_a = tl.where(is_outer, chain_m * other_a + chain_a, chain_a)  # (R, C)
        chain_b = tl.where(is_outer, chain_m * other_b + chain_b, chain_b)  # (R, C)
        chain_m = tl.where(is_outer, chain_m * other_m, chain_m)  # (R, C)
        a = tl.where(is_outer, m * other_a + a, other_m * a + other_a)  # (R, C)
        b = tl.where(is_outer, m * other_b + b, other_m * b + other_b)  # (R, C)
        m = m * other_m  # (R, C)
    # All columns now have the row's chain.
    row_m, row_a = tl.max(m, axis=1, keep_dims=True), tl.max(a, axis=1, keep_dims=True)  # (R, 1)
    return chain_m, chain_a, chain_b, row_m, row_a, tl.max(b, axis=1, keep_dims=True)


@triton.jit
def _stops(
    gains_ptr,
    discounts_ptr,
    row,
    stride,
    tile,
    exists,
    length,
    shown,
    top,
    first,
    ACCUMULATOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INNER: tl.constexpr,
):
    """theta, x and d of a tile, (BLOCK_N, BLOCK_K) each; ``first`` (BLOCK_N, 1) is theta at the first rank."""
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
    gains = load_tile(gains_ptr, row, stride, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)  # (BLOCK_N, BLOCK_K)
    theta = tl.where(k < length, term_gains(gains, top, SCALED), 0.0)  # (BLOCK_N, BLOCK_K)
    d = load_tile(discounts_ptr, row, 0, tile, exists, shown, ACCUMULATOR, BLOCK_K, INNER)  # (BLOCK_N, BLOCK_K)
    return theta, tl.where(k < length, theta - first, 0.0), d


@triton.jit
def _behind_tile(theta, x, d, k, length, gamma_1, gamma_x, x_later, CREDIT: tl.constexpr):
    """B (or V, or the terms) of a tile, given Gamma (or V in place of ``gamma_1``) and sum x behind the tile.

    Returns:
        (BLOCK_N, BLOCK_K), and Gamma^1, Gamma^x (BLOCK_N, 1) before the tile.
    """
    n = tl.maximum(length - 1 - k, 0).to(theta.dtype)  # (BLOCK_N or 1, BLOCK_K)
    m = 1.0 - theta  # (BLOCK_N, BLOCK_K)
    if is_one_of(CREDIT, SWAP, NONCAUSAL):
        x_behind = sums_behind(x) + x_later  # (BLOCK_N, BLOCK_K)
        inside = k < length  # (BLOCK_N or 1, BLOCK_K)
        a = tl.where(inside, d * (1.0 + theta * n), 0.0)  # (BLOCK_N, BLOCK_K)
        b = tl.where(inside, d * (x + theta * x_behind), 0.0)  # (BLOCK_N, BLOCK_K)
        chain_m, chain_a, chain_b, row_m, row_a, row_b = _compose(m, a, b, True)
        behind = d * (n * x - x_behind)  # (BLOCK_N, BLOCK_K)
        behind -= x * (chain_m * gamma_1 + chain_a) - (chain_m * gamma_x + chain_b)  # (BLOCK_N, BLOCK_K)
        if CREDIT == SWAP:
            behind = behind / tl.maximum(n, 1.0)  # (BLOCK_N, BLOCK_K)
        gamma_1, gamma_x = row_m * gamma_1 + row_a, row_m * gamma_x + row_b  # (BLOCK_N, 1)
    else:
        behind = d * theta  # (BLOCK_N, BLOCK_K)
        if is_one_of(CREDIT, RANK, SEQUENCE):
            chain_m, chain_a, chain_b, row_m, row_a, row_b = _compose(m, behind, behind, True)
            behind += m * (chain_m * gamma_1 + chain_a)  # (BLOCK_N, BLOCK_K)
            gamma_1 = row_m * gamma_1 + row_a  # (BLOCK_N, 1)
    return behind, gamma_1, gamma_x


@triton.jit
def _before_tile(theta, x, d, reach, c_1, c_x, lost_1, lost_x, CREDIT: tl.constexpr):
    """P and the sum over j < k (0 unless non-causal) of a tile, given P, C^1, C^x and the sums of L before the tile.

    Returns:
        (BLOCK_N, BLOCK_K) twice, and the five (BLOCK_N, 1) behind the tile.
    """
    before, row_product = products_before(1.0 - theta)  # (BLOCK_N, BLOCK_K), (BLOCK_N, 1)
    p = before * reach  # (BLOCK_N, BLOCK_K)
    earlier = tl.zeros_like(p)  # (BLOCK_N, BLOCK_K)
    if CREDIT == NONCAUSAL:
        chain_m, chain_a, chain_b, row_m, row_a, row_b = _compose(1.0 - theta, p, p * x, False)
        here_1, here_x = chain_m * c_1 + chain_a, chain_m * c_x + chain_b  # (BLOCK_N, BLOCK_K), C
        c_1, c_x = row_m * c_1 + row_a, row_m * c_x + row_b  # (BLOCK_N, 1)
        added_1 = d * (p - here_1 * theta)  # (BLOCK_N, BLOCK_K), to L^1 and L^x
        added_x = d * (p * x - here_x * theta)  # (BLOCK_N, BLOCK_K)
        l_1 = sums_beyond(added_1, False) + lost_1 - here_1 * d  # (BLOCK_N, BLOCK_K)
        l_x = sums_beyond(added_x, False) + lost_x - here_x * d  # (BLOCK_N, BLOCK_K)
        earlier = l_x - x * l_1  # (BLOCK_N, BLOCK_K)
        lost_1 += tl.sum(added_1, axis=1, keep_dims=True)  # (BLOCK_N, 1)
        lost_x += tl.sum(added_x, axis=1, keep_dims=True)  # (BLOCK_N, 1)
    return p, earlier, reach * row_product, c_1, c_x, lost_1, lost_x


@triton.jit
def swap_cascade_kernel(
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
    MAX_GAIN: tl.constexpr,  # 0: the list's own
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
    if MAX_GAIN > 0:
        top = tl.full([BLOCK_N, 1], MAX_GAIN, ACCUMULATOR)  # (BLOCK_N, 1)
    else:
        top = largest_gain(gains_ptr, row, gains_stride, exists, length, ACCUMULATOR, BLOCK_K, INNER, TILES)
    start = tl.zeros([BLOCK_N, 1], dtype=tl.int32)  # (BLOCK_N, 1)
    first = term_gains(load_item(gains_ptr, row, gains_stride, start, exists, length, ACCUMULATOR), top, SCALED)

    zero = tl.zeros([BLOCK_N, 1], dtype=ACCUMULATOR)  # (BLOCK_N, 1)
    gamma_1, gamma_x, x_later = zero, zero, zero  # (BLOCK_N, 1)
    if TILES > 1:
        for i in range(TILES):
            tile = TILES - 1 - i
            k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
            theta, x, d = _stops(
                gains_ptr,
                discounts_ptr,
                row,
                gains_stride,
                tile,
                exists,
                length,
                shown,
                top,
                first,
                ACCUMULATOR,
                BLOCK_K,
                INNER,
            )  # (BLOCK_N, BLOCK_K)
            behind, gamma_1, gamma_x = _behind_tile(theta, x, d, k, length, gamma_1, gamma_x, x_later, CREDIT)
            x_later += tl.sum(x, axis=1, keep_dims=True)  # (BLOCK_N, 1)
            store_tile(rewards_ptr, behind, row, size, tile, exists, BLOCK_K, INNER)
        tl.debug_barrier()

    reach = zero + 1.0  # (BLOCK_N, 1)
    c_1, c_x, lost_1, lost_x = zero, zero, zero, zero  # (BLOCK_N, 1)
    for tile in range(TILES):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
        theta, x, d = _stops(
            gains_ptr,
            discounts_ptr,
            row,
            gains_stride,
            tile,
            exists,
            length,
            shown,
            top,
            first,
            ACCUMULATOR,
            BLOCK_K,
            INNER,
        )  # (BLOCK_N, BLOCK_K)
        if TILES > 1:
            behind = load_tile(rewards_ptr, row, size, tile, exists, length, ACCUMULATOR, BLOCK_K, INNER)
        else:
            behind, gamma_1, gamma_x = _behind_tile(theta, x, d, k, length, gamma_1, gamma_x, x_later, CREDIT)
        if CREDIT == SEQUENCE:
            rewards = gamma_1 + tl.zeros_like(x)  # (BLOCK_N, BLOCK_K), V at the first rank
        else:
            p, earlier, reach, c_1, c_x, lost_1, lost_x = _before_tile(
                theta, x, d, reach, c_1, c_x, lost_1, lost_x, CREDIT
            )
            rewards = p * behind + earlier  # (BLOCK_N, BLOCK_K)
            if CREDIT == NONCAUSAL:
                rewards = rewards / tl.maximum(length - 1, 1).to(ACCUMULATOR)  # (BLOCK_N, BLOCK_K)
        rewards = tl.where(k < shown, rewards, 0.0)  # (BLOCK_N, BLOCK_K)
        store_tile(rewards_ptr, rewards, row, size, tile, exists, BLOCK_K, INNER)
