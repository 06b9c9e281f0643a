"""FlexRec in verl: a score, an advantage estimator and a policy loss with a reward for every ranked item.

This module needs no verl; :mod:`flexrec.integrations.verl_plugin` registers it there, and
:mod:`flexrec.integrations.verl_agent_loop` is where item rewards enter. See docs/verl.md.

verl hands an advantage estimator token-level rewards and nothing else of a response, and a policy loss advantages and
nothing else. Which token belongs to which item therefore travels in these numbers:

- **token rewards**: the last token of an item carries its reward. Any other token carries a *mark*, too small to count
  (below 1e-18): negative inside an item, positive elsewhere; its size is the variance of the response's rewards. No
  token of a response carries exactly 0, so rewards that come from elsewhere are noticed.
- **advantages**: every token of an item carries the item's advantage, and a token of no item exactly 0. The lowest bit
  of the number says whether the item's rank is even or odd, so that neighbours never carry the same number: items are
  the runs of equal advantages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from flexrec.checks import check_finite, check_tensor, values_are_checked
from flexrec.integrations.responses import GroundTruth, score_of, score_texts
from flexrec.ops.advantages import item_advantages, uncertainty_weights
from flexrec.ops.losses import policy_loss
from flexrec.rankings.text import item_values_to_tokens

ADVANTAGE_OPTIONS = ("baseline", "scale", "uncertainty")

# Powers of two, so that float32 holds what is scaled by them to the last bit.
_ZERO_REWARD = 2.0**-50  # stands for a reward of 0 at an item's end; a reward nearer to 0 becomes 0
_LARGEST_MARK = 2.0**-60
_PER_VARIANCE = 2.0**-90  # mark = variance * this; variances up to 2^30 fit
_SMALLEST = float(torch.finfo(torch.float32).tiny)  # 2^-126: a variance below 1.5e-11 counts as that


class ItemRewards(NamedTuple):
    """What token rewards say of N responses of L tokens that name up to K items, in rank order."""

    rewards: torch.Tensor
    """(N, K)"""
    item_mask: torch.Tensor
    """(N, K) bool: there is such an item, and its last token counts."""
    variance: torch.Tensor
    """(N,) variance of the rewards, summed over the items."""
    item_ids: torch.Tensor
    """(N, L) int64: the rank of the item that a token belongs to, -1 for none."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: GroundTruth,
    extra_info: Mapping[str, Any] | None = None,
    *,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    **options: Any,
) -> dict[str, float]:
    """The metric of one response, as verl's ``reward.custom_reward_function`` wants it: one number for a response.

    Args:
        solution_str: the response, without special tokens: items that are special tokens do not appear in it.
        ground_truth: see :mod:`flexrec.integrations.responses`.
        data_source, extra_info, reward_router_address, reward_model_tokenizer: passed by verl, not used.
        options: ``reward_kwargs`` of the configuration: metric, separator, num_ranked, reasoning_end, invalid as
            in :func:`flexrec.integrations.responses.score_texts`.

    Returns:
        "score" (the metric of what the response names), "acc" (the same, under the name that verl's validation puts
        first), "valid" (1 where the response is exactly a ranking), "repeated", "missing" and "unknown" (counts).

    Raises:
        ValueError, TypeError: as ``score_texts``.
    """
    return score_of(score_texts([solution_str], [ground_truth], **options), 0)


