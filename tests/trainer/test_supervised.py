"""Supervision: what is imitated, both losses by hand, and that the noise is that of the seed and step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from flexrec.task.examples import Example
from flexrec.trainer import supervised as module
from flexrec.trainer.supervised import SupervisedTrainer

# Ties, candidates without a gain, and a list in which nothing has one; histories of different places.
GAINS = [[0.0, 1.0, 0.25, 0.0, 0.5], [0.5, 0.5, 0.0], [0.0, 0.0]]
PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 1], [3, 2, 1]]
SPANS = [(2, 5), (0, 3), (2, 2)]
CANDIDATES = [[[10], [11], [12], [13], [14]], [[15], [10], [12]], [[11], [16]]]
TITLES = [[[10, 20], [10, 21], [11, 20], [12], [12, 22]], [[12, 22], [10, 20], [12]], [[11, 20], [12]]]


def examples_of(candidates: Any = CANDIDATES) -> list[Example]:
    return [
        Example(prompt, lst, np.array(gains, dtype=np.float32), np.zeros(len(lst), dtype=np.float32), span, "x", 0)
        for prompt, lst, gains, span in zip(PROMPTS, candidates, GAINS, SPANS, strict=True)
    ]


def trainer_of(tmp_path: Any, stage: str, seed: int = 0, **options: Any) -> SupervisedTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, seed=seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5.0)
    return SupervisedTrainer(model, args, examples_of(), stage=stage, **options)


def targets_of(trainer: SupervisedTrainer, monkeypatch: Any, examples: list[Example]) -> list[list[int]]:
    """What a loss imitates: the rankings that are encoded for it."""
    seen = []

    def spy(prompts: Any, candidates: Any, rankings: Any, **kwargs: Any) -> Any:
        seen.append(rankings)
        return make(prompts, candidates, rankings, **kwargs)

    from flexrec.trainer import base

    make = base.make_batch
    with monkeypatch.context() as patched:
        patched.setattr(base, "make_batch", spy)
        trainer.loss_and_metrics = trainer.ranking_loss(trainer.model, examples)
    return [[int(item) for item in row if item >= 0] for row in seen[0]]


def test_the_candidates_with_a_gain_are_imitated_best_first(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, "listwise")
    ties, alone = set(), set()
    for step in range(16):
        trainer.state.global_step = step
        first, second, third = targets_of(trainer, monkeypatch, examples_of())
        assert first == [1, 4, 2]
        assert sorted(second) == [0, 1], "what has no gain has no order"
        assert len(third) == 1, "one at random where none has a gain"
        ties.add(tuple(second))
        alone.add(third[0])
    assert ties == {(0, 1), (1, 0)}
    assert alone == {0, 1}


def test_format_shows_whole_rankings_in_random_order(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, "format")
    orders = set()
    for step in range(16):
        trainer.state.global_step = step
        targets = targets_of(trainer, monkeypatch, examples_of())
        assert [sorted(ranking) for ranking in targets] == [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1]]
        orders.add(tuple(targets[0]))
    assert len(orders) > 12
    assert {order[0] for order in orders} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("stage", ["format", "listwise"])
def test_the_noise_is_that_of_the_seed_and_step(tmp_path, monkeypatch, stage):
    examples = examples_of() * 4

    def targets(seed, step, slot=0):
        trainer = trainer_of(tmp_path, stage, seed)
        trainer.state.global_step, trainer._slot = step, slot
        return targets_of(trainer, monkeypatch, examples)

    assert targets(3, 2) == targets(3, 2)
    found = [targets(3, 2), targets(4, 2), targets(3, 1), targets(3, 2, slot=1)]
    for i, one in enumerate(found):
        assert one not in found[:i]


def ranking_nll_by_hand(model: Any, rankings: list[list[int]]) -> torch.Tensor:
    """Mean over placed items of -log p among all candidates that are left, those without a gain too."""
    terms = []
    for example, ranking in zip(examples_of(), rankings, strict=True):
        tokens = [lst[0] for lst in example.candidates]
        left, said = list(range(len(tokens))), []
        for item in ranking:
            logits = model(torch.tensor([example.prompt + said])).logits[0, -1].double()
            terms.append(-logits[[tokens[i] for i in left]].log_softmax(0)[left.index(item)])
            left.remove(item)
            said.append(tokens[item])
    return torch.stack(terms).mean()


def history_nll_by_hand(model: Any) -> torch.Tensor:
    """Mean over the histories' tokens, over the whole vocabulary; nothing predicts a prompt's first token."""
    terms = []
    for example in examples_of():
        logits = model(torch.tensor([example.prompt])).logits[0].double().log_softmax(-1)
        start, end = example.history_span
        terms += [-logits[at - 1, example.prompt[at]] for at in range(max(1, start), end)]
    return torch.stack(terms).mean()


def gradient(loss: torch.Tensor, model: Any) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("stage", ["format", "listwise"])
def test_the_loss_by_hand(tmp_path, monkeypatch, stage):
    trainer = trainer_of(tmp_path, stage)
    rankings = targets_of(trainer, monkeypatch, examples_of())
    loss, metrics = trainer.loss_and_metrics
    expected = ranking_nll_by_hand(trainer.model, rankings)
    assert float(metrics["ranking_nll"]) == pytest.approx(expected.item(), rel=1e-5)
    if stage == "format":
        history = history_nll_by_hand(trainer.model)
        assert float(metrics["history_nll"]) == pytest.approx(history.item(), rel=1e-5)
        expected = expected + history
    else:
        assert "history_nll" not in metrics
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = gradient(loss, trainer.model), gradient(expected, trainer.model)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_a_long_history_is_modelled_in_chunks(tmp_path):
    """More tokens than a chunk holds, and a batch without any."""
    trainer = trainer_of(tmp_path, "format")
    one = examples_of()[1]
    prompt = np.random.default_rng(0).integers(1, 40, size=700).tolist()
    long = Example(prompt, one.candidates, one.gains, one.variance, (100, 690), "x", 0)
    _, metrics = trainer.ranking_loss(trainer.model, [long, long])
    logprobs = trainer.model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
    expected = -torch.stack([logprobs[at - 1, prompt[at]] for at in range(100, 690)]).mean()
    assert float(metrics["history_nll"]) == pytest.approx(expected.item(), rel=1e-5)
    none = Example(PROMPTS[1], one.candidates, one.gains, one.variance, (2, 2), "x", 0)
    loss, metrics = trainer.ranking_loss(trainer.model, [none])
    assert float(metrics["history_nll"]) == 0
    assert torch.isfinite(gradient(loss, trainer.model)).all()


def test_the_history_is_predicted_by_its_first_tokens(tmp_path):
    """Of items that several tokens describe, each is predicted by the one that names it, from summed input rows."""
    trainer = trainer_of(tmp_path, "format")
    one = examples_of()[0]
    prompt = [1, 2, (3, 30), (4, 31, 32), 5, 6]
    described = Example(prompt, [[(10, 30)], [(11,)]], *(a[:2] for a in (one.gains, one.variance)), (2, 5), "x", 0)
    _, metrics = trainer.ranking_loss(trainer.model, [described])
    weight = trainer.model.get_input_embeddings().weight
    inputs = torch.stack([weight[list(t) if isinstance(t, tuple) else [t]].sum(0) for t in prompt])
    logprobs = trainer.model(inputs_embeds=inputs[None]).logits[0].double().log_softmax(-1)
    expected = -(logprobs[1, 3] + logprobs[2, 4] + logprobs[3, 5]) / 3
    assert float(metrics["history_nll"]) == pytest.approx(expected.item(), rel=1e-5)


def test_titles_are_spelled_as_the_trainer_is_told(tmp_path, monkeypatch):
    """The likelihood of a whole title, among what is left, by the trainer's separator and end."""
    trainer = trainer_of(tmp_path, "listwise", separator=[30], end=[31])
    rankings = targets_of(trainer, monkeypatch, examples_of(TITLES))
    assert rankings[0] == [1, 4, 2]
    # Decisions of the first list's answer "10 21 30 12 22 30 11 20": allowed tokens at each, and the one taken.
    answer = [10, 21, 30, 12, 22, 30, 11, 20]
    decisions = [(0, [10, 11, 12]), (1, [20, 21]), (3, [10, 11, 12]), (4, [22, 30]), (6, [10, 11, 12])]
    logits = trainer.model(torch.tensor([PROMPTS[0] + answer])).logits[0].double()
    first = -sum(
        logits[len(PROMPTS[0]) - 1 + at, allowed].log_softmax(0)[allowed.index(answer[at])] for at, allowed in decisions
    )
    alone = Example(
        PROMPTS[0], TITLES[0], *(getattr(examples_of()[0], n) for n in ("gains", "variance")), (2, 5), "x", 0
    )
    _, metrics = trainer.ranking_loss(trainer.model, [alone])
    assert float(metrics["ranking_nll"]) == pytest.approx(first.item() / 3, rel=1e-5)


def test_stages_by_name(tmp_path):
    assert module.STAGES == ("format", "listwise")
    with pytest.raises(ValueError, match="stage must be one of 'format', 'listwise'; got 'pairwise'"):
        trainer_of(tmp_path, "pairwise")


def test_no_more_ranks_are_imitated_than_asked(tmp_path, monkeypatch):
    """The best of those with a gain; the format stage shows whole rankings all the same."""
    assert targets_of(trainer_of(tmp_path, "listwise", num_imitated=2), monkeypatch, examples_of())[0] == [1, 4]
    assert len(targets_of(trainer_of(tmp_path, "listwise", num_imitated=9), monkeypatch, examples_of())[0]) == 3
    assert len(targets_of(trainer_of(tmp_path, "format", num_imitated=2), monkeypatch, examples_of())[0]) == 5
    with pytest.raises(ValueError, match="num_imitated must be at least 1, got 0"):
        trainer_of(tmp_path, "listwise", num_imitated=0)
