"""Calibration of a critic on feedback: what it says of familiar and of new topics becomes true on average, and what it
says of its own ignorance.

**Means.** A log is not missing at random: users watch what they like, so a critic fitted on it thinks too well of
topics that a user keeps away from. The feedback on lists was not chosen by the user. On it,

    logit P(interest) = a + b logit m + c n + d n logit m + e [n > 0.99],

m being the critic's mean and n the novelty of the candidate's topics to the history, is fitted by logistic regression
(Platt 1999, with n beside m; interest in [0, 1] is its own probability), drawn towards (0, 1, 0, 0, 0), which changes
nothing.

**Variances.** A model's variance is that of feedback. What counts is the *ignorance* v of the expected interest,
without the noise of an observation. Both are said as shares of m (1 - m), the most that an interest in [0, 1] of mean m
can vary by: v = rho m (1 - m), and the noise around an expected interest f is nu f (1 - f), as a Beta distribution has
it (nu = 1 is the coin of a click). A squared error of feedback then has the expectation m (1 - m) (rho + nu (1 - rho)),
and

    logit rho = a + b logit r + c n + d [nothing known],

r being the model's own share and the last term 1 for users of whom no feedback is known, is a regression of the
squared errors of feedback that the model was not fitted on, whose slopes b and c are drawn towards 1 and 0. Pairs are
weighed by sqrt(m (1 - m)), so that neither large nor small errors rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.special import betaincinv

UNCHANGED = np.array([0.0, 1.0, 0.0, 0.0, 0.0])
_UNCHANGED_SHARE = np.array([0.0, 1.0, 0.0, 0.0])
_RIDGE = 1.0  # how many observations the wish to change nothing counts as
_RIDGE_OF_SHARES = np.array([1e-3, 1.0, 1.0, 1e-3])
_LEAST_SHARE = 0.005  # a critic is never certain
_STEPS = 50
_EDGE = 0.005  # means are kept so far from 0 and 1
_MOST_NOISE = 0.9  # the largest nu


@dataclass(frozen=True)
class Calibration:
    """What was learnt from feedback about a model's means and variances.

    Attributes:
        mean: (5,) coefficients of the means.
        variance: (4,) coefficients of the shares of ignorance.
        noise: nu, the noise of an observation as a share of f (1 - f); 0 takes what was logged for the truth.
    """

    mean: np.ndarray = field(default_factory=UNCHANGED.copy)
    variance: np.ndarray = field(default_factory=_UNCHANGED_SHARE.copy)
    noise: float = 0.0

    def ignorance(
        self, mean: np.ndarray, share: np.ndarray, novelty: np.ndarray, nothing_known: np.ndarray
    ) -> np.ndarray:
        """(N,) float32: the variance of the expected interest, of calibrated means and a model's :func:`shares`."""
        rho = np.maximum(_sigmoid(_share_features(share, novelty, nothing_known) @ self.variance), _LEAST_SHARE)
        return (rho * _largest_variance(mean)).astype(np.float32)

    def noise_of(self, mean: np.ndarray, ignorance: np.ndarray) -> np.ndarray:
        """(N,) >= 0, the expected variance of an observation around the expected interest."""
        # Ignorance may be all that the mean allows, and by rounding to float32 a little more.
        return self.noise * np.maximum(_largest_variance(mean) - ignorance, 0.0)


def fit_calibration(mean: np.ndarray, novelty: np.ndarray, interest: np.ndarray) -> np.ndarray:
    """The five coefficients (a, b, c, d, e), float64, of N pairs: all arguments (N,), in [0, 1]."""
    return _logistic(_features(mean, novelty), interest, np.ones(len(mean)), UNCHANGED, np.full(5, _RIDGE))


