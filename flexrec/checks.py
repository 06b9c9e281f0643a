"""Argument checks shared by the public functions: every message names the argument, what was got and what was expected.

Shape and dtype checks are free and always on. Checks of *values* (a NaN gain, an index out of range) read the data,
which on a GPU waits for the stream. They are on for CPU tensors always, and for tensors on an accelerator only while
``set_value_checks(True)`` or the environment variable ``FLEXREC_VALUE_CHECKS=1`` is in force: switch them on while
developing, leave them off in hot loops.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

_value_checks = os.environ.get("FLEXREC_VALUE_CHECKS", "0") not in ("", "0")


def set_value_checks(enabled: bool) -> None:
    """Switch the value checks of tensors on an accelerator on or off (CPU tensors are always checked).

    Example:
        >>> flexrec.set_value_checks(True)  # of tensors on a GPU, too, which waits for it
        >>> flexrec.set_value_checks(False)
    """
    global _value_checks
    _value_checks = bool(enabled)


def values_are_checked(tensor: torch.Tensor) -> bool:
    """Whether the values of ``tensor`` may be read for a check; never while it is traced or fake."""
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return _value_checks or tensor.device.type == "cpu"


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str | None],
    kind: str = "floating",
) -> torch.Tensor:
    """Return ``value`` if it is a tensor of this shape and kind of dtype, else raise TypeError or ValueError.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
        shape: one entry per dimension: an int for a size that must match, a letter (or None) for any size.
        kind: "floating", "integer" or "bool".
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape)
    if fits:
        for have, want in zip(value.shape, shape, strict=True):
            fits = fits and (have == want or not isinstance(want, int))
    if not fits:  # only now is the text made: it takes longer than the check, and torch.compile cannot make it
        expected = (
            "(" + ", ".join("any" if s is None else str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
        )
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
    dtype = value.dtype
    if kind == "floating":
        is_kind = dtype.is_floating_point
    elif kind == "bool":
        is_kind = dtype == torch.bool
    else:
        is_kind = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    if not is_kind:
        raise TypeError(f"{name} must have {'an' if kind == 'integer' else 'a'} {kind} dtype, got {value.dtype}")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``, else raise a ValueError that lists them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def check_finite(name: str, tensor: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Raise ValueError at the first entry of ``tensor`` (where ``mask``, if given) that is NaN or infinite."""
    if not values_are_checked(tensor) or lies_within(tensor, -sys.float_info.max, sys.float_info.max):
        return
    bad = ~torch.isfinite(tensor)
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name} must be finite, got {tensor[where].item()} at index {list(where)}")


def check_range(name: str, tensor: torch.Tensor, low: float, high: float, mask: torch.Tensor | None = None) -> None:
    """Raise ValueError at the first entry of ``tensor`` outside [low, high] (both ends allowed)."""
    if not values_are_checked(tensor) or lies_within(tensor, low, high):
        return
    bad = ~((tensor >= low) & (tensor <= high))
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name} must lie in [{low}, {high}], got {tensor[where].item()} at index {list(where)}")


def lies_within(tensor: torch.Tensor, low: float, high: float) -> bool:
    """Whether all entries lie in [low, high], in one pass: the usual case. A NaN does not."""
    if tensor.numel() == 0:
        return True
    smallest, largest = tensor.aminmax()
    return low <= smallest.item() and largest.item() <= high
