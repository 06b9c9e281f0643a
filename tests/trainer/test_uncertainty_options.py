"""What FlexRecTrainer does with what is not known of the gains: lower bounds, draws, and weights that are shuffled."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flexrec.trainer import flexrec as module
from flexrec.trainer.flexrec import FlexRecConfig
from flexrec.trainer.rewards import drawn_gains, shuffled

sys.path.insert(0, str(Path(__file__).parent))

from by_hand import EXAMPLES, GENERATIONS, example_of, trainer_of


def gains_of_a_step(trainer, step=0):
    """The gains by candidate that the rollouts of each prompt were valued with."""
    trainer.state.global_step = step
    trainer._kept.clear()
    trainer.ranking_loss(trainer.model, EXAMPLES)
    batch, gains, *_ = trainer._kept[0]
    found = []
    for n, ranking in enumerate(batch.rankings.tolist()):
        size = len(EXAMPLES[n // GENERATIONS].candidates)
        by_candidate = np.full(size, np.nan)
        by_candidate[ranking[:size]] = gains[n, :size]
        found.append(by_candidate)
    for n in range(0, len(found), GENERATIONS):
        np.testing.assert_array_equal(found[n], found[n + 1], "the rollouts of a prompt are valued alike")
    return found[::GENERATIONS]


def test_gains_of_a_step(tmp_path):
    for found, example in zip(gains_of_a_step(trainer_of(tmp_path)), EXAMPLES, strict=True):
        np.testing.assert_allclose(found, example.gains)
    lower = gains_of_a_step(trainer_of(tmp_path, pessimism=0.7))
    for found, example in zip(lower, EXAMPLES, strict=True):
        expected = np.maximum(example.gains - 0.7 * np.sqrt(example.variance), 0)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (lower[0] == 0).sum() == 1, "a gain that may as well be nothing"
    for found, example in zip(gains_of_a_step(trainer_of(tmp_path, sample_gains=True)), EXAMPLES, strict=True):
        certain = (example.variance == 0) | (example.gains == 0)
        np.testing.assert_allclose(found[certain], example.gains[certain])
        assert (found[~certain] != example.gains[~certain]).all()
        assert (found >= 0).all()
    both = gains_of_a_step(trainer_of(tmp_path, sample_gains=True, pessimism=0.7))
    drawn = gains_of_a_step(trainer_of(tmp_path, sample_gains=True))
    for found, of_draws, example in zip(both, drawn, EXAMPLES, strict=True):
        np.testing.assert_allclose(found, np.maximum(of_draws - 0.7 * np.sqrt(example.variance), 0), atol=1e-6)


@pytest.mark.parametrize("metric", ["recall@2", "precision@2", "rbp.8"])
def test_draws_above_a_probability_count_as_certainty(tmp_path, metric):
    trainer = trainer_of(tmp_path, metric=metric, sample_gains=True, uncertainty="rollout")
    largest = 0.0
    for step in range(12):
        trainer.state.global_step = step
        trainer._kept.clear()
        loss, *_ = trainer.ranking_loss(trainer.model, EXAMPLES)
        assert torch.isfinite(loss)
        largest = max(largest, trainer._kept[0].gains.max().item())
    assert largest > 1.0


def test_gains_are_drawn_anew_at_every_step(tmp_path):
    """And the same ones again by a training that was resumed."""
    trainer = trainer_of(tmp_path, sample_gains=True, seed=3)
    first, second, again = (gains_of_a_step(trainer, step) for step in (0, 1, 0))
    assert (first[0] != second[0]).any()
    np.testing.assert_array_equal(first[0], again[0])
    other = gains_of_a_step(trainer_of(tmp_path, sample_gains=True, seed=4))
    assert (first[0] != other[0]).any()
    kept = trainer_of(tmp_path, sample_gains=True, num_iterations=2)
    gains_of_a_step(kept)
    kept.state.global_step = 1
    before = kept._kept[0].gains
    kept.ranking_loss(kept.model, EXAMPLES)
    assert kept._kept[0].gains is before, "several updates with the same rankings are made with the same gains"


def test_drawn_gains_have_their_mean_and_variance():
    example = example_of([1], [10, 11, 12, 13], [0.2, 0.7, 0.4, 0.0], [0.04, 0.01, 0.0, 0.02])
    rng = np.random.default_rng(0)
    draws = np.stack([drawn_gains(example, rng) for _ in range(20_000)])
    assert draws.dtype == np.float32
    assert draws.min() >= 0
    np.testing.assert_allclose(draws.mean(0), example.gains, atol=0.005)
    np.testing.assert_allclose(draws[:, :2].var(0), example.variance[:2], rtol=0.05)
    assert (draws[:, 2] == np.float32(0.4)).all()
    assert (draws[:, 3] == 0).all()


@pytest.mark.parametrize("level", ["rollout", "item"])
def test_weights_are_shuffled_as_asked(tmp_path, monkeypatch, level):
    """The same weights, at other places, and a loss that differs for it."""
    given = []

    def spy(weights, rng):
        given.append((weights, shuffle(weights, rng)))
        return given[-1][1]

    shuffle = module.shuffled
    monkeypatch.setattr(module, "shuffled", spy)
    losses = [
        trainer.ranking_loss(trainer.model, EXAMPLES)[0].item()
        for trainer in (trainer_of(tmp_path, uncertainty=level, shuffle_weights=on, seed=5) for on in (False, True))
    ]
    ((before, after),) = given
    assert not torch.equal(before, after)
    assert losses[0] != losses[1]
    again = trainer_of(tmp_path, uncertainty=level, shuffle_weights=True, seed=5)
    assert again.ranking_loss(again.model, EXAMPLES)[0].item() == losses[1]


def test_shuffled_weights_are_the_same_ones():
    weights = torch.tensor([[0.5, 2.0, 0.0], [1.5, 0.0, 0.0], [0.1, 0.2, 0.3]])
    found = shuffled(weights, np.random.default_rng(1))
    assert torch.equal(found == 0, weights == 0), "where there is no item there is no weight"
    assert sorted(found.flatten().tolist()) == sorted(weights.flatten().tolist())
    assert not torch.equal(found, weights)
    assert weights[0, 0] == 0.5, "a copy"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle_weights": True, "uncertainty": "none"}, "shuffle_weights shuffles the weights of uncertainty"),
        ({"pessimism": -0.1}, "pessimism must be at least 0, got -0.1"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FlexRecConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
