"""Every option of FlexRecTrainer at a value that is not its default: what it samples with and what it asks for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flexrec.task.examples import Example
from flexrec.trainer import flexrec as module
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer

sys.path.insert(0, str(Path(__file__).parent))

from by_hand import EXAMPLES, MARKER, TEMPERATURE, by_hand, model_of, trainer_of, valued


def test_rollouts_are_asked_for_with_every_option(tmp_path, monkeypatch):
    asked = []

    def spy(*args, **kwargs):
        asked.append((args, kwargs))
        return sample(*args, **kwargs)

    sample = module.sample_rankings
    monkeypatch.setattr(module, "sample_rankings", spy)
    trainer = FlexRecTrainer(
        model_of(),
        FlexRecConfig(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            num_generations=3,
            temperature=0.3,
            num_ranked=4,
            metric="ndcg@6",
            max_reasoning_tokens=2,
            seed=9,
        ),
        EXAMPLES,
        separator=(20,),
        end=(21, 22),
        reasoning_end=[MARKER, 6],
    )
    trainer.ranking_loss(trainer.model, EXAMPLES)
    ((model, prompts, candidates), options) = asked[0]
    assert model is trainer.model
    assert prompts == [example.prompt for example in EXAMPLES]
    assert candidates == [example.candidates for example in EXAMPLES]
    generator = options.pop("generator")
    assert generator.initial_seed() == int(np.random.SeedSequence([9, 0, 0, 0]).generate_state(1)[0])
    assert options == {
        "separator": (20,),
        "end": (21, 22),
        "num_generations": 3,
        "num_ranked": 4,
        "temperature": 0.3,
        "reasoning_end": (MARKER, 6),
        "max_reasoning_tokens": 2,
        "num_tokens": None,
    }


@pytest.mark.parametrize(
    ("num_ranked", "metric", "expected"),
    [(None, "ndcg", None), (4, "ndcg", 4), (None, "ndcg@3", 3), (4, "ndcg@3", 3), (2, "ndcg@3", 2)],
)
def test_no_more_is_ranked_than_is_asked_for_or_earns(tmp_path, num_ranked, metric, expected):
    trainer = trainer_of(tmp_path, num_ranked=num_ranked, metric=metric)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    assert trainer._kept[0].batch.shape == (4, expected or 5)


def test_the_log_probs_of_training_are_those_that_were_sampled_with(tmp_path, monkeypatch):
    rollouts = []

    def spy(*args, **kwargs):
        rollouts.append(sample(*args, **kwargs))
        return rollouts[-1]

    sample = module.sample_rankings
    monkeypatch.setattr(module, "sample_rankings", spy)
    trainer = trainer_of(tmp_path, credit="swap", num_ranked=3)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    logprobs = torch.from_numpy(rollouts[0].logprobs)
    torch.testing.assert_close(trainer._kept[0].old_logprobs, logprobs, rtol=1e-4, atol=1e-5)
    exact = by_hand(trainer.model, None, rollouts[0].rankings).logprobs
    torch.testing.assert_close(exact.float(), logprobs, rtol=1e-4, atol=1e-5)


def test_every_step_micro_batch_process_and_seed_has_noise_of_its_own(tmp_path, monkeypatch):
    examples = EXAMPLES * 4

    def draws(seed: int = 3, step: int = 5, slot: int = 2, process: int = 1) -> list[list[int]]:
        trainer = trainer_of(tmp_path, seed=seed, temperature=3.0)
        trainer.state.global_step, trainer._slot = step, slot
        monkeypatch.setattr(type(trainer.accelerator), "process_index", process)
        return trainer._rollout(examples).rankings.tolist()

    assert draws() == draws()
    found = [draws(), draws(seed=4), draws(step=6), draws(slot=3), draws(process=0), draws(step=2, slot=5)]
    for i, one in enumerate(found):
        assert one not in found[:i], "the noise of another"


def test_prompts_are_shared_by_as_many_rankings_as_costs_least(tmp_path, monkeypatch):
    """Asked with the lengths that will be there; not at all where sharing is switched off or a reference cannot."""
    asked = []

    def spy(*args, **kwargs):
        asked.append((args, kwargs))
        return shared

    shared = 2
    monkeypatch.setattr(module, "sharing", spy)
    trainer = trainer_of(tmp_path, reasoning_end=[MARKER, 6], max_reasoning_tokens=3, num_ranked=3)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    ((model, prompts, candidates), options) = asked.pop()
    assert model is trainer.model
    assert prompts == [example.prompt for example in EXAMPLES]
    assert candidates == [example.candidates for example in EXAMPLES]
    assert options == {"separator": (), "num_ranked": 3, "num_generations": 2, "reasoning_length": 5}
    assert len(trainer._kept[0].batch.tokens.input_ids) == 2, "a row for each prompt"
    trainer = trainer_of(tmp_path, share_prompts=False)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    assert len(trainer._kept[0].batch.tokens.input_ids) == 4, "a row for each ranking"
    assert asked == []
    trainer = trainer_of(tmp_path, model_of(1), beta=0.1)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    assert len(trainer._kept[0].batch.tokens.input_ids) == 2
    assert [args[0] for args, _ in asked] == [trainer.reference, trainer.model]
    assert asked[0][0][1:] == asked[1][0][1:]
    assert asked[0][1] == asked[1][1]
    shared = 1  # for the reference, which is asked first
    trainer = trainer_of(tmp_path, model_of(1), beta=0.1)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    assert len(trainer._kept[0].batch.tokens.input_ids) == 4
    assert len(asked) == 3


def test_metrics_without_a_variance_are_for_gains_that_are_certain(tmp_path):
    certain = [Example(**{**vars(example), "variance": 0 * example.variance}) for example in EXAMPLES]
    trainer = trainer_of(tmp_path, metric="mrr", credit="swap", uncertainty="rollout")
    trainer.ranking_loss(trainer.model, certain)
    assert trainer._kept[0].variance is None
    trainer = trainer_of(tmp_path, metric="mrr", credit="swap", uncertainty="rollout")
    with pytest.raises(ValueError, match="'mrr' has no reward variance"):
        trainer.ranking_loss(trainer.model, EXAMPLES)


def test_all_actions_are_asked_for_with_every_option(tmp_path, monkeypatch):
    """Lists of single tokens cannot be shown beyond what is ranked; for titles it has to be said."""
    asked = []

    def spy(*args, **kwargs):
        asked.append((args, kwargs))
        return all_actions(*args, **kwargs)

    all_actions = module.all_actions
    monkeypatch.setattr(module, "all_actions", spy)
    trainer = trainer_of(tmp_path, model_of(1), beta=0.1, num_ranked=3, metric="dcg@4", tilt=0.2)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    kept = trainer._kept[0]
    (((_, batch, gains, metric), options),) = asked
    assert batch is kept.batch
    torch.testing.assert_close(gains, valued(batch.rankings.numpy()).gains)
    assert metric == "dcg@4"
    assert options.pop("reference") is kept.ref_states
    assert options == {"temperature": TEMPERATURE, "num_ranked": 3, "tilt": 0.2}


def test_corrected_all_actions_are_asked_for_with_foresight(tmp_path, monkeypatch):
    asked = []

    def spy(*args, **kwargs):
        asked.append(kwargs)
        return all_actions(*args, **kwargs)

    all_actions = module.all_actions
    monkeypatch.setattr(module, "all_actions", spy)
    trainer = trainer_of(tmp_path, metric="dcg@4", credit="all_actions_corrected", num_ranked=3)
    loss, _ = trainer.ranking_loss(trainer.model, EXAMPLES)
    assert asked == [
        {"temperature": TEMPERATURE, "num_ranked": 3, "tilt": None, "foresight": "auto", "reference": None}
    ]
    plain = trainer_of(tmp_path, metric="dcg@4", credit="all_actions", num_ranked=3)
    assert loss.item() != pytest.approx(plain.ranking_loss(plain.model, EXAMPLES)[0].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iterations": 2}, "num_iterations=1 and no tilt, got num_iterations=2"),
        ({"tilt": 0.1}, "got num_iterations=1, tilt=0.1"),
        ({"metric": "mrr"}, "needs a metric that is a sum over items, .* got 'mrr', whose form is first"),
        ({"scale": "group"}, "credit='all_actions_corrected' is its own baseline"),
    ],
)
def test_what_corrected_all_actions_cannot_do_is_said(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FlexRecConfig(output_dir=str(tmp_path), use_cpu=True, credit="all_actions_corrected", **options)


def test_what_the_configuration_is_by_default(tmp_path):
    """The paper's numbers where there are any; see the fields."""
    args = FlexRecConfig(output_dir=str(tmp_path), use_cpu=True)
    expected = {
        "num_generations": 1,
        "num_iterations": 1,
        "temperature": 1.0,
        "metric": "ndcg",
        "num_ranked": None,
        "max_reasoning_tokens": None,
        "credit": "all_actions",
        "tilt": None,
        "baseline": "none",
        "scale": "batch",
        "uncertainty": "none",
        "shuffle_weights": False,
        "pessimism": 0.0,
        "sample_gains": False,
        "epsilon_low": 0.2,
        "epsilon_high": None,
        "importance_level": "item",
        "beta": 0.0,
        "share_prompts": True,
        "entropy_coef": 0.005,
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
    }
    assert {name: getattr(args, name) for name in expected} == expected


def test_probabilities_that_credit_by_the_policy_weighs_with_are_of_summed_rows(tmp_path, monkeypatch):
    weighed = []

    def spy(hidden, weight, candidates, *args, **kwargs):
        weighed.append((weight, candidates))
        return probs(hidden, weight, candidates, *args, **kwargs)

    probs = module.ranking_probs
    monkeypatch.setattr(module, "ranking_probs", spy)
    of_lists = [[[(token, 2 + k % 2)] for k, (token,) in enumerate(e.candidates)] for e in EXAMPLES]
    examples = [replace(e, candidates=lst) for e, lst in zip(EXAMPLES, of_lists, strict=True)]
    trainer = trainer_of(tmp_path, model_of(1), beta=0.1, credit="policy")
    trainer.ranking_loss(trainer.model, examples)
    ((weight, candidates),) = weighed
    of_model = trainer.model.get_output_embeddings().weight
    first = EXAMPLES[1].candidates[0][0]
    torch.testing.assert_close(weight[candidates[1, 0]], of_model[first] + of_model[2])
