"""What a critic says of its own ignorance: what it is fitted on, its intervals, and the critic that was saved."""

import dataclasses
import math

import numpy as np
import pytest

from flexrec.data import simulate
from flexrec.evaluation.critic import critic_quality, critic_reliability
from flexrec.task import critic as module
from flexrec.task.calibration import beta_quantiles
from flexrec.task.critic import MODELS, Critic

SMALL = {"num_users": 60, "num_items": 90, "num_topics": 4, "num_test_users": 10, "num_candidates": 9}


@pytest.fixture(scope="module")
def world():
    return simulate(**SMALL, observed_share=0.4)


def fit(world, model="ensemble", **options):
    return Critic.fit(world.log, world.catalogue, model=model, ensemble=2, epochs=2, **options)


def test_quantiles_are_those_of_beta_distributions():
    """The share of a Beta distribution below its quantile, by summing its density over a fine grid."""
    for mean, variance in ((0.5, 0.05), (0.3, 0.01), (0.8, 0.05), (0.5, 1 / 12), (0.1, 0.002)):
        size = mean * (1 - mean) / variance - 1
        a, b = mean * size, (1 - mean) * size
        log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        x = (np.arange(400_000) + 0.5) / 400_000
        density = np.exp(log_norm + (a - 1) * np.log(x) + (b - 1) * np.log(1 - x)) / 400_000
        levels = (0.025, 0.1, 0.5, 0.9, 0.975)
        (found,) = beta_quantiles(np.array([mean]), np.array([variance]), levels)
        for level, quantile in zip(levels, found, strict=True):
            assert density[x < quantile].sum() == pytest.approx(level, abs=2e-3)


def test_quantiles_of_extremes():
    mean = np.array([0.0, 1.0, 0.5, 0.5, 0.001])
    variance = np.array([0.0, 0.0, 0.0, 0.25, 0.9])
    found = beta_quantiles(mean, variance, (0.1, 0.5, 0.9))
    assert np.isfinite(found).all()
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.diff(found, axis=1) >= 0).all()
    np.testing.assert_allclose(found[2], 0.5, atol=1e-2)
    assert found[3, 0] < 0.01 < 0.99 < found[3, 2]


def test_intervals_are_those_of_the_beta_distribution(world):
    critic = fit(world, lists=world.train, noise=world.noise)
    lists = [world.test[0], world.train[3]]
    for lst, (low, high) in zip(lists, critic.interval_many(lists, 0.7), strict=True):
        mean, variance = critic.predict(lst)
        expected = beta_quantiles(mean, variance, (0.15, 0.85))
        np.testing.assert_allclose(low, expected[:, 0], atol=1e-5)
        np.testing.assert_allclose(high, expected[:, 1], atol=1e-5)
        wide = critic.interval(lst, 0.95)
        assert (wide[0] < low).all()
        assert (wide[1] > high).all()
    assert critic.interval_many([]) == []
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"level must lie between 0 and 1, got {level}"):
            critic.interval(lists[0], level)


def test_variances_are_fitted_on_what_was_held_out(world, monkeypatch):
    """The held-out pairs that lists hold, with what is known of their users and as of users of whom nothing is."""
    seen, held_out = {}, []
    leave_out = module.leave_out_pairs

    def spy_on_holding_out(log, chosen):
        held_out.extend(zip(log.users[chosen].tolist(), log.items[chosen].tolist(), strict=True))
        return leave_out(log, chosen)

    def spy(mean, share, novelty, nothing_known, interest, noise):
        seen.update(mean=mean, share=share, novelty=novelty, nothing=nothing_known, interest=interest)
        return np.array([0.0, 1.0, 0.0, 0.0])

    monkeypatch.setattr(module, "leave_out_pairs", spy_on_holding_out)
    monkeypatch.setattr(module, "fit_shares", spy)
    critic = fit(world, lists=world.train, noise=world.noise)
    expected, means, strangers = [], [], []
    for lst in world.train:
        chosen = [
            k
            for k, item in enumerate(lst.candidates.tolist())
            if (lst.user, item) in set(held_out) and not np.isnan(lst.interest[k])
        ]
        expected += lst.interest[chosen].tolist()
        means += critic.predict(lst)[0][chosen].tolist()
        strangers += critic.predict(dataclasses.replace(lst, user=-1))[0][chosen].tolist()
    assert 20 < len(expected) < 0.2 * sum((~np.isnan(lst.interest)).sum() for lst in world.train)
    np.testing.assert_allclose(seen["interest"], expected * 2)
    np.testing.assert_allclose(seen["mean"], means + strangers, atol=1e-5)
    assert seen["nothing"].tolist() == [False] * len(expected) + [True] * len(expected)


