"""What a policy is worth, from the logs of another: inverse propensities, self-normalised, and doubly robust.

A log holds rankings that some policy had shown, how probable they were to it, and what came of each shown rank. With
the exact ordered probability of every rank given those before it (Plackett-Luce; what ``ranking_logprobs`` computes),
w_t = prod_{s <= t} pi(a_s | a_<s) / mu(a_s | a_<s) is exact too, and the estimators of slates are sums over ranks:

    ips     V = mean_n sum_t w_nt r_nt
    snips   V = sum_t (sum_n w_nt r_nt) / (sum_n w_nt)
    dr      V = mean_n sum_t w_nt (r_nt - q_nt) + w_n,t-1 v_nt,    v_nt = sum_a pi(a | a_<t) q_t(a)

w_t is that of McInerney et al. 2020 ("reward interaction", "cascade"): what came of a rank depends on what was shown
down to it. ``weights="ranking"`` takes w_T at every rank: it may depend on the whole list. ips and dr are unbiased
where the logging policy could have shown whatever the other one would; dr for any guess q, and the better q the less it
varies (Kiyohara et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from flexrec.checks import check_choice
from flexrec.evaluation.statistics import bootstrap_interval, check_resampling, cluster_sums, interval_of, resampled
from flexrec.ops.rank_order import rank_order
from flexrec.ops.ranking_logprobs import ranking_logprobs
from flexrec.policy.batch import make_batch
from flexrec.policy.scores import completed_rankings, output_rows, ranking_scores, ranking_states
from flexrec.task.examples import Example, prompts_and_candidates

ESTIMATORS = ("ips", "snips", "dr")
WEIGHTS = ("cascade", "ranking")


@dataclass(frozen=True)
class OffPolicyValue:
    """An estimate of a policy's value, and how far to trust it.

    Attributes:
        value: the estimate; low, high: its interval, over users where they are given.
        per_list: (N,) float64 whose mean is the value: for paired comparisons of two policies on one log.
        effective_size: (sum w)^2 / sum w^2 of the last rank's weights: as good as so many lists of one's own.
        mean_weight: 1 up to chance where nothing was clipped; far from it, propensities are wrong.
        largest_weight: after clipping.
        clipped: the share of the lists of which a weight was clipped.

    Example:
        >>> from flexrec.evaluation import off_policy_value
        >>> same = np.log(np.full((4, 1), 0.5))
        >>> found = off_policy_value(same, same, np.array([[1.0], [0.0], [1.0], [0.0]]), estimator="ips")
        >>> found.value, found.effective_size
        (0.5, 4.0)
    """

    value: float
    low: float
    high: float
    per_list: np.ndarray
    effective_size: float
    mean_weight: float
    largest_weight: float
    clipped: float


class LoggedScores(NamedTuple):
    """What a policy says of logged rankings, each (N, T) float64, 0 beyond a row's own ranks.

    ``logprobs`` of the items that were shown, given those before them; ``predicted``, the gains of these items;
    ``expected``, the gain that the policy expects of its own choice there, or None where candidates are several tokens.
    """

    logprobs: np.ndarray
    predicted: np.ndarray
    expected: np.ndarray | None


def off_policy_value(
    logprobs: np.ndarray,
    logging_logprobs: np.ndarray,
    rewards: np.ndarray,
    *,
    estimator: str = "snips",
    weights: str = "cascade",
    predicted: np.ndarray | None = None,
    expected: np.ndarray | None = None,
    clip: float | None = None,
    users: np.ndarray | None = None,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> OffPolicyValue:
    """Estimate the mean reward of a policy's rankings from rankings that another one had shown.

    Args:
        logprobs: (N, T) of the logged ranking under the policy in question, by rank, given the ranks before; -inf where
            it would never; 0 beyond a list's own ranks. Or (N,), whole rankings.
        logging_logprobs: the same under the policy that had shown them; finite.
        rewards: (N, T) what came of each rank, already multiplied by what a rank counts; 0 beyond a list's own. Or
            (N,), what came of the whole ranking, under ``weights="ranking"``.
        estimator: "ips", "snips" (not unbiased, but bounded by the rewards, and not moved by a wrong scale of the
            propensities) or "dr".
        weights: "cascade" or "ranking", see above.
        predicted, expected: (N, T), of "dr": the guessed reward of the item that was shown, and the guess that the
            policy expects of its own choice at that rank. :func:`score_rankings` has both from the critic's gains.
        clip: the largest weight, which trades variance for a bias towards 0; None clips nothing.
        users: (N,) the user of each list: intervals resample whole users.
        level, num_samples, seed: as :func:`flexrec.bootstrap_interval`.

    Returns:
        The estimate; its interval is NaN with a single user.

    Raises:
        ValueError: shapes that differ, numbers that are not finite, a positive log-prob, an estimator without what it
            needs, no list; weights that are all 0, since the log then says nothing of the policy.

    Example:
        >>> from flexrec.evaluation import off_policy_value
        >>> logging, policy = np.log([[0.5], [0.5]]), np.log([[0.9], [0.1]])  # two items, each shown once
        >>> off_policy_value(policy, logging, np.array([[1.0], [0.0]]), estimator="ips").value
        0.9
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("weights", weights, WEIGHTS)
    check_resampling(level, num_samples)
    whole = np.ndim(rewards) == 1
    if whole and (weights != "ranking" or estimator == "dr"):
        raise ValueError("rewards (N,) are of whole rankings: take weights='ranking' and estimator 'ips' or 'snips'")
    ours, theirs = _logprobs("logprobs", logprobs), _logprobs("logging_logprobs", logging_logprobs)
    if ours.shape != theirs.shape:
        raise ValueError(f"logprobs {ours.shape} and logging_logprobs {theirs.shape} must have the same shape")
    if not np.isfinite(theirs).all():
        raise ValueError("logging_logprobs must be finite: what was shown had a probability above 0")
    if whole:
        ours, theirs = ours.sum(1, keepdims=True), theirs.sum(1, keepdims=True)
    shape = ours.shape
    gains = _numbers("rewards", np.asarray(rewards)[:, None] if whole else rewards, shape)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip}")
    members = None if users is None else np.asarray(users)
    if members is not None and members.shape != shape[:1]:
        raise ValueError(f"users must have shape {shape[:1]}, got {members.shape}")

    with np.errstate(over="ignore"):
        exact = np.exp(np.cumsum(ours - theirs, axis=1))  # (N, T) of the ranks down to each
    before = np.concatenate([np.ones((shape[0], 1)), exact[:, :-1]], axis=1)  # (N, T)
    if weights == "ranking":
        exact = np.repeat(exact[:, -1:], shape[1], axis=1)
    limit = np.inf if clip is None else clip
    used, before = np.minimum(exact, limit), np.minimum(before, limit)
    if not np.isfinite(used).all() or (estimator == "dr" and not np.isfinite(before).all()):
        raise ValueError("a weight is too large for a number: the two policies have little in common; give clip=")
    totals = used.sum(0)  # (T,)
    if estimator != "dr" and not totals.any():
        raise ValueError("all weights are 0: the policy would have shown none of the logged rankings")

    if estimator == "snips":
        value, per_list = _self_normalised(used, gains)
        low, high = _ratio_interval(used, gains, members, level, num_samples, seed)
    else:
        parts = used * gains
        if estimator == "dr":
            if predicted is None or expected is None:
                raise ValueError("estimator='dr' needs predicted and expected: see score_rankings")
            guess, mean = (_numbers(n, x, shape) for n, x in (("predicted", predicted), ("expected", expected)))
            parts = used * (gains - guess) + before * mean
        per_list = parts.sum(1)
        value = float(per_list.mean())
        low, high = bootstrap_interval(per_list, clusters=members, level=level, num_samples=num_samples, seed=seed)
    last = used[:, -1]
    return OffPolicyValue(
        value=value,
        low=low,
        high=high,
        per_list=per_list,
        effective_size=float(last.sum() ** 2 / np.square(last).sum()) if last.any() else 0.0,
        mean_weight=float(last.mean()),
        largest_weight=float(used.max()),
        clipped=float((exact > limit).any(1).mean()),
    )


