"""Softmax over sets of entries, and its gradient: what ranking steps and ragged sets of tokens have in common.

The mathematics stands in ``flexrec/ops/restricted_logprobs.py``; names here are its names. All arrays over entries are
flat. A step of a ranking is a set too: in rank order its entries are those from its own rank on, the first is its
target, and all steps of a ranking share their values (see ``ranking_logprobs``).

Sums over a set are accumulated in float64, which costs nothing beside the exponentials. Threads get runs of sets with
about the same number of entries, and no number is added up by two of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from flexrec.numba_kernels import FLOOR, IMPOSSIBLE
from flexrec.numba_kernels.rows import Array, array_of, share

MISSING, NO_TARGET = -1, -2  # instead of a target: log-probability NaN, and 0


class Sets(NamedTuple):
    """M sets: the entries begin[m] <= e < end[m]."""

    begin: Array  # (M,) int64, ascending
    end: Array  # (M,) int64
    target: Array  # (M,) int64, the entry whose log-probability is wanted, or MISSING or NO_TARGET
    values: Array  # (M,) int64, the row of the values that belongs to entry begin[m]; the others follow


class Entries(NamedTuple):
    """Of E entries, all of one dtype."""

    logits: Array  # (E,), -inf replaced by FLOOR
    values: Array  # (rows, C)
    ref_logits: Array  # (E,) the reference's up to a constant per set, or (0,) if there is none


class Results(NamedTuple):
    """Of M sets, all of the logits' dtype; norm holds m and log s, those of the reference after them."""

    logprobs: Array  # (M,)
    entropy: Array  # (M,)
    expectations: Array  # (M, C)
    kl: Array  # (M,), or (0,) without a reference
    norm: Array  # (M, 2), or (M, 4) with a reference


def new_results(sets: tuple[int, ...], channels: int, reference: bool, kind: type) -> Results:
    """To be written; ``sets`` is what their dimension M is shaped as."""
    return Results(
        np.empty(sets, kind),
        np.empty(sets, kind),
        np.empty((*sets, channels), kind),
        np.empty(sets if reference else (0,) * len(sets), kind),
        np.empty((*sets, 4 if reference else 2), kind),
    )


def results_of(tensors: Iterable[Tensor | None], dtype: torch.dtype, dims: int) -> Results:
    """Of tensors whose first ``dims`` dimensions count the sets; None, or of size 0, what is not there."""
    return Results(*(array_of(x, dtype, dims + more) for x, more in zip(tensors, (0, 0, 1, 0, 1), strict=True)))


@njit(cache=True, fastmath=False)
def _log_sum(z: Array, largest: float) -> float:
    total = 0.0
    for i in range(len(z)):
        total += math.exp(z[i] - largest)
    return math.log(total)


@njit(cache=True, fastmath=False)
def _largest(z: Array) -> float:
    largest = z[0]
    for i in range(1, len(z)):
        largest = max(largest, z[i])
    return largest


@njit(cache=True, nogil=True, fastmath=False)
def _softmax_of_part(
    sets: Sets,
    entries: Entries,
    part: int,
    parts: int,
    logprobs: Array,
    entropy: Array,
    expectations: Array,
    kl: Array,
    norm: Array,
) -> None:
    """:func:`softmax` of the sets that begin in a part of all entries; the arrays are those of ``Results``."""
    logits, values, ref_logits = entries
    low, high = share(sets.begin, len(logits), part, parts)
    longest = 0
    for m in range(low, high):
        longest = max(longest, sets.end[m] - sets.begin[m])
    shares = np.empty(longest, np.float64)
    for m in range(low, high):
        begin, end, target = sets.begin[m], sets.end[m], sets.target[m]
        logprobs[m] = math.nan if target == MISSING else 0.0
        if begin == end:
            entropy[m] = 0.0
            expectations[m] = 0.0
            norm[m] = 0.0
            if len(ref_logits):
                kl[m] = 0.0
            continue
        z = logits[begin:end]
        largest = _largest(z)
        total = weighted = 0.0
        for i in range(len(z)):
            shifted = z[i] - largest
            shares[i] = math.exp(shifted)
            total += shares[i]
            weighted += shares[i] * shifted
        log_total = math.log(total)
        norm[m, 0], norm[m, 1] = largest if total > 0.0 else math.nan, log_total  # a maximum may overlook a NaN
        entropy[m] = log_total - weighted / total
        if target >= 0:
            logprob = (logits[target] - largest) - log_total
            logprobs[m] = -math.inf if logprob < IMPOSSIBLE else logprob
        v = values[sets.values[m] :]
        for c in range(values.shape[1]):
            expectation = 0.0
            for i in range(len(z)):
                expectation += shares[i] * v[i, c]
            expectations[m, c] = expectation / total
        if len(ref_logits):
            r = ref_logits[begin:end]
            ref_largest = _largest(r)
            ref_log_total = _log_sum(r, ref_largest)
            norm[m, 2], norm[m, 3] = ref_largest, ref_log_total
            apart = 0.0
            for i in range(len(z)):
                if shares[i] != 0.0:
                    ref_shifted = r[i] - ref_largest
                    log_ratio = (z[i] - largest) - ref_shifted
                    apart += math.inf if ref_shifted < IMPOSSIBLE else shares[i] * log_ratio
            kl[m] = apart / total - (log_total - ref_log_total)


