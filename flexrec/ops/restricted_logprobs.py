"""Log-probabilities over ragged sets of allowed tokens: one row of hidden states, one set, one target.

With z_e = (hidden[m] . weight[token_e] + bias[token_e]) / temperature for the entries e of row m's set, everything is
a function of z, one number per entry: log p_e = z_e - logsumexp over the row, H = -sum_e p_e log p_e,
E_c = sum_e p_e v_ec. Only z costs D operations per entry. It is a dense matrix product sampled at the sparse pattern of
the sets, and its gradients are two products of a sparse with a dense matrix:

    z = hidden weight^T at the pattern,    d hidden = dZ weight,    d weight = dZ^T hidden        (dZ sparse, (M, V)),

so that neither gathered rows (nnz, D) nor logits (M, V) exist. All else is left to autograd.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexrec.ops.ranked_lists import FLOOR, IMPOSSIBLE, check_temperature
from flexrec.ops.ranking_logprobs import RankingLogprobs
from flexrec.validation import check_choice, check_finite, check_range, check_tensor, values_are_checked

BACKENDS = ("auto", "torch")

with warnings.catch_warnings():  # torch says once per process that sparse CSR tensors are in beta; not to our users
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), size=(1, 1))


class AllowedSets(NamedTuple):
    """Checked arguments of the operations on ragged sets of allowed tokens: M sets, nnz entries in all.

    Attributes:
        hidden: (M, D).
        weight: (V, D).
        bias: (V,) or None.
        ids: (nnz,) int64 token ids.
        offsets: (M + 1,) int64.
        row: (nnz,) int64, the set of every entry.
        temperature: what logits are divided by.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    offsets: Tensor
    row: Tensor
    temperature: float


def restricted_logprobs(
    hidden: Tensor,
    weight: Tensor,
    allowed_ids: Tensor,
    allowed_offsets: Tensor,
    targets: Tensor,
    *,
    values: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> RankingLogprobs:
    """Log-probability of M targets, entropy and expectations, each under a softmax over its own allowed tokens.

    Differentiable in ``hidden``, ``weight`` and ``bias``, through all three results. ``values`` get no gradient.

    Args:
        hidden: (M, D) floating, the state that predicts the target.
        weight: (V, D) floating, the model's output embedding.
        allowed_ids: (nnz,) integer token ids; set m is ``allowed_ids[allowed_offsets[m] : allowed_offsets[m + 1]]``,
            in any order, no token twice.
        allowed_offsets: (M + 1,) integer, from 0 to nnz.
        targets: (M,) integer token ids, each among its row's allowed tokens.
        values: (nnz, C) floating, values of the allowed tokens.
        bias: (V,) floating, added to the logits; -inf makes a token impossible (probability exactly 0, no gradient).
            Where every allowed token is impossible each is equally likely and nothing has a gradient.
        temperature: what the logits are divided by; positive.
        backend: "torch" gathers the rows of every entry (simple; memory and time of (nnz, D)), "auto" works on the
            sparse pattern, without gathering.

    Returns:
        ``RankingLogprobs(logprobs (M,), entropy (M,), expectations (M, C) or None)``, float32 (float64 if ``hidden``
        or ``weight`` is). A row with one allowed token has log-probability and entropy exactly 0 and no gradient.

    Raises:
        TypeError, ValueError: wrong types or shapes, offsets that do not ascend, a token out of range or twice in a
            set, a target that is not among its row's allowed tokens.
    """
    check_choice("backend", backend, BACKENDS)
    sets = check_sets(hidden, weight, allowed_ids, allowed_offsets, bias=bias, temperature=temperature)
    m, nnz = len(hidden), len(sets.ids)
    check_tensor("targets", targets, (m,), "integer")
    chosen = _find_targets(sets, targets.long())

    log_probs = allowed_log_probs(sets, backend)
    probs = log_probs.exp()
    expectations = None
    if values is not None:
        check_tensor("values", values, (nnz, "C"))
        check_finite("values", values)
        expectations = sum_per_row(probs[:, None] * values.detach().to(probs.dtype), sets)
    logprobs = log_probs.index_select(0, chosen)
    return RankingLogprobs(
        logprobs + torch.where(logprobs < IMPOSSIBLE, -math.inf, 0.0),
        -sum_per_row(probs * log_probs, sets),
        expectations,
    )


# --- checks -----------------------------------------------------------------------------------------------------------


def check_sets(
    hidden: Tensor,
    weight: Tensor,
    allowed_ids: Tensor,
    allowed_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> AllowedSets:
    """Check the arguments that the operations on allowed sets share; meanings as of :func:`restricted_logprobs`."""
    check_tensor("hidden", hidden, ("M", "D"))
    m, d = hidden.shape
    check_tensor("weight", weight, ("V", d))
    check_tensor("allowed_ids", allowed_ids, ("nnz",), "integer")
    check_tensor("allowed_offsets", allowed_offsets, (m + 1,), "integer")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],))
        check_range("bias", bias, -math.inf, torch.finfo(bias.dtype).max)
    check_temperature(temperature)
    ids, offsets = allowed_ids.long(), allowed_offsets.long()
    _check_offsets(offsets, len(ids))
    check_range("allowed_ids", ids, 0, weight.shape[0] - 1)
    row = torch.repeat_interleave(torch.arange(m, device=ids.device), offsets.diff(), output_size=len(ids))
    _check_distinct(ids, row, weight.shape[0])
    return AllowedSets(hidden, weight, bias, ids, offsets, row, float(temperature))


