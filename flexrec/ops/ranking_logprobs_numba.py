"""ranking_logprobs on the CPU: forward and backward as parallel loops over the triangle of what remains.

The mathematics stands in ``flexrec/ops/ranking_logprobs.py``; names here are its names. All (N, T, K) arrays are in
rank order, entry [n, t, k] for the candidate at rank k: the pool of step t is then k >= t, the chosen candidate is
k = t, and entries with k < t are neither computed nor read. Rows of the output embedding are read where they are, by
index: nothing is gathered, and what lies beyond a list's length is never read.

Cost of a ranking with T = K: K^2 D flops a product (half the square), one forward and two backward; bytes: its K rows
of the embedding and T hidden states, which stay in the cache, twice, and 4 T K for the logits between the passes.

Matrix products take four rows by two, or eight rows at a time, with the loop over D inside, which LLVM vectorises:
each number loaded is used more than once, and a short edge is filled by repeating the last row. Sums over a pool are
accumulated in float64, which costs nothing beside the exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from flexrec.ops.numba_threads import follow_torch_threads

Array = np.ndarray
_NUMPY: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}

# Stands for a logit of -inf. Being finite it needs no special case: its probability underflows to exactly 0, 0 * FLOOR
# is 0 and not NaN, and where nothing else remains the softmax over equal FLOORs is uniform.
FLOOR = -1e20
IMPOSSIBLE = FLOOR / 2  # a logit or log-probability below this is that of an impossible candidate

# Sums may be reordered and multiplications fused; infinities and NaN keep their meaning.
_REORDER = {"reassoc", "contract", "nsz"}


@njit(cache=True)
def _candidates_by_rank(position: Array, order: Array) -> int:
    """Invert ``position`` (K,): the candidate at each rank, to ``order`` (K,). Returns the list's length."""
    length = 0
    for candidate in range(len(position)):
        if position[candidate] >= 0:
            order[position[candidate]] = candidate
            length += 1
    return length


@njit(cache=True, fastmath=_REORDER)
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


@njit(cache=True, fastmath=_REORDER)
def _add_rows(out: Array, rows: Array, index: Array, coefficients: Array, start: int, stop: int) -> None:
    """out (D,) += the sum of coefficients[i] * rows[index[i]] over start <= i < stop, eight rows at a time."""
    last = stop - 1
    c = np.empty(8, out.dtype)
    for i in range(start, stop, 8):
        for j in range(8):
            c[j] = coefficients[i + j] if i + j < stop else 0
        c0, c1, c2, c3, c4, c5, c6, c7 = c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]
        r0, r1 = rows[index[i]], rows[index[min(i + 1, last)]]
        r2, r3 = rows[index[min(i + 2, last)]], rows[index[min(i + 3, last)]]
        r4, r5 = rows[index[min(i + 4, last)]], rows[index[min(i + 5, last)]]
        r6, r7 = rows[index[min(i + 6, last)]], rows[index[min(i + 7, last)]]
        for d in range(len(out)):
            near = c0 * r0[d] + c1 * r1[d] + c2 * r2[d] + c3 * r3[d]
            out[d] += near + (c4 * r4[d] + c5 * r5[d] + c6 * r6[d] + c7 * r7[d])


@njit(cache=True)
def _logits_of_ranking(
    hidden: Array, rows: Array, row_index: Array, bias: Array, position: Array, temperature: float, logits: Array
) -> None:
    index = np.empty(len(position), np.int64)
    length = _candidates_by_rank(position, index)
    for k in range(length):
        index[k] = row_index[index[k]]
    steps = min(len(hidden), length)
    _dots(hidden, rows, index, steps, length, logits)
    divisor = logits.dtype.type(temperature)
    for t in range(steps):
        for k in range(t, length):
            z = logits[t, k]
            if len(bias):
                z += bias[index[k]]
            z /= divisor
            logits[t, k] = FLOOR if z < FLOOR else z  # a NaN stays


