"""The critic's two cures: calibration on the feedback of lists, and watched histories as context."""

import numpy as np
import pytest
import torch

from flexrec.data import simulate
from flexrec.data.lists import Interactions
from flexrec.task import critic as of_critic
from flexrec.task import critic_ensemble as module
from flexrec.task.calibration import (
    UNCHANGED,
    Calibration,
    calibrated,
    fit_calibration,
    fit_shares,
    noise_share,
    shares,
)
from flexrec.task.critic import Critic
from flexrec.task.critic_pairs import watched_pairs
from flexrec.task.needs import novelty

COEFFICIENTS = np.array([0.3, 1.2, -0.8, 0.2, -0.4])


def by_hand(mean, new, coefficients):
    logit = np.log(mean / (1 - mean))
    a, b, c, d, e = coefficients
    return 1 / (1 + np.exp(-(a + b * logit + c * new + d * new * logit + e * (new > 0.99))))


def test_the_coefficients_of_a_made_up_world_are_found():
    rng = np.random.default_rng(0)
    mean = rng.uniform(0.02, 0.98, 40000)
    new = np.where(rng.random(40000) < 0.3, 1.0, rng.random(40000))
    truth = by_hand(mean, new, COEFFICIENTS)
    found = fit_calibration(mean, new, rng.beta(8 * truth, 8 * (1 - truth)))
    np.testing.assert_allclose(found, COEFFICIENTS, atol=0.05)
    np.testing.assert_allclose(calibrated(mean, new, COEFFICIENTS), truth, rtol=1e-5)


def test_the_fit_is_the_optimum_of_its_loss():
    """The gradient of the cross-entropy plus half the squared distance to no change is 0."""
    rng = np.random.default_rng(1)
    mean, new, interest = rng.uniform(0.05, 0.95, 60), rng.random(60), rng.random(60)
    weights = torch.tensor(fit_calibration(mean, new, interest), requires_grad=True)
    logit = np.log(mean / (1 - mean))
    features = torch.tensor(np.stack([np.ones(60), logit, new, new * logit, (new > 0.99) * 1.0], 1))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        features @ weights, torch.tensor(interest), reduction="sum"
    )
    (loss + 0.5 * (weights - torch.tensor(UNCHANGED)).square().sum()).backward()
    assert weights.grad.abs().max() < 1e-8


def test_few_observations_change_little():
    mean, new = np.array([0.4, 0.6]), np.array([0.0, 1.0])
    np.testing.assert_allclose(fit_calibration(mean, new, mean), UNCHANGED, atol=1e-9)
    few = fit_calibration(mean, new, np.array([0.0, 1.0]))
    assert np.abs(few - UNCHANGED).max() < 0.6
    for edge in (0.0, 1.0):
        assert np.isfinite(calibrated(np.array([edge]), np.array([0.5]), COEFFICIENTS)).all()
    some = np.array([0.123], dtype=np.float32)
    assert calibrated(some, np.array([1.0]), UNCHANGED) is some


def made_up_errors(size=200_000, noise=0.1):
    """Pairs whose ignorance and noise are known: mean, share, novelty, nothing known, feedback, expected interest."""
    rng = np.random.default_rng(2)
    mean, share, new = rng.uniform(0.1, 0.9, size), rng.uniform(0.1, 0.7, size), rng.random(size)
    nothing = rng.random(size) < 0.5
    rho = 1 / (1 + np.exp(-(-0.4 + 0.7 * np.log(share / (1 - share)) - 0.8 * new + 0.5 * nothing)))
    size_of = 1 / rho - 1
    interest = rng.beta(mean * size_of, (1 - mean) * size_of)
    kept = np.clip(interest, 1e-3, 1 - 1e-3)
    feedback = rng.beta(kept * (1 / noise - 1), (1 - kept) * (1 / noise - 1))
    return mean, share, new, nothing, feedback, interest


def test_the_ignorance_of_a_made_up_world_is_found_without_its_noise():
    mean, share, new, nothing, feedback, interest = made_up_errors()
    nu = noise_share(mean, feedback, float(np.square(feedback - interest).mean()))
    assert nu == pytest.approx(0.1, rel=0.03)
    found = fit_shares(mean, share, new, nothing, feedback, nu)
    np.testing.assert_allclose(found, [-0.4, 0.7, -0.8, 0.5], atol=0.05)
    calibration = Calibration(UNCHANGED, found, nu)
    ignorance = calibration.ignorance(mean, share, new, nothing)
    for part in (nothing, ~nothing, new > 0.5, share > 0.5):
        assert ignorance[part].mean() == pytest.approx(np.square(interest - mean)[part].mean(), rel=0.03)
    noise = calibration.noise_of(mean, ignorance)
    assert noise.mean() == pytest.approx(np.square(feedback - interest).mean(), rel=0.03)