def calibrated(mean: np.ndarray, novelty: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """(N,) float32 in (0, 1): what ``mean`` (N,) becomes; unchanged, to the bit, by ``UNCHANGED``."""
    if np.array_equal(coefficients, UNCHANGED):
        return mean
    return _sigmoid(_features(mean, novelty) @ coefficients).astype(np.float32)


def shares(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """(N,) in (0, 1): a model's variances as shares of what its means allow."""
    return np.clip(variance / _largest_variance(mean), 0.01, 0.99)


def noise_share(mean: np.ndarray, interest: np.ndarray, noise: float) -> float:
    """nu, of pairs with calibrated ``mean`` and feedback ``interest`` (N,), whose noise has the mean variance
    ``noise``.

    The mean of f (1 - f) is that of m (1 - m) without the ignorance, which is the squared error without the noise.
    """
    if noise == 0:
        return 0.0
    ignorance = np.square(mean - interest).mean() - noise
    return float(np.clip(noise / max(_largest_variance(mean).mean() - ignorance, noise), 0.0, _MOST_NOISE))


def fit_shares(
    mean: np.ndarray,
    share: np.ndarray,
    novelty: np.ndarray,
    nothing_known: np.ndarray,
    interest: np.ndarray,
    noise: float,
) -> np.ndarray:
    """The four coefficients (a, b, c, d), float64, of N pairs with feedback ``interest`` and noise nu = ``noise``."""
    largest = _largest_variance(mean)
    rho = (np.square(mean - interest) / largest - noise) / (1 - noise)  # on average
    features = _share_features(share, novelty, nothing_known)
    return _logistic(features, rho, np.sqrt(largest), _UNCHANGED_SHARE, _RIDGE_OF_SHARES)


def beta_quantiles(mean: np.ndarray, variance: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """(N, len(levels)): where Beta distributions of ``mean`` and ``variance`` (N,) have these shares below.

    Such a distribution covers the simulator's true interests as often as it says; mean +- z sd does not
    (docs/notes/uncertainty.md). Variances beyond what the mean allows count as almost that.
    """
    largest = _largest_variance(mean)
    size = largest / np.clip(variance, 1e-6 * largest, 0.999 * largest) - 1  # a + b
    kept = np.clip(np.asarray(mean, dtype=np.float64), _EDGE, 1 - _EDGE)
    return betaincinv((kept * size)[:, None], ((1 - kept) * size)[:, None], np.array(levels))


def _logistic(
    features: np.ndarray, target: np.ndarray, weight: np.ndarray, prior: np.ndarray, ridge: np.ndarray
) -> np.ndarray:
    """Coefficients of a logistic regression, whose targets may lie outside of [0, 1], drawn towards ``prior``.

    Newton's method with halved steps: the loss, sum of weight (log(1 + exp(x)) - target x), is strictly convex.
    """

    def loss(c: np.ndarray) -> float:
        x = features @ c
        return float(weight @ (np.logaddexp(0, x) - target * x) + 0.5 * ridge @ np.square(c - prior))

    coefficients = prior.copy()
    for _ in range(_STEPS):
        predicted = _sigmoid(features @ coefficients)
        gradient = features.T @ (weight * (predicted - target)) + ridge * (coefficients - prior)
        curvature = (features.T * (weight * predicted * (1 - predicted))) @ features + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        while np.abs(step).max() > 1e-10 and loss(coefficients - step) > loss(coefficients):
            step = step / 2
        coefficients = coefficients - step
        if np.abs(step).max() < 1e-10:
            break
    return coefficients


def _features(mean: np.ndarray, novelty: np.ndarray) -> np.ndarray:
    """(N, 5)"""
    logit, new = _logit(np.clip(mean, _EDGE, 1 - _EDGE)), np.asarray(novelty, dtype=np.float64)
    return np.stack([np.ones_like(logit), logit, new, new * logit, (new > 0.99).astype(np.float64)], axis=1)


def _share_features(share: np.ndarray, novelty: np.ndarray, nothing_known: np.ndarray) -> np.ndarray:
    """(N, 4)"""
    return np.stack([np.ones(len(share)), _logit(share), novelty, nothing_known], axis=1).astype(np.float64)


def _largest_variance(mean: np.ndarray) -> np.ndarray:
    kept = np.clip(np.asarray(mean, dtype=np.float64), _EDGE, 1 - _EDGE)
    return kept * (1 - kept)


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.asarray(p, dtype=np.float64)
    return np.log(p / (1 - p))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
