"""The forward kernel of ranking_logprobs, and the small ones that turn rankings into ranks and ranks into orders.

Derivation, byte counts and launchers: ranking_logprobs.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flexrec.triton_kernels.ranking_logprobs_tiles import (
    FLOOR,
    IMPOSSIBLE,
    NO_REFERENCE,
    REFERENCE_HIDDEN,
    REFERENCE_LOGITS,
    START,
    candidate_columns,
    logits_tile,
    pool_positions,
    row_stride,
)


@triton.jit
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


@triton.jit
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


@triton.jit
def finite_or_zero(largest):
    """What to subtract from logits: their maximum, and 0 where there is none. Same shape."""
    return tl.where(largest == START, 0.0, largest)


@triton.jit
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
    D,
    D_REF,
    rows_per_problem,  # canonical: G * T; chosen: T
    sharing,  # problems that share a list: canonical 1, chosen G
    temperature,
    C: tl.constexpr,
    REFERENCE: tl.constexpr,
    CHOSEN: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    REF_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    K_TILES: tl.constexpr,
    D_TILES: tl.constexpr,
    REF_D_TILES: tl.constexpr,
):
    """One program: BLOCK_T steps of one problem (a list, or in the chosen order a ranking), all candidates."""
    problem = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_T
    row = tl.arange(0, BLOCK_T)  # (BLOCK_T,) counts from the tile's first step
    row_ok = start + row < rows_per_problem  # (BLOCK_T,)
    # Offsets count from the tile's first step and first ranking, so that per element they fit 32 bits (and registers).
    first_row = problem * rows_per_problem + start
    stride = row_stride(K)
    first_ranking = first_row // T
    ranking = (start + row) // T - start // T  # (BLOCK_T,) counts from the tile's first ranking
    step = (start + row) % T  # (BLOCK_T,)
    channel = tl.arange(0, BLOCK_C)  # (BLOCK_C,)

    largest = tl.full((BLOCK_T,), START, tl.float32)  # (BLOCK_T,) m
    total = tl.zeros((BLOCK_T,), tl.float32)  # (BLOCK_T,) s
    weighted = tl.zeros((BLOCK_T,), tl.float32)  # (BLOCK_T,) u
    expected = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)  # (BLOCK_T, BLOCK_C) x
    chosen_logit = tl.zeros((BLOCK_T,), tl.float32)  # (BLOCK_T,)
    ref_largest = tl.full((BLOCK_T,), START, tl.float32)  # (BLOCK_T,) m of the reference
    ref_total = tl.zeros((BLOCK_T,), tl.float32)  # (BLOCK_T,) s of the reference
    diverged = tl.zeros((BLOCK_T,), tl.float32)  # (BLOCK_T,) w
    lost = tl.zeros((BLOCK_T,), tl.float32)  # (BLOCK_T,) part of s that the reference makes impossible

    # Tiles below the triangle hold no pool. (A trip count in a variable is a tensor to the interpreter of Triton 3.6.)
    for k_tile in range(start // BLOCK_K if SKIP else 0, K_TILES):
        col = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        col_ok = col < K  # (BLOCK_K,)
        tile_ok = row_ok[:, None] & (col < stride)[None, :]  # (BLOCK_T, BLOCK_K)
        index, col_rank = candidate_columns(order_ptr, problem, col, K, CHOSEN)  # (BLOCK_K,), (BLOCK_K,)
        token = tl.load(candidates_ptr + problem // sharing * K + index, mask=col_ok, other=0)  # (BLOCK_K,) int64
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
        if logits_ptr is not None:
            tl.store(logits_ptr + first_row * stride + (row[:, None] * stride + col[None, :]), logits, mask=tile_ok)

        if REFERENCE == REFERENCE_HIDDEN:  # both products first: a softmax in between would fill the registers
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
            if ref_logits_ptr is not None:
                tl.store(
                    ref_logits_ptr + first_row * stride + (row[:, None] * stride + col[None, :]),
                    ref_logits,
                    mask=tile_ok,
                )

        position = pool_positions(
            position_ptr, first_ranking, ranking, col, col_rank, tile_ok, K, CHOSEN
        )  # (1 or BLOCK_T, BLOCK_K), -1 at the edges
        chosen_logit += tl.sum(tl.where(position == step[:, None], logits, 0.0), axis=1)  # (BLOCK_T,)
        # From here START marks what is outside the pool: its exponential is exactly 0, and finite times 0 is 0.
        logits = tl.where(position >= step[:, None], logits, START)  # (BLOCK_T, BLOCK_K)
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))  # (BLOCK_T,) m'
        growth = largest - new_largest  # (BLOCK_T,) m - m'
        decay = tl.exp(growth)  # (BLOCK_T,) a
        shifted = logits - finite_or_zero(new_largest)[:, None]  # (BLOCK_T, BLOCK_K)
        exps = tl.exp(shifted)  # (BLOCK_T, BLOCK_K)
        weighted = decay * (weighted + total * growth) + tl.sum(exps * shifted, axis=1)  # (BLOCK_T,)
        for c in range(C):
            values = tl.load(
                values_ptr + first_ranking * C * stride + ((ranking[:, None] * C + c) * stride + col[None, :]),
                mask=tile_ok,
                other=0.0,
            )  # (BLOCK_T, BLOCK_K)
            summed = tl.sum(exps * values.to(tl.float32), axis=1)  # (BLOCK_T,)
            expected = tl.where(
                channel[None, :] == c, expected * decay[:, None] + summed[:, None], expected
            )  # (BLOCK_T, BLOCK_C)
        if REFERENCE != NO_REFERENCE:
            if REFERENCE == REFERENCE_LOGITS:
                ref_logits = tl.load(
                    ref_logits_ptr + first_row * stride + (row[:, None] * stride + col[None, :]),
                    mask=tile_ok,
                    other=0.0,
                ).to(tl.float32)  # (BLOCK_T, BLOCK_K)
                ref_logits = tl.where(ref_logits < FLOOR, FLOOR, ref_logits)  # (BLOCK_T, BLOCK_K)
            lost = decay * lost + tl.sum(tl.where(ref_logits < IMPOSSIBLE, exps, 0.0), axis=1)  # (BLOCK_T,)
            ref_logits = tl.where(position >= step[:, None], ref_logits, START)  # (BLOCK_T, BLOCK_K)
            new_ref_largest = tl.maximum(ref_largest, tl.max(ref_logits, axis=1))  # (BLOCK_T,)
            ref_growth = ref_largest - new_ref_largest  # (BLOCK_T,)
            ref_shifted = ref_logits - finite_or_zero(new_ref_largest)[:, None]  # (BLOCK_T, BLOCK_K)
            ref_total = ref_total * tl.exp(ref_growth) + tl.sum(tl.exp(ref_shifted), axis=1)  # (BLOCK_T,)
            gap = tl.sum(exps * (shifted - ref_shifted), axis=1)  # (BLOCK_T,)
            diverged = decay * (diverged + total * (growth - ref_growth)) + gap  # (BLOCK_T,)
            ref_largest = new_ref_largest  # (BLOCK_T,)
        total = decay * total + tl.sum(exps, axis=1)  # (BLOCK_T,)
        largest = new_largest  # (BLOCK_T,)

    live = total != 0.0  # (BLOCK_T,); a NaN is live, and shows
    total = tl.where(live, total, 1.0)  # (BLOCK_T,)
    log_total = tl.log(total)  # (BLOCK_T,)
    logprobs = chosen_logit - largest - log_total  # (BLOCK_T,)
    logprobs = tl.where(logprobs < IMPOSSIBLE, float("-inf"), logprobs)  # (BLOCK_T,)
    tl.store(logprobs_ptr + first_row + row, tl.where(live, logprobs, 0.0), mask=row_ok)
    tl.store(entropy_ptr + first_row + row, tl.where(live, log_total - weighted / total, 0.0), mask=row_ok)
    tl.store(norm_ptr + 2 * first_row + 2 * row, largest, mask=row_ok)
    tl.store(norm_ptr + 2 * first_row + 2 * row + 1, log_total, mask=row_ok)
    tl.store(
        expectations_ptr + first_row * C + (row[:, None] * C + channel[None, :]),
        expected / total[:, None],
        mask=row_ok[:, None] & (channel < C)[None, :],
    )
    if REFERENCE != NO_REFERENCE:
        ref_log_total = tl.log(tl.where(live, ref_total, 1.0))  # (BLOCK_T,)
        kl = diverged / total + (ref_log_total - log_total)  # (BLOCK_T,)
        kl = tl.where((lost > 0) & (ref_largest > IMPOSSIBLE), float("inf"), kl)  # (BLOCK_T,)
        tl.store(kl_ptr + first_row + row, tl.where(live, kl, 0.0), mask=row_ok)
        tl.store(ref_norm_ptr + 2 * first_row + 2 * row, ref_largest, mask=row_ok)
        tl.store(ref_norm_ptr + 2 * first_row + 2 * row + 1, ref_log_total, mask=row_ok)
