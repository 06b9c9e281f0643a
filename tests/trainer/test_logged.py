"""Training on rankings that another policy had shown: weights by hand, clipped, and a policy that learns from them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flexrec.ops.swap_rewards import swap_rewards
from flexrec.task import LoggedRanking
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer
from flexrec.trainer.logged import importance_weights, logged_rankings

sys.path.insert(0, str(Path(__file__).parent))

import by_hand as hand
from by_hand import EXAMPLES, example_of, gradient, model_of


def shown(example, ranking, seed=0):
    """The example, shown in that order by a policy that knows no taste."""
    rng = np.random.default_rng(seed)
    return replace(example, logged=LoggedRanking(np.array(ranking), np.log(rng.uniform(0.2, 0.9, len(ranking)))))


LOGGED = [shown(EXAMPLES[0], [3, 1, 0, 4, 2]), shown(EXAMPLES[1], [1, 0], seed=1)]


def trainer_of(tmp_path, examples=LOGGED, model=None, **options):
    arguments = {"credit": "swap", "logged_clip": 2.0, "temperature": 0.3, "entropy_coef": 0.0, **options}
    args = FlexRecConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **arguments)
    return FlexRecTrainer(model or model_of(), args, examples)


def log_probs(model, example, ranking):
    """(T,) of each rank given those before it, from logits of the whole sequence."""
    tokens = example.prompt + [example.candidates[item][0] for item in ranking]
    logits = model(torch.tensor([tokens])).logits[0].double() / 0.3
    left, found = list(range(len(example.candidates))), []
    for rank, item in enumerate(ranking):
        of_left = logits[len(example.prompt) - 1 + rank, [example.candidates[i][0] for i in left]].log_softmax(0)
        found.append(of_left[left.index(item)])
        left.remove(item)
    return torch.stack(found)


@pytest.mark.parametrize("level", ["item", "sequence"])
@pytest.mark.parametrize("clip", [0.5, 3.0, 1e6])
@pytest.mark.parametrize("update", [0, 1])
def test_the_loss_by_hand(tmp_path, level, clip, update):
    trainer = trainer_of(tmp_path, logged_clip=clip, importance_level=level, num_iterations=2)
    if update:
        trainer.ranking_loss(trainer.model, LOGGED)
        hand.move(trainer.model)
        trainer.state.global_step = 1
    loss, metrics = trainer.ranking_loss(trainer.model, LOGGED)
    total, rows = 0.0, []
    for example in LOGGED:
        ranking = example.logged.ranking
        gains = torch.tensor(example.gains[ranking])[None]
        rows.append((example, swap_rewards(gains, "ndcg")[0].double()))
    unit = torch.cat([rewards for _, rewards in rows]).square().mean().sqrt()
    for example, rewards in rows:
        logps = log_probs(trainer.model, example, example.logged.ranking.tolist())
        ratios = logps.detach() - torch.tensor(example.logged.logprobs)
        ratios = ratios.sum().expand_as(ratios) if level == "sequence" else ratios
        weights = ratios.exp().clamp(max=clip)
        total = total - (weights * rewards / unit * logps).sum()
    found, expected = gradient(loss, trainer.model), gradient(total / 7, trainer.model)  # seven ranks in all
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-5)
    assert 0 <= float(metrics["logged/clipped"]) <= 1
    assert float(metrics["logged/weight_mean"]) <= clip


def test_clipping_bounds_the_weights():
    logprobs = torch.tensor([[0.0, -1.0, -50.0], [-0.1, 0.0, 0.0]], requires_grad=True)
    logged = torch.tensor([[-60.0, -1.0, -0.1], [-0.1, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    weights, told = importance_weights(logprobs, logged, mask, "item", 2.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert not weights.requires_grad
    assert told["logged/clipped"] == 0.25
    whole, _ = importance_weights(logprobs, logged, mask, "sequence", 3.0)
    torch.testing.assert_close(whole, torch.tensor([[3.0, 3.0, 3.0], [1.0, 0.0, 0.0]]))
    finite, _ = importance_weights(torch.zeros(1, 1), torch.full((1, 1), -1e4), mask[:1, :1], "item", 1e30)
    assert torch.isfinite(finite).all()


def test_rankings_are_cut_to_what_all_have_shown_and_the_metric_counts():
    pair = [shown(EXAMPLES[0], [3, 1, 0]), LOGGED[1]]
    rankings, logprobs = logged_rankings(pair, None)
    assert rankings.tolist() == [[3, 1, 0], [1, 0, -1]]
    assert logprobs[1, 2] == 0
    rankings, logprobs = logged_rankings(LOGGED, 2)
    assert rankings.tolist() == [[3, 1], [1, 0]]
    np.testing.assert_allclose(logprobs[0], LOGGED[0].logged.logprobs[:2], rtol=1e-6)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (EXAMPLES[0], "example 1 of the batch has none"),
        (shown(EXAMPLES[0], [1, 1]), "example 1 must name some of its 5 candidates once each"),
        (shown(EXAMPLES[0], [1, 5]), "must name some of its 5"),
        (shown(EXAMPLES[0], [-1]), "must name some of its 5"),
        (replace(EXAMPLES[0], logged=LoggedRanking(np.array([1, 2]), np.array([-1.0]))), "each of its 2 ranks"),
        (replace(EXAMPLES[0], logged=LoggedRanking(np.array([1]), np.array([0.5]))), "finite and at most 0"),
    ],
)
def test_what_is_no_log_is_refused(example, message):
    with pytest.raises(ValueError, match=message):
        logged_rankings([LOGGED[1], example], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 2}, "leave out num_generations"),
        ({"max_reasoning_tokens": 4}, "leave out max_reasoning_tokens"),
        ({"credit": "all_actions"}, "take credit='swap'"),
        ({"num_generations": 1, "baseline": "group"}, "baseline='none'"),
        ({"logged_clip": 0.0}, "logged_clip"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **options)


def world(size=160, seed=0):
    """Lists of five of eight items, of which some are liked whoever asks, shown by a policy that prefers the others."""
    rng = np.random.default_rng(seed)
    liked = np.array([1.0, 0.9, 0.8, 0.6, 0.4, 0.3, 0.1, 0.0])
    examples = []
    for _ in range(size):
        items = rng.permutation(8)[:5]
        example = example_of([1, 2, 3, 4], (10 + items).tolist(), liked[items].tolist(), [0.0] * 5)
        scores = -1.0 * liked[items]
        noise = rng.gumbel(size=5)
        ranking = np.argsort(-(scores + noise))  # of Plackett and Luce
        logprobs = [scores[i] - np.log(np.exp(scores[ranking[t:]]).sum()) for t, i in enumerate(ranking)]
        examples.append(replace(example, logged=LoggedRanking(ranking, np.array(logprobs))))
    return examples


@pytest.mark.parametrize("level", ["item", "sequence"])
def test_a_policy_learns_from_the_log_of_a_worse_one(tmp_path, level):
    examples, model = world(), model_of()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.2)  # knows nothing yet

    def probability_of_the_best():
        with torch.no_grad():
            logits = model(torch.tensor([[1, 2, 3, 4]])).logits[0, -1, 10:18] / 0.3
        return float(logits.softmax(0)[:3].sum())

    before = probability_of_the_best()
    trainer = trainer_of(
        tmp_path,
        examples,
        model,
        importance_level=level,
        logged_clip=5.0,
        max_steps=40,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10,
    )
    trainer.train()
    assert probability_of_the_best() > before + 0.3
    log = [entry for entry in trainer.state.log_history if "logged/clipped" in entry]
    assert len(log) == 4
    assert all(entry["logged/weight_mean"] <= 5.0 for entry in log)
