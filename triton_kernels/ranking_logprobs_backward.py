"""The backward kernels of ranking_logprobs: slopes of the logits, then the products that carry them on.

Derivation, byte counts and launchers: ranking_logprobs.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flexrec.triton_kernels.ranking_logprobs_tiles import (
    FLOOR,
    IMPOSSIBLE,
    NO_REFERENCE,
    START,
    candidate_columns,
    dot,
    logits_tile,
    pool_positions,
    row_stride,
)


@triton.jit
def ranking_logprobs_dlogits_kernel(
    hidden_ptr,  # (N, T, D); this and the next five only where logits were not kept
    weight_ptr,  # (V, D); also for the gradient of hidden
    bias_ptr,  # (V,), or None
    ref_hidden_ptr,  # (N, T, D_REF), or None
    ref_weight_ptr,  # (V, D_REF), or None
    ref_bias_ptr,  # (V,), or None
    candidates_ptr,  # (P, K) int64
    position_ptr,  # (N, K) int32; in the chosen order None
    order_ptr,  # (N, K) int32; in the canonical order None
    values_ptr,  # (N, C, K), by column
    entropy_ptr,  # (N, T)
    expectations_ptr,  # (N, T, C)
    kl_ptr,  # (N, T), or None
    logits_ptr,  # (N, T, K), or None: computed again
    norm_ptr,  # (N, T, 2): m and log s
    ref_logits_ptr,  # (N, T, K), or None: computed again
    ref_norm_ptr,  # (N, T, 2), or None
    grad_logprobs_ptr,  # (N, T)
    grad_entropy_ptr,  # (N, T)
    grad_expectations_ptr,  # (N, T, C)
    grad_kl_ptr,  # (N, T), or None
    dlogits_ptr,  # (N, T, K) DTYPE, or None: not needed beyond this kernel
    hidden_grad_ptr,  # (N, T, D), or None: not asked for, or left to ranking_logprobs_hidden_grad_kernel
    T,
    K,
    D,
    D_REF,
    rows_per_problem,  # canonical: G * T; chosen: T
    sharing,  # problems that share a list: canonical 1, chosen G
    temperature,
    C: tl.constexpr,
    REFERENCE: tl.constexpr,
    CHOSEN: tl.constexpr,
    DTYPE: tl.constexpr,  # of dlogits
    PRECISION: tl.constexpr,
    REF_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_TILES: tl.constexpr,
    REF_D_TILES: tl.constexpr,
):
    """One program: dz of BLOCK_T steps and BLOCK_K candidates; if those are all candidates, dh of the steps too."""
    problem = tl.program_id(0).to(tl.int64)
    if CHOSEN:  # noqa: SIM102  a constexpr and a tensor are not to be joined by `and`
        if (tl.program_id(2) + 1) * BLOCK_K <= tl.program_id(1) * BLOCK_T:
            return  # below the triangle
    start = tl.program_id(1) * BLOCK_T
    row = tl.arange(0, BLOCK_T)  # (BLOCK_T,) counts from the tile's first step
    row_ok = start + row < rows_per_problem  # (BLOCK_T,)
    # Offsets count from the tile's first step and first ranking, so that per element they fit 32 bits (and registers).
    first_row = problem * rows_per_problem + start
    stride = row_stride(K)
    first_ranking = first_row // T
    ranking = (start + row) // T - start // T  # (BLOCK_T,) counts from the tile's first ranking
    step = (start + row) % T  # (BLOCK_T,)
    col = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    col_ok = col < K  # (BLOCK_K,)
    tile_ok = row_ok[:, None] & (col < stride)[None, :]  # (BLOCK_T, BLOCK_K)
    index, col_rank = candidate_columns(order_ptr, problem, col, K, CHOSEN)  # (BLOCK_K,), (BLOCK_K,)
    token = tl.load(candidates_ptr + problem // sharing * K + index, mask=col_ok, other=0)  # (BLOCK_K,) int64
    largest = tl.load(norm_ptr + 2 * first_row + 2 * row, mask=row_ok, other=START)  # (BLOCK_T,)
    log_total = tl.load(norm_ptr + 2 * first_row + 2 * row + 1, mask=row_ok, other=0.0)  # (BLOCK_T,)
    position = pool_positions(
        position_ptr, first_ranking, ranking, col, col_rank, tile_ok, K, CHOSEN
    )  # (1 | BLOCK_T, BLOCK_K)
    pool = (position >= step[:, None]) & (largest > IMPOSSIBLE)[:, None]  # (BLOCK_T, BLOCK_K)
    if logits_ptr is not None:
        logits = tl.load(
            logits_ptr + first_row * stride + (row[:, None] * stride + col[None, :]), mask=tile_ok, other=FLOOR
        )  # (BLOCK_T, BLOCK_K)
    else:
        logits = logits_tile(
            hidden_ptr + first_row * D,
            weight_ptr,
            bias_ptr,
            row_ok,
            token,
            col_ok,
            D,
            temperature,
            PRECISION,
            BLOCK_T,
            BLOCK_K,
            BLOCK_D,
            D_TILES,
        )  # (BLOCK_T, BLOCK_K)
    chosen = pool & (position == step[:, None])  # (BLOCK_T, BLOCK_K)
    pool = pool & (logits > IMPOSSIBLE)  # (BLOCK_T, BLOCK_K)
    log_probs = tl.where(pool, (logits - largest[:, None]) - log_total[:, None], 0.0)  # (BLOCK_T, BLOCK_K)

    grad_logprobs = tl.load(grad_logprobs_ptr + first_row + row, mask=row_ok, other=0.0)  # (BLOCK_T,)
    grad_entropy = tl.load(grad_entropy_ptr + first_row + row, mask=row_ok, other=0.0)  # (BLOCK_T,)
    entropy = tl.load(entropy_ptr + first_row + row, mask=row_ok, other=0.0)  # (BLOCK_T,)
    slope = -grad_logprobs[:, None] - grad_entropy[:, None] * (log_probs + entropy[:, None])  # (BLOCK_T, BLOCK_K)
    for c in range(C):
        values = tl.load(
            values_ptr + first_ranking * C * stride + ((ranking[:, None] * C + c) * stride + col[None, :]),
            mask=tile_ok,
            other=0.0,
        )  # (BLOCK_T, BLOCK_K)
        expectation = tl.load(expectations_ptr + first_row * C + (row * C + c), mask=row_ok, other=0.0)  # (BLOCK_T,)
        grad = tl.load(grad_expectations_ptr + first_row * C + (row * C + c), mask=row_ok, other=0.0)  # (BLOCK_T,)
        slope += grad[:, None] * (values.to(tl.float32) - expectation[:, None])  # (BLOCK_T, BLOCK_K)
    if REFERENCE != NO_REFERENCE:
        if ref_logits_ptr is None:
            ref_logits = logits_tile(
                ref_hidden_ptr + first_row * D_REF,
                ref_weight_ptr,
                ref_bias_ptr,
                row_ok,
                token,
                col_ok,
                D_REF,
                temperature,
                REF_PRECISION,
                BLOCK_T,
                BLOCK_K,
                BLOCK_D,
                REF_D_TILES,
            )  # (BLOCK_T, BLOCK_K)
        else:
            ref_logits = tl.load(
                ref_logits_ptr + first_row * stride + (row[:, None] * stride + col[None, :]), mask=tile_ok, other=0.0
            ).to(tl.float32)  # (BLOCK_T, BLOCK_K)
            ref_logits = tl.where(ref_logits < FLOOR, FLOOR, ref_logits)  # (BLOCK_T, BLOCK_K)
        ref_largest = tl.load(ref_norm_ptr + 2 * first_row + 2 * row, mask=row_ok, other=0.0)  # (BLOCK_T,)
        ref_log_total = tl.load(ref_norm_ptr + 2 * first_row + 2 * row + 1, mask=row_ok, other=0.0)  # (BLOCK_T,)
        ref_log_probs = (ref_logits - ref_largest[:, None]) - ref_log_total[:, None]  # (BLOCK_T, BLOCK_K)
        kl = tl.load(kl_ptr + first_row + row, mask=row_ok, other=0.0)  # (BLOCK_T,)
        grad = tl.load(grad_kl_ptr + first_row + row, mask=row_ok, other=0.0)  # (BLOCK_T,)
        divergence = tl.where(
            (kl != float("inf"))[:, None], log_probs - ref_log_probs - kl[:, None], 0.0
        )  # (BLOCK_T, BLOCK_K); an infinite KL has no gradient
        slope += grad[:, None] * divergence  # (BLOCK_T, BLOCK_K)
    dlogits = tl.where(pool, tl.exp(log_probs), 0.0) * slope  # (BLOCK_T, BLOCK_K)
    dlogits += tl.where(chosen, grad_logprobs[:, None], 0.0)  # (BLOCK_T, BLOCK_K)
    dlogits = (tl.where(pool, dlogits, 0.0) / temperature).to(DTYPE)  # (BLOCK_T, BLOCK_K)

    if dlogits_ptr is not None:
        tl.store(dlogits_ptr + first_row * stride + (row[:, None] * stride + col[None, :]), dlogits, mask=tile_ok)
    if hidden_grad_ptr is not None:
        for d_tile in range(D_TILES):
            d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
            d_ok = d < D  # (BLOCK_D,)
            weight = tl.load(
                weight_ptr + token[:, None] * D + d[None, :], mask=col_ok[:, None] & d_ok[None, :], other=0.0
            )  # (BLOCK_K, BLOCK_D)
            hidden_grad = dot(dlogits, weight, PRECISION)  # (BLOCK_T, BLOCK_D)
            tl.store(
                hidden_grad_ptr + first_row * D + (row[:, None] * D + d[None, :]),
                hidden_grad.to(hidden_grad_ptr.dtype.element_ty),
                mask=row_ok[:, None] & d_ok[None, :],
            )


@triton.jit
def ranking_logprobs_hidden_grad_kernel(
    dlogits_ptr,  # (N, T, K)
    weight_ptr,  # (V, D)
    candidates_ptr,  # (P, K) int64
    order_ptr,  # (N, K) int32; in the canonical order None
    hidden_grad_ptr,  # (N, T, D)
    K,
    D,
    rows_per_problem,  # canonical: G * T; chosen: T
    sharing,  # problems that share a list: canonical 1, chosen G
    CHOSEN: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K_TILES: tl.constexpr,
):
    """One program: BLOCK_T steps of one problem, BLOCK_D columns of their gradient, all candidates."""
    problem = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_T
    row = tl.arange(0, BLOCK_T)  # (BLOCK_T,) counts from the tile's first step
    row_ok = start + row < rows_per_problem  # (BLOCK_T,)
    # Offsets count from the tile's first step and first ranking, so that per element they fit 32 bits (and registers).
    first_row = problem * rows_per_problem + start
    stride = row_stride(K)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    d_ok = d < D  # (BLOCK_D,)
    grad = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)  # (BLOCK_T, BLOCK_D)
    # Tiles below the triangle hold no pool. (A trip count in a variable is a tensor to the interpreter of Triton 3.6.)
    for k_tile in range(start // BLOCK_K if SKIP else 0, K_TILES):
        col = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        col_ok = col < K  # (BLOCK_K,)
        tile_ok = row_ok[:, None] & (col < stride)[None, :]  # (BLOCK_T, BLOCK_K)
        if CHOSEN:
            tile_ok = tile_ok & (col[None, :] >= (start + row)[:, None])  # (BLOCK_T, BLOCK_K); nothing is kept below
        index, _ = candidate_columns(order_ptr, problem, col, K, CHOSEN)  # (BLOCK_K,), (BLOCK_K,)
        token = tl.load(candidates_ptr + problem // sharing * K + index, mask=col_ok, other=0)  # (BLOCK_K,) int64
        dlogits = tl.load(
            dlogits_ptr + first_row * stride + (row[:, None] * stride + col[None, :]), mask=tile_ok, other=0.0
        )  # (BLOCK_T, BLOCK_K)
        weight = tl.load(
            weight_ptr + token[:, None] * D + d[None, :], mask=col_ok[:, None] & d_ok[None, :], other=0.0
        )  # (BLOCK_K, BLOCK_D)
        grad += dot(dlogits, weight, PRECISION)  # (BLOCK_T, BLOCK_D)
    tl.store(
        hidden_grad_ptr + first_row * D + (row[:, None] * D + d[None, :]),
        grad.to(hidden_grad_ptr.dtype.element_ty),
        mask=row_ok[:, None] & d_ok[None, :],
    )


@triton.jit
def triangle_tiles(BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ROW_TILES: tl.constexpr):
    """How many tiles of steps reach the triangle in the program's tile of columns: the first ones."""
    return tl.minimum(ROW_TILES, tl.cdiv((tl.program_id(1) + 1) * BLOCK_K, BLOCK_T))


