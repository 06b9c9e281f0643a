"""Credits that need the probability of every candidate in TRL: the gradients of FlexRecTrainer, and those by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flexrec
import flexrec.integrations.trl as adapter
import flexrec.trainer.flexrec
from flexrec.rankings import RankingState
from flexrec.rankings.text import index_labels
from flexrec.task.examples import Example
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer

sys.path.insert(0, str(Path(__file__).parent))

from tiny_trl import (
    GAINS,
    generate,
    logged,
    make_model,
    make_rows,
    make_tokenizer,
    make_trainer,
    seam,
    train_and_compare,
)

# TRL and transformers warn of each other, and TRL of what is experimental.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

ITEMS = [[f"<item:{i + 4 * p}>" for i in range(len(gains))] for p, gains in enumerate(GAINS)]
TITLES = [["kiwi", "fig", "fa"], ["a", "b", "ca", "cb"], ["ab", "ac", "b", "ca", "cb"]]  # items of several decisions
VARIANCE = [[0.1 * i / (p + 1) for i in range(len(gains))] for p, gains in enumerate(GAINS)]


def item_trainer(tmp_path, size=12, spelling="items", rows=None, **options):
    """A trainer whose candidates are tokens with nothing between them, or labels of several."""
    tokenizer = make_tokenizer(items=16)
    of_items = spelling == "items"
    rows = {"candidates": {"items": ITEMS, "titles": TITLES}.get(spelling), **(rows or {})}
    model = make_model(tokenizer, tied=of_items)
    if options.get("beta"):  # TRL loads the reference from where the model is from
        model.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    trainer = make_trainer(
        tmp_path,
        make_rows(size, **rows),
        tokenizer=tokenizer,
        model=model,
        separator="" if of_items else " > ",
        **options,
    )
    trainer.current_gradient_accumulation_steps = 1  # what training sets
    return trainer


def gradient(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def flexrec_trainers_gradient(tmp_path, monkeypatch, trainer, rollout, **options):
    """That of FlexRecTrainer's loss on the same model, lists and rollouts."""
    tokenizer = trainer.processing_class
    examples = [
        Example(
            prompt=tokenizer(row["prompt"])["input_ids"],
            candidates=[tokenizer.encode(name) for name in row.get("candidates") or index_labels(len(row["gains"]))],
            gains=np.array(row["gains"], dtype=np.float32),
            variance=np.array(row.get("gain_variance") or np.zeros(len(row["gains"])), dtype=np.float32),
            history_span=(0, 1),
            need="interest",
            user=0,
        )
        for row in trainer.train_dataset
    ]
    group = 4
    if options["credit"] == "all_actions_corrected":  # TRL shuffles rows: none knows which are of the same prompt
        examples, group = [example for example in examples for _ in range(4)], 1
    monkeypatch.setattr(flexrec.trainer.flexrec, "sample_rankings", lambda *args, **kwargs: rollout)
    config = FlexRecConfig(
        output_dir=str(tmp_path / "own"),
        num_generations=group,
        entropy_coef=0.0,
        use_cpu=True,
        report_to="none",
        **options,
    )
    own = FlexRecTrainer(trainer.model, config, examples, separator=tokenizer.encode(trainer.args.separator), end=[2])
    return gradient(trainer, own.ranking_loss(trainer.model, examples)[0])


