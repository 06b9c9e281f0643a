"""Argument checks shared by the public functions: every message names the argument, what was got and what was expected.

Options are checked by what stands beside them: :func:`option` gives a dataclass's field its help, choices and range,
of which command lines are made, too. Torch is loaded by the first check of a tensor.

Shape and dtype checks are free and always on. Checks of *values* (a NaN gain, an index out of range) read the data,
which on a GPU waits for the stream. They are on for CPU tensors always, and for tensors on an accelerator only while
``set_value_checks(True)`` or the environment variable ``FLEXREC_VALUE_CHECKS=1`` is in force: switch them on while
developing, leave them off in hot loops.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import Field, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MIN_TEMPERATURE = MIN_TILT = 1e-10
MAX_NUMBER = 3.4e38  # of float32

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
    """Whether the values of ``tensor`` may be read for a check; never while it is traced, transformed or fake."""
    import torch

    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor) or is_transformed(tensor):
        return False
    return _value_checks or tensor.is_cpu


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is what torch.func's vmap, grad or jvp hand to the function that they transform."""
    import torch

    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


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
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    is_plain = value.layout is torch.strided and not value.is_meta
    if not is_plain or (not torch.compiler.is_compiling() and value.is_neg()):
        raise TypeError(f"{name} must be a dense tensor with values of its own, got {_kind_of(value)}")
    sizes = value.shape
    fits = len(sizes) == len(shape)
    if fits:
        for i, want in enumerate(shape):
            fits = fits and (not isinstance(want, int) or sizes[i] == want)
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


def _kind_of(value: torch.Tensor) -> str:
    import torch

    if value.layout != torch.strided:
        return f"layout {value.layout}; use to_dense()"
    return "a meta tensor" if value.is_meta else "a lazily negated view; use resolve_neg()"


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``, else raise a ValueError that lists them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'interest'?"`` for a name that is much like a known one, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    metavar: str | tuple[str, ...] | None = None,
    flag: str | None = None,
) -> Any:
    """A dataclass's field that says of itself what it is for and which values it takes; None is one where it is the
    default.

    Args:
        default: MISSING where there is none.
        choices: the only values.
        low, above, high: the least value, what values lie above, the largest one. Numbers are finite in any case.
        metavar: what stands for the value on a command line.
        flag: its name there, if it is not the field's.
    """
    about = {"choices": choices, "low": low, "above": above, "high": high, "metavar": metavar, "flag": flag}
    return field(default=default, metadata={"help": help, **{k: v for k, v in about.items() if v is not None}})


def flag_of(one: Field[Any]) -> str:
    """What a field made by :func:`option` is called on a command line."""
    return "--" + str(one.metadata.get("flag", one.name)).replace("_", "-")


def check_options(options: Any) -> None:
    """Raise a ValueError for the first field of a dataclass whose value its :func:`option` does not allow."""
    for one in fields(options):
        value = getattr(options, one.name)
        if "help" in one.metadata and not (value is None and one.default is None):
            _check_option(one.name, value, one.metadata)


def _check_option(name: str, value: Any, about: Any) -> None:
    if "choices" in about:
        check_choice(name, value, about["choices"])
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    low, above, high = (about.get(end) for end in ("low", "above", "high"))
    if not low is above is high:
        check_number(name, value)
    inside = (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
    if not inside:
        if high is not None:
            expected = f"lie in {f'[{low}' if above is None else f'({above}'}, {high}]"
        else:
            expected = f"be at least {low}" if above is None else "be positive" if above == 0 else f"exceed {above}"
        raise ValueError(f"{name} must {expected}, got {value}")


def check_number(name: str, value: Any, *, whole: bool = False) -> None:
    """Raise unless ``value`` is a number that float32 can hold, and whole where that is asked for; no tensor is one."""
    kind: Any = Integral if whole else Real
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {'whole ' if whole else ''}number, got {type(value).__name__}")
    if MAX_NUMBER < abs(value) < math.inf:
        raise ValueError(f"{name} must be a number that float32 can hold, got {value}")


def check_finite(name: str, tensor: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Raise ValueError at the first entry of ``tensor`` (where ``mask``, if given) that is NaN or infinite."""
    if not values_are_checked(tensor) or lies_within(tensor, -sys.float_info.max, sys.float_info.max):
        return
    bad = ~tensor.isfinite()
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


def check_temperature(temperature: float) -> None:
    """Raise unless ``temperature`` is a number that logits can be divided by."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature must be positive and finite, and at least {MIN_TEMPERATURE:g}, below which logits leave "
            f"float32's range; got {temperature}"
        )


def check_bias(name: str, bias: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Raise unless ``bias`` is None or (V,), numbers or -inf."""
    import torch

    if bias is not None:
        check_tensor(name, bias, (weight.shape[0],))
        check_range(name, bias, -math.inf, torch.finfo(bias.dtype).max)
