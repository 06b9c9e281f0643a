"""The one place where kernels are launched: on the GPU of their tensors, or on record where somebody wants to know.

A record (:func:`recorded`) notes what Triton would compile and runs nothing unless it is told to, so that any shape
costs nothing and no GPU is needed. The ahead-of-time compiler (``aot``) compiles such records, tests compare them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # Triton decides it when the kernels are made

FP_FUSION = True  # a product and a sum round once: said, because versions of Triton differ in what they do unasked
# Numbers that differ from batch to batch: Triton would compile a kernel again where one is 1 or a multiple of 16.
SIZES = (
    *("M", "T", "K", "rows", "size", "stride", "variance_stride", "max_ranked", "cutoff", "slabs"),
    *("rows_per_problem", "entries", "segments", "table_rows", "columns", "depth"),
)

_TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TYPES |= {torch.int64: "i64", torch.int32: "i32"}


@dataclass(frozen=True)
class Launch:
    """One configuration of one kernel, all that its compilation depends on but for the target.

    Args:
        kernel: the ``@triton.jit`` function.
        types: Triton type of each argument that is not constant, in order: "*bf16", "i32", "fp32"; with ":16" behind it
            a pointer that is aligned to 16 bytes or a multiple of 16, of which Triton makes something.
        constants: the others: constexprs, None, and the number 1 (but for ``SIZES``).
        num_warps: of a program. Stages of pipelines are left to the target.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, object]
    num_warps: int


_record: list[Launch] | None = None
_runs = True  # what is noted, too


def kernel(function: Callable[..., Any]) -> Any:
    """What is launched is decorated with this, what it calls with ``triton.jit``: sizes are then not specialised on."""
    return triton.jit(function, do_not_specialize=SIZES)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, num_warps: int = 4, **named: object) -> None:
    """Run a kernel on the GPU of its first tensor, or note it where a record is being made.

    Args:
        kernel: the ``@triton.jit`` function.
        grid: programs along each axis.
        arguments, named: its arguments, in order and by name. At least one is a tensor, and all tensors are on one GPU.
        num_warps: of a program.
    """
    if _record is not None:
        _record.append(_noted(kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | named, num_warps))
    if not _runs:
        return
    with _on_gpu_of(*arguments, *named.values()):
        kernel[grid](*arguments, **named, num_warps=num_warps, enable_fp_fusion=FP_FUSION)


def _on_gpu_of(*arguments: object) -> contextlib.AbstractContextManager[object]:
    """Make the GPU of the first tensor the current one, on which Triton launches, if it is not."""
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


@contextlib.contextmanager
def recorded(*, runs: bool = False) -> Iterator[list[Launch]]:
    """Launches inside are noted in the list and do not happen, unless ``runs``: what they write is left as it was."""
    global _record, _runs
    before = _record, _runs
    noted: list[Launch] = []
    _record, _runs = noted, runs
    try:
        yield noted
    finally:
        _record, _runs = before


def _noted(kernel: Any, given: dict[str, object], num_warps: int) -> Launch:
    """As Triton would compile it: constants are what the kernel annotates as such, None, and numbers that are 1."""
    if set(given) != set(kernel.arg_names):
        raise TypeError(f"{kernel.__name__} takes {kernel.arg_names}, got {sorted(given)}")
    types, constants = {}, {}
    for name in kernel.arg_names:
        value = given[name]
        is_one = isinstance(value, int) and value == 1 and name not in SIZES
        if value is None or is_one or "constexpr" in str(kernel.fn.__annotations__.get(name)):
            constants[name] = value
        else:
            types[name] = _type_of(value, name in SIZES)
    return Launch(kernel, types, constants, num_warps)


def _type_of(value: object, is_size: bool) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}" + (":16" if value.data_ptr() % 16 == 0 else "")
    if isinstance(value, float):
        return "fp32"
    if not isinstance(value, int):
        raise TypeError(f"a kernel's arguments are tensors, numbers, None and constants; got {type(value).__name__}")
    return ("i32" if -(2**31) <= value < 2**31 else "i64") + (":16" if value % 16 == 0 and not is_size else "")


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; ``triton.cdiv`` is the same for kernels too, and takes microseconds on the host for it."""
    return -(-a // b)
