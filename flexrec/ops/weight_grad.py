"""How the output embedding gets its gradient: as a dense tensor, as rows, or added to a gradient that is there.

A list's gradient touches K of V rows. As a tensor (V, D) it costs more to fill with zeros than to compute (V = 151,936,
D = 4,096 in float32: 2.5 GB), so that the other two ways never make one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flexrec.checks import check_choice
from flexrec.ops.library import choose_backend, is_traced, kernels

WEIGHT_GRADS = ("dense", "rows", "accumulate")


def accumulated_grad(weight: Tensor) -> Tensor:
    """What "accumulate" adds to: ``weight.main_grad`` where there is one, else ``weight.grad``, made if need be.

    Raises:
        ValueError: a buffer that is not dense and contiguous, or not of the weight's shape.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        buffer = weight.grad
    if buffer.layout != torch.strided or not buffer.is_contiguous() or buffer.shape != weight.shape:
        raise ValueError(
            f"weight_grad='accumulate' needs a dense contiguous gradient of shape {tuple(weight.shape)} to add to, got "
            f"{tuple(buffer.shape)}, {buffer.layout}, strides {buffer.stride() if not buffer.is_sparse else None}"
        )
    return buffer


def check_weight_grad(weight_grad: str, backend: str, weight: Tensor, inputs: Iterable[object]) -> None:
    """Raise ValueError unless the gradient of an operation of these inputs can be delivered like that."""
    check_choice("weight_grad", weight_grad, WEIGHT_GRADS)
    if weight_grad == "dense":
        return
    traced = is_traced(*inputs)
    if traced or backend == "torch":
        where = "under torch.compile" if traced else "with backend='torch'"
        raise ValueError(f"weight_grad={weight_grad!r} is not possible {where}; use 'dense'")
    if weight_grad == "accumulate" and not weight.is_leaf:  # no other tensor is to get a gradient through it
        raise ValueError("weight_grad='accumulate' needs weight to be a leaf, got a tensor computed from others")


def add_rows_(buffer: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """buffer (V, D) += rows (M, D) at tokens (M,), which may repeat.

    Rows of one token are added up in the precision of ``rows`` before they meet a buffer of another dtype. Bitwise
    repeatable on a CPU, and on a GPU under ``torch.use_deterministic_algorithms``.
    """
    if rows.dtype != buffer.dtype:
        buffer.index_add_(0, *sum_by_token(tokens, rows, buffer.dtype))
    elif choose_backend("auto", "rows", rows) == "numba" and buffer.is_contiguous() and rows.is_contiguous():
        kernels("numba", "rows").add_at_tokens(buffer, tokens, rows)
    else:
        buffer.index_add_(0, tokens, rows)


def sum_by_token(tokens: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tokens in ascending order and the sums of their rows, rounded to ``dtype`` once.

    Each once; by Triton's kernels, which do not wait for the number of them, again and again with rows of 0.
    """
    if choose_backend("auto", "rows", rows) == "triton":
        return kernels("triton", "segment_sum").sum_by_token(tokens, rows.contiguous(), dtype)
    used, place = tokens.unique(return_inverse=True)
    sums = rows.new_zeros(len(used), rows.shape[1])
    add_rows_(sums, place, rows)
    return used, sums.to(dtype)


def deliver(weight_grad: str, weight: Tensor, tokens: Tensor, rows: Tensor) -> Tensor | None:
    """What autograd gets for ``weight`` (V, D) whose tokens (M,) have the gradients rows (M, D)."""
    if weight_grad == "rows":
        if rows.dtype != weight.dtype:  # round the sum, not what is summed
            tokens, rows = sum_by_token(tokens, rows, weight.dtype)
        return torch.sparse_coo_tensor(tokens[None], rows, weight.shape, check_invariants=False)
    if weight_grad == "accumulate":
        add_rows_(accumulated_grad(weight), tokens, rows)
        return None
    if weight.device.type == "cpu":
        grad = kernels("numba", "rows").fresh_zeros(weight)
    else:
        grad = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    add_rows_(grad, tokens, rows)
    return grad
