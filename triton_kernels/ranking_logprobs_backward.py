"""The backward kernels of ranking_logprobs: slopes of the logits, then the products that carry them on.

Derivation, byte counts and launchers: ranking_logprobs.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexrec.triton_kernels.launch import kernel
from flexrec.triton_kernels.ranking_logprobs_forward import NO_REFERENCE
from flexrec.triton_kernels.ranking_logprobs_tiles import (
    columns_of,
    dot,
    entries_at,
    entries_of,
    entries_ok,
    load_given,
    logits_tile,
    rows_at,
    steps_of,
    turns_of,
)
from flexrec.triton_kernels.softmax import FLOOR, START, logit_slopes, possible


@kernel
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
    dlogits_ptr,  # (N, T, K), or None: not needed beyond this kernel
    hidden_grad_ptr,  # (N, T, D), or None: not asked for, or left to ranking_logprobs_hidden_grad_kernel
    T,
    K,
    V,
    rows_per_problem,  # canonical: G * T; chosen: T
    sharing,  # problems that share a list: canonical 1, chosen G
    temperature,
    D: tl.constexpr,
    D_REF: tl.constexpr,
    C: tl.constexpr,
    REFERENCE: tl.constexpr,
    CHOSEN: tl.constexpr,
    PRECISION: tl.constexpr,
    REF_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: dz of BLOCK_T steps and BLOCK_K candidates; if those are all candidates, dh of the steps too."""
    problem = tl.program_id(0).to(tl.int64)
    if CHOSEN:  # noqa: SIM102  a constexpr and a tensor are not to be joined by `and`
        if (tl.program_id(2) + 1) * BLOCK_K <= tl.program_id(1) * BLOCK_T:
            return  # below the triangle
    start = tl.program_id(1) * BLOCK_T
    steps = steps_of(problem, start, rows_per_problem, BLOCK_T)
    turns = turns_of(steps, start, T)
    columns = columns_of(candidates_ptr, order_ptr, problem, sharing, tl.program_id(2), K, V, CHOSEN, BLOCK_K)
    ok = entries_ok(steps, columns)
    if logits_ptr is not None:
        logits = tl.load(entries_at(logits_ptr, steps, columns), mask=ok, other=FLOOR)
    else:
        logits = logits_tile(hidden_ptr, weight_ptr, bias_ptr, steps, columns, D, temperature, PRECISION, BLOCK_D)
    ref_logits = logits
    if REFERENCE != NO_REFERENCE:
        if ref_logits_ptr is None:
            ref_logits = logits_tile(
                ref_hidden_ptr, ref_weight_ptr, ref_bias_ptr, steps, columns, D_REF, temperature, REF_PRECISION, BLOCK_D
            )
        else:
            ref_logits = load_given(entries_at(ref_logits_ptr, steps, columns), ok)
    row = steps.first + steps.row
    dlogits = logit_slopes(
        entries_of(logits, ref_logits, position_ptr, values_ptr, turns, columns, ok, C, CHOSEN),
        row[:, None],
        steps.ok[:, None],
        entropy_ptr,
        expectations_ptr,
        kl_ptr,
        norm_ptr,
        ref_norm_ptr,
        grad_logprobs_ptr,
        grad_entropy_ptr,
        grad_expectations_ptr,
        grad_kl_ptr,
        C,
        2,
        REFERENCE != NO_REFERENCE,
    )
    ONE_DTYPE: tl.constexpr = hidden_ptr.dtype.element_ty == weight_ptr.dtype.element_ty
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty if ONE_DTYPE else tl.float32
    dlogits = dlogits / temperature
    rounded = dlogits.to(DTYPE)  # and what that leaves: their products' sum is rounded only once
    rest = (dlogits - rounded.to(tl.float32)).to(DTYPE)

    if dlogits_ptr is not None:
        tl.store(entries_at(dlogits_ptr, steps, columns), rounded, mask=ok)
    if hidden_grad_ptr is not None:
        for d_tile in range((D + BLOCK_D - 1) // BLOCK_D):
            d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
            d_ok = d < D
            weight = tl.load(
                weight_ptr + columns.token[:, None] * D + d[None, :],
                mask=columns.known[:, None] & d_ok[None, :],
                other=0.0,
            )  # (BLOCK_K, BLOCK_D)
            hidden_grad = dot(rounded, weight, PRECISION)  # (BLOCK_T, BLOCK_D)
            if DTYPE.primitive_bitwidth == 16:
                hidden_grad += dot(rest, weight, PRECISION)
            tl.store(
                rows_at(hidden_grad_ptr, steps, d, D),
                hidden_grad.to(hidden_grad_ptr.dtype.element_ty),
                mask=steps.ok[:, None] & d_ok[None, :],
            )


@kernel
def ranking_logprobs_hidden_grad_kernel(
    dlogits_ptr,  # (N, T, K)
    weight_ptr,  # (V, D)
    candidates_ptr,  # (P, K) int64
    order_ptr,  # (N, K) int32; in the canonical order None
    hidden_grad_ptr,  # (N, T, D)
    K,
    V,
    rows_per_problem,  # canonical: G * T; chosen: T
    sharing,  # problems that share a list: canonical 1, chosen G
    D: tl.constexpr,
    CHOSEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K_TILES: tl.constexpr,  # 0: counted at run time, see RUNTIME_RANGES
):
    """One program: BLOCK_T steps of one problem, BLOCK_D columns of their gradient, all candidates."""
    problem = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_T
    steps = steps_of(problem, start, rows_per_problem, BLOCK_T)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_ok = d < D
    grad = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    # Tiles below the triangle hold no pool. (A trip count in a variable is a tensor to the interpreter of Triton 3.6.)
    for k_tile in range(
        start // BLOCK_K if CHOSEN and K_TILES == 0 else 0, tl.cdiv(K, BLOCK_K) if K_TILES == 0 else K_TILES
    ):
        columns = columns_of(candidates_ptr, order_ptr, problem, sharing, k_tile, K, V, CHOSEN, BLOCK_K)
        ok = entries_ok(steps, columns)
        if CHOSEN:
            ok = ok & (columns.col[None, :] >= (start + steps.row)[:, None])  # nothing is kept below
        dlogits = tl.load(entries_at(dlogits_ptr, steps, columns), mask=ok, other=0.0)  # (BLOCK_T, BLOCK_K)
        weight = tl.load(
            weight_ptr + columns.token[:, None] * D + d[None, :], mask=columns.known[:, None] & d_ok[None, :], other=0.0
        )  # (BLOCK_K, BLOCK_D)
        grad += dot(dlogits, weight, PRECISION)
    tl.store(
        rows_at(hidden_grad_ptr, steps, d, D),
        grad.to(hidden_grad_ptr.dtype.element_ty),
        mask=steps.ok[:, None] & d_ok[None, :],
    )


@triton.jit
def count_row_tiles(rows_per_problem, CHOSEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tiles of steps; in the chosen order those that reach the triangle in the program's tile of columns, the first."""
    tiles = tl.minimum(tl.cdiv(rows_per_problem, BLOCK_T), 1 << 16)  # a bound spares registers on sm_80
    if CHOSEN:
        tiles = tl.minimum(tiles, tl.cdiv((tl.program_id(1) + 1) * BLOCK_K, BLOCK_T))
    return tiles


@kernel
def ranking_logprobs_weight_grad_kernel(
    dlogits_ptr,  # (N, T, K)
    norm_ptr,  # (N, T, 2): m and log s
    hidden_ptr,  # (N, T, D)
    candidates_ptr,  # (P, K) int64
    order_ptr,  # (N, K) int32; in the canonical order None
    weight_grad_ptr,  # (P K, D) if ROWS, else (V, D) to add to; None: not asked for
    bias_grad_ptr,  # (P K,) if ROWS, else (V,) to add to; None: not asked for
    K,
    V,
    rows_per_problem,  # canonical: G * T; chosen: T
    sharing,  # problems that share a list: canonical 1, chosen G
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHOSEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_TILES: tl.constexpr,  # 0: counted at run time, see RUNTIME_RANGES
):
    """One program: BLOCK_K candidates of one problem, BLOCK_D columns of their gradient (the first also the bias)."""
    problem = tl.program_id(0).to(tl.int64)
    columns = columns_of(candidates_ptr, order_ptr, problem, sharing, tl.program_id(1), K, V, CHOSEN, BLOCK_K)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_ok = d < D
    grad = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    bias_grad = tl.zeros((BLOCK_K,), tl.float32)
    # (A trip count in a variable is a tensor to the interpreter of Triton 3.6.)
    for row_tile in range(
        0, count_row_tiles(rows_per_problem, CHOSEN, BLOCK_T, BLOCK_K) if ROW_TILES == 0 else ROW_TILES
    ):
        start = row_tile * BLOCK_T
        steps = steps_of(problem, start, rows_per_problem, BLOCK_T)
        ok = entries_ok(steps, columns)
        if CHOSEN:
            ok = ok & (columns.col[None, :] >= (start + steps.row)[:, None])  # nothing is kept below
        dlogits = tl.load(entries_at(dlogits_ptr, steps, columns), mask=ok, other=0.0)  # (BLOCK_T, BLOCK_K)
        if weight_grad_ptr is not None:
            # Steps without a pool are not read: what they hold may be NaN, and 0 * NaN is not 0.
            largest = tl.load(norm_ptr + 2 * steps.first + 2 * steps.row, mask=steps.ok, other=START)
            live = steps.ok & possible(largest)
            hidden = tl.load(
                rows_at(hidden_ptr, steps, d, D), mask=live[:, None] & d_ok[None, :], other=0.0
            )  # (BLOCK_T, BLOCK_D)
            grad += dot(tl.trans(dlogits), hidden, PRECISION)  # (BLOCK_K, BLOCK_D)
        if bias_grad_ptr is not None:
            bias_grad += tl.sum(dlogits.to(tl.float32), axis=0)
    # Their tokens are read now, so that no register holds them meanwhile.
    columns = columns_of(candidates_ptr, order_ptr, problem, sharing, tl.program_id(1), K, V, CHOSEN, BLOCK_K)
    row, ok = columns.token, columns.known  # (BLOCK_K,)
    if ROWS:
        row, ok = columns.place, columns.ok
    if weight_grad_ptr is not None:
        place = weight_grad_ptr + row[:, None] * D + d[None, :]
        add_or_store(place, grad, ok[:, None] & d_ok[None, :], ROWS)
    if bias_grad_ptr is not None:  # noqa: SIM102  a constexpr and a tensor are not to be joined by `and`
        if tl.program_id(2) == 0:
            add_or_store(bias_grad_ptr + row, bias_grad, ok, ROWS)


@triton.jit
def add_or_store(place, x, ok, STORE: tl.constexpr):
    """Write to what nobody else writes to, or add to what others add to at the same time."""
    if STORE:
        tl.store(place, x, mask=ok)
    else:
        tl.atomic_add(place, x, mask=ok, sem="relaxed")
