"""Swap scores of all pairs of ranks on the CPU, and their means by weight: parallel numba, O(K^2) per list."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from flexrec.metrics import Metric
from flexrec.numba_kernels import OutOfRange
from flexrec.numba_kernels.threads import follow_torch_threads
from flexrec.numba_kernels.tiles import (
    AVERAGE_PRECISION,
    CASCADE,
    LINEAR,
    Plan,
    arrays_of,
    plan_of,
    term_gains_and_norms,
)


@njit(cache=True, fastmath=False)
def _pair_state(form: int, w: np.ndarray, d: np.ndarray, depth: int, length: int, a: np.ndarray) -> tuple:
    """What the scores of single pairs share where they are not linear: a (K,) is the count of relevant ranks so far
    (FIRST), E (AVERAGE_PRECISION) or P (CASCADE); returned are u of the first and of the second relevant rank (FIRST).
    """
    u_first, u_second, count, passed, reached = 0.0, 0.0, 0.0, 0.0, 1.0
    for k in range(length):
        h = d[k] if k < depth else 0.0
        if form == CASCADE:
            a[k] = reached
            reached *= 1.0 - w[k]
        else:
            count += w[k]
            passed += w[k] * h
            if form == AVERAGE_PRECISION:
                a[k] = h * count - passed
            else:
                a[k] = count
                if w[k] > 0.0 and count == 1.0:
                    u_first = h
                elif w[k] > 0.0 and count == 2.0:
                    u_second = h
    return u_first, u_second


@njit(cache=True, fastmath=False)
def _pair_row(
    form: int, w: np.ndarray, d: np.ndarray, depth: int, length: int, a: np.ndarray, u: tuple, k: int, row: np.ndarray
) -> None:
    """Write S[k, j] times the normaliser to row[j], for all j > k."""
    dk = d[k] if k < depth else 0.0
    between, pass_on = 0.0, 1.0  # CASCADE: M and Q, what lies between k and j
    for j in range(k + 1, length):
        dj = d[j] if j < depth else 0.0
        score = 0.0
        if form == CASCADE:
            score = a[k] * (w[k] - w[j]) * (dk - (between + pass_on * dj))
            between += pass_on * dj * w[j]
            pass_on *= 1.0 - w[j]
        elif w[k] > w[j]:
            if form == AVERAGE_PRECISION:
                score = a[k] - a[j]
            elif a[k] == 1.0:
                score = u[0] - max(u[1], dj)
        elif w[j] > w[k]:
            if form == AVERAGE_PRECISION:
                score = (a[j] + dj) - (a[k] + dk)
            elif a[k] == 0.0:
                score = u[0] - dk
        row[j] = score


@njit(cache=True, fastmath=False)
def _linear_scores(w: np.ndarray, d: np.ndarray, inverse: float, k: int, row: np.ndarray) -> None:
    """Write S[k, j] to row[j] for every j: no case distinction, so that it is done for several j at once."""
    wk, dk = w[k] * inverse, d[k]
    for j in range(len(row)):
        row[j] = (dk - d[j]) * (wk - w[j] * inverse)


# The two means: sums in any order, hence several at once. Their loops begin at 0, as numba guards an index that could
# be negative, and a guarded loop goes element by element.


@njit(cache=True, fastmath={"reassoc", "contract"})
def _linear_mean(wk: float, dk: float, w: np.ndarray, d: np.ndarray, weights: np.ndarray) -> float:
    """The mean of S[k, j] times the normaliser by weight; w, d and weights (n,) are those of the ranks after k."""
    weighted, weight = 0.0, 0.0
    for j in range(len(w)):
        weighted += (dk - d[j]) * (wk - w[j]) * weights[j]
        weight += weights[j]
    return weighted / weight if weight > 0.0 else 0.0


@njit(cache=True, fastmath={"reassoc", "contract"})
def mean_by_weight(scores: np.ndarray, weights: np.ndarray) -> float:
    weighted, weight = 0.0, 0.0
    for j in range(len(scores)):
        weighted += scores[j] * weights[j]
        weight += weights[j]
    return weighted / weight if weight > 0.0 else 0.0


@njit(parallel=True, cache=True, fastmath=False)
def _scores_of_lists(
    w: np.ndarray,  # (N, K) float64, term gains
    inverse_norms: np.ndarray,  # (N,) float64
    lengths: np.ndarray,  # (N,) int64
    ranked: np.ndarray,  # (N,) int64, at most lengths
    plan: Plan,
    weights: np.ndarray,  # (N, K, K) for policy rewards; (0, 0, 0) for the scores themselves
    out: np.ndarray,  # 0s, written: (N, K, K) swap scores, or (N, K, 1) their means over j > k by weight
) -> None:
    is_mean = len(weights) > 0
    for i in prange(len(w)):
        length, shown, inverse = lengths[i], ranked[i], inverse_norms[i]
        depth = min(shown, plan.cutoff)
        if plan.form == LINEAR:
            d = np.zeros(length)
            d[:depth] = plan.discounts[:depth]
            gains = w[i, :length]
            if is_mean:
                for k in range(shown):
                    later = weights[i, k, k + 1 : length]
                    out[i, k, 0] = _linear_mean(gains[k], d[k], gains[k + 1 :], d[k + 1 :], later) * inverse
            else:
                for k in range(length):
                    _linear_scores(gains, d, inverse, k, out[i, k, :length])
            continue
        a, scores = np.empty(length), np.empty(length)
        u = _pair_state(plan.form, w[i], plan.discounts, depth, length, a)
        for k in range(shown):
            _pair_row(plan.form, w[i], plan.discounts, depth, length, a, u, k, scores)
            if is_mean:
                out[i, k, 0] = mean_by_weight(scores[k + 1 :], weights[i, k, k + 1 : length]) * inverse
            else:
                for j in range(k + 1, length):
                    out[i, k, j] = scores[j] * inverse
                    out[i, j, k] = scores[j] * inverse


def swap_scores(
    gains: torch.Tensor,
    metric: Metric,
    *,
    lengths: torch.Tensor | None = None,
    num_ranked: torch.Tensor | None = None,
    max_ranked: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N, K, K) swap scores of a built-in metric, or with ``weights`` (N, K, K) their means over j > k, (N, K).

    Arguments, dtype and errors as of ``swap_rewards``.
    """
    array, length, ranked = arrays_of(gains, lengths, num_ranked, max_ranked)
    rows, size = array.shape
    plan = plan_of(metric, size, gains.dtype)
    is_good, w, inverse_norms = term_gains_and_norms(plan, array, length)
    if not is_good:
        raise OutOfRange("a gain is out of its range")
    shares = np.empty((0, 0, 0), array.dtype)
    if weights is not None:
        shares = weights.to(torch.from_numpy(shares).dtype).contiguous().numpy()
    out = np.zeros((rows, size, size if weights is None else 1), array.dtype)
    follow_torch_threads()
    _scores_of_lists(w, inverse_norms, length, ranked, plan, shares, out)
    return torch.from_numpy(out if weights is None else out[..., 0])
