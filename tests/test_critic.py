"""The critic on a log made here, whose structure is known: accuracy, calibration, new users, observed pairs."""

import dataclasses
import functools

import numpy as np
import pytest

from flexrec.critic import Critic
from flexrec.data.lists import Catalogue, Interactions, RankingList

NUM_USERS, NUM_ITEMS, NUM_TOPICS = 300, 120, 6


@dataclasses.dataclass(frozen=True)
class World:
    catalogue: Catalogue
    log: Interactions  # of the first NUM_USERS users
    truth: np.ndarray  # (2 NUM_USERS, NUM_ITEMS)
    feedback: np.ndarray  # the same with noise
    noise: np.ndarray  # (NUM_ITEMS,) its standard deviation
    observed: np.ndarray  # (2 NUM_USERS, NUM_ITEMS) bool


@functools.cache
def make_world() -> World:
    """Interest = sigmoid(taste for the item's topic + item quality) + noise that is large for every other topic."""
    rng = np.random.default_rng(0)
    topic = rng.integers(NUM_TOPICS, size=NUM_ITEMS)
    taste = 1.8 * rng.normal(size=(2 * NUM_USERS, NUM_TOPICS))
    truth = 1 / (1 + np.exp(-(taste[:, topic] + 0.7 * rng.normal(size=NUM_ITEMS))))
    noise = np.where(topic % 2 == 0, 0.03, 0.25)
    feedback = np.clip(truth + noise * rng.normal(size=truth.shape), 0, 1).astype(np.float32)
    observed = rng.random(truth.shape) < 0.5 * truth  # users choose what they like: choices tell something too
    users, items = np.nonzero(observed[:NUM_USERS])
    order = rng.permutation(len(users))
    users, items = users[order], items[order]
    names = tuple(f"item {i}" for i in range(NUM_ITEMS))
    return World(
        catalogue=Catalogue(names, names, tuple((f"topic {t}",) for t in topic)),
        log=Interactions(users, items, feedback[users, items], np.arange(len(users), dtype=np.float64)),
        truth=truth,
        feedback=feedback,
        noise=noise,
        observed=observed,
    )


def make_list(user: int, candidates: np.ndarray, interest=None, history=()) -> RankingList:
    size = len(candidates)
    unknown = np.full(size, np.nan, dtype=np.float32)
    return RankingList(
        user=user,
        time=0.0,
        history=np.array(history, dtype=np.int64),
        candidates=np.asarray(candidates, dtype=np.int64),
        interest=unknown if interest is None else np.asarray(interest, dtype=np.float32),
        popularity=np.zeros(size, dtype=np.float32),
        trend=np.zeros(size, dtype=np.float32),
    )


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def critic(world) -> Critic:
    return Critic.fit(world.log, world.catalogue, epochs=15)


@pytest.fixture(scope="module")
def unobserved(world, critic):
    """Mean, variance, feedback, users and items of all pairs of training users that are not in the log."""
    lists = [make_list(u, np.flatnonzero(~world.observed[u])) for u in range(NUM_USERS)]
    mean, variance = (np.concatenate(parts) for parts in zip(*critic.predict_many(lists), strict=True))
    users = np.repeat(np.arange(NUM_USERS), [len(lst.candidates) for lst in lists])
    items = np.concatenate([lst.candidates for lst in lists])
    return mean, variance, world.feedback[users, items], users, items


def test_beats_the_global_and_the_item_mean(world, unobserved):
    mean, _, feedback, users, items = unobserved
    log = world.log
    item_mean = np.bincount(log.items, log.interest) / np.bincount(log.items)
    error = np.square(mean - feedback).mean()
    assert error < 0.5 * np.square(item_mean[items] - feedback).mean()
    assert error < 0.5 * np.square(log.interest.mean() - feedback).mean()
    assert np.corrcoef(mean, world.truth[users, items])[0, 1] > 0.75


def test_variance_is_calibrated(unobserved):
    mean, variance, feedback, _, _ = unobserved
    ratio = np.square(mean - feedback).mean() / variance.mean()
    assert 0.67 < ratio < 1.5
    assert np.corrcoef(variance, np.square(mean - feedback))[0, 1] > 0.15
    # Calibrated in the small too: the fifth with the largest variance has about that error, and so on.
    for fifth in np.array_split(np.argsort(variance), 5):
        assert 1 / 3 < np.square(mean - feedback)[fifth].mean() / variance[fifth].mean() < 3


