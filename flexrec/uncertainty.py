"""How sure a reward is: the variance of swap rewards, and weights that make a policy update listen to it.

With independent gain variances v_i and the normaliser held fixed, a reward that is linear in the term gains,
r_k = sum_i a_ki w_i, has Var[r_k] = sum_i a_ki^2 v_i. For causal swaps a_kk = mean over j > k of (d_k - d_j) and
a_kj = -(d_k - d_j) / n, n the candidates behind k (see ``flexrec.ops.swap_rewards_torch``), so that

    Var[r_k] = a_kk^2 v_k + (d_k^2 V - 2 d_k V' + V'') / n^2,   V, V', V'' = sums over j > k of v_j, d_j v_j, d_j^2 v_j:

O(K) per list. The other credits change only which ranks the sums run over.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from flexrec.checks import check_choice, check_finite, check_range, check_tensor
from flexrec.metrics import (
    FAMILIES,
    Ingredients,
    Lists,
    Metric,
    check_gain_values,
    check_lists,
    ingredients,
    parse_metric,
    result_dtype,
)
from flexrec.ops.swap_rewards import CREDITS, check_policy_weights, resolve_backend, triton_rewards_with_variance
from flexrec.ops.swap_rewards_cpu import numba_rewards_with_variance
from flexrec.ops.swap_rewards_torch import policy_shares, rewards_of

WITH_VARIANCE = tuple(name for name, family in FAMILIES.items() if family.form in ("linear", "cascade"))


def swap_rewards_with_variance(
    gains: torch.Tensor,
    variance: torch.Tensor,
    metric: str | Metric,
    *,
    credit: str = "swap",
    lengths: int | torch.Tensor | None = None,
    num_ranked: int | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards as ``swap_rewards`` gives them, and their variance when the gains are uncertain.

    Gains of different items are independent, normalisers (and ``err``'s largest gain) are held fixed. Then the variance

    - of dcg and ndcg is exact;
    - of recall, precision and rbp is exact too, their gains being read as probabilities of relevance instead of being
      thresholded: the rewards are those of the expected relevance, and so is recall's normaliser;
    - of dcg_burges, ndcg_burges and err is a first-order propagation: (d reward / d gain)^2 x variance, summed.

    Args:
        gains: (N, K) floating, >= 0, in rank order; within [0, 1] for recall, precision and rbp.
        variance: (N, K) floating, >= 0, of each gain, in squared units of the gain.
        metric, credit, lengths, num_ranked, weights: as for ``swap_rewards``.
        backend: "auto" (numba on the CPU, Triton on a GPU, torch for what these cannot), "numba" (CPU, O(K) per list,
            any credit but "policy"), "triton" (the same for linear metrics, in the launch that computes the rewards),
            "torch" (anywhere; O(K) per list, but err takes K passes over each, and "policy" is O(K^2), for err O(K^3)).

    Returns:
        (N, K) rewards and (N, K) variances, float64 for float64 gains, else float32; 0 beyond lengths and
        ``num_ranked``. No gradient.

    Raises:
        ValueError, TypeError: as ``swap_rewards``; a negative or non-finite variance; a metric without a variance.
    """
    metric = parse_metric(metric)
    if metric.family not in WITH_VARIANCE:
        raise ValueError(f"metric {str(metric)!r} has no reward variance; those that have: {', '.join(WITH_VARIANCE)}")
    check_choice("credit", credit, CREDITS)
    lists = check_lists(gains, metric, lengths, num_ranked, values=False)
    check_policy_weights(weights, credit, lists)
    check_tensor("variance", variance, tuple(lists.gains.shape))
    if variance.device != lists.gains.device:
        raise ValueError(f"variance must be on the device of gains, {lists.gains.device}; got {variance.device}")
    chosen = _resolve_backend(backend, metric, credit, lists.gains)
    if chosen == "numba":
        rewards, spread, is_good = numba_rewards_with_variance(lists, variance.detach(), metric, credit)
        if not is_good:
            _check_values(variance, lists, metric)
    elif chosen == "triton":
        _check_values(variance, lists, metric)
        rewards, spread = triton_rewards_with_variance(lists, variance.detach(), metric, credit)
    else:
        _check_values(variance, lists, metric)
        rewards, spread = _torch_rewards_with_variance(lists, variance.detach(), metric, credit, weights)
    dtype = result_dtype(lists.gains)
    return rewards.to(dtype), spread.to(dtype)


