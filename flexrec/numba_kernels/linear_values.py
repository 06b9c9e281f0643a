"""What all actions of a linear metric need of gains, on the CPU, in one pass: see ``flexrec/ops/all_actions.py``."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from flexrec.metrics import Metric
from flexrec.numba_kernels import OutOfRange
from flexrec.numba_kernels.rows import NUMPY, Array
from flexrec.numba_kernels.tiles import Plan, arrays_of, plan_of, term_gains_and_norms


@njit(cache=True, nogil=True, fastmath=False)
def _fill(plan: Plan, gains: Array, lengths: Array, ranked: Array, values: Array, factors: Array, own: Array) -> bool:
    """Whether all gains lie in [0, plan.high]; if not, nothing is written."""
    all_good, worth, inverse_norms = term_gains_and_norms(plan, gains, lengths)
    if not all_good:
        return False
    kind, zero = values.dtype.type, values.dtype.type(0)
    for n in range(len(gains)):
        length, shown = lengths[n], min(ranked[n], plan.cutoff)
        mean = 0.0
        for k in range(length):
            mean += worth[n, k]
        mean /= max(length, 1)
        for k in range(gains.shape[1]):
            g = kind((worth[n, k] - mean) * inverse_norms[n]) if k < length else zero
            d = kind(plan.discounts[k]) if k < shown else zero
            values[n, k, 0], values[n, k, 1], values[n, k, 2] = g, d, g * d
            if k < own.shape[1]:
                factors[n, k, 0], factors[n, k, 1], factors[n, k, 2], own[n, k] = d, g, -1.0, g * d
    return True


def linear_values(
    gains: Tensor,
    metric: Metric,
    *,
    lengths: Tensor | None = None,
    num_ranked: Tensor | None = None,
    max_ranked: int,
    num_steps: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """With g centred and normalised term gains and d discounts, both 0 beyond a list's length, in ``dtype``:

    values (N, K, 3) are g, d and g d; factors (N, T, 3), of their expectations in the objective, d, g and -1; and
    (N, T) g d of the ranked items themselves.

    Args:
        gains: (N, K) floating, rank order; the others as of ``swap_rewards``. num_steps: T.

    Raises:
        OutOfRange: a gain inside its list's length is out of its range.
    """
    array, length, ranked = arrays_of(gains, lengths, num_ranked, max_ranked)
    rows, size = array.shape
    kind, steps = NUMPY[dtype], min(num_steps, size)
    found = np.empty((rows, size, 3), kind), np.empty((rows, steps, 3), kind), np.empty((rows, steps), kind)
    if array.size and not _fill(plan_of(metric, size, gains.dtype), array, length, ranked, *found):
        raise OutOfRange("a gain is out of its range")
    values, factors, own = map(torch.from_numpy, found)
    return values, factors, own