def test_intervals_of_the_simulator_hold_what_they_say():
    """Of users who are not in the log, within 5 points, and of the expected interest, not of feedback."""
    data = simulate(num_users=800, num_test_users=100, seed=1)
    critic = Critic.fit(data.log, data.catalogue, lists=data.train, noise=data.noise, ensemble=3, epochs=12)
    quality = critic_quality(critic, data.test)
    for level in (50, 80, 95):
        assert quality[f"coverage@{level}"] == pytest.approx(level, abs=5)


def test_the_quality_of_a_critic_by_hand(world):
    critic = fit(world, lists=world.train, noise=world.noise)
    quality = critic_quality(critic, world.test)
    truth = np.concatenate([lst.truth for lst in world.test])
    mean, variance = (np.concatenate(parts) for parts in zip(*critic.predict_many(world.test), strict=True))
    assert quality["pairs"] == len(truth)
    assert quality["rmse"] == pytest.approx(np.sqrt(np.mean((mean - truth) ** 2)), abs=1e-4)
    assert quality["bias"] == pytest.approx(np.mean(mean - truth), abs=1e-4)
    nll = 0.5 * np.mean(np.log(2 * np.pi * variance) + (mean - truth) ** 2 / variance)
    assert quality["nll"] == pytest.approx(nll, abs=1e-4)
    low, high = beta_quantiles(mean, variance, (0.1, 0.9)).T
    assert quality["coverage@80"] == pytest.approx(100 * np.mean((low <= truth) & (truth <= high)), abs=0.2)
    observed = [dataclasses.replace(lst, truth=None) for lst in world.train]
    assert critic_quality(critic, observed)["pairs"] == sum((~np.isnan(lst.interest)).sum() for lst in world.train)
    silent = dataclasses.replace(world.test[0], truth=None, interest=np.full(9, np.nan, dtype=np.float32))
    assert critic_quality(critic, [silent]) == {"pairs": 0}
    assert critic_reliability(critic, [silent]) == {"intervals": [], "bins": []}
    found = critic_reliability(critic, world.test)
    inside = next(point["inside"] for point in found["intervals"] if point["level"] == 0.8)
    assert inside == pytest.approx(np.mean((low <= truth) & (truth <= high)), abs=0.002)
    tenths = np.array_split(np.argsort(mean, kind="stable"), 10)
    assert [one["predicted"] for one in found["bins"]] == pytest.approx([mean[t].mean() for t in tenths], abs=1e-4)
    assert [one["interest"] for one in found["bins"]] == pytest.approx([truth[t].mean() for t in tenths], abs=1e-4)
    assert sum(one["pairs"] for one in found["bins"]) == len(truth)


@pytest.mark.parametrize("model", list(MODELS))
def test_a_saved_critic_is_the_same(world, tmp_path, model):
    critic = fit(world, model, lists=world.train, noise=world.noise, fuse=False)
    assert critic.save(tmp_path).parent == tmp_path
    loaded = Critic.load(tmp_path, world.catalogue)
    assert type(loaded.model) is MODELS[model]
    assert not loaded.fuse
    for one, other in zip(
        critic.fill_many(world.train) + critic.predict_many(world.test),
        loaded.fill_many(world.train) + loaded.predict_many(world.test),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    loaded.fuse = True
    assert critic.fill(world.train[0])[1].tolist() != loaded.fill(world.train[0])[1].tolist()
    with pytest.raises(FileNotFoundError, match=r"holds no critic: it has no critic\.npz"):
        Critic.load(tmp_path / "elsewhere", world.catalogue)
    few = simulate(**{**SMALL, "num_items": 80}).catalogue
    with pytest.raises(ValueError, match="catalogue must have the 90 items that the critic was fitted with, got 80"):
        Critic.load(tmp_path, few)


def test_wrong_arguments_are_named(world):
    with pytest.raises(ValueError, match="model must be one of 'ensemble', 'mf', 'knn'; got 'oracle'"):
        fit(world, "oracle")
    with pytest.raises(ValueError, match=r"noise must lie in \[0, 0.25\), a variance of values in \[0, 1\]; got 0.3"):
        fit(world, noise=0.3)