def test_shares_of_variances_and_of_noise():
    np.testing.assert_allclose(shares(np.array([0.5, 0.2, 0.5]), np.array([0.05, 0.08, 0.3])), [0.2, 0.5, 0.99])
    # Of a squared error of 0.16, 0.1 is noise and 0.06 ignorance, which leaves f (1 - f) a mean of 0.25 - 0.06.
    mean = np.array([0.5, 0.5])
    assert noise_share(mean, np.array([0.1, 0.9]), 0.1) == pytest.approx(0.1 / 0.19)
    assert noise_share(mean, np.array([0.1, 0.9]), 0.0) == 0.0
    assert noise_share(mean, mean, 0.2) == 0.2 / 0.45, "no more than this is known where the noise exceeds the errors"


def test_few_errors_change_little_and_no_variance_is_none():
    """The slopes stay where nothing speaks against them, and what was predicted without error is not certain."""
    mean, share, new, nothing = np.array([0.4, 0.6]), np.array([0.2, 0.3]), np.array([0.0, 1.0]), np.zeros(2)
    found = fit_shares(mean, share, new, nothing, np.array([0.1, 0.9]), 0.0)
    np.testing.assert_allclose(found[1:3], [1.0, 0.0], atol=0.1)
    perfect = fit_shares(mean, share, new, nothing, mean, 0.1)
    ignorance = Calibration(UNCHANGED, perfect, 0.1).ignorance(mean, share, new, nothing)
    np.testing.assert_allclose(ignorance, 0.005 * mean * (1 - mean), rtol=1e-5)


@pytest.fixture(scope="module")
def world():
    return simulate(num_users=60, num_items=90, num_topics=4, num_test_users=10, num_candidates=9, observed_share=0.4)


def test_a_critic_is_calibrated_on_the_feedback_of_lists(world, monkeypatch):
    """With each pair predicted without itself; observed pairs only, and from then on for every list."""
    plain = Critic.fit(world.log, world.catalogue, epochs=2, ensemble=2)
    assert plain.calibration.mean.tolist() == [0, 1, 0, 0, 0]
    monkeypatch.setattr(of_critic, "watched_pairs", lambda *args: np.zeros((0, 2), dtype=np.int64))
    cured = Critic.fit(world.log, world.catalogue, epochs=2, ensemble=2, lists=world.train)
    raw = [mean for mean, _ in plain.predict_many(world.train)]
    mean = np.concatenate(raw)
    new = np.concatenate([novelty(lst, world.catalogue) for lst in world.train])
    interest = np.concatenate([lst.interest for lst in world.train])
    known = ~np.isnan(interest)
    expected = fit_calibration(mean[known], new[known], interest[known])
    np.testing.assert_allclose(cured.calibration.mean, expected, atol=1e-4)
    assert np.abs(expected - UNCHANGED).max() > 0.05
    for lst in world.test:
        before, _ = plain.predict(lst)
        after, variance = cured.predict(lst)
        new = novelty(lst, world.catalogue)
        np.testing.assert_allclose(after, by_hand(before, new, expected), atol=1e-3)
        # The model's share of what its mean allows becomes a share of what the calibrated one allows.
        _, of_model, _ = plain._predict_raw([lst])
        r = of_model / (before * (1 - before))
        a, b, c, d = cured.calibration.variance
        rho = 1 / (1 + np.exp(-(a + b * np.log(r / (1 - r)) + c * new + d)))  # nothing is known of test users
        np.testing.assert_allclose(variance, rho * after * (1 - after), rtol=1e-2)
    filled, _ = cured.fill(world.train[0])
    observed = ~np.isnan(world.train[0].interest)
    np.testing.assert_array_equal(filled[observed], world.train[0].interest[observed])


def test_what_was_watched_and_not_logged():
    lists = [make(0, [1, 2, 3]), make(0, [3, 4]), make(2, [5]), make(7, [6])]
    log = Interactions(np.array([0, 0, 2]), np.array([2, 9, 1]), np.ones(3, dtype=np.float32), np.zeros(3))
    found = watched_pairs(lists, log, 10)
    assert found.tolist() == [[0, 1], [0, 3], [0, 4], [2, 5]], "each once, and of users in the log"
    assert watched_pairs([], log, 10).shape == (0, 2)