def _check_offsets(offsets: Tensor, nnz: int) -> None:
    if not values_are_checked(offsets):
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != nnz:
        raise ValueError(
            f"allowed_offsets must go from 0 to len(allowed_ids) = {nnz}, got {int(offsets[0])} to {int(offsets[-1])}"
        )
    falling = offsets.diff() < 0
    if bool(falling.any()):
        raise ValueError(f"allowed_offsets must not descend, but do after entry {int(falling.nonzero()[0, 0])}")


def _check_distinct(ids: Tensor, row: Tensor, vocab_size: int) -> None:
    """Raise ValueError where a set names a token twice."""
    if not values_are_checked(ids):
        return
    key = row * vocab_size + ids
    if bool((key.diff() > 0).all()):  # every set in ascending order, the usual case: no need to sort
        return
    key = key.sort().values
    repeated = key.diff() == 0
    if bool(repeated.any()):
        at = int(key[int(repeated.nonzero()[0, 0])])
        raise ValueError(
            f"allowed_ids must name a token once per row; row {at // vocab_size} has {at % vocab_size} twice"
        )


def _find_targets(sets: AllowedSets, targets: Tensor) -> Tensor:
    """(M,) int64, the entry of every row's target."""
    is_target = sets.ids == targets[sets.row]  # (nnz,)
    entry = torch.where(is_target, torch.arange(len(sets.ids), device=sets.ids.device), -1)  # (nnz,)
    chosen = torch.full_like(targets, -1).scatter_reduce_(0, sets.row, entry, "amax")
    if values_are_checked(targets) and bool((chosen < 0).any()):
        row = int((chosen < 0).nonzero()[0, 0])
        allowed = sets.ids[int(sets.offsets[row]) : int(sets.offsets[row + 1])].tolist()
        shown = ", ".join(map(str, allowed[:8])) + (", .." if len(allowed) > 8 else "")
        raise ValueError(
            f"targets must be among their row's allowed_ids; row {row} has target {int(targets[row])} "
            f"and {len(allowed)} allowed: [{shown}]"
        )
    return chosen


# --- the restricted softmax -------------------------------------------------------------------------------------------


def allowed_log_probs(sets: AllowedSets, backend: str = "auto") -> Tensor:
    """(nnz,) the log-probability of every allowed token; finite, below ``IMPOSSIBLE`` for impossible ones."""
    dtype = torch.promote_types(torch.promote_types(sets.hidden.dtype, sets.weight.dtype), torch.float32)
    if backend == "torch":
        rows = sets.weight.index_select(0, sets.ids).to(dtype)  # (nnz, D)
        logits = (sets.hidden.index_select(0, sets.row).to(dtype) * rows).sum(-1)  # (nnz,)
    else:
        logits = _sampled_logits(sets.hidden, sets.weight, sets.ids, sets.offsets)  # (nnz,)
    if sets.bias is not None:
        logits = logits + sets.bias.to(dtype).index_select(0, sets.ids)
    logits = (logits / sets.temperature).clamp(min=FLOOR)
    # The maximum only keeps exp in range: the result does not depend on it, and nor does its gradient.
    largest = logits.new_full((len(sets.hidden),), 2 * FLOOR)
    largest = largest.scatter_reduce(0, sets.row, logits.detach(), "amax")  # (M,)
    shifted = logits - largest[sets.row]  # (nnz,)
    return shifted - sum_per_row(shifted.exp(), sets).log().index_select(0, sets.row)


