"""From the gains of eight lists to what the numba kernels of swap rewards start from: term gains and normalisers.

The eight lists stand side by side in tiles (K, 8), see ``lanes``. A kernel gets a metric as plain numbers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import njit

from flexrec.metrics import TINY, Metric, discount_table, largest_gain
from flexrec.numba_kernels.lane_sort import padded_rows, sort_columns_descending
from flexrec.numba_kernels.lanes import (
    LANES,
    any_lane,
    gather_columns,
    load,
    nearest_integer,
    power_of_two,
    scatter_columns,
    spread,
    store,
    where,
    widen,
)
from flexrec.numba_kernels.threads import follow_torch_threads

LINEAR, FIRST, AVERAGE_PRECISION, CASCADE = 0, 1, 2, 3
FORMS = {"linear": LINEAR, "first": FIRST, "average_precision": AVERAGE_PRECISION, "cascade": CASCADE}
GAIN, BURGES, SCALED, BINARY = 0, 1, 2, 3
GAINS = {"gain": GAIN, "burges": BURGES, "burges_scaled": SCALED, "stop": SCALED, "binary": BINARY}
ONE, IDEAL, RELEVANT, CUTOFF = 0, 1, 2, 3
NORMALISERS = {"one": ONE, "ideal": IDEAL, "relevant": RELEVANT, "cutoff": CUTOFF}
SWAP, NONCAUSAL, INDEPENDENT, RANK, SEQUENCE = 0, 1, 2, 3, 4
CREDITS = {"swap": SWAP, "noncausal": NONCAUSAL, "independent": INDEPENDENT, "rank": RANK, "sequence": SEQUENCE}
NO_CUTOFF = 2**62
FEW = 2**16  # gains: they are rewarded before other threads are awake, in 0.1 ms (see threads.FEW)
PIECES_PER_THREAD = 4


class Plan(NamedTuple):
    """A metric for lists of K candidates."""

    discounts: np.ndarray  # (K,) float64, before the cutoff
    cutoff: int  # or NO_CUTOFF
    form: int
    gain: int
    normaliser: int
    top: float  # the largest gain that the user gave; 0: the list's own
    high: float  # gains above it are an error


@lru_cache(maxsize=256)
def plan_of(metric: Metric, size: int, dtype: torch.dtype) -> Plan:
    """Of a built-in metric and gains of this dtype, in which their bound is rounded as they are: 0.3 as float32 is more
    than 0.3."""
    definition = metric.definition
    high = torch.tensor(largest_gain(metric), dtype=torch.float64).to(dtype).item()
    return Plan(
        discounts=discount_table(metric, size),
        cutoff=NO_CUTOFF if metric.cutoff is None else metric.cutoff,
        form=FORMS[definition.form],
        gain=GAINS[definition.gain],
        normaliser=NORMALISERS[definition.normaliser],
        top=metric.max_gain or 0.0,
        high=min(high, torch.finfo(dtype).max),
    )


@lru_cache(maxsize=8)
def _repeated(count: int, rows: int) -> np.ndarray:
    return np.full(rows, count)


def arrays_of(
    gains: torch.Tensor, lengths: torch.Tensor | None, num_ranked: torch.Tensor | None, max_ranked: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gains (N, K) float32 or float64, lengths (N,) int64, shown ranks (N,) int64. None may be written to."""
    if gains.dtype not in (torch.float32, torch.float64):
        gains = gains.float()
    rows, size = gains.shape
    length = _repeated(size, rows) if lengths is None else lengths.numpy()
    ranked = _repeated(max_ranked, rows)
    if lengths is not None:
        ranked = np.minimum(ranked, length)
    if num_ranked is not None:
        ranked = np.minimum(ranked, num_ranked.numpy())
    return gains.contiguous().numpy(), length, ranked


