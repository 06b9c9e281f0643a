"""Sums of rows of a table: what logits, gradients of hidden states and gradients of embeddings are made of.

Matrix products take eight rows at a time with the loop over D inside, which LLVM vectorises: each number loaded is used
more than once, and a short edge is filled by repeating the last row. Every sum is added up by one thread in a fixed
order: results are bitwise repeatable for any number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from flexrec.numba_kernels.threads import follow_torch_threads

Array = np.ndarray
REORDER = {"reassoc", "contract", "nsz"}  # sums may be reordered, products fused; infinities and NaN keep their meaning


def fresh_zeros(like: Tensor) -> Tensor:
    """(V, D) contiguous zeros as fresh pages of the system, which are 0 before anybody has written them.

    ``torch.zeros`` writes them all: at V = 32,000 and D = 256 that takes as long again as adding 640 rows does. An
    optimiser that then reads the whole gradient saves a tenth.
    """
    same_size = {8: "i8", 4: "i4", 2: "i2", 1: "i1"}[like.element_size()]  # NumPy has no bfloat16
    return torch.from_numpy(np.zeros(like.shape, dtype=same_size)).view(like.dtype)


@njit(cache=True, fastmath=REORDER)
def add_rows(out: Array, rows: Array, index: Array, coefficients: Array, start: int, stop: int) -> None:
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


@njit(cache=True, fastmath=False)
def share(begin: Array, entries: int, part: int, parts: int) -> tuple:
    """First and last + 1 of the sets that begin in a part of all entries; trailing empty sets go last."""
    low = np.searchsorted(begin, part * entries // parts) if part else 0
    high = np.searchsorted(begin, (part + 1) * entries // parts) if part + 1 < parts else len(begin)
    return low, high


class Segments(NamedTuple):
    """S segments of E entries; entry i of segment s is a row of a table and what it is multiplied by."""

    begin: Array  # (S,) int64, ascending: coefficients[begin[s] + i]
    end: Array  # (S,) int64
    first: Array  # (S,) int64: rows[first[s] + i]
    coefficients: Array  # (E,)
    rows: Array  # (any,) int64, of the table
    place: Array  # (S,) int64, the row of the output that each is added to; (0,): segment s goes to row s


@njit(cache=True, nogil=True, fastmath=REORDER)
def _sum_rows_of_part(x: Segments, table: Array, least: int, part: int, parts: int, out: Array) -> None:
    """:func:`sum_rows` of the segments that begin in a part of all entries."""
    begin, end, first, coefficients, rows, place = x
    low, high = share(begin, len(coefficients), part, parts)
    for s in range(low, high):
        size = end[s] - begin[s]
        if size >= least:
            total = out[place[s] if len(place) else s]
            add_rows(total, table, rows[first[s] :], coefficients[begin[s] : end[s]], 0, size)


@njit(cache=True, nogil=True, parallel=True, fastmath=REORDER)
def _sum_rows_in_parallel(x: Segments, table: Array, least: int, parts: int, out: Array) -> None:
    for part in prange(parts):
        _sum_rows_of_part(x, table, least, part, parts, out)


@njit(cache=True, nogil=True, fastmath=REORDER)
def sum_rows(x: Segments, table: Array, least: int, parts: int, out: Array) -> None:
    """out[place[s]] += the sum over i < end[s] - begin[s] of coefficients[begin[s] + i] * table[rows[first[s] + i]].

    Segments of fewer than ``least`` entries read nothing.
    """
    if parts == 1:  # wakes nobody
        _sum_rows_of_part(x, table, least, 0, 1, out)
    else:
        _sum_rows_in_parallel(x, table, least, parts, out)


@njit(cache=True, nogil=True, parallel=True, fastmath=False)
def _add_at_tokens(buffer: Array, tokens: Array, rows: Array) -> None:
    """Threads share out the columns, so that tokens may repeat and no order of threads changes a bit."""
    columns = 64
    for part in prange((buffer.shape[1] + columns - 1) // columns):
        start, stop = part * columns, min((part + 1) * columns, buffer.shape[1])
        for m in range(len(tokens)):
            target, grad = buffer[tokens[m]][start:stop], rows[m][start:stop]
            for d in range(len(grad)):
                target[d] += grad[d]


def add_at_tokens(buffer: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """buffer[tokens[m]] += rows[m] for all m, in their order: contiguous (V, D), (M,), (M, D)."""
    follow_torch_threads()
    _add_at_tokens(buffer.numpy(), tokens.numpy(), rows.numpy())


# --- arrays of tensors ------------------------------------------------------------------------------------------------

NUMPY: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}
_EMPTY = {(dtype, dims): np.empty((0,) * dims, kind) for dtype, kind in NUMPY.items() for dims in (1, 2, 3)}


def array_of(x: Tensor | None, dtype: torch.dtype, dims: int) -> Array:
    """A contiguous array of this dtype; an empty one of so many dimensions for None, or a tensor that stands for it."""
    if x is None or x.dim() != dims:
        return _EMPTY[dtype, dims]
    if x.dtype != dtype or not x.is_contiguous():
        x = x.to(dtype).contiguous()
    return (x.detach() if x.requires_grad else x).numpy()


def embedding_rows(
    weight: Tensor, bias: Tensor | None, tokens: Tensor, dtype: torch.dtype
) -> tuple[Array, Array, Array]:
    """rows (R, D), their bias (R,) or (0,), and which row is each token's, in the shape of ``tokens``.

    The rows are the embedding itself, or where that has another dtype or layout, a copy of the tokens' rows.
    """
    index = tokens
    if weight.dtype != dtype or not weight.is_contiguous():
        used, index = tokens.unique(return_inverse=True)
        weight = weight.index_select(0, used)
        bias = None if bias is None else bias.index_select(0, used)
    return array_of(weight, dtype, 2), array_of(bias, dtype, 1), index.contiguous().numpy()


class Operands(NamedTuple):
    """What logits are made of, all of one dtype."""

    hidden: Array  # (M, D), of rankings (N, T, D)
    rows: Array  # (R, D)
    bias: Array  # (R,) or (0,)
    row_of: Array  # which row is each token's: (nnz,), of rankings (P, K)


def operands_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, dtype: torch.dtype) -> Operands:
    """Of hidden states with one dimension more than ``tokens``, and the :func:`embedding_rows`."""
    return Operands(array_of(hidden, dtype, tokens.dim() + 1), *embedding_rows(weight, bias, tokens, dtype))