def test_variance_knows_where_feedback_is_noisy(world, unobserved):
    _, variance, _, _, items = unobserved
    noisy = world.noise[items] > 0.1
    assert variance[noisy].mean() > 1.5 * variance[~noisy].mean()


def test_output_is_in_range(unobserved):
    mean, variance, *_ = unobserved
    assert mean.dtype == variance.dtype == np.float32
    assert ((mean >= 0) & (mean <= 1)).all()
    assert (variance > 0).all()


def test_new_users_are_served_from_their_history(world, critic):
    # Users who are not in the log, and of whom only what they chose is known, not how they liked it.
    new = range(NUM_USERS, 2 * NUM_USERS)
    lists = [make_list(u, np.arange(NUM_ITEMS), history=np.flatnonzero(world.observed[u])) for u in new]
    mean, variance = (np.stack(parts) for parts in zip(*critic.predict_many(lists), strict=True))
    truth = world.truth[new.start :]
    # Better than the item means, which are all there is without a history.
    log = world.log
    item_mean = np.bincount(log.items, log.interest) / np.bincount(log.items)
    assert np.square(mean - truth).mean() < 0.85 * np.square(item_mean - truth).mean()
    # Less is known than of a training user.
    of_training = np.concatenate(
        [v for _, v in critic.predict_many([make_list(u, np.arange(NUM_ITEMS)) for u in range(300)])]
    )
    assert variance.mean() > of_training.mean()


def test_user_numbers_mean_nothing(world, critic):
    history = np.flatnonzero(world.observed[NUM_USERS])
    first = critic.predict(make_list(NUM_USERS, np.arange(30), history=history))
    for user in (-1, NUM_USERS + 5, 10**9):
        other = critic.predict(make_list(user, np.arange(30), history=history[::-1]))
        np.testing.assert_allclose(other, first, atol=1e-6)


def test_feedback_of_a_pair_is_not_used_to_predict_it(world):
    user, item = 3, int(np.flatnonzero(world.observed[3])[0])
    at = np.flatnonzero((world.log.users == user) & (world.log.items == item))
    interest = world.log.interest.copy()
    lists = [make_list(user, np.array([item, (item + 1) % NUM_ITEMS]))]
    critic = Critic.fit(world.log, world.catalogue, epochs=1, ensemble=2)
    before = critic.predict(lists[0])[0]
    interest[at] = 1.0 - interest[at]
    # The same networks, asked with another value of that one pair.
    changed = Critic(critic._network, _sorted(world.log, interest), NUM_ITEMS, 1.0)
    after = changed.predict(lists[0])[0]
    assert after[0] == pytest.approx(before[0], abs=1e-6)
    assert after[1] != before[1]  # to predict another pair it does count


def _sorted(log: Interactions, interest: np.ndarray) -> Interactions:
    order = np.lexsort((log.items, log.users))
    return Interactions(log.users[order], log.items[order], interest[order], log.times[order])


def test_observed_pairs_are_exact_and_certain(world, critic):
    interest = np.full(NUM_ITEMS, np.nan, dtype=np.float32)
    seen = np.arange(0, NUM_ITEMS, 3)
    interest[seen] = np.linspace(0, 1, len(seen))
    lst = make_list(5, np.arange(NUM_ITEMS), interest)
    filled, variance = critic.fill(lst)
    np.testing.assert_array_equal(filled[seen], interest[seen])
    assert (variance[seen] == 0).all()
    predicted, predicted_variance = critic.predict(lst)
    unseen = np.setdiff1d(np.arange(NUM_ITEMS), seen)
    np.testing.assert_array_equal(filled[unseen], predicted[unseen])
    np.testing.assert_array_equal(variance[unseen], predicted_variance[unseen])
    assert filled.dtype == variance.dtype == np.float32


