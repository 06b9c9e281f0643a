"""The forward kernel of ranking_logprobs, and the small ones that turn rankings into ranks and ranks into orders.

Derivation, byte counts and launchers: ranking_logprobs.py.
"""

from __future__ import annotations

import triton.language as tl

from flexrec.triton_kernels.launch import kernel
from flexrec.triton_kernels.ranking_logprobs_tiles import (
    columns_of,
    entries_at,
    entries_of,
    entries_ok,
    load_given,
    logits_tile,
    row_stride,
    steps_of,
    turns_of,
)
from flexrec.triton_kernels.softmax import nothing_read, read_entries, store_results

NO_REFERENCE, REFERENCE_HIDDEN, REFERENCE_LOGITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@kernel
def rank_positions_kernel(
    ranking_ptr,  # (N, T) int64
    lengths_ptr,  # (N,) int64, or None
    position_ptr,  # (N, K) int32, rows row_stride(K) apart
    T,
    K,
    BLOCK: tl.constexpr,
    T_TILES: tl.constexpr,
    K_TILES: tl.constexpr,
):
    """One program: one ranking. Its row of `position` is the scratch in which ranked candidates are marked."""
    n = tl.program_id(0).to(tl.int64)
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + n), K).to(tl.int32)
    else:
        length = K
    position_ptr += n * row_stride(K)
    for tile in range(K_TILES):
        k = tile * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
        tl.store(position_ptr + k, tl.full((BLOCK,), -1, tl.int32), mask=k < K)
    tl.debug_barrier()
    for tile in range(T_TILES):
        t = tile * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
        index = tl.load(ranking_ptr + n * T + t, mask=t < T, other=-1)  # (BLOCK,) int64
        # An index out of range, which checks may have been told to let pass, must not write outside the row.
        tl.store(position_ptr + index, t, mask=(t < length) & (index >= 0) & (index < length))
    tl.debug_barrier()
    next_rank = tl.minimum(T, length)
    for tile in range(K_TILES):
        k = tile * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
        rank = tl.load(position_ptr + k, mask=k < K, other=0)  # (BLOCK,)
        unranked = ((rank < 0) & (k < length)).to(tl.int32)  # (BLOCK,)
        ranks = next_rank + tl.cumsum(unranked, axis=0) - 1  # (BLOCK,)
        tl.store(position_ptr + k, ranks, mask=unranked > 0)
        next_rank += tl.sum(unranked, axis=0)


@kernel
def order_kernel(
    position_ptr,  # (N, K) int32
    order_ptr,  # (N, K) int32
    K,
    BLOCK: tl.constexpr,
):
    """Invert `position`: which candidate is at each rank; -1 - index for a candidate without one, at its own index."""
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    position = tl.load(position_ptr + n * row_stride(K) + k, mask=k < K, other=-1)  # (BLOCK,)
    tl.store(
        order_ptr + n * K + tl.where(position < 0, k, position), tl.where(position < 0, -1 - k, k), mask=k < K
    )  # ranks fill 0 .. length - 1 and candidates without one lie behind the length, so every entry is written once


@kernel
def ranking_logprobs_forward_kernel(
    hidden_ptr,  # (N, T, D)
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,), or None
    ref_hidden_ptr,  # (N, T, D_REF), or None
    ref_weight_ptr,  # (V, D_REF), or None
    ref_bias_ptr,  # (V,), or None
    candidates_ptr,  # (P, K) int64
    position_ptr,  # (N, K) int32; in the chosen order None
    order_ptr,  # (N, K) int32; in the canonical order None
    values_ptr,  # (N, C, K), by column
    logprobs_ptr,  # (N, T)
    entropy_ptr,  # (N, T)
    expectations_ptr,  # (N, T, C)
    kl_ptr,  # (N, T), or None
    logits_ptr,  # (N, T, K), or None: not kept
    norm_ptr,  # (N, T, 2): m and log s
    ref_logits_ptr,  # (N, T, K): read if given, else written, or None: not kept
    ref_norm_ptr,  # (N, T, 2), or None
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
    BLOCK_C: tl.constexpr,
    K_TILES: tl.constexpr,  # 0: counted at run time, see RUNTIME_RANGES
):
    """One program: BLOCK_T steps of one problem (a list, or in the chosen order a ranking), all candidates."""
    problem = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_T
    steps = steps_of(problem, start, rows_per_problem, BLOCK_T)
    turns = turns_of(steps, start, T)
    sums = nothing_read(BLOCK_T, BLOCK_C)
    # Tiles below the triangle hold no pool. (A trip count in a variable is a tensor to the interpreter of Triton 3.6.)
    for k_tile in range(
        start // BLOCK_K if CHOSEN and K_TILES == 0 else 0, tl.cdiv(K, BLOCK_K) if K_TILES == 0 else K_TILES
    ):
        columns = columns_of(candidates_ptr, order_ptr, problem, sharing, k_tile, K, V, CHOSEN, BLOCK_K)
        ok = entries_ok(steps, columns)
        logits = logits_tile(hidden_ptr, weight_ptr, bias_ptr, steps, columns, D, temperature, PRECISION, BLOCK_D)
        if logits_ptr is not None:
            tl.store(entries_at(logits_ptr, steps, columns), logits, mask=ok)
        ref_logits = logits
        if REFERENCE == REFERENCE_HIDDEN:  # both products first: a softmax in between would fill the registers
            ref_logits = logits_tile(
                ref_hidden_ptr, ref_weight_ptr, ref_bias_ptr, steps, columns, D_REF, temperature, REF_PRECISION, BLOCK_D
            )
            if ref_logits_ptr is not None:
                tl.store(entries_at(ref_logits_ptr, steps, columns), ref_logits, mask=ok)
        elif REFERENCE == REFERENCE_LOGITS:
            ref_logits = load_given(entries_at(ref_logits_ptr, steps, columns), ok)
        entries = entries_of(logits, ref_logits, position_ptr, values_ptr, turns, columns, ok, C, CHOSEN)
        sums = read_entries(sums, entries, C, REFERENCE != NO_REFERENCE)
    row = steps.first + steps.row
    store_results(
        sums, row, steps.ok, logprobs_ptr, entropy_ptr, expectations_ptr, kl_ptr, norm_ptr, ref_norm_ptr, C, 2, False
    )