def _resolve_backend(backend: str, metric: Metric, credit: str, gains: torch.Tensor) -> str:
    chosen = resolve_backend(backend, metric, gains)
    is_linear = metric.definition.form == "linear"
    if chosen == "torch" or (credit != "policy" and (chosen == "numba" or is_linear)):
        return chosen
    if backend == "auto":
        return "torch"
    computed = "any metric" if chosen == "numba" else "linear metrics"
    raise ValueError(
        f"backend={backend!r} computes variances of {computed} with any credit but 'policy'; "
        f"got metric={str(metric)!r} and credit={credit!r}. backend='torch' computes all"
    )


def _torch_rewards_with_variance(
    lists: Lists, variance: torch.Tensor, metric: Metric, credit: str, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) float64 rewards and variances."""
    definition = metric.definition
    parts = ingredients(lists, metric, probabilities=True)
    v = torch.where(parts.inside, variance.double(), 0.0)  # (N, K), of the gain ..
    if definition.gain in ("burges", "burges_scaled", "stop"):
        # .. and of the term gain: d/dg 2^g = ln 2 x 2^g, over 2^top where the term gains are.
        g = torch.where(parts.inside, lists.gains.double(), 0.0)
        if definition.gain != "burges" and g.shape[1]:
            g = g - (g.amax(-1, keepdim=True) if metric.max_gain is None else metric.max_gain)
        v = v * (math.log(2.0) * torch.exp2(g)) ** 2
    rewards = rewards_of(parts, metric, credit, weights)
    if definition.form == "cascade":
        spread = _first_order_variance(parts, v, metric, credit, weights)
    else:
        spread = _linear_variance(parts, v, credit, weights) * parts.inverse_norm**2
    position = torch.arange(v.shape[1], device=v.device)  # (K,)
    return rewards, torch.where(position < parts.num_ranked, spread, 0.0)


def _check_values(variance: torch.Tensor, lists: Lists, metric: Metric) -> None:
    check_gain_values(lists, metric)
    inside = torch.arange(variance.shape[1], device=variance.device) < lists.real_lengths[:, None]
    check_finite("variance", variance, inside)
    check_range("variance", variance, 0.0, math.inf, inside)
    if metric.definition.gain == "binary":
        check_range(f"gains, as probabilities of relevance for {metric.family},", lists.gains, 0.0, 1.0, inside)


def _linear_variance(parts: Ingredients, v: torch.Tensor, credit: str, weights: torch.Tensor | None) -> torch.Tensor:
    """(N, K) float64: Var[r_k] times the squared normaliser, from the variances v (N, K) of the term gains."""
    d, inside = parts.discount, parts.inside.double()  # (N, K)
    if credit == "policy":
        assert weights is not None
        effect = policy_shares(weights, parts.length) * (d[:, :, None] - d[:, None, :])  # (N, K, K)
        return effect.sum(-1) ** 2 * v + (effect**2 * v[:, None, :]).sum(-1)
    if credit == "independent":
        return d**2 * v

    def pool(x: torch.Tensor) -> torch.Tensor:  # (N, K): sum over the ranks that k is compared with
        total = x.sum(-1, keepdim=True)
        return total - x if credit == "noncausal" else x.flip(-1).cumsum(-1).flip(-1) - x

    if credit == "rank":
        return pool(d**2 * v) + d**2 * v
    if credit == "sequence":
        return (d**2 * v).sum(-1, keepdim=True).expand_as(v)
    n = pool(inside).clamp(min=1)  # (N, K)
    own = d * pool(inside) - pool(d)  # (N, K)
    others = d**2 * pool(v) - 2 * d * pool(d * v) + pool(d**2 * v)  # (N, K)
    return (own**2 * v + others.clamp(min=0)) / n**2


def _first_order_variance(
    parts: Ingredients, v: torch.Tensor, metric: Metric, credit: str, weights: torch.Tensor | None
) -> torch.Tensor:
    """(N, K) float64: sum over i of (d r_k / d w_i)^2 v_i, by one backward pass for each rank k."""
    spread = torch.zeros_like(v)
    with torch.enable_grad():
        w = parts.weight.detach().requires_grad_()
        rewards = rewards_of(replace(parts, weight=w), metric, credit, weights)
        for k in range(v.shape[1]):
            (slope,) = torch.autograd.grad(rewards[:, k].sum(), w, retain_graph=True)
            spread[:, k] = (slope**2 * v).sum(-1)
    return spread


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
