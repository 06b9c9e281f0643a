"""What the ranking_logprobs kernels share: which candidates a tile holds, who is in the pool, and its logits."""

from __future__ import annotations

import numpy
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # Triton decides it when the kernels are made


def _counts_to_tensors() -> bool:
    """Whether range() takes a tensor; the interpreter of Triton 3.6 does not under NumPy 2.4."""
    versions = [
        tuple(int(part) for part in version.split(".")[:2]) for version in (triton.__version__, numpy.__version__)
    ]
    return not INTERPRETED or versions[0] >= (3, 7) or versions[1] < (2, 4)


RUNTIME_RANGES = _counts_to_tensors()

FLOOR = tl.constexpr(-1e20)  # stands for a logit of -inf; equals FLOOR of the reference
IMPOSSIBLE = tl.constexpr(-5e19)
START = tl.constexpr(-2e20)  # below every logit: the maximum over nothing

NO_REFERENCE, REFERENCE_HIDDEN, REFERENCE_LOGITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


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
    """Entries from one row of a (.., K) buffer of ours to the next: a multiple of 8, so that rows load as vectors."""
    return (K + 7) // 8 * 8


@triton.jit
def candidate_columns(order_ptr, problem, col, K, CHOSEN: tl.constexpr):
    """Index (BLOCK_K,) of the candidate in each column and its rank (BLOCK_K,), -1 beyond the list's length.

    In the canonical order the column is the index and the rank differs from row to row (`pool_positions`).
    """
    if CHOSEN:
        code = tl.load(order_ptr + problem * K + col, mask=col < K, other=-1)  # (BLOCK_K,) index, or -1 - index
        index = tl.where(code < 0, -1 - code, code)  # (BLOCK_K,)
        rank = tl.where(code < 0, -1, col)  # (BLOCK_K,)
    else:
        index = col  # (BLOCK_K,)
        rank = tl.where(col < K, col, -1)  # (BLOCK_K,)
    return index, rank


@triton.jit
def pool_positions(position_ptr, first_ranking, ranking, col, col_rank, tile_ok, K, CHOSEN: tl.constexpr):
    """Rank of each column's candidate in each row's ranking, -1 for none: (1 or BLOCK_T, BLOCK_K) int32.

    ``ranking`` (BLOCK_T,) counts from ``first_ranking``, the tile's first.
    """
    if CHOSEN:
        position = col_rank[None, :]  # (1, BLOCK_K)
    else:
        stride = row_stride(K)
        position = tl.load(
            position_ptr + first_ranking * stride + (ranking[:, None] * stride + col[None, :]), mask=tile_ok, other=-1
        )  # (BLOCK_T, BLOCK_K)
        position = tl.where((col < K)[None, :], position, -1)  # (BLOCK_T, BLOCK_K)
    return position


@triton.jit
def logits_tile(
    hidden_ptr,  # (BLOCK_T, D): the tile's first step
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,), or None
    row_ok,  # (BLOCK_T,)
    token,  # (BLOCK_K,) int64
    col_ok,  # (BLOCK_K,)
    D,
    temperature,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_TILES: tl.constexpr,
):
    """z = (h . w + b) / temperature of a tile, not below FLOOR: (BLOCK_T, BLOCK_K) float32."""
    row = tl.arange(0, BLOCK_T)  # (BLOCK_T,)
    logits = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)  # (BLOCK_T, BLOCK_K)
    for d_tile in range(D_TILES):
        d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
        d_ok = d < D  # (BLOCK_D,)
        hidden = tl.load(
            hidden_ptr + (row[:, None] * D + d[None, :]), mask=row_ok[:, None] & d_ok[None, :], other=0.0
        )  # (BLOCK_T, BLOCK_D)
        weight = tl.load(
            weight_ptr + (token[None, :] * D + d[:, None]), mask=col_ok[None, :] & d_ok[:, None], other=0.0
        )  # (BLOCK_D, BLOCK_K)
        logits += dot(hidden, weight, PRECISION)  # (BLOCK_T, BLOCK_K)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + token, mask=col_ok, other=0.0)  # (BLOCK_K,)
        logits += bias.to(tl.float32)[None, :]  # (BLOCK_T, BLOCK_K)
    logits = logits / temperature  # (BLOCK_T, BLOCK_K)
    return tl.where(logits < FLOOR, FLOOR, logits)  # (BLOCK_T, BLOCK_K); a NaN stays
