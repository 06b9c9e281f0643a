"""From checked lists on the CPU to the numba kernels of swap rewards, and back."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch

from flexrec import metrics
from flexrec.metrics import Lists, Metric
from flexrec.ops import swap_rewards_numba, swap_scores_numba, swap_variance_numba
from flexrec.ops.lanes import LANES
from flexrec.ops.list_tiles import FORMS, GAIN, GAINS, NO_CUTOFF, NORMALISERS, Plan, term_gains_and_norms
from flexrec.ops.numba_threads import follow_torch_threads

CREDITS = swap_rewards_numba.CREDITS
FEW = 2**14  # gains: they are rewarded before other threads are awake
PIECES_PER_THREAD = 4


@lru_cache(maxsize=256)
def _plan(metric: Metric, size: int) -> Plan:
    definition = metric.definition
    return Plan(
        discounts=metrics.discount_table(metric, size),
        cutoff=NO_CUTOFF if metric.cutoff is None else metric.cutoff,
        form=FORMS[definition.form],
        gain=GAINS[definition.gain],
        normaliser=NORMALISERS[definition.normaliser],
        top=metric.max_gain or 0.0,
        high=metrics.largest_gain(metric),
    )


@lru_cache(maxsize=8)
def _repeated(count: int, rows: int) -> np.ndarray:
    return np.full(rows, count)


def _arrays(lists: Lists) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gains (N, K) float32 or float64, lengths (N,) int64, ranked (N,) int64. None may be written to."""
    gains = lists.gains
    if gains.dtype not in (torch.float32, torch.float64):
        gains = gains.float()
    rows, size = gains.shape
    if lists.lengths is None and lists.num_ranked is None:  # saves some microseconds
        lengths, ranked = _repeated(size, rows), _repeated(lists.max_ranked, rows)
    else:
        lengths, ranked = lists.real_lengths.numpy(), lists.real_ranked.numpy()
    return gains.contiguous().numpy(), lengths, ranked


def _run(kernel: Any, parallel_kernel: Any, gains: np.ndarray, *arguments: Any) -> bool:
    """Run a kernel over all lists, on one thread if they are few; whether it finds all values in order."""
    if not gains.size:
        return True
    tiles, threads = -(-len(gains) // LANES), 1
    if gains.size >= FEW:
        follow_torch_threads()
        threads = numba.get_num_threads()
    if threads == 1 or tiles == 1:
        return kernel(gains, *arguments, 0, tiles)
    is_good = np.empty(min(tiles, PIECES_PER_THREAD * threads), dtype=np.bool_)
    parallel_kernel(gains, *arguments, is_good)
    return bool(is_good.all())


def numba_swap_rewards(lists: Lists, metric: Metric, credit: str, weights: torch.Tensor | None) -> torch.Tensor:
    """(N, K) rewards of a built-in metric, float64 for float64 gains, else float32. Checks the values of the gains."""
    if credit == "policy":
        assert weights is not None
        return numba_swap_scores(lists, metric, weights).squeeze(-1)
    rewards, is_good = _rewards(lists, _plan(metric, lists.gains.shape[1]), credit)
    if not is_good:
        metrics.check_gain_values(lists, metric)  # raises, naming the gain
    return rewards


def _rewards(lists: Lists, plan: Plan, credit: str) -> tuple[torch.Tensor, bool]:
    """(N, K) rewards; whether all gains are in order, without which the rewards mean nothing."""
    gains, lengths, ranked = _arrays(lists)
    rewards = np.empty_like(gains)
    kernels = swap_rewards_numba.swap_rewards, swap_rewards_numba.swap_rewards_in_parallel
    is_good = _run(*kernels, gains, lengths, ranked, plan, CREDITS[credit], rewards)
    return torch.from_numpy(rewards), is_good


def numba_rewards_with_variance(
    lists: Lists, variance: torch.Tensor, metric: Metric, credit: str
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """(N, K) rewards and (N, K) float64 variances of a metric that has them, for every credit but "policy"; whether all
    values of gains and variance are in order, without which the others mean nothing."""
    plan = _plan(metric, lists.gains.shape[1])
    if metric.definition.gain == "binary":  # gains are probabilities of relevance
        plan = plan._replace(gain=GAIN, high=1.0)
    rewards, is_good = _rewards(lists, plan, credit)
    gains, lengths, ranked = _arrays(replace(lists, gains=lists.gains.double()))
    spots, out = variance.double().contiguous().numpy(), np.empty_like(gains)
    kernels = swap_variance_numba.swap_variance, swap_variance_numba.swap_variance_in_parallel
    is_good = is_good and _run(*kernels, gains, spots, lengths, ranked, plan, CREDITS[credit], out)
    return rewards, torch.from_numpy(out), is_good


def numba_swap_scores(lists: Lists, metric: Metric, weights: torch.Tensor | None = None) -> torch.Tensor:
    """(N, K, K) swap scores of a built-in metric, or (N, K, 1) their means over j > k by weight. Checks the gains."""
    gains, lengths, ranked = _arrays(lists)
    rows, size = gains.shape
    plan = _plan(metric, size)
    is_good, w, inverse_norms = term_gains_and_norms(plan, gains, lengths)
    if not is_good:
        metrics.check_gain_values(lists, metric)
    out = np.zeros((rows, size, size if weights is None else 1), dtype=gains.dtype)
    shares = np.empty((0, 0, 0), dtype=gains.dtype)
    if weights is not None:
        shares = weights.detach().to(metrics.result_dtype(lists.gains)).contiguous().numpy()
    follow_torch_threads()
    swap_scores_numba.swap_scores(w, inverse_norms, lengths, ranked, plan, shares, out)
    return torch.from_numpy(out)
