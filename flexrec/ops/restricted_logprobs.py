"""Log-probabilities over ragged sets of allowed tokens: one row of hidden states, one set, one target.

With z_e = (hidden[m] . weight[token_e] + bias[token_e]) / temperature for the entries e of row m's set, everything is
a function of z, one number per entry: log p_e = z_e - logsumexp over the row, and

    H = -sum_e p_e log p_e,    E_c = sum_e p_e v_ec,    KL = sum_e p_e (log p_e - log q_e)       (q: a reference's p)

With upstream gradients g_lp of the target's log-probability (y is its one-hot vector), g_H, g_c and g_KL,

    dz_e = g_lp (y_e - p_e) - g_H p_e (log p_e + H) + sum_c g_c p_e (v_ec - E_c) + g_KL p_e (log p_e - log q_e - KL).

Only z costs D operations per entry, and so do its gradients, d hidden = dZ weight and d weight = dZ^T hidden with dZ
(M, V) sparse. Triton's kernels and the CPU's are functions of the same names and meanings: ``owners``,
``sampled_logits``, ``set_softmax``, ``set_softmax_backward`` and the gradients. Neither gathered rows (nnz, D) nor
logits (M, V) exist; between the passes nnz logits are kept, and nnz of the reference.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flexrec.checks import check_choice, check_finite, check_tensor
from flexrec.ops import restricted_logprobs_numba
from flexrec.ops.allowed_sets import AllowedSets, check_reference, check_sets
from flexrec.ops.ranked_lists import FLOOR, IMPOSSIBLE, accumulation_dtype
from flexrec.ops.ranking_logprobs import RankingLogprobs, RankingLogprobsWithKL
from flexrec.ops.weight_grads import WEIGHT_GRADS, Final, accumulated_grad, check_accumulates

BACKENDS = ("auto", "torch", "triton")


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
    weight_grad: str = "dense",
    backend: str = "auto",
) -> RankingLogprobs:
    """Log-probability of M targets, entropy and expectations, each under a softmax over its own allowed tokens.

    Differentiable (once; the "torch" backend any number of times) in ``hidden``, ``weight`` and ``bias``, through all
    three results. ``values`` get no gradient.

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
        weight_grad: how ``weight`` gets its gradient. "dense": a tensor (V, D), as usual. "rows": a sparse COO tensor
            of the tokens that have one, each once, as from ``nn.Embedding(sparse=True)``; nothing of (V, D) is made.
            "accumulate": it is added to ``weight.main_grad`` if there is one, else to ``weight.grad`` (made if need
            be), and autograd sees none; ``weight`` must be a leaf. The last two are for eager mode: torch.compile
            and the "torch" backend know "dense" only.
        backend: "triton" (CUDA or ROCm, or the CPU under TRITON_INTERPRET=1; not float64), "torch" (gathers the rows
            of every entry: simple, anywhere, memory and time of (nnz, D)), or "auto": triton on a GPU, parallel loops
            on a CPU, torch where neither can.

    Returns:
        ``RankingLogprobs(logprobs (M,), entropy (M,), expectations (M, C) or None)``, float32 (float64 if ``hidden``
        or ``weight`` is). A row with one allowed token has log-probability and entropy exactly 0 and no gradient; its
        hidden state and weight row are not read. Where values are not checked (see ``flexrec.checks``), a target
        that is not allowed has log-probability NaN.

    Raises:
        TypeError, ValueError: wrong types or shapes, offsets that do not ascend, a token out of range or twice in a
            set, a target that is not among its row's allowed tokens, a backend that cannot do what is asked.
    """
    sets, chosen = check_sets(hidden, weight, allowed_ids, allowed_offsets, targets, bias=bias, temperature=temperature)
    logprobs, entropy, expectations, _ = _run(sets, chosen, values, None, weight_grad, backend)
    return RankingLogprobs(logprobs, entropy, None if values is None else expectations)


def restricted_logprobs_with_kl(
    hidden: Tensor,
    weight: Tensor,
    allowed_ids: Tensor,
    allowed_offsets: Tensor,
    targets: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logits: Tensor | None = None,
    values: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> RankingLogprobsWithKL:
    """:func:`restricted_logprobs` and, in the same pass, the exact KL(policy || reference) over each row's tokens.

    Differentiable in ``hidden``, ``weight`` and ``bias`` through all four results; nothing of the reference gets a
    gradient.

    Args:
        ref_hidden, ref_weight, ref_bias: (M, D'), (V, D') and (V,) of the reference, whose logits are divided by
            ``temperature`` too; or instead
        ref_logits: (nnz,) floating, the reference's logits of the allowed tokens, saved from before: already divided
            by the temperature, up to a constant per row, so that log-probabilities serve as well. -inf is impossible.
        The other arguments are those of :func:`restricted_logprobs`.

    Returns:
        ``RankingLogprobsWithKL(logprobs (M,), entropy (M,), expectations (M, C) or None, kl (M,))``. kl is >= 0 up
        to rounding, exactly 0 where the two agree bit by bit and where one token is allowed, or none; infinite, and
        without a gradient, where the policy allows what the reference's bias makes impossible.
    """
    sets, chosen = check_sets(hidden, weight, allowed_ids, allowed_offsets, targets, bias=bias, temperature=temperature)
    reference = check_reference(sets, ref_hidden, ref_weight, ref_bias, ref_logits)
    logprobs, entropy, expectations, kl = _run(sets, chosen, values, reference, weight_grad, backend)
    return RankingLogprobsWithKL(logprobs, entropy, None if values is None else expectations, kl)


def restricted_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    allowed_ids: Tensor,
    allowed_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> Tensor:
    """KL(policy || reference) of M rows, each over its own allowed tokens; there need be none.

    Args:
        hidden, weight, bias: of the policy; allowed_ids, allowed_offsets, temperature, weight_grad, backend: as of
            :func:`restricted_logprobs`.
        ref_hidden, ref_weight, ref_bias: (M, D'), (V, D') and (V,) of the reference. They get no gradient.

    Returns:
        (M,) float32 (float64 if the policy's inputs are), as of :func:`restricted_logprobs_with_kl`, which gives the
        log-probabilities as well at no further cost.
    """
    sets, _ = check_sets(hidden, weight, allowed_ids, allowed_offsets, bias=bias, temperature=temperature)
    reference = check_reference(sets, ref_hidden, ref_weight, ref_bias, None)
    return _run(sets, None, None, reference, weight_grad, backend)[3]


# --- choice of a backend ----------------------------------------------------------------------------------------------


def _run(
    sets: AllowedSets,
    targets: Tensor | None,
    values: Tensor | None,
    reference: AllowedSets | Tensor | None,
    weight_grad: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs (M,), entropy (M,), expectations (M, C) and KL (M,); zeros for what there is nothing for."""
    check_choice("backend", backend, BACKENDS)
    check_choice("weight_grad", weight_grad, WEIGHT_GRADS)
    hidden, weight, bias, ids, offsets, temperature = sets
    dtype = accumulation_dtype(hidden, weight)
    if values is None:
        values = hidden.new_empty((ids.shape[0], 0))
    else:
        check_tensor("values", values, (ids.shape[0], "C"))
        check_finite("values", values)
        values = values.detach()
    if backend == "auto":
        on_gpu = "torch" if dtype == torch.float64 else "triton"
        backend = {"cpu": "loops", "cuda": on_gpu}.get(hidden.device.type, "torch")
    traced = _is_traced(hidden)
    if weight_grad != "dense" and (backend == "torch" or traced):
        where = "under torch.compile" if traced else "with backend='torch'"
        raise ValueError(f"weight_grad={weight_grad!r} is not possible {where}; use 'dense'")
    if weight_grad == "accumulate":
        check_accumulates(weight)
    if backend == "torch":
        return _reference(sets, targets, values, reference)
    use_triton = backend == "triton"
    if use_triton:
        _require_triton(hidden, dtype)
    call = sampled_logits_op if traced else _sampled_logits
    if isinstance(reference, AllowedSets):
        reference = call(*reference, use_triton)
    if reference is not None:
        reference = reference.to(dtype)
    inputs = hidden, weight, bias, ids, offsets, targets, values, reference, temperature, use_triton
    if traced:
        return restricted_logprobs_op(*inputs)[:4]
    if torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Eager.apply(weight_grad, *inputs)
    return _forward(*inputs)[:4]


def _is_traced(hidden: Tensor) -> bool:
    """Whether the registered op must be called; otherwise its function is, which saves torch.library's overhead."""
    return torch.compiler.is_compiling() or isinstance(hidden, torch._subclasses.FakeTensor)


def _require_triton(hidden: Tensor, dtype: torch.dtype) -> None:
    """Raise where the Triton kernels cannot run: no Triton, float64, or a CPU without the interpreter."""
    try:
        from flexrec.triton_kernels.restricted_logprobs import INTERPRETED
    except ModuleNotFoundError as error:
        raise ValueError("backend='triton' needs the package triton, which is not installed; use 'auto'") from error
    if dtype == torch.float64:
        raise TypeError("backend='triton' computes in float32, got float64 operands; use 'auto' or 'torch'")
    if hidden.device.type == "cpu" and not INTERPRETED:
        raise ValueError("backend='triton' needs a GPU, or TRITON_INTERPRET=1 set before the first import of triton")


# --- reference --------------------------------------------------------------------------------------------------------


def _reference(
    sets: AllowedSets, targets: Tensor | None, values: Tensor, reference: AllowedSets | Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of :func:`_run` by plain operations under autograd."""
    row = restricted_logprobs_numba.owners(sets.offsets, len(sets.ids))  # (nnz,)

    def per_row(entries: Tensor) -> Tensor:
        return entries.new_zeros((len(sets.hidden), *entries.shape[1:])).index_add(0, row, entries)

    def log_softmax(logits: Tensor) -> Tensor:
        # The maximum only keeps exp in range: the result does not depend on it, and nor does its gradient.
        largest = logits.new_full((len(sets.hidden),), 2 * FLOOR)
        largest = largest.scatter_reduce(0, row, logits.detach(), "amax")  # (M,)
        shifted = logits - largest[row]  # (nnz,)
        return shifted - per_row(shifted.exp()).log()[row]

    log_probs = log_softmax(_gathered_logits(sets, row))  # (nnz,)
    probs = log_probs.exp()  # (nnz,)
    logprobs = kl = probs.new_zeros(len(sets.hidden))
    if targets is not None:
        chosen = sets.ids == targets[row]  # (nnz,)
        found = per_row(chosen.to(probs.dtype))  # (M,)
        logprobs = per_row(torch.where(chosen, log_probs, 0.0))
        # Adding -inf or NaN keeps the gradients of the rest.
        logprobs = logprobs + torch.where(logprobs < IMPOSSIBLE, -math.inf, 0.0) + torch.where(found > 0, 0.0, math.nan)
    if reference is not None:
        with torch.no_grad():
            ref_logits = _gathered_logits(reference, row) if isinstance(reference, AllowedSets) else reference
            ref_log_probs = log_softmax(ref_logits.to(probs.dtype))
        unreachable = (ref_log_probs < IMPOSSIBLE) & (probs > 0)  # (nnz,)
        kl = per_row(torch.where(unreachable, 0.0, probs * (log_probs - ref_log_probs)))
        kl = torch.where(per_row(unreachable.to(kl.dtype)) > 0, math.inf, kl)
    return logprobs, -per_row(probs * log_probs), per_row(probs[:, None] * values.to(probs.dtype)), kl


def _gathered_logits(sets: AllowedSets, row: Tensor) -> Tensor:
    """(nnz,) logits, finite: FLOOR where they would be -inf."""
    hidden, weight, bias, ids, _, temperature = sets
    dtype = accumulation_dtype(hidden, weight)
    logits = (hidden.to(dtype)[row] * weight.index_select(0, ids).to(dtype)).sum(-1)
    if bias is not None:
        logits = logits + bias.to(dtype)[ids]
    return (logits / temperature).clamp(min=FLOOR)


# --- forward and backward, in eager mode and as custom ops ------------------------------------------------------------


def _kernels(use_triton: bool) -> ModuleType:
    """The module of the backend's functions: Triton or the CPU's."""
    if not use_triton:
        return restricted_logprobs_numba
    from flexrec.triton_kernels import restricted_logprobs as kernels

    return kernels


def _sampled_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    temperature: float,
    use_triton: bool,
) -> Tensor:
    """(nnz,) logits of every entry, no gradient; takes the fields of :class:`AllowedSets`."""
    kernels = _kernels(use_triton)
    row = kernels.owners(offsets, len(ids))
    return kernels.sampled_logits(hidden.detach(), weight.detach(), bias, ids, offsets, row, temperature)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    targets: Tensor | None,
    values: Tensor,
    ref_logits: Tensor | None,
    temperature: float,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs (M,), entropy (M,), expectations (M, C), KL (M,); for backward norm (M, 4), logits and row (nnz,)."""
    kernels = _kernels(use_triton)
    row = kernels.owners(offsets, len(ids))
    logits = kernels.sampled_logits(hidden, weight, bias, ids, offsets, row, temperature)
    return *kernels.set_softmax(logits, ref_logits, values, ids, offsets, targets), logits, row


def _backward(
    upstream: list[Tensor],
    saved: list[Any],
    temperature: float,
    use_triton: bool,
    needs_grad: list[bool],
    weight_grad: str = "dense",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; None for those that ``needs_grad`` leaves out, or that are accumulated."""
    entropy, expectations, kl, norm, logits, row, hidden, weight, bias, ids, offsets, targets, values, ref_logits = (
        saved
    )
    kernels = _kernels(use_triton)
    dlogits = kernels.set_softmax_backward(
        tuple(upstream),
        (entropy, expectations, kl, norm),
        logits,
        ref_logits,
        values,
        ids,
        offsets,
        row,
        targets,
        temperature,
    )  # (nnz,)
    of_hidden = of_weight = of_bias = None
    if needs_grad[0]:
        of_hidden = kernels.hidden_gradient(dlogits, hidden, weight, ids, offsets, row)
    if needs_grad[1]:
        if weight_grad == "rows":
            tokens, rows = kernels.weight_gradient_rows(dlogits, hidden, weight, ids, row)
            of_weight = torch.sparse_coo_tensor(
                tokens[None], rows, weight.shape, is_coalesced=True, check_invariants=False
            )
        elif weight_grad == "accumulate":
            kernels.weight_gradient(dlogits, hidden, weight, ids, row, accumulated_grad(weight))
        else:
            of_weight = kernels.weight_gradient(dlogits, hidden, weight, ids, row)
    if needs_grad[2] and bias is not None:
        of_bias = dlogits.new_zeros(bias.shape).index_add_(0, ids, dlogits).to(bias.dtype)
    return of_hidden, of_weight, of_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep for the backward pass what :func:`_backward` takes as ``saved``."""
    *tensors, ctx.temperature, ctx.use_triton = inputs
    ctx.save_for_backward(*output[1:], *tensors)


class _Eager(torch.autograd.Function):
    """What the custom op does, without the time that torch.library takes for a call; ``weight_grad`` comes first."""

    @staticmethod
    def forward(ctx: Any, weight_grad: str, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.weight_grad = weight_grad
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output[:4]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs_grad = list(ctx.saved_tensors), list(ctx.needs_input_grad[1:4])
        grads: tuple[Tensor | None, ...]
        with torch.no_grad():
            grads = _backward(list(upstream), saved, ctx.temperature, ctx.use_triton, needs_grad, ctx.weight_grad)
        if torch.is_grad_enabled():  # create_graph=True
            given = [x for x in (*upstream, *saved) if x is not None and x.is_floating_point()]
            grads = tuple(None if grad is None else Final.apply(grad, *given) for grad in grads)
        return None, *grads, *[None] * 7


sampled_logits_op = torch.library.custom_op("flexrec::sampled_logits", _sampled_logits, mutates_args=())
restricted_logprobs_op = torch.library.custom_op("flexrec::restricted_logprobs", _forward, mutates_args=())


@torch.library.custom_op("flexrec::restricted_logprobs_backward", mutates_args=())
def restricted_logprobs_backward_op(
    upstream: list[Tensor],
    saved: list[Tensor | None],
    temperature: float,
    use_triton: bool,
    needs_grad: list[bool],
) -> list[Tensor]:
    """The gradients that ``needs_grad`` asks for, of hidden, weight and bias."""
    grads = _backward(upstream, saved, temperature, use_triton, needs_grad)
    return [grad for grad in grads if grad is not None]


@sampled_logits_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=accumulation_dtype(hidden, weight))


@restricted_logprobs_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    targets: Tensor | None,
    values: Tensor,
    ref_logits: Tensor | None,
    temperature: float,
    use_triton: bool,
) -> tuple[Tensor, ...]:
    m, dtype = hidden.shape[0], accumulation_dtype(hidden, weight)
    shapes = ((m,), (m,), (m, values.shape[1]), (m,), (m, 4), ids.shape)
    row = ids.new_empty(ids.shape, dtype=torch.int32 if use_triton else torch.int64)
    return *(hidden.new_empty(shape, dtype=dtype) for shape in shapes), row


@restricted_logprobs_backward_op.register_fake
def _(upstream: list[Tensor], saved: list[Tensor | None], _: float, __: bool, needs_grad: list[bool]) -> list[Tensor]:
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, need in zip(saved[6:9], needs_grad, strict=True)
        if need and x is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[4:])
    _keep(ctx, inputs, output)


def _gradients(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    saved, needs_grad = list(ctx.saved_tensors), list(ctx.needs_input_grad[:3])
    found = iter(
        restricted_logprobs_backward_op(list(upstream[:4]), saved, ctx.temperature, ctx.use_triton, needs_grad)
    )
    return *(next(found) if need else None for need in needs_grad), *[None] * 7


restricted_logprobs_op.register_autograd(_gradients, setup_context=_setup_context)
