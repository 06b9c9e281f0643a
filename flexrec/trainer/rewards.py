"""What the rankings of a batch earn, each by the metric of its need.

Most needs value items, and share the metric that is trained. A need that values a list as a whole names a metric of its
own, so that a batch may hold rankings of several: they are told apart here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexrec.metrics import FAMILIES, Metric, parse_metric
from flexrec.ops.ranking_metric import Topics, ranking_metric
from flexrec.ops.swap_rewards import WITH_VARIANCE, swap_rewards, swap_rewards_with_variance, swap_scores
from flexrec.task.examples import Example

MAX_SORTED = 1 << 24  # as many as torch's quantile takes


class Part(NamedTuple):
    """The rankings of a batch that share a metric."""

    metric: Metric
    rows: Tensor  # (R,) int64, which of the N rankings
    topics: Topics | None  # of these, in rank order
    has_variance: bool  # whether what they earn is weighted by how sure it is


def parts_of(examples: Sequence[Example], metric: str, order: Tensor, num_generations: int) -> list[Part]:
    """The parts of a batch of N = P G rankings.

    Args:
        examples: P prompts.
        metric: of the needs that value items; its cutoff is that of the others.
        order: (N, K), the candidate at each position in rank order.
        num_generations: G.
    """
    trained, found = parse_metric(metric), []
    for name in dict.fromkeys(example.metric for example in examples):
        prompts = [p for p, example in enumerate(examples) if example.metric == name]
        rows = torch.tensor(prompts, device=order.device)[:, None] * num_generations
        rows = (rows + torch.arange(num_generations, device=order.device)).flatten()  # (R,)
        if name is None:
            found.append(Part(trained, rows, None, has_variance=True))
            continue
        own = replace(parse_metric(name), cutoff=trained.cutoff)
        tables = [torch.from_numpy(example.topics) for example in examples if example.metric == name]
        starts = torch.tensor([0, *(len(table) for table in tables[:-1])], device=order.device).cumsum(0)
        items = order[rows] + starts.repeat_interleave(num_generations)[:, None]  # (R, K), of the tables end to end
        matrix = torch.cat(tables).to(order.device)
        topics = Topics(matrix, items.clamp(max=len(matrix) - 1))  # what lies beyond a list's length is not read
        found.append(Part(own, rows, topics, has_variance=own.family in WITH_VARIANCE))
    return found


def values_of(parts: Sequence[Part], gains: Tensor, lengths: Tensor, num_ranked: int) -> Tensor:
    """(N,) the metric of each ranking; ``gains`` (N, K) in rank order."""

    def value(part: Part) -> Tensor:
        rows = part.rows
        return ranking_metric(
            gains[rows], part.metric, lengths=lengths[rows], num_ranked=num_ranked, topics=part.topics
        )

    return _joined(parts, gains.new_empty(len(gains)), value)


def scores_of(parts: Sequence[Part], gains: Tensor, lengths: Tensor, num_ranked: int) -> Tensor:
    """(N, K, K) swap scores."""

    def scores(part: Part) -> Tensor:
        rows = part.rows
        return swap_scores(gains[rows], part.metric, lengths=lengths[rows], num_ranked=num_ranked, topics=part.topics)

    return _joined(parts, gains.new_empty(*gains.shape, gains.shape[1]), scores)


def rewards_of(
    parts: Sequence[Part],
    gains: Tensor,
    variance: Tensor | None,
    credit: str,
    weights: Tensor | None,
    lengths: Tensor,
    num_ranked: int,
) -> tuple[Tensor, Tensor | None]:
    """(N, K) rewards and, where ``variance`` (N, K) of the gains is given, their variance: 0 in parts without one."""

    def rewards(part: Part) -> Tensor:
        """(2, R, K)"""
        rows = part.rows
        common: dict[str, Any] = {"credit": credit, "lengths": lengths[rows], "num_ranked": num_ranked}
        if weights is not None:
            common["weights"] = weights[rows]
        if variance is not None and part.has_variance:
            known = gains[rows]
            if FAMILIES[part.metric.family].gain == "binary":  # probabilities of relevance, which draws may exceed
                known = known.clamp(max=1.0)
            return torch.stack(swap_rewards_with_variance(known, variance[rows], part.metric, **common))
        found = swap_rewards(gains[rows], part.metric, topics=part.topics, **common)
        return torch.stack([found, torch.zeros_like(found)])

    found, spread = _joined(parts, gains.new_empty(2, *gains.shape), rewards, dim=1)
    return found, None if variance is None else spread


def have_variance(parts: Sequence[Part], like: Tensor) -> Tensor:
    """(N,) bool: whose rewards are weighted by how sure they are; on the device of ``like`` (N, ..)."""
    mask = torch.zeros(len(like), dtype=torch.bool, device=like.device)
    return _joined(parts, mask, lambda part: torch.full_like(part.rows, part.has_variance, dtype=torch.bool))


def gains_of(examples: Sequence[Example], *, pessimism: float, rng: np.random.Generator | None) -> list[np.ndarray]:
    """What the candidates of each example count as: their gains, or, by ``rng``, ones drawn from what these may be;
    less ``pessimism`` standard deviations, and never less than 0."""
    gains = [example.gains if rng is None else drawn_gains(example, rng) for example in examples]
    doubts = [np.float32(pessimism) * np.sqrt(example.variance) for example in examples]
    return [np.maximum(gain - doubt, np.float32(0.0)) for gain, doubt in zip(gains, doubts, strict=True)]


def drawn_gains(example: Example, rng: np.random.Generator) -> np.ndarray:
    """(K,) float32: gains drawn from the gamma distributions of their means and variances, which are never negative."""
    mean, variance = example.gains.astype(np.float64), example.variance.astype(np.float64)
    uncertain = (variance > 0) & (mean > 0)
    scale = np.where(uncertain, variance, 1.0) / np.where(uncertain, mean, 1.0)
    drawn = rng.gamma(np.where(uncertain, mean, 1.0) / scale, scale)
    return np.where(uncertain, drawn, mean).astype(np.float32)


def spread_of(weights: Tensor) -> dict[str, Tensor]:
    """Below which value a tenth, a half and nine tenths of the weights (M,) lie."""
    levels = torch.tensor([0.1, 0.5, 0.9], device=weights.device)
    found = torch.quantile(weights.detach().float()[:MAX_SORTED], levels)
    return {f"weight/p{name}": value for name, value in zip((10, 50, 90), found, strict=True)}


def shuffled(weights: Tensor, rng: np.random.Generator) -> Tensor:
    """``weights``, those that are not 0 changed about by chance."""
    positive = weights > 0
    order = rng.permutation(int(positive.sum()))
    result = weights.clone()
    result[positive] = weights[positive][torch.from_numpy(order).to(weights.device)]
    return result


def _joined(parts: Sequence[Part], out: Tensor, of_part: Callable[[Part], Tensor], dim: int = 0) -> Tensor:
    """``out`` with what ``of_part`` finds for each part at its rows along ``dim``."""
    for part in parts:
        out.index_copy_(dim, part.rows, of_part(part).to(out.dtype))
    return out