@torch.no_grad()
def score_rankings(
    model: Any,
    examples: Sequence[Example],
    rankings: np.ndarray,
    *,
    separator: Sequence[int] = (),
    end: Sequence[int] = (),
    temperature: float = 1.0,
    batch_size: int = 64,
) -> LoggedScores:
    """Exact log-probs of logged rankings under a model, and what the examples' gains guess of them.

    Args:
        model: a causal language model, as for ``FlexRecTrainer``; it is used in evaluation mode.
        examples: N lists; their gains, the critic's where nothing was observed, are the guess.
        rankings: (N, T) integer, index into each example's candidates, -1 beyond a row's own.
        separator, end: token ids between two items of an answer and after the last, as of the prompts' builder.
        temperature: of the policy.
        batch_size: lists at a time.

    Raises:
        ValueError: rankings that are none of their candidates, or not one for each example.

    Example:
        >>> from flexrec.evaluation import score_rankings
        >>> some = [examples[0], examples[1]]  # as in FlexRecTrainer's example
        >>> logged = np.array([[0, 1], [2, 0]])
        >>> scores = score_rankings(model, some, logged, end=examples.task.builder.end)
        >>> scores.logprobs.shape, float(scores.predicted[1, 0]) == float(some[1].gains[2])
        ((2, 2), True)
    """
    rankings = np.asarray(rankings)
    if rankings.ndim != 2 or len(rankings) != len(examples):
        raise ValueError(f"rankings must have shape ({len(examples)}, T), one for each example, got {rankings.shape}")
    training = model.training
    model.eval()  # dropout would make of the policy another one for each list
    try:
        parts = [
            _score(model, examples[i : i + batch_size], rankings[i : i + batch_size], separator, end, temperature)
            for i in range(0, len(examples), batch_size)
        ]
    finally:
        model.train(training)
    expected = [part.expected for part in parts if part.expected is not None]
    return LoggedScores(
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.predicted for part in parts]),
        np.concatenate(expected) if len(expected) == len(parts) else None,
    )


