"""The variance of swap rewards on the CPU: parallel numba, eight lists side by side, O(K) per list.

Gains are independent, the normaliser and the exponent by which term gains are scaled are held fixed. v_i is the
variance of the term gain at rank i: that of the gain times (d w_i / d g_i)^2. Names are those of the derivation in
``flexrec/ops/swap_reference.py``.

Linear metrics
--------------
n r_k = sum over the pool of (d_k - d_j) (w_k - w_j), hence, exactly,
    n^2 Var[r_k] = (sum (d_k - d_j))^2 v_k + sum (d_k - d_j)^2 v_j.
From rank k + 1 to rank k every difference grows by d_k - d_{k+1} >= 0, and moments of differences shift like any
moments: sum (x + s)^2 v = sum x^2 v + 2 s sum x v + s^2 sum v. Nothing is subtracted, so nothing cancels.

Cascade (err), first order: n^2 Var[r_k] = sum over i of (d(n r_k) / d theta_i)^2 v_i
--------------------------------------------------------------------------------------
later_k = P_k b_k with b_k = x_k alpha_k - beta_k, alpha_k = n d_k - Gamma^1_k, beta_k = d_k sum x_j - Gamma^x_k.
  i < k: only P_k depends on theta_i: the slope is -P_k / (1 - theta_i) b_k. Without dividing, the sum T_k of
    v_i (P_k / (1 - theta_i))^2 obeys T_{k+1} = (1 - theta_k)^2 T_k + v_k P_k^2.
  i = k: P_k alpha_k.
  i > k: d G_kj / d theta_i = Q_ki (d_i - G_ij) for j > i, 0 otherwise, so the slope is P_k D_ki with
    D_ki = -(d_k - G_ki) - Q_ki sum over j > i of (x_k - x_j) (d_i - G_ij) = E_ki - x_k A_ki,
    E_ki = G_ki - d_k + Q_ki beta_i,  A_ki = Q_ki alpha_i.
  With q = 1 - theta_{k+1} both follow a recurrence: A_ki = q A_{k+1,i} and E_ki = q E_{k+1,i} + d_{k+1} - d_k, from
  A = alpha_i, E = beta_i + d_{k+1} - d_k at k = i - 1. So the sums over i of v, v E, v A, v E^2, v E A and v A^2 do.

Non-causal, besides: earlier_k = sum over j < k of P_j (x_j - x_k) (d_j - G_jk) has no part in i > k. For
  i = k: P_k alpha_k - (A^1_k - B^1_k - C^1_k d_k).
  i < k: the slope is that of later_k, plus that of earlier_k: from j = i, from j < i (G_jk) and from j > i (P_j),
    -P_k / (1 - theta_i) b_k + (d_i - G_ik) (P_i - C^x_i + x_k C^1_i) - P_i sum Q_ij (x_j - x_k) (d_j - G_jk)
    = -b_k s_1 + s_2 - d_k s_3 + x_k s_4 - x_k d_k s_5,
  where five numbers s of every i start, at k = i + 1, at
    s = (P_i, d_i (P_i - C^x_i), P_i - C^x_i, d_i C^1_i, C^1_i)
  and pass each rank k between by linear equations that are the same for all i:
    s_2 -= d_k theta_k s_3 + x_k d_k s_1,  s_4 += d_k s_1 - d_k theta_k s_5,
    s_3 = (1 - theta_k) s_3 - x_k s_1,  s_5 = (1 - theta_k) s_5 + s_1,  s_1 *= 1 - theta_k.
  So the 5 x 5 matrix of sums of v_i s s^T obeys a recurrence too, and the sum of squares is a quadratic form of it.

Terms: d_k theta_k P_k has the slopes d_k P_k at k and -d_k theta_k P_k / (1 - theta_i) before it. Tail sums are
P_k W_k, W_k = d_k theta_k + (1 - theta_k) W_{k+1}; the slope at i >= k is P_i (d_i - W_{i+1}), before k it is
-P_k / (1 - theta_i) W_k.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange

from flexrec.metrics import LN2
from flexrec.numba_kernels.lane_sort import padded_rows
from flexrec.numba_kernels.lanes import LANES, any_lane, load, spread, store, where, widen
from flexrec.numba_kernels.tiles import (
    GAIN,
    INDEPENDENT,
    LINEAR,
    NONCAUSAL,
    SEQUENCE,
    SWAP,
    Plan,
    counts,
    discount,
    longest,
    prepare,
    read_lists,
    scaled_one,
    write_lists,
)


@njit(cache=True, fastmath=False)
def _fill(tile: np.ndarray, value: Any) -> None:
    for k in range(len(tile)):
        store(tile, k, value)


@njit(cache=True, fastmath=False)
def _swaps(credit: int, length: Any, k: int) -> Any:
    """Lanes: the number of swaps that rank k takes part in, at least 1."""
    return max(length - (k + 1.0), 1.0) if credit == SWAP else max(length - 1.0, 1.0)


@njit(cache=True, fastmath=False)
def _linear_variance(
    credit: int, v: np.ndarray, d: np.ndarray, depth: Any, length: Any, out: np.ndarray, own: np.ndarray
) -> None:
    size = len(v)
    # Over the pool: sums of v, of difference x v, of difference^2 x v, of differences.
    m0, m1, m2, gap, last = spread(0.0), spread(0.0), spread(0.0), spread(0.0), spread(0.0)
    for k in range(size - 1, -1, -1):
        h = discount(d, k, depth)
        rise = h - last
        m2 += rise * (2.0 * m1 + rise * m0)
        m1 += rise * m0
        gap += rise * max(length - (k + 1.0), 0.0)
        store(out, k, m2)
        store(own, k, gap)
        m0 += load(v, k)
        last = h
    if credit == NONCAUSAL:
        m0, m1, m2, gap = spread(0.0), spread(0.0), spread(0.0), spread(0.0)
        for k in range(size):
            h = discount(d, k, depth)
            fall = last - h
            m2 += fall * (2.0 * m1 + fall * m0)
            m1 += fall * m0
            gap += fall * float(k)
            store(out, k, load(out, k) + m2)
            store(own, k, load(own, k) - gap)
            m0 += load(v, k)
            last = h
    for k in range(size):
        n = _swaps(credit, length, k)
        store(out, k, (load(own, k) * load(own, k) * load(v, k) + load(out, k)) / (n * n))


@njit(cache=True, fastmath=False)
def _linear_term_variance(credit: int, v: np.ndarray, d: np.ndarray, depth: Any, out: np.ndarray) -> None:
    tail = spread(0.0)
    for k in range(len(v) - 1, -1, -1):
        h = discount(d, k, depth)
        term = h * h * load(v, k)
        tail += term
        store(out, k, term if credit == INDEPENDENT else tail)
    if credit == SEQUENCE:
        _fill(out, tail)


@njit(cache=True, fastmath=False)
def _cascade_behind(
    w: np.ndarray,
    v: np.ndarray,
    d: np.ndarray,
    depth: Any,
    length: Any,
    b: np.ndarray,
    alphas: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write b, alpha and the sum over i > k of v_i D_ki^2."""
    base = load(w, 0)
    gamma1, gammax, behind, d_next = spread(0.0), spread(0.0), spread(0.0), spread(0.0)
    v0, ve, va, vee, vea, vaa = spread(0.0), spread(0.0), spread(0.0), spread(0.0), spread(0.0), spread(0.0)
    for k in range(len(w) - 1, -1, -1):
        theta, h, spot = load(w, k), discount(d, k, depth), load(v, k)
        x, n, q = where(k < length, theta - base, 0.0), max(length - (k + 1.0), 0.0), 1.0 - theta
        shift = d_next - h
        vee += shift * (2.0 * ve + shift * v0)
        vea += shift * va
        ve += shift * v0
        alpha, beta = n * h - gamma1, h * behind - gammax
        store(b, k, h * (n * x - behind) - x * gamma1 + gammax)
        store(alphas, k, alpha)
        store(out, k, max(vee - x * (2.0 * vea - x * vaa), 0.0))
        vee, vea, vaa = (
            q * q * vee + spot * beta * beta,
            q * q * vea + spot * beta * alpha,
            q * q * vaa + spot * alpha * alpha,
        )
        v0, ve, va = v0 + spot, q * ve + spot * beta, q * va + spot * alpha
        gamma1 = h + h * theta * n + q * gamma1
        gammax = x * h + h * theta * behind + q * gammax
        behind += x
        d_next = h


