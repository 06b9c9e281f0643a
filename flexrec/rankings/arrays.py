"""What callers give, as the arrays of integers that the C++ core reads."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def as_integer(name: str, value: Any) -> int:
    """``value`` as a Python int; a TypeError for what is none."""
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if not -(2**63) <= integer < 2**63:
        raise ValueError(f"{name} must lie within 64 bits, got {integer}")
    return integer


def to_numpy(value: Any) -> NDArray[Any]:
    """Arrays, nested lists, and tensors of any device."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def as_integers(name: str, value: Any, num_dims: int) -> NDArray[np.int64]:
    """``value`` as a C-contiguous int64 array of this many dimensions."""
    try:
        array = to_numpy(value)
    except (NotImplementedError, RuntimeError) as error:  # tensors without values of their own
        raise TypeError(f"{name} must be an array with values of its own: {error}") from None
    if array.ndim != num_dims:
        raise ValueError(f"{name} must have {num_dims} dimension(s), got shape {array.shape}")
    if array.dtype.kind not in "iu" and array.size > 0:  # an empty list has a float dtype
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    if array.dtype.kind == "u" and array.size > 0 and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must hold integers below 2**63, got {array.max()}")
    return np.ascontiguousarray(array, dtype=np.int64)


def run_offsets(value: ArrayLike, num_rows: int, num_tokens: int) -> NDArray[np.int64]:
    """The (num_rows + 1,) offsets of runs that make up ``num_tokens`` tokens."""
    offsets = as_integers("offsets", value, 1)
    if len(offsets) != num_rows + 1:
        raise ValueError(f"offsets must have shape ({num_rows + 1},), got {offsets.shape}")
    if offsets[0] != 0 or offsets[-1] != num_tokens or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets must rise from 0 to the number of tokens, {num_tokens}; got {offsets}")
    return offsets


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where rows of these lengths begin when they stand one after the other, and where the last ends."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
