"""Registers FlexRec with verl: importing this module is what the entry point ``verl.plugins`` does in every process.

After it ``algorithm.adv_estimator=flexrec`` and ``actor_rollout_ref.actor.policy_loss.loss_mode=flexrec`` work. Where a
plugin cannot be imported verl says so at debug level only; with the environment variable
``VERL_USE_EXTERNAL_MODULES=flexrec.integrations.verl_plugin`` it is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss

from flexrec.integrations.verl import item_advantage_estimator, item_policy_loss

NAME = "flexrec"

register_adv_est(NAME)(item_advantage_estimator)


@register_policy_loss(NAME)
def flexrec_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """:func:`flexrec.integrations.verl.item_policy_loss`, divided as verl divides a loss of the whole mini-batch.

    Clipping follows ``actor.clip_ratio``, ``clip_ratio_low`` and ``clip_ratio_high``; ``clip_ratio_c`` (dual clipping)
    is not used. KL and entropy are verl's own: ``actor.use_kl_loss`` and ``actor.entropy_coeff``.

    Raises:
        ValueError: ``loss_agg_mode="seq-mean-token-mean"``, which weighs a token by the length of its response.
    """
    if loss_agg_mode == "seq-mean-token-mean":
        raise ValueError(
            "actor.loss_agg_mode='seq-mean-token-mean' weighs the items of a long response less: use 'token-mean', "
            "'token-sum', 'seq-mean-token-sum' or 'seq-mean-token-sum-norm'"
        )
    low, high = config.clip_ratio_low, config.clip_ratio_high
    total, metrics = item_policy_loss(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        clip_ratio_low=config.clip_ratio if low is None else low,
        clip_ratio_high=config.clip_ratio if high is None else high,
        rollout_is_weights=rollout_is_weights,
    )
    # These modes weigh all tokens alike, so the sum may be spread evenly over the tokens for verl to add up again.
    spread = (total / response_mask.sum().clamp(min=1)).expand(log_prob.shape)
    loss = agg_loss(loss_mat=spread, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    return loss, metrics
