"""Triton kernels of the whole matrix of swap scores, and of their means by weight (credit "policy").

The closed forms of S[k, j] for k < j stand in ``flexrec/ops/swap_reference.py``. They need, besides w and d, one
state per rank: the number c of relevant items so far (first relevant item), E (average precision), or the probability P
of getting to the rank (cascade), whose G_kj = M + Q d_j moreover follows from a row's own chain over k < i < j,

    Q <- Q (1 - theta_i),   M <- M + Q d_i theta_i.

The first kernel writes these states, K numbers per list, with the normaliser. A program of the second takes BLOCK_R
rows k of one list, walks over the columns j >= k in tiles, and writes each tile and its mirror image: each score once.

Bytes: 4 K^2 written per list (float64: 8 K^2) and 12 K read by each of its K / BLOCK_R programs, from the cache but for
the first. Means by weight read the weights behind the diagonal, K^2 / 2 of them, once, and write 4 K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flexrec.metrics import Metric
from flexrec.triton_kernels.launch import ceil_div, kernel, launch
from flexrec.triton_kernels.lists import (
    AVERAGE_PRECISION,
    CASCADE,
    FIRST,
    LINEAR,
    NUM_WARPS,
    call_on,
    discounts_of,
    discounts_on,
    gains_of,
    is_one_of,
    lists_of_program,
    ranks_of,
    store_tile,
    term_gains,
    terms_of,
)
from flexrec.triton_kernels.scans import products_before, sums_behind, sums_beyond
from flexrec.triton_kernels.sort import inverse_norm

BLOCK_R = 32  # rows k of a program


@kernel
def swap_states_kernel(
    gains_ptr,  # (N, K)
    states_ptr,  # (N, K) written
    discounts_ptr,  # (K,)
    lengths_ptr,  # (N,) int64 or None
    num_ranked_ptr,  # (N,) int64 or None
    rows,
    size,
    stride,  # of gains, between rows, in elements
    max_ranked,
    sorted_discounts_ptr,  # (BLOCK_K,) or None, if the normaliser is IDEAL
    cutoff,  # 0: none
    terms_ptr,  # (N, K) written, the term gains
    norms_ptr,  # (N, 3) written: 1 / normaliser, d at the first and at the second relevant rank
    FORM: tl.constexpr,
    GAIN_KIND: tl.constexpr,
    NORMALISER: tl.constexpr,
    MAX_GAIN: tl.constexpr,  # 0: the list's own
    TOP: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    lists = lists_of_program(
        gains_ptr, discounts_ptr, lengths_ptr, num_ranked_ptr, rows, size, stride, max_ranked, QUADS, BLOCK_N, BLOCK_K
    )
    zero = lists.zero
    terms = terms_of(lists, GAIN_KIND, MAX_GAIN, FORM == LINEAR, TILES)
    inverse = inverse_norm(lists, states_ptr, sorted_discounts_ptr, cutoff, terms, GAIN_KIND, NORMALISER, TOP, TILES)

    count = zero  # (BLOCK_N, 1), relevant items
    if is_one_of(FORM, FIRST, AVERAGE_PRECISION):
        for tile in range(TILES):
            count += tl.sum(term_gains(gains_of(lists, tile), terms, GAIN_KIND), axis=1, keep_dims=True)
    later, hits_later, d_first, d_second = zero, zero, zero, zero  # (BLOCK_N, 1)
    reach = zero + 1.0
    for i in range(TILES):
        if FORM == CASCADE:
            tile = i
        else:
            tile = TILES - 1 - i
        inside = ranks_of(lists, tile) < lists.length
        w = tl.where(inside, term_gains(gains_of(lists, tile), terms, GAIN_KIND), 0.0)  # (BLOCK_N, BLOCK_K)
        store_tile(lists, terms_ptr, w, tile)
        if FORM == CASCADE:
            before, row_product = products_before(1.0 - w)
            store_tile(lists, states_ptr, before * reach, tile)
            reach = reach * row_product
        elif FORM != LINEAR:
            d = discounts_of(lists, tile)
            state = count - (sums_behind(w) + later)  # c
            later += tl.sum(w, axis=1, keep_dims=True)
            if FORM == FIRST:
                d_first += tl.sum(tl.where(state == 1.0, d * w, 0.0), axis=1, keep_dims=True)
                d_second += tl.sum(tl.where(state == 2.0, d * w, 0.0), axis=1, keep_dims=True)
            else:  # E, as in ``swap_relevance``
                state = d * state + (sums_behind(d * w) + hits_later)
                hits_later += tl.sum(d * w, axis=1, keep_dims=True)
            store_tile(lists, states_ptr, state, tile)
    tl.store(norms_ptr + lists.row * 3, inverse, mask=lists.exists)
    tl.store(norms_ptr + lists.row * 3 + 1, d_first, mask=lists.exists)
    tl.store(norms_ptr + lists.row * 3 + 2, d_second, mask=lists.exists)


@triton.jit
def _scores(w_k, w_j, d_k, d_j, a_k, a_j, between, passing, d_first, d_second, FORM: tl.constexpr):
    """(BLOCK_R, BLOCK_C) S[k, j] times the normaliser, where k < j; elsewhere any finite number."""
    if FORM == LINEAR:
        s = (d_k - d_j) * (w_k - w_j)  # (BLOCK_R, BLOCK_C)
    elif FORM == CASCADE:
        s = a_k * (w_k - w_j) * (d_k - (between + passing * d_j))  # (BLOCK_R, BLOCK_C)
    elif FORM == FIRST:
        back = tl.where(a_k == 1.0, d_first - tl.maximum(d_j, d_second), 0.0)  # (BLOCK_R, BLOCK_C)
        forward = tl.where(a_k == 0.0, d_first - d_k, 0.0)  # (BLOCK_R, 1)
        s = tl.where(w_k > w_j, back, tl.where(w_k < w_j, forward, 0.0))  # (BLOCK_R, BLOCK_C)
    else:
        forward = (a_j + d_j) - (a_k + d_k)  # (BLOCK_R, BLOCK_C)
        s = tl.where(w_k > w_j, a_k - a_j, tl.where(w_k < w_j, forward, 0.0))  # (BLOCK_R, BLOCK_C)
    return s


@kernel
def swap_scores_kernel(
    terms_ptr,  # (N, K)
    states_ptr,  # (N, K)
    norms_ptr,  # (N, 3)
    discounts_ptr,  # (K,)
    lengths_ptr,  # (N,) int64 or None
    num_ranked_ptr,  # (N,) int64 or None
    weights_ptr,  # (N, K, K) or None
    out_ptr,  # (N, K, K) scores, or (N, K) their means by weight
    size,
    max_ranked,
    slabs,  # programs per list
    FORM: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    if QUADS:
        size = size // 4 * 4
    ACCUMULATOR: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = program // slabs  # the list
    begin = (program % slabs).to(tl.int32) * BLOCK_R
    k = begin + tl.arange(0, BLOCK_R)[:, None]  # (BLOCK_R, 1)
    length, shown = size, max_ranked
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + row).to(tl.int32)
    shown = tl.minimum(length, max_ranked)
    if num_ranked_ptr is not None:
        shown = tl.minimum(shown, tl.load(num_ranked_ptr + row).to(tl.int32))
    inverse = tl.load(norms_ptr + row * 3)
    d_first, d_second = tl.load(norms_ptr + row * 3 + 1), tl.load(norms_ptr + row * 3 + 2)
    w_k = tl.load(terms_ptr + row * size + k, mask=k < length, other=0.0)  # (BLOCK_R, 1)
    d_k = tl.load(discounts_ptr + k, mask=k < shown, other=0.0)  # (BLOCK_R, 1)
    a_k = tl.zeros([BLOCK_R, 1], dtype=ACCUMULATOR)  # (BLOCK_R, 1)
    if FORM != LINEAR:
        a_k = tl.load(states_ptr + row * size + k, mask=k < length, other=0.0)  # (BLOCK_R, 1)

    between = tl.zeros([BLOCK_R, 1], dtype=ACCUMULATOR)  # (BLOCK_R, 1), M
    passing = between + 1.0  # (BLOCK_R, 1), Q
    weighted, weight = between, between  # (BLOCK_R, 1)
    for tile in range(TILES):
        start = begin + tile * BLOCK_C
        if start < size:
            j = start + tl.arange(0, BLOCK_C)[None, :]  # (1, BLOCK_C)
            w_j = tl.load(terms_ptr + row * size + j, mask=j < length, other=0.0)  # (1, BLOCK_C)
            d_j = tl.load(discounts_ptr + j, mask=j < shown, other=0.0)  # (1, BLOCK_C)
            a_j = tl.zeros([1, BLOCK_C], dtype=ACCUMULATOR)  # (1, BLOCK_C)
            if FORM == AVERAGE_PRECISION:
                a_j = tl.load(states_ptr + row * size + j, mask=j < length, other=0.0)  # (1, BLOCK_C)
            is_later = j > k  # (BLOCK_R, BLOCK_C)
            m, q = between, passing  # (BLOCK_R, 1)
            if FORM == CASCADE:
                theta = tl.where(is_later, w_j, 0.0)  # (BLOCK_R, BLOCK_C)
                before, row_product = products_before(1.0 - theta)  # (BLOCK_R, BLOCK_C), (BLOCK_R, 1)
                q = passing * before  # (BLOCK_R, BLOCK_C)
                stops = q * d_j * theta  # (BLOCK_R, BLOCK_C)
                m = between + sums_beyond(stops, False)  # (BLOCK_R, BLOCK_C)
                between += tl.sum(stops, axis=1, keep_dims=True)  # (BLOCK_R, 1)
                passing *= row_product  # (BLOCK_R, 1)
            s = _scores(w_k, w_j, d_k, d_j, a_k, a_j, m, q, d_first, d_second, FORM)  # (BLOCK_R, BLOCK_C)
            s = tl.where(is_later & (j < length), s * inverse, 0.0)  # (BLOCK_R, BLOCK_C)
            matrix = row * size * size  # int64
            if weights_ptr is None:
                exists = (k < size) & (j < size)  # (BLOCK_R, BLOCK_C)
                tl.store(out_ptr + matrix + k.to(tl.int64) * size + j, s, mask=exists & (j >= k))
                tl.store(out_ptr + matrix + j.to(tl.int64) * size + k, s, mask=exists & is_later)  # the mirror image
            else:
                counted = is_later & (j < length) & (k < shown)  # (BLOCK_R, BLOCK_C)
                share = tl.load(weights_ptr + matrix + k.to(tl.int64) * size + j, mask=counted, other=0.0)
                share = share.to(ACCUMULATOR)  # (BLOCK_R, BLOCK_C)
                weighted += tl.sum(share * s, axis=1, keep_dims=True)  # (BLOCK_R, 1)
                weight += tl.sum(share, axis=1, keep_dims=True)  # (BLOCK_R, 1)
    if weights_ptr is not None:
        mean = tl.where(weight > 0.0, weighted / tl.where(weight > 0.0, weight, 1.0), 0.0)  # (BLOCK_R, 1)
        tl.store(out_ptr + row * size + k, mean, mask=k < size)


def score_tiles(metric: Metric, size: int, itemsize: int) -> tuple[int, int, int]:
    """Columns per tile of the scores kernel, tiles per list and warps; ``itemsize`` are the bytes of a score.

    More columns for a warp would spill what the chains of err need.
    """
    columns = 32 if size <= 32 or itemsize == 8 or metric.definition.form == "cascade" else 64
    return columns, max(1, triton.next_power_of_2(size) // columns), NUM_WARPS * itemsize // 4


def swap_scores(
    gains: torch.Tensor,
    metric: Metric,
    *,
    lengths: torch.Tensor | None = None,
    num_ranked: torch.Tensor | None = None,
    max_ranked: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the two kernels.

    Args:
        gains, metric, lengths, num_ranked, max_ranked: as for ``swap_rewards.swap_rewards``.
        weights: (N, K, K) floating or None; entries on and below the diagonal are not read.

    Returns:
        (N, K, K) swap scores, or (N, K) rewards of credit "policy"; float64 for float64 gains, else float32.
    """
    rows, size = gains.shape
    dtype = torch.float64 if gains.dtype == torch.float64 else torch.float32
    shape = (rows, size, size) if weights is None else (rows, size)
    out = torch.empty(shape, dtype=dtype, device=gains.device)
    if rows == 0 or size == 0:
        return out
    gains = gains if gains.stride(1) == 1 else gains.contiguous()
    weights = None if weights is None else weights.contiguous()
    states, terms = torch.empty((2, rows, size), dtype=dtype, device=gains.device).unbind()
    norms = torch.empty((rows, 3), dtype=dtype, device=gains.device)
    call = call_on(gains, states, metric, lengths, num_ranked, max_ranked)
    launch(swap_states_kernel, call.grid, *call.arguments, terms, norms, **call.constants, num_warps=NUM_WARPS)
    columns, tiles, num_warps = score_tiles(metric, size, dtype.itemsize)
    slabs = ceil_div(size, BLOCK_R)
    discounts = discounts_on(metric, size, gains.device, dtype)
    arguments = (terms, states, norms, discounts, lengths, num_ranked, weights, out, size, max_ranked, slabs)
    constants = {"FORM": call.constants["FORM"], "QUADS": size % 4 == 0}
    constants |= {"BLOCK_R": BLOCK_R, "BLOCK_C": columns, "TILES": tiles}
    launch(swap_scores_kernel, (rows * slabs,), *arguments, **constants, num_warps=num_warps)
    return out