@njit(cache=True, nogil=True, parallel=True)
def triangle_logits(
    hidden: Array, rows: Array, row_index: Array, bias: Array, position: Array, temperature: float, logits: Array
) -> None:
    """logits[n, t, k] = (hidden[n, t] . row + bias) / temperature of the candidate at rank k, for t <= k < length.

    Args:
        hidden: (N, T, D), rows: (R, D), bias: (R,) or (0,), logits: (N, T, K), all of one dtype.
        row_index: (P, K) int64, which of the rows is each candidate's. position: (N, K) int32.
    """
    group = len(hidden) // len(row_index)
    for n in prange(len(hidden)):
        _logits_of_ranking(hidden[n], rows, row_index[n // group], bias, position[n], temperature, logits[n])


@njit(cache=True, nogil=True, parallel=True)
def logits_in_rank_order(by_candidate: Array, position: Array, logits: Array) -> None:
    """Logits (N, T, K) given by candidate as :func:`triangle_logits` makes them."""
    for n in prange(len(by_candidate)):
        for candidate in range(by_candidate.shape[2]):
            rank = position[n, candidate]
            for t in range(min(rank + 1, by_candidate.shape[1])):
                z = by_candidate[n, t, candidate]
                logits[n, t, rank] = FLOOR if z < FLOOR else z


@njit(cache=True)
def _log_ratio(z: float, norm: Array, ref_z: float, ref_norm: Array) -> tuple[float, bool]:
    """log p - log q of one entry, and whether the reference allows it."""
    ref_log_prob = (ref_z - ref_norm[0]) - ref_norm[1]
    return ((z - norm[0]) - norm[1]) - ref_log_prob, not ref_log_prob < IMPOSSIBLE


@njit(cache=True)
def _length(position: Array) -> int:
    """How many of the K candidates are in the list."""
    length = 0
    for candidate in range(len(position)):
        length += position[candidate] >= 0
    return length


@njit(cache=True)
def _softmax_of_step(z: Array, t: int, length: int, shares: Array, norm: Array) -> tuple[float, float, float]:
    """exp(z - m) of the pool to ``shares``, m and the log of their sum to ``norm``; log-prob, entropy and the sum."""
    largest = z[t]
    for k in range(t + 1, length):
        largest = max(largest, z[k])
    total = weighted = 0.0
    for k in range(t, length):
        shifted = z[k] - largest
        shares[k] = math.exp(shifted)
        total += shares[k]
        weighted += shares[k] * shifted
    log_total = math.log(total)
    norm[0], norm[1] = largest, log_total
    logprob = (z[t] - largest) - log_total
    return -np.inf if logprob < IMPOSSIBLE else logprob, log_total - weighted / total, total


@njit(cache=True)
def _divergence(z: Array, norm: Array, ref_z: Array, ref_norm: Array, t: int, length: int, shares: Array) -> float:
    """The sum over the pool of shares times (log p - log q)."""
    divergence = 0.0
    for k in range(t, length):
        log_ratio, reachable = _log_ratio(z[k], norm, ref_z[k], ref_norm)
        if shares[k] > 0.0:
            divergence += shares[k] * log_ratio if reachable else np.inf
    return divergence


@njit(cache=True, nogil=True, parallel=True)
def restricted_softmax(
    logits: Array,
    position: Array,
    values: Array,
    ref_logits: Array,
    ref_norm: Array,
    logprobs: Array,
    entropy: Array,
    expectations: Array,
    kl: Array,
    norm: Array,
) -> None:
    """Everything of a step that is a sum over its pool; exactly 0 at steps that have none.

    Args:
        logits: (N, T, K) in rank order. position: (N, K) int32. values: (N, K, C) in rank order.
        ref_logits, ref_norm: of the reference, as ``logits`` and ``norm``; kl is filled if ``kl.size``.
        logprobs, entropy, kl: (N, T) out. expectations: (N, T, C) out.
        norm: (N, T, 2) out: the largest logit m and log of the sum of exp(z - m). Where m is below IMPOSSIBLE, nothing
            depends on the logits.
    """
    for n in prange(len(logits)):
        length = _length(position[n])
        shares = np.empty(logits.shape[2], np.float64)
        for t in range(logits.shape[1]):
            if t >= length:
                logprobs[n, t], entropy[n, t], norm[n, t, 0], norm[n, t, 1] = 0.0, 0.0, FLOOR, 0.0
                for c in range(values.shape[2]):
                    expectations[n, t, c] = 0.0
                if kl.size:
                    kl[n, t] = 0.0
                continue
            logprobs[n, t], entropy[n, t], total = _softmax_of_step(logits[n, t], t, length, shares, norm[n, t])
            for c in range(values.shape[2]):
                expected = 0.0
                for k in range(t, length):
                    expected += shares[k] * values[n, k, c]
                expectations[n, t, c] = expected / total
            if kl.size:
                apart = _divergence(logits[n, t], norm[n, t], ref_logits[n, t], ref_norm[n, t], t, length, shares)
                kl[n, t] = apart / total


@njit(cache=True, nogil=True, parallel=True)
def softmax_gradient(
    logits: Array,
    norm: Array,
    position: Array,
    values: Array,
    ref_logits: Array,
    ref_norm: Array,
    entropy: Array,
    expectations: Array,
    kl: Array,
    grad_logprobs: Array,
    grad_entropy: Array,
    grad_expectations: Array,
    grad_kl: Array,
    temperature: float,
    dlogits: Array,
) -> None:
    """Gradient of the products hidden . row, (N, T, K) in rank order, from those of the step's results; 0 for no pool.

    An infinite divergence has no gradient. Arguments as of :func:`restricted_softmax`; ``kl`` (0, 0) if there is none.
    """
    for n in prange(len(logits)):
        length = _length(position[n])
        for t in range(logits.shape[1]):
            z, (largest, log_total), slope = logits[n, t], norm[n, t], dlogits[n, t]
            if t >= length or largest < IMPOSSIBLE:
                slope[:] = 0.0
                continue
            mean = -grad_logprobs[n, t] - grad_entropy[n, t] * entropy[n, t]
            for c in range(values.shape[2]):
                mean -= grad_expectations[n, t, c] * expectations[n, t, c]
            for k in range(t, length):
                slope[k] = mean - grad_entropy[n, t] * ((z[k] - largest) - log_total)
                for c in range(values.shape[2]):
                    slope[k] += grad_expectations[n, t, c] * values[n, k, c]
            if kl.size and not math.isinf(kl[n, t]):
                for k in range(t, length):
                    log_ratio, _ = _log_ratio(z[k], norm[n, t], ref_logits[n, t, k], ref_norm[n, t])
                    slope[k] += grad_kl[n, t] * (log_ratio - kl[n, t])
            for k in range(t, length):
                slope[k] *= math.exp((z[k] - largest) - log_total)
            slope[t] += grad_logprobs[n, t]
            for k in range(t, length):
                slope[k] = 0.0 if z[k] < IMPOSSIBLE else slope[k] / temperature


@njit(cache=True)
def _hidden_gradient_of_ranking(
    dlogits: Array, rows: Array, row_index: Array, position: Array, hidden_grad: Array
) -> None:
    index = np.empty(len(position), np.int64)
    length = _candidates_by_rank(position, index)
    for k in range(length):
        index[k] = row_index[index[k]]
    hidden_grad[:] = 0.0
    for t in range(len(dlogits)):
        _add_rows(hidden_grad[t], rows, index, dlogits[t], t, length)


@njit(cache=True, nogil=True, parallel=True)
def hidden_gradient(dlogits: Array, rows: Array, row_index: Array, position: Array, hidden_grad: Array) -> None:
    """hidden_grad[n, t] (N, T, D) = the sum over the pool of dlogits[n, t, k] times the row of the candidate there."""
    group = len(dlogits) // len(row_index)
    for n in prange(len(dlogits)):
        _hidden_gradient_of_ranking(dlogits[n], rows, row_index[n // group], position[n], hidden_grad[n])


@njit(cache=True)
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
            _add_rows(row_grad, hidden[n], every_step, column, 0, steps)
    return bias_grad


@njit(cache=True, nogil=True, parallel=True)
def candidate_gradients(dlogits: Array, hidden: Array, position: Array, row_grads: Array, bias_grads: Array) -> None:
    """Gradients of every candidate's row (P, K, D) and bias (P, K): sums over the rankings and steps of its list.

    The rows are left out where their D is 0. Candidates share no output: no order of threads changes a bit.
    """
    k_max = bias_grads.shape[1]
    group = len(hidden) // len(bias_grads)
    for entry in prange(bias_grads.size):
        p, candidate = entry // k_max, entry % k_max
        bias_grads[p, candidate] = _gradient_of_candidate(
            dlogits, hidden, position, p * group, (p + 1) * group, candidate, row_grads[p, candidate]
        )


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
) -> tuple[Tensor | None, ...]:
    """Run the forward kernels.

    Args:
        hidden: (N, T, D), weight: (V, D), bias: (V,) or None; floating.
        candidates: (P, K) int64 token ids, position: (N, K) int32, values: (N, K, C) in rank order or None.
        reference: hidden (N, T, D'), weight (V', D') and bias of the reference, or its logits (N, T, K) by candidate,
            divided by the temperature.

    Returns:
        log-probs (N, T), entropy (N, T), expectations (N, T, C), kl (N, T), logits (N, T, K) in rank order,
        norm (N, T, 2), and the reference's logits and norm; kl and the last two None without a reference. All float32,
        or float64 if hidden or weight is.
    """
    (n, t, _), k = hidden.shape, candidates.shape[1]
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)

    kind = _NUMPY[dtype]
    follow_torch_threads()
    positions = position.numpy()

    def softmax(
        logits: Array, values: Tensor | None, ref_logits: Array | None = None, ref_norm: Array | None = None
    ) -> tuple[Array, Array, Array, Array | None, Array]:
        logprobs, entropy, norm = np.empty((n, t), kind), np.empty((n, t), kind), np.empty((n, t, 2), kind)
        expectations = np.empty((n, t, 0 if values is None else values.shape[2]), kind)
        kl = None if ref_logits is None else np.empty((n, t), kind)
        if logits.size:
            ref = _or_empty(ref_logits, kind, 3), _or_empty(ref_norm, kind, 3)
            outputs = logprobs, entropy, expectations, _or_empty(kl, kind, 2), norm
            restricted_softmax(logits, positions, _array(values, dtype, 3), *ref, *outputs)
        return logprobs, entropy, expectations, kl, norm

    ref_logits = ref_norm = None
    if reference is not None:
        if isinstance(reference, Tensor):
            ref_logits = np.zeros((n, t, k), kind)
            logits_in_rank_order(_array(reference, dtype, 3), positions, ref_logits)
        else:
            ref_logits = _logits(*reference, candidates, positions, temperature, dtype)
        ref_norm = softmax(ref_logits, None)[-1]
    logits = _logits(hidden, weight, bias, candidates, positions, temperature, dtype)
    *results, norm = softmax(logits, values, ref_logits, ref_norm)
    found = (*results, logits, norm, ref_logits, ref_norm)
    return tuple(None if array is None else torch.from_numpy(array) for array in found)


def ranking_logprobs_backward(
    upstream: Sequence[Tensor],
    saved: Sequence[Tensor],
    hidden: Tensor,
    weight: Tensor,
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
    entropy, expectations, kl, logits, norm, ref_logits, ref_norm = saved
    dtype, (p, k) = logits.dtype, candidates.shape
    (n, t, d), positions = hidden.shape, position.numpy()
    if logits.numel() == 0:
        shapes = ((n, t, d), (p, k, d), (p, k))
        zeros = (
            torch.zeros(shape, dtype=dtype) if need else None for need, shape in zip(needs_grad, shapes, strict=True)
        )
        hidden_grad, row_grads, bias_grads = zeros
        return hidden_grad, row_grads, bias_grads
    follow_torch_threads()
    dlogits = np.empty(logits.shape, _NUMPY[dtype])
    per_step = (values, ref_logits, ref_norm, entropy, expectations, kl, *upstream)
    arrays = (_array(x, dtype, dims) for x, dims in zip(per_step, (3, 3, 3, 2, 3, 2, 2, 2, 3, 2), strict=True))
    softmax_gradient(logits.numpy(), norm.numpy(), positions, *arrays, temperature, dlogits)
    states, rows, _, index = _operands(hidden, weight, None, candidates, dtype)
    hidden_grad = row_grads = bias_grads = None
    if needs_grad[0]:
        hidden_grad = torch.empty((n, t, d), dtype=dtype)
        hidden_gradient(dlogits, rows, index, positions, hidden_grad.numpy())
        hidden_grad = hidden_grad.to(hidden.dtype)
    if needs_grad[1] or needs_grad[2]:
        row_grads = torch.empty((p, k, d if needs_grad[1] else 0), dtype=dtype)
        bias_grads = torch.empty((p, k), dtype=dtype)
        candidate_gradients(dlogits, states, positions, row_grads.numpy(), bias_grads.numpy())
    return hidden_grad, row_grads if needs_grad[1] else None, bias_grads if needs_grad[2] else None


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    positions: Array,
    temperature: float,
    dtype: torch.dtype,
) -> Array:
    """(N, T, K) in rank order; 0 where there is no pool, so that equal inputs have equal outputs, all of them."""
    logits = np.zeros((*hidden.shape[:2], candidates.shape[1]), _NUMPY[dtype])
    if logits.size:
        states, rows, row_bias, index = _operands(hidden, weight, bias, candidates, dtype)
        triangle_logits(states, rows, index, row_bias, positions, temperature, logits)
    return logits


def _operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, candidates: Tensor, dtype: torch.dtype
) -> tuple[Array, Array, Array, Array]:
    """hidden (N, T, D), rows (R, D), their bias (R,) or (0,), and which row is each candidate's, (P, K).

    The rows are the embedding itself, or where that has another dtype or layout, a copy of the candidates' rows.
    """
    index = candidates
    if weight.dtype != dtype or not weight.is_contiguous():
        tokens = candidates.flatten()
        weight = weight.index_select(0, tokens)
        bias = None if bias is None else bias.index_select(0, tokens)
        index = torch.arange(len(tokens)).view(candidates.shape)
    return _array(hidden, dtype, 3), _array(weight, dtype, 2), _array(bias, dtype, 1), index.contiguous().numpy()


def _array(x: Tensor | None, dtype: torch.dtype, dims: int) -> Array:
    """A contiguous array of this dtype; an empty one of so many dimensions for None, or a tensor that stands for it."""
    if x is None or x.dim() != dims:
        return _or_empty(None, _NUMPY[dtype], dims)
    if x.dtype != dtype or not x.is_contiguous():
        x = x.to(dtype).contiguous()
    return x.detach().numpy()


def _or_empty(array: Array | None, kind: Any, dims: int) -> Array:
    return _EMPTY[kind, dims] if array is None else array


_EMPTY = {(kind, dims): np.empty((0,) * dims, kind) for kind in _NUMPY.values() for dims in (1, 2, 3)}