@pytest.mark.parametrize(
    ("spelling", "options"),
    [
        ("items", {"credit": "policy"}),
        ("items", {"credit": "policy", "uncertainty": "item", "temperature": 0.7}),
        ("items", {"credit": "policy", "baseline": "rank", "scale": "rank", "metric": "err", "uncertainty": "none"}),
        ("items", {"credit": "all_actions"}),
        ("items", {"credit": "all_actions", "uncertainty": "item", "temperature": 0.7, "metric": "dcg@3"}),
        ("items", {"credit": "all_actions", "scale": "none", "uncertainty": "none", "metric": "err", "num_ranked": 2}),
        ("items", {"credit": "all_actions", "tilt": 0.1}),
        ("items", {"credit": "all_actions_corrected", "metric": "recall@2"}),
        ("labels", {"credit": "all_actions"}),
        ("titles", {"credit": "all_actions"}),
        ("labels", {"credit": "all_actions", "tilt": 0.2, "metric": "ndcg@2", "uncertainty": "none"}),
    ],
    ids=str,
)
def test_gradient_is_that_of_flexrec_trainer(tmp_path, monkeypatch, spelling, options):
    rollouts = []

    def spy(*args, **kwargs):
        rollouts.append(sample(*args, **kwargs))
        return rollouts[-1]

    sample = adapter.sample_rankings
    monkeypatch.setattr(adapter, "sample_rankings", spy)
    trainer = item_trainer(
        tmp_path, 3, spelling, rows={"gain_variance": VARIANCE}, per_device_train_batch_size=12, **options
    )
    batch = generate(trainer)
    found = gradient(trainer, trainer.compute_loss(trainer.model, batch))
    expected = flexrec_trainers_gradient(
        tmp_path, monkeypatch, trainer, rollouts[0], **{"uncertainty": "rollout", **options}
    )
    # TRL's mean is over decisions, FlexRecTrainer's over items.
    num_decisions, num_items = batch["tool_mask"].sum(), (rollouts[0].rankings >= 0).sum()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found * num_decisions, expected * num_items, atol=2e-5, rtol=1e-4)


def objective_by_hand(trainer, batch):
    """The sum over all completions and ranks of what placing another candidate would change, expected by the policy."""
    total = 0.0
    for row, (ids, mask) in enumerate(zip(batch["completion_ids"], batch["completion_mask"], strict=True)):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        completion, names = ids[mask.bool()].tolist(), [name[0] for name in batch["candidates"][row]]
        gains = torch.tensor(trainer.train_dataset[row // 4]["gains"])
        logits = trainer.model(torch.tensor([prompt + completion])).logits[0].double()
        order = [names.index(token) for token in completion[:-1]]
        value = flexrec.ranking_metric(gains[order][None], trainer.args.metric)
        for k in range(len(order)):
            left = order[k:]
            probs = logits[len(prompt) + k - 1, [names[i] for i in left]].softmax(0)
            for p, j in zip(probs, range(k, len(order)), strict=True):
                swapped = list(order)
                swapped[k], swapped[j] = swapped[j], swapped[k]
                total = total + p * (flexrec.ranking_metric(gains[swapped][None], trainer.args.metric) - value)
    return total


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "dr_grpo"])
def test_gradient_is_that_of_the_expected_change(tmp_path, loss_type):
    """Under TRL's means, without any of FlexRec's kernels for it; the objective itself is in the log."""
    options = {"credit": "all_actions", "scale": "none", "loss_type": loss_type, "per_device_train_batch_size": 12}
    trainer = item_trainer(tmp_path, 3, **options)
    batch = generate(trainer)
    found = gradient(trainer, trainer.compute_loss(trainer.model, batch))
    total = objective_by_hand(trainer, batch)
    count = 12 * trainer.max_completion_length if loss_type == "dr_grpo" else batch["tool_mask"].sum()
    torch.testing.assert_close(found, gradient(trainer, -total.sum() / count), atol=1e-5, rtol=1e-4)
    assert trainer._metrics["train"]["ndcg/objective"] == [pytest.approx(total.item() / 12, rel=1e-4)]


