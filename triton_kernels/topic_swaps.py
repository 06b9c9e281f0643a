"""Triton kernels of swap rewards and scores of a list with topics.

The closed forms are derived in ``flexrec/ops/swap_reference.py``: of each topic c a cascade with a_kc, what the item at
rank k is worth to it, of which it uses up u_kc = alpha a_kc. A program holds BLOCK_N lists and walks over their ranks
one by one with all topics side by side, (BLOCK_N, BLOCK_C), so that every recurrence is a line of arithmetic on numbers
of its own, and rows of topics are read as they lie in memory. The first kernel leaves p_c P_kc, the weight of each
topic that is left at each rank with a discount; the others walk back from the end of the list:

    later_k = sum over c of p_c P_kc [d_k (n x_kc - sum x_jc) - x_kc Gamma^1_kc + Gamma^x_kc],    sum over j > k,
    S[k, j] = sum over c of (a_kc - a_jc) (W_jc - R_jc d_j),    W = p P (d_k - alpha M) and R = p P Q, from j to j + 1:
              W <- W - R u_jc d_j,   R <- R (1 - u_jc).

The normaliser of alpha_ndcg takes the best of K items n times over, in float64 whatever the gains are, so that ties are
the same ties everywhere; a program finds it for one list.

Bytes per item of a list: C of the topics' own sizes read for the rewards (n C from the cache for the ideal), the gain
read and the reward written, and 8 C for the first n ranks, which are written and read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from flexrec.metrics import TIE, TINY, Metric, tie_weights
from flexrec.triton_kernels.launch import ceil_div, kernel, launch
from flexrec.triton_kernels.lists import CREDITS, INDEPENDENT, NONCAUSAL, NUM_WARPS, RANK, SEQUENCE, SWAP, discounts_on

MAX_SIZE = 1024  # longest list of the greedy order, which holds a list at a time
WIDTHS = (16, 64, 256)  # topics of a program, few widths to compile few
SIZES = (128, 1024)  # candidates of a program that looks for the greedy order
ELEMENTS = 256  # lists times topics of a program, or ranks times topics

_SLACK = tl.constexpr(1.0 - TIE)
_TINY = tl.constexpr(TINY)


@triton.jit
def _worth_at(worth_ptr, topics_ptr, items_ptr, row, k, length, size, topic, columns):
    """What the items at rank k of lists ``row`` are worth to topics (1, C), 0 beyond ``length``; k or row is (R, 1)."""
    is_there = k < length  # (R, 1)
    place = row * size + k  # (R, 1) int64
    item = place
    if items_ptr is not None:
        item = tl.load(items_ptr + place, mask=is_there, other=0)  # (R, 1)
    w = tl.load(worth_ptr + place, mask=is_there, other=0.0)  # (R, 1)
    about = tl.load(topics_ptr + item * columns + topic, mask=is_there & (topic < columns), other=0.0)  # (R, C)
    return w * about.to(w.dtype)


@triton.jit
def _discount_at(discounts_ptr, k, depth, shown):
    """The discount of rank k in lists that show ``shown`` (R, 1) ranks."""
    d = tl.load(discounts_ptr + tl.minimum(k, depth - 1))
    return tl.where(k < tl.minimum(shown, depth), d, 0.0)


@kernel
def topics_left_kernel(
    worth_ptr,  # (N, K)
    topics_ptr,  # (I, C)
    items_ptr,  # (N, K) int64 or None
    weights_ptr,  # (N, C)
    lengths_ptr,  # (N,) int64
    left_ptr,  # (N, n, C) written
    rows,
    size,
    columns,
    depth,  # n
    DECAY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """p_c P_kc of the first n ranks."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # (BLOCK_N, 1)
    topic = tl.arange(0, BLOCK_C)[None, :]  # (1, BLOCK_C)
    exists = row < rows
    is_topic = exists & (topic < columns)  # (BLOCK_N, BLOCK_C)
    length = tl.load(lengths_ptr + row, mask=exists, other=0)
    left = tl.load(weights_ptr + row * columns + topic, mask=is_topic, other=0.0)  # (BLOCK_N, BLOCK_C)
    for k in range(depth):
        tl.store(left_ptr + (row * depth + k) * columns + topic, left, mask=is_topic)
        a = _worth_at(worth_ptr, topics_ptr, items_ptr, row, k, length, size, topic, columns)
        left = left * (1.0 - DECAY * a)


