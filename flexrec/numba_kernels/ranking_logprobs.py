"""ranking_logprobs on the CPU: forward and backward as parallel loops over the triangle of what remains.

All (N, T, K) arrays are in rank order, entry [n, t, k] for the candidate at rank k: the pool of step t is then k >= t,
the chosen candidate is k = t, and entries with k < t are neither computed nor read. Flat, a step is a set of entries
(see ``softmax``). Rows of the output embedding are read where they are, by index: nothing is gathered, and what lies
beyond a list's length is never read.

Cost of a ranking with T = K: K^2 D flops a product (half the square), one forward and two backward; bytes: its K rows
of the embedding and T hidden states, which stay in the cache, twice, and 4 T K for the logits between the passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from flexrec.numba_kernels.rows import (
    NUMPY,
    REORDER,
    Array,
    Operands,
    Segments,
    add_rows,
    array_of,
    operands_of,
    sum_rows,
)
from flexrec.numba_kernels.softmax import (
    NO_TARGET,
    Entries,
    Results,
    Sets,
    floored,
    logit_of,
    new_results,
    results_of,
    softmax,
    softmax_gradient,
)
from flexrec.numba_kernels.threads import parts_for

FINE, NO_TOKEN, OUTSIDE, REPEATED = 0, 1, 2, 3  # what place_candidates finds


@njit(cache=True, nogil=True, fastmath=False)
def place_candidates(
    candidates: Array, ranking: Array, lengths: Array, position: Array, vocab: int
) -> tuple[int, int, int]:
    """Fill ``position`` (N, K) with the rank of every candidate: the ranked ones, then the unranked ascending.

    ``lengths`` is (N,), or (0,) where every list has K candidates; candidates beyond have position -1, and neither
    ``ranking`` (N, T) nor ``candidates`` (P, K) is read there. Returns (FINE, 0, 0), or what is wrong and where.
    """
    t, k = ranking.shape[1], position.shape[1]
    group = len(ranking) // max(len(candidates), 1)
    for n in range(len(ranking)):
        length = lengths[n] if len(lengths) else k
        tokens, places = candidates[n // group], position[n]
        ranked = min(t, length)
        for index in range(k):
            places[index] = -1
            if index < length and not 0 <= tokens[index] < vocab:
                return NO_TOKEN, n // group, index
        for rank in range(ranked):
            index = ranking[n, rank]
            if index < 0 or index >= length:
                return OUTSIDE, n, rank
            if places[index] >= 0:
                return REPEATED, n, rank
            places[index] = rank
        for index in range(length):
            if places[index] < 0:
                places[index] = ranked
                ranked += 1
    return FINE, 0, 0


@njit(cache=True, nogil=True, fastmath=False)
def _in_rank_order(position: Array, row_index: Array, steps: int) -> tuple[Array, Array, Sets]:
    """Which of the rows is that of the candidate at each rank (N, K); candidates of each list (N,); and every step of
    every ranking, N T sets of the entries of (N, T, K), empty beyond a list's length."""
    count, size = position.shape
    order, lengths = np.zeros((count, size), np.int64), np.zeros(count, np.int64)
    begin, end = np.empty(count * steps, np.int64), np.empty(count * steps, np.int64)
    target, values = np.empty(count * steps, np.int64), np.empty(count * steps, np.int64)
    group = count // max(len(row_index), 1)
    for n in range(count):
        for candidate in range(size):
            if position[n, candidate] >= 0:
                order[n, position[n, candidate]] = row_index[n // group, candidate]
                lengths[n] += 1
        for t in range(steps):
            m = n * steps + t
            begin[m], end[m] = m * size + t, m * size + max(t, lengths[n])
            target[m] = begin[m] if t < lengths[n] else NO_TARGET
            values[m] = n * size + t
    return order, lengths, Sets(begin, end, target, values)


@njit(cache=True, fastmath=REORDER)
def _dots(hidden: Array, rows: Array, index: Array, steps: int, length: int, logits: Array) -> None:
    """logits[t, k] = hidden[t] . rows[index[k]] for t < steps and t <= k < length: four steps by two rows at a time."""
    last = steps - 1
    for t in range(0, steps, 4):
        t1, t2, t3 = min(t + 1, last), min(t + 2, last), min(t + 3, last)
        h0, h1, h2, h3 = hidden[t], hidden[t1], hidden[t2], hidden[t3]
        for k in range(t, length, 2):
            k1 = min(k + 1, length - 1)
            w0, w1 = rows[index[k]], rows[index[k1]]
            z00 = z01 = z10 = z11 = z20 = z21 = z30 = z31 = logits.dtype.type(0)
            for d in range(len(h0)):
                z00 += h0[d] * w0[d]
                z01 += h0[d] * w1[d]
                z10 += h1[d] * w0[d]
                z11 += h1[d] * w1[d]
                z20 += h2[d] * w0[d]
                z21 += h2[d] * w1[d]
                z30 += h3[d] * w0[d]
                z31 += h3[d] * w1[d]
            logits[t, k], logits[t, k1] = z00, z01
            logits[t1, k], logits[t1, k1] = z10, z11
            logits[t2, k], logits[t2, k1] = z20, z21
            logits[t3, k], logits[t3, k1] = z30, z31


@njit(cache=True, nogil=True, fastmath=False)
def _logits_of_ranking(
    hidden: Array, rows: Array, index: Array, length: int, bias: Array, temperature: float, logits: Array
) -> None:
    """:func:`triangle_logits` of one ranking: (T, D), (R, D), (K,) and (T, K)."""
    divisor, zero = logits.dtype.type(temperature), logits.dtype.type(0)
    steps = min(len(hidden), length)
    _dots(hidden, rows, index, steps, length, logits)
    for t in range(steps):
        for k in range(t, length):
            own = bias[index[k]] if len(bias) else zero
            logits[t, k] = logit_of(logits[t, k], own, divisor)


@njit(cache=True, nogil=True, parallel=True, fastmath=False)
def _triangle_logits_in_parallel(
    hidden: Array, rows: Array, index: Array, lengths: Array, bias: Array, temperature: float, logits: Array
) -> None:
    for n in prange(len(hidden)):
        _logits_of_ranking(hidden[n], rows, index[n], lengths[n], bias, temperature, logits[n])


@njit(cache=True, nogil=True, fastmath=False)
def triangle_logits(
    hidden: Array, rows: Array, index: Array, lengths: Array, bias: Array, temperature: float, parts: int, logits: Array
) -> None:
    """logits[n, t, k] = (hidden[n, t] . row + bias) / temperature of the candidate at rank k, for t <= k < length.

    Args:
        hidden: (N, T, D), rows: (R, D), bias: (R,) or (0,), logits: (N, T, K), all of one dtype.
        index: (N, K) int64, the row of the candidate at each rank; lengths: (N,) int64.
        parts: 1 for this thread alone.
    """
    if parts == 1:  # wakes nobody
        for n in range(len(hidden)):
            _logits_of_ranking(hidden[n], rows, index[n], lengths[n], bias, temperature, logits[n])
    else:
        _triangle_logits_in_parallel(hidden, rows, index, lengths, bias, temperature, logits)


@njit(cache=True, nogil=True, parallel=True, fastmath=False)
def logits_in_rank_order(by_candidate: Array, position: Array, logits: Array) -> None:
    """Logits (N, T, K) given by candidate as :func:`triangle_logits` makes them."""
    for n in prange(len(by_candidate)):
        for candidate in range(by_candidate.shape[2]):
            rank = position[n, candidate]
            for t in range(min(rank + 1, by_candidate.shape[1])):
                logits[n, t, rank] = floored(by_candidate[n, t, candidate])


@njit(cache=True, fastmath=False)
def _gradient_of_candidate(
    dlogits: Array, hidden: Array, position: Array, first: int, last: int, candidate: int, row_grad: Array
) -> float:
    """Fill ``row_grad`` (D,) unless its size is 0, from rankings first .. last - 1; return the bias's gradient."""
    t_max = hidden.shape[1]
    column, every_step = np.empty(t_max, dlogits.dtype), np.arange(t_max)
    row_grad[:] = 0.0
    bias_grad = 0.0
    for n in range(first, last):
        rank = position[n, candidate]
        steps = min(rank + 1, t_max)
        for t in range(steps):
            column[t] = dlogits[n, t, rank]
            bias_grad += column[t]
        if len(row_grad):
            add_rows(row_grad, hidden[n], every_step, column, 0, steps)
    return bias_grad


@njit(cache=True, nogil=True, fastmath=False)
def _gradients_of_entry(
    entry: int, dlogits: Array, hidden: Array, position: Array, row_grads: Array, bias_grads: Array
) -> None:
    k_max, group = bias_grads.shape[1], len(hidden) // max(len(bias_grads), 1)
    p, candidate = entry // k_max, entry % k_max
    bias_grads[p, candidate] = _gradient_of_candidate(
        dlogits, hidden, position, p * group, (p + 1) * group, candidate, row_grads[p, candidate]
    )


@njit(cache=True, nogil=True, parallel=True, fastmath=False)
def _candidate_gradients_in_parallel(
    dlogits: Array, hidden: Array, position: Array, row_grads: Array, bias_grads: Array
) -> None:
    for entry in prange(bias_grads.size):
        _gradients_of_entry(entry, dlogits, hidden, position, row_grads, bias_grads)


@njit(cache=True, nogil=True, fastmath=False)
def candidate_gradients(
    dlogits: Array, hidden: Array, position: Array, parts: int, row_grads: Array, bias_grads: Array
) -> None:
    """Gradients of every candidate's row (P, K, D) and bias (P, K): sums over the rankings and steps of its list.

    The rows are left out where their D is 0. Candidates share no output: no order of threads changes a bit.
    """
    if parts == 1:
        for entry in range(bias_grads.size):
            _gradients_of_entry(entry, dlogits, hidden, position, row_grads, bias_grads)
    else:
        _candidate_gradients_in_parallel(dlogits, hidden, position, row_grads, bias_grads)


@njit(cache=True, fastmath=False)
def _flat(x: Results) -> Results:
    """Results of (N, T) steps as those of N T sets."""
    expectations = x.expectations.reshape((x.entropy.size, x.expectations.shape[2]))
    norm = x.norm.reshape((x.norm.shape[0] * x.norm.shape[1], x.norm.shape[2]))
    return Results(x.logprobs.reshape(-1), x.entropy.reshape(-1), expectations, x.kl.reshape(-1), norm)


@njit(cache=True, fastmath=False)
def _flat_entries(x: Entries) -> Entries:
    """Entries of (N, T, K) logits; the values are (N K, C) already."""
    return Entries(x.logits.reshape(-1), x.values, x.ref_logits.reshape(-1))


@njit(cache=True, nogil=True, fastmath=False)
def _logits_in_rank_order(x: Operands, position: Array, temperature: float, parts: int, logits: Array) -> Sets:
    """Fill ``logits`` (N, T, K); which of them are the steps' entries."""
    order, lengths, sets = _in_rank_order(position, x.row_of, x.hidden.shape[1])
    triangle_logits(x.hidden, x.rows, order, lengths, x.bias, temperature, parts, logits)
    return sets


@njit(cache=True, nogil=True, fastmath=False)
def _forward(x: Operands, position: Array, temperature: float, parts: int, entries: Entries, out: Results) -> None:
    """Fill the logits of the entries, and ``out`` with all that follows from them."""
    sets = _logits_in_rank_order(x, position, temperature, parts, entries.logits)
    softmax(sets, _flat_entries(entries), parts, _flat(out))


@njit(cache=True, nogil=True, fastmath=False)
def _backward(
    x: Operands,
    position: Array,
    temperature: float,
    parts: int,
    entries: Entries,
    results: Results,
    upstream: Results,
    hidden_grad: Array,
    row_grads: Array,
    bias_grads: Array,
) -> None:
    """Gradients of hidden states (N, T, D), of the candidates' rows (P, K, D) and bias (P, K); no rows where their D
    is 0, nothing of what has size 0."""
    order, _, sets = _in_rank_order(position, x.row_of, x.hidden.shape[1])
    dlogits = np.empty_like(entries.logits)
    flat = dlogits.reshape(-1)
    softmax_gradient(sets, _flat_entries(entries), _flat(results), _flat(upstream), temperature, parts, flat)
    if hidden_grad.size:
        out = hidden_grad.reshape((len(sets.begin), hidden_grad.shape[2]))  # (N T, D)
        steps = Segments(sets.begin, sets.end, sets.values, flat, order.reshape(-1), sets.target[:0])
        sum_rows(steps, x.rows, 1, parts, out)
    if bias_grads.size:
        candidate_gradients(dlogits, x.hidden, position, parts, row_grads, bias_grads)


# --- launchers --------------------------------------------------------------------------------------------------------


def ranking_logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    position: Tensor,
    values: Tensor | None,
    temperature: float,
    reference: tuple[Tensor, Tensor, Tensor | None] | Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor | None, ...]:
    """Run the forward kernels.

    Args:
        hidden: (N, T, D), weight: (V, D), bias: (V,) or None; floating.
        candidates: (P, K) int64 token ids, position: (N, K) int32, values: (N, K, C) in rank order or None.
        reference: hidden (N, T, D'), weight (V', D') and bias of the reference, or its logits (N, T, K) by candidate,
            divided by the temperature.
        keep: return what a backward pass needs, too, not only the first four.

    Returns:
        log-probs (N, T), entropy (N, T), expectations (N, T, C), kl (N, T), logits (N, T, K) in rank order,
        norm (N, T, 2 or 4), the reference's logits, and None; kl and the reference's None without one. All float32, or
        float64 if hidden or weight is.
    """
    (n, t, d), k = hidden.shape, candidates.shape[1]
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    kind, has_reference = NUMPY[dtype], reference is not None
    # 0 where there is no pool, so that equal inputs have equal outputs, all of them.
    logits, ref_logits = np.zeros((n, t, k), kind), np.zeros((n if has_reference else 0, t, k), kind)
    out = new_results((n, t), 0 if values is None else values.shape[2], has_reference, kind)
    if logits.size:
        places, entries = position.numpy(), Entries(logits, _flat_values(values, dtype), ref_logits)
        parts = parts_for((64 + d) * logits.size)
        if isinstance(reference, Tensor):
            logits_in_rank_order(array_of(reference, dtype, 3), places, ref_logits)
        elif reference is not None:
            of_reference = operands_of(*reference, candidates, dtype)
            _logits_in_rank_order(of_reference, places, temperature, parts, ref_logits)
        operands = operands_of(hidden, weight, bias, candidates, dtype)
        _forward(operands, places, temperature, parts, entries, out)
    of_kl = torch.from_numpy(out.kl) if has_reference else None
    expectations = None if values is None and not keep else torch.from_numpy(out.expectations)
    results = torch.from_numpy(out.logprobs), torch.from_numpy(out.entropy), expectations, of_kl
    if not keep:
        return results
    kept = torch.from_numpy(logits), torch.from_numpy(out.norm)
    return *results, *kept, torch.from_numpy(ref_logits) if has_reference else None, None


