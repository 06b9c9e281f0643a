"""Log-probs, entropy and expectations of rankings, each step over the candidates that remain: forward and backward.

Derivation. Of N = P * G rankings, G share the K candidates of one list. With z_j = (h . w_j + b_j) / temperature and
the pool {j : position[j] >= t} of step t, one pass over tiles of candidates keeps, relative to the running maximum m,

    s = sum e^(z_j - m),    u = sum e^(z_j - m) (z_j - m),    x_c = sum e^(z_j - m) v_jc;

when m grows to m', with a = e^(m - m'):  u <- a (u + s (m - m')),  s <- a s,  x <- a x.  At the end

    log p_y = (z_y - m) - log s,    H = log s - u / s  (two positive terms: nothing cancels),    E_c = x_c / s.

Backward, with log p_j = (z_j - m) - log s from m and log s, kept apart because their sum would round:

    dz_j = [g_lp (y_j - p_j) - g_H p_j (log p_j + H) + p_j sum_c g_c (v_jc - E_c)] / temperature
    dh = sum_j dz_j w_j,    dw_j = sum over the list's G T steps of dz_j h,    db_j = the same sum of dz_j.

Layout. Candidates stay in the order given and the G * T steps of a list are the rows of one problem, so that a
weight row is read once per tile of steps of a list, and its gradient is added to memory once per list and not once
per ranking. The pool comes from `position` (N, K) int32 (-1: not a candidate), never from a stored mask.
A logit of -inf is replaced by the finite FLOOR: probability exactly 0, no NaN from 0 * inf, uniform where nothing
else remains; such logits pass no gradient.

Bytes, with e bytes an element, R = N T steps, and J = ceil(G T / BLOCK_T) tiles of steps per list:
    forward     R D e (hidden) + J P K D e (rows; from L2 after the first tile) + 4 R K (logits out)
                + 4 R K (positions; G of them, T times each from L1) + 16 R (log-prob, entropy, m, log s)
    backward    4 R K (logits) + J P K D e (rows) + R D e (dh out);  4 R K + R D e (hidden) + 8 P K D (atomic adds)
A later version may skip the logits where 4 K > D e, and take the fp32 products of the backward pass to tensor cores;
this one is written to be right in every dtype.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton decides it when the kernels below are made

_FLOOR = tl.constexpr(-1e20)  # stands for a logit of -inf; equals FLOOR of the reference
_IMPOSSIBLE = tl.constexpr(-5e19)
_START = tl.constexpr(-2e20)  # below every logit: the maximum over nothing


@triton.jit
def _dot(a, b, NATIVE: tl.constexpr):
    """a @ b in float32; NATIVE feeds half precision to the tensor cores (silently wrong in the interpreter)."""
    if NATIVE:
        return tl.dot(a, b)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def _dlogits(
    logits_ptr,
    position_ptr,
    values_ptr,
    expectations_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    grad_expectations_ptr,
    entropy_ptr,
    norm_ptr,
    row,  # (BLOCK_T,) int64 index into the N T steps
    row_ok,  # (BLOCK_T,)
    col,  # (BLOCK_K,) candidate
    T,
    K,
    temperature,
    C: tl.constexpr,
):
    """dz for a tile of steps and candidates: (BLOCK_T, BLOCK_K) float32, 0 outside the pool."""
    ranking = row // T  # (BLOCK_T,)
    step = row % T  # (BLOCK_T,)
    tile_ok = row_ok[:, None] & (col < K)[None, :]  # (BLOCK_T, BLOCK_K)
    logits = tl.load(logits_ptr + row[:, None] * K + col[None, :], mask=tile_ok, other=0.0)  # (BLOCK_T, BLOCK_K)
    position = tl.load(position_ptr + ranking[:, None] * K + col[None, :], mask=tile_ok, other=-1)  # (BLOCK_T, BLOCK_K)
    largest = tl.load(norm_ptr + 2 * row, mask=row_ok, other=_START)  # (BLOCK_T,)
    log_total = tl.load(norm_ptr + 2 * row + 1, mask=row_ok, other=0.0)  # (BLOCK_T,)
    entropy = tl.load(entropy_ptr + row, mask=row_ok, other=0.0)  # (BLOCK_T,)
    grad_logprobs = tl.load(grad_logprobs_ptr + row, mask=row_ok, other=0.0)  # (BLOCK_T,)
    grad_entropy = tl.load(grad_entropy_ptr + row, mask=row_ok, other=0.0)  # (BLOCK_T,)

    pool = (position >= step[:, None]) & (logits > _IMPOSSIBLE) & (largest > _IMPOSSIBLE)[:, None]  # (BLOCK_T, BLOCK_K)
    log_probs = tl.where(pool, (logits - largest[:, None]) - log_total[:, None], 0.0)  # (BLOCK_T, BLOCK_K)
    probs = tl.where(pool, tl.exp(log_probs), 0.0)  # (BLOCK_T, BLOCK_K)
    slope = -grad_logprobs[:, None] - grad_entropy[:, None] * (log_probs + entropy[:, None])  # (BLOCK_T, BLOCK_K)
    for c in tl.static_range(C):
        values = tl.load(
            values_ptr + (ranking[:, None] * K + col[None, :]) * C + c, mask=tile_ok, other=0.0
        )  # (BLOCK_T, BLOCK_K)
        expectation = tl.load(expectations_ptr + row * C + c, mask=row_ok, other=0.0)  # (BLOCK_T,)
        grad = tl.load(grad_expectations_ptr + row * C + c, mask=row_ok, other=0.0)  # (BLOCK_T,)
        slope += grad[:, None] * (values.to(tl.float32) - expectation[:, None])  # (BLOCK_T, BLOCK_K)
    chosen = pool & (position == step[:, None])  # (BLOCK_T, BLOCK_K)
    dlogits = probs * slope + tl.where(chosen, grad_logprobs[:, None], 0.0)  # (BLOCK_T, BLOCK_K)
    return tl.where(pool, dlogits, 0.0) / temperature  # (BLOCK_T, BLOCK_K)


@triton.jit
def ranking_logprobs_forward_kernel(
    hidden_ptr,  # (N, T, D)
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,)
    candidates_ptr,  # (P, K) int64
    position_ptr,  # (N, K) int32
    values_ptr,  # (N, K, C)
    logprobs_ptr,  # (N, T)
    entropy_ptr,  # (N, T)
    expectations_ptr,  # (N, T, C)
    logits_ptr,  # (N, T, K)
    norm_ptr,  # (N, T, 2): m and log s
    T,
    K,
    D,
    rows_per_list,  # G * T
    temperature,
    C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    K_TILES: tl.constexpr,
    D_TILES: tl.constexpr,
):
    """One program: BLOCK_T steps of one list, all its candidates."""
    prompt = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)  # (BLOCK_T,) step within the list
    row_ok = offset < rows_per_list  # (BLOCK_T,)
    row = prompt * rows_per_list + offset  # (BLOCK_T,) int64
    ranking = row // T  # (BLOCK_T,)
    step = row % T  # (BLOCK_T,)
    channel = tl.arange(0, BLOCK_C)  # (BLOCK_C,)

    largest = tl.full((BLOCK_T,), _START, tl.float32)  # (BLOCK_T,)
    total = tl.zeros((BLOCK_T,), tl.float32)  # (BLOCK_T,) s
    weighted = tl.zeros((BLOCK_T,), tl.float32)  # (BLOCK_T,) u
    expected = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)  # (BLOCK_T, BLOCK_C) x
    chosen_logit = tl.zeros((BLOCK_T,), tl.float32)  # (BLOCK_T,)

    for k_tile in range(K_TILES):
        col = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        col_ok = col < K  # (BLOCK_K,)
        tile_ok = row_ok[:, None] & col_ok[None, :]  # (BLOCK_T, BLOCK_K)
        token = tl.load(candidates_ptr + prompt * K + col, mask=col_ok, other=0)  # (BLOCK_K,) int64
        position = tl.load(
            position_ptr + ranking[:, None] * K + col[None, :], mask=tile_ok, other=-1
        )  # (BLOCK_T, BLOCK_K)
        pool = position >= step[:, None]  # (BLOCK_T, BLOCK_K); false at the edges, where position is -1
        logits = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)  # (BLOCK_T, BLOCK_K)
        for d_tile in range(D_TILES):
            d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
            d_ok = d < D  # (BLOCK_D,)
            hidden = tl.load(
                hidden_ptr + row[:, None] * D + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0
            )  # (BLOCK_T, BLOCK_D)
            weight = tl.load(
                weight_ptr + token[None, :] * D + d[:, None], mask=col_ok[None, :] & d_ok[:, None], other=0.0
            )  # (BLOCK_D, BLOCK_K)
            logits += _dot(hidden, weight, NATIVE)  # (BLOCK_T, BLOCK_K)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + token, mask=col_ok, other=0.0)  # (BLOCK_K,)
            logits += bias.to(tl.float32)[None, :]  # (BLOCK_T, BLOCK_K)
        logits = logits / temperature  # (BLOCK_T, BLOCK_K)
        logits = tl.where(logits < _FLOOR, _FLOOR, logits)  # (BLOCK_T, BLOCK_K); a NaN stays
        tl.store(logits_ptr + row[:, None] * K + col[None, :], logits, mask=tile_ok)

        chosen = pool & (position == step[:, None])  # (BLOCK_T, BLOCK_K)
        chosen_logit += tl.sum(tl.where(chosen, logits, 0.0), axis=1)  # (BLOCK_T,)
        new_largest = tl.maximum(largest, tl.max(tl.where(pool, logits, _START), axis=1))  # (BLOCK_T,)
        decay = tl.exp(largest - new_largest)  # (BLOCK_T,) a
        shifted = tl.where(pool, logits - new_largest[:, None], 0.0)  # (BLOCK_T, BLOCK_K)
        exps = tl.where(pool, tl.exp(shifted), 0.0)  # (BLOCK_T, BLOCK_K)
        weighted = decay * (weighted + total * (largest - new_largest)) + tl.sum(exps * shifted, axis=1)  # (BLOCK_T,)
        total = decay * total + tl.sum(exps, axis=1)  # (BLOCK_T,)
        expected *= decay[:, None]  # (BLOCK_T, BLOCK_C)
        for c in tl.static_range(C):
            values = tl.load(
                values_ptr + (ranking[:, None] * K + col[None, :]) * C + c, mask=tile_ok, other=0.0
            )  # (BLOCK_T, BLOCK_K)
            summed = tl.sum(exps * values.to(tl.float32), axis=1)  # (BLOCK_T,)
            expected += tl.where(channel[None, :] == c, summed[:, None], 0.0)  # (BLOCK_T, BLOCK_C)
        largest = new_largest  # (BLOCK_T,)

    live = total != 0.0  # (BLOCK_T,); a NaN is live, and shows
    total = tl.where(live, total, 1.0)  # (BLOCK_T,)
    log_total = tl.log(total)  # (BLOCK_T,)
    logprobs = chosen_logit - largest - log_total  # (BLOCK_T,)
    logprobs = tl.where(logprobs < _IMPOSSIBLE, float("-inf"), logprobs)  # (BLOCK_T,)
    tl.store(logprobs_ptr + row, tl.where(live, logprobs, 0.0), mask=row_ok)
    tl.store(entropy_ptr + row, tl.where(live, log_total - weighted / total, 0.0), mask=row_ok)
    tl.store(norm_ptr + 2 * row, largest, mask=row_ok)
    tl.store(norm_ptr + 2 * row + 1, log_total, mask=row_ok)
    tl.store(
        expectations_ptr + row[:, None] * C + channel[None, :],
        expected / total[:, None],
        mask=row_ok[:, None] & (channel < C)[None, :],
    )


@triton.jit
def ranking_logprobs_hidden_grad_kernel(
    logits_ptr,  # (N, T, K)
    position_ptr,  # (N, K) int32
    values_ptr,  # (N, K, C)
    expectations_ptr,  # (N, T, C)
    grad_logprobs_ptr,  # (N, T)
    grad_entropy_ptr,  # (N, T)
    grad_expectations_ptr,  # (N, T, C)
    entropy_ptr,  # (N, T)
    norm_ptr,  # (N, T, 2): m and log s
    weight_ptr,  # (V, D)
    candidates_ptr,  # (P, K) int64
    hidden_grad_ptr,  # (N, T, D)
    T,
    K,
    D,
    rows_per_list,  # G * T
    temperature,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K_TILES: tl.constexpr,
):
    """One program: BLOCK_T steps of one list, BLOCK_D columns of their gradient."""
    prompt = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)  # (BLOCK_T,)
    row_ok = offset < rows_per_list  # (BLOCK_T,)
    row = prompt * rows_per_list + offset  # (BLOCK_T,) int64
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    d_ok = d < D  # (BLOCK_D,)
    grad = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)  # (BLOCK_T, BLOCK_D)
    for k_tile in range(K_TILES):
        col = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        col_ok = col < K  # (BLOCK_K,)
        dlogits = _dlogits(
            logits_ptr,
            position_ptr,
            values_ptr,
            expectations_ptr,
            grad_logprobs_ptr,
            grad_entropy_ptr,
            grad_expectations_ptr,
            entropy_ptr,
            norm_ptr,
            row,
            row_ok,
            col,
            T,
            K,
            temperature,
            C,
        )  # (BLOCK_T, BLOCK_K)
        token = tl.load(candidates_ptr + prompt * K + col, mask=col_ok, other=0)  # (BLOCK_K,) int64
        weight = tl.load(
            weight_ptr + token[:, None] * D + d[None, :], mask=col_ok[:, None] & d_ok[None, :], other=0.0
        )  # (BLOCK_K, BLOCK_D)
        grad += _dot(dlogits, weight, False)  # (BLOCK_T, BLOCK_D)
    tl.store(
        hidden_grad_ptr + row[:, None] * D + d[None, :],
        grad.to(hidden_grad_ptr.dtype.element_ty),
        mask=row_ok[:, None] & d_ok[None, :],
    )


@triton.jit
def ranking_logprobs_weight_grad_kernel(
    logits_ptr,  # (N, T, K)
    position_ptr,  # (N, K) int32
    values_ptr,  # (N, K, C)
    expectations_ptr,  # (N, T, C)
    grad_logprobs_ptr,  # (N, T)
    grad_entropy_ptr,  # (N, T)
    grad_expectations_ptr,  # (N, T, C)
    entropy_ptr,  # (N, T)
    norm_ptr,  # (N, T, 2): m and log s
    hidden_ptr,  # (N, T, D)
    candidates_ptr,  # (P, K) int64
    weight_grad_ptr,  # (V, D) float32, zeros
    bias_grad_ptr,  # (V,) float32, zeros
    T,
    K,
    D,
    rows_per_list,  # G * T
    temperature,
    C: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_TILES: tl.constexpr,
):
    """One program: BLOCK_K candidates of one list, BLOCK_D columns of their gradient (the first also the bias)."""
    prompt = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    col_ok = col < K  # (BLOCK_K,)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    d_ok = d < D  # (BLOCK_D,)
    token = tl.load(candidates_ptr + prompt * K + col, mask=col_ok, other=0)  # (BLOCK_K,) int64
    grad = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)  # (BLOCK_K, BLOCK_D)
    bias_grad = tl.zeros((BLOCK_K,), tl.float32)  # (BLOCK_K,)
    for row_tile in range(ROW_TILES):
        offset = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)  # (BLOCK_T,)
        row_ok = offset < rows_per_list  # (BLOCK_T,)
        row = prompt * rows_per_list + offset  # (BLOCK_T,) int64
        dlogits = _dlogits(
            logits_ptr,
            position_ptr,
            values_ptr,
            expectations_ptr,
            grad_logprobs_ptr,
            grad_entropy_ptr,
            grad_expectations_ptr,
            entropy_ptr,
            norm_ptr,
            row,
            row_ok,
            col,
            T,
            K,
            temperature,
            C,
        )  # (BLOCK_T, BLOCK_K)
        if WEIGHT:
            # Steps without a pool are not read: what they hold may be NaN, and 0 * NaN is not 0.
            live = row_ok & (tl.load(norm_ptr + 2 * row, mask=row_ok, other=_START) > _IMPOSSIBLE)  # (BLOCK_T,)
            hidden = tl.load(
                hidden_ptr + row[:, None] * D + d[None, :], mask=live[:, None] & d_ok[None, :], other=0.0
            )  # (BLOCK_T, BLOCK_D)
            grad += _dot(tl.trans(dlogits), hidden, False)  # (BLOCK_K, BLOCK_D)
        bias_grad += tl.sum(dlogits, axis=0)  # (BLOCK_K,)
    if WEIGHT:
        tl.atomic_add(
            weight_grad_ptr + token[:, None] * D + d[None, :], grad, mask=col_ok[:, None] & d_ok[None, :], sem="relaxed"
        )
    if BIAS:  # noqa: SIM102  a constexpr and a tensor are not to be joined by `and`
        if tl.program_id(2) == 0:
            tl.atomic_add(bias_grad_ptr + token, bias_grad, mask=col_ok, sem="relaxed")


def ranking_logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    position: Tensor,
    values: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel; all results are float32.

    Args:
        hidden: (N, T, D), weight: (V, D), bias: (V,) or None; float32, bfloat16 or float16.
        candidates: (P, K) int64 token ids, position: (N, K) integer, values: (N, K, C) in candidate order.

    Returns:
        log-probs (N, T), entropy (N, T), expectations (N, T, C), logits (N, T, K), norm (N, T, 2): m and log s.
    """
    n, t, d = hidden.shape
    p, k = candidates.shape
    c = values.shape[2]

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    logprobs, entropy, expectations = new(n, t), new(n, t), new(n, t, c)
    logits, norm = new(n, t, k), new(n, t, 2)
    if logits.numel() == 0:
        return logprobs.zero_(), entropy.zero_(), expectations.zero_(), logits, norm
    rows = n // p * t
    block_t, block_k, block_d = _blocks(rows, k, d)
    ranking_logprobs_forward_kernel[(p, triton.cdiv(rows, block_t))](
        hidden.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        candidates.contiguous(),
        position.to(torch.int32).contiguous(),
        values.contiguous(),
        logprobs,
        entropy,
        expectations,
        logits,
        norm,
        t,
        k,
        d,
        rows,
        temperature,
        C=c,
        HAS_BIAS=bias is not None,
        NATIVE=not INTERPRETED and hidden.dtype == weight.dtype != torch.float32,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        BLOCK_C=triton.next_power_of_2(max(c, 1)),
        K_TILES=triton.cdiv(k, block_k),
        D_TILES=triton.cdiv(d, block_d),
    )
    return logprobs, entropy, expectations, logits, norm


