"""The critic on a log made here, whose structure is known: accuracy, calibration, new users, observed pairs."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from flexrec.data.lists import Catalogue, Interactions, RankingList
from flexrec.task import critic as of_critic
from flexrec.task import critic_ensemble as module
from flexrec.task.critic import Critic
from flexrec.task.critic_pairs import merged, topic_shares

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
    changed = Critic(critic.model, _sorted(world.log, interest), world.catalogue, critic.calibration)
    after = changed.predict(lists[0])[0]
    assert after[0] == pytest.approx(before[0], abs=1e-6)
    assert after[1] != before[1]  # to predict another pair it does count


def _sorted(log: Interactions, interest: np.ndarray | None = None) -> Interactions:
    order = np.lexsort((log.items, log.users))
    interest = log.interest if interest is None else interest
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
    monkeypatch.setattr("flexrec.task.critic._PREDICT_LISTS", 3)
    rng = np.random.default_rng(1)
    lists = [
        make_list(u, rng.permutation(NUM_ITEMS)[: rng.integers(1, 40)], history=rng.permutation(NUM_ITEMS)[:5])
        for u in (0, 7, 400, 7, 2, 500, 0)
    ]
    for lst, (mean, variance) in zip(lists, critic.fill_many(lists), strict=True):
        np.testing.assert_allclose(mean, critic.fill(lst)[0], atol=1e-6)
        np.testing.assert_allclose(variance, critic.fill(lst)[1], atol=1e-6)
    assert critic.predict_many([]) == []


class Fit:
    """What a fit on part of the world's log trained on, held out and tried, and the critic that came of it."""

    def __init__(self, monkeypatch, world, size=400, **options):
        self.trained, self.tried, self.batches, self.start = set(), [], [], None
        self.log = Interactions(
            *(a[:size] for a in (world.log.users, world.log.items, world.log.interest, world.log.times))
        )
        training_pairs, leave_out_pairs = module._training_pairs, of_critic.leave_out_pairs
        user_batches, forward, make = module._user_batches, module._Ensemble.forward, module._Ensemble.__init__

        def spy_on_training(log, rows, *more):
            pairs, interest = training_pairs(log, rows, *more)
            users = rows[pairs.target_rows.numpy()]
            self.trained |= set(zip(users.tolist(), pairs.target_items.tolist(), strict=True))
            context = zip(rows[pairs.context_rows.numpy()].tolist(), pairs.context_items.tolist(), strict=True)
            self.trained |= set(context)
            return pairs, interest

        def spy_on_holding_out(log, held_out):
            self.held_out = set(zip(log.users[held_out].tolist(), log.items[held_out].tolist(), strict=True))
            self.target = torch.from_numpy(log.interest[held_out])
            return leave_out_pairs(log, held_out)

        def spy_on_batches(log, rng):
            self.batches.append([users.tolist() for users in user_batches(log, rng)])
            return [np.array(users) for users in self.batches[-1]]

        def spy_on_trying(network, pairs):
            mean, log_variance = forward(network, pairs)
            if not torch.is_grad_enabled() and len(mean[0]) == len(self.target):
                self.tried.append((mean.mean(0) - self.target).square().mean().item())
            return mean, log_variance

        def spy_on_making(network, *args):
            make(network, *args)
            self.start = network.item_embedding.detach().clone()

        with monkeypatch.context() as patch:
            patch.setattr(module, "_training_pairs", spy_on_training)
            patch.setattr(of_critic, "leave_out_pairs", spy_on_holding_out)
            patch.setattr(module, "_user_batches", spy_on_batches)
            patch.setattr(module._Ensemble, "forward", spy_on_trying)
            patch.setattr(module._Ensemble, "__init__", spy_on_making)
            self.critic = Critic.fit(self.log, world.catalogue, ensemble=2, **options)


def test_the_held_out_tenth_is_not_trained_on(world, monkeypatch):
    fit = Fit(monkeypatch, world, epochs=3)
    everything = set(zip(fit.log.users.tolist(), fit.log.items.tolist(), strict=True))
    assert len(fit.held_out) == round(0.1 * len(everything)) == 40
    assert fit.trained == everything - fit.held_out


def test_the_best_epoch_is_kept(world, monkeypatch):
    """On so little that it overfits: the last epoch is not the best."""
    fit = Fit(monkeypatch, world, size=200, epochs=20)
    *epochs, kept, _ = fit.tried  # the last is of users of whom nothing is known
    assert len(epochs) == 20
    assert min(epochs) < epochs[-1]
    assert kept == min(epochs)


def test_variances_equal_the_squared_errors_on_the_held_out_tenth(world, monkeypatch):
    """On average, as the fit weighs pairs, over what was predicted with and without the users' feedback."""
    fit = Fit(monkeypatch, world, epochs=5)
    # The critic that knows all but the held-out pairs predicts them as it did when it was fitted.
    keep = [pair not in fit.held_out for pair in zip(fit.log.users.tolist(), fit.log.items.tolist(), strict=True)]
    seen = _sorted(fit.log.select(np.array(keep)))
    critic = Critic(fit.critic.model, seen, world.catalogue, fit.critic.calibration)
    monkeypatch.setattr(of_critic, "novelty", lambda lst, catalogue: np.zeros(len(lst.candidates)))
    pairs = sorted(fit.held_out)
    known = [make_list(user, np.array([item])) for user, item in pairs]
    unknown = [make_list(-1, np.array([item]), history=seen.items[seen.users == user]) for user, item in pairs]
    mean, variance = (np.concatenate(parts) for parts in zip(*critic.predict_many(known + unknown), strict=True))
    error = mean - np.tile(world.feedback[tuple(np.array(pairs).T)], 2)
    weight = 1 / np.sqrt(mean * (1 - mean))
    assert (weight * variance).mean() == pytest.approx((weight * error**2).mean(), rel=1e-3)