def ranking_logprobs_backward(
    upstream: Sequence[Tensor],
    saved: Sequence[Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    position: Tensor,
    values: Tensor | None,
    temperature: float,
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run the backward kernels that ``needs_grad`` (hidden, weight, bias) asks for; None for the others.

    Args:
        upstream: gradients of log-probs (N, T), entropy (N, T), expectations (N, T, C) and kl (N, T), or size 0.
        saved: what the forward launcher returned, from entropy on.

    Returns:
        Gradients of hidden (N, T, D), of the candidates' rows of weight (P, K, D) and of their bias (P, K), the last
        two to be added up by token.
    """
    entropy, expectations, kl, logits, norm, ref_logits, _ = saved
    dtype, (n, t, d), (p, k) = logits.dtype, hidden.shape, candidates.shape
    hidden_grad = torch.zeros((n, t, d) if needs_grad[0] else (0, t, d), dtype=dtype)
    rows_shape, bias_shape = (p, k, d if needs_grad[1] else 0), (p if needs_grad[1] or needs_grad[2] else 0, k)
    row_grads, bias_grads = torch.zeros(rows_shape, dtype=dtype), torch.zeros(bias_shape, dtype=dtype)
    if logits.numel():
        _backward(
            operands_of(hidden, weight, None, candidates, dtype),
            position.numpy(),
            temperature,
            parts_for((64 + d) * logits.numel()),
            Entries(logits.numpy(), _flat_values(values, dtype), array_of(ref_logits, dtype, 3)),
            results_of((None, entropy, expectations, kl, norm), dtype, 2),
            results_of((*upstream, None), dtype, 2),
            hidden_grad.numpy(),
            row_grads.numpy(),
            bias_grads.numpy(),
        )
    return (
        hidden_grad.to(hidden.dtype) if needs_grad[0] else None,
        row_grads if needs_grad[1] else None,
        bias_grads if needs_grad[2] else None,
    )


def _flat_values(values: Tensor | None, dtype: torch.dtype) -> Array:
    """(N K, C)"""
    return array_of(None if values is None else values.flatten(0, 1), dtype, 2)
