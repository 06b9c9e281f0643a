"""restricted_logprobs on the CPU: the steps of its forward and backward pass as parallel loops over ragged sets.

Row m has the entries offsets[m] .. offsets[m + 1] of nnz; ``row`` (nnz,) says which row an entry belongs to. Threads
get runs of rows, or of tokens, with about the same number of entries. Rows with one entry read no hidden state and no
weight row.

Cost: nnz D multiplications forward, and as many for each of the two gradients. Weight rows are read where they are, in
their own dtype if that is the one computed in; of half precision, each token's row is converted once.
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
    array_of,
    embedding_rows,
    fresh_zeros,
    operands_of,
    share,
    sum_rows,
)
from flexrec.numba_kernels.softmax import (
    MISSING,
    NO_TARGET,
    Entries,
    Results,
    Sets,
    logit_of,
    new_results,
    results_of,
    softmax,
    softmax_gradient,
)
from flexrec.numba_kernels.threads import parts_for

FINE, ENDS, DESCENDING, OUTSIDE, REPEATED, MISSING_TARGET = range(6)  # what check_entries finds


# --- kernels ----------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, fastmath=False)
def check_entries(ids: Array, offsets: Array, targets: Array, vocab_size: int) -> tuple[int, int, int]:
    """Look for what is wrong: FINE, or the first fault and the two numbers that name it.

    ENDS: first and last offset. DESCENDING: index into the offsets. OUTSIDE: index into ids and the token. REPEATED:
    row and the token that it has twice. MISSING_TARGET: row and its target, if ``targets`` is not of size 0.
    """
    rows = len(offsets) - 1
    if offsets[0] != 0 or offsets[rows] != len(ids):
        return ENDS, offsets[0], offsets[rows]
    for m in range(rows):
        if offsets[m + 1] < offsets[m]:
            return DESCENDING, m, 0
    last_row = np.empty(vocab_size, np.int64)  # the last row that had the token; written where it will be read only
    for e in range(len(ids)):
        if ids[e] < 0 or ids[e] >= vocab_size:
            return OUTSIDE, e, ids[e]
        last_row[ids[e]] = -1
    for target in targets:
        if 0 <= target < vocab_size:
            last_row[target] = -1
    for m in range(rows):
        for e in range(offsets[m], offsets[m + 1]):
            if last_row[ids[e]] == m:
                return REPEATED, m, ids[e]
            last_row[ids[e]] = m
        if len(targets) and (targets[m] < 0 or targets[m] >= vocab_size or last_row[targets[m]] != m):
            return MISSING_TARGET, m, targets[m]
    return FINE, 0, 0


@njit(cache=True, nogil=True, fastmath=False)
def _owners(offsets: Array, owner: Array) -> None:
    """owner[e] = the segment that entry e belongs to."""
    for s in range(len(offsets) - 1):
        owner[offsets[s] : offsets[s + 1]] = s


@njit(cache=True, nogil=True, fastmath=False)
def _target_entries(ids: Array, offsets: Array, targets: Array) -> Array:
    """(M,): the entry of each row's target."""
    entries = np.full(len(targets), MISSING)
    for m in range(len(targets)):
        for e in range(offsets[m], offsets[m + 1]):
            if ids[e] == targets[m]:
                entries[m] = e
    return entries


@njit(cache=True, nogil=True, fastmath=REORDER)
def _logits_of_part(x: Operands, offsets: Array, temperature: float, part: int, parts: int, logits: Array) -> None:
    """:func:`_logits` of the rows that begin in a part of all entries."""
    hidden, rows, bias, ids = x
    divisor, zero = logits.dtype.type(temperature), logits.dtype.type(0)
    low, high = share(offsets[:-1], len(ids), part, parts)
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
            logits[e] = logit_of(logits[e], bias[ids[e]] if len(bias) else zero, divisor)


@njit(cache=True, nogil=True, parallel=True, fastmath=REORDER)
def _logits_in_parallel(x: Operands, offsets: Array, temperature: float, parts: int, logits: Array) -> None:
    for part in prange(parts):
        _logits_of_part(x, offsets, temperature, part, parts, logits)


