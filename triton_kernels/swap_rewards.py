"""Triton kernel of the causal swap rewards of linear metrics: one launch, every list read and written once.

Derivation. R = sum d_k w_k / Z (d the discount, w the term gain, Z the normaliser), so for n = length - k candidates
behind rank k (1-based), with x = w - w_1, which changes no difference,

    r_k = mean over j > k of (d_k - d_j)(w_k - w_j) / Z
        = [ d_k (n x_k - X_k) - (x_k D_k - Y_k) ] / (n Z),
    X_k, D_k, Y_k = sums over j > k of x_j, d_j, d_j x_j: three reverse scans.

Centring is what lets float32 serve: gains of 1e4 + noise would leave three digits of the noise in X and Y. The centre
is one of the list's own term gains, so that ties give exactly 0, and binary gains with equal discounts exact sums. The
scans run from the end of the list, so that their error at rank k is relative to what lies behind k and is divided by
n with it; total minus prefix would carry the error of the whole list into ranks with few candidates behind them.
Z of ndcg and ndcg_burges: the list sorted in registers, times the same discounts. Beyond MAX_SORTED the caller gives
1 / Z: the sorting network grows with K log^2 K, and so does the time to compile it.

Bytes per list: K gains in, K rewards out (float32: 8 K; float16 in: 6 K), and 8 for each of ``lengths`` and
``num_ranked`` where given. Discounts are computed, not read. A program holds BLOCK_N lists, short ones several.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG, UNIFORM, GEOMETRIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
DISCOUNTS = {"log": LOG, "uniform": UNIFORM, "geometric": GEOMETRIC}
GAIN, BURGES, SCALED, BINARY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
GAINS = {"gain": GAIN, "burges": BURGES, "burges_scaled": SCALED, "binary": BINARY}
ONE, IDEAL, RELEVANT, CUTOFF = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
GIVEN = tl.constexpr(4)
NORMALISERS = {"one": ONE, "ideal": IDEAL, "relevant": RELEVANT, "cutoff": CUTOFF}

BLOCK_ELEMENTS = 1024  # gains per program, where lists are short
MAX_SORTED = 1024  # longest list that is sorted in the kernel


@triton.jit
def _swap_rewards_linear_kernel(
    gains_ptr,  # (N, K)
    rewards_ptr,  # (N, K)
    lengths_ptr,  # (N,) int64, if HAS_LENGTHS
    num_ranked_ptr,  # (N,) int64, if HAS_NUM_RANKED
    inverse_norms_ptr,  # (N,) float64, if NORMALISER is GIVEN
    rows,
    size,
    row_stride,  # of the gains, in elements
    max_ranked,
    cutoff,  # 0: none
    HAS_LENGTHS: tl.constexpr,
    HAS_NUM_RANKED: tl.constexpr,
    DISCOUNT: tl.constexpr,
    P: tl.constexpr,  # of GEOMETRIC discounts: as an argument it would be float32
    LOG2_P: tl.constexpr,
    GAIN_KIND: tl.constexpr,
    NORMALISER: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    exists = row < rows  # (BLOCK_N,)
    length = tl.zeros([BLOCK_N], dtype=tl.int32) + size  # (BLOCK_N,)
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + row, mask=exists, other=0).to(tl.int32)  # (BLOCK_N,)
    shown = tl.minimum(length, max_ranked)  # (BLOCK_N,)
    if HAS_NUM_RANKED:
        shown = tl.minimum(shown, tl.load(num_ranked_ptr + row, mask=exists, other=0).to(tl.int32))  # (BLOCK_N,)
    depth = shown  # (BLOCK_N,)
    if cutoff > 0:
        depth = tl.minimum(shown, cutoff)  # (BLOCK_N,)

    inside = exists[:, None] & (k[None, :] < length[:, None])  # (BLOCK_N, BLOCK_K)
    gains = tl.load(gains_ptr + row[:, None] * row_stride + k[None, :], mask=inside, other=0.0)  # (BLOCK_N, BLOCK_K)
    gains = gains.to(ACCUMULATOR)  # (BLOCK_N, BLOCK_K)

    rank = (k + 1).to(ACCUMULATOR)  # (BLOCK_K,)
    if DISCOUNT == LOG:
        table = 1.0 / tl.log2(rank + 1.0)  # (BLOCK_K,)
    elif DISCOUNT == GEOMETRIC:
        table = (1.0 - P) * tl.exp2((rank - 1.0) * LOG2_P)  # (BLOCK_K,)
    else:
        table = tl.full([BLOCK_K], 1.0, ACCUMULATOR)  # (BLOCK_K,)
    d = tl.where(k[None, :] < depth[:, None], table[None, :], 0.0)  # (BLOCK_N, BLOCK_K)

    top = tl.max(gains, axis=1)  # (BLOCK_N,)
    w = _term_gains(gains, top, GAIN_KIND)  # (BLOCK_N, BLOCK_K)
    w = tl.where(inside, w, 0.0)  # (BLOCK_N, BLOCK_K)

    if NORMALISER == IDEAL:
        best = tl.sort(gains, dim=1, descending=True)  # (BLOCK_N, BLOCK_K)
        counted = k[None, :] < length[:, None]  # (BLOCK_N, BLOCK_K)
        if cutoff > 0:
            counted = counted & (k[None, :] < cutoff)  # (BLOCK_N, BLOCK_K)
        best = tl.where(counted, _term_gains(best, top, GAIN_KIND) * table[None, :], 0.0)  # (BLOCK_N, BLOCK_K)
        norm = tl.sum(best, axis=1)  # (BLOCK_N,)
    elif NORMALISER == RELEVANT:
        norm = tl.sum(w, axis=1)  # (BLOCK_N,)
    elif NORMALISER == CUTOFF:
        norm = length.to(ACCUMULATOR)  # (BLOCK_N,)
        if cutoff > 0:
            norm = tl.zeros([BLOCK_N], dtype=ACCUMULATOR) + cutoff  # (BLOCK_N,)
    else:
        norm = tl.full([BLOCK_N], 1.0, ACCUMULATOR)  # (BLOCK_N,)

    centre = tl.sum(tl.where(k[None, :] == 0, w, 0.0), axis=1)  # (BLOCK_N,)
    x = tl.where(inside, w - centre[:, None], 0.0)  # (BLOCK_N, BLOCK_K)
    dx = d * x  # (BLOCK_N, BLOCK_K)
    x_behind = tl.cumsum(x, axis=1, reverse=True) - x  # (BLOCK_N, BLOCK_K)
    d_behind = tl.cumsum(d, axis=1, reverse=True) - d  # (BLOCK_N, BLOCK_K)
    dx_behind = tl.cumsum(dx, axis=1, reverse=True) - dx  # (BLOCK_N, BLOCK_K)
    n = tl.maximum(length[:, None] - 1 - k[None, :], 0).to(ACCUMULATOR)  # (BLOCK_N, BLOCK_K)
    rewards = d * (n * x - x_behind) - (x * d_behind - dx_behind)  # (BLOCK_N, BLOCK_K)
    rewards = rewards / tl.maximum(n, 1.0)  # (BLOCK_N, BLOCK_K)
    if NORMALISER == GIVEN:
        norm = tl.load(inverse_norms_ptr + row, mask=exists, other=0.0)  # (BLOCK_N,)
        rewards = rewards * norm.to(ACCUMULATOR)[:, None]  # (BLOCK_N, BLOCK_K)
    else:
        norm = tl.where(norm > 0.0, norm, 1.0)  # (BLOCK_N,), a list without a positive gain has x = 0
        rewards = rewards / norm[:, None]  # (BLOCK_N, BLOCK_K)
    rewards = tl.where((n > 0.0) & (k[None, :] < shown[:, None]), rewards, 0.0)  # (BLOCK_N, BLOCK_K)
    written = exists[:, None] & (k[None, :] < size)  # (BLOCK_N, BLOCK_K)
    tl.store(rewards_ptr + row[:, None] * size + k[None, :], rewards, mask=written)  # (BLOCK_N, BLOCK_K)


@triton.jit
def _term_gains(gains, top, KIND: tl.constexpr):
    if KIND == BINARY:
        w = tl.where(gains > 0.0, 1.0, 0.0).to(gains.dtype)  # (BLOCK_N, BLOCK_K)
    elif KIND == GAIN:
        w = gains  # (BLOCK_N, BLOCK_K)
    elif KIND == BURGES:
        w = _exp2_minus_1(gains)  # (BLOCK_N, BLOCK_K)
    else:  # divided by 2^top, which the normaliser takes out again
        raised = tl.exp2(gains - top[:, None])  # (BLOCK_N, BLOCK_K)
        small = _exp2_minus_1(tl.minimum(gains, 1.0)) * tl.exp2(-top)[:, None]  # (BLOCK_N, BLOCK_K)
        w = tl.where(gains < 1.0, small, raised - tl.exp2(-top)[:, None])  # (BLOCK_N, BLOCK_K)
    return w


@triton.jit
def _exp2_minus_1(g):
    # Below 1/8 the subtraction would lose digits; six terms of the series leave less than a rounding.
    y = g * 0.6931471805599453  # (BLOCK_N, BLOCK_K)
    series = y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6)))))  # (BLOCK_N, BLOCK_K)
    return tl.where(g < 0.125, series, tl.exp2(g) - 1.0)  # (BLOCK_N, BLOCK_K)


def swap_rewards_linear(
    gains: torch.Tensor,
    lengths: torch.Tensor | None,
    num_ranked: torch.Tensor | None,
    inverse_norms: torch.Tensor | None = None,
    *,
    max_ranked: int,
    cutoff: int | None,
    discount: str,
    gain: str,
    normaliser: str,
    p: float | None = None,
) -> torch.Tensor:
    """Launch the kernel.

    Args:
        gains: (N, K) float16, bfloat16, float32 or float64, rank order, any row stride.
        lengths, num_ranked: (N,) int64 or None; ``max_ranked`` bounds both.
        inverse_norms: (N,) float64 or None, 1 / Z of each list; needed for ideal normalisers beyond MAX_SORTED.
        cutoff, discount, gain, normaliser, p: of the metric, see ``flexrec.metrics.Family``.

    Returns:
        (N, K) float64 for float64 gains, else float32, accumulated in that dtype.
    """
    rows, size = gains.shape
    if normaliser == "ideal" and inverse_norms is None and size > MAX_SORTED:
        raise ValueError(f"inverse_norms must be given for lists longer than {MAX_SORTED}, got K = {size}")
    if gains.stride(1) != 1:
        gains = gains.contiguous()
    dtype = torch.float64 if gains.dtype == torch.float64 else torch.float32
    rewards = torch.empty((rows, size), dtype=dtype, device=gains.device)
    if rows == 0 or size == 0:
        return rewards
    block_k = triton.next_power_of_2(size)
    block_n = max(1, min(BLOCK_ELEMENTS // block_k, triton.next_power_of_2(rows)))
    with torch.device(gains.device) if not gains.is_cuda else torch.cuda.device(gains.device):
        _swap_rewards_linear_kernel[(triton.cdiv(rows, block_n),)](
            gains,
            rewards,
            lengths,
            num_ranked,
            inverse_norms,
            rows,
            size,
            gains.stride(0),
            max_ranked,
            0 if cutoff is None else cutoff,
            HAS_LENGTHS=lengths is not None,
            HAS_NUM_RANKED=num_ranked is not None,
            DISCOUNT=DISCOUNTS[discount].value,
            P=0.0 if p is None else p,
            LOG2_P=0.0 if p is None else math.log2(p),
            GAIN_KIND=GAINS[gain].value,
            NORMALISER=(NORMALISERS[normaliser] if inverse_norms is None else GIVEN).value,
            ACCUMULATOR=tl.float64 if dtype == torch.float64 else tl.float32,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=max(1, min(16, block_n * block_k // 256)),
        )
    return rewards
