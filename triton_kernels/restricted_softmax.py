"""The softmax of ragged sets, given one logit per entry: everything that is summed over a set, and its gradient.

Derivation and byte counts stand in restricted_logprobs.py, of which this is the middle part.

A program takes ROWS rows side by side, in tiles of (ROWS, WIDTH) entries, and after that one by one its rows of more
than LONG entries, so that a set of the whole vocabulary does not make its neighbours wait. Each row is read twice,
for its maximum and for the sums relative to it; the second time it comes from a cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from flexrec.triton_kernels.aot import Variant
from flexrec.triton_kernels.segment_sum import ceil_div
from torch import Tensor

ROWS, WIDTH = 32, 16  # tile for rows of up to LONG entries
LONG, LONG_WIDTH = 256, 1024  # rows beyond LONG entries are taken alone, LONG_WIDTH entries at once
FLAT = 512  # entries of one program of the backward pass

_IMPOSSIBLE = tl.constexpr(-5e19)  # a logit below this stands for -inf
_FLOOR = tl.constexpr(-1e20)
_START = tl.constexpr(-2e20)  # below every logit: the maximum over nothing


@triton.jit
def _softmax_of_rows(
    row,  # (R,) int64
    row_ok,  # (R,)
    logits_ptr,
    ref_logits_ptr,
    values_ptr,
    ids_ptr,
    offsets_ptr,
    targets_ptr,
    logprobs_ptr,
    entropy_ptr,
    expectations_ptr,
    kl_ptr,
    norm_ptr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """R rows side by side, WIDTH entries of each at once: first their maxima, then the sums relative to them."""
    begin = tl.load(offsets_ptr + row, mask=row_ok, other=0)  # (R,)
    end = tl.load(offsets_ptr + row + 1, mask=row_ok, other=0)  # (R,)
    longest = tl.max(end - begin, axis=0)  # ()
    lane = tl.arange(0, WIDTH)[None, :]  # (1, WIDTH)
    channel = tl.arange(0, BLOCK_C)  # (BLOCK_C,)

    largest = tl.full((R,), _START, tl.float32)  # (R,) m
    ref_largest = tl.full((R,), _START, tl.float32)  # (R,) m'
    start = longest * 0  # ()
    while start < longest:
        entry = begin[:, None] + start + lane  # (R, WIDTH)
        ok = entry < end[:, None]  # (R, WIDTH)
        logits = tl.load(logits_ptr + entry, mask=ok, other=_START)  # (R, WIDTH)
        largest = tl.maximum(largest, tl.max(logits, axis=1))  # (R,)
        if ref_logits_ptr is not None:
            ref_logits = tl.load(ref_logits_ptr + entry, mask=ok, other=_START)  # (R, WIDTH)
            ref_largest = tl.maximum(ref_largest, tl.max(ref_logits, axis=1))  # (R,)
        start += WIDTH

    total = tl.zeros((R,), tl.float32)  # (R,) s
    weighted = tl.zeros((R,), tl.float32)  # (R,) sum of e^(z - m) (z - m)
    expected = tl.zeros((R, BLOCK_C), tl.float32)  # (R, BLOCK_C)
    chosen_logit = tl.zeros((R,), tl.float32)  # (R,)
    found = tl.zeros((R,), tl.int32)  # (R,)
    ref_total = tl.zeros((R,), tl.float32)  # (R,) s'
    apart = tl.zeros((R,), tl.float32)  # (R,) sum of e^(z - m) [(z - m) - (r - m')]
    unreachable = tl.zeros((R,), tl.int32)  # (R,)
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row, mask=row_ok, other=-1)  # (R,)
    start = longest * 0  # ()
    while start < longest:
        entry = begin[:, None] + start + lane  # (R, WIDTH)
        ok = entry < end[:, None]  # (R, WIDTH)
        logits = tl.load(logits_ptr + entry, mask=ok, other=_START)  # (R, WIDTH)
        shifted = tl.where(ok, logits - largest[:, None], 0.0)  # (R, WIDTH)
        exps = tl.where(ok, tl.exp(shifted), 0.0)  # (R, WIDTH)
        total += tl.sum(exps, axis=1)  # (R,)
        weighted += tl.sum(exps * shifted, axis=1)  # (R,)
        for c in tl.static_range(C):
            values = tl.load(values_ptr + entry * C + c, mask=ok, other=0.0).to(tl.float32)  # (R, WIDTH)
            expected += tl.where(channel[None, :] == c, tl.sum(exps * values, axis=1)[:, None], 0.0)  # (R, BLOCK_C)
        if targets_ptr is not None:
            chosen = ok & (tl.load(ids_ptr + entry, mask=ok, other=-1) == target[:, None])  # (R, WIDTH)
            chosen_logit += tl.sum(tl.where(chosen, shifted, 0.0), axis=1)  # (R,)
            found += tl.sum(chosen.to(tl.int32), axis=1)  # (R,)
        if ref_logits_ptr is not None:
            ref_logits = tl.load(ref_logits_ptr + entry, mask=ok, other=_START)  # (R, WIDTH)
            ref_shifted = tl.where(ok, ref_logits - ref_largest[:, None], 0.0)  # (R, WIDTH)
            ref_total += tl.sum(tl.where(ok, tl.exp(ref_shifted), 0.0), axis=1)  # (R,)
            blocked = (ref_shifted < _IMPOSSIBLE) & (exps > 0.0)  # (R, WIDTH)
            apart += tl.sum(tl.where(blocked, 0.0, exps * (shifted - ref_shifted)), axis=1)  # (R,)
            unreachable += tl.sum(blocked.to(tl.int32), axis=1)  # (R,)
        start += WIDTH

    some = end > begin  # (R,)
    total = tl.where(some, total, 1.0)  # (R,)
    log_total = tl.log(total)  # (R,)
    tl.store(entropy_ptr + row, log_total - weighted / total, mask=row_ok)
    tl.store(norm_ptr + 4 * row, largest, mask=row_ok)
    tl.store(norm_ptr + 4 * row + 1, log_total, mask=row_ok)
    if C > 0:
        tl.store(
            expectations_ptr + row[:, None] * C + channel[None, :],
            expected / total[:, None],
            mask=row_ok[:, None] & (channel < C)[None, :],
        )
    if targets_ptr is not None:
        logprobs = chosen_logit - log_total  # (R,)
        logprobs = tl.where(logprobs < _IMPOSSIBLE, float("-inf"), logprobs)  # (R,)
        tl.store(logprobs_ptr + row, tl.where(found > 0, logprobs, float("nan")), mask=row_ok)
    if ref_logits_ptr is not None:
        ref_log_total = tl.log(tl.where(some, ref_total, 1.0))  # (R,)
        kl = apart / total - (log_total - ref_log_total)  # (R,)
        tl.store(kl_ptr + row, tl.where(unreachable > 0, float("inf"), kl), mask=row_ok)
        tl.store(norm_ptr + 4 * row + 2, ref_largest, mask=row_ok)
        tl.store(norm_ptr + 4 * row + 3, ref_log_total, mask=row_ok)


@triton.jit
def set_softmax_kernel(
    logits_ptr,  # (nnz,)
    ref_logits_ptr,  # (nnz,) or None
    values_ptr,  # (nnz, C)
    ids_ptr,  # (nnz,) int64
    offsets_ptr,  # (M + 1,) int64
    targets_ptr,  # (M,) int64 or None
    logprobs_ptr,  # (M,)
    entropy_ptr,  # (M,)
    expectations_ptr,  # (M, C)
    kl_ptr,  # (M,)
    norm_ptr,  # (M, 4): m, log s, m', log s'
    M,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LONG: tl.constexpr,
    LONG_WIDTH: tl.constexpr,
):
    """One program: ROWS rows, those of up to LONG entries side by side and then the others one by one."""
    local = tl.arange(0, ROWS)  # (ROWS,)
    first = tl.program_id(0).to(tl.int64) * ROWS  # ()
    row = first + local  # (ROWS,)
    row_ok = row < M  # (ROWS,)
    begin = tl.load(offsets_ptr + row, mask=row_ok, other=0)  # (ROWS,)
    end = tl.load(offsets_ptr + row + 1, mask=row_ok, other=0)  # (ROWS,)
    long = end - begin > LONG  # (ROWS,)
    _softmax_of_rows(
        row,
        row_ok & (end - begin <= LONG),
        logits_ptr,
        ref_logits_ptr,
        values_ptr,
        ids_ptr,
        offsets_ptr,
        targets_ptr,
        logprobs_ptr,
        entropy_ptr,
        expectations_ptr,
        kl_ptr,
        norm_ptr,
        C,
        BLOCK_C,
        ROWS,
        WIDTH,
    )
    one = tl.arange(0, 1)  # (1,)
    following = tl.min(tl.where(long, local, ROWS), axis=0)  # ()
    while following < ROWS:
        _softmax_of_rows(
            first + following + one,
            one == 0,
            logits_ptr,
            ref_logits_ptr,
            values_ptr,
            ids_ptr,
            offsets_ptr,
            targets_ptr,
            logprobs_ptr,
            entropy_ptr,
            expectations_ptr,
            kl_ptr,
            norm_ptr,
            C,
            BLOCK_C,
            1,
            LONG_WIDTH,
        )
        following = tl.min(tl.where(long & (local > following), local, ROWS), axis=0)  # ()


@triton.jit
def dlogits_kernel(
    logits_ptr,  # (nnz,)
    ref_logits_ptr,  # (nnz,) or None
    values_ptr,  # (nnz, C)
    ids_ptr,  # (nnz,) int64
    row_ptr,  # (nnz,) int32
    offsets_ptr,  # (M + 1,) int64
    targets_ptr,  # (M,) int64 or None
    entropy_ptr,  # (M,)
    expectations_ptr,  # (M, C)
    kl_ptr,  # (M,)
    norm_ptr,  # (M, 4)
    grad_logprobs_ptr,  # (M,)
    grad_entropy_ptr,  # (M,)
    grad_expectations_ptr,  # (M, C)
    grad_kl_ptr,  # (M,)
    dlogits_ptr,  # (nnz,)
    entries,  # nnz
    temperature,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: dz / temperature of BLOCK entries; exactly 0 where there is no choice, or no possible token."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    ok = entry < entries  # (BLOCK,)
    row = tl.load(row_ptr + entry, mask=ok, other=0).to(tl.int64)  # (BLOCK,)
    begin = tl.load(offsets_ptr + row, mask=ok, other=0)  # (BLOCK,)
    end = tl.load(offsets_ptr + row + 1, mask=ok, other=0)  # (BLOCK,)
    live = end - begin > 1  # (BLOCK,)
    logits = tl.load(logits_ptr + entry, mask=live, other=_FLOOR)  # (BLOCK,)
    largest = tl.load(norm_ptr + 4 * row, mask=live, other=0.0)  # (BLOCK,)
    live = live & (logits > _IMPOSSIBLE) & (largest > _IMPOSSIBLE) | (logits != logits)  # (BLOCK,); a NaN shows
    log_probs = (logits - largest) - tl.load(norm_ptr + 4 * row + 1, mask=live, other=0.0)  # (BLOCK,)
    log_probs = tl.where(live, log_probs, 0.0)  # (BLOCK,)
    entropy = tl.load(entropy_ptr + row, mask=live, other=0.0)  # (BLOCK,)
    slope = -tl.load(grad_entropy_ptr + row, mask=live, other=0.0) * (log_probs + entropy)  # (BLOCK,)
    for c in tl.static_range(C):
        values = tl.load(values_ptr + entry * C + c, mask=live, other=0.0).to(tl.float32)  # (BLOCK,)
        expectation = tl.load(expectations_ptr + row * C + c, mask=live, other=0.0)  # (BLOCK,)
        slope += tl.load(grad_expectations_ptr + row * C + c, mask=live, other=0.0) * (values - expectation)  # (BLOCK,)
    if ref_logits_ptr is not None:
        kl = tl.load(kl_ptr + row, mask=live, other=0.0)  # (BLOCK,)
        finite = kl < float("inf")  # (BLOCK,)
        ref_largest = tl.load(norm_ptr + 4 * row + 2, mask=live, other=0.0)  # (BLOCK,)
        ref_log_total = tl.load(norm_ptr + 4 * row + 3, mask=live, other=0.0)  # (BLOCK,)
        ref_logits = tl.load(ref_logits_ptr + entry, mask=live, other=0.0)  # (BLOCK,)
        apart = log_probs - ((ref_logits - ref_largest) - ref_log_total) - kl  # (BLOCK,)
        slope += tl.load(grad_kl_ptr + row, mask=live, other=0.0) * tl.where(finite, apart, 0.0)  # (BLOCK,)
    if targets_ptr is not None:
        grad_logprobs = tl.load(grad_logprobs_ptr + row, mask=live, other=0.0)  # (BLOCK,)
        target = tl.load(targets_ptr + row, mask=live, other=-1)  # (BLOCK,)
        chosen = tl.load(ids_ptr + entry, mask=live, other=-2) == target  # (BLOCK,)
        slope -= grad_logprobs  # (BLOCK,)
        dlogits = tl.exp(log_probs) * slope + tl.where(chosen, grad_logprobs, 0.0)  # (BLOCK,)
    else:
        dlogits = tl.exp(log_probs) * slope  # (BLOCK,)
    tl.store(dlogits_ptr + entry, tl.where(live, dlogits / temperature, 0.0), mask=ok)


def set_softmax(
    logits: Tensor, ref_logits: Tensor | None, values: Tensor, ids: Tensor, offsets: Tensor, targets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What follows from the logits of every entry; all float32.

    Args:
        logits, ref_logits: (nnz,) float32; the reference's up to a constant per row.
        values: (nnz, C) floating; targets: (M,) int64.

    Returns:
        log-probs (M,), NaN where the target is not allowed and 0 without targets; entropy (M,); expectations (M, C);
        KL (M,), 0 without a reference; norm (M, 4), for the backward pass.
    """
    m, c = len(offsets) - 1, values.shape[1]

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    logprobs, entropy, expectations, kl, norm = new(m), new(m), new(m, c), new(m), new(m, 4)
    if targets is None:
        logprobs.zero_()
    if ref_logits is None:
        kl.zero_()
    if m:
        set_softmax_kernel[(ceil_div(m, ROWS),)](
            logits,
            ref_logits,
            values.contiguous(),
            ids,
            offsets,
            targets,
            logprobs,
            entropy,
            expectations,
            kl,
            norm,
            m,
            C=c,
            BLOCK_C=1 << (max(c, 1) - 1).bit_length(),
            ROWS=ROWS,
            WIDTH=WIDTH,
            LONG=LONG,
            LONG_WIDTH=LONG_WIDTH,
        )
    return logprobs, entropy, expectations, kl, norm


