"""Quantiles of the Beta distribution of a given mean and variance: the shape that a critic's intervals have.

An interest lies in [0, 1]. What a critic knows of it is a mean and a variance, and the Beta distribution of these two
moments covers the simulator's true interests as often as it says; intervals of mean +- z sd do not: they reach below 0,
and half of the Gaussian mass lies closer to the mean (see docs/notes/uncertainty.md).
"""

from __future__ import annotations

import numpy as np

_LEAST_SHARE, _LARGEST_SHARE = 1e-6, 0.999  # of the variance in mean (1 - mean)
_EDGE = 1e-4  # means are kept so far from 0 and 1
_GRID = np.linspace(-5.0, 5.0, 401)
_CHUNK = 4096  # distributions at a time


def beta_parameters(mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and b, (N,) float64, of the Beta distributions of these moments, as near as there are any."""
    kept = np.clip(np.asarray(mean, dtype=np.float64), _EDGE, 1 - _EDGE)
    share = np.clip(np.asarray(variance, dtype=np.float64) / (kept * (1 - kept)), _LEAST_SHARE, _LARGEST_SHARE)
    size = 1 / share - 1
    return kept * size, (1 - kept) * size


def beta_quantiles(mean: np.ndarray, variance: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """(N, len(levels)): where the Beta distributions with ``mean`` and ``variance`` (N,) have these shares below.

    By quadrature: the logit t of a Beta variable has the density exp(a t) / (1 + exp(t))^(a + b), up to a factor, which
    is smooth and falls off exponentially on both sides, so that a grid that widens to its ends holds all of it.
    """
    a, b = beta_parameters(mean, variance)
    result = np.empty((len(a), len(levels)))
    for start in range(0, len(a), _CHUNK):
        part = slice(start, start + _CHUNK)
        p, q = a[part, None], b[part, None]
        width = np.sqrt(1 / p + 1 / q + 1 / p**2 + 1 / q**2) / 4
        logit = np.log(p / q) + width * np.sinh(_GRID)  # (n, G)
        log_density = p * logit - (p + q) * np.logaddexp(0, logit) + np.log(np.cosh(_GRID))
        density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
        below = np.cumsum(density, axis=1) - density / 2
        below /= density.sum(axis=1, keepdims=True)
        for column, level in enumerate(levels):
            right = np.clip((below < level).sum(axis=1), 1, len(_GRID) - 1)[:, None]
            low, high = (np.take_along_axis(below, right + shift, axis=1) for shift in (-1, 0))
            left_logit, right_logit = (np.take_along_axis(logit, right + shift, axis=1) for shift in (-1, 0))
            way = np.clip((level - low) / np.maximum(high - low, 1e-300), 0, 1)
            found = left_logit + way * (right_logit - left_logit)
            result[part, column] = 1 / (1 + np.exp(-np.clip(found[:, 0], -500, 500)))
    return result
