"""Swap rewards on the CPU: parallel numba, one pass per list, accumulated in float64.

The closed forms, with their derivation, stand in ``flexrec/ops/swap_rewards_torch.py``; names here are those of the
derivation. A kernel gets a metric as plain numbers: its form, the kind of its term gains, its discount table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from numba import njit, prange

LINEAR, FIRST, AVERAGE_PRECISION, CASCADE = 0, 1, 2, 3
FORMS = {"linear": LINEAR, "first": FIRST, "average_precision": AVERAGE_PRECISION, "cascade": CASCADE}
GAIN, BURGES, SCALED, BINARY = 0, 1, 2, 3
GAINS = {"gain": GAIN, "burges": BURGES, "burges_scaled": SCALED, "stop": SCALED, "binary": BINARY}
SWAP, NONCAUSAL, INDEPENDENT, RANK, SEQUENCE = 0, 1, 2, 3, 4
CREDITS = {"swap": SWAP, "noncausal": NONCAUSAL, "independent": INDEPENDENT, "rank": RANK, "sequence": SEQUENCE}

LN2 = math.log(2.0)


@njit(cache=True)
def all_within(gains: np.ndarray, lengths: np.ndarray, high: float) -> bool:
    """Whether every gain (N, K) inside its list's length is a number in [0, high]. Not worth waking threads for."""
    for row in range(gains.shape[0]):
        inside = gains[row, : lengths[row]]
        outside = False
        for k in range(len(inside)):
            outside |= not (inside[k] >= 0.0 and inside[k] <= high)
        if outside:
            return False
    return True


@njit(cache=True)
def _term_gains(gains: np.ndarray, length: int, kind: int, max_gain: float, w: np.ndarray) -> float:
    """Write the term gains of one list (K,) to w (K,) float64; return their sum. ``max_gain`` 0: the list's own."""
    total = 0.0
    if kind == GAIN:
        for k in range(length):
            w[k] = gains[k]
            total += w[k]
        return total
    if kind == BINARY:
        for k in range(length):
            w[k] = 1.0 if gains[k] > 0.0 else 0.0
            total += w[k]
        return total
    top = max_gain
    if kind == SCALED and max_gain == 0.0:
        for k in range(length):
            top = max(top, float(gains[k]))
    scale = math.exp(-top * LN2) if kind == SCALED else 1.0
    for k in range(length):
        g = float(gains[k])
        if top > 500.0:  # 2^g may overflow, and the 1 no longer shows
            w[k] = math.exp((g - top) * LN2)
        elif g > 0.25:
            w[k] = (math.exp(g * LN2) - 1.0) * scale
        else:  # where 2^g - 1 would lose digits
            w[k] = math.expm1(g * LN2) * scale
        total += w[k]
    return total


@njit(cache=True)
def _exchange(high: np.ndarray, low: np.ndarray) -> None:
    for e in range(len(high)):
        a, b = high[e], low[e]
        high[e] = a if a > b else b
        low[e] = b if a > b else a


@njit(cache=True)
def _sort_columns_descending(flat: np.ndarray, n: int, lanes: int) -> None:
    """Sort every column of the (n, lanes) integers in ``flat``: Batcher's odd-even merge sort.

    Which entries it compares does not depend on the data, so all columns go through it together, and a whole run of
    rows is one SIMD minimum and maximum.
    """
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                if j ^ (j + k) < 2 * p:  # both in the same block of 2p rows
                    run = min(k, n - j - k) * lanes
                    _exchange(flat[j * lanes : j * lanes + run], flat[(j + k) * lanes : (j + k) * lanes + run])
            k //= 2
        p *= 2