@njit(cache=True, fastmath=False)
def _cascade_swap_variance(
    w: np.ndarray, v: np.ndarray, length: Any, b: np.ndarray, alphas: np.ndarray, out: np.ndarray
) -> None:
    """From what ``_cascade_behind`` wrote."""
    reached, t = spread(1.0), spread(0.0)
    for k in range(len(w)):
        q, spot, n = 1.0 - load(w, k), load(v, k), _swaps(SWAP, length, k)
        inside = load(alphas, k) * load(alphas, k) * spot + load(out, k)
        store(out, k, (load(b, k) * load(b, k) * t + reached * reached * inside) / (n * n))
        t = q * q * t + spot * reached * reached
        reached *= q


@njit(cache=True, fastmath=False)
def _add_multiple(moments: np.ndarray, a: int, b: int, factor: Any) -> None:
    """Second moments (25, 8) of five numbers s after s_a += factor s_b."""
    for i in range(5):
        store(moments, 5 * a + i, load(moments, 5 * a + i) + factor * load(moments, 5 * b + i))
    for i in range(5):
        store(moments, 5 * i + a, load(moments, 5 * i + a) + factor * load(moments, 5 * i + b))


@njit(cache=True, fastmath=False)
def _cascade_noncausal_variance(
    w: np.ndarray,
    v: np.ndarray,
    d: np.ndarray,
    depth: Any,
    length: Any,
    b: np.ndarray,
    alphas: np.ndarray,
    out: np.ndarray,
) -> None:
    """From what ``_cascade_behind`` wrote."""
    base, n = load(w, 0), _swaps(NONCAUSAL, length, 0)
    reached = spread(1.0)
    a1, b1, c1, cx = spread(0.0), spread(0.0), spread(0.0), spread(0.0)
    moments, new, slope = np.zeros((25, LANES)), np.empty((5, LANES)), np.empty((5, LANES))
    for k in range(len(w)):
        theta, h, spot = load(w, k), discount(d, k, depth), load(v, k)
        x, q = where(k < length, theta - base, 0.0), 1.0 - theta
        store(slope, 0, 0.0 - load(b, k))
        store(slope, 1, spread(1.0))
        store(slope, 2, 0.0 - h)
        store(slope, 3, x)
        store(slope, 4, 0.0 - x * h)
        total = spread(0.0)
        for i in range(5):
            for j in range(5):
                total += load(slope, i) * load(slope, j) * load(moments, 5 * i + j)
        own = reached * load(alphas, k) - (a1 - b1 - c1 * h)
        store(out, k, (max(total, 0.0) + own * own * spot + reached * reached * load(out, k)) / (n * n))
        _add_multiple(moments, 1, 2, 0.0 - h * theta)
        _add_multiple(moments, 1, 0, 0.0 - x * h)
        _add_multiple(moments, 3, 4, 0.0 - h * theta)
        _add_multiple(moments, 3, 0, spread(h))
        _add_multiple(moments, 2, 2, 0.0 - theta)
        _add_multiple(moments, 2, 0, 0.0 - x)
        _add_multiple(moments, 4, 4, 0.0 - theta)
        _add_multiple(moments, 4, 0, spread(1.0))
        _add_multiple(moments, 0, 0, 0.0 - theta)
        store(new, 0, reached)
        store(new, 1, h * (reached - cx))
        store(new, 2, reached - cx)
        store(new, 3, h * c1)
        store(new, 4, c1)
        for i in range(5):
            for j in range(5):
                store(moments, 5 * i + j, load(moments, 5 * i + j) + spot * load(new, i) * load(new, j))
        a1, b1 = a1 + reached * h, b1 + c1 * h * theta
        c1, cx = c1 * q + reached, cx * q + reached * x
        reached *= q


