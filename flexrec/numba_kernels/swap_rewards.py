"""Swap rewards on the CPU: parallel numba, eight lists side by side, accumulated in float64.

The closed forms, with their derivation, stand in ``flexrec/ops/swap_reference.py``; names here are those of the
derivation, and every variable of a recurrence is the lanes of eight lists. Each list is read once and written once:
check, term gains, ideal DCG and rewards are computed while it lies in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange

from flexrec.metrics import Metric
from flexrec.numba_kernels import OutOfRange
from flexrec.numba_kernels.lane_sort import padded_rows
from flexrec.numba_kernels.lanes import LANES, load, spread, store, where
from flexrec.numba_kernels.swap_variance import variance_of_lists, variance_of_lists_in_parallel
from flexrec.numba_kernels.tiles import (
    AVERAGE_PRECISION,
    CASCADE,
    CREDITS,
    FIRST,
    GAIN,
    INDEPENDENT,
    LINEAR,
    NONCAUSAL,
    SEQUENCE,
    SWAP,
    Plan,
    arrays_of,
    counts,
    discount,
    longest,
    plan_of,
    prepare,
    run_over_lists,
    write_lists,
)


@njit(cache=True, fastmath=False)
def _linear_sums(w: np.ndarray, d: np.ndarray, depth: Any, length: Any, both: bool, later: np.ndarray) -> None:
    size = len(w)
    base = load(w, 0)  # differences do not feel a constant, sums do
    sw, sd, sdw = spread(0.0), spread(0.0), spread(0.0)
    for k in range(size - 1, -1, -1):
        x, h = where(k < length, load(w, k) - base, 0.0), discount(d, k, depth)
        n = length - (k + 1)
        store(later, k, h * (n * x - sw) - (x * sd - sdw))
        sw, sd, sdw = sw + x, sd + h, sdw + h * x
    if both:
        sw, sd, sdw = spread(0.0), spread(0.0), spread(0.0)
        for k in range(size):
            x, h = where(k < length, load(w, k) - base, 0.0), discount(d, k, depth)
            store(later, k, load(later, k) + (h * (k * x - sw) - (x * sd - sdw)))
            sw, sd, sdw = sw + x, sd + h, sdw + h * x


@njit(cache=True, fastmath=False)
def _first_sums(w: np.ndarray, d: np.ndarray, depth: Any, length: Any, both: bool, later: np.ndarray) -> None:
    size = len(w)
    count, d_first, d_second = spread(0.0), spread(0.0), spread(0.0)
    for k in range(size):
        hit = load(w, k) * discount(d, k, depth)
        d_first += where(count == 0.0, hit, 0.0)
        d_second += where(count == 1.0, hit, 0.0)
        count += load(w, k)
    relevant, behind = count, spread(0.0)
    for k in range(size - 1, -1, -1):  # count: relevant items among the first k + 1
        h, one = discount(d, k, depth), load(w, k)
        fall = d_first - where(h > d_second, h, d_second)
        behind += where(k < length, where(count > one, (1.0 - one) * fall, 0.0), 0.0)
        later_of_first = where(count == 1.0, one * behind, 0.0)
        store(later, k, where(count == 0.0, relevant * (d_first - h), later_of_first))
        count = count - one
    if both:
        ahead = spread(0.0)
        for k in range(size):
            h, one = discount(d, k, depth), load(w, k)
            count += one
            ahead += where(count == 0.0, d_first - h, 0.0)
            fall = d_first - where(h > d_second, h, d_second)
            earlier = where(count > 0.0, one * ahead + (1.0 - one) * fall, 0.0)
            store(later, k, load(later, k) + earlier)


@njit(cache=True, fastmath=False)
def _average_precision_sums(
    w: np.ndarray, d: np.ndarray, depth: Any, length: Any, both: bool, later: np.ndarray
) -> None:
    size = len(w)
    count, passed = spread(0.0), spread(0.0)
    for k in range(size):  # E, which `later` holds until each rank's sum replaces it
        one, h = load(w, k), discount(d, k, depth)
        count, passed = count + one, passed + one * h
        store(later, k, h * count - passed)
    sum_e, sum_f, ones, zeros = spread(0.0), spread(0.0), spread(0.0), spread(0.0)
    for k in range(size - 1, -1, -1):
        one, e = load(w, k), load(later, k)
        zero, f = where(k < length, 1.0 - one, 0.0), e + discount(d, k, depth)
        store(later, k, one * (zeros * e - sum_e) + zero * (sum_f - ones * f))
        sum_e, sum_f, ones, zeros = sum_e + zero * e, sum_f + one * f, ones + one, zeros + zero
    if both:
        count, passed = spread(0.0), spread(0.0)
        sum_e, sum_f, ones, zeros = spread(0.0), spread(0.0), spread(0.0), spread(0.0)
        for k in range(size):
            one, h = load(w, k), discount(d, k, depth)
            zero = where(k < length, 1.0 - one, 0.0)
            count, passed = count + one, passed + one * h
            e = h * count - passed
            f = e + h
            earlier = zero * (sum_e - ones * e) + one * (zeros * f - sum_f)
            store(later, k, load(later, k) + earlier)
            sum_e, sum_f, ones, zeros = sum_e + one * e, sum_f + zero * f, ones + one, zeros + zero


@njit(cache=True, fastmath=False)
def _cascade_sums(w: np.ndarray, d: np.ndarray, depth: Any, length: Any, both: bool, later: np.ndarray) -> None:
    size = len(w)
    base = load(w, 0)
    gamma1, gammax, behind = spread(0.0), spread(0.0), spread(0.0)
    for k in range(size - 1, -1, -1):
        theta, h = load(w, k), discount(d, k, depth)
        x, n = where(k < length, theta - base, 0.0), length - (k + 1)
        store(later, k, h * (n * x - behind) - x * gamma1 + gammax)  # P is still to come
        gamma1 = h + h * theta * n + (1.0 - theta) * gamma1
        gammax = x * h + h * theta * behind + (1.0 - theta) * gammax
        behind += x
    # Forwards: P, and (for the sums over earlier ranks) A, B and C, each for y = 1 and y = x.
    reached = spread(1.0)
    a1, b1, c1, ax, bx, cx = spread(0.0), spread(0.0), spread(0.0), spread(0.0), spread(0.0), spread(0.0)
    for k in range(size):
        theta = load(w, k)
        total = reached * load(later, k)
        if both:
            h, x = discount(d, k, depth), where(k < length, theta - base, 0.0)
            total += (ax - bx - cx * h) - x * (a1 - b1 - c1 * h)
            a1, ax = a1 + reached * h, ax + reached * x * h
            b1, bx = b1 + c1 * h * theta, bx + cx * h * theta
            c1, cx = c1 * (1.0 - theta) + reached, cx * (1.0 - theta) + reached * x
        store(later, k, total)
        reached = reached * (1.0 - theta)


@njit(cache=True, fastmath=False)
def _terms(form: int, w: np.ndarray, d: np.ndarray, depth: Any, terms: np.ndarray) -> None:
    """What R gains when rank k is shown besides the ranks before it."""
    count, reached = spread(0.0), spread(1.0)
    for k in range(len(w)):
        term = load(w, k) * discount(d, k, depth)
        count += load(w, k)
        if form == CASCADE:
            term = term * reached
            reached = reached * (1.0 - load(w, k))
        elif form == AVERAGE_PRECISION:
            term = term * count
        elif form == FIRST:
            term = where(count == 1.0, term, 0.0)
        store(terms, k, term)


@njit(cache=True, fastmath=False)
def _unscaled_rewards(
    form: int, credit: int, w: np.ndarray, d: np.ndarray, depth: Any, length: Any, out: np.ndarray
) -> None:
    """Rewards but for the normaliser and the division by the number of swaps."""
    both = credit == NONCAUSAL
    if credit >= INDEPENDENT:
        _terms(form, w, d, depth, out)
        if credit != INDEPENDENT:
            tail = spread(0.0)
            for k in range(len(w) - 1, -1, -1):
                tail += load(out, k)
                store(out, k, tail)
        if credit == SEQUENCE:
            for k in range(1, len(w)):
                store(out, k, load(out, 0))
    elif form == LINEAR:
        _linear_sums(w, d, depth, length, both, out)
    elif form == FIRST:
        _first_sums(w, d, depth, length, both, out)
    elif form == AVERAGE_PRECISION:
        _average_precision_sums(w, d, depth, length, both, out)
    else:
        _cascade_sums(w, d, depth, length, both, out)


@njit(cache=True, fastmath=False)
def _scale(credit: int, rewards: np.ndarray, length: Any, shown: Any, inverse: Any, tile: np.ndarray) -> None:
    """Divide by the number of swaps, multiply by 1 / normaliser, set to 0 what is not shown."""
    if credit == NONCAUSAL:
        inverse = inverse * (1.0 / where(length > 1.0, length - 1.0, 1.0))
    for k in range(len(rewards)):
        reward = load(rewards, k) * inverse
        if credit == SWAP:
            n = length - (k + 1.0)
            reward = reward * (1.0 / max(n, 1.0))
        store(tile, k, where(k < shown, reward, 0.0))


@njit(cache=True, fastmath=False)
def _rewards_of_eight(
    gains: np.ndarray,
    first: int,
    length: Any,
    shown: Any,
    n: int,
    plan: Plan,
    credit: int,
    tile: np.ndarray,
    w: np.ndarray,
    sums: np.ndarray,
) -> bool:
    """Leave rewards in the tile. ``length`` and ``shown`` are lanes, or numbers where all eight lists have the same,
    which saves the masks."""
    is_good, inverse, _ = prepare(plan, gains, first, length, n, tile, w)
    depth = min(shown, float(plan.cutoff))
    _unscaled_rewards(plan.form, credit, w, plan.discounts, depth, length, sums)
    _scale(credit, sums, length, shown, inverse, tile)
    return is_good


@njit(cache=True, fastmath=False)
def _all_same(counts: np.ndarray, first: int) -> bool:
    """Whether the lists first .. first + 7, those that there are, have the same count."""
    same = True
    for row in range(first, min(first + LANES, len(counts))):
        same &= counts[row] == counts[first]
    return same


@njit(cache=True, fastmath=False)
def rewards_of_lists(
    gains: np.ndarray,  # (N, K) float32 or float64
    lengths: np.ndarray,  # (N,) int64
    ranked: np.ndarray,  # (N,) int64, at most lengths
    plan: Plan,
    credit: int,
    rewards: np.ndarray,  # (N, K), written
    begin: int,
    end: int,
) -> bool:
    """Rewards of the lists 8 x begin .. 8 x end - 1, for every credit but "policy". Returned: whether their gains all
    lie in [0, plan.high]; if not, the rewards mean nothing."""
    size = gains.shape[1]
    tile = np.zeros((padded_rows(size), LANES), dtype=gains.dtype)
    w, sums = np.empty((size, LANES)), np.empty((size, LANES))
    all_good = True
    for first in range(begin * LANES, min(end * LANES, len(gains)), LANES):
        n, shown = lengths[first], ranked[first]
        if _all_same(lengths, first) and _all_same(ranked, first):
            is_good = _rewards_of_eight(gains, first, float(n), float(shown), n, plan, credit, tile, w, sums)
        else:
            n = longest(lengths, first)
            length, shown_lanes = counts(lengths, first), counts(ranked, first)
            is_good = _rewards_of_eight(gains, first, length, shown_lanes, n, plan, credit, tile, w, sums)
        all_good = all_good and is_good
        write_lists(tile, first, rewards)
    return all_good


@njit(parallel=True, cache=True, fastmath=False)
def rewards_of_lists_in_parallel(
    gains: np.ndarray,
    lengths: np.ndarray,
    ranked: np.ndarray,
    plan: Plan,
    credit: int,
    rewards: np.ndarray,
    is_good: np.ndarray,  # (pieces that threads share out among themselves,), what each returned
) -> None:
    """``rewards_of_lists`` of all lists."""
    pieces, tiles = len(is_good), (len(gains) + LANES - 1) // LANES
    for i in prange(pieces):
        begin, end = i * tiles // pieces, (i + 1) * tiles // pieces
        is_good[i] = rewards_of_lists(gains, lengths, ranked, plan, credit, rewards, begin, end)


def swap_rewards(
    gains: torch.Tensor,
    metric: Metric,
    credit: str,
    *,
    lengths: torch.Tensor | None = None,
    num_ranked: torch.Tensor | None = None,
    max_ranked: int,
    variance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rewards of a built-in metric, and their variance where that of the gains is given.

    Args:
        gains: (N, K) floating, rank order.
        metric, credit: as for ``flexrec.swap_rewards``; no ``credit="policy"``.
        lengths, num_ranked: (N,) int64 or None; ``max_ranked`` bounds both.
        variance: (N, K) of the gains, for linear metrics and err; binary ones then read gains as probabilities.

    Returns:
        (N, K) rewards, float64 for float64 gains, else float32, and their variance (float64), or None.

    Raises:
        OutOfRange: a gain or variance inside its list's length is out of its range.
    """
    array, length, ranked = arrays_of(gains, lengths, num_ranked, max_ranked)
    plan, variances = plan_of(metric, gains.shape[1], gains.dtype), None
    if variance is not None and metric.definition.gain == "binary":
        plan = plan._replace(gain=GAIN, high=1.0)
    options = length, ranked, plan, CREDITS[credit]
    rewards = np.empty_like(array)
    is_good = run_over_lists(rewards_of_lists, rewards_of_lists_in_parallel, array, *options, rewards)
    if variance is not None and is_good:
        array, spots = (x.double().contiguous().numpy() for x in (gains, variance))
        variances = np.empty_like(array)
        both = variance_of_lists, variance_of_lists_in_parallel
        is_good = run_over_lists(*both, array, spots, *options, variances)
    if not is_good:
        raise OutOfRange("a gain or its variance is out of its range")
    return torch.from_numpy(rewards), None if variances is None else torch.from_numpy(variances)
