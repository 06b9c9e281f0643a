"""Batches of several metrics: each ranking earns what its own need values, whoever stands beside it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from flexrec.ops.rank_order import rank_order
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.ops.swap_rewards import swap_rewards, swap_rewards_with_variance, swap_scores
from flexrec.task.examples import Example
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer
from flexrec.trainer.rewards import have_variance, parts_of, rewards_of, scores_of, values_of
from flexrec.trainer.supervised import SupervisedTrainer

sys.path.insert(0, str(Path(__file__).parent))

from by_hand import EXAMPLES, model_of, trainer_of

TOPICS = [np.eye(3, dtype=np.float32)[rows] for rows in ([0, 0, 1, 2, 1], [1, 2])]
OF_TOPICS = [
    replace(example, need="diverse", metric=metric, topics=topics)
    for example, topics, metric in zip(EXAMPLES, TOPICS, ("alpha_ndcg", "err_ia"), strict=True)
]
OTHER = replace(OF_TOPICS[1], topics=np.eye(3, dtype=np.float32)[[1, 1]])  # of the same metric, and all of one topic
MIXED = [OF_TOPICS[1], EXAMPLES[0], OF_TOPICS[0], EXAMPLES[1], OTHER]
RANKINGS = torch.tensor(
    [
        *([1, 0, -1], [0, 1, -1]),  # two rankings of each example, three ranks
        *([4, 0, 2], [0, 1, 2]),
        *([3, 1, 4], [1, 4, 0]),
        *([0, 1, -1], [0, 1, -1]),
        *([0, 1, -1], [1, 0, -1]),
    ]
)
METRIC = "ndcg@2"


@pytest.fixture
def batch():
    """Parts of a mixed batch with its gains, variances, lengths, and every ranking's example and order."""
    lengths = torch.tensor([len(example.gains) for example in MIXED]).repeat_interleave(2)
    order = rank_order(RANKINGS, lengths, 5)
    of_ranking = [example for example in MIXED for _ in range(2)]
    gains, variance = torch.zeros(2, 10, 5)
    for n, example in enumerate(of_ranking):
        own = order[n, : len(example.gains)]
        gains[n, : len(own)] = torch.from_numpy(example.gains)[own]
        variance[n, : len(own)] = torch.from_numpy(example.variance)[own]
    return parts_of(MIXED, METRIC, order, 2), gains, variance, lengths, of_ranking, order


def alone(n, gains, lengths, of_ranking, order):
    """Arguments of ranking n by itself."""
    example, size = of_ranking[n], int(lengths[n])
    metric = METRIC if example.metric is None else f"{example.metric}@2"
    options = {"num_ranked": min(3, size)}
    if example.topics is not None:
        options["topics"] = torch.from_numpy(example.topics)[order[n, :size]][None]
    return (gains[n : n + 1, :size], metric), options


def test_every_ranking_earns_what_it_would_alone(batch):
    parts, gains, variance, lengths, of_ranking, order = batch
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(10))
    values, scores = values_of(parts, gains, lengths, 3), scores_of(parts, gains, lengths, 3)
    rewards, spread = rewards_of(parts, gains, variance, "swap", None, lengths, 3)
    certain, nothing = rewards_of(parts, gains, None, "swap", None, lengths, 3)
    assert nothing is None
    torch.testing.assert_close(certain, rewards)
    for n in range(10):
        given, options = alone(n, gains, lengths, of_ranking, order)
        size = given[0].shape[1]
        torch.testing.assert_close(values[n : n + 1], ranking_metric(*given, **options))
        torch.testing.assert_close(scores[n : n + 1, :size, :size], swap_scores(*given, **options))
        torch.testing.assert_close(rewards[n : n + 1, :size], swap_rewards(*given, **options))
        expected = torch.zeros(1, size)
        if of_ranking[n].metric is None:
            expected = swap_rewards_with_variance(given[0], variance[n : n + 1, :size], given[1], **options)[1]
        torch.testing.assert_close(spread[n : n + 1, :size], expected)
    assert have_variance(parts, gains).tolist() == [example.metric is None for example in of_ranking]


def test_policy_weights_go_to_their_rankings(batch):
    parts, gains, _, lengths, of_ranking, order = batch
    weights = torch.rand(10, 5, 5)
    rewards, _ = rewards_of(parts, gains, None, "policy", weights, lengths, 3)
    for n in range(10):
        given, options = alone(n, gains, lengths, of_ranking, order)
        size = given[0].shape[1]
        of_list = weights[n : n + 1, :size, :size].contiguous()
        expected = swap_rewards(*given, **options, credit="policy", weights=of_list)
        torch.testing.assert_close(rewards[n : n + 1, :size], expected)