@njit(cache=True, fastmath=False)
def _cascade_term_variance(
    credit: int, w: np.ndarray, v: np.ndarray, d: np.ndarray, depth: Any, out: np.ndarray, worth: np.ndarray
) -> None:
    tail, square = spread(0.0), spread(0.0)
    for k in range(len(w) - 1, -1, -1):  # worth: the term or W over P; out: the sum over i >= k of slope^2 v over P^2
        theta, h, q = load(w, k), discount(d, k, depth), 1.0 - load(w, k)
        if credit == INDEPENDENT:
            store(worth, k, h * theta)
            store(out, k, h * h * load(v, k))
        else:
            square = q * q * square + load(v, k) * (h - tail) * (h - tail)
            tail = h * theta + q * tail
            store(worth, k, tail)
            store(out, k, square)
    reached, t = spread(1.0), spread(0.0)
    for k in range(len(w)):
        q = 1.0 - load(w, k)
        store(out, k, load(worth, k) * load(worth, k) * t + reached * reached * load(out, k))
        t = q * q * t + load(v, k) * reached * reached
        reached *= q
    if credit == SEQUENCE:
        _fill(out, load(out, 0))


@njit(cache=True, fastmath=False)
def _read_variance(
    plan: Plan, variance: np.ndarray, first: int, length: Any, top: Any, tile: np.ndarray, w: np.ndarray, v: np.ndarray
) -> bool:
    """Write the variances of the term gains w to v; whether all variances of the gains are finite and >= 0."""
    read_lists(variance, first, tile)
    outside, one = spread(0.0), scaled_one(top)
    for k in range(len(w)):
        spot = where(k < length, widen(load(tile, k)), 0.0)
        outside = where(spot >= 0.0, outside, 1.0)
        outside = where(spot < math.inf, outside, 1.0)
        if plan.gain != GAIN:
            slope = LN2 * (load(w, k) + one)  # d/dg (2^g - 1) / 2^top
            spot *= slope * slope
        store(v, k, spot)
    return not any_lane(outside > 0.0)


