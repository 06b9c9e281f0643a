"""The trainer with reasoning before the rankings: what it follows, and that it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from flexrec.decoding.sample import sample_rankings
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.policy.scores import ranking_scores, ranking_states, reasoning_logprobs
from flexrec.task.examples import Example
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer

GAINS = np.array([0.0, 1.0, 0.25, 0.0, 0.5], dtype=np.float32)
SINGLE = [[10], [11], [12], [13], [14]]
TITLES = [[10, 20], [10, 21], [11, 20], [12], [12, 22]]
MARKER, PROMPT = 5, [1, 2, 3, 4]


class Fixed(Dataset):
    """The same list again and again, the candidates' order turned by the index."""

    def __init__(self, candidates: list[list[int]]) -> None:
        self.candidates = candidates

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Example:
        order = np.roll(np.arange(5), index)
        return Example(
            prompt=PROMPT,
            candidates=[self.candidates[i] for i in order],
            gains=GAINS[order],
            variance=np.zeros_like(GAINS),
            history_span=(1, 3),
            need="interest",
            user=0,
        )


def model_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=31,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def trainer_of(tmp_path: Any, candidates: Any, reference: Any = None, callbacks: Any = None, **options: Any) -> Any:
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "max_reasoning_tokens": 4,
        "entropy_coef": 0.0,
        **options,
    }
    spelling = {} if candidates is SINGLE else {"separator": (30,), "end": (31,)}
    return FlexRecTrainer(
        model_of(),
        FlexRecConfig(**arguments),
        Fixed(candidates),
        reference=reference,
        reasoning_end=[MARKER],
        callbacks=callbacks,
        **spelling,
    )


@pytest.mark.parametrize("candidates", [SINGLE, TITLES], ids=["tokens", "titles"])
@pytest.mark.parametrize("num_generations", [1, 4])
@pytest.mark.parametrize("scale", ["none", "batch"])
def test_a_step_follows_reinforce(tmp_path, candidates, num_generations, scale):
    """Items by their rewards, here the metric itself; reasoning by the metric against the mean of its prompt's."""
    trainer = trainer_of(
        tmp_path, candidates, credit="sequence", scale=scale, num_generations=num_generations, temperature=0.8
    )
    model, parameters = trainer.model, list(trainer.model.parameters())
    loss, metrics = trainer.ranking_loss(model, [Fixed(candidates)[n] for n in range(3)])
    found = torch.autograd.grad(loss, parameters)
    assert metrics["reasoning/ratio_mean"] == metrics["ratio_mean"] == 1

    kept = trainer._kept[0]
    states = ranking_states(model, kept.batch)
    of_items = ranking_scores(states, kept.batch, temperature=0.8).logprobs.sum(dim=1)  # (N,)
    of_reasoning = reasoning_logprobs(states, kept.batch, temperature=0.8).sum(dim=1)
    assert metrics["reasoning/length"] == np.mean(kept.batch.reasoning.lengths)
    value = ranking_metric(kept.gains, "ndcg")
    centred = value - value.view(3, -1).mean(dim=1).repeat_interleave(num_generations)
    unit = 1.0 if scale == "none" else value.square().mean().sqrt()
    expected = -(value * of_items + centred * of_reasoning).sum() / unit / (5 * len(value))
    for ours, exact in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


class History(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("candidates", [SINGLE, TITLES], ids=["tokens", "titles"])
@pytest.mark.parametrize("credit", ["all_actions", "swap"])
def test_rankings_behind_reasoning_are_learnt(tmp_path, candidates, credit):
    trainer = trainer_of(tmp_path, candidates, credit=credit, num_generations=4, max_steps=40)
    trainer.train()
    rollout = sample_rankings(
        trainer.model,
        [PROMPT] * 20,
        [candidates] * 20,
        separator=trainer.separator,
        end=trainer.end,
        reasoning_end=[MARKER],
        max_reasoning_tokens=4,
        generator=torch.Generator().manual_seed(0),
    )
    assert ranking_metric(torch.tensor(GAINS[rollout.rankings]), "ndcg").mean() > 0.95


def test_several_updates_and_a_reference(tmp_path):
    """The first update with a batch has ratio 1, the next ones not; the KL of the reasoning begins at 0 and grows."""
    history = History()
    trainer = trainer_of(
        tmp_path,
        TITLES,
        reference=model_of(),
        callbacks=[history],
        credit="swap",
        num_generations=4,
        num_iterations=2,
        beta=1e-3,
        max_steps=6,
    )
    trainer.train()
    logs = [log for log in history.logs if "reasoning/ratio_mean" in log]
    assert len(logs) == 6
    assert all((log["reasoning/ratio_mean"] == 1.0) == (i % 2 == 0) for i, log in enumerate(logs))
    assert logs[0]["reasoning/kl"] == 0.0
    assert logs[-1]["reasoning/kl"] > 0
    assert all(1 <= log["reasoning/length"] <= 5 for log in logs)


def test_sharing_prompts_changes_only_the_time(tmp_path):
    found = {}
    for share in (True, False):
        trainer = trainer_of(tmp_path, TITLES, num_generations=4, share_prompts=share, max_steps=3, learning_rate=1e-3)
        trainer.train()
        found[share] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=1e-5)


def test_no_budget_trains_behind_the_marker(tmp_path):
    trainer = trainer_of(tmp_path, SINGLE, max_reasoning_tokens=0, num_generations=2, max_steps=2)
    trainer.train()
    assert [row.tolist() for row in trainer._kept[0].batch.reasoning.tokens] == [[MARKER]] * 16


def test_budget_and_marker_come_together(tmp_path):
    with pytest.raises(ValueError, match="needs max_reasoning_tokens"):
        trainer_of(tmp_path, SINGLE, max_reasoning_tokens=None)
