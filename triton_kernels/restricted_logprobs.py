"""Softmax over ragged sets of allowed tokens: log-probs, entropy, expectations and KL, forward and backward.

Row m has the entries offsets[m] .. offsets[m + 1] of a flat list of nnz token ids. In three steps,

    z_e = (h_m . w_e + b_e) / temperature                                                         sampled_logits
    log-prob, entropy, expectations and KL of each row, and dz, as derived in softmax.py          set_softmax
    dh_m = sum over row m of dz_e w_e / temperature,   dw_v = sum over v's entries of dz_e h_e / temperature

and db_v is the sum of the dz_e of v, likewise.

Why there is no tl.dot. Every row has its own set, so a weight row meets one hidden state per row that allows it: two
operations per weight read, whereas an H200 could do 180 a byte. All is bound by the bytes of gathered weight rows;
rows of one prompt allow much the same tokens and are neighbours, so most of them come from the L2 cache. Products are
accumulated in float32 by element and summed at the end.

Why entries and not rows are what programs share out. Sets hold 1 token or the vocabulary, and the host does not know
which without waiting. The gathering kernels therefore take equal tiles of the flat list, or pieces of at most PIECE
entries, however the rows lie in it. The softmax reads only 4 to 12 bytes an entry: there a program takes ROWS rows
side by side, and after that one by one those of very many entries.

Rows with one allowed token cost no weight row, no hidden state and no sum: what they could read is masked off.

Bytes, with e bytes an element of hidden and weight and M rows, n of the nnz entries in rows with a choice; the sums
of the gradients, and `owners`, the row of every entry, are those of segment_sum.py:
    logits       n D e (weight rows) + M D e (hidden states; from L1 after a row's first entry) + 20 nnz (ids, rows
                 and offsets) + 4 nnz (out). Those of a reference, where it is a model and not saved: the same again
    softmax      4 nnz + 8 nnz (ids) + 4 C nnz (values) + 32 M;  + 4 nnz with a reference
    dlogits      4 nnz + 12 nnz (ids, rows) + 4 C nnz + 4 nnz (out);  + 4 nnz with a reference
    d hidden     n D e (weight rows) + 2 M D e (zeros and sums)
    d weight     n D e (hidden states) + either 8 n D, or the sort and one row for each token: see _scatters
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from flexrec.triton_kernels.launch import INTERPRETED, ceil_div, kernel, launch
from flexrec.triton_kernels.restricted_softmax import set_softmax, set_softmax_backward
from flexrec.triton_kernels.segment_sum import owners, scatter_add, segment_sum, sorted_tokens, sum_by_place, tile
from flexrec.triton_kernels.softmax import FLOOR

__all__ = [  # what the op calls, of this file and its parts
    "INTERPRETED",
    "hidden_gradient",
    "restricted_logprobs_forward",
    "set_softmax_backward",
    "weight_gradient",
    "weight_gradient_rows",
]


@kernel
def sampled_logits_kernel(
    hidden_ptr,  # (M, D)
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,) or None
    ids_ptr,  # (nnz,) int64
    row_ptr,  # (nnz,) int32
    offsets_ptr,  # (M + 1,) int64
    logits_ptr,  # (nnz,) float32
    entries,  # nnz
    V,
    D,
    temperature,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_TILES: tl.constexpr,
):
    """One program: the logits of BLOCK_E entries; 0 where a row has a single one, of which nothing is read."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)  # (BLOCK_E,)
    ok = entry < entries
    row = tl.load(row_ptr + entry, mask=ok, other=0).to(tl.int64)
    begin = tl.load(offsets_ptr + row, mask=ok, other=0)
    end = tl.load(offsets_ptr + row + 1, mask=ok, other=0)
    live = end - begin > 1
    token = tl.load(ids_ptr + entry, mask=live, other=-1)
    known = (token >= 0) & (token < V)
    products = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for d_tile in range(D_TILES):
        d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
        tile_ok = known[:, None] & (d < D)[None, :]
        hidden = tl.load(hidden_ptr + row[:, None] * D + d[None, :], mask=tile_ok, other=0.0)
        weight = tl.load(weight_ptr + token[:, None] * D + d[None, :], mask=tile_ok, other=0.0)
        products += hidden.to(tl.float32) * weight.to(tl.float32)
    logits = tl.sum(products, axis=1)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + token, mask=known, other=0.0).to(tl.float32)
    logits = tl.where(live & (known == 0), float("nan"), logits / temperature)  # a token out of range shows
    tl.store(logits_ptr + entry, tl.where(logits < FLOOR, FLOOR, logits), mask=ok)  # a NaN stays


