"""The plain models of a critic by hand: a Bayesian regression for every user, and a mean over neighbours."""

import dataclasses

import numpy as np
import pytest
import torch

from flexrec.data import simulate
from flexrec.task import critic_linear as module
from flexrec.task.critic import Critic
from flexrec.task.critic_linear import Factorization, Neighbours, _Chosen
from flexrec.task.critic_pairs import Pairs, merged, pairs_of_lists, with_nothing_known


@pytest.fixture(scope="module")
def world():
    return simulate(
        num_users=250, num_items=120, num_topics=5, num_test_users=40, num_candidates=9, observed_share=0.4, seed=2
    )


@pytest.fixture(scope="module", params=["mf", "knn"])
def critic(request, world):
    return Critic.fit(world.log, world.catalogue, model=request.param, lists=world.train, noise=world.noise)


def context_of(pairs: Pairs, n: int):
    """Items, interests and whether these are known, of the user of target n, without the target itself."""
    for m in range(len(pairs.context_items)):
        if pairs.context_rows[m] == pairs.target_rows[n] and m != pairs.target_context[n]:
            yield int(pairs.context_items[m]), float(pairs.context_interest[m]), bool(pairs.context_known[0, m])


def told(model, pairs, n):
    """(item, surprise, weight) of everything that is known of the user."""
    items = model.items
    for item, interest, known in context_of(pairs, n):
        surprise = interest - float(items.mean) - float(items.offset[item])
        yield item, *((surprise, 1.0) if known else (model.chosen.surprise, model.chosen.weight))


def scaled(model, mean, variance):
    kept, middle = np.clip(mean, 0.01, 0.99), float(model.items.mean)
    return kept, variance * kept * (1 - kept) / (middle * (1 - middle))


def factorization_by_hand(model, pairs, n):
    items, target = model.items, int(pairs.target_items[n])
    precision = np.linalg.inv(model.prior.numpy())
    moment = precision @ model.prior_mean.numpy()
    for item, surprise, weight in told(model, pairs, n):
        f = items.features[item].numpy()
        precision = precision + weight / model.noise * np.outer(f, f)
        moment = moment + weight / model.noise * surprise * f
    f = items.features[target].numpy()
    covariance = np.linalg.inv(precision)
    mean = float(items.mean + items.offset[target]) + f @ covariance @ moment
    return scaled(model, mean, f @ covariance @ f + float(items.offset_variance[target]) + model.noise)


def neighbours_by_hand(model, pairs, n):
    items, target = model.items, int(pairs.target_items[n])
    alike, surprises = [], []
    for item, surprise, weight in told(model, pairs, n):
        alike.append(weight * max(0.0, float(items.features[item] @ items.features[target])) ** 2)
        surprises.append(surprise)
    alike, surprises = np.array(alike), np.array(surprises)
    similarity = alike.sum() + 1.0
    mean = (alike * surprises).sum() / similarity
    spread = ((alike * (surprises - mean) ** 2).sum() + model.variance) / similarity
    variance = spread + model.variance / similarity + float(items.offset_variance[target])
    return scaled(model, float(items.mean + items.offset[target]) + mean, variance)


def test_predictions_are_those_by_hand(world, critic):
    """Of logged users, of a user of whom only a history is known, and of one of whom nothing is."""
    model = critic.model
    stranger = dataclasses.replace(world.test[0], user=-1)
    nobody = dataclasses.replace(stranger, history=stranger.history[:0])
    lists = [*world.train[:4], stranger, nobody]
    pairs = pairs_of_lists(lists, merged(world.log, 120), 120)
    assert (pairs.target_context >= 0).any()
    mean, variance = model.predict(pairs)
    by_hand = factorization_by_hand if isinstance(model, Factorization) else neighbours_by_hand
    for n in range(len(pairs.target_items)):
        expected = by_hand(model, pairs, n)
        np.testing.assert_allclose((mean[n], variance[n]), expected, rtol=1e-4)


def test_users_are_known_by_what_they_said_and_what_they_watched(world, critic):
    truth = np.concatenate([lst.truth for lst in world.test])
    items = np.concatenate([lst.candidates for lst in world.test])
    counts = np.bincount(world.log.items, minlength=120)
    item_mean = np.bincount(world.log.items, world.log.interest, minlength=120) / np.maximum(counts, 1)
    error = np.square(np.concatenate([mean for mean, _ in critic.predict_many(world.test)]) - truth).mean()
    assert error < 0.9 * np.square(item_mean[items] - truth).mean()
    of_training = np.concatenate([lst.truth for lst in world.train])
    known = np.square(np.concatenate([m for m, _ in critic.predict_many(world.train)]) - of_training).mean()
    assert known < error, "whoever said something is known better"
    assert critic.model.chosen.weight > 0