@njit(cache=True, fastmath=False)
def variance_of_lists(
    gains: np.ndarray,  # (N, K) float64: one dtype, as compiling for another takes longer than converting
    variance: np.ndarray,  # (N, K) float64, of the gains
    lengths: np.ndarray,  # (N,) int64
    ranked: np.ndarray,  # (N,) int64, at most lengths
    plan: Plan,  # of form LINEAR or CASCADE
    credit: int,
    out: np.ndarray,  # (N, K), written
    begin: int,
    end: int,
) -> bool:
    """Variance of the rewards of the lists 8 x begin .. 8 x end - 1, for every credit but "policy". Returned: whether
    their gains all lie in [0, plan.high] and their variances are finite numbers >= 0; if not, it means nothing."""
    size = gains.shape[1]
    tile = np.zeros((padded_rows(size), LANES))
    w, v, sums = np.empty((size, LANES)), np.empty((size, LANES)), np.empty((size, LANES))
    b, alphas = np.empty((size, LANES)), np.empty((size, LANES))
    all_good = True
    for first in range(begin * LANES, min(end * LANES, len(gains)), LANES):
        length, shown = counts(lengths, first), counts(ranked, first)
        depth = min(shown, float(plan.cutoff))
        is_good, inverse, top = prepare(plan, gains, first, length, longest(lengths, first), tile, w)
        all_good = all_good and is_good and _read_variance(plan, variance, first, length, top, tile, w, v)
        if plan.form == LINEAR:
            if credit >= INDEPENDENT:
                _linear_term_variance(credit, v, plan.discounts, depth, sums)
            else:
                _linear_variance(credit, v, plan.discounts, depth, length, sums, b)
        elif credit >= INDEPENDENT:
            _cascade_term_variance(credit, w, v, plan.discounts, depth, sums, b)
        else:
            _cascade_behind(w, v, plan.discounts, depth, length, b, alphas, sums)
            if credit == SWAP:
                _cascade_swap_variance(w, v, length, b, alphas, sums)
            else:
                _cascade_noncausal_variance(w, v, plan.discounts, depth, length, b, alphas, sums)
        for k in range(size):
            store(tile, k, where(k < shown, load(sums, k) * inverse * inverse, 0.0))
        write_lists(tile, first, out)
    return all_good


@njit(parallel=True, cache=True, fastmath=False)
def variance_of_lists_in_parallel(
    gains: np.ndarray,
    variance: np.ndarray,
    lengths: np.ndarray,
    ranked: np.ndarray,
    plan: Plan,
    credit: int,
    out: np.ndarray,
    is_good: np.ndarray,  # (pieces that threads share out among themselves,), what each returned
) -> None:
    """``variance_of_lists`` of all lists."""
    pieces, tiles = len(is_good), (len(gains) + LANES - 1) // LANES
    for i in prange(pieces):
        begin, end = i * tiles // pieces, (i + 1) * tiles // pieces
        is_good[i] = variance_of_lists(gains, variance, lengths, ranked, plan, credit, out, begin, end)