def ranking_logprobs_backward(
    upstream: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    position: Tensor,
    values: Tensor,
    temperature: float,
    needs_grad: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward kernels that ``needs_grad`` (hidden, weight, bias) asks for; None for the others.

    Args:
        upstream: gradients of log-probs (N, T), entropy (N, T) and expectations (N, T, C).
        saved: entropy, expectations, logits and norm as the forward launcher returned them.
    """
    t, d = hidden.shape[1:]
    p, k = candidates.shape
    entropy, expectations, logits, norm = saved
    grad_logprobs, grad_entropy, grad_expectations = (grad.contiguous() for grad in upstream)
    hidden_grad = None
    if needs_grad[0]:
        new = torch.empty_like if logits.numel() else torch.zeros_like
        hidden_grad = new(hidden, memory_format=torch.contiguous_format)
    weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_grad[1] else None
    bias_grad = None
    if needs_grad[2] and bias is not None:
        bias_grad = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    if logits.numel():
        rows = logits.shape[0] // p * t
        block_t, block_k, block_d = _blocks(rows, k, d)
        candidates = candidates.contiguous()
        softmax = (
            logits,
            position.to(torch.int32).contiguous(),
            values.contiguous(),
            expectations,
            grad_logprobs,
            grad_entropy,
            grad_expectations,
            entropy,
            norm,
        )
        sizes = (t, k, d, rows, temperature)
        blocks = {"C": values.shape[2], "BLOCK_T": block_t, "BLOCK_K": block_k, "BLOCK_D": block_d}
        if hidden_grad is not None:
            grid = (p, triton.cdiv(rows, block_t), triton.cdiv(d, block_d))
            ranking_logprobs_hidden_grad_kernel[grid](
                *softmax,
                weight.contiguous(),
                candidates,
                hidden_grad,
                *sizes,
                **blocks,
                K_TILES=triton.cdiv(k, block_k),
            )
        if weight_grad is not None or bias_grad is not None:
            grid = (p, triton.cdiv(k, block_k), triton.cdiv(d, block_d) if weight_grad is not None else 1)
            ranking_logprobs_weight_grad_kernel[grid](
                *softmax,
                hidden.contiguous(),
                candidates,
                weight_grad,
                bias_grad,
                *sizes,
                **blocks,
                WEIGHT=weight_grad is not None,
                BIAS=bias_grad is not None,
                ROW_TILES=triton.cdiv(rows, block_t),
            )
    return (
        hidden_grad,
        None if weight_grad is None else weight_grad.to(weight.dtype),
        None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
    )


def _blocks(rows: int, k: int, d: int) -> tuple[int, int, int]:
    """Tile sizes for steps, candidates and columns: powers of two that tl.dot accepts, no larger than the problem."""

    def fit(size: int, largest: int) -> int:
        return min(max(triton.next_power_of_2(size), 16), largest)

    return fit(rows, 32), fit(k, 64), fit(d, 64)