@pytest.mark.parametrize("credit", ["all_actions", "swap"])
def test_a_mixed_batch_is_the_mean_of_its_parts(tmp_path, credit):
    """With nothing shared between them (no scale, no weights), losses add up by their numbers of items."""
    options = {"credit": credit, "scale": "none", "uncertainty": "none", "entropy_coef": 0.0, "metric": "dcg@2"}

    def loss(examples):
        trainer = trainer_of(tmp_path, **options)
        rollout = trainer._rollout(examples)  # the same order of every list, whatever else is in the batch
        trainer._rollout = lambda _: rollout._replace(rankings=np.array([[4, 0], [0, 4]] * len(examples)))
        value, metrics = trainer.ranking_loss(trainer.model, examples)
        return float(value), float(metrics["reward"])

    together = loss([EXAMPLES[0], OF_TOPICS[0]])
    apart = [loss([EXAMPLES[0]]), loss([OF_TOPICS[0]])]
    assert together == pytest.approx(tuple(np.mean(apart, axis=0)), rel=1e-4)
    assert apart[0] != pytest.approx(apart[1], rel=1e-2)


def test_what_has_no_variance_is_weighted_as_the_mean(tmp_path, monkeypatch):
    """Item by item rewards are weighted among themselves, and rewards of whole lists by 1."""
    from flexrec.trainer import flexrec as module

    seen = []

    def spy(logprobs, old, advantages, *args, **kwargs):
        seen.append(advantages)
        return policy_loss(logprobs, old, advantages, *args, **kwargs)

    policy_loss = module.policy_loss
    monkeypatch.setattr(module, "policy_loss", spy)
    examples = [EXAMPLES[0], OF_TOPICS[0], EXAMPLES[1]]
    advantages = {}
    for level in ("none", "rollout", "item"):
        trainer = trainer_of(tmp_path, credit="swap", uncertainty=level)
        trainer.ranking_loss(trainer.model, examples)
        advantages[level] = seen.pop()
    for level in ("rollout", "item"):
        torch.testing.assert_close(advantages[level][2:4], advantages["none"][2:4])
        assert not torch.allclose(advantages[level][:2], advantages["none"][:2])


def test_the_metric_of_the_needs_cannot_be_the_one_of_items(tmp_path):
    with pytest.raises(
        ValueError, match="metric='alpha_ndcg@5' values a list by its topics, which are those of a need"
    ):
        FlexRecConfig(output_dir=str(tmp_path), metric="alpha_ndcg@5")


# ------------------------------------------------------------------------------------------------------ what is learnt


def alike(index: int = 0) -> Example:
    """Two items of one topic that are liked best, and one of another that is liked less."""
    order = np.roll(np.arange(4), index)
    return Example(
        prompt=[1, 2, 3],
        candidates=[[token] for token in np.array([10, 11, 12, 13])[order]],
        gains=np.array([1.0, 0.95, 0.7, 0.1], dtype=np.float32)[order],
        variance=np.zeros(4, dtype=np.float32),
        history_span=(1, 2),
        need="diverse",
        user=0,
        metric="alpha_ndcg",
        topics=np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=np.float32)[order],
    )


@pytest.mark.parametrize("credit", ["all_actions", "swap"])
def test_rewards_teach_that_the_second_is_to_differ_from_the_first(tmp_path, credit):
    examples = [alike(index) for index in range(64)]
    trainer = FlexRecTrainer(
        model_of(),
        FlexRecConfig(
            output_dir=str(tmp_path),
            max_steps=40,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            metric="ndcg@2",
            credit=credit,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        examples,
    )
    trainer.train()
    rollout = trainer._rollout(examples[:4])
    named = [
        {example.candidates[i][0] for i in ranking}
        for example, ranking in zip(examples, rollout.rankings.tolist(), strict=False)
    ]
    assert all(len(names & {10, 11}) == 1 and 12 in names for names in named), named


def test_supervision_imitates_the_greedy_order(tmp_path, monkeypatch):
    targets = []

    def spy(self, examples, rankings, *args, **options):
        targets.append(np.array(rankings))
        return batch(self, examples, rankings, *args, **options)

    batch = SupervisedTrainer._batch
    monkeypatch.setattr(SupervisedTrainer, "_batch", spy)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = SupervisedTrainer(model_of(), arguments, [alike()], stage="listwise", num_imitated=3)
    item_by_item = replace(alike(), metric=None, topics=None)
    trainer.ranking_loss(trainer.model, [alike(), alike(1), item_by_item])
    assert targets[0].tolist() == [[0, 2, 1], [1, 3, 2], [0, 1, 2]]