@njit(parallel=True, cache=True)
def ideal_dcg(
    gains: np.ndarray,
    bits: np.ndarray,  # gains viewed as integers: of numbers >= 0 the order is the same, and integers sort faster
    lengths: np.ndarray,
    discounts: np.ndarray,
    cutoff: int,
    kind: int,
    lanes_per_tile: int,
) -> np.ndarray:
    """(N,) float64: discounted sum of each list's term gains in the best order, over the first ``cutoff`` ranks."""
    rows = gains.shape[0]
    ideal = np.zeros(rows)
    for t in prange((rows + lanes_per_tile - 1) // lanes_per_tile):
        first = t * lanes_per_tile
        lanes = min(lanes_per_tile, rows - first)
        longest = 0
        for lane in range(lanes):
            longest = max(longest, lengths[first + lane])
        flat = np.zeros(longest * lanes, dtype=bits.dtype)
        for lane in range(lanes):
            for k in range(lengths[first + lane]):
                flat[k * lanes + lane] = bits[first + lane, k]
        _sort_columns_descending(flat, longest, lanes)
        ordered = flat.view(gains.dtype).reshape(longest, lanes)
        depth = min(longest, cutoff)
        sums = ideal[first : first + lanes]
        if kind == GAIN:  # by rows, which SIMD likes
            for k in range(depth):
                best = ordered[k]
                for lane in range(lanes):
                    sums[lane] += best[lane] * discounts[k]
        else:
            w = np.empty(depth)
            for lane in range(lanes):
                _term_gains(ordered[:, lane], depth, kind, 0.0, w)
                for k in range(depth):
                    sums[lane] += w[k] * discounts[k]
    return ideal


@njit(cache=True)
def _linear_sums(
    w: np.ndarray, d: np.ndarray, depth: int, length: int, later: np.ndarray, earlier: np.ndarray, both: bool
) -> None:
    base = w[length - 1]  # differences do not feel a constant, sums do
    sw, sd, sdw = 0.0, 0.0, 0.0
    for k in range(length - 1, depth - 1, -1):
        later[k] = 0.0
        sw += w[k] - base
    for k in range(depth - 1, -1, -1):
        x = w[k] - base
        later[k] = d[k] * ((length - 1 - k) * x - sw) - (x * sd - sdw)
        sw += x
        sd += d[k]
        sdw += d[k] * x
    if both:
        sw, sd, sdw = 0.0, 0.0, 0.0
        for k in range(length):
            x = w[k] - base
            dk = d[k] if k < depth else 0.0
            earlier[k] = dk * (k * x - sw) - (x * sd - sdw)
            sw += x
            sd += dk
            sdw += dk * x


@njit(cache=True)
def _first_sums(
    w: np.ndarray, d: np.ndarray, depth: int, length: int, later: np.ndarray, earlier: np.ndarray, both: bool
) -> None:
    first, second, relevant = length, length, 0
    for k in range(length):
        if w[k] > 0.0:
            relevant += 1
            if relevant == 1:
                first = k
            elif relevant == 2:
                second = k
    u_first = d[first] if first < depth else 0.0
    u_second = d[second] if second < depth else 0.0
    ahead, behind = 0.0, 0.0
    for k in range(length):
        u = d[k] if k < depth else 0.0
        fall = u_first - max(u_second, u)  # what moving the first relevant item back to k costs
        later[k] = 0.0
        earlier[k] = 0.0
        if k < first:
            later[k] = relevant * (u_first - u)
            ahead += u_first - u
        elif w[k] > 0.0:
            earlier[k] = ahead
        else:
            earlier[k] = fall
            behind += fall
    if first < length:
        later[first] = behind


@njit(cache=True)
def _average_precision_sums(
    w: np.ndarray, d: np.ndarray, depth: int, length: int, later: np.ndarray, earlier: np.ndarray, both: bool
) -> None:
    # `later` holds E at relevant ranks and F elsewhere, `earlier` F at relevant ranks and E elsewhere, until each
    # rank's sums replace them: rank k needs its own pair and sums of the other ranks' only.
    count, passed = 0, 0.0
    sum_e, sum_f, ones, zeros = 0.0, 0.0, 0, 0
    for k in range(length):
        h = d[k] if k < depth else 0.0
        if w[k] > 0.0:
            count += 1
            passed += h
            e = h * count - passed
            f = e + h
            later[k] = e
            earlier[k] = zeros * f - sum_f
            sum_e += e
            ones += 1
        else:
            e = h * count - passed
            f = e + h
            later[k] = f
            earlier[k] = sum_e - ones * e
            sum_f += f
            zeros += 1
    total_f, total_e, ones, zeros = 0.0, 0.0, 0, 0  # behind k: sums of F at relevant ranks, of E at the others
    for k in range(length - 1, -1, -1):
        h = d[k] if k < depth else 0.0
        if w[k] > 0.0:
            e = later[k]
            later[k] = zeros * e - total_e
            total_f += e + h
            ones += 1
        else:
            f = later[k]
            later[k] = total_f - ones * f
            total_e += f - h
            zeros += 1


@njit(cache=True)
def _cascade_sums(
    w: np.ndarray, d: np.ndarray, depth: int, length: int, later: np.ndarray, earlier: np.ndarray, both: bool
) -> None:
    base = w[0]  # x = theta - base
    # Forwards: P, and (for the sums over earlier ranks) A, B and C, each for y = 1 and y = x.
    reached = 1.0
    a1, b1, c1, ax, bx, cx = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for k in range(length):
        h = d[k] if k < depth else 0.0
        theta, x = w[k], w[k] - base
        later[k] = reached
        if both:
            earlier[k] = (ax - bx - cx * h) - x * (a1 - b1 - c1 * h)
            a1 += reached * h
            ax += reached * x * h
            b1 += c1 * h * theta
            bx += cx * h * theta
            c1 = c1 * (1.0 - theta) + reached
            cx = cx * (1.0 - theta) + reached * x
        reached *= 1.0 - theta
    # Backwards: Gamma of 1 and of x.
    gamma1, gammax, behind = 0.0, 0.0, 0.0
    for k in range(length - 1, -1, -1):
        h = d[k] if k < depth else 0.0
        theta, x = w[k], w[k] - base
        n = length - 1 - k
        later[k] *= h * (n * x - behind) - x * gamma1 + gammax
        gamma1 = h + h * theta * n + (1.0 - theta) * gamma1
        gammax = x * h + h * theta * behind + (1.0 - theta) * gammax
        behind += x


@njit(cache=True)
def _terms(form: int, w: np.ndarray, d: np.ndarray, depth: int, length: int, terms: np.ndarray) -> None:
    count, reached = 0.0, 1.0
    for k in range(length):
        h = d[k] if k < depth else 0.0
        if form == LINEAR:
            terms[k] = h * w[k]
        elif form == CASCADE:
            terms[k] = h * w[k] * reached
            reached *= 1.0 - w[k]
        else:
            count += w[k]
            is_counted = form == AVERAGE_PRECISION or count == 1.0
            terms[k] = h * w[k] * (count if form == AVERAGE_PRECISION else 1.0) if is_counted else 0.0


@njit(parallel=True, cache=True)
def swap_rewards(
    gains: np.ndarray,  # (N, K) float32 or float64
    lengths: np.ndarray,  # (N,) int64
    ranked: np.ndarray,  # (N,) int64, at most lengths
    inverse_norms: np.ndarray,  # (N,) float64, or empty: 1 / sum of the list's term gains
    discounts: np.ndarray,  # (K,) float64
    cutoff: int,
    form: int,
    gain_kind: int,
    max_gain: float,
    credit: int,
    chunks: int,  # pieces of the batch, a few per thread
) -> np.ndarray:
    """(N, K) rewards in the dtype of the gains, for every credit but "policy"."""
    rows, size = gains.shape
    rewards = np.empty_like(gains)
    reciprocal = np.zeros(size + 1)  # a multiplication is four times as fast as a division
    for n in range(1, size + 1):
        reciprocal[n] = 1.0 / n
    for chunk in prange(chunks):
        w, later, earlier = np.empty(size), np.empty(size), np.empty(size)
        for row in range(chunk * rows // chunks, (chunk + 1) * rows // chunks):
            length, shown = lengths[row], ranked[row]
            depth = min(shown, cutoff)
            total = _term_gains(gains[row], length, gain_kind, max_gain, w)
            if len(inverse_norms):
                inverse = inverse_norms[row]
            else:
                inverse = 1.0 / total if total > 0.0 else 0.0
            both = credit == NONCAUSAL
            if credit >= INDEPENDENT:
                _terms(form, w, discounts, depth, length, later)
                if credit != INDEPENDENT:
                    for k in range(length - 2, -1, -1):
                        later[k] += later[k + 1]
            elif length > 0:
                if form == LINEAR:
                    _linear_sums(w, discounts, depth, length, later, earlier, both)
                elif form == FIRST:
                    _first_sums(w, discounts, depth, length, later, earlier, both)
                elif form == AVERAGE_PRECISION:
                    _average_precision_sums(w, discounts, depth, length, later, earlier, both)
                else:
                    _cascade_sums(w, discounts, depth, length, later, earlier, both)
            out = rewards[row]
            if credit == SWAP:
                for k in range(shown):
                    out[k] = later[k] * reciprocal[length - 1 - k] * inverse
            elif credit == NONCAUSAL:
                for k in range(shown):
                    out[k] = (later[k] + earlier[k]) * reciprocal[length - 1] * inverse
            elif credit == SEQUENCE:
                for k in range(shown):
                    out[k] = later[0] * inverse
            else:
                for k in range(shown):
                    out[k] = later[k] * inverse
            out[shown:] = 0.0
    return rewards


@njit(cache=True)
def _pair_state(form: int, w: np.ndarray, d: np.ndarray, depth: int, length: int, a: np.ndarray) -> tuple:
    """What the scores of single pairs share: a (K,) is the count of relevant ranks so far (FIRST), E
    (AVERAGE_PRECISION) or P (CASCADE); returned are u of the first and of the second relevant rank (FIRST)."""
    u_first, u_second, count, passed, reached = 0.0, 0.0, 0.0, 0.0, 1.0
    for k in range(length):
        h = d[k] if k < depth else 0.0
        if form == CASCADE:
            a[k] = reached
            reached *= 1.0 - w[k]
        elif form != LINEAR:
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


@njit(cache=True)
def _pair_row(
    form: int, w: np.ndarray, d: np.ndarray, depth: int, length: int, a: np.ndarray, u: tuple, k: int, row: np.ndarray
) -> None:
    """Write S[k, j] times the normaliser to row[j], for all j > k."""
    dk = d[k] if k < depth else 0.0
    between, pass_on = 0.0, 1.0  # CASCADE: M and Q, what lies between k and j
    for j in range(k + 1, length):
        dj = d[j] if j < depth else 0.0
        score = 0.0
        if form == LINEAR:
            score = (dk - dj) * (w[k] - w[j])
        elif form == CASCADE:
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


@njit(parallel=True, cache=True)
def swap_scores(
    gains: np.ndarray,
    lengths: np.ndarray,
    ranked: np.ndarray,
    inverse_norms: np.ndarray,
    discounts: np.ndarray,
    cutoff: int,
    form: int,
    gain_kind: int,
    max_gain: float,
    weights: np.ndarray,  # (N, K, K) in the dtype of the gains for policy rewards; (0, 0, 0) for the scores themselves
) -> np.ndarray:
    """(N, K, K) swap scores, or (N, K, 1) their means over j > k by weight; arguments as in ``swap_rewards``."""
    rows, size = gains.shape
    is_mean = len(weights) > 0
    out = np.zeros((rows, size, 1 if is_mean else size), dtype=gains.dtype)
    for i in prange(rows):
        w, a, scores = np.empty(size), np.empty(size), np.empty(size)
        length, shown = lengths[i], ranked[i]
        depth = min(shown, cutoff)
        total = _term_gains(gains[i], length, gain_kind, max_gain, w)
        if len(inverse_norms):
            inverse = inverse_norms[i]
        else:
            inverse = 1.0 / total if total > 0.0 else 0.0
        u = _pair_state(form, w, discounts, depth, length, a)
        for k in range(shown):
            _pair_row(form, w, discounts, depth, length, a, u, k, scores)
            if is_mean:
                weighted, weight = 0.0, 0.0
                for j in range(k + 1, length):
                    weighted += scores[j] * weights[i, k, j]
                    weight += weights[i, k, j]
                out[i, k, 0] = weighted / weight * inverse if weight > 0.0 else 0.0
            else:
                for j in range(k + 1, length):
                    out[i, k, j] = scores[j] * inverse
                    out[i, j, k] = scores[j] * inverse
    return out


def compile_custom_metric(name: str, f: Callable[[Any, int], float]) -> Any:
    """Compile ``f(gains float64[:], num_ranked) -> float``; TypeError if numba cannot or it returns something else."""
    function = getattr(f, "py_func", f)  # of an already jitted one
    try:
        compiled = njit(function)
        compiled.compile((numba.float64[::1], numba.int64))
    except numba.core.errors.NumbaError as error:
        raise TypeError(f"f of metric {name!r} cannot be compiled by numba: {error}") from error
    returns = compiled.nopython_signatures[0].return_type
    if not isinstance(returns, (numba.types.Float, numba.types.Integer)):
        raise TypeError(f"f of metric {name!r} must return a float, got {returns}")
    return compiled


def custom_prefix_values(f: Any, gains: np.ndarray, lengths: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """(N, K + 1) float64: f of each list (N, K) float64 with the first 0, 1, .. of its shown ranks shown."""
    values = np.zeros((gains.shape[0], gains.shape[1] + 1))
    _in_threads(_custom_prefix_values, f, gains, lengths, shown, values)
    return values


def custom_swap_scores(f: Any, gains: np.ndarray, lengths: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """(N, K, K) float64 swap scores of f, by evaluating it after every swap that can matter."""
    scores = np.zeros((*gains.shape, gains.shape[1]))
    _in_threads(_custom_swap_scores, f, gains, lengths, shown, scores)
    return scores


def _in_threads(kernel: Any, f: Any, *arrays: np.ndarray) -> None:
    """Run a kernel over slices of the lists. Threads, not prange, which takes seconds to compile for every new f."""
    rows, threads = len(arrays[0]), numba.get_num_threads()
    pieces = [slice(i * rows // threads, (i + 1) * rows // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: kernel(f, *(array[piece] for array in arrays)), pieces))


@njit(nogil=True)
def _custom_prefix_values(
    f: Any, gains: np.ndarray, lengths: np.ndarray, shown: np.ndarray, values: np.ndarray
) -> None:
    for i in range(len(gains)):
        list_gains = gains[i, : lengths[i]].copy()
        if (list_gains > 0.0).any():
            for t in range(values.shape[1]):
                values[i, t] = f(list_gains, t) if t <= shown[i] else values[i, t - 1]


@njit(nogil=True)
def _custom_swap_scores(f: Any, gains: np.ndarray, lengths: np.ndarray, shown: np.ndarray, scores: np.ndarray) -> None:
    for i in range(len(gains)):
        swapped = gains[i, : lengths[i]].copy()
        if (swapped > 0.0).any():
            present = f(swapped, shown[i])
            for k in range(shown[i]):
                for j in range(k + 1, lengths[i]):
                    swapped[k], swapped[j] = gains[i, j], gains[i, k]
                    scores[i, k, j] = present - f(swapped, shown[i])
                    scores[i, j, k] = scores[i, k, j]
                    swapped[k], swapped[j] = gains[i, k], gains[i, j]
