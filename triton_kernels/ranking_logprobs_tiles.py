"""What the ranking_logprobs kernels share: the steps and candidates of a tile, who is in the pool, and the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy
import triton
import triton.language as tl

from flexrec.triton_kernels.launch import INTERPRETED
from flexrec.triton_kernels.softmax import FLOOR, Entries


def _counts_to_tensors() -> bool:
    """Whether range() takes a tensor; the interpreter of Triton 3.6 does not under NumPy 2.4."""
    versions = [
        tuple(int(part) for part in version.split(".")[:2]) for version in (triton.__version__, numpy.__version__)
    ]
    return not INTERPRETED or versions[0] >= (3, 7) or versions[1] < (2, 4)


RUNTIME_RANGES = _counts_to_tensors()


class Steps(NamedTuple):
    """BLOCK_T steps of one problem (a list, or in the chosen order a ranking).

    Attributes:
        first: the tile's first step, counted over all problems. What is added to it fits 32 bits (and registers).
        row, ok: (BLOCK_T,) counted from it, and whether it is one of the problem's.
    """

    first: Any
    row: Any
    ok: Any


class Turns(NamedTuple):
    """Whose steps they are: the tile's first ranking, and (BLOCK_T,) the ranking, counted from it, and its step."""

    first_ranking: Any
    ranking: Any
    step: Any


class Columns(NamedTuple):
    """BLOCK_K columns of (.., K) buffers of ours, and the candidates in them.

    Attributes:
        col, ok: (BLOCK_K,) which, and whether it holds a candidate.
        known: (BLOCK_K,) whether its token is one of V. Of others nothing is read or written, and their logits are NaN.
        stride: entries from one row to the next: a multiple of 8, so that rows load as vectors.
        place, token: (BLOCK_K,) int64 the candidate's place in (P, K), and what stands there.
        rank: (BLOCK_K,) in the chosen order, -1 beyond the list's length; in the canonical one it differs by row.
    """

    col: Any
    ok: Any
    known: Any
    stride: Any
    place: Any
    token: Any
    rank: Any


@triton.jit
def steps_of(problem, start, rows_per_problem, BLOCK_T: tl.constexpr):
    row = tl.arange(0, BLOCK_T)
    return Steps(problem * rows_per_problem + start, row, start + row < rows_per_problem)


@triton.jit
def turns_of(steps, start, T):
    return Turns(steps.first // T, (start + steps.row) // T - start // T, (start + steps.row) % T)


@triton.jit
def columns_of(candidates_ptr, order_ptr, problem, sharing, tile, K, V, CHOSEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """In the canonical order the column is the candidate's index, in the chosen one ``order`` (N, K) says which."""
    col = tl.arange(0, BLOCK_K) + tile * BLOCK_K
    ok = col < K
    index, rank = col, col
    if CHOSEN:
        code = tl.load(order_ptr + problem * K + col, mask=ok, other=-1)  # index, or -1 - index
        index, rank = tl.where(code < 0, -1 - code, code), tl.where(code < 0, -1, col)
    place = problem // sharing * K + index
    token = tl.load(candidates_ptr + place, mask=ok, other=-1)
    return Columns(col, ok, (token >= 0) & (token < V), row_stride(K), place, token, rank)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32. PRECISION: "native", half precision as it is, or tl.dot's input_precision for float32.

    The interpreter's product of bfloat16 is silently wrong, so there PRECISION is never "native".
    """
    if PRECISION == "native":
        product = tl.dot(a, b)
    else:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return product


@triton.jit
def row_stride(K):
    return (K + 7) // 8 * 8


@triton.jit
def entries_at(pointer, steps, columns):
    """(BLOCK_T, BLOCK_K) pointers into an (N, T, K) buffer of ours."""
    offsets = steps.row[:, None] * columns.stride + columns.col[None, :]
    return pointer + steps.first * columns.stride + offsets


@triton.jit
def entries_ok(steps, columns):
    """(BLOCK_T, BLOCK_K) what exists there, what lies between rows included."""
    return steps.ok[:, None] & (columns.col < columns.stride)[None, :]


@triton.jit
def entries_of(logits, ref_logits, position_ptr, values_ptr, turns, columns, ok, C: tl.constexpr, CHOSEN: tl.constexpr):
    """The ``Entries`` of a tile: candidates whose rank in the row's ranking is the step's or later; the step's is y."""
    if CHOSEN:
        position = columns.rank[None, :]  # (1, BLOCK_K)
    else:
        offsets = turns.ranking[:, None] * columns.stride + columns.col[None, :]
        position = tl.load(position_ptr + turns.first_ranking * columns.stride + offsets, mask=ok, other=-1)
        position = tl.where(columns.ok[None, :], position, -1)  # (BLOCK_T, BLOCK_K)
    step = turns.step[:, None]
    offsets = turns.ranking[:, None] * C * columns.stride + columns.col[None, :]
    values_ptrs = values_ptr + turns.first_ranking * C * columns.stride + offsets
    return Entries(logits, ref_logits, position >= step, position == step, ok, values_ptrs, columns.stride)


@triton.jit
def load_given(pointers, ok):
    """(BLOCK_T, BLOCK_K) logits that somebody else has computed, not below FLOOR."""
    logits = tl.load(pointers, mask=ok, other=0.0).to(tl.float32)
    return tl.where(logits < FLOOR, FLOOR, logits)


@triton.jit
def rows_at(pointer, steps, d, D):
    """(BLOCK_T, BLOCK_D) pointers into (N, T, D)."""
    return pointer + steps.first * D + (steps.row[:, None] * D + d[None, :])


@triton.jit
def logits_tile(
    hidden_ptr,  # (N, T, D)
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,), or None
    steps,
    columns,
    D: tl.constexpr,
    temperature,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z = (h . w + b) / temperature of a tile, not below FLOOR: (BLOCK_T, BLOCK_K) float32."""
    logits = tl.zeros((steps.row.shape[0], columns.col.shape[0]), tl.float32)
    for d_tile in range((D + BLOCK_D - 1) // BLOCK_D):
        d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
        d_ok = d < D
        hidden = tl.load(
            rows_at(hidden_ptr, steps, d, D), mask=steps.ok[:, None] & d_ok[None, :], other=0.0
        )  # (BLOCK_T, BLOCK_D)
        weight = tl.load(
            weight_ptr + (columns.token[None, :] * D + d[:, None]),
            mask=columns.known[None, :] & d_ok[:, None],
            other=0.0,
        )  # (BLOCK_D, BLOCK_K)
        logits += dot(hidden, weight, PRECISION)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + columns.token, mask=columns.known, other=0.0).to(tl.float32)[None, :]
    logits = tl.where(columns.known[None, :], logits / temperature, float("nan"))
    return tl.where(logits < FLOOR, FLOOR, logits)  # a NaN stays