def pack_token_rewards(
    item_rewards: torch.Tensor, item_ids: torch.Tensor, variance: torch.Tensor | None = None
) -> torch.Tensor:
    """Token rewards that say which token belongs to which item; see the module.

    Args:
        item_rewards: (N, K) floating, finite, in rank order.
        item_ids: (N, L) integer, the rank of the item that a token belongs to, -1 for none; the tokens of an item are
            adjacent and ranks ascend without a gap.
        variance: (N, K) floating, >= 0, of the rewards; None: all are sure.

    Returns:
        (N, L) float32.

    Raises:
        ValueError: a variance above 2^30, or a response with a variance all of whose tokens end an item.
    """
    check_tensor("item_rewards", item_rewards, ("N", "K"))
    check_finite("item_rewards", item_rewards)
    check_tensor("item_ids", item_ids, (len(item_rewards), "L"), "integer")
    is_end = item_values_to_tokens(torch.ones_like(item_rewards), item_ids, at="end") > 0  # (N, L)
    at_end = item_values_to_tokens(item_rewards.float(), item_ids, at="end")  # (N, L)
    at_end = at_end.where(at_end.abs() > _ZERO_REWARD, _ZERO_REWARD)

    mark = torch.full((len(item_ids), 1), _SMALLEST, device=item_ids.device)  # (N, 1)
    if variance is not None:
        check_tensor("variance", variance, tuple(item_rewards.shape))
        ranked = torch.arange(variance.shape[1], device=variance.device) < is_end.sum(1, keepdim=True)  # (N, K)
        total = (variance.float() * ranked).sum(1, keepdim=True)  # (N, 1)
        if not bool((total * _PER_VARIANCE <= _LARGEST_MARK).all()):
            raise ValueError(
                f"variance must be finite and sum to at most 2^30 per response, got {float(total.max()):g}: "
                f"scale the gains"
            )
        if bool(((total > 0) & is_end.all(1, keepdim=True)).any()):
            raise ValueError(
                "a response whose every token ends an item has no token to carry the variance of its rewards: "
                "let it end with an end-of-sequence token, or leave out gain_variance"
            )
        mark = torch.maximum(total * _PER_VARIANCE, mark)
    return at_end.where(is_end, mark.where(item_ids < 0, -mark))


def unpack_token_rewards(token_rewards: torch.Tensor, response_mask: torch.Tensor) -> ItemRewards:
    """Read what :func:`pack_token_rewards` wrote.

    Args:
        token_rewards: (N, L) floating; anything where ``response_mask`` has been 0 from the start.
        response_mask: (N, L) bool or 0/1. Items whose last token does not count are not in ``item_mask``.

    Raises:
        ValueError: rewards that were not written so.
    """
    check_tensor("token_level_rewards", token_rewards, ("N", "L"))
    counted = response_mask.bool()
    foreign = counted & (token_rewards == 0)
    if values_are_checked(token_rewards) and bool(foreign.any()):
        raise ValueError(
            f"token_level_rewards do not say which tokens belong to which item (0 at index "
            f"{foreign.nonzero()[0].tolist()}): set actor_rollout_ref.rollout.agent.default_agent_loop=flexrec with "
            f"its agent_loop_config_path, and trainer.use_v1=True, see docs/verl.md"
        )
    is_end = token_rewards.abs() > _LARGEST_MARK  # (N, L)
    rank = is_end.cumsum(1) - is_end.long()  # (N, L) items that ended before
    item_ids = rank.where(is_end | (token_rewards < 0), -1)
    num_items = max(1, int(is_end.sum(1).max())) if is_end.numel() else 1
    rows, columns = is_end.nonzero(as_tuple=True)
    of_end = rows, rank[rows, columns]
    values = token_rewards.where(token_rewards.abs() > _ZERO_REWARD, 0.0)
    shape = len(token_rewards), num_items
    rewards = token_rewards.new_zeros(shape).index_put(of_end, values[rows, columns])
    item_mask = counted.new_zeros(shape).index_put(of_end, counted[rows, columns])
    marks = token_rewards.abs().where(~is_end, 0.0)
    largest = marks.amax(1) if marks.shape[1] else marks.new_zeros(len(marks))
    variance = largest.where(largest > _SMALLEST, 0.0) / _PER_VARIANCE
    return ItemRewards(rewards, item_mask, variance, item_ids)