@kernel
def topic_rewards_kernel(
    worth_ptr,  # (N, K)
    topics_ptr,  # (I, C)
    items_ptr,  # (N, K) int64 or None
    weights_ptr,  # (N, C)
    lengths_ptr,  # (N,) int64
    ranked_ptr,  # (N,) int64
    discounts_ptr,  # (n,)
    left_ptr,  # (N, n, C)
    norms_ptr,  # (N,) 1 / normaliser
    rewards_ptr,  # (N, K) written
    rows,
    size,
    columns,
    depth,  # n
    CREDIT: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # (BLOCK_N, 1)
    topic = tl.arange(0, BLOCK_C)[None, :]  # (1, BLOCK_C)
    exists = row < rows
    length = tl.load(lengths_ptr + row, mask=exists, other=0).to(tl.int32)  # (BLOCK_N, 1)
    shown = tl.load(ranked_ptr + row, mask=exists, other=0).to(tl.int32)
    inverse = tl.load(norms_ptr + row, mask=exists, other=0.0)
    first = _worth_at(worth_ptr, topics_ptr, items_ptr, row, 0, length, size, topic, columns)  # (BLOCK_N, BLOCK_C)
    zero = tl.zeros_like(first)

    # Forwards: what rank k loses to those before it (non-causal), or the terms of R.
    if CREDIT != SWAP:
        left = tl.load(weights_ptr + row * columns + topic, mask=exists & (topic < columns), other=0.0)
        a_1, a_x, b_1, b_x, c_1, c_x = zero, zero, zero, zero, zero, zero
        total = tl.sum(zero, axis=1, keep_dims=True)  # (BLOCK_N, 1), of the terms
        for k in range(size):
            a = _worth_at(worth_ptr, topics_ptr, items_ptr, row, k, length, size, topic, columns)
            d = _discount_at(discounts_ptr, k, depth, shown)  # (BLOCK_N, 1)
            used = DECAY * a
            if CREDIT == NONCAUSAL:
                x = tl.where(k < length, a - first, 0.0)
                found = tl.sum((a_x - b_x - c_x * d) - x * (a_1 - b_1 - c_1 * d), axis=1, keep_dims=True)
                a_1 += left * d
                a_x += left * x * d
                b_1 += c_1 * d * used
                b_x += c_x * d * used
                c_1 = c_1 * (1.0 - used) + left
                c_x = c_x * (1.0 - used) + left * x
            else:
                found = d * tl.sum(left * a, axis=1, keep_dims=True)
                total += found
                if CREDIT == INDEPENDENT:
                    found = found * inverse
            left = left * (1.0 - used)
            tl.store(rewards_ptr + row * size + k, tl.where(k < shown, found, 0.0), mask=exists)
        if CREDIT == SEQUENCE:
            for k in range(size):
                tl.store(rewards_ptr + row * size + k, tl.where(k < shown, total * inverse, 0.0), mask=exists)
        tl.debug_barrier()

    # Backwards: the sums over the pool, or over the terms that are still to come.
    if CREDIT == RANK:
        total = tl.sum(zero, axis=1, keep_dims=True)
        for i in range(size):
            k = size - 1 - i
            total += tl.load(rewards_ptr + row * size + k, mask=exists, other=0.0)
            tl.store(rewards_ptr + row * size + k, tl.where(k < shown, total * inverse, 0.0), mask=exists)
    if (CREDIT == SWAP) | (CREDIT == NONCAUSAL):
        gamma_1, gamma_x, behind = zero, zero, zero
        for i in range(size):
            k = size - 1 - i
            a = _worth_at(worth_ptr, topics_ptr, items_ptr, row, k, length, size, topic, columns)
            d = _discount_at(discounts_ptr, k, depth, shown)  # (BLOCK_N, 1)
            has_left = (k < tl.where(exists, depth, 0)) & (topic < columns)
            left = tl.load(left_ptr + (row * depth + k) * columns + topic, mask=has_left, other=0.0)
            n = tl.maximum(length - 1 - k, 0).to(a.dtype)  # (BLOCK_N, 1)
            x = tl.where(k < length, a - first, 0.0)
            used = DECAY * a
            each = left * (d * (n * x - behind) - x * gamma_1 + gamma_x)
            found = tl.sum(each, axis=1, keep_dims=True)
            gamma_1 = d * (1.0 + used * n) + (1.0 - used) * gamma_1
            gamma_x = d * (x + used * behind) + (1.0 - used) * gamma_x
            behind += x
            if CREDIT == NONCAUSAL:
                found += tl.load(rewards_ptr + row * size + k, mask=exists, other=0.0)
                found = found / tl.maximum(length - 1, 1).to(a.dtype)
            else:
                found = found / tl.maximum(n, 1.0)
            tl.store(rewards_ptr + row * size + k, tl.where(k < shown, found * inverse, 0.0), mask=exists)


@kernel
def topic_scores_kernel(
    worth_ptr,  # (N, K)
    topics_ptr,  # (I, C)
    items_ptr,  # (N, K) int64 or None
    lengths_ptr,  # (N,) int64
    ranked_ptr,  # (N,) int64
    discounts_ptr,  # (n,)
    left_ptr,  # (N, n, C)
    norms_ptr,  # (N,) 1 / normaliser
    shares_ptr,  # (N, K, K) or None
    out_ptr,  # 0s, written: (N, K, K) scores, or (N, K) their means by share
    size,
    columns,
    depth,  # n
    slabs,  # programs per list
    DECAY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_R ranks k with a discount of one list, and all j behind them."""
    row = tl.program_id(0).to(tl.int64) // slabs  # the list
    begin = (tl.program_id(0) % slabs) * BLOCK_R
    k = begin + tl.arange(0, BLOCK_R)[:, None]  # (BLOCK_R, 1)
    topic = tl.arange(0, BLOCK_C)[None, :]  # (1, BLOCK_C)
    length, shown = tl.load(lengths_ptr + row).to(tl.int32), tl.load(ranked_ptr + row).to(tl.int32)
    inverse = tl.load(norms_ptr + row)
    counts = (k < depth) & (k < shown)
    a_k = _worth_at(worth_ptr, topics_ptr, items_ptr, row, k, length, size, topic, columns)  # (BLOCK_R, BLOCK_C)
    d_k = tl.load(discounts_ptr + k, mask=counts, other=0.0)  # (BLOCK_R, 1)
    has_left = (k < depth) & (topic < columns)
    passing = tl.load(left_ptr + (row * depth + k) * columns + topic, mask=has_left, other=0.0)  # R
    weight = passing * d_k  # W
    weighted = tl.zeros_like(d_k)  # (BLOCK_R, 1)
    total = tl.zeros_like(d_k)  # (BLOCK_R, 1), of the shares
    for j in range(begin + 1, length):
        here = tl.zeros([1, 1], tl.int32) + j
        a_j = _worth_at(worth_ptr, topics_ptr, items_ptr, row, here, length, size, topic, columns)  # (1, BLOCK_C)
        d_j = _discount_at(discounts_ptr, j, depth, shown)
        is_later = j > k  # (BLOCK_R, 1)
        score = tl.sum((a_k - a_j) * (weight - passing * d_j), axis=1, keep_dims=True) * inverse  # (BLOCK_R, 1)
        used = tl.where(is_later, DECAY * a_j, 0.0)  # (BLOCK_R, BLOCK_C)
        weight -= passing * used * d_j
        passing = passing * (1.0 - used)
        place = row * size * size + k.to(tl.int64) * size + j  # (BLOCK_R, 1)
        if shares_ptr is None:
            mirrored = row * size * size + tl.cast(j, tl.int64) * size + k
            tl.store(out_ptr + place, score, mask=counts & is_later)
            tl.store(out_ptr + mirrored, score, mask=counts & is_later)
        else:
            share = tl.load(shares_ptr + place, mask=counts & is_later, other=0.0).to(score.dtype)
            weighted += share * score
            total += share
    if shares_ptr is not None:
        mean = tl.where(total > 0.0, weighted / tl.where(total > 0.0, total, 1.0), 0.0)
        tl.store(out_ptr + row * size + k, mean, mask=counts)


@kernel
def greedy_norm_kernel(
    worth_ptr,  # (N, K)
    topics_ptr,  # (I, C)
    items_ptr,  # (N, K) int64 or None
    weights_ptr,  # (N, C)
    lengths_ptr,  # (N,) int64
    discounts_ptr,  # (n,) float64
    ties_ptr,  # (C,) float64
    left_ptr,  # (N, C) float64 scratch
    norms_ptr,  # (N,) written: 1 / normaliser
    size,
    columns,
    depth,  # n
    DECAY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: the value of the greedy order of one list, see ``flexrec.ops.ranking_metric.greedy``."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    topic = tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    is_free = k < tl.load(lengths_ptr + row)
    item = row * size + k
    if items_ptr is not None:
        item = tl.load(items_ptr + item, mask=is_free, other=0)
    w = tl.load(worth_ptr + row * size + k, mask=is_free, other=0.0).to(tl.float64)  # (BLOCK_K,)
    is_there = is_free
    keys = tl.zeros([BLOCK_K], tl.float64)
    for c in range(columns):
        about = tl.load(topics_ptr + item * columns + c, mask=is_there, other=0.0)  # (BLOCK_K,)
        keys += w * about.to(tl.float64) * tl.load(ties_ptr + c)
    left = tl.load(weights_ptr + row * columns + topic, mask=topic < columns, other=0.0).to(tl.float64)  # (BLOCK_C,)
    value = tl.sum(tl.zeros([BLOCK_K], tl.float64))
    for rank in range(depth):
        tl.store(left_ptr + row * columns + topic, left, mask=topic < columns)
        tl.debug_barrier()  # what one thread has written, all read
        adds = tl.zeros([BLOCK_K], tl.float64)
        for c in range(columns):
            about = tl.load(topics_ptr + item * columns + c, mask=is_there, other=0.0)  # (BLOCK_K,)
            adds += w * about.to(tl.float64) * tl.load(left_ptr + row * columns + c)
        tl.debug_barrier()  # before it is written again
        best = tl.max(tl.where(is_free, adds, 0.0))
        key = tl.where(is_free & (adds >= best * _SLACK), keys, -1.0)
        chosen = tl.min(tl.where(key == tl.max(key), k, BLOCK_K))
        value += best * tl.load(discounts_ptr + rank)
        is_chosen = k == chosen
        is_free = is_free & (k != chosen)
        of_chosen = tl.sum(tl.where(is_chosen, w, 0.0))
        its_row = tl.sum(tl.where(is_chosen, item, 0))
        about = tl.load(topics_ptr + its_row * columns + topic, mask=topic < columns, other=0.0)  # (BLOCK_C,)
        left = left * (1.0 - DECAY * of_chosen * about.to(tl.float64))
    inverse = tl.where(value > _TINY, 1.0 / tl.where(value > _TINY, value, 1.0), 0.0)
    tl.store(norms_ptr + row, inverse)


@kernel
def intents_norm_kernel(
    worth_ptr,  # (N, K)
    topics_ptr,  # (I, C)
    items_ptr,  # (N, K) int64 or None
    weights_ptr,  # (N, C)
    lengths_ptr,  # (N,) int64
    norms_ptr,  # (N,) written
    rows,
    size,
    columns,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The weight of the topics that an item of positive gain has."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # (BLOCK_N, 1)
    topic = tl.arange(0, BLOCK_C)[None, :]  # (1, BLOCK_C)
    exists = row < rows
    length = tl.load(lengths_ptr + row, mask=exists, other=0)
    weight = tl.load(weights_ptr + row * columns + topic, mask=exists & (topic < columns), other=0.0)
    found = tl.zeros_like(weight)  # (BLOCK_N, BLOCK_C)
    for k in range(size):
        a = _worth_at(worth_ptr, topics_ptr, items_ptr, row, k, length, size, topic, columns)
        found = tl.where(a > 0.0, weight, found)
    norm = tl.sum(found, axis=1, keep_dims=True)  # (BLOCK_N, 1)
    tl.store(norms_ptr + row, norm, mask=exists)


# --- launchers --------------------------------------------------------------------------------------------------------


def swap_rewards(
    worth: torch.Tensor,
    metric: Metric,
    topics: torch.Tensor,
    items: torch.Tensor | None,
    topic_weights: torch.Tensor,
    credit: str,
    *,
    lengths: torch.Tensor,
    num_ranked: torch.Tensor,
) -> torch.Tensor:
    """Rewards by a metric of topics.

    Args:
        worth: (N, K) float32 or float64, what the metric makes of each gain, in rank order; K <= MAX_SIZE.
        topics, items, topic_weights: (I, C) floating, (N, K) int64 or None, (N, C): the fields of ``Topics``, with C
            at most the widest of WIDTHS.
        metric, credit: as for ``flexrec.swap_rewards``; no ``credit="policy"``.
        lengths, num_ranked: (N,) int64, the latter at most the former.

    Returns:
        (N, K) in the dtype of ``worth``.
    """
    rows, size = worth.shape
    rewards = torch.empty_like(worth)
    if rows == 0 or size == 0:
        return rewards
    lists, discounts, left, norms = _prepared(worth, metric, topics, items, topic_weights, lengths)
    blocks = _blocks(topics.shape[1], "BLOCK_N")
    grid = (ceil_div(rows, blocks["BLOCK_N"]),)
    arguments = (*lists, num_ranked, discounts, left, norms, rewards, rows, size, topics.shape[1], len(discounts))
    constants = {"CREDIT": CREDITS[credit].value, "DECAY": metric.definition.decay, **blocks}
    launch(topic_rewards_kernel, grid, *arguments, **constants, num_warps=NUM_WARPS)
    return rewards


def swap_scores(
    worth: torch.Tensor,
    metric: Metric,
    topics: torch.Tensor,
    items: torch.Tensor | None,
    topic_weights: torch.Tensor,
    *,
    lengths: torch.Tensor,
    num_ranked: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N, K, K) swap scores, or with ``weights`` (N, K, K) their means over j > k, (N, K); as ``swap_rewards``."""
    rows, size = worth.shape
    out = worth.new_zeros((rows, size, size) if weights is None else (rows, size))
    if rows == 0 or size == 0:
        return out
    lists, discounts, left, norms = _prepared(worth, metric, topics, items, topic_weights, lengths)
    blocks = _blocks(topics.shape[1], "BLOCK_R")
    slabs = ceil_div(len(discounts), blocks["BLOCK_R"])
    shares = None if weights is None else weights.contiguous()
    of_lists = (*lists[:3], *lists[4:])  # all but the weights of topics
    arguments = (*of_lists, num_ranked, discounts, left, norms, shares, out, size, topics.shape[1], len(discounts))
    constants = {"DECAY": metric.definition.decay, **blocks}
    launch(topic_scores_kernel, (rows * slabs,), *arguments, slabs, **constants, num_warps=NUM_WARPS)
    return out


def _blocks(columns: int, other: str) -> dict[str, int]:
    """BLOCK_C, and how many lists or ranks a program takes besides."""
    width = next(width for width in WIDTHS if width >= columns)
    return {other: ELEMENTS // width, "BLOCK_C": width}


def _prepared(
    worth: torch.Tensor,
    metric: Metric,
    topics: torch.Tensor,
    items: torch.Tensor | None,
    topic_weights: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[tuple[Any, ...], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The lists as the kernels take them, (n,) discounts, (N, n, C) topics left at each rank, (N,) 1 / normaliser."""
    (rows, size), columns, device, dtype = worth.shape, topics.shape[1], worth.device, worth.dtype
    depth = size if metric.cutoff is None else min(size, metric.cutoff)
    weights = topic_weights.to(dtype).contiguous()
    lists = (
        worth.contiguous(),
        topics.contiguous(),
        None if items is None else items.contiguous(),
        weights,
        lengths.contiguous(),
    )
    blocks = _blocks(columns, "BLOCK_N")
    grid = (ceil_div(rows, blocks["BLOCK_N"]),)
    norms = torch.empty(rows, dtype=dtype, device=device)
    if metric.definition.normaliser == "greedy":
        block_k = next(width for width in SIZES if width >= size)
        exact = discounts_on(metric, size, device, torch.float64)[:depth]
        ties = torch.from_numpy(tie_weights(columns)).to(device)
        scratch = torch.empty(rows, columns, dtype=torch.float64, device=device)
        launch(
            greedy_norm_kernel,
            (rows,),
            *(*lists, exact, ties, scratch, norms, size, columns, depth),
            DECAY=metric.definition.decay,
            BLOCK_K=block_k,
            BLOCK_C=blocks["BLOCK_C"],
            num_warps=NUM_WARPS,
        )
    else:
        launch(intents_norm_kernel, grid, *lists, norms, rows, size, columns, **blocks, num_warps=NUM_WARPS)
        norms = torch.where(norms > 0.0, 1.0 / norms, 0.0)
    left = torch.empty(rows, depth, columns, dtype=dtype, device=device)
    arguments = (*lists, left, rows, size, columns, depth)
    launch(topics_left_kernel, grid, *arguments, DECAY=metric.definition.decay, **blocks, num_warps=NUM_WARPS)
    return lists, discounts_on(metric, size, device, dtype)[:depth], left, norms