def sum_per_row(entries: Tensor, sets: AllowedSets) -> Tensor:
    """(nnz, ..) summed over each set: (M, ..)."""
    return entries.new_zeros((len(sets.hidden), *entries.shape[1:])).index_add(0, sets.row, entries)


# --- logits at the sparse pattern -------------------------------------------------------------------------------------


@torch.library.custom_op("flexrec::sampled_logits", mutates_args=())
def _sampled_logits(hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """(nnz,) hidden[m] . weight[ids[e]] for every entry e of every row m; float32, or float64 if an operand is."""
    dtype = _accumulation_dtype(hidden, weight)
    if ids.numel() == 0 or hidden.shape[1] == 0:
        return torch.zeros(ids.shape, dtype=dtype, device=hidden.device)
    if weight.dtype != dtype:
        used, ids = ids.unique(return_inverse=True)
        weight = weight.index_select(0, used).to(dtype)
    pattern = _csr(offsets, ids, torch.zeros(ids.shape, dtype=dtype, device=ids.device), len(weight))
    return torch.sparse.sampled_addmm(
        pattern, hidden.to(dtype).contiguous(), weight.contiguous().t(), beta=0.0
    ).values()


@_sampled_logits.register_fake
def _sampled_logits_fake(hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=_accumulation_dtype(hidden, weight))


@torch.library.custom_op("flexrec::sampled_logits_backward", mutates_args=())
def _sampled_logits_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, needs_grad: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden (M, D) and weight (V, D); an empty tensor where ``needs_grad`` leaves one out."""
    dtype = grad.dtype
    hidden_grad, weight_grad = hidden.new_empty(0), weight.new_empty(0)
    if ids.numel() == 0 or hidden.shape[1] == 0:
        return (
            torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs_grad[0] else hidden_grad,
            torch.zeros_like(weight, memory_format=torch.contiguous_format) if needs_grad[1] else weight_grad,
        )
    used = None
    if weight.dtype != dtype:
        used, ids = ids.unique(return_inverse=True)
    num_rows = len(weight) if used is None else len(used)
    if needs_grad[0]:
        rows = weight if used is None else weight.index_select(0, used).to(dtype)
        hidden_grad = (_csr(offsets, ids, grad, num_rows) @ rows).to(hidden.dtype)
    if needs_grad[1]:
        # The transposed pattern: entries sorted by token. Each row of the result is summed in a fixed order.
        order = ids.argsort(stable=True)
        row = torch.repeat_interleave(
            torch.arange(len(hidden), device=ids.device), offsets.diff(), output_size=len(ids)
        )
        token_offsets = offsets.new_zeros(num_rows + 1)
        torch.cumsum(torch.bincount(ids, minlength=num_rows), 0, out=token_offsets[1:])
        weight_grad = _csr(token_offsets, row[order], grad[order], len(hidden)) @ hidden.to(dtype)
        weight_grad = weight_grad.to(weight.dtype)
        if used is not None:
            weight_grad = torch.zeros_like(weight, memory_format=torch.contiguous_format).index_copy_(
                0, used, weight_grad
            )
    return hidden_grad, weight_grad


@_sampled_logits_backward.register_fake
def _sampled_logits_backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, needs_grad: list[bool]
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs_grad[0] else 0),
        weight.new_empty(weight.shape if needs_grad[1] else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_grad = list(ctx.needs_input_grad[:2])
    grads = _sampled_logits_backward(grad.contiguous(), *ctx.saved_tensors, needs_grad)
    hidden, weight = (g if need else None for g, need in zip(grads, needs_grad, strict=True))
    return hidden, weight, None, None


_sampled_logits.register_autograd(_autograd, setup_context=_setup_context)


def _accumulation_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _csr(offsets: Tensor, columns: Tensor, values: Tensor, num_columns: int) -> Tensor:
    """A sparse matrix with one row per pair of offsets; columns need not be sorted within a row."""
    size = (len(offsets) - 1, num_columns)
    return torch.sparse_csr_tensor(offsets, columns, values, size=size, check_invariants=False)