def run_over_lists(kernel: Any, parallel_kernel: Any, gains: np.ndarray, *arguments: Any) -> bool:
    """Run a kernel over all lists, on one thread if they are few; whether it finds all values in order."""
    if not gains.size:
        return True
    tiles, threads = -(-len(gains) // LANES), 1
    if gains.size >= FEW:
        follow_torch_threads()
        threads = numba.get_num_threads()
    if threads == 1 or tiles == 1:
        return kernel(gains, *arguments, 0, tiles)
    is_good = np.empty(min(tiles, PIECES_PER_THREAD * threads), dtype=np.bool_)
    parallel_kernel(gains, *arguments, is_good)
    return bool(is_good.all())


# 2^f - 1 = f (c_0 + c_1 f + ..), c_k = (ln 2)^(k+1) / (k+1)!: for |f| <= 1/2 the first term left out is below 2e-18 f.
EXP2M1 = tuple(math.log(2.0) ** (k + 1) / math.factorial(k + 1) for k in range(14))


@njit(cache=True, fastmath=False)
def _exp2m1_small(f: Any) -> Any:
    """2^f - 1 for lanes within [-1/2, 1/2], to the last digit also near 0."""
    c = EXP2M1
    q = f * c[13] + c[12]
    q = q * f + c[11]
    q = q * f + c[10]
    q = q * f + c[9]
    q = q * f + c[8]
    q = q * f + c[7]
    q = q * f + c[6]
    q = q * f + c[5]
    q = q * f + c[4]
    q = q * f + c[3]
    q = q * f + c[2]
    q = q * f + c[1]
    return (q * f + c[0]) * f


@njit(cache=True, fastmath=False)
def _power(exponent: Any) -> Any:
    """2^exponent for lanes of integers <= 1023, 0 where that is below what a float64 holds in full."""
    return where(exponent < -1022.0, 0.0, power_of_two(max(exponent, -1022.0)))


@njit(cache=True, fastmath=False)
def scaled_one(top: Any) -> Any:
    """2^-top, lanes."""
    t = nearest_integer(top)
    return _power(0.0 - t) * (_exp2m1_small(t - top) + 1.0)


@njit(cache=True, fastmath=False)
def term_gain(g: Any, kind: int, top: Any) -> Any:
    """What the metric makes of the gains g, float64 lanes: g, 1 where g > 0, or (2^g - 1) / 2^top.

    With g = i + f and top = t + u, i and t the nearest integers, the last is (2^(i-t) (2^f - 1) + 2^(i-t) - 2^-t) 2^-u:
    no overflow, whatever the gain, and no digit lost where 2^g is close to 1.
    """
    if kind == GAIN:
        return g
    if kind == BINARY:
        return where(g > 0.0, 1.0, 0.0)
    i, t = nearest_integer(g), nearest_integer(top)
    power = _power(i - t)
    exact = power - _power(0.0 - t)
    return (power * _exp2m1_small(g - i) + exact) * (_exp2m1_small(t - top) + 1.0)


@njit(cache=True, fastmath=False)
def discount(d: np.ndarray, k: int, depth: Any) -> Any:
    """Lanes: d[k], 0 where the list shows no more than k ranks."""
    return where(k < depth, d[k], 0.0)


@njit(cache=True, fastmath=False)
def counts(per_list: np.ndarray, first: int) -> Any:
    """Float64 lanes: a count (N,) of each of the lists first .. first + 7, the last one repeated."""
    lanes = np.empty((1, LANES))
    for lane in range(LANES):
        lanes[0, lane] = per_list[min(first + lane, len(per_list) - 1)]
    return load(lanes, 0)


@njit(cache=True, fastmath=False)
def longest(lengths: np.ndarray, first: int) -> int:
    """The largest length (N,) of the lists first .. first + 7."""
    most = 0
    for row in range(first, min(first + LANES, len(lengths))):
        most = max(most, lengths[row])
    return most


@njit(cache=True, fastmath=False)
def read_lists(lists: np.ndarray, first: int, tile: np.ndarray) -> None:
    """Rows 0 .. K-1 of the tile from the lists (N, K) first .. first + 7, the last list repeated."""
    rows, size = lists.shape
    for k in range(0, size - LANES + 1, LANES):
        gather_columns(lists, first, k, tile)
    for lane in range(LANES):
        row = min(first + lane, rows - 1)
        for k in range(size - size % LANES, size):
            tile[k, lane] = lists[row, k]


@njit(cache=True, fastmath=False)
def write_lists(tile: np.ndarray, first: int, lists: np.ndarray) -> None:
    """The way back."""
    rows, size = lists.shape
    for k in range(0, size - LANES + 1, LANES):
        scatter_columns(lists, first, k, tile)
    for lane in range(min(LANES, rows - first)):
        for k in range(size - size % LANES, size):
            lists[first + lane, k] = tile[k, lane]


@njit(cache=True, fastmath=False)
def _clear_behind(tile: np.ndarray, length: Any, size: int) -> None:
    """Set a tile's rows 0 .. size - 1 to 0 behind each lane's length, or behind the one length of all lanes."""
    for k in range(size - 1, -1, -1):
        if not any_lane(spread(length) <= k):
            break
        store(tile, k, where(k < length, widen(load(tile, k)), 0.0))


@njit(cache=True, fastmath=False)
def _read_gains(
    plan: Plan, gains: np.ndarray, first: int, length: Any, tile: np.ndarray, w: np.ndarray
) -> tuple[bool, Any, Any]:
    """Fill the tile with gains, 0 beyond each length, and w with term gains. Returned: whether all gains lie in
    [0, plan.high]; lanes, the exponent they are scaled down by; lanes, the sum of term gains."""
    size = gains.shape[1]
    read_lists(gains, first, tile)
    _clear_behind(tile, length, size)
    least, most, total = spread(0.0), spread(0.0), spread(0.0)
    for k in range(size):
        g = widen(load(tile, k))
        least, most, total = min(least, g), max(most, g), total + g
        if plan.gain == GAIN:
            store(w, k, g)
    # A NaN may get lost in the minimum and the maximum, not in the sum.
    is_good = not any_lane(least < 0.0) and not any_lane(most > plan.high) and not any_lane(total != total)
    top = most if plan.gain == SCALED and plan.top == 0.0 else spread(plan.top)
    if plan.gain != GAIN:
        total = spread(0.0)
        for k in range(size):
            worth = term_gain(widen(load(tile, k)), plan.gain, top)
            store(w, k, worth)
            total += worth
    return is_good, top, total


@njit(cache=True, fastmath=False)
def _ideal(plan: Plan, tile: np.ndarray, n: int, top: Any) -> Any:
    """Lanes: the discounted sum of the term gains in the best order, over the first plan.cutoff ranks."""
    depth = min(n, plan.cutoff)
    sort_columns_descending(tile, n, depth)
    ideal = spread(0.0)
    for k in range(depth):
        ideal += term_gain(widen(load(tile, k)), plan.gain, top) * plan.discounts[k]
    return ideal


@njit(cache=True, fastmath=False)
def prepare(
    plan: Plan, gains: np.ndarray, first: int, length: Any, n: int, tile: np.ndarray, w: np.ndarray
) -> tuple[bool, Any, Any]:
    """Write the term gains of the lists first .. first + 7 to w (K, 8) float64, 0 beyond each length.

    ``gains`` (N, K); ``length`` lanes, or a number for all, at most ``n``; ``tile`` (padded_rows(K), 8), in the dtype
    of the gains and 0 from row K on, is overwritten.

    Returns:
        Whether all gains lie in [0, plan.high]; lanes, 1 / normaliser, 0 for a list without a positive gain; lanes,
        the exponent by which term gains are scaled down (SCALED only).
    """
    is_good, top, total = _read_gains(plan, gains, first, length, tile, w)
    if plan.normaliser == IDEAL:
        norm = _ideal(plan, tile, n, top)
    elif plan.normaliser == RELEVANT:
        norm = total
    elif plan.normaliser == CUTOFF:
        norm = spread(plan.cutoff)
        if plan.cutoff == NO_CUTOFF:
            norm = spread(max(length, 1.0))
    else:
        norm = spread(1.0)
    return is_good, where(norm > TINY, 1.0 / norm, 0.0), top


@njit(cache=True, fastmath=False)
def term_gains_and_norms(plan: Plan, gains: np.ndarray, lengths: np.ndarray) -> tuple[bool, np.ndarray, np.ndarray]:
    """Of whole lists (N, K), for kernels that go through them one by one: whether all gains lie in [0, plan.high];
    (N, K) float64 term gains, 0 beyond each length; (N,) float64, 1 / normaliser."""
    rows, size = gains.shape
    term_gains, inverse_norms = np.empty((rows, size)), np.empty((rows, 1))
    tile, w = np.zeros((padded_rows(size), LANES), dtype=gains.dtype), np.empty((size, LANES))
    norms = np.empty((1, LANES))
    all_good = True
    for first in range(0, rows, LANES):
        length = counts(lengths, first)
        is_good, inverse, _ = prepare(plan, gains, first, length, longest(lengths, first), tile, w)
        all_good = all_good and is_good
        store(norms, 0, inverse)
        write_lists(w, first, term_gains)
        write_lists(norms, first, inverse_norms)
    return all_good, term_gains, inverse_norms[:, 0]
