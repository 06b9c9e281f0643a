"""How an operation lives in torch: which backend computes it, when it goes through torch.library, how it has gradients.

An operation is registered with torch.library so that torch.compile and fake tensors can do without its insides. In
eager mode it is called directly, gradients through an autograd function: torch.library costs tens of microseconds for
each call, which is more than a small batch takes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.nn import Parameter

from flexrec.checks import check_choice, is_transformed, values_are_checked
from flexrec.metrics import Metric
from flexrec.numba_kernels import FLOOR

BACKENDS = ("auto", "triton", "numba", "torch")


# --- choice of a backend ----------------------------------------------------------------------------------------------


@functools.cache
def kernels(backend: str, name: str) -> ModuleType:
    """A module of ``flexrec.numba_kernels`` or ``flexrec.triton_kernels``, loaded when it is first asked for."""
    return importlib.import_module(f"flexrec.{backend}_kernels.{name}")


_threads_stayed_behind = False  # in the process that this one was forked from


def _after_a_fork() -> None:
    """In the new process: no OpenMP threads where they had been started before.

    GNU's OpenMP waits for them forever. numba ends the process instead, and a ``multiprocessing.Pool`` starts another
    one, without end.
    """
    global _threads_stayed_behind
    numba = sys.modules.get("numba")
    try:
        started = numba is not None and numba.threading_layer() == "omp"
    except (ValueError, AttributeError):  # not started, or not even imported to its end
        return
    if started:
        _threads_stayed_behind = True
        torch.set_num_threads(1)  # which share the runtime


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_a_fork)


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed, which has no wheel for some platforms."""
    return importlib.util.find_spec("triton") is not None


