"""Numbers that are not finite: no update with them is applied, nothing is saved after one, and none is reported."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from flexrec.decoding.sample import sample_rankings
from flexrec.evaluation.evaluate import rank_examples
from flexrec.task.examples import Example
from flexrec.trainer.callbacks import StepLog, to_json
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer


class Examples(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        gains = np.array([0.0, 1.0, 0.5], dtype=np.float32)
        return Example([1, 2], [[10], [11], [12]], gains, np.zeros_like(gains), (0, 1), "interest", 0)


def make_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def make_trainer(folder, model, **more):
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", **more}
    quiet = {"disable_tqdm": True, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1}
    return FlexRecTrainer(model, FlexRecConfig(output_dir=str(folder), **quiet, **options), Examples())


def spoil(trainer, steps, what):
    """Make the loss of the first micro-batch of some updates NaN, or their gradient infinite, but never both; returns
    the weights seen before each micro-batch."""
    weight, seen, whole = trainer.model.model.norm.weight, [], trainer.ranking_loss
    accumulation = trainer.args.gradient_accumulation_steps

    def ranking_loss(model, examples):
        seen.append(weight.detach().clone())
        loss, metrics = whole(model, examples)
        if trainer.state.global_step + 1 not in steps:
            return loss, metrics
        if what == "gradient":
            trainer.model.model.norm.weight.register_hook(lambda g: g * float("inf"))
        elif len(seen) % accumulation == 1 % accumulation:
            loss = loss + float("nan")
        return loss, metrics

    trainer.ranking_loss = ranking_loss
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_with_a_loss_that_is_not_finite_is_not_applied(tmp_path, accumulation):
    trainer = make_trainer(tmp_path, make_model(), learning_rate=1e-2, gradient_accumulation_steps=accumulation)
    seen = spoil(trainer, {3, 4}, "loss")
    trainer.train()
    starts = seen[::accumulation]
    for step in range(1, 8):
        applied = not torch.equal(starts[step - 1], starts[step])
        assert applied == (step not in (3, 4)), step
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    saved = {int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*")}
    assert saved == {1, 2, 5, 6, 7, 8}, "nothing is saved after an update that was not made"


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), learning_rate=1e-2, max_steps=2)
    seen = spoil(trainer, {1, 2}, "gradient")
    trainer.train()
    torch.testing.assert_close(seen[0], seen[1])
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_what_goes_on_so_ends_with_advice(tmp_path):
    """A learning rate beyond all bounds: the first update is made, with which nothing can be computed."""
    trainer = make_trainer(tmp_path, make_model(), learning_rate=1e38, max_grad_norm=0.0)
    message = r"step \d of reinforcement: .* not finite 3 times in a row; lower the learning rate \(1e\+38\)"
    with pytest.raises(ValueError, match=message):
        trainer.train()


def not_a_number():
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    return model


@pytest.mark.parametrize("greedy", [True, False])
def test_outputs_that_are_not_finite_are_not_reported(greedy):
    example = Examples()[0]
    rollout = sample_rankings(not_a_number(), [example.prompt], [example.candidates], greedy=greedy)
    assert np.isnan(rollout.logprobs).any(), "sampling ends, and says so"
    with pytest.raises(ValueError, match="the model's outputs are not finite"):
        rank_examples(
            not_a_number(),
            [example],
            type("Builder", (), {"separator": (), "end": (), "one_pass": False, "reasoning": {}}),
        )


def test_json_holds_no_nan(tmp_path):
    content = {"a": [1.5, float("nan")], "b": {"c": float("inf"), "d": (None, True, "NaN", 3)}}
    assert json.loads(to_json(content)) == {"a": [1.5, None], "b": {"c": None, "d": [None, True, "NaN", 3]}}
    log = StepLog(tmp_path / "log.jsonl", append=False)
    log.write(stage="format", step=1, loss=float("nan"))
    assert (tmp_path / "log.jsonl").read_text() == '{"stage": "format", "step": 1, "loss": null}\n'