def sampled_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, offsets: Tensor, row: Tensor, temperature: float
) -> Tensor:
    """(nnz,) float32 logits of every entry; 0 in rows of a single one.

    Args:
        hidden: (M, D), weight: (V, D), bias: (V,) or None; float32, bfloat16 or float16, not necessarily the same.
        ids: (nnz,) int64, offsets: (M + 1,) int64, row: (nnz,) int32, the row of every entry.
    """
    nnz, d = len(ids), hidden.shape[1]
    logits = torch.empty(nnz, dtype=torch.float32, device=hidden.device)
    if nnz:
        block_e, block_d = tile(d)
        operands = (hidden.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())
        arguments = (*operands, ids, row, offsets, logits, nnz, len(weight), d, temperature)
        blocks = {"BLOCK_E": block_e, "BLOCK_D": block_d, "D_TILES": ceil_div(d, block_d)}
        launch(sampled_logits_kernel, (ceil_div(nnz, block_e),), *arguments, **blocks)
    return logits


def restricted_logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    targets: Tensor | None,
    values: Tensor | None,
    reference: tuple[Tensor, Tensor, Tensor | None] | Tensor | None,
    temperature: float,
) -> tuple[Tensor | None, ...]:
    """As of ``flexrec/numba_kernels/restricted_logprobs.py``; all float32, norm (M, 4), the row of an entry int32."""
    row = owners(offsets, len(ids))
    logits = sampled_logits(hidden, weight, bias, ids, offsets, row, temperature)
    made = None
    if isinstance(reference, tuple):
        made = sampled_logits(*reference, ids, offsets, row, temperature)
    ref_logits = reference if isinstance(reference, Tensor) else made
    *results, kl, norm = set_softmax(logits, ref_logits, values, ids, offsets, targets)
    return *results, None if reference is None else kl, norm, logits, row, made


def hidden_gradient(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, row: Tensor
) -> Tensor:
    """(M, D) in the dtype of ``hidden``; exactly 0 in rows without a choice."""
    grad = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    segment_sum(dlogits, ids, weight.contiguous(), row, offsets, grad, min_entries=2)
    return grad


def weight_gradient(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, row: Tensor, into: Tensor | None = None
) -> Tensor:
    """(V, D): the gradient in the dtype of ``weight``, or ``into``, a contiguous (V, D) floating tensor, added to.

    Bitwise repeatable under ``torch.use_deterministic_algorithms`` and where :func:`_scatters` prefers it anyway.
    """
    out = torch.zeros_like(weight, memory_format=torch.contiguous_format) if into is None else into
    if _scatters(len(ids), hidden, out, fresh=into is None):
        total = out if out.dtype == torch.float32 else torch.zeros_like(out, dtype=torch.float32)
        scatter_add(dlogits, row, hidden.contiguous(), ids, total)
        return total if total is out else total.to(out.dtype)
    sum_by_place(dlogits, row, hidden.contiguous(), ids, out, accumulate=into is not None)
    return out


def weight_gradient_rows(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, row: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens (U,) int64, each once and ascending, and their gradients (U, D) in the dtype of ``weight``.

    Waits for the GPU once, to know U. Bitwise repeatable.
    """
    tokens, order = sorted_tokens(ids)
    tokens, segment, counts = torch.unique_consecutive(tokens, return_inverse=True, return_counts=True)
    rows = weight.new_zeros((len(tokens), hidden.shape[1]))
    offsets = counts.new_zeros(len(tokens) + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    segment_sum(dlogits[order], row[order], hidden.contiguous(), segment, offsets, rows)
    return tokens.long(), rows


def _scatters(nnz: int, hidden: Tensor, out: Tensor, *, fresh: bool) -> bool:
    """Whether atomic additions move fewer bytes than sorting the entries by token and adding each token up at once.

    Additions read and write float32 in the L2 cache and need a buffer of it, zeroed, and cast where the gradient is
    of another dtype. Sorted sums gather hidden states, and write each token once in its own dtype. Four passes of the
    sort move some 100 bytes an entry; its launches take the time of another 1e8 bytes (25 us at 4 TB/s).
    These are byte counts and not yet timings.
    """
    if torch.are_deterministic_algorithms_enabled():
        return False
    d, dense = hidden.shape[1], out.numel() * fresh
    if out.dtype != torch.float32 and not fresh:
        return False
    cast = 0 if out.dtype == torch.float32 else 4 + out.element_size()
    scattered = 8 * nnz * d + (4 + cast) * dense
    summed = hidden.element_size() * nnz * d + out.element_size() * dense + 100 * nnz + 100_000_000
    return scattered <= summed
