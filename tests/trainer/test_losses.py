"""The trainer's losses at options that are not their defaults, against those by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flexrec.ops.advantages import item_advantages, uncertainty_weights
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.ops.swap_rewards import swap_rewards_with_variance

sys.path.insert(0, str(Path(__file__).parent))

from by_hand import (
    EXAMPLES,
    GENERATIONS,
    MARKER,
    advantages_by_hand,
    all_actions_by_hand,
    by_hand,
    check_loss,
    gradient,
    model_of,
    move,
    spread,
    surrogate_by_hand,
    trainer_of,
    valued,
)


@pytest.mark.parametrize(
    "options",
    [
        {"uncertainty": "rollout"},
        {"uncertainty": "item", "num_ranked": 3},
        {"uncertainty": "none", "num_ranked": 3, "tilt": 0.2},
        {"uncertainty": "none", "scale": "none", "metric": "dcg@4"},
    ],
    ids=str,
)
def test_the_all_actions_loss_by_hand(tmp_path, options):
    reference = model_of(1)
    entropy_coef, beta = 0.07, 0.2
    trainer = trainer_of(tmp_path, reference, entropy_coef=entropy_coef, beta=beta, **options)
    loss, metrics = trainer.ranking_loss(trainer.model, EXAMPLES)

    rankings = trainer._kept[0].batch.rankings.numpy()
    shown, metric = rankings.shape[1], options.get("metric", "ndcg")
    assert shown == options.get("num_ranked", 4 if "@4" in metric else 5)
    of, scores = valued(rankings), by_hand(trainer.model, reference, rankings)
    per_item = all_actions_by_hand(scores, of, metric, shown, options.get("tilt"))
    rewards, variance = swap_rewards_with_variance(of.gains, of.variance, metric, lengths=of.lengths, num_ranked=shown)
    if options.get("scale") != "none":
        per_item = per_item / spread(rewards[:, :shown], of.mask)
    if options["uncertainty"] != "none":
        known = {"level": options["uncertainty"], "rewards": rewards[:, :shown], "item_mask": of.mask}
        weights = uncertainty_weights(variance[:, :shown], GENERATIONS, **known)
        assert weights[of.mask.any(1)].std() > 0.1
        per_item = per_item * weights
    per_item = -per_item - entropy_coef * scores.entropy + beta * scores.kl
    check_loss(loss, per_item[of.mask].mean(), trainer.model)

    value = ranking_metric(of.gains, metric, lengths=of.lengths, num_ranked=shown).mean()
    assert metrics["reward"].item() == pytest.approx(value.item(), rel=1e-5)
    for k in range(shown):  # lists that end before a rank do not count there
        of_rank = rewards[:, k][of.mask[:, k]].mean().item()
        assert metrics[f"reward/rank_{k + 1}"] == pytest.approx(of_rank, rel=1e-4, abs=1e-6)
    assert f"reward/rank_{shown + 1}" not in metrics
    assert ("weight/p50" in metrics) == (options["uncertainty"] != "none")
    if options["uncertainty"] != "none":
        for level in (10, 50, 90):
            expected = np.quantile(weights.expand(of.mask.shape)[of.mask].numpy(), level / 100)
            assert float(metrics[f"weight/p{level}"]) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["entropy"]) == pytest.approx(scores.entropy[of.mask].mean().item(), rel=1e-4)
    assert float(metrics["kl"]) == pytest.approx(scores.kl[of.mask].mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"credit": "swap", "uncertainty": "item", "num_ranked": 3},
        {"credit": "rank", "uncertainty": "rollout", "baseline": "rank", "scale": "group"},
        {"credit": "noncausal", "uncertainty": "none", "baseline": "group", "scale": "rank", "metric": "dcg"},
        {"credit": "independent", "uncertainty": "none", "scale": "none", "baseline": "group", "metric": "ndcg@3"},
        {"credit": "policy", "uncertainty": "none", "num_ranked": 3},
        {"credit": "policy", "uncertainty": "item", "scale": "none"},
        {"credit": "sequence", "uncertainty": "none", "baseline": "group", "importance_level": "sequence"},
    ],
    ids=str,
)
def test_the_policy_gradient_of_a_second_update_by_hand(tmp_path, options):
    """Ratios beyond both ends of a clip range of unequal ends, entropy, and a KL to a reference."""
    reference, low, high, entropy_coef, beta = model_of(1), 0.1, 0.25, 0.07, 0.2
    more = {"epsilon_low": low, "epsilon_high": high, "entropy_coef": entropy_coef, "beta": beta}
    trainer = trainer_of(tmp_path, reference, num_iterations=2, **more, **options)
    _, first = trainer.ranking_loss(trainer.model, EXAMPLES)
    assert float(first["ratio_mean"]) == 1
    rankings = trainer._kept[0].batch.rankings.numpy()
    old = by_hand(trainer.model, reference, rankings).logprobs.detach()
    move(trainer.model)
    trainer.state.global_step = 1
    loss, metrics = trainer.ranking_loss(trainer.model, EXAMPLES)
    np.testing.assert_array_equal(trainer._kept[0].batch.rankings, rankings)
    assert float(metrics["clip_fraction_low"]) > 0
    assert float(metrics["clip_fraction_high"]) > 0

    metric = options.get("metric", "ndcg")
    of, scores = valued(rankings), by_hand(trainer.model, reference, rankings)
    advantages = advantages_by_hand(of, scores, metric, options).of_items
    level = options.get("importance_level", "item")
    surrogate = surrogate_by_hand(scores.logprobs, old, advantages, of.mask, low, high, level)
    bonus = (beta * scores.kl - entropy_coef * scores.entropy)[of.mask]
    check_loss(loss, (bonus.sum() - surrogate) / of.mask.sum(), trainer.model)
    value = ranking_metric(of.gains, metric, lengths=of.lengths, num_ranked=rankings.shape[1]).mean()
    assert metrics["reward"].item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("uncertainty", ["none", "rollout", "item"])
@pytest.mark.parametrize("scale", ["none", "batch", "group"])
def test_reasoning_and_ranking_of_a_second_update_by_hand(tmp_path, scale, uncertainty):
    """The reasoning is trained by the metric of its ranking, against the mean of its prompt's."""
    reference, low, high, beta = model_of(1), 0.1, 0.25, 0.2
    options = {"credit": "swap", "scale": scale, "uncertainty": uncertainty}
    more = {"epsilon_low": low, "epsilon_high": high, "beta": beta, "entropy_coef": 0.0, "num_ranked": 3, "seed": 2}
    trainer = trainer_of(tmp_path, reference, [MARKER], max_reasoning_tokens=3, num_iterations=2, **more, **options)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    batch = trainer._kept[0].batch
    rankings, reasoning, mask = batch.rankings.numpy(), batch.reasoning, batch.reasoning_mask
    old = by_hand(trainer.model, reference, rankings, reasoning)
    move(trainer.model)
    trainer.state.global_step = 1
    loss, metrics = trainer.ranking_loss(trainer.model, EXAMPLES)

    of, new = valued(rankings), by_hand(trainer.model, reference, rankings, reasoning)
    items = advantages_by_hand(of, new, "ndcg", options)
    value = ranking_metric(of.gains, "ndcg", lengths=of.lengths, num_ranked=3)[:, None]  # (N, 1)
    one_by_one = "none" if scale == "batch" else scale
    advantages = item_advantages(value, GENERATIONS, baseline="group", scale=one_by_one) / items.unit
    if uncertainty == "item":
        advantages = advantages * items.certainty.sum(1, keepdim=True) / of.mask.sum(1, keepdim=True)
    else:
        advantages = advantages * items.certainty
    assert (advantages.abs() > 0.01).all(), "both prompts have rankings that differ"
    of_reasoning = surrogate_by_hand(
        new.reasoning, old.reasoning.detach(), advantages.expand(mask.shape), mask, low, high, "token"
    )
    away = (new.ref_reasoning.detach() - new.reasoning)[mask]
    kl = away.exp() - away - 1  # Schulman's k3 of KL(policy || reference)
    of_items = surrogate_by_hand(new.logprobs, old.logprobs.detach(), items.of_items, of.mask, low, high, "item")
    expected = beta * (kl.sum() + new.kl[of.mask].sum()) - of_reasoning - of_items
    check_loss(loss, expected / of.mask.sum(), trainer.model)
    assert float(metrics["reasoning/kl"]) == pytest.approx(kl.mean().item(), rel=1e-4)
    assert float(metrics["reasoning/ratio_mean"]) != 1
    assert float(metrics["reasoning/length"]) == np.mean([len(row) for row in reasoning.tokens])