def item_advantage_estimator(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any = None,
    index: ArrayLike | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's advantage estimator "flexrec": :func:`flexrec.item_advantages` of the items, at all of their tokens.

    Responses that share an ``index`` are a group, wherever they stand and however many they are.

    Args:
        token_level_rewards: (N, L) float32 of :func:`pack_token_rewards`.
        response_mask: (N, L) 0/1.
        config: ``config.algorithm``; its ``flexrec`` may hold ``baseline`` and ``scale`` of ``item_advantages`` and
            ``uncertainty``, "rollout" (weights of :func:`flexrec.uncertainty_weights`, the default) or "none".
        index: (N,) the prompt's uid.

    Returns:
        (N, L) float32 advantages, and the same as returns; 0 where a token belongs to no item or does not count.

    Raises:
        ValueError: rewards of another origin, no ``index``, an unknown option; ``algorithm.use_kl_in_reward``, which
            would put the divergence on top of marks and rewards alike.
    """
    options = _advantage_options(config)
    if index is None:
        raise ValueError("index must be the uid of every response's prompt, got None")
    found = unpack_token_rewards(token_level_rewards, response_mask)
    index = np.asarray(index)
    # Prompts without an item, with which verl fills batches up, are left out: they must not change a sum by rounding.
    counts = np.isin(index, index[found.item_mask.any(dim=1).cpu().numpy()])
    rows = torch.from_numpy(np.flatnonzero(counts if counts.any() else ~counts)).to(token_level_rewards.device)
    slots, num_generations = _group_slots(index[rows.cpu().numpy()])
    num_slots = num_generations * int(slots.max(initial=-1) // num_generations + 1)
    at = torch.from_numpy(slots).to(token_level_rewards.device)

    def grouped(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(num_slots, values.shape[1]).index_copy(0, at, values[rows])

    item_mask = grouped(found.item_mask)
    rewards, weights = grouped(found.rewards.float()), None
    if options.pop("uncertainty", "rollout") == "rollout":
        size = (
            torch.where(item_mask, rewards, 0.0).square().sum(1, keepdim=True).sqrt()
        )  # as a rollout's variance adds up
        weights = uncertainty_weights(
            grouped(found.variance[:, None]), num_generations, rewards=size, item_mask=item_mask.any(1, keepdim=True)
        )
    advantages = item_advantages(rewards, num_generations, item_mask=item_mask, weights=weights, **options)
    of_all = advantages.new_zeros(found.rewards.shape).index_copy(0, rows, _with_parity(advantages[at]))
    per_token = item_values_to_tokens(of_all, found.item_ids)
    per_token = per_token.where(response_mask.bool(), 0.0)
    return per_token, per_token


def item_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The clipped loss of :func:`flexrec.policy_loss` on item-level ratios, summed over the items.

    Args:
        old_log_prob, log_prob, advantages, response_mask: (N, L). Neighbouring tokens of equal advantage are an item.
        rollout_is_weights: (N, L) >= 0, multiplied into the advantages.

    Returns:
        A scalar and the metrics that verl logs.
    """
    starts = advantages.diff(dim=1, prepend=torch.zeros_like(advantages[:, :1])) != 0
    item_ids = starts.cumsum(1).where(advantages != 0, -1)
    loss, metrics = policy_loss(
        log_prob,
        old_log_prob,
        advantages if rollout_is_weights is None else advantages * rollout_is_weights,
        response_mask,
        item_ids=item_ids,
        advantage_level="token",
        epsilon_low=clip_ratio_low,
        epsilon_high=clip_ratio_high,
        loss_agg="sum",
    )
    clipped = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    logged = {"pg_clipfrac": clipped, "pg_clipfrac_lower": metrics["clip_fraction_low"], "ppo_kl": metrics["approx_kl"]}
    return loss, {f"actor/{name}": value.item() for name, value in logged.items()}


def _advantage_options(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if config.get("use_kl_in_reward", False):
        raise ValueError("algorithm.use_kl_in_reward must be False: use actor_rollout_ref.actor.use_kl_loss instead")
    options = dict(config.get("flexrec", None) or {})
    if not set(options) <= set(ADVANTAGE_OPTIONS):
        raise ValueError(f"algorithm.flexrec must hold no keys but {ADVANTAGE_OPTIONS}, got {sorted(options)}")
    if options.get("uncertainty", "rollout") not in ("rollout", "none"):
        raise ValueError(f"algorithm.flexrec.uncertainty must be 'rollout' or 'none', got {options['uncertainty']!r}")
    return options


def _group_slots(index: NDArray[Any]) -> tuple[NDArray[np.int64], int]:
    """(N,) rows of a batch in which groups are adjacent and of the largest group's size G, and G."""
    _, group, sizes = np.unique(index, return_inverse=True, return_counts=True)
    largest = int(sizes.max(initial=1))
    order = np.argsort(group, kind="stable")
    firsts = np.cumsum(sizes) - sizes
    within = np.empty(len(index), dtype=np.int64)
    within[order] = np.arange(len(index)) - np.repeat(firsts, sizes)
    return group.astype(np.int64) * largest + within, largest


def _with_parity(advantages: torch.Tensor) -> torch.Tensor:
    """``advantages`` (N, K) float32, none of them 0, the lowest bit that of the rank: neighbours are never equal."""
    nonzero = advantages.where(advantages.abs() > _SMALLEST, _SMALLEST)
    parity = torch.arange(advantages.shape[1], device=advantages.device, dtype=torch.int32) % 2
    return ((nonzero.view(torch.int32) & ~1) | parity).view(torch.float32)