def _score(
    model: Any,
    examples: Sequence[Example],
    rankings: np.ndarray,
    separator: Sequence[int],
    end: Sequence[int],
    temperature: float,
) -> LoggedScores:
    device = next(model.parameters()).device
    batch = make_batch(
        *prompts_and_candidates(examples), rankings.astype(np.int64), separator=separator, end=end, device=device
    )
    shown = rankings >= 0
    width = max(len(example.gains) for example in examples)
    gains = np.zeros((len(examples), width))
    for row, example in zip(gains, examples, strict=True):
        row[: len(example.gains)] = example.gains
    predicted = np.where(shown, np.take_along_axis(gains, np.maximum(rankings, 0), axis=1), 0.0)
    states = ranking_states(model, batch)
    if batch.candidate_ids is None:
        logprobs = ranking_scores(states, batch, temperature=temperature).logprobs
        return LoggedScores(_on_ranks(logprobs, shown), predicted, None)
    order = rank_order(batch.rankings, batch.lengths, width)  # (N, K)
    values = torch.from_numpy(gains).float().to(device).gather(1, order)
    rows = output_rows(states, batch)
    logprobs, _, means = ranking_logprobs(
        *(states.hidden, rows.weight, rows.candidates, completed_rankings(batch)),
        values=values[:, :, None],
        bias=rows.bias,
        temperature=temperature,
        lengths=batch.lengths,
    )
    assert means is not None
    return LoggedScores(_on_ranks(logprobs, shown), predicted, _on_ranks(means[:, :, 0], shown))


def _on_ranks(values: torch.Tensor, shown: np.ndarray) -> np.ndarray:
    """(N, T) float64, 0 where nothing was shown."""
    return np.where(shown, values.double().cpu().numpy(), 0.0)


def _self_normalised(used: np.ndarray, gains: np.ndarray) -> tuple[float, np.ndarray]:
    """The estimate, and (N,) of which it is the mean; a rank that the policy never reaches in the log has none."""
    means = used.mean(0)
    per_list = (used * gains / np.where(means > 0, means, 1.0)).sum(1)
    return float(per_list.mean()), per_list


def _ratio_interval(
    used: np.ndarray, gains: np.ndarray, users: np.ndarray | None, level: float, num_samples: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap of a sum of ratios: numerators and denominators of one sample are of the same users."""
    ranks = used.shape[1]
    sums, counts = cluster_sums([*(used * gains).T, *used.T], users)
    if len(counts) == 1:
        return float("nan"), float("nan")
    values = []
    for totals, _ in resampled(sums, counts, num_samples, seed):
        above, below = totals[:, :ranks], totals[:, ranks:]
        values.append((above / np.where(below > 0, below, 1.0)).sum(1))
    return interval_of(np.concatenate(values), level)


def _logprobs(name: str, values: np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} must have shape (N, T) or (N,) with N and T of at least 1, got {np.shape(values)}")
    wrong = ~(array <= 1e-6)
    if wrong.any():
        raise ValueError(f"{name} must be log-probs, at most 0, got {array[wrong][0]}")
    return array


def _numbers(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, as the log-probs, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    return array
