"""What sampling and searching return, and the best of several samples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flexrec.rankings.reasoning import ReasoningTokens


class Rollout(NamedTuple):
    """Sampled rankings: ``rankings`` (N, T) int32 candidate indices, -1 beyond a row's own; ``logprobs`` (N, T) float32
    of the items as they were sampled (0 where nothing was left to choose). Where reasoning came before them:
    ``reasoning``, and ``reasoning_logprobs`` (N, R) float32 of its sampled tokens, 0 behind a row's own.
    """

    rankings: np.ndarray
    logprobs: np.ndarray
    reasoning: ReasoningTokens | None = None
    reasoning_logprobs: np.ndarray | None = None


def best_of(rollout: Rollout, num_generations: int, scores: ArrayLike | None = None) -> Rollout:
    """The best of each prompt's ``num_generations`` rankings: best-of-n.

    Args:
        rollout: N = P * num_generations rankings.
        scores: (N,) what each is worth, say by a metric or a critic. By default its log-prob, reasoning included.

    Returns:
        P rankings; of equally good ones the first.

    Example:
        >>> from flexrec.decoding import Rollout, best_of
        >>> rankings, logprobs = np.array([[0, 1], [1, 0]]), np.array([[-0.7, 0.0], [-0.6, 0.0]])
        >>> best_of(Rollout(rankings, logprobs), 2).rankings
        array([[1, 0]])
        >>> best_of(Rollout(rankings, logprobs), 2, scores=[0.9, 0.3]).rankings
        array([[0, 1]])
    """
    rows = len(rollout.rankings)
    if num_generations < 1 or rows % num_generations:
        raise ValueError(f"num_generations must divide the {rows} rankings, got {num_generations}")
    if scores is None:
        worth = rollout.logprobs.sum(axis=1, dtype=np.float64)
        if rollout.reasoning_logprobs is not None:
            worth = worth + rollout.reasoning_logprobs.sum(axis=1, dtype=np.float64)
    else:
        worth = np.asarray(scores, dtype=np.float64)
        if worth.shape != (rows,):
            raise ValueError(f"scores must have shape ({rows},), one per ranking, got {worth.shape}")
        if np.isnan(worth).any():
            raise ValueError(f"scores must be numbers, got NaN at index {int(np.isnan(worth).argmax())}")
    best = np.arange(0, rows, num_generations) + worth.reshape(-1, num_generations).argmax(axis=1)  # (P,)
    reasoning, of_reasoning = rollout.reasoning, rollout.reasoning_logprobs
    return Rollout(
        rollout.rankings[best],
        rollout.logprobs[best],
        None if reasoning is None else reasoning.of_rows(best),
        None if of_reasoning is None else of_reasoning[best],
    )