def triton_interprets() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def choose_backend(backend: str, name: str, tensor: Tensor, obstacle: Exception | None = None) -> str:
    """The backend that will run: "triton", "numba" or "torch".

    Args:
        backend: what the caller asks for, one of BACKENDS.
        name, tensor: the argument whose device decides.
        obstacle: what Triton's kernels cannot do about these arguments; raised if they are asked for.

    Raises:
        ValueError, TypeError: an unknown backend, or one that cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    device = tensor.device
    if backend == "auto":
        if device.type == "cpu":
            return "torch" if _threads_stayed_behind else "numba"
        return "triton" if device.type == "cuda" and obstacle is None and has_triton() else "torch"
    if backend == "numba" and device.type != "cpu":
        raise ValueError(f"backend='numba' needs {name} on the CPU, got {device}; use 'auto', 'triton' or 'torch'")
    if backend == "numba" and _threads_stayed_behind:
        raise ValueError(
            "backend='numba' cannot run in a process that was forked after its kernels had run in parallel: OpenMP's "
            "threads stay behind in a fork; use 'auto', which is 'torch' here, or start processes by 'spawn'"
        )
    if backend == "triton":
        if not has_triton():
            raise ValueError("backend='triton' needs the package triton, which is not installed; use 'auto'")
        if obstacle is not None:
            raise obstacle
        if device.type != "cuda" and not triton_interprets():
            raise ValueError(
                "backend='triton' needs a GPU, or TRITON_INTERPRET=1 set before the first import of triton; "
                f"got {name} on {device}"
            )
    return backend


def numba_reads(tensor: Tensor) -> bool:
    """Whether numba's kernels may read a tensor where no backend is asked for: on a CPU, with values of its own.

    Within a function that torch.func transforms, what is made of a constant has none either.
    """
    if _threads_stayed_behind or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return tensor.is_cpu and values_are_checked(tensor) and not is_traced(tensor)


def choose_kernels(backend: str, hidden: Tensor, weight: Tensor) -> str:
    """The backend that will run, see :func:`choose_backend`, for log-probs."""
    obstacle = None
    if accumulation_dtype(hidden, weight) == torch.float64:
        obstacle = TypeError("backend='triton' computes in float32, got float64 operands; use 'auto' or 'torch'")
    return choose_backend(backend, "hidden", hidden, obstacle)


# --- operations -------------------------------------------------------------------------------------------------------


_PLAIN = {Tensor, Parameter, Metric, str, int, float, bool, type(None)}


def is_traced(*arguments: object) -> bool:
    """Whether registered operations must be called: under torch.compile, or for tensors of a class of their own."""
    if torch.compiler.is_compiling():
        return True
    kinds = set(map(type, arguments))
    return not kinds <= _PLAIN and any(issubclass(kind, Tensor) for kind in kinds - _PLAIN)


def _refuse_transforms(arguments: Sequence[object]) -> None:
    if torch._C._functorch.peek_interpreter_stack() is None:  # the usual case: nothing is being transformed
        return
    if any(isinstance(x, Tensor) and is_transformed(x) for x in arguments):
        raise TypeError(
            "the kernels cannot be transformed by torch.func (vmap, grad, jvp): use backend='torch', or "
            "torch.autograd.grad for gradients"
        )


class Operation:
    """A function of tensors without gradient: called as it is, or by its registered name where it is traced.

    Args:
        name: in torch.library's namespace ``flexrec``.
        run: the function, whose annotations are the schema; a ``Metric`` among the arguments may come as its name.
        fake: the same for tensors that have a shape and no values.
    """

    def __init__(self, name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.run = run
        self.registered = torch.library.custom_op(f"flexrec::{name}", run, mutates_args=())
        self.registered.register_fake(fake)

    def __call__(self, *arguments: Any) -> Any:
        if is_traced(*arguments):
            return self.registered(*(str(x) if isinstance(x, Metric) else x for x in arguments))
        _refuse_transforms(arguments)
        return self.run(*arguments)


RESULTS = 4  # log-probs, entropy, expectations and KL: what the operations below return and have gradients of
OUTPUTS = 8  # of their forward passes: the results, and what a backward pass needs besides
_IN_SCHEMAS = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", str: "str"}


class LogprobsOperation:
    """An operation of hidden states, weight and bias with the results of a softmax, and gradients in all three.

    The registered operations, which cannot return None, return tensors of size 0 in its place.

    Args:
        name: in torch.library's namespace ``flexrec``.
        inputs: the named tuple that the functions take, of whose annotations the schema is made; its first fields are
            hidden, weight and bias (or None).
        forward: (inputs, whether a backward pass may follow) to the results and then what that pass needs besides; None
            for what is not there.
        backward: (upstream, saved, inputs, needs_grad, weight_grad) to the gradients of hidden, weight and bias; None
            for those that ``needs_grad`` leaves out, or that are accumulated. ``upstream`` belongs to the results,
            ``saved`` are the outputs but for the first; what is not there is None or has size 0.
        fake: (inputs) to tensors of the shapes that ``forward`` returns.
    """

    def __init__(
        self,
        name: str,
        inputs: Callable[..., Any],
        *,
        forward: Callable[[Any, bool], Sequence[Tensor | None]],
        backward: Callable[..., Sequence[Tensor | None]],
        fake: Callable[[Any], Sequence[Tensor]],
    ) -> None:
        self.inputs, self.forward, self.backward = inputs, forward, backward

        def run(*arguments: Any) -> tuple[Tensor, ...]:
            return _present(forward(inputs(*arguments), True), arguments[0])

        def run_backward(upstream: list[Tensor], saved: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
            *given, needs_grad = arguments
            return _present(backward(upstream, saved, inputs(*given), needs_grad, "dense"), arguments[0])

        def fake_backward(upstream: list[Tensor], saved: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
            layout, needs_grad = torch.contiguous_format, arguments[-1]
            wanted = [x if need else None for x, need in zip(arguments[:3], needs_grad, strict=True)]
            grads = [None if x is None else torch.empty_like(x, memory_format=layout) for x in wanted]
            return _present(grads, arguments[0])

        schema = ", ".join(f"{_IN_SCHEMAS[kind]} {field}" for field, kind in get_type_hints(inputs).items())
        outputs = ", ".join(["Tensor"] * OUTPUTS)
        self.registered = torch.library.custom_op(
            f"flexrec::{name}", run, mutates_args=(), schema=f"({schema}) -> ({outputs})"
        )
        self.registered_backward = torch.library.custom_op(
            f"flexrec::{name}_backward",
            run_backward,
            mutates_args=(),
            schema=f"(Tensor[] upstream, Tensor[] saved, {schema}, bool[] needs_grad) -> (Tensor, Tensor, Tensor)",
        )
        self.registered.register_fake(lambda *arguments: tuple(fake(inputs(*arguments))))
        self.registered_backward.register_fake(fake_backward)
        self.registered.register_autograd(self._gradients, setup_context=self._setup_context)

    def __call__(self, inputs: Any, weight_grad: str) -> Sequence[Any]:
        """The results; ``weight_grad`` as of ``flexrec.ops.weight_grad``."""
        if is_traced(*inputs):  # where weight_grad is "dense"
            return self.registered(*inputs)[:RESULTS]
        _refuse_transforms(inputs)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:3]):
            return _Eager.apply(self, inputs, weight_grad, *inputs[:3])
        return self.forward(inputs, False)[:RESULTS]

    @staticmethod
    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[RESULTS:])
        _keep(ctx, inputs, output)

    def _gradients(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, saved, inputs = _kept(ctx, grads)
        needs_grad = list(ctx.needs_input_grad[:3])
        lists = (list(_present(tensors, inputs[0])) for tensors in (upstream, saved))
        found = self.registered_backward(*lists, *inputs, needs_grad)
        wanted = (grad if need else None for grad, need in zip(found, needs_grad, strict=True))
        return *wanted, *[None] * (len(inputs) - 3)


class _Eager(torch.autograd.Function):
    """The differentiable ones among the inputs come once more, for autograd to see."""

    @staticmethod
    def forward(
        ctx: Any, operation: LogprobsOperation, inputs: Any, weight_grad: str, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        outputs = tuple(operation.forward(inputs, True))
        _keep(ctx, inputs, outputs)
        ctx.operation, ctx.weight_grad = operation, weight_grad
        return outputs[:RESULTS]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, saved, given = _kept(ctx, grads)
        inputs, needs_grad = ctx.operation.inputs(*given), list(ctx.needs_input_grad[3:])
        with torch.no_grad():
            found = ctx.operation.backward(upstream, saved, inputs, needs_grad, ctx.weight_grad)
        if torch.is_grad_enabled():  # create_graph=True
            depends_on = [x for x in (*inputs[:3], *upstream) if x is not None]
            found = [None if grad is None else _Final.apply(grad, *depends_on) for grad in found]
        return None, None, None, *found


class _Final(torch.autograd.Function):
    """A gradient that depends on other tensors by a formula that is not there: an error, not a constant."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *_: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise RuntimeError("the kernels of restricted log-probs have no second derivatives; use backend='torch'")


