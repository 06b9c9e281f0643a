"""Registered metrics on the CPU: compiled by numba and evaluated anew after every swap that can matter."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from numba import njit


def compile_custom_metric(name: str, f: Callable[[Any, int], float]) -> Any:
    """Compile ``f(gains float64[:], num_ranked) -> float``; TypeError if numba cannot or it returns something else."""
    function = getattr(f, "py_func", f)  # of an already jitted one
    try:
        compiled = njit(function, fastmath=False)
        compiled.compile((numba.float64[::1], numba.int64))
    except numba.core.errors.NumbaError as error:
        raise TypeError(f"f of metric {name!r} cannot be compiled by numba: {error}") from error
    returns = compiled.nopython_signatures[0].return_type
    if not isinstance(returns, (numba.types.Float, numba.types.Integer)):
        raise TypeError(f"f of metric {name!r} must return a float, got {returns}")
    return compiled


def custom_prefix_values(f: Any, gains: np.ndarray, lengths: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """(N, K + 1) float64: f of each list (N, K) float64 with the first 0, 1, .. of its shown ranks shown."""
    values = np.zeros((gains.shape[0], gains.shape[1] + 1))
    _in_threads(_custom_prefix_values, f, gains, lengths, shown, values)
    return values


def custom_swap_scores(f: Any, gains: np.ndarray, lengths: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """(N, K, K) float64 swap scores of f, by evaluating it after every swap that can matter."""
    scores = np.zeros((*gains.shape, gains.shape[1]))
    _in_threads(_custom_swap_scores, f, gains, lengths, shown, scores)
    return scores


def _in_threads(kernel: Any, f: Any, *arrays: np.ndarray) -> None:
    """Run a kernel over slices of the lists. Threads, not prange, which takes seconds to compile for every new f."""
    rows, threads = len(arrays[0]), numba.get_num_threads()
    pieces = [slice(i * rows // threads, (i + 1) * rows // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: kernel(f, *(array[piece] for array in arrays)), pieces))


@njit(nogil=True, fastmath=False)
def _custom_prefix_values(
    f: Any, gains: np.ndarray, lengths: np.ndarray, shown: np.ndarray, values: np.ndarray
) -> None:
    for i in range(len(gains)):
        list_gains = gains[i, : lengths[i]].copy()
        if (list_gains > 0.0).any():
            for t in range(values.shape[1]):
                values[i, t] = f(list_gains, t) if t <= shown[i] else values[i, t - 1]


@njit(nogil=True, fastmath=False)
def _custom_swap_scores(f: Any, gains: np.ndarray, lengths: np.ndarray, shown: np.ndarray, scores: np.ndarray) -> None:
    for i in range(len(gains)):
        swapped = gains[i, : lengths[i]].copy()
        if (swapped > 0.0).any():
            present = f(swapped, shown[i])
            for k in range(shown[i]):
                for j in range(k + 1, lengths[i]):
                    swapped[k], swapped[j] = gains[i, j], gains[i, k]
                    scores[i, k, j] = present - f(swapped, shown[i])
                    scores[i, j, k] = scores[i, k, j]
                    swapped[k], swapped[j] = gains[i, k], gains[i, j]