@pytest.mark.parametrize("credit", ["all_actions", "swap"])
def test_the_unit_of_a_batch_is_that_of_all_processes(tmp_path, monkeypatch, credit):
    """With a second process that has the same items, all worth nothing, the unit is smaller by the root of 2."""
    losses = []
    for processes in (1, 2):
        trainer = trainer_of(tmp_path, credit=credit, uncertainty="none", entropy_coef=0.0)

        def reduce(tensor: torch.Tensor, reduction: str = "sum", count: int = processes) -> torch.Tensor:
            if tensor.dim() == 1 and len(tensor) == 2:  # sum of squares, and of items
                return torch.stack([tensor[0], count * tensor[1]])
            return tensor

        monkeypatch.setattr(trainer.accelerator, "reduce", reduce)
        losses.append(gradient(trainer.ranking_loss(trainer.model, EXAMPLES)[0], trainer.model))
    torch.testing.assert_close(losses[1], 2**0.5 * losses[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("credit", ["all_actions", "swap"])
def test_the_loss_is_this_process_s_share_of_everybodys(tmp_path, monkeypatch, credit):
    """A mean over items is taken over everybody's: with half as many items as the mean, the loss counts half."""
    found = []
    for share in (1.0, 0.5):
        trainer = trainer_of(tmp_path, credit=credit)
        asked = []
        monkeypatch.setattr(trainer, "share", lambda count, s=share, seen=asked: seen.append(int(count)) or s)
        loss, metrics = trainer.ranking_loss(trainer.model, EXAMPLES)
        assert asked == [GENERATIONS * (5 + 2)]
        found.append([loss.item(), *(float(metrics[name]) for name in ("reward", "entropy"))])
    (loss, reward, entropy), half = found
    assert half == pytest.approx([loss / 2, reward, entropy / 2])