@njit(cache=True, nogil=True, parallel=True, fastmath=False)
def _softmax_in_parallel(sets: Sets, entries: Entries, parts: int, out: Results) -> None:
    logprobs, entropy, expectations, kl, norm = out  # numba would not see that a loop writes to the tuple's arrays
    for part in prange(parts):
        _softmax_of_part(sets, entries, part, parts, logprobs, entropy, expectations, kl, norm)


@njit(cache=True, nogil=True, fastmath=False)
def softmax(sets: Sets, entries: Entries, parts: int, out: Results) -> None:
    """Everything of a set that is a sum over its entries; exactly 0 where it has none.

    KL is summed as the mean of (z - m) - (r - m') less log s - log s': where the policies agree both are exactly 0.
    """
    if parts == 1:  # wakes nobody
        _softmax_of_part(sets, entries, 0, 1, out.logprobs, out.entropy, out.expectations, out.kl, out.norm)
    else:
        _softmax_in_parallel(sets, entries, parts, out)


@njit(cache=True, nogil=True, fastmath=False)
def _softmax_gradient_of_part(
    sets: Sets,
    entries: Entries,
    results: Results,
    upstream: Results,
    temperature: float,
    part: int,
    parts: int,
    dlogits: Array,
) -> None:
    """:func:`softmax_gradient` of the sets that begin in a part of all entries."""
    logits, values, ref_logits = entries
    low, high = share(sets.begin, len(logits), part, parts)
    for m in range(low, high):
        begin, end = sets.begin[m], sets.end[m]
        z, slopes = logits[begin:end], dlogits[begin:end]
        largest, log_total = results.norm[m, 0], results.norm[m, 1]
        if end - begin < 2 or largest < IMPOSSIBLE:
            for i in range(len(z)):
                slopes[i] = z[i] - z[i]  # 0, and NaN for a NaN
            continue
        grad_logprob = upstream.logprobs[m] if sets.target[m] >= 0 else 0.0
        grad_entropy = upstream.entropy[m]
        constant = -grad_logprob - grad_entropy * results.entropy[m]
        for c in range(values.shape[1]):
            constant -= upstream.expectations[m, c] * results.expectations[m, c]
        for i in range(len(z)):
            slopes[i] = constant - grad_entropy * ((z[i] - largest) - log_total)
        v = values[sets.values[m] :]
        for c in range(values.shape[1]):
            for i in range(len(z)):
                slopes[i] += upstream.expectations[m, c] * v[i, c]
        if len(ref_logits) and not math.isinf(results.kl[m]):
            r, ref_largest, ref_log_total = ref_logits[begin:end], results.norm[m, 2], results.norm[m, 3]
            for i in range(len(z)):
                log_ratio = ((z[i] - largest) - log_total) - ((r[i] - ref_largest) - ref_log_total)
                slopes[i] += upstream.kl[m] * (log_ratio - results.kl[m])
        for i in range(len(z)):
            slopes[i] *= math.exp((z[i] - largest) - log_total)
        if sets.target[m] >= 0:
            dlogits[sets.target[m]] += grad_logprob
        for i in range(len(z)):
            slopes[i] = 0.0 if z[i] < IMPOSSIBLE else slopes[i] / temperature


@njit(cache=True, nogil=True, parallel=True, fastmath=False)
def _softmax_gradient_in_parallel(
    sets: Sets, entries: Entries, results: Results, upstream: Results, temperature: float, parts: int, dlogits: Array
) -> None:
    for part in prange(parts):
        _softmax_gradient_of_part(sets, entries, results, upstream, temperature, part, parts, dlogits)


@njit(cache=True, nogil=True, fastmath=False)
def softmax_gradient(
    sets: Sets, entries: Entries, results: Results, upstream: Results, temperature: float, parts: int, dlogits: Array
) -> None:
    """dlogits (E,), the gradient of the logits before they were divided by the temperature.

    Exactly 0 in sets without a choice or a possible entry; an infinite KL has no gradient.

    Args:
        results: what :func:`softmax` wrote. upstream: gradients of it; its norm is not read.
    """
    if parts == 1:
        _softmax_gradient_of_part(sets, entries, results, upstream, temperature, 0, 1, dlogits)
    else:
        _softmax_gradient_in_parallel(sets, entries, results, upstream, temperature, parts, dlogits)


@njit(cache=True, fastmath=False)
def floored(z: float) -> float:
    """-inf as FLOOR; a NaN stays."""
    return FLOOR if z < FLOOR else z


@njit(cache=True, fastmath=False)
def logit_of(product: float, bias: float, temperature: float) -> float:
    """Only a bias makes a candidate impossible: a product that is not finite is a fault, and gives NaN."""
    return floored((product + (product - product) + bias) / temperature)
