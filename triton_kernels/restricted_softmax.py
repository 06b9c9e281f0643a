"""The softmax of ragged sets, given one logit per entry: everything that is summed over a set, and its gradient.

Derivation and byte counts stand in restricted_logprobs.py, of which this is the middle part.

Rows of up to LONG entries lie side by side in a program. Each longer one has a program of its own in a second launch,
so that a set of the whole vocabulary keeps nobody waiting: the host knows only how many there can be, one for every
LONG entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexrec.triton_kernels.launch import ceil_div, kernel, launch
from flexrec.triton_kernels.softmax import FLOOR, Entries, logit_slopes, nothing_read, read_entries, store_results

LONG = 256  # entries beyond which a row has a program of its own
TILE, LONG_TILE = (32, 16), (1, 1024)  # rows and entries of each that a program takes at once
FLAT = 256  # entries of one program of the backward pass


@triton.jit
def _owner(offsets_ptr, entry, M):
    """The row that has an entry, the last that begins at or before it."""
    low, high = entry * 0, entry * 0 + (M - 1)
    while low < high:
        middle = low + (high - low + 1) // 2
        begins = tl.load(offsets_ptr + middle) <= entry
        low, high = tl.where(begins, middle, low), tl.where(begins, high, middle - 1)
    return low


@kernel
def set_softmax_kernel(
    logits_ptr,  # (nnz,)
    ref_logits_ptr,  # (nnz,) or None
    values_ptr,  # (nnz, C)
    ids_ptr,  # (nnz,) int64
    offsets_ptr,  # (M + 1,) int64
    targets_ptr,  # (M,) int64 or None
    logprobs_ptr,  # (M,) or None
    entropy_ptr,  # (M,)
    expectations_ptr,  # (M, C)
    kl_ptr,  # (M,) or None
    norm_ptr,  # (M, 4): m, log s, m', log s'
    M,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TAKES_LONG: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program: those of BLOCK_R rows that have up to LONG entries, BLOCK_W of each at once.

    If TAKES_LONG, with BLOCK_R = 1, the longer row that begins between two multiples of LONG, if any: it is the one
    that has the entry at the second of the two.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    boundary = (first + 1) * LONG
    if TAKES_LONG:
        first = _owner(offsets_ptr, boundary, M)
    row = first + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    row_ok = row < M
    begin = tl.load(offsets_ptr + row, mask=row_ok, other=0)
    size = tl.load(offsets_ptr + row + 1, mask=row_ok, other=0) - begin
    if TAKES_LONG:
        row_ok = row_ok & (size > LONG) & (begin >= boundary - LONG) & (begin < boundary)
    else:
        row_ok = row_ok & (size <= LONG)
    size = tl.where(row_ok, size, 0)
    target = begin * 0 - 1
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row, mask=row_ok, other=-1)
    longest = tl.max(size, axis=0)
    sums = nothing_read(BLOCK_R, BLOCK_C)
    start = longest * 0
    while start < longest:
        place = start + tl.arange(0, BLOCK_W)[None, :]  # (1, BLOCK_W)
        entry, ok = begin[:, None] + place, place < size[:, None]  # (BLOCK_R, BLOCK_W)
        logits = tl.load(logits_ptr + entry, mask=ok, other=FLOOR)
        chosen = ok
        if targets_ptr is not None:
            chosen = ok & (tl.load(ids_ptr + entry, mask=ok, other=-1) == target[:, None])
        ref_logits = logits
        if ref_logits_ptr is not None:
            ref_logits = tl.load(ref_logits_ptr + entry, mask=ok, other=FLOOR)
        entries = Entries(logits, ref_logits, ok, chosen, ok, values_ptr + entry * C, 1)
        sums = read_entries(sums, entries, C, ref_logits_ptr is not None)
        start += BLOCK_W
    store_results(
        sums, row, row_ok, logprobs_ptr, entropy_ptr, expectations_ptr, kl_ptr, norm_ptr, norm_ptr + 2, C, 4, True
    )


@kernel
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
    kl_ptr,  # (M,) or None
    norm_ptr,  # (M, 4)
    grad_logprobs_ptr,  # (M,) or None
    grad_entropy_ptr,  # (M,)
    grad_expectations_ptr,  # (M, C)
    grad_kl_ptr,  # (M,) or None
    dlogits_ptr,  # (nnz,)
    entries,  # nnz
    temperature,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: dz / temperature of BLOCK entries; exactly 0 where there is no choice, or no possible token."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,), as all here
    ok = entry < entries
    row = tl.load(row_ptr + entry, mask=ok, other=0).to(tl.int64)
    begin = tl.load(offsets_ptr + row, mask=ok, other=0)
    live = tl.load(offsets_ptr + row + 1, mask=ok, other=0) - begin > 1
    logits = tl.load(logits_ptr + entry, mask=live, other=FLOOR)
    ref_logits = logits
    if ref_logits_ptr is not None:
        ref_logits = tl.load(ref_logits_ptr + entry, mask=live, other=0.0)
    chosen = live
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row, mask=live, other=-1)
        chosen = tl.load(ids_ptr + entry, mask=live, other=-2) == target
    dlogits = logit_slopes(
        Entries(logits, ref_logits, live, chosen, live, values_ptr + entry * C, 1),
        row,
        live,
        entropy_ptr,
        expectations_ptr,
        kl_ptr,
        norm_ptr,
        norm_ptr + 2,
        grad_logprobs_ptr,
        grad_entropy_ptr,
        grad_expectations_ptr,
        grad_kl_ptr,
        C,
        4,
        ref_logits_ptr is not None,
    )
    tl.store(dlogits_ptr + entry, dlogits / temperature, mask=ok)


def set_softmax(
    logits: Tensor,
    ref_logits: Tensor | None,
    values: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    targets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy, expectations, KL (0 without a reference) and norm (M, 4), all float32, from the logits of
    every entry; see ``restricted_logprobs_forward``."""
    values = _values_or_empty(values, logits)
    m, c = len(offsets) - 1, values.shape[1]

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    logprobs, entropy, expectations, kl, norm = new(m), new(m), new(m, c), new(m), new(m, 4)
    if targets is None:
        logprobs.zero_()
    if ref_logits is None:
        kl.zero_()
    if m:
        inputs = (logits, ref_logits, values.contiguous(), ids, offsets, targets)
        sums = (None if targets is None else logprobs, entropy, expectations, None if ref_logits is None else kl, norm)
        channels = {"C": c, "BLOCK_C": 1 << (max(c, 1) - 1).bit_length(), "LONG": LONG}
        for programs, takes_long, (rows, width) in (
            (ceil_div(m, TILE[0]), False, TILE),
            ((len(logits) - 1) // LONG, True, LONG_TILE),
        ):
            if programs > 0:
                tiles = {"TAKES_LONG": takes_long, "BLOCK_R": rows, "BLOCK_W": width}
                launch(set_softmax_kernel, (programs,), *inputs, *sums, m, **channels, **tiles)
    return logprobs, entropy, expectations, kl, norm


def set_softmax_backward(
    upstream: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
    logits: Tensor,
    ref_logits: Tensor | None,
    values: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    row: Tensor,
    targets: Tensor | None,
    temperature: float,
) -> Tensor:
    """(nnz,) float32: the gradient of (h . w + b), the logits before the division by the temperature.

    Args:
        upstream: gradients of log-probs (M,), entropy (M,), expectations (M, C) and KL (M,).
        results: entropy, expectations, KL and norm of the forward pass, and what it had or made of the others.
    """
    values, dlogits = _values_or_empty(values, logits), torch.empty_like(logits)
    if len(logits):
        inputs = (logits, ref_logits, values.contiguous(), ids, row, offsets, targets)
        grads = [None if grad is None else grad.contiguous() for grad in upstream]
        if targets is None:
            grads[0] = None
        arguments = (*inputs, *results, *grads, dlogits, len(logits), temperature)
        launch(dlogits_kernel, (ceil_div(len(logits), FLAT),), *arguments, C=values.shape[1], BLOCK=FLAT)
    return dlogits


def _values_or_empty(values: Tensor | None, logits: Tensor) -> Tensor:
    return logits.new_empty((len(logits), 0)) if values is None else values
