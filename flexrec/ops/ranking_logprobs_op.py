"""The registered operation behind ``ranking_logprobs``, its gradient, and the choice of kernels.

The kernels are in ``ranking_logprobs_numba`` (CPU) and ``flexrec.triton_kernels.ranking_logprobs``. Under
torch.compile and with fake tensors they run inside registered operations. Otherwise they are called directly, through
an autograd function: torch.library costs tens of microseconds for each call, which is more than a small batch takes.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexrec.ops import ranking_logprobs_numba
from flexrec.ops.ranked_lists import accumulation_dtype, is_traced, without_autocast
from flexrec.ops.weight_grads import Final, accumulated_grad, deliver


class Inputs(NamedTuple):
    """What the operation takes, in the order of its schema. Shapes and meanings as of :class:`RankedLists`.

    Attributes:
        values: (N, K, C) or None; in candidate order for Triton, else in rank order.
        ref_hidden, ref_weight, ref_bias: of the reference, or ref_logits (N, T, K) in candidate order, divided by the
            temperature already.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    candidates: Tensor
    position: Tensor
    values: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    ref_logits: Tensor | None
    temperature: float
    ragged: bool
    use_triton: bool

    @property
    def reference(self) -> Any:
        """Hidden, weight and bias of the reference, or its logits, or None."""
        return self.ref_logits if self.ref_hidden is None else (self.ref_hidden, self.ref_weight, self.ref_bias)

    @property
    def needs_grad(self) -> bool:
        differentiable = (self.hidden, self.weight, self.bias)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)


_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor candidates, Tensor position, Tensor? values, "
    "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, Tensor? ref_logits, "
    "float temperature, bool ragged, bool use_triton"
)
_NUM_OPTIONS = 3  # inputs at the end that are no tensors


class Outputs(NamedTuple):
    """What the operation returns; None for what is not asked for, and for what a backend does not keep.

    The registered operations, which cannot return None, return tensors of size 0 in its place.

    Attributes:
        logprobs, entropy, kl: (N, T). expectations: (N, T, C).
        logits, norm, ref_logits, ref_norm: kept for the backward pass, in the order and layout of their backend.
    """

    logprobs: Tensor
    entropy: Tensor
    expectations: Tensor
    kl: Tensor | None
    logits: Tensor | None
    norm: Tensor
    ref_logits: Tensor | None
    ref_norm: Tensor | None


NUM_RESULTS = 4  # of the outputs; the others are for the backward pass


def evaluate(inputs: Inputs, weight_grad: str) -> tuple[Any, ...]:
    """Log-probs, entropy, expectations and KL: the first four of :class:`Outputs`."""
    if is_traced(inputs.hidden, inputs.weight, inputs.candidates):
        if weight_grad != "dense":
            raise ValueError(f"weight_grad={weight_grad!r} is for eager mode; under torch.compile use 'dense'")
        return _ranking_logprobs(*inputs)[:NUM_RESULTS]
    if inputs.needs_grad:
        return _Eager.apply(inputs, weight_grad, *inputs[:3])
    return _forward(inputs, with_grad=False)[:NUM_RESULTS]


# --- forward and backward ---------------------------------------------------------------------------------------------


@functools.cache
def _triton_kernels() -> ModuleType:
    from flexrec.triton_kernels import ranking_logprobs

    return ranking_logprobs


def _forward(x: Inputs, *, with_grad: bool = True) -> Outputs:
    operands = (x.hidden, x.weight, x.bias, x.candidates, x.position)
    found: Any
    with without_autocast(x.hidden):
        if not x.use_triton:
            found = ranking_logprobs_numba.ranking_logprobs_forward(*operands, x.values, x.temperature, x.reference)
        else:
            kernels = _triton_kernels()
            found = kernels.ranking_logprobs_forward(
                *operands,
                _values_or_empty(x),
                x.temperature,
                reference=x.reference,
                save_logits=with_grad and kernels.keeps_logits(x.candidates.shape[1], x.hidden.shape[2]),
            )
        return Outputs(*found)