def test_what_is_watched_counts_as_predicts_best(world, monkeypatch):
    for model in (Factorization, Neighbours):
        tried = []
        predict = model.predict

        def spy(self, pairs, predict=predict, tried=tried):
            mean, variance = predict(self, pairs)
            tried.append((self.chosen, mean, pairs))
            return mean, variance

        kept = {}
        fit = model.fit.__func__

        def fit_and_keep(cls, evidence, seed, fit=fit, kept=kept):
            kept["evidence"] = evidence
            return fit(cls, evidence, seed)

        with monkeypatch.context() as patch:
            patch.setattr(model, "predict", spy)
            patch.setattr(model, "fit", classmethod(fit_and_keep))
            name = {Factorization: "mf", Neighbours: "knn"}[model]
            critic = Critic.fit(world.log, world.catalogue, model=name, lists=world.train)
        evidence = kept["evidence"]
        trials = tried[: len(module._CHOSEN)]
        assert [(c.surprise, c.weight) for c, _, _ in trials] == list(module._CHOSEN)
        assert not any(pairs.context_known.any() for _, _, pairs in trials)
        errors = [np.square(mean - evidence.interest).mean() for _, mean, _ in trials]
        assert critic.model.chosen == _Chosen(*module._CHOSEN[int(np.argmin(errors))])
        none = Critic.fit(world.log, world.catalogue, model=name)
        assert none.model.chosen == _Chosen(), "without histories nothing says what is watched"


def test_the_noise_of_a_made_up_log_is_found():
    """Weights of one topic each, and what is left is noise: the regression of every user finds the spread of both."""
    rng = np.random.default_rng(0)
    num_users, num_items = 400, 60
    topic = np.arange(num_items) % 3
    weights = 0.15 * rng.normal(size=(num_users, 3))
    interest = 0.5 + weights[:, topic] + 0.1 * rng.normal(size=(num_users, num_items))
    data = simulate(num_users=4, num_items=90, num_topics=4, num_test_users=1, num_candidates=6)
    names = tuple(map(str, range(num_items)))
    catalogue = dataclasses.replace(data.catalogue, ids=names, titles=names, topics=tuple((f"{t}",) for t in topic))
    users, items = np.divmod(np.arange(num_users * num_items), num_items)
    keep = rng.random(len(users)) < 0.5
    log = dataclasses.replace(
        data.log,
        users=users[keep],
        items=items[keep],
        interest=np.clip(interest, 0, 1).ravel()[keep].astype(np.float32),
        times=np.zeros(keep.sum()),
    )
    model = Critic.fit(log, catalogue, model="mf").model
    assert model.noise == pytest.approx(0.01, rel=0.2)
    spread = np.einsum("if,fg,ig->i", model.items.features, model.prior, model.items.features)
    assert spread.mean() == pytest.approx(0.15**2, rel=0.35)


def test_the_global_generator_is_left_alone_and_the_seed_decides(world):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for model in ("mf", "knn"):
        ones = [
            Critic.fit(world.log, world.catalogue, model=model, seed=seed).predict(world.test[0])[0]
            for seed in (0, 0, 1)
        ]
        np.testing.assert_array_equal(ones[0], ones[1])
        assert not np.array_equal(ones[0], ones[2])
    assert torch.equal(torch.rand(3), expected)


def test_nothing_known_is_nothing_told(world, critic):
    pairs = pairs_of_lists(world.train[:3], merged(world.log, 120), 120)
    silent = with_nothing_known(pairs)
    kept = critic.model.chosen
    try:
        critic.model.chosen = _Chosen()
        nobody = dataclasses.replace(world.train[0], user=-1, history=np.zeros(0, dtype=np.int64))
        of_nobody = critic.model.predict(pairs_of_lists([nobody], merged(world.log, 120), 120))[0]
        np.testing.assert_allclose(critic.model.predict(silent)[0][:9], of_nobody, rtol=1e-5)
    finally:
        critic.model.chosen = kept