def test_kl_is_trls_and_does_not_follow_the_objective(tmp_path):
    """Without gains the gradient is that of TRL's estimate alone, at a policy that has moved from its reference."""
    rows = {"gains": [[0.0] * len(gains) for gains in GAINS]}
    found = []
    for credit in ("swap", "all_actions"):
        options = {"credit": credit, "beta": 0.3, "num_iterations": 2, "per_device_train_batch_size": 12}
        trainer = item_trainer(tmp_path, 3, rows=rows, **options)
        torch.manual_seed(3)
        batch = generate(trainer)
        batch["ref_per_token_logps"] = batch["ref_per_token_logps"] - 0.5 * batch["tool_mask"]
        batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.1 * batch["tool_mask"]
        found.append((gradient(trainer, trainer.compute_loss(trainer.model, batch)), trainer._metrics["train"]["kl"]))
    (expected, log), (mine, my_log) = found
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    assert my_log == pytest.approx(log, rel=1e-5)


@pytest.mark.parametrize("spelling", ["items", "labels", "titles"])
def test_what_trl_sees_are_the_logprobs_of_decisions(tmp_path, spelling):
    """Old log-probs, entropies and masks of later steps do not depend on the credit."""
    trainer = item_trainer(tmp_path, 3, spelling, credit="all_actions", num_iterations=2, temperature=0.6)
    batch = generate(trainer)
    plain = seam(trainer, batch)
    trainer._valued, trainer._candidates = batch["item_gains"], batch["candidates"]
    logps, entropies = seam(trainer, batch)[:2]
    torch.testing.assert_close(logps, plain[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, plain[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logps, batch["old_per_token_logps"], atol=1e-5, rtol=1e-5)
    assert (logps[batch["tool_mask"] == 0] == 0).all()


@pytest.mark.parametrize("credit", ["policy", "all_actions", "all_actions_corrected"])
def test_training_raises_the_metric(tmp_path, credit):
    trainer = item_trainer(tmp_path, credit=credit, metric="ndcg@3", max_steps=15, per_device_train_batch_size=12)
    trainer.train()
    curve = logged(trainer, "ndcg@3/mean")
    assert np.mean(curve[-3:]) > 0.85 > curve[0] + 0.1


def test_micro_batches_evaluation_and_several_updates(tmp_path):
    """Rows are shuffled and split: each takes its gains along."""
    rows = make_rows(candidates=ITEMS)
    options = {"num_iterations": 2, "gradient_accumulation_steps": 3, "beta": 0.05, "max_steps": 4, "eval_steps": 2}
    trainer = item_trainer(
        tmp_path,
        credit="all_actions",
        metric="ndcg@2",
        eval_strategy="steps",
        per_device_eval_batch_size=4,
        extra={"eval_dataset": rows.select(range(3))},
        **options,
    )
    train_and_compare(trainer)
    for name in ("ndcg@2/objective", "eval_ndcg@2/objective", "kl", "ndcg@2/reward@1"):
        assert np.isfinite(logged(trainer, name)).all(), name
    assert trainer.beta == 0.05


def test_probabilities_are_of_the_ranks_that_are_shown(tmp_path):
    """Rows of the policy's weights are those of the state before each rank, in rank order."""
    trainer = item_trainer(tmp_path, 3, credit="policy", metric="ndcg@2", temperature=0.5)
    batch = generate(trainer)
    rows = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    probs = trainer._probabilities(prompts, rows)
    assert probs.shape == (12, 5, 5)
    for row, (prompt, completion) in enumerate(zip(prompts, rows, strict=True)):
        logits = trainer.model(torch.tensor([prompt + completion])).logits[0] / 0.5
        state = RankingState([batch["candidates"][row]], end=[2], num_ranked=2)
        names = [name[0] for name in batch["candidates"][row]]
        placed = completion[:2] + [name for name in names if name not in completion[:2]]
        for k in range(2):
            of_left = logits[len(prompt) + k - 1, placed[k:]].softmax(0)
            torch.testing.assert_close(probs[row, k, k : len(placed)], of_left, atol=1e-5, rtol=1e-4)
            state.advance([completion[k]])
        assert (probs[row, 2:] == 0).all()
        assert (probs[row, :, len(placed) :] == 0).all()
