"""Triton kernels of the metrics that ask for the first relevant item (mrr, hit_rate) or for all of them (map).

The closed forms are derived in ``flexrec/ops/swap_reference.py``. As computed here, with w in {0, 1}:

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
    ranks_of,
    store_tile,
)
from flexrec.triton_kernels.scans import sums_behind, two_sums_behind


@triton.jit
def _relevant(lists, tile):
    """(BLOCK_N, BLOCK_K) 1 at relevant ranks of a tile, else 0."""
    return tl.where(gains_of(lists, tile) > 0.0, 1.0, 0.0).to(lists.zero.dtype)


@triton.jit
def swap_first(lists, rewards_ptr, CREDIT: tl.constexpr, TILES: tl.constexpr):
    """Rewards of the lists of a program: the first relevant item."""
    none = TILES * lists.first_ranks.shape[0] * lists.first_ranks.shape[2]  # the rank of an item that is not there
    first = tl.full(lists.row.shape, none, tl.int32)  # (BLOCK_N, 1), as all that is kept of a list
    second = first
    count = lists.zero
    for tile in range(TILES):
        w = _relevant(lists, tile)
        place = tl.where(w > 0.0, ranks_of(lists, tile), none)  # (BLOCK_N, BLOCK_K)
        tile_first = tl.min(place, axis=1, keep_dims=True)
        tile_second = tl.min(tl.where(place > tile_first, place, none), axis=1, keep_dims=True)
        second = tl.minimum(tl.minimum(second, tile_second), tl.maximum(first, tile_first))
        first = tl.minimum(first, tile_first)
        count += tl.sum(w, axis=1, keep_dims=True)
    d_first = load_item(lists, lists.discounts_ptr, 0, first, lists.shown)
    d_second = load_item(lists, lists.discounts_ptr, 0, second, lists.shown)

    rises, falls = lists.zero, lists.zero  # sums over ranks before the first relevant one, and irrelevant behind it
    if is_one_of(CREDIT, SWAP, NONCAUSAL):
        for tile in range(TILES):
            k, w, d = ranks_of(lists, tile), _relevant(lists, tile), discounts_of(lists, tile)
            rise = tl.where(k < first, d_first - d, 0.0)
            is_fall = (k > first) & (k < lists.length) & (w == 0.0)
            fall = tl.where(is_fall, d_first - tl.maximum(d, d_second), 0.0)
            rises += tl.sum(rise, axis=1, keep_dims=True)
            falls += tl.sum(fall, axis=1, keep_dims=True)

    for tile in range(TILES):
        k = ranks_of(lists, tile)
        if is_one_of(CREDIT, SWAP, NONCAUSAL):
            d = discounts_of(lists, tile)
            rewards = tl.where(k < first, count * (d_first - d), 0.0)
            rewards = tl.where(k == first, falls, rewards)
            others = lists.length - 1 - k  # (BLOCK_N or 1, BLOCK_K)
            if CREDIT == NONCAUSAL:
                fall = tl.where(k > first, d_first - tl.maximum(d, d_second), 0.0)
                rewards += tl.where(_relevant(lists, tile) > 0.0, rises, fall)
                others = lists.length - 1 + tl.zeros_like(k)
            rewards = rewards / tl.maximum(others, 1).to(lists.zero.dtype)
        elif CREDIT == INDEPENDENT:
            rewards = tl.where(k == first, d_first, 0.0)
        elif CREDIT == RANK:
            rewards = tl.where(k <= first, d_first, 0.0)
        else:
            rewards = d_first + tl.zeros_like(k).to(d_first.dtype)
        rewards = tl.where((k < lists.shown) & (count > 0.0), rewards, 0.0)  # (BLOCK_N, BLOCK_K)
        store_tile(lists, rewards_ptr, rewards, tile)


class Tile(NamedTuple):
    """Of a tile, (BLOCK_N, BLOCK_K) each: w, d, c and E as derived above, and the relevant items behind each rank."""

    w: Any
    d: Any
    c: Any
    e: Any
    ones: Any


class Later(NamedTuple):
    """Sums over the tiles behind, (BLOCK_N, 1) each: of w and d w, E at irrelevant and F at relevant ranks, terms."""

    ones: Any
    hits: Any
    e: Any
    f: Any
    terms: Any


@triton.jit
def _load(lists, tile, count, ones_later, hits_later):
    """The ``Tile``; ``count`` (BLOCK_N, 1) are all relevant items."""
    w, d = _relevant(lists, tile), discounts_of(lists, tile)
    ones_behind, hits_behind = two_sums_behind(w, d * w)
    ones = ones_behind + ones_later
    c = count - ones
    return Tile(w, d, c, d * c + (hits_behind + hits_later), ones)


@triton.jit
def swap_average_precision(lists, rewards_ptr, CREDIT: tl.constexpr, TILES: tl.constexpr):
    """Rewards of the lists of a program: average precision."""
    zero, length = lists.zero, lists.length
    count = zero
    for tile in range(TILES):
        count += tl.sum(_relevant(lists, tile), axis=1, keep_dims=True)
    inverse = 1.0 / tl.maximum(count, 1.0)  # of a list without relevant items all rewards are 0 anyhow

    sum_we, sum_f, value = zero, zero, zero  # totals: of E at relevant, of F at irrelevant ranks, and R
    if is_one_of(CREDIT, NONCAUSAL, SEQUENCE):
        ones_later, hits_later = zero, zero
        for i in range(TILES):
            tile = TILES - 1 - i
            found = _load(lists, tile, count, ones_later, hits_later)
            w, d, e = found.w, found.d, found.e
            is_irrelevant = (ranks_of(lists, tile) < length) & (w == 0.0)
            sum_we += tl.sum(w * e, axis=1, keep_dims=True)
            sum_f += tl.sum(tl.where(is_irrelevant, e + d, 0.0), axis=1, keep_dims=True)
            value += tl.sum(w * d * found.c, axis=1, keep_dims=True)
            ones_later += tl.sum(w, axis=1, keep_dims=True)
            hits_later += tl.sum(d * w, axis=1, keep_dims=True)

    later = Later(zero, zero, zero, zero, zero)
    for i in range(TILES):
        tile = TILES - 1 - i
        k = ranks_of(lists, tile)
        found = _load(lists, tile, count, later.ones, later.hits)
        w, d, c, e, ones = found.w, found.d, found.c, found.e, found.ones
        f = e + d
        term = w * d * c
        zero_e = tl.where((k < length) & (w == 0.0), e, 0.0)
        one_f = w * f
        if is_one_of(CREDIT, SWAP, NONCAUSAL):
            n = (length - 1 - k).to(zero.dtype)  # (BLOCK_N or 1, BLOCK_K)
            e_behind, f_behind = two_sums_behind(zero_e, one_f)
            back = (n - ones) * e - (e_behind + later.e)
            forward = (f_behind + later.f) - ones * f
            rewards = tl.where(w > 0.0, back, forward)
            if CREDIT == NONCAUSAL:
                ones_before = c - w
                zeros_before = k.to(zero.dtype) - ones_before
                zero_f = tl.where((k < length) & (w == 0.0), f, 0.0)
                zero_f_behind, one_e_behind = two_sums_behind(zero_f, w * e)
                f_before = sum_f - (zero_f_behind + zero_f)
                e_before = sum_we - (one_e_behind + w * e)
                rewards += tl.where(w > 0.0, zeros_before * f - f_before, e_before - ones_before * e)
                sum_f -= tl.sum(zero_f, axis=1, keep_dims=True)
                sum_we -= tl.sum(w * e, axis=1, keep_dims=True)
                n = (length - 1 + tl.zeros_like(k)).to(zero.dtype)
            rewards = rewards / tl.maximum(n, 1.0)
        elif CREDIT == INDEPENDENT:
            rewards = term
        elif CREDIT == RANK:
            rewards = term + sums_behind(term) + later.terms
        else:
            rewards = value + tl.zeros_like(w)
        rewards = tl.where(k < lists.shown, rewards * inverse, 0.0)
        store_tile(lists, rewards_ptr, rewards, tile)
        if TILES > 1:  # carried to the tile before
            later = Later(
                later.ones + tl.sum(w, axis=1, keep_dims=True),
                later.hits + tl.sum(d * w, axis=1, keep_dims=True),
                later.e + tl.sum(zero_e, axis=1, keep_dims=True),
                later.f + tl.sum(one_f, axis=1, keep_dims=True),
                later.terms + tl.sum(term, axis=1, keep_dims=True),
            )
