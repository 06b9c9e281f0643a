"""restricted_logprobs on the CPU: the steps of its forward and backward pass as parallel loops over ragged sets.

The mathematics stands in ``flexrec/ops/restricted_logprobs.py``; names here are its names. Row m has the entries
offsets[m] .. offsets[m + 1] of nnz; ``row`` (nnz,) says which row an entry belongs to. Threads get runs of rows, or of
tokens, with about the same number of entries, and every number is added up by one thread in a fixed order: results are
bitwise repeatable for any number of threads. Rows with one entry read no hidden state and no weight row.

Cost: nnz D multiplications forward, and as many for each of the two gradients. Weight rows are read where they are, in
their own dtype if that is the one computed in; of half precision, each token's row is converted once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from flexrec.ops.numba_threads import follow_torch_threads
from flexrec.ops.ranking_logprobs_numba import FLOOR, IMPOSSIBLE, _add_rows

FINE, ENDS, DESCENDING, OUTSIDE, REPEATED, MISSING = range(6)  # what check_entries finds

# Sums may be reordered and multiplications fused; infinities and NaN keep their meaning.
_REORDER = {"reassoc", "contract", "nsz"}
_PARTS = 8  # shares of the work per thread, so that none waits long for another


# --- kernels ----------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def check_entries(ids: np.ndarray, offsets: np.ndarray, targets: np.ndarray, vocab_size: int) -> tuple[int, int, int]:
    """Look for what is wrong: FINE, or the first fault and the two numbers that name it.

    ENDS: first and last offset. DESCENDING: index into the offsets. OUTSIDE: index into ids and the token. REPEATED:
    row and the token that it has twice. MISSING: row and its target, if ``targets`` is not of size 0.
    """
    rows = len(offsets) - 1
    if offsets[0] != 0 or offsets[rows] != len(ids):
        return ENDS, offsets[0], offsets[rows]
    for m in range(rows):
        if offsets[m + 1] < offsets[m]:
            return DESCENDING, m, 0
    for e in range(len(ids)):
        if ids[e] < 0 or ids[e] >= vocab_size:
            return OUTSIDE, e, ids[e]
    last_row = np.full(vocab_size, -1, np.int64)  # the last row that had the token
    for m in range(rows):
        for e in range(offsets[m], offsets[m + 1]):
            if last_row[ids[e]] == m:
                return REPEATED, m, ids[e]
            last_row[ids[e]] = m
        if len(targets) and (targets[m] < 0 or targets[m] >= vocab_size or last_row[targets[m]] != m):
            return MISSING, m, targets[m]
    return FINE, 0, 0


@njit(cache=True, nogil=True)
def _owners(offsets: np.ndarray, owner: np.ndarray) -> None:
    """owner[e] = the segment that entry e belongs to."""
    for s in range(len(offsets) - 1):
        owner[offsets[s] : offsets[s + 1]] = s


@njit(cache=True)
def _share(offsets: np.ndarray, part: int, parts: int) -> tuple[int, int]:
    """First and last + 1 of the rows whose entries begin in a part of all entries; trailing empty rows go last."""
    nnz = offsets[-1]
    low = np.searchsorted(offsets[:-1], part * nnz // parts) if part else 0
    high = np.searchsorted(offsets[:-1], (part + 1) * nnz // parts) if part + 1 < parts else len(offsets) - 1
    return low, high


@njit(cache=True, nogil=True, parallel=True, fastmath=_REORDER)
def _logits(
    hidden: np.ndarray,
    rows: np.ndarray,
    bias: np.ndarray,
    ids: np.ndarray,
    offsets: np.ndarray,
    temperature: float,
    parts: int,
    logits: np.ndarray,
) -> None:
    """logits[e] = (hidden[m] . rows[ids[e]] + bias[ids[e]]) / temperature, four entries of a row at a time.

    Args:
        hidden: (M, D), rows: (R, D), bias: (R,) or (0,), logits: (nnz,) out, all of one dtype. ids: (nnz,) < R.
    """
    divisor = logits.dtype.type(temperature)
    for part in prange(parts):
        low, high = _share(offsets, part, parts)
        for m in range(low, high):
            begin, end = offsets[m], offsets[m + 1]
            if end - begin == 1:
                logits[begin] = 0.0
                continue
            h, last = hidden[m], end - 1
            for e in range(begin, end, 4):
                e1, e2, e3 = min(e + 1, last), min(e + 2, last), min(e + 3, last)
                w0, w1, w2, w3 = rows[ids[e]], rows[ids[e1]], rows[ids[e2]], rows[ids[e3]]
                z0 = z1 = z2 = z3 = logits.dtype.type(0)
                for d in range(len(h)):
                    z0 += h[d] * w0[d]
                    z1 += h[d] * w1[d]
                    z2 += h[d] * w2[d]
                    z3 += h[d] * w3[d]
                logits[e], logits[e1], logits[e2], logits[e3] = z0, z1, z2, z3
            for e in range(begin, end):
                z = logits[e]
                if len(bias):
                    z += bias[ids[e]]
                z /= divisor
                logits[e] = FLOOR if z < FLOOR else z  # a NaN stays


@njit(cache=True, nogil=True, parallel=True)
def _softmax(
    logits: np.ndarray,
    ref_logits: np.ndarray,
    values: np.ndarray,
    ids: np.ndarray,
    offsets: np.ndarray,
    targets: np.ndarray,
    parts: int,
    logprobs: np.ndarray,
    entropy: np.ndarray,
    expectations: np.ndarray,
    kl: np.ndarray,
    norm: np.ndarray,
    shares: np.ndarray,
) -> None:
    """The sums over every set; arguments as of :func:`set_softmax`, of size 0 what is not given; shares (nnz,) space.

    KL is summed as the mean of (z - m) - (r - m') less log s - log s': where the policies agree both are exactly 0.
    """
    for part in prange(parts):
        low, high = _share(offsets, part, parts)
        for m in range(low, high):
            begin, end = offsets[m], offsets[m + 1]
            largest = ref_largest = 2.0 * FLOOR
            for e in range(begin, end):
                largest = max(largest, logits[e])
                if len(ref_logits):
                    ref_largest = max(ref_largest, ref_logits[e])
            total = weighted = ref_total = apart = 0.0
            chosen = math.nan
            for e in range(begin, end):
                shifted = logits[e] - largest
                share = math.exp(shifted)
                shares[e] = share
                total += share
                weighted += share * shifted
                if len(targets) and ids[e] == targets[m]:
                    chosen = shifted
                if len(ref_logits):
                    ref_shifted = ref_logits[e] - ref_largest
                    ref_total += math.exp(ref_shifted)
                    if share != 0.0:
                        apart += math.inf if ref_shifted < IMPOSSIBLE else share * (shifted - ref_shifted)
            if begin == end:
                total = ref_total = 1.0
            log_total = math.log(total)
            norm[m, 0], norm[m, 1] = largest, log_total
            entropy[m] = log_total - weighted / total
            if len(targets):
                log_prob = chosen - log_total
                logprobs[m] = -math.inf if log_prob < IMPOSSIBLE else log_prob
            for c in range(values.shape[1]):
                expectation = 0.0
                for e in range(begin, end):
                    expectation += shares[e] * values[e, c]
                expectations[m, c] = expectation / total
            if len(ref_logits):
                ref_log_total = math.log(ref_total)
                norm[m, 2], norm[m, 3] = ref_largest, ref_log_total
                kl[m] = apart / total - (log_total - ref_log_total)


@njit(cache=True, nogil=True, parallel=True)
def _softmax_gradient(
    logits: np.ndarray,
    ref_logits: np.ndarray,
    values: np.ndarray,
    ids: np.ndarray,
    offsets: np.ndarray,
    targets: np.ndarray,
    entropy: np.ndarray,
    expectations: np.ndarray,
    kl: np.ndarray,
    norm: np.ndarray,
    grad_logprobs: np.ndarray,
    grad_entropy: np.ndarray,
    grad_expectations: np.ndarray,
    grad_kl: np.ndarray,
    temperature: float,
    parts: int,
    dlogits: np.ndarray,
) -> None:
    """dlogits (nnz,): exactly 0 in rows without a choice or a possible token. An infinite KL has no gradient."""
    for part in prange(parts):
        low, high = _share(offsets, part, parts)
        for m in range(low, high):
            begin, end = offsets[m], offsets[m + 1]
            largest, log_total = norm[m, 0], norm[m, 1]
            if end - begin < 2 or largest < IMPOSSIBLE:
                dlogits[begin:end] = 0.0
                continue
            grad_logprob = grad_logprobs[m] if len(targets) else 0.0
            constant = grad_logprob + grad_entropy[m] * entropy[m]
            for c in range(values.shape[1]):
                constant += grad_expectations[m, c] * expectations[m, c]
            diverges = len(ref_logits) > 0 and not math.isinf(kl[m]) and grad_kl[m] != 0.0
            if diverges:
                constant += grad_kl[m] * kl[m]
            for e in range(begin, end):
                if logits[e] < IMPOSSIBLE:
                    dlogits[e] = 0.0
                    continue
                log_prob = (logits[e] - largest) - log_total
                slope = -constant - grad_entropy[m] * log_prob
                for c in range(values.shape[1]):
                    slope += grad_expectations[m, c] * values[e, c]
                if diverges:
                    slope += grad_kl[m] * (log_prob - ((ref_logits[e] - norm[m, 2]) - norm[m, 3]))
                grad = math.exp(log_prob) * slope
                if len(targets) and ids[e] == targets[m]:
                    grad += grad_logprob
                dlogits[e] = grad / temperature


@njit(cache=True, nogil=True)
def _sort_by_token(
    ids: np.ndarray,
    row: np.ndarray,
    coefficients: np.ndarray,
    vocab_size: int,
    tokens: np.ndarray,
    starts: np.ndarray,
    sorted_row: np.ndarray,
    sorted_coefficients: np.ndarray,
) -> int:
    """Entries whose coefficient is not 0, by token and in order: the U tokens that have any and where each starts.

    Returns U; tokens[:U], starts[:U + 1], and sorted_row and sorted_coefficients up to starts[U] are filled.
    """
    place = np.zeros(vocab_size + 1, np.int64)
    for e in range(len(ids)):
        place[ids[e] + 1] += coefficients[e] != 0.0
    used = 0
    starts[0] = 0
    for token in range(vocab_size):
        if place[token + 1]:
            tokens[used] = token
            used += 1
            starts[used] = place[token] + place[token + 1]
        place[token + 1] += place[token]
    for e in range(len(ids)):
        if coefficients[e] != 0.0:
            at = place[ids[e]]
            sorted_row[at], sorted_coefficients[at] = row[e], coefficients[e]
            place[ids[e]] = at + 1
    return used


@njit(cache=True, nogil=True, parallel=True, fastmath=_REORDER)
def _segment_sums(
    coefficients: np.ndarray,
    index: np.ndarray,
    table: np.ndarray,
    offsets: np.ndarray,
    place: np.ndarray,
    least: int,
    parts: int,
    out: np.ndarray,
) -> None:
    """out[place[s]] += the sum over segment s of coefficients[e] * table[index[e]].

    ``place`` may be of size 0: segment s goes to row s. Segments of fewer than ``least`` entries read nothing.
    """
    for part in prange(parts):
        low, high = _share(offsets, part, parts)
        for s in range(low, high):
            if offsets[s + 1] - offsets[s] >= least:
                total = out[place[s] if len(place) else s]
                _add_rows(total, table, index, coefficients, offsets[s], offsets[s + 1])


# --- on tensors -------------------------------------------------------------------------------------------------------


def owners(offsets: Tensor, entries: int) -> Tensor:
    """(entries,) int64, the row of every entry."""
    owner = torch.empty(entries, dtype=torch.int64)
    _owners(offsets.numpy(), owner.numpy())
    return owner


def sampled_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, offsets: Tensor, row: Tensor, temperature: float
) -> Tensor:
    """(nnz,) logits of every entry, float32 or, if an operand is, float64; 0 in rows of a single one."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    rows, index, used = _rows_used(weight, ids, dtype)
    if bias is not None and used is not None:
        bias = bias.index_select(0, used)
    logits = torch.empty(ids.shape, dtype=dtype)
    _logits(
        _array(hidden, dtype),
        rows,
        _array(bias, dtype),
        index,
        offsets.numpy(),
        temperature,
        _parts(ids.numel() * hidden.shape[1]),
        logits.numpy(),
    )
    return logits


def set_softmax(
    logits: Tensor, ref_logits: Tensor | None, values: Tensor, ids: Tensor, offsets: Tensor, targets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What follows from the logits of every entry, in their dtype.

    Args:
        logits, ref_logits: (nnz,); the reference's up to a constant per row.
        values: (nnz, C) floating; targets: (M,) int64.

    Returns:
        log-probs (M,), NaN where the target is not allowed and 0 without targets; entropy (M,); expectations (M, C);
        KL (M,), 0 without a reference; norm (M, 4), for the backward pass: m, log s and those of the reference.
    """
    m, c = len(offsets) - 1, values.shape[1]
    out = [np.zeros(shape) for shape in ((m,), (m,), (m, c), (m,), (m, 4))]
    _softmax(
        *_doubles(logits, ref_logits, values),
        ids.numpy(),
        offsets.numpy(),
        _array(targets, torch.int64),
        _parts(64 * len(logits)),
        *out,
        np.empty(len(logits)),
    )
    kind = logits.numpy().dtype
    logprobs, entropy, expectations, kl, norm = (torch.from_numpy(x.astype(kind, copy=False)) for x in out)
    return logprobs, entropy, expectations, kl, norm


def set_softmax_backward(
    upstream: tuple[Tensor, Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    logits: Tensor,
    ref_logits: Tensor | None,
    values: Tensor,
    ids: Tensor,
    offsets: Tensor,
    row: Tensor,
    targets: Tensor | None,
    temperature: float,
) -> Tensor:
    """(nnz,): the gradient of (h . w + b), the logits before the division by the temperature.

    Args:
        upstream: gradients of log-probs (M,), entropy (M,), expectations (M, C) and KL (M,).
        results: entropy, expectations, KL and norm as :func:`set_softmax` returned them.
    """
    dlogits = np.empty(len(logits))
    _softmax_gradient(
        *_doubles(logits, ref_logits, values),
        ids.numpy(),
        offsets.numpy(),
        _array(targets, torch.int64),
        *_doubles(*results),
        *_doubles(*upstream),
        temperature,
        _parts(64 * len(logits)),
        dlogits,
    )
    return torch.from_numpy(dlogits).to(logits.dtype)


def hidden_gradient(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, row: Tensor
) -> Tensor:
    """(M, D) in the dtype of ``hidden``; exactly 0 in rows without a choice."""
    rows, index, _ = _rows_used(weight, ids, dlogits.dtype)
    grad = torch.zeros(hidden.shape, dtype=dlogits.dtype)
    parts = _parts(grad.numel() + len(ids) * hidden.shape[1])
    _segment_sums(dlogits.numpy(), index, rows, offsets.numpy(), _NOWHERE, 2, parts, grad.numpy())
    return grad.to(hidden.dtype)


def weight_gradient(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, row: Tensor, into: Tensor | None = None
) -> Tensor:
    """(V, D): the gradient in the dtype of ``weight``, or ``into``, a contiguous (V, D) floating tensor, added to."""
    out = torch.zeros_like(weight, memory_format=torch.contiguous_format) if into is None else into
    if out.dtype == dlogits.dtype:
        tokens, entries = _by_token(dlogits, ids, row, len(weight))
        _sum_tokens(entries, hidden, tokens.numpy(), out)
    else:
        tokens, rows = weight_gradient_rows(dlogits, hidden, weight, ids, row)
        out.index_add_(0, tokens, rows.to(out.dtype))
    return out


def weight_gradient_rows(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, row: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens (U,) int64, each once and ascending, and their gradients (U, D) in the dtype of ``weight``."""
    tokens, entries = _by_token(dlogits, ids, row, len(weight))
    rows = torch.zeros((len(tokens), hidden.shape[1]), dtype=dlogits.dtype)
    _sum_tokens(entries, hidden, _NOWHERE, rows)
    return tokens, rows.to(weight.dtype)


_NOWHERE = np.empty(0, np.int64)


class _TokenEntries(NamedTuple):
    """Entries sorted by token: where each token's start (U + 1,), and the row and gradient of each."""

    starts: np.ndarray
    row: np.ndarray
    grads: np.ndarray


def _by_token(dlogits: Tensor, ids: Tensor, row: Tensor, vocab_size: int) -> tuple[Tensor, _TokenEntries]:
    """The U tokens with a gradient, ascending, and their entries."""
    most = min(len(ids), vocab_size)
    tokens, starts = np.empty(most, np.int64), np.empty(most + 1, np.int64)
    sorted_row, sorted_grads = np.empty(len(ids), np.int64), np.empty_like(dlogits.numpy())
    used = _sort_by_token(
        ids.numpy(), row.numpy(), dlogits.numpy(), vocab_size, tokens, starts, sorted_row, sorted_grads
    )
    return torch.from_numpy(tokens[:used]), _TokenEntries(starts[: used + 1], sorted_row, sorted_grads)


def _sum_tokens(entries: _TokenEntries, hidden: Tensor, place: np.ndarray, out: Tensor) -> None:
    """Add each token's sum of gradient times hidden state to its ``place`` in ``out``."""
    parts = _parts(len(entries.row) * hidden.shape[1])
    states = _array(hidden, out.dtype)
    _segment_sums(entries.grads, entries.row, states, entries.starts, place, 1, parts, out.numpy())


def _rows_used(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, Tensor | None]:
    """Weight rows in ``dtype``, each entry's index into them, and which they are (None: all of them)."""
    if weight.dtype == dtype and weight.is_contiguous():
        return weight.detach().numpy(), ids.numpy(), None
    used, index = ids.unique(return_inverse=True)
    return _array(weight.index_select(0, used), dtype), index.numpy(), used


def _array(x: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """A contiguous array of that dtype; of size 0 for None."""
    if x is None:
        return _NOTHING[dtype]
    x = x.detach()
    return (x if x.dtype == dtype else x.to(dtype)).contiguous().numpy()


_NOTHING: dict[torch.dtype, np.ndarray] = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
    torch.int64: np.empty(0, np.int64),
}


def _doubles(*tensors: Tensor | None) -> Iterator[np.ndarray]:
    """Float64 arrays: beside the exponentials the conversion is nothing, and what sums over sets is compiled once."""
    return (_array(x, torch.float64) for x in tensors)


def _parts(work: int) -> int:
    """How many shares to cut some multiplications into: one where threads would cost more than they save."""
    follow_torch_threads()
    return 1 if work < 100_000 else _PARTS * torch.get_num_threads()