def _keep(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor | None]) -> None:
    ctx.set_materialize_grads(False)
    ctx.num_saved = len(outputs) - 1
    ctx.save_for_backward(*outputs[1:], *(x if isinstance(x, Tensor) else None for x in inputs))
    ctx.options = [None if isinstance(x, Tensor) else x for x in inputs]


def _kept(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[list[Any], list[Any], list[Any]]:
    """upstream, saved and the fields of the inputs."""
    saved, tensors = ctx.saved_tensors[: ctx.num_saved], ctx.saved_tensors[ctx.num_saved :]
    results = saved[0], *saved[: RESULTS - 1]  # log-probs have the shape of the entropy
    upstream = [
        None if result is None else torch.zeros_like(result) if grad is None else grad.contiguous()
        for result, grad in zip(results, grads[:RESULTS], strict=True)
    ]
    inputs = [option if x is None else x for x, option in zip(tensors, ctx.options, strict=True)]
    return upstream, list(saved), inputs


def _present(tensors: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def accumulation_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float64 where an operand is, else float32: half precision is accumulated and returned in float32."""
    if hidden.dtype == weight.dtype == torch.float32:
        return torch.float32
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which operands are taken as they are: autocast has no say inside these operations."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def finite_or_nan(products: Tensor) -> Tensor:
    """Only a bias makes a candidate impossible: a product that is not finite is a fault, and gives NaN."""
    return products + 0 * products.detach()


def log_probs_of(logits: Tensor, pool: Tensor) -> Tensor:
    """(N, T, K): a differentiable log-softmax over the entries that are in the pool, (N, T, K) bool.

    Finite everywhere: below ``IMPOSSIBLE`` for impossible entries, meaningless outside the pool.
    """
    floored = torch.where(logits < FLOOR, FLOOR, logits)  # a NaN stays and has a gradient, which clamp would take away
    return torch.where(pool, floored, 2 * FLOOR).log_softmax(-1)