def test_weights_batches_and_the_held_out_tenth_are_drawn_from_the_seed(world, monkeypatch):
    one, same, other = (Fit(monkeypatch, world, epochs=2, seed=seed) for seed in (0, 0, 1))
    for a, b in ((one, same), (one, other)):
        equal = b is same
        assert torch.equal(a.start, b.start) == equal
        assert (a.held_out == b.held_out) == equal
        assert (a.batches == b.batches) == equal
    assert one.batches[1] != one.batches[2], "every epoch draws its batches anew"
    assert not torch.equal(one.start[0], one.start[1]), "the members start apart"


@pytest.mark.parametrize(("size", "epochs"), [(10, 30), (40_000, 25), (200_000, 8)])
def test_passes_over_the_log_are_about_a_million_interactions(monkeypatch, size, epochs):
    """And 8 to 30 in any case."""

    class Started(Exception):
        pass

    def start(what, passes, **options):
        raise Started(len(passes))

    monkeypatch.setattr(module, "told", start)
    log = Interactions(np.arange(size), np.zeros(size, np.int64), np.full(size, 0.5, np.float32), np.zeros(size))
    with pytest.raises(Started, match=f"^{epochs}$"):
        Critic.fit(log, Catalogue(("a",), ("a",), ((),)))


def test_beta_nll_and_its_gradient_by_hand():
    mean = torch.tensor([[0.2, 0.7], [0.5, 0.1]], requires_grad=True)
    log_variance = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    interest = torch.tensor([0.6, 0.3])
    loss = module._beta_nll(mean, log_variance, interest)
    variance, error = log_variance.detach().exp(), mean.detach() - interest
    nll = 0.5 * (error.square() / variance + log_variance.detach())
    torch.testing.assert_close(loss.detach(), (variance.sqrt() * nll).mean(1).sum())
    loss.backward()
    torch.testing.assert_close(mean.grad, variance.sqrt() * error / variance / 2)
    # The weight is held fixed: only the likelihood's own slope remains.
    torch.testing.assert_close(log_variance.grad, variance.sqrt() * 0.5 * (1 - error.square() / variance) / 2)


def test_variance_is_noise_plus_disagreement():
    means = torch.tensor([[0.2, 0.6], [0.4, 0.6], [0.9, 0.6]])
    log_variances = torch.tensor([[-1.0, -2.0], [-2.0, -3.0], [-4.0, -1.0]])
    mean, variance = module.Ensemble(lambda pairs: (means, log_variances)).predict(None)
    np.testing.assert_allclose(mean, [0.5, 0.6], rtol=1e-6)
    noise = np.exp(log_variances.numpy()).mean(axis=0)
    disagreement = np.array([np.square([-0.3, -0.1, 0.4]).mean(), 0.0])
    np.testing.assert_allclose(variance, noise + disagreement, rtol=1e-5)


def test_members_are_shown_shares_of_their_own(world, monkeypatch):
    """Of the interactions, and of the interest in those: so that users with little or no feedback are served, too."""
    log = merged(world.log, NUM_ITEMS)
    rows = np.arange(40, 80)
    pairs, interest = module._training_pairs(log, rows, 3, torch.Generator().manual_seed(0))
    users = rows[pairs.target_rows.numpy()]
    inside = (log.users >= 40) & (log.users < 80)
    np.testing.assert_array_equal(users, log.users[inside])
    np.testing.assert_array_equal(pairs.target_items, log.items[inside])
    np.testing.assert_array_equal(interest, log.interest[inside])
    torch.testing.assert_close(pairs.target_context, torch.arange(len(interest)))
    for shares in (pairs.context_present, pairs.context_known):
        assert shares.shape == (3, len(interest))
        assert not torch.equal(shares[0], shares[1])
        # Half of the users are shown everything, the others uniform shares: three quarters on average.
        assert shares.mean() == pytest.approx(0.75, abs=0.08)
        of_users = np.array([shares[0][users == user].mean() for user in rows])
        assert 0.3 < np.mean(of_users == 1.0) < 0.7
        assert of_users.min() < 0.4
    assert not torch.equal(pairs.context_present, pairs.context_known)


def test_repeated_pairs_are_averaged():
    log = Interactions(
        np.array([1, 0, 1]), np.array([2, 3, 2]), np.array([0.2, 0.5, 0.8], np.float32), np.array([4.0, 5.0, 6.0])
    )
    result = merged(log, 10)
    assert (result.users.tolist(), result.items.tolist()) == ([0, 1], [3, 2])
    assert result.interest.tolist() == pytest.approx([0.5, 0.5])


def test_rows_of_topics_have_length_one():
    names = ("a", "b", "c")
    shares = topic_shares(Catalogue(names, names, (("x",), ("x", "y"), ())))
    np.testing.assert_allclose(shares, [[1.0, 0.0], [0.5**0.5, 0.5**0.5], [0.0, 0.0]], rtol=1e-6)


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
