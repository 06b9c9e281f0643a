"""Checks of the arguments that the operations on ragged sets of allowed tokens share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flexrec.checks import check_range, check_tensor, values_are_checked
from flexrec.ops import restricted_logprobs_numba as kernels
from flexrec.ops.ranked_lists import FLOOR, accumulation_dtype, check_temperature


class AllowedSets(NamedTuple):
    """Checked arguments: M sets, nnz entries in all.

    Attributes:
        hidden: (M, D).
        weight: (V, D).
        bias: (V,) or None.
        ids: (nnz,) int64 token ids, contiguous.
        offsets: (M + 1,) int64, contiguous.
        temperature: what logits are divided by.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    offsets: Tensor
    temperature: float


def check_sets(
    hidden: Tensor,
    weight: Tensor,
    allowed_ids: Tensor,
    allowed_offsets: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[AllowedSets, Tensor | None]:
    """The sets and the targets (M,) int64, checked; meanings as of ``restricted_logprobs``."""
    check_tensor("hidden", hidden, ("M", "D"))
    m, d = hidden.shape
    check_tensor("weight", weight, ("V", d))
    check_tensor("allowed_ids", allowed_ids, ("nnz",), "integer")
    check_tensor("allowed_offsets", allowed_offsets, (m + 1,), "integer")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],))
        check_range("bias", bias, -math.inf, torch.finfo(bias.dtype).max)
    check_temperature(temperature)
    ids, offsets = allowed_ids.long().contiguous(), allowed_offsets.long().contiguous()
    if targets is not None:
        check_tensor("targets", targets, (m,), "integer")
        targets = targets.long().contiguous()
    if values_are_checked(ids):
        _check_entries(ids, offsets, targets, weight.shape[0])
    return AllowedSets(hidden, weight, bias, ids, offsets, float(temperature)), targets


def check_reference(
    sets: AllowedSets,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
) -> AllowedSets | Tensor:
    """The reference's side of the same sets, or its logits (nnz,) with -inf replaced by FLOOR."""
    if logits is not None:
        if hidden is not None or weight is not None or bias is not None:
            raise ValueError("ref_logits take the place of ref_hidden, ref_weight and ref_bias; got both")
        check_tensor("ref_logits", logits, (sets.ids.shape[0],))
        check_range("ref_logits", logits, -math.inf, torch.finfo(logits.dtype).max)
        return logits.detach().to(accumulation_dtype(sets.hidden, sets.weight)).clamp(min=FLOOR)
    if hidden is None or weight is None:
        raise ValueError("a reference is needed: ref_hidden and ref_weight, or ref_logits")
    check_tensor("ref_hidden", hidden, (sets.hidden.shape[0], "D'"))
    check_tensor("ref_weight", weight, (sets.weight.shape[0], hidden.shape[1]))
    if bias is not None:
        check_tensor("ref_bias", bias, (weight.shape[0],))
        check_range("ref_bias", bias, -math.inf, torch.finfo(bias.dtype).max)
        bias = bias.detach()
    return sets._replace(hidden=hidden.detach(), weight=weight.detach(), bias=bias)


def _check_entries(ids: Tensor, offsets: Tensor, targets: Tensor | None, vocab_size: int) -> None:
    """Raise ValueError at the first fault of the sets' tokens, on the CPU wherever they are."""
    on_cpu = [torch.empty(0, dtype=torch.int64) if x is None else x.cpu() for x in (ids, offsets, targets)]
    fault, a, b = kernels.check_entries(*(x.numpy() for x in on_cpu), vocab_size)
    if fault == kernels.ENDS:
        raise ValueError(f"allowed_offsets must go from 0 to len(allowed_ids) = {len(ids)}, got {a} to {b}")
    if fault == kernels.DESCENDING:
        raise ValueError(f"allowed_offsets must not descend, but do after entry {a}")
    if fault == kernels.OUTSIDE:
        raise ValueError(f"allowed_ids must lie in [0, {vocab_size - 1}], got {b} at index [{a}]")
    if fault == kernels.REPEATED:
        raise ValueError(f"allowed_ids must name a token once per row; row {a} has {b} twice")
    if fault == kernels.MISSING:
        allowed = ids[int(offsets[a]) : int(offsets[a + 1])].tolist()
        shown = ", ".join(map(str, allowed[:8])) + (", .." if len(allowed) > 8 else "")
        raise ValueError(
            f"targets must be among their row's allowed_ids; row {a} has target {b} and {len(allowed)} allowed: "
            f"[{shown}]"
        )
