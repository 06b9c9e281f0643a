"""Advantages: item rewards of a batch of rankings, centred, scaled, and weighted by how sure they are."""

from __future__ import annotations

import math

import torch

from flexrec.checks import check_choice, check_finite, check_range, check_tensor
from flexrec.metrics import BASELINES, SCALES
from flexrec.ops.ranking_metric import result_dtype

# Which dimensions of (P, G, K) = (prompts, generations, ranks) a statistic runs over.
_DIMENSIONS = {"rank": (1,), "group": (1, 2), "batch": (0, 1, 2)}


def item_advantages(
    item_rewards: torch.Tensor,
    num_generations: int,
    *,
    baseline: str = "none",
    scale: str = "batch",
    item_mask: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advantage of every ranked item: (item reward - baseline) / scale * weight.

    Swap rewards are differences already, so by default nothing is subtracted, and one number for the whole batch
    sets the scale: subtracting a mean per rank costs nothing in expectation, dividing by a spread per rank turns the
    gradient away from the true one. ``baseline="rank", scale="rank"`` is the habit of GRPO (arXiv 2402.03300).

    The spread is the root mean square of what is left after the baseline, which is the standard deviation (about
    the baseline, divided by n) and not about a second mean: scaling never changes the sign of an advantage. What
    is left is taken for 0 where it is no more than rounding of the rewards it was computed from, so a group of
    equal rewards gets exactly 0, whatever the scale.

    Args:
        item_rewards: (N, K) floating, in rank order; rollouts of one prompt adjacent, N = prompts * num_generations.
        num_generations: G, rollouts per prompt.
        baseline: "none"; "rank", the mean over the G rollouts of a prompt at the same rank; "group", the mean over
            all ranks of all rollouts of a prompt.
        scale: the spread "rank" (over the G rollouts at one rank; with G = 1 only the sign remains), "group" (over
            all ranks and rollouts of a prompt) or "batch" (over everything in this tensor), or "none".
        item_mask: (N, K) bool, True where there is a ranked item. Masked rewards enter no mean and no spread (they
            may be NaN) and their advantage is exactly 0. Ranks that were not ranked belong here too.
        weights: (N, 1) or (N, K) floating, >= 0, multiplied in last: see ``uncertainty_weights``.

    Returns:
        (N, K) advantages, without gradient, in the dtype and on the device of ``item_rewards``.

    Raises:
        ValueError: a wrong shape or choice, a reward that is not finite, a negative weight, N that is no multiple of
            G, and ``baseline="rank"`` with one rollout per prompt, where every advantage would be 0.
        TypeError: a wrong type or dtype.

    Example:
        >>> rewards = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # two rollouts of one prompt
        >>> flexrec.item_advantages(rewards, 2, baseline="rank", scale="none")
        tensor([[-1.,  0.],
                [ 1.,  0.]])
    """
    check_tensor("item_rewards", item_rewards, ("N", "K"))
    check_choice("baseline", baseline, BASELINES)
    check_choice("scale", scale, SCALES)
    if not isinstance(num_generations, int) or isinstance(num_generations, bool):
        raise TypeError(f"num_generations must be an int, got {type(num_generations).__name__}")
    rows, ranks = item_rewards.shape
    if num_generations < 1 or rows % num_generations:
        raise ValueError(f"num_generations must divide the {rows} rows of item_rewards, got {num_generations}")
    if baseline == "rank" and num_generations == 1:
        raise ValueError(
            "baseline='rank' with num_generations=1 subtracts every reward from itself and leaves no signal: "
            "use baseline='none' or 'group', or more generations"
        )
    if item_mask is None:
        item_mask = torch.ones_like(item_rewards, dtype=torch.bool)
    else:
        check_tensor("item_mask", item_mask, (rows, ranks), "bool")
    check_finite("item_rewards", item_rewards, item_mask)

    # float32 at least: squares of half-precision rewards would overflow or vanish.
    compute_dtype = torch.promote_types(item_rewards.dtype, torch.float32)
    grouped = (rows // num_generations, num_generations, ranks)
    mask = item_mask.reshape(grouped)  # (P, G, K)
    left = item_rewards.detach().to(compute_dtype).reshape(grouped).where(mask, 0.0)  # (P, G, K)

    if baseline != "none" and left.numel():
        dims = _DIMENSIONS[baseline]
        rounding = 8 * torch.finfo(compute_dtype).eps * left.abs().amax(dims, keepdim=True)
        centred = (left - _masked_mean(left, mask, dims)).where(mask, 0.0)
        left = centred.where(centred.abs() > rounding, 0.0)
    if scale != "none" and left.numel():
        dims = _DIMENSIONS[scale]
        # Relative to the largest value, so that tiny rewards do not vanish in the square.
        largest = left.abs().amax(dims, keepdim=True)
        relative = left / largest.where(largest > 0, 1.0)
        spread = _masked_mean(relative.square(), mask, dims).sqrt()
        left = relative / spread.where(spread > 0, 1.0)
    advantages = left.reshape(rows, ranks)

    if weights is not None:
        columns = 1 if isinstance(weights, torch.Tensor) and weights.shape[-1:] == (1,) else ranks
        check_tensor("weights", weights, (rows, columns))
        check_range("weights", weights, 0.0, torch.finfo(weights.dtype).max, item_mask if columns == ranks else None)
        advantages = (advantages * weights.detach().to(compute_dtype)).where(item_mask, 0.0)
    return advantages.to(item_rewards.dtype)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Mean over ``dims`` (kept) of ``values``, which are 0 where ``mask`` is False; 0 where nothing is left."""
    return values.sum(dims, keepdim=True) / mask.sum(dims, keepdim=True).clamp(min=1)


def uncertainty_weights(
    variance: torch.Tensor,
    num_generations: int,
    *,
    level: str = "rollout",
    eps: float = 1e-3,
    max_ratio: float = 10.0,
    item_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """c = 1 / (u + eps), divided by its mean over the group: the direction of an update kept, its strength scaled.

    (Uncertainty-aware GRPO, arXiv 2603.11901.) The mean keeps the learning rate's meaning; weights are then clamped to
    [1 / ``max_ratio``, ``max_ratio``], so that one certain rollout cannot silence the rest of its group.

    Args:
        variance: (N, K) floating, >= 0, of the item rewards; N = P * G, the G rollouts of one prompt adjacent.
        num_generations: G >= 1.
        level: "rollout": u is the rollout's variance summed over its items, the mean is over the group's rollouts (with
            G = 1 all weights are 1). "item": u is each item's own, the mean is over all items of the group.
        eps: > 0, in squared units of the reward: variances well below it make no difference.
        max_ratio: >= 1.
        item_mask: (N, K) bool, the items that count; all by default.

    Returns:
        (N, 1) for "rollout", (N, K) for "item", in the dtype of ``variance`` (float32 for half precision). 0 where
        there is no item to weigh.

    Raises:
        ValueError, TypeError: a wrong shape or dtype, a negative or non-finite variance, N not a multiple of G.

    Example:
        >>> variance = torch.tensor([[0.0, 0.1], [0.1, 0.2]])  # of the rewards of two rollouts of one prompt
        >>> flexrec.uncertainty_weights(variance, 2).round(decimals=2)
        tensor([[1.5000],
                [0.5000]])
    """
    check_tensor("variance", variance, ("N", "K"))
    check_choice("level", level, ("rollout", "item"))
    rows = variance.shape[0]
    if not isinstance(num_generations, int) or num_generations < 1 or rows % num_generations:
        raise ValueError(
            f"num_generations must be an integer >= 1 that divides the {rows} rows of variance, got {num_generations}"
        )
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    if not max_ratio >= 1:
        raise ValueError(f"max_ratio must be >= 1, got {max_ratio}")
    if item_mask is None:
        item_mask = torch.ones_like(variance, dtype=torch.bool)
    check_tensor("item_mask", item_mask, tuple(variance.shape), "bool")
    check_finite("variance", variance, item_mask)
    check_range("variance", variance, 0.0, math.inf, item_mask)

    u = torch.where(item_mask, variance.detach().double(), 0.0)  # (N, K)
    counted = item_mask  # (N, K), or (N, 1) below
    if level == "rollout":
        u, counted = u.sum(-1, keepdim=True), item_mask.any(-1, keepdim=True)  # (N, 1)
    c = torch.where(counted, 1.0 / (u + eps), 0.0)
    grouped, size = c.view(-1, num_generations * c.shape[1]), counted.view(-1, num_generations * c.shape[1])
    mean = grouped.sum(-1) / size.sum(-1).clamp(min=1)  # (P,)
    mean = mean.repeat_interleave(num_generations)[:, None]  # (N, 1)
    weight = (c / torch.where(mean > 0, mean, 1.0)).clamp(1.0 / max_ratio, max_ratio)
    return torch.where(counted, weight, 0.0).to(result_dtype(variance))
