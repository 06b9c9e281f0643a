"""Swap rewards and scores of a list with topics on the CPU: parallel numba, accumulated in float64.

The closed forms, with their derivation, stand in ``flexrec/ops/swap_reference.py``; names here are those of the
derivation. A list is a matrix a (K, C) of what each item is worth to each topic, and every recurrence runs over the
ranks with all topics side by side: the innermost loops go over C numbers that lie next to each other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange

from flexrec.metrics import TIE, TINY, Metric, discount_table, tie_weights
from flexrec.numba_kernels.swap_scores import mean_by_weight
from flexrec.numba_kernels.threads import follow_torch_threads
from flexrec.numba_kernels.tiles import CREDITS, INDEPENDENT, NONCAUSAL, SEQUENCE, SWAP

_ANY_ORDER = {"reassoc", "contract"}  # sums over topics in any order, hence several at once


class TopicLists(NamedTuple):
    """N lists and their metric, as the kernels take them."""

    worth: np.ndarray  # (N, K) float64, term gains
    matrix: np.ndarray  # (I, C) floating
    items: np.ndarray  # (N, K) int64, rows of the matrix
    topic_weights: np.ndarray  # (N, C) float64
    lengths: np.ndarray  # (N,) int64
    ranked: np.ndarray  # (N,) int64, at most lengths
    discounts: np.ndarray  # (min(K, cutoff),) float64
    decay: float
    ties: np.ndarray  # (C,) the ``tie_weights``; (0,) where the normaliser is the weight of the intents


@njit(cache=True, fastmath=_ANY_ORDER)
def _dot(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for c in range(len(x)):
        total += x[c] * y[c]
    return total


@njit(cache=True, fastmath=False)
def _greedy_value(
    a: np.ndarray, p: np.ndarray, decay: float, discounts: np.ndarray, depth: int, ties: np.ndarray
) -> float:
    """The value of the order that takes at each rank what adds most; ``ties`` (C,) are the ``tie_weights``."""
    size, value = len(a), 0.0
    left, adds, keys, taken = p.copy(), np.empty(size), np.empty(size), np.zeros(size, np.bool_)
    for k in range(size):
        keys[k] = _dot(a[k], ties)
    for rank in range(min(depth, size)):
        best, chosen, key = 0.0, -1, -1.0
        for k in range(size):
            if not taken[k]:
                adds[k] = _dot(a[k], left)
                best = max(best, adds[k])
        for k in range(size):
            if not taken[k] and adds[k] >= best * (1.0 - TIE) and keys[k] > key:
                chosen, key = k, keys[k]
        value += discounts[rank] * best
        taken[chosen] = True
        ac = a[chosen]
        for c in range(len(left)):
            left[c] *= 1.0 - decay * ac[c]
    return value


@njit(cache=True, fastmath=False)
def _weight_of_intents(a: np.ndarray, p: np.ndarray) -> float:
    total = 0.0
    for c in range(len(p)):
        for k in range(len(a)):
            if a[k, c] > 0.0:
                total += p[c]
                break
    return total


@njit(cache=True, fastmath=False)
def _reach(a: np.ndarray, p: np.ndarray, decay: float, reached: np.ndarray) -> None:
    """Fill reached (T, C): the weight of each topic times the share of it that is left at each of the first T ranks."""
    left = p.copy()
    for k in range(len(reached)):
        rk, ak = reached[k], a[k]
        for c in range(len(left)):
            rk[c] = left[c]
            left[c] *= 1.0 - decay * ak[c]


@njit(cache=True, fastmath=_ANY_ORDER)
def _later(a: np.ndarray, d: np.ndarray, decay: float, reached: np.ndarray, out: np.ndarray) -> None:
    """Add to out (K,) the sums of S[k, j] over j > k; d (T,) and reached (T, C) are of the ranks with a discount."""
    columns = a.shape[1]
    first, sx, g1, gx = a[0], np.zeros(columns), np.zeros(columns), np.zeros(columns)
    for k in range(len(a) - 1, -1, -1):
        ak, n = a[k], float(len(a) - k - 1)
        if k >= len(d):
            for c in range(columns):
                sx[c] += ak[c] - first[c]
            continue
        h, rk, total = d[k], reached[k], 0.0
        for c in range(columns):
            x, used = ak[c] - first[c], decay * ak[c]
            total += rk[c] * (h * (n * x - sx[c]) - x * g1[c] + gx[c])
            g1[c] = h + h * used * n + (1.0 - used) * g1[c]
            gx[c] = x * h + h * used * sx[c] + (1.0 - used) * gx[c]
            sx[c] += x
        out[k] += total


@njit(cache=True, fastmath=_ANY_ORDER)
def _earlier(a: np.ndarray, p: np.ndarray, d: np.ndarray, decay: float, out: np.ndarray) -> None:
    """Add to out (K,) the sums of S[j, k] over j < k."""
    columns = a.shape[1]
    first, reached = a[0], p.copy()
    a1, ax, b1, bx, c1, cx = np.zeros((6, columns))
    for k in range(len(a)):
        ak, total = a[k], 0.0
        h = d[k] if k < len(d) else 0.0
        for c in range(columns):
            x, used, r = ak[c] - first[c], decay * ak[c], reached[c]
            total += (ax[c] - bx[c] - cx[c] * h) - x * (a1[c] - b1[c] - c1[c] * h)
            a1[c] += r * h
            ax[c] += r * x * h
            b1[c] += c1[c] * h * used
            bx[c] += cx[c] * h * used
            c1[c] = c1[c] * (1.0 - used) + r
            cx[c] = cx[c] * (1.0 - used) + r * x
            reached[c] = r * (1.0 - used)
        out[k] += total


@njit(cache=True, fastmath=_ANY_ORDER)
def _score_row(a: np.ndarray, d: np.ndarray, decay: float, reached: np.ndarray, k: int, row: np.ndarray) -> None:
    """Write S[k, j] times the normaliser to row[j] for all j > k; k is a rank with a discount."""
    columns = a.shape[1]
    ak, weight = a[k], np.empty(columns)  # P (d_k - alpha M)
    passing = reached[k].copy()  # P Q
    for c in range(columns):
        weight[c] = reached[k, c] * d[k]
    for j in range(k + 1, len(a)):
        aj, total = a[j], 0.0
        if j < len(d):
            h = d[j]
            for c in range(columns):
                total += (ak[c] - aj[c]) * (weight[c] - passing[c] * h)
                used = decay * aj[c]
                weight[c] -= passing[c] * used * h
                passing[c] *= 1.0 - used
            row[j] = total
        else:
            for c in range(columns):
                total += (ak[c] - aj[c]) * weight[c]
            row[j] = total


@njit(cache=True, fastmath=False)
def _read_list(x: TopicLists, i: int) -> tuple[np.ndarray, float]:
    """(K, C) what each item of list i is worth to each topic; 1 / normaliser, 0 for a list without a positive gain."""
    a, p = np.empty((x.lengths[i], x.matrix.shape[1])), x.topic_weights[i]
    for k in range(len(a)):
        w, about, ak = x.worth[i, k], x.matrix[x.items[i, k]], a[k]
        for c in range(len(ak)):
            ak[c] = w * about[c]
    if len(x.ties):
        norm = _greedy_value(a, p, x.decay, x.discounts, len(x.discounts), x.ties)
    else:
        norm = _weight_of_intents(a, p)
    return a, 1.0 / norm if norm > TINY else 0.0


@njit(cache=True, fastmath=False)
def _rewards_of_list(
    a: np.ndarray, p: np.ndarray, d: np.ndarray, decay: float, credit: int, rewards: np.ndarray
) -> None:
    """Add the rewards but for the normaliser to (K,) 0s; a (K, C), p (C,), d (T,) of the ranks with a discount."""
    size, depth = len(a), len(d)
    reached = np.empty((depth, a.shape[1]))
    _reach(a, p, decay, reached)
    if credit in (SWAP, NONCAUSAL):
        _later(a, d, decay, reached, rewards)
        if credit == NONCAUSAL:
            _earlier(a, p, d, decay, rewards)
        for k in range(size):
            others = size - 1 if credit == NONCAUSAL else size - 1 - k
            rewards[k] /= max(1, others)
        return
    for k in range(depth):
        rewards[k] = d[k] * _dot(a[k], reached[k])
    if credit != INDEPENDENT:
        for k in range(depth - 2, -1, -1):
            rewards[k] += rewards[k + 1]
    if credit == SEQUENCE:
        rewards[:] = rewards[0]


@njit(parallel=True, cache=True, fastmath=False)
def _rewards_of_lists(x: TopicLists, credit: int, out: np.ndarray) -> None:
    """Fill out (N, K), which holds 0s."""
    for i in prange(len(x.worth)):
        shown = x.ranked[i]
        if shown > 0:
            a, inverse = _read_list(x, i)
            rewards, d = np.zeros(len(a)), x.discounts[: min(shown, len(x.discounts))]
            _rewards_of_list(a, x.topic_weights[i], d, x.decay, credit, rewards)
            for k in range(shown):
                out[i, k] = rewards[k] * inverse


@njit(parallel=True, cache=True, fastmath=False)
def _scores_of_lists(x: TopicLists, weights: np.ndarray, out: np.ndarray) -> None:
    """``weights`` and ``out`` as of the same in ``swap_scores``."""
    for i in prange(len(x.worth)):
        d = x.discounts[: min(x.ranked[i], len(x.discounts))]
        a, inverse = _read_list(x, i)
        row, reached = np.empty(len(a)), np.empty((len(d), a.shape[1]))
        _reach(a, x.topic_weights[i], x.decay, reached)
        for k in range(len(d)):  # from there on nothing is lost by an exchange
            _score_row(a, d, x.decay, reached, k, row)
            if len(weights):
                out[i, k, 0] = mean_by_weight(row[k + 1 :], weights[i, k, k + 1 : len(a)]) * inverse
            else:
                for j in range(k + 1, len(a)):
                    out[i, k, j] = row[j] * inverse
                    out[i, j, k] = row[j] * inverse


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
        worth: (N, K) float64, what the metric makes of each gain, in rank order.
        topics, items, topic_weights: (I, C) floating, (N, K) int64 or None, (N, C): the fields of ``Topics``.
        metric, credit: as for ``flexrec.swap_rewards``; no ``credit="policy"``.
        lengths, num_ranked: (N,) int64, the latter at most the former.

    Returns:
        (N, K) float64.
    """
    out = np.zeros(tuple(worth.shape))
    lists = _lists_of(worth, metric, topics, items, topic_weights, lengths, num_ranked)
    _rewards_of_lists(lists, CREDITS[credit], out)
    return torch.from_numpy(out)


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
    """(N, K, K) float64 swap scores, or with ``weights`` (N, K, K) their means over j > k, (N, K)."""
    rows, size = worth.shape
    out = np.zeros((rows, size, size if weights is None else 1))
    shares = np.empty((0, 0, 0)) if weights is None else weights.double().contiguous().numpy()
    lists = _lists_of(worth, metric, topics, items, topic_weights, lengths, num_ranked)
    _scores_of_lists(lists, shares, out)
    return torch.from_numpy(out if weights is None else out[..., 0])


def _lists_of(
    worth: torch.Tensor,
    metric: Metric,
    topics: torch.Tensor,
    items: torch.Tensor | None,
    topic_weights: torch.Tensor,
    lengths: torch.Tensor,
    num_ranked: torch.Tensor,
) -> TopicLists:
    follow_torch_threads()
    if topics.dtype not in (torch.float32, torch.float64):
        topics = topics.float()
    if items is None:
        items = torch.arange(worth.numel()).view(worth.shape)
    tensors = (worth, topics, items, topic_weights, lengths, num_ranked)
    definition, size = metric.definition, worth.shape[1]
    depth = size if metric.cutoff is None else min(size, metric.cutoff)
    ties = tie_weights(topics.shape[1] if definition.normaliser == "greedy" else 0)
    arrays = (tensor.contiguous().numpy() for tensor in tensors)
    discounts = discount_table(metric, size)[:depth].copy()
    return TopicLists._make((*arrays, discounts, definition.decay, ties))