def set_softmax_backward(
    upstream: tuple[Tensor, Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    logits: Tensor,
    ref_logits: Tensor | None,
    values: Tensor,
    ids: Tensor,
    offsets: Tensor,
    row: Tensor,
    targets: Tensor | None,
    temperature: float,
) -> Tensor:
    """(nnz,) float32: the gradient of (h . w + b), the logits before the division by the temperature.

    Args:
        upstream: gradients of log-probs (M,), entropy (M,), expectations (M, C) and KL (M,).
        results: entropy, expectations, KL and norm as :func:`set_softmax` returned them.
    """
    entropy, expectations, kl, norm = results
    dlogits = torch.empty_like(logits)
    if len(logits):
        grad_logprobs, grad_entropy, grad_expectations, grad_kl = (grad.contiguous() for grad in upstream)
        dlogits_kernel[(ceil_div(len(logits), FLAT),)](
            logits,
            ref_logits,
            values.contiguous(),
            ids,
            row,
            offsets,
            targets,
            entropy,
            expectations,
            kl,
            norm,
            grad_logprobs,
            grad_entropy,
            grad_expectations,
            grad_kl,
            dlogits,
            len(logits),
            temperature,
            C=values.shape[1],
            BLOCK=FLAT,
        )
    return dlogits


def variants() -> Iterator[Variant]:
    """Both kernels with the least and with the most that can be asked of them."""
    results = ("logits", "values", "logprobs", "entropy", "expectations", "kl", "norm")
    grads = ("grad_logprobs", "grad_entropy", "grad_expectations", "grad_kl", "dlogits")
    whole = {"ids_ptr": "*i64", "offsets_ptr": "*i64", "targets_ptr": "*i64"}
    for name, channels, reference in (("plain", 0, None), ("values and KL", 3, "*fp32")):
        types = {**whole, **{f"{result}_ptr": "*fp32" for result in results}}
        constants: dict[str, object] = {"C": channels}
        if reference:
            types["ref_logits_ptr"] = reference
        else:
            constants["ref_logits_ptr"] = None
        tiles = {"BLOCK_C": 4 if channels else 1, "ROWS": ROWS, "WIDTH": WIDTH, "LONG": LONG, "LONG_WIDTH": LONG_WIDTH}
        yield Variant(
            f"restricted_logprobs softmax {name}", set_softmax_kernel, {**types, "M": "i32"}, {**constants, **tiles}
        )
        del types["logprobs_ptr"]
        types |= {f"{grad}_ptr": "*fp32" for grad in grads}
        types |= {"row_ptr": "*i32", "entries": "i32", "temperature": "fp32"}
        yield Variant(f"restricted_logprobs dlogits {name}", dlogits_kernel, types, {**constants, "BLOCK": FLAT})