@njit(cache=True, nogil=True, fastmath=REORDER)
def _logits(x: Operands, offsets: Array, temperature: float, parts: int, logits: Array) -> None:
    """logits[e] = (hidden[m] . rows[index[e]] + bias[index[e]]) / temperature, four entries of a row at a time."""
    if parts == 1:
        _logits_of_part(x, offsets, temperature, 0, 1, logits)
    else:
        _logits_in_parallel(x, offsets, temperature, parts, logits)


@njit(cache=True, nogil=True, fastmath=False)
def _sort_by_token(ids: Array, row: Array, coefficients: Array, vocab_size: int) -> tuple[Array, Array, Array, Array]:
    """Entries whose coefficient is not 0, by token and in order: the U tokens that have any, ascending; where each
    token's entries begin, and the last one's end, (U + 1,); and up to there the row and coefficient of every entry."""
    most = min(len(ids), vocab_size)
    tokens, starts = np.empty(most, np.int64), np.empty(most + 1, np.int64)
    sorted_row, sorted_coefficients = np.empty(len(ids), np.int64), np.empty_like(coefficients)
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
    return tokens[:used], starts[: used + 1], sorted_row, sorted_coefficients


@njit(cache=True, nogil=True, fastmath=False)
def _sets(ids: Array, offsets: Array, targets: Array) -> Sets:
    if len(targets):
        entries = _target_entries(ids, offsets, targets)
    else:
        entries = np.full(len(offsets) - 1, NO_TARGET)
    return Sets(offsets[:-1], offsets[1:], entries, offsets[:-1])


@njit(cache=True, nogil=True, fastmath=False)
def _forward(
    ids: Array,
    offsets: Array,
    targets: Array,
    x: Operands,
    temperature: float,
    parts: int,
    row: Array,
    entries: Entries,
    out: Results,
) -> None:
    """Fill the row and the logit of every entry, and ``out`` with all that follows from them."""
    _owners(offsets, row)
    _logits(x, offsets, temperature, parts, entries.logits)
    softmax(_sets(ids, offsets, targets), entries, parts, out)


# --- on tensors -------------------------------------------------------------------------------------------------------