@triton.jit
def ranking_logprobs_weight_grad_kernel(
    dlogits_ptr,  # (N, T, K)
    norm_ptr,  # (N, T, 2): m and log s
    hidden_ptr,  # (N, T, D)
    candidates_ptr,  # (P, K) int64
    order_ptr,  # (N, K) int32; in the canonical order None
    weight_grad_ptr,  # (P K, D) if ROWS, else (V, D) to add to; None: not asked for
    bias_grad_ptr,  # (P K,) if ROWS, else (V,) to add to; None: not asked for
    K,
    D,
    rows_per_problem,  # canonical: G * T; chosen: T
    sharing,  # problems that share a list: canonical 1, chosen G
    ROWS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_TILES: tl.constexpr,
):
    """One program: BLOCK_K candidates of one problem, BLOCK_D columns of their gradient (the first also the bias)."""
    problem = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_T)  # (BLOCK_T,) counts from the tile's first step
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    col_ok = col < K  # (BLOCK_K,)
    stride = row_stride(K)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    d_ok = d < D  # (BLOCK_D,)
    grad = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)  # (BLOCK_K, BLOCK_D)
    bias_grad = tl.zeros((BLOCK_K,), tl.float32)  # (BLOCK_K,)
    # (A trip count in a variable is a tensor to the interpreter of Triton 3.6.)
    for row_tile in range(0, triangle_tiles(BLOCK_T, BLOCK_K, ROW_TILES) if SKIP else ROW_TILES):
        start = row_tile * BLOCK_T
        row_ok = start + row < rows_per_problem  # (BLOCK_T,)
        first_row = problem * rows_per_problem + start
        tile_ok = row_ok[:, None] & (col < stride)[None, :]  # (BLOCK_T, BLOCK_K)
        if CHOSEN:
            tile_ok = tile_ok & (col[None, :] >= (start + row)[:, None])  # (BLOCK_T, BLOCK_K); nothing is kept below
        dlogits = tl.load(
            dlogits_ptr + first_row * stride + (row[:, None] * stride + col[None, :]), mask=tile_ok, other=0.0
        )  # (BLOCK_T, BLOCK_K)
        if weight_grad_ptr is not None:
            # Steps without a pool are not read: what they hold may be NaN, and 0 * NaN is not 0.
            live = row_ok & (
                tl.load(norm_ptr + 2 * first_row + 2 * row, mask=row_ok, other=START) > IMPOSSIBLE
            )  # (BLOCK_T,)
            hidden = tl.load(
                hidden_ptr + first_row * D + (row[:, None] * D + d[None, :]),
                mask=live[:, None] & d_ok[None, :],
                other=0.0,
            )  # (BLOCK_T, BLOCK_D)
            grad += dot(tl.trans(dlogits), hidden, PRECISION)  # (BLOCK_K, BLOCK_D)
        if bias_grad_ptr is not None:
            bias_grad += tl.sum(dlogits.to(tl.float32), axis=0)  # (BLOCK_K,)
    index, _ = candidate_columns(order_ptr, problem, col, K, CHOSEN)  # (BLOCK_K,), (BLOCK_K,)
    listed = problem // sharing * K + index  # (BLOCK_K,) int64
    if ROWS:
        if weight_grad_ptr is not None:
            tl.store(weight_grad_ptr + listed[:, None] * D + d[None, :], grad, mask=col_ok[:, None] & d_ok[None, :])
        if bias_grad_ptr is not None:  # noqa: SIM102  a constexpr and a tensor are not to be joined by `and`
            if tl.program_id(2) == 0:
                tl.store(bias_grad_ptr + listed, bias_grad, mask=col_ok)
    else:
        token = tl.load(candidates_ptr + listed, mask=col_ok, other=0)  # (BLOCK_K,) int64
        if weight_grad_ptr is not None:
            tl.atomic_add(
                weight_grad_ptr + token[:, None] * D + d[None, :],
                grad,
                mask=col_ok[:, None] & d_ok[None, :],
                sem="relaxed",
            )
        if bias_grad_ptr is not None:  # noqa: SIM102  as above
            if tl.program_id(2) == 0:
                tl.atomic_add(bias_grad_ptr + token, bias_grad, mask=col_ok, sem="relaxed")
