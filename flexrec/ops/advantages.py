"""Advantages: item rewards of a batch of rankings, centred, scaled, and weighted by how sure they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flexrec.checks import check_choice, check_finite, check_number, check_range, check_tensor
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
    eps: float | str = "auto",
    normalise: str = "batch",
    rewards: torch.Tensor | None = None,
    item_mask: torch.Tensor | None = None,
    max_ratio: float = 10.0,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """c = 1 / (u + eps), divided by its mean: the direction of an update kept, its strength scaled.

    (Uncertainty-aware GRPO, arXiv 2603.11901.) u is the variance of an item's reward, or summed over the items of a
    rollout. With s^2 = mean(r^2) - mean(u) what is left of the rewards' second moment without their noise, eps = s^2
    makes c proportional to s^2 / (s^2 + u): the best linear shrinkage of a reward that is known with variance u. The
    mean keeps the learning rate's meaning; weights are then clamped to [1 / ``max_ratio``, ``max_ratio``], so that one
    certain rollout cannot silence the rest.

    Args:
        variance: (N, K) floating, >= 0, of the item rewards; N = P * G, the G rollouts of one prompt adjacent.
        num_generations: G >= 1.
        level: "rollout": u is the rollout's variance summed over its items. "item": u is each item's own.
        eps: > 0, in squared units of the reward, or "auto": max(s^2, mean(r^2) / 100) over the batch with ``rewards``,
            r^2 and u at the same level; mean(u) without.
        normalise: what c is divided by: "batch", its mean over all rollouts or items of the batch, which acts with any
            number of rollouts; "group", its mean over those of one prompt (with one rollout per prompt all weights are
            then 1); "none", nothing, and it is not clamped either.
        rewards: (N, K) floating, the item rewards, for ``eps="auto"``.
        item_mask: (N, K) bool, the items that count; all by default.
        max_ratio: >= 1.
        reduce: takes a tensor of sums over this batch and returns their sums over all processes, such as
            ``accelerator.reduce``; called once for "auto" and once for "batch". Without it the batch is this tensor's.

    Returns:
        (N, 1) for "rollout", (N, K) for "item", in the dtype of ``variance`` (float32 for half precision). 0 where
        there is no item to weigh; 1 where nothing tells rewards from noise apart, as all of both are 0.

    Raises:
        ValueError, TypeError: a wrong shape or dtype, a negative or non-finite variance, a reward that is not finite,
            N not a multiple of G.

    Example:
        >>> variance = torch.tensor([[0.0, 0.1], [0.1, 0.2]])  # of the rewards of two rollouts of one prompt
        >>> flexrec.uncertainty_weights(variance, 2).round(decimals=2)
        tensor([[1.2500],
                [0.7500]])
    """
    check_tensor("variance", variance, ("N", "K"))
    check_choice("level", level, ("rollout", "item"))
    check_choice("normalise", normalise, ("batch", "group", "none"))
    rows = variance.shape[0]
    if not isinstance(num_generations, int) or num_generations < 1 or rows % num_generations:
        raise ValueError(
            f"num_generations must be an integer >= 1 that divides the {rows} rows of variance, got {num_generations}"
        )
    if not isinstance(eps, str):
        check_number("eps", eps)
    if eps != "auto" and (isinstance(eps, str) or not 0 < eps < math.inf):
        raise ValueError(f"eps must be > 0 and finite, or 'auto'; got {eps!r}")
    check_number("max_ratio", max_ratio)
    if not max_ratio >= 1:
        raise ValueError(f"max_ratio must be >= 1, got {max_ratio}")
    if item_mask is None:
        item_mask = torch.ones_like(variance, dtype=torch.bool)
    check_tensor("item_mask", item_mask, tuple(variance.shape), "bool")
    check_finite("variance", variance, item_mask)
    check_range("variance", variance, 0.0, math.inf, item_mask)
    if rewards is not None:
        check_tensor("rewards", rewards, tuple(variance.shape))
        check_finite("rewards", rewards, item_mask)

    def at_level(x: torch.Tensor) -> torch.Tensor:  # (N, 1) or (N, K) float64
        x = torch.where(item_mask, x.detach().double(), 0.0)
        return x.sum(-1, keepdim=True) if level == "rollout" else x

    def totals(*tensors: torch.Tensor) -> list[torch.Tensor]:
        sums = torch.stack([x.sum() for x in tensors])
        return list(sums if reduce is None else reduce(sums))

    u = at_level(variance)
    counted = item_mask.any(-1, keepdim=True) if level == "rollout" else item_mask  # as u
    weighed = counted.double()
    if eps != "auto":
        scale = torch.full((), float(eps), dtype=torch.float64, device=u.device)
    else:
        square = u if rewards is None else at_level(rewards.detach().double() ** 2)
        squares, noise, count = totals(square, u, weighed)
        signal = noise if rewards is None else torch.maximum(squares - noise, squares / 100)
        scale = signal / count.clamp(min=1)

    # eps / (u + eps) is c but for a factor, and within [0, 1].
    share = torch.where(scale > 0, scale / (u + scale), 1.0)
    if normalise == "none":
        weight = torch.where(scale > 0, share / scale, 1.0)
    else:
        if normalise == "batch":
            total, count = totals(share * weighed, weighed)
        else:
            total, count = (
                x.reshape(rows // num_generations, num_generations * u.shape[1])
                .sum(-1, keepdim=True)
                .repeat_interleave(num_generations, dim=0)
                for x in (share * weighed, weighed)
            )  # (N, 1)
        mean = total / count.clamp(min=1)
        weight = (share / torch.where(mean > 0, mean, 1.0)).clamp(1.0 / max_ratio, max_ratio)
    return torch.where(counted, weight, 0.0).to(result_dtype(variance))