def test_many_lists_at_once_equal_one_by_one(world, critic, monkeypatch):
    monkeypatch.setattr("flexrec.critic._PREDICT_LISTS", 3)
    rng = np.random.default_rng(1)
    lists = [
        make_list(u, rng.permutation(NUM_ITEMS)[: rng.integers(1, 40)], history=rng.permutation(NUM_ITEMS)[:5])
        for u in (0, 7, 400, 7, 2, 500, 0)
    ]
    for lst, (mean, variance) in zip(lists, critic.fill_many(lists), strict=True):
        np.testing.assert_allclose(mean, critic.fill(lst)[0], atol=1e-6)
        np.testing.assert_allclose(variance, critic.fill(lst)[1], atol=1e-6)
    assert critic.predict_many([]) == []


def test_seed_decides_everything(world):
    lst = make_list(0, np.arange(50))
    fits = [Critic.fit(world.log, world.catalogue, seed=seed, epochs=2, ensemble=2).predict(lst) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(fits[0], fits[1])
    assert not np.array_equal(fits[0][0], fits[2][0])


def test_the_log_may_be_in_any_order_and_repeat_itself(world):
    lst = make_list(0, np.arange(50))
    log = world.log
    twice = Interactions(*(np.tile(a, 2) for a in (log.users, log.items, log.interest, log.times)))
    once = Critic.fit(log, world.catalogue, epochs=2, ensemble=2).predict(lst)
    np.testing.assert_allclose(Critic.fit(twice, world.catalogue, epochs=2, ensemble=2).predict(lst), once, atol=1e-6)


def test_users_without_anything_known_get_a_prediction(world, critic):
    mean, variance = critic.predict(make_list(10**6, np.arange(NUM_ITEMS)))
    log = world.log
    item_mean = np.bincount(log.items, log.interest) / np.bincount(log.items)
    assert abs(mean.mean() - item_mean.mean()) < 0.15
    assert np.isfinite(variance).all()


@pytest.mark.parametrize("size", [2, 5])
def test_tiny_logs_are_fitted(world, size):
    log = Interactions(*(a[:size] for a in (world.log.users, world.log.items, world.log.interest, world.log.times)))
    mean, variance = Critic.fit(log, world.catalogue, epochs=2).predict(make_list(0, np.arange(NUM_ITEMS)))
    assert ((mean >= 0) & (mean <= 1)).all()
    assert np.isfinite(variance).all()


def test_items_without_topics(world):
    catalogue = dataclasses.replace(world.catalogue, topics=((),) * NUM_ITEMS)
    mean, _ = Critic.fit(world.log, catalogue, epochs=1, ensemble=1).predict(make_list(0, np.arange(5)))
    assert np.isfinite(mean).all()


def test_nothing_outside_touches_the_global_generator(world):
    import torch

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Critic.fit(world.log, world.catalogue, epochs=1, ensemble=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": np.array([0, -1])}, "log.users must be >= 0, got -1"),
        ({"items": np.array([0, NUM_ITEMS])}, r"log.items must lie in \[0, 120\), got 0 to 120"),
        (
            {"interest": np.array([0.5, np.nan], dtype=np.float32)},
            r"log.interest must lie in \[0, 1\], got nan at index 1",
        ),
        ({"interest": np.array([1.5, 0.0], dtype=np.float32)}, "got 1.5 at index 0"),
    ],
)
def test_wrong_log_is_named(world, change, message):
    columns = {"users": np.array([0, 1]), "items": np.array([0, 1]), "interest": np.array([0.5, 0.1], dtype=np.float32)}
    with pytest.raises(ValueError, match=message):
        Critic.fit(Interactions(**(columns | change), times=np.zeros(2)), world.catalogue)


def test_other_wrong_input_is_named(world, critic):
    empty = Interactions(*(a[:0] for a in (world.log.users, world.log.items, world.log.interest, world.log.times)))
    with pytest.raises(ValueError, match="at least 2 interactions to fit a critic on, got 0"):
        Critic.fit(empty, world.catalogue)
    with pytest.raises(ValueError, match="ensemble and epochs must be at least 1, got 0 and 3"):
        Critic.fit(world.log, world.catalogue, ensemble=0, epochs=3)
    with pytest.raises(ValueError, match=r"lists\[1\].candidates must hold items in \[0, 120\)"):
        critic.predict_many([make_list(0, np.array([1])), make_list(0, np.array([500]))])