def _backward(
    upstream: list[Any], saved: list[Any], x: Inputs, needs_grad: list[bool], weight_grad: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; None for what ``needs_grad`` leaves out, or what has been accumulated.

    Args:
        upstream: of the four results. saved: the outputs from entropy on. What is not there is None, or has size 0.
    """
    with without_autocast(x.hidden):
        if x.use_triton:
            return _triton_backward(upstream, saved, x, needs_grad, weight_grad)
        hidden_grad, rows, bias_rows = ranking_logprobs_numba.ranking_logprobs_backward(
            upstream,
            saved,
            x.hidden,
            x.weight,
            x.candidates,
            x.position,
            x.values,
            x.temperature,
            needs_grad,
        )
        return hidden_grad, *_by_token(rows, bias_rows, x, weight_grad)


def _triton_backward(
    upstream: list[Any], saved: list[Any], x: Inputs, needs_grad: list[bool], weight_grad: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    kernels = _triton_kernels()
    repeatable = weight_grad == "rows" or torch.are_deterministic_algorithms_enabled()
    mode, bias_grad = "rows" if repeatable else weight_grad, None
    into: tuple[Tensor | None, Tensor | None] = (None, None)
    if mode == "accumulate" and needs_grad[1]:
        if needs_grad[2] and x.bias is not None:  # as rows of weight, so numbers of bias; but its gradient is returned
            bias_grad = torch.zeros_like(x.bias, dtype=torch.float32)
        into = (accumulated_grad(x.weight), bias_grad)
    elif mode == "accumulate":
        mode = "dense"
    hidden_grad, of_weight, of_bias = kernels.ranking_logprobs_backward(
        tuple(upstream),
        kernels.Saved(*saved),
        x.hidden,
        x.weight,
        x.bias,
        x.candidates,
        x.position,
        _values_or_empty(x),
        x.temperature,
        needs_grad,
        weight_mode=mode,
        into=into,
        reference=x.reference,
        ragged=x.ragged,
    )
    if repeatable:
        k = x.candidates.shape[1]
        rows = None if of_weight is None else of_weight.view(-1, k, of_weight.shape[1])
        return hidden_grad, *_by_token(rows, of_bias, x, weight_grad)
    if bias_grad is not None and x.bias is not None:
        of_bias = bias_grad.to(x.bias.dtype)
    return hidden_grad, of_weight, of_bias


def _values_or_empty(x: Inputs) -> Tensor:
    return x.hidden.new_empty((*x.position.shape, 0)) if x.values is None else x.values


def _by_token(
    rows: Tensor | None, bias_rows: Tensor | None, x: Inputs, weight_grad: str
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias from those of every candidate of every list, (P, K, D) and (P, K)."""
    tokens = x.candidates.flatten()
    of_weight = of_bias = None
    if rows is not None:
        of_weight = deliver(weight_grad, x.weight, tokens, rows.flatten(0, 1))
    if bias_rows is not None and x.bias is not None:
        of_bias = bias_rows.new_zeros(x.bias.shape).index_add_(0, tokens, bias_rows.flatten()).to(x.bias.dtype)
    return of_weight, of_bias


# --- in eager mode ----------------------------------------------------------------------------------------------------


def _keep(ctx: Any, arguments: tuple[Any, ...], outputs: Outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*outputs[1:], *arguments[:-_NUM_OPTIONS])
    ctx.options = arguments[-_NUM_OPTIONS:]


def _kept(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[list[Any], list[Any], Inputs]:
    """upstream, saved and inputs of :func:`_backward`."""
    count = len(Outputs._fields) - 1
    tensors = ctx.saved_tensors
    saved, inputs = list(tensors[:count]), Inputs(*tensors[count:], *ctx.options)
    entropy, expectations, kl = saved[:3]
    upstream = [
        None if result is None else torch.zeros_like(result) if grad is None else grad.contiguous()
        for result, grad in zip((entropy, entropy, expectations, kl), grads[:NUM_RESULTS], strict=True)
    ]
    return upstream, saved, inputs


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Inputs, weight_grad: str, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """The differentiable ones among the inputs come once more, for autograd to see."""
        outputs = _forward(inputs)
        _keep(ctx, inputs, outputs)
        ctx.weight_grad = weight_grad
        return outputs[:NUM_RESULTS]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, saved, inputs = _kept(ctx, grads)
        found: tuple[Tensor | None, ...]
        with torch.no_grad():
            found = _backward(upstream, saved, inputs, list(ctx.needs_input_grad[2:]), ctx.weight_grad)
        if torch.is_grad_enabled():  # create_graph=True
            given = [x for x in upstream if x is not None]
            found = tuple(None if grad is None else Final.apply(grad, *inputs[:3], *given) for grad in found)
        return None, None, *found


# --- registered with torch.library ------------------------------------------------------------------------------------


@torch.library.custom_op(
    "flexrec::ranking_logprobs",
    mutates_args=(),
    schema=f"({_SCHEMA}) -> ({', '.join(['Tensor'] * len(Outputs._fields))})",
)
def _ranking_logprobs(*arguments: Any) -> tuple[Tensor, ...]:
    outputs = _forward(Inputs(*arguments))
    return tuple(outputs.logprobs.new_empty(0) if tensor is None else tensor for tensor in outputs)


@torch.library.custom_op(
    "flexrec::ranking_logprobs_backward",
    mutates_args=(),
    schema=f"(Tensor[] upstream, Tensor[] saved, {_SCHEMA}, bool[] needs_grad) -> (Tensor, Tensor, Tensor)",
)
def _ranking_logprobs_backward(upstream: list[Tensor], saved: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of hidden, weight and bias; of size 0 those that ``needs_grad`` leaves out."""
    *inputs, needs_grad = arguments
    grads = _backward(upstream, saved, Inputs(*inputs), needs_grad, "dense")
    return tuple(saved[0].new_empty(0) if grad is None else grad for grad in grads)


@_ranking_logprobs.register_fake
def _(*arguments: Any) -> Outputs:
    x = Inputs(*arguments)
    n, t, _ = x.hidden.shape
    k, channels = x.candidates.shape[1], 0 if x.values is None else x.values.shape[2]
    dtype = accumulation_dtype(x.hidden, x.weight)

    def new(*shape: int) -> Tensor:
        return x.hidden.new_empty(shape, dtype=dtype)

    shown, kept, ref_kept = k, True, x.reference is not None
    if x.use_triton:
        kernels = _triton_kernels()
        shown, kept = kernels.padded(k), kernels.keeps_logits(k, x.hidden.shape[2])
        ref_kept = kept and x.ref_hidden is not None
    return Outputs(
        new(n, t),
        new(n, t),
        new(n, t, channels),
        new(0) if x.reference is None else new(n, t),
        new(n, t, shown) if kept else new(0),
        new(n, t, 2),
        new(n, t, shown) if ref_kept else new(0),
        new(0) if x.reference is None else new(n, t, 2),
    )


@_ranking_logprobs_backward.register_fake
def _(upstream: list[Tensor], saved: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, needs_grad = arguments
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else saved[0].new_empty(0)
        for need, x in zip(needs_grad, inputs, strict=False)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    outputs = Outputs(*output)
    ctx.mark_non_differentiable(*outputs[NUM_RESULTS:])
    _keep(ctx, inputs, outputs)


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream, saved, inputs = _kept(ctx, grads)
    upstream, saved = ([saved[0].new_empty(0) if x is None else x for x in tensors] for tensors in (upstream, saved))
    needs_grad = list(ctx.needs_input_grad[:3])
    found = _ranking_logprobs_backward(upstream, saved, *inputs, needs_grad)
    wanted = (grad if need else None for grad, need in zip(found, needs_grad, strict=True))
    return *wanted, *(None,) * (len(Inputs._fields) - 3)


_ranking_logprobs.register_autograd(_autograd, setup_context=_setup_context)