def restricted_logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    targets: Tensor | None,
    values: Tensor | None,
    reference: tuple[Tensor, Tensor, Tensor | None] | Tensor | None,
    temperature: float,
    keep: bool = True,
) -> tuple[Tensor | None, ...]:
    """What follows from the logits of every entry, in float32 or, if an operand is, float64.

    Args:
        hidden: (M, D), weight: (V, D), bias: (V,) or None; floating.
        ids: (nnz,), offsets: (M + 1,), targets: (M,) or None; int64, contiguous.
        values: (nnz, C) floating or None.
        reference: its hidden states (M, D'), weight (V, D') and bias, or its logits (nnz,) up to a constant per row.
        keep: return what a backward pass needs, too, not only the first four.

    Returns:
        log-probs (M,), NaN where the target is not allowed and 0 without targets; entropy (M,); expectations (M, C);
        KL (M,) or None; for the backward pass norm (M, 2 or 4), m, log s and those of the reference, logits (nnz,), the
        row (nnz,) int64 of every entry, and the reference's logits (nnz,) if they were computed.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    kind, bounds, has_reference = NUMPY[dtype], offsets.numpy(), reference is not None
    parts = parts_for(ids.numel() * (64 + hidden.shape[1]))
    row, logits = np.empty(ids.shape, np.int64), np.empty(ids.shape, kind)
    made = np.empty(ids.shape, kind) if isinstance(reference, tuple) else None
    if isinstance(reference, tuple):
        _logits(operands_of(*reference, ids, dtype), bounds, temperature, parts, made)
    ref_logits = array_of(reference if isinstance(reference, Tensor) else None, dtype, 1) if made is None else made
    out = new_results((len(bounds) - 1,), 0 if values is None else values.shape[1], has_reference, kind)
    entries = Entries(logits, array_of(values, dtype, 2), ref_logits)
    operands, target_ids = operands_of(hidden, weight, bias, ids, dtype), array_of(targets, torch.int64, 1)
    _forward(ids.numpy(), bounds, target_ids, operands, temperature, parts, row, entries, out)
    of_kl = torch.from_numpy(out.kl) if has_reference else None
    expectations = None if values is None and not keep else torch.from_numpy(out.expectations)
    results = torch.from_numpy(out.logprobs), torch.from_numpy(out.entropy), expectations, of_kl
    if not keep:
        return results
    kept = (torch.from_numpy(x) for x in (out.norm, logits, row))
    return *results, *kept, None if made is None else torch.from_numpy(made)


def set_softmax_backward(
    upstream: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
    logits: Tensor,
    ref_logits: Tensor | None,
    values: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    row: Tensor,
    targets: Tensor | None,
    temperature: float,
) -> Tensor:
    """(nnz,): the gradient of (h . w + b), the logits before the division by the temperature.

    Args:
        upstream: gradients of log-probs (M,), entropy (M,), expectations (M, C) and KL (M,).
        results: entropy, expectations, KL and norm of the forward pass, and what it had or made of the others.
    """
    dtype, dlogits = logits.dtype, torch.empty_like(logits)
    softmax_gradient(
        _sets(ids.numpy(), offsets.numpy(), array_of(targets, torch.int64, 1)),
        Entries(logits.numpy(), array_of(values, dtype, 2), array_of(ref_logits, dtype, 1)),
        results_of((None, *results), dtype, 1),
        results_of((*upstream, None), dtype, 1),
        temperature,
        parts_for(64 * logits.numel()),
        dlogits.numpy(),
    )
    return dlogits


def hidden_gradient(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, row: Tensor
) -> Tensor:
    """(M, D) in the dtype of ``hidden``; exactly 0 in rows without a choice."""
    rows, _, index = embedding_rows(weight, None, ids, dlogits.dtype)
    grad, begin = torch.zeros(hidden.shape, dtype=dlogits.dtype), offsets.numpy()[:-1]
    parts = parts_for(grad.numel() + len(ids) * hidden.shape[1])
    segments = Segments(begin, offsets.numpy()[1:], begin, dlogits.numpy(), index, NOWHERE)
    sum_rows(segments, rows, 2, parts, grad.numpy())
    return grad.to(hidden.dtype)


def weight_gradient(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, row: Tensor, into: Tensor | None = None
) -> Tensor:
    """(V, D): the gradient in the dtype of ``weight``, or ``into``, a contiguous (V, D) floating tensor, added to."""
    out = fresh_zeros(weight) if into is None else into
    if out.dtype == dlogits.dtype:
        _sum_by_token(dlogits, hidden, ids, row, len(weight), out)
    else:
        tokens, rows = weight_gradient_rows(dlogits, hidden, weight, ids, row)
        out.index_add_(0, tokens, rows.to(out.dtype))
    return out


def weight_gradient_rows(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, row: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens (U,) int64, each once and ascending, and their gradients (U, D) in the dtype of ``weight``."""
    tokens, rows = _sum_by_token(dlogits, hidden, ids, row, len(weight), None)
    return tokens, rows.to(weight.dtype)


def _sum_by_token(
    dlogits: Tensor, hidden: Tensor, ids: Tensor, row: Tensor, vocab_size: int, into: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The U tokens with a gradient, ascending, and (U, D) their gradients, or ``into`` (V, D) with these added."""
    tokens, starts, rows, grads = _sort_by_token(ids.numpy(), row.numpy(), dlogits.numpy(), vocab_size)
    out = torch.zeros((len(tokens), hidden.shape[1]), dtype=dlogits.dtype) if into is None else into
    states, parts = array_of(hidden, out.dtype, 2), parts_for(len(ids) * hidden.shape[1])
    begin, end, place = starts[:-1], starts[1:], NOWHERE if into is None else tokens
    sum_rows(Segments(begin, end, begin, grads, rows, place), states, 1, parts, out.numpy())
    return torch.from_numpy(tokens), out


NOWHERE = np.empty(0, np.int64)
