"""Calibration of a critic on the feedback of lists: what it says of familiar and of new topics becomes true on average.

A log is not missing at random: users watch what they like, so a critic fitted on it thinks too well of topics that a
user keeps away from. The feedback on lists was not chosen by the user. On it,

    logit P(interest) = a + b logit m + c n + d n logit m + e [n > 0.99],

m being the critic's mean and n the novelty of the candidate's topics to the history, is fitted by logistic regression
(Platt 1999, with n beside m; interest in [0, 1] is its own probability), drawn towards (0, 1, 0, 0, 0), which changes
nothing.
"""

from __future__ import annotations

import numpy as np

UNCHANGED = np.array([0.0, 1.0, 0.0, 0.0, 0.0])
_RIDGE = 1.0  # how many observations the wish to change nothing counts as
_STEPS = 50
_EDGE = 0.005  # means are kept so far from 0 and 1


def fit_calibration(mean: np.ndarray, novelty: np.ndarray, interest: np.ndarray) -> np.ndarray:
    """The five coefficients (a, b, c, d, e), float64, of N pairs: all arguments (N,), in [0, 1]."""
    features = _features(mean, novelty)
    coefficients = UNCHANGED.copy()
    for _ in range(_STEPS):  # Newton's method: the loss is strictly convex
        predicted = _sigmoid(features @ coefficients)
        gradient = features.T @ (predicted - interest) + _RIDGE * (coefficients - UNCHANGED)
        curvature = (features.T * (predicted * (1 - predicted))) @ features + _RIDGE * np.eye(5)
        step = np.linalg.solve(curvature, gradient)
        coefficients = coefficients - step
        if np.abs(step).max() < 1e-10:
            break
    return coefficients


def calibrated(mean: np.ndarray, novelty: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """(N,) float32 in (0, 1): what ``mean`` (N,) becomes; unchanged, to the bit, by ``UNCHANGED``."""
    if np.array_equal(coefficients, UNCHANGED):
        return mean
    return _sigmoid(_features(mean, novelty) @ coefficients).astype(np.float32)


def _features(mean: np.ndarray, novelty: np.ndarray) -> np.ndarray:
    """(N, 5)"""
    kept = np.clip(np.asarray(mean, dtype=np.float64), _EDGE, 1 - _EDGE)
    logit, new = np.log(kept / (1 - kept)), np.asarray(novelty, dtype=np.float64)
    return np.stack([np.ones_like(logit), logit, new, new * logit, (new > 0.99).astype(np.float64)], axis=1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