def test_observed_feedback_and_prediction_are_fused_by_precision(world):
    """The critic's variance is its ignorance; an observation's is the noise, the same share nu of f (1 - f) for all."""
    certain, noisy = (
        Critic.fit(world.log, world.catalogue, epochs=2, ensemble=2, noise=noise) for noise in (0.0, 0.03)
    )
    lst = world.train[0]
    observed = ~np.isnan(lst.interest)
    assert observed.any()
    assert not observed.all()
    mean, ignorance = noisy.predict(lst)
    interest, doubt = noisy.fill(lst)
    noise = noisy.calibration.noise * (mean * (1 - mean) - ignorance)
    assert 0.05 < noisy.calibration.noise < 0.5
    assert (noise > 0).all()
    expected = (ignorance * lst.interest + noise * mean) / (ignorance + noise)
    np.testing.assert_allclose(interest, np.where(observed, expected, mean), rtol=1e-5)
    np.testing.assert_allclose(doubt, np.where(observed, ignorance * noise / (ignorance + noise), ignorance), rtol=1e-5)
    for one in (certain, Critic(noisy.model, noisy._log, world.catalogue, noisy.calibration, fuse=False)):
        interest, doubt = one.fill(lst)
        np.testing.assert_array_equal(interest[observed], lst.interest[observed])
        assert not doubt[observed].any()


def test_the_noise_of_feedback_is_no_ignorance(world):
    certain, noisy = (
        Critic.fit(world.log, world.catalogue, epochs=2, ensemble=2, noise=noise) for noise in (0.0, 0.03)
    )
    variances = [np.concatenate([v for _, v in one.predict_many(world.test)]).mean() for one in (certain, noisy)]
    assert variances[0] - variances[1] == pytest.approx(0.03, rel=0.25)
    assert certain.calibration.noise == 0


def make(user, history):
    from flexrec.data.lists import RankingList

    one = np.zeros(1, dtype=np.float32)
    return RankingList(user, 0.0, np.array(history), np.array([8]), one, one, one)


def test_watched_histories_are_context_of_unknown_interest(world, monkeypatch):
    """Of the users of a batch and no others, to each member a share of its own."""
    asked = []
    forward = module._Ensemble.forward

    def spy(network, pairs):
        if torch.is_grad_enabled():
            asked.append(pairs)
        return forward(network, pairs)

    monkeypatch.setattr(module._Ensemble, "forward", spy)
    monkeypatch.setattr(module, "_BATCH", 100)
    Critic.fit(world.log, world.catalogue, epochs=1, ensemble=2, lists=world.train)
    watched = {u: set() for u in range(60)}
    for lst in world.train:
        watched[lst.user] |= set(lst.history.tolist())
    shares = []
    assert len(asked) > 2
    for pairs in asked:
        logged = len(pairs.target_items)
        extra_rows, extra_items = pairs.context_rows[logged:], pairs.context_items[logged:]
        assert len(extra_items) > 0
        assert int(extra_rows.min()) >= 0
        assert not pairs.context_known[:, logged:].any()
        assert not pairs.context_interest[logged:].any()
        present = pairs.context_present[:, logged:]
        assert not torch.equal(present[0], present[1])
        shares.append(present.mean().item())
        of_row = [
            (set(pairs.target_items[pairs.target_rows == r].tolist()), set(extra_items[extra_rows == r].tolist()))
            for r in range(pairs.num_rows)
        ]
        for told, shown in of_row:
            assert not told & shown, "what is known is not shown again as unknown"
            assert any(shown <= of_user for of_user in watched.values())
    assert 0.5 < np.mean(shares) < 0.85, "min(1, 1.5 u) is 2/3 on average"


def test_the_cures_make_the_simulators_critic_better():
    """Unknown users: fewer errors, and new topics no longer thought too well of."""
    data = simulate(num_users=500, num_items=200, num_topics=8, num_test_users=60, observed_share=0.2, seed=1)
    truth = np.concatenate([lst.truth for lst in data.test])
    new = np.concatenate([novelty(lst, data.catalogue) for lst in data.test]) > 0.7
    errors, excess = [], []
    for lists in ((), data.train):
        critic = Critic.fit(data.log, data.catalogue, lists=lists, ensemble=2)
        mean = np.concatenate([mean for mean, _ in critic.predict_many(data.test)])
        errors.append(np.sqrt(np.mean((mean - truth) ** 2)))
        excess.append(np.mean((mean - truth)[new]))
    assert errors[1] < 0.97 * errors[0]
    assert abs(excess[1]) < 0.6 * excess[0]


def test_total_ignorance_leaves_no_negative_noise():
    """A share of 1, rounded to float32, is a little more than the mean allows for some means."""
    calibration = Calibration(variance=np.array([50.0, 0.0, 0.0, 0.0]), noise=0.1)
    mean = np.linspace(0.01, 0.99, 500)
    ignorance = calibration.ignorance(mean, np.full(500, 0.5), np.zeros(500), np.zeros(500, dtype=bool))
    assert (ignorance > mean * (1 - mean)).any()
    assert (calibration.noise_of(mean, ignorance) >= 0).all()
