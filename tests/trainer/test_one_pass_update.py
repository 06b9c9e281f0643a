"""Rankings that one pass over the prompts decides are drawn from the states that their update has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flexrec.decoding import sample_rankings
from flexrec.policy.scores import ranking_states
from flexrec.task.examples import prompts_and_candidates
from flexrec.task.labels import Place
from flexrec.trainer import flexrec as module
from tests.trainer.by_hand import EXAMPLES, GENERATIONS, TEMPERATURE, trainer_of

IN_PLACE = [
    replace(
        example, candidates=[[Place(len(example.prompt) - k % 2, yes=20, no=21)] for k in range(len(example.gains))]
    )
    for example in EXAMPLES
]
CASES = {
    "tokens": (EXAMPLES, {"mode": "one-pass"}),
    "places": (IN_PLACE, {}),
}


def passes_of(trainer, examples):
    """The loss, its gradients, what was scored, and how often the model was asked."""
    asked = []
    hook = trainer.model.get_input_embeddings().register_forward_hook(lambda *_: asked.append(1))
    trainer.model.zero_grad()
    loss, told = trainer.ranking_loss(trainer.model, examples)
    loss.backward()
    hook.remove()
    grads = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    return loss.detach(), grads, told, len(asked)


@pytest.mark.parametrize("options", [{}, {"credit": "swap"}, {"credit": "swap", "num_ranked": 2}, {"metric": "err@3"}])
@pytest.mark.parametrize("case", CASES)
def test_one_pass_samples_and_updates(tmp_path, monkeypatch, case, options):
    examples, mode = CASES[case]
    trainer = trainer_of(tmp_path, **mode, **options)
    loss, grads, told, asked = passes_of(trainer, examples)
    assert asked == 1
    kept = trainer._kept[0].batch
    rankings = kept.rankings.numpy()
    assert kept.num_generations == GENERATIONS

    # Sampled first, then passed through the model again, as those are that are decoded.
    rollout = sample_rankings(
        trainer.model,
        *prompts_and_candidates(examples),
        num_generations=GENERATIONS,
        num_ranked=trainer._num_ranked,
        temperature=TEMPERATURE,
        one_pass=True,
        generator=trainer._noise(),
    )
    np.testing.assert_array_equal(rankings, rollout.rankings)
    monkeypatch.setattr(
        module,
        "draw_from_states",
        lambda states, batch, **_: (
            drawn := trainer._batch(examples, rollout.rankings, GENERATIONS),
            ranking_states(trainer.model, drawn),
        ),
    )
    trainer._kept.clear()
    expected, of_both, told_of_both, asked = passes_of(trainer, examples)
    assert asked == 2
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(grads, of_both, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert {name: float(value) for name, value in told.items()} == pytest.approx(
        {name: float(value) for name, value in told_of_both.items()}, abs=1e-6
    )


def test_later_updates_with_the_same_rankings_have_states_of_their_own(tmp_path):
    trainer = trainer_of(tmp_path, mode="one-pass", credit="swap", num_iterations=2)
    *_, asked = passes_of(trainer, EXAMPLES)
    assert asked == 1
    before = trainer._kept[0].batch
    trainer.state.global_step = 1
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    _, _, told, asked = passes_of(trainer, EXAMPLES)
    assert asked == 1
    assert trainer._kept[0].batch is before
    assert float(told["ratio_mean"]) != pytest.approx(1.0, abs=1e-4), "the policy has moved since it was sampled from"


def test_what_is_decoded_is_still_passed_twice(tmp_path):
    *_, asked = passes_of(trainer_of(tmp_path), EXAMPLES)
    assert asked > 2
