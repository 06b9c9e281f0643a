"""The simulated data: its promises to those who train on it, and no leak from test users or the future."""

import numpy as np
import pytest

from flexrec.data import simulator as module
from flexrec.data.build import moments
from flexrec.data.simulator import simulate

SMALL = {"num_users": 60, "num_items": 150, "num_topics": 8, "num_test_users": 20, "watches_per_user": 40}
NAMES = ("history", "history_interest", "candidates", "interest", "popularity", "trend", "truth")


def assert_same_lists(ones, others):
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert (one.user, one.time) == (other.user, other.time)
        for name in NAMES:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def assert_same_log(one, other):
    for name in ("users", "items", "interest", "times"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.fixture(scope="module")
def small():
    return simulate(**SMALL)


@pytest.fixture(scope="module")
def default():
    return simulate()


def test_the_data_set_is_what_was_asked_for(small):
    assert (small.name, small.unobserved, small.resample) == ("simulated", "critic", None)
    assert (len(small.catalogue), len(small.train), len(small.test)) == (150, 180, 60)
    assert len(set(small.catalogue.titles)) == 150
    assert len(small.catalogue.topic_names) == 8
    assert {len(topics) for topics in small.catalogue.topics} == {1, 2}
    for lst in small.train + small.test:
        assert lst.candidates.shape == lst.interest.shape == lst.truth.shape == (30,)
        assert len(set(lst.candidates.tolist())) == 30
        assert len(set(lst.history.tolist())) == len(lst.history) <= 20
        assert not set(lst.candidates.tolist()) & set(lst.history.tolist())
        assert {getattr(lst, name).dtype for name in ("interest", "truth", "popularity", "trend")} == {np.dtype("f4")}
        observed = lst.interest[~np.isnan(lst.interest)]
        for values in (observed, lst.truth, lst.trend):
            assert ((values >= 0) & (values <= 1)).all()


def test_only_a_share_of_the_feedback_is_kept(small):
    kept = 1 - np.isnan([lst.interest for lst in small.train]).mean()
    assert kept == pytest.approx(0.1, abs=0.02)  # 5400 pairs: standard error 0.004
    full = simulate(**SMALL, observed_share=1.0)
    assert not np.isnan([lst.interest for lst in full.train + full.test]).any()
    assert len(full.log) == pytest.approx(10 * len(small.log), rel=0.1)


def test_logged_feedback_is_an_unbiased_view_of_the_truth():
    full = simulate(**SMALL, observed_share=1.0)
    interest = np.array([lst.interest for lst in full.train])
    truth = np.array([lst.truth for lst in full.train])
    error = interest - np.clip(truth, 0.01, 0.99)
    assert 0.05 < error.std() < 1 / 6
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(error.size)
    middle = (truth > 0.4) & (truth < 0.6)
    assert abs(error[middle].mean()) < 4 * error[middle].std() / np.sqrt(middle.sum())


def test_feedback_in_training_lists_is_in_the_log_at_the_time_of_the_list(small):
    logged = {
        (u, i, t): x
        for u, i, t, x in zip(
            *(getattr(small.log, name).tolist() for name in ("users", "items", "times", "interest")), strict=True
        )
    }
    for lst in small.train:
        for item, x in zip(lst.candidates.tolist(), lst.interest.tolist(), strict=True):
            assert logged.get((lst.user, item, lst.time)) == (None if np.isnan(x) else x)


def test_the_history_is_what_was_watched_last_before_the_list():
    """With nothing thinned away the log holds every view: a training user's rows that are at no list's time."""
    full = simulate(**SMALL, observed_share=1.0)
    log = full.log
    for lst in full.train[::5]:
        list_times = [other.time for other in full.train if other.user == lst.user]
        watched = log.select((log.users == lst.user) & ~np.isin(log.times, list_times))
        assert lst.history.tolist() == watched.items[watched.times < lst.time][-20:].tolist()
        assert len(lst.history) > 5


def test_popularity_and_trend_come_from_the_log_before_the_list(small):
    log = small.log
    assert (np.diff(log.times) >= 0).all()
    for lst in small.train[::7] + small.test[::7]:
        windows = []
        for start, end in ((-np.inf, lst.time), (lst.time - 10, lst.time), (lst.time - 20, lst.time - 10)):
            inside = (log.times >= start) & (log.times < end)
            windows.append(np.bincount(log.items[inside], minlength=150))
        before, recent, previous = windows
        np.testing.assert_array_equal(lst.popularity, before[lst.candidates])
        trend = np.maximum(0.0, recent - previous * recent.sum() / previous.sum()) / (recent + 5.0)
        np.testing.assert_allclose(lst.trend, trend[lst.candidates], rtol=1e-6)


def test_training_does_not_know_how_many_test_users_there_are(small):
    for number in (1, 35):
        other = simulate(**{**SMALL, "num_test_users": number}, test_lists_per_user=5)
        assert len(other.test) == 5 * number
        assert_same_lists(small.train, other.train)
        assert_same_log(small.log, other.log)
        assert small.catalogue == other.catalogue


def test_no_test_user_in_log_or_training(small):
    tested = {lst.user for lst in small.test}
    assert len(tested) == 20
    assert not tested & set(small.log.users.tolist())
    assert not tested & {lst.user for lst in small.train}
    assert set(small.log.users.tolist()) <= set(range(60))


def test_test_users_have_tastes_of_their_own(monkeypatch):
    """Drawn by nothing that training users were drawn by; the same tastes would be a leak with other numbers on it."""
    tastes = []
    true_taste = module._true_taste
    monkeypatch.setattr(module, "_true_taste", lambda *args: tastes.append(true_taste(*args)) or tastes[-1])
    simulate(**{**SMALL, "num_test_users": SMALL["num_users"]}, test_lists_per_user=1)
    train, test = tastes
    assert train.shape == test.shape == (60, 150)
    # Items of one quality please everybody, so tastes correlate, but no two users share theirs.
    between = np.corrcoef(train, test)[:60, 60:]
    within = np.corrcoef(train)[~np.eye(60, dtype=bool)]
    assert between.max() < 0.95
    assert between.mean() == pytest.approx(within.mean(), abs=0.1)
    assert between.max() < within.max() + 0.1


def watches(full, lst):
    """A training user's views where nothing is thinned away: rows of the log that are at no list's time."""
    list_times = [other.time for other in full.train if other.user == lst.user]
    return full.log.select((full.log.users == lst.user) & ~np.isin(full.log.times, list_times))


def test_what_is_watched_later_may_be_a_candidate():
    """Else the absence of an item would tell that its user is going to watch it."""
    full = simulate(**SMALL, observed_share=1.0)
    found = expected = 0.0
    for lst in full.train:
        watched = watches(full, lst)
        later = watched.items[watched.times > lst.time]
        found += len(np.intersect1d(lst.candidates, later))
        unknown = 150 - np.sum(watched.times < lst.time)
        expected += 30 * len(later) / unknown  # as many as of any other items; more, as users watch what they like
    assert found > 0.9 * expected > 200


def test_the_history_tells_what_was_liked_where_feedback_was_kept(small):
    full = simulate(**SMALL, observed_share=1.0)
    liked = 0
    for lst in full.train:
        watched = watches(full, lst)
        np.testing.assert_array_equal(lst.history_interest, watched.interest[watched.times < lst.time][-20:])
        liked += lst.history_liked.sum()
    assert liked > 100
    share = np.mean(np.isnan(np.concatenate([lst.history_interest for lst in small.train])))
    assert share == pytest.approx(0.9, abs=0.03)


def test_a_third_of_the_candidates_each_by_taste_by_the_day_and_at_random():
    dataset = simulate(**{**SMALL, "num_users": 200, "num_items": 400})
    truth = np.array([lst.truth for lst in dataset.train])
    # Were they all drawn by taste, or none, the mean interest would be another.
    assert 0.2 < truth.mean() < 0.45
    popularity = np.array([lst.popularity for lst in dataset.train])
    everything = np.bincount(dataset.log.items, minlength=400).mean() / 2
    assert popularity.mean() > 1.1 * everything
    # A place in the list says nothing.
    by_place = truth.mean(axis=0)
    assert np.abs(by_place - truth.mean()).max() < 4.5 * truth.std() / np.sqrt(len(truth))


def test_the_saved_trend_is_of_the_end_of_the_log(small):
    log, end = small.log, small.log.times[-1]
    recent = np.bincount(log.items[log.times > end - 10], minlength=150)
    previous = np.bincount(log.items[(log.times > end - 20) & (log.times <= end - 10)], minlength=150)
    expected = np.maximum(0.0, recent - previous * recent.sum() / previous.sum()) / (recent + 5.0)
    np.testing.assert_allclose(small.trend, expected, rtol=1e-5, atol=1e-7)
    assert (small.trend > 0).sum() > 10


def test_every_size_is_as_asked():
    dataset = simulate(
        num_users=30,
        num_items=90,
        num_topics=3,
        num_candidates=9,
        history_length=4,
        lists_per_user=2,
        watches_per_user=25,
        days=50,
        num_test_users=7,
        test_lists_per_user=5,
        observed_share=1.0,
    )
    assert (len(dataset.train), len(dataset.test), len(dataset.catalogue)) == (60, 35, 90)
    assert {len(lst.candidates) for lst in dataset.train + dataset.test} == {9}
    assert max(len(lst.history) for lst in dataset.test) == 4
    assert len(dataset.catalogue.topic_names) == 3
    times = np.array([lst.time for lst in dataset.train + dataset.test])
    assert 15 <= times.min() < 18
    assert 47 < times.max() <= 50
    assert np.bincount(dataset.log.users).max() <= 25 + 2 * 9


def test_the_seed_decides(small):
    again = simulate(**SMALL)
    assert_same_lists(small.train, again.train)
    assert_same_lists(small.test, again.test)
    assert_same_log(small.log, again.log)
    other = simulate(**SMALL, seed=1)
    assert other.catalogue.topics != small.catalogue.topics
    assert [lst.time for lst in other.test] != [lst.time for lst in small.test]


def test_fewer_training_lists(small):
    some = simulate(**SMALL, max_train_lists=50)
    assert len(some.train) == 50
    # Feedback on lists that were never given is in no log.
    assert len(some.log) < len(small.log)


def test_default_lists_are_hard_enough_and_can_be_learned(default):
    truth = np.array([lst.truth for lst in default.test])
    assert 4 < (truth > 0.6).sum(axis=1).mean() < 9
    assert (truth < 0.2).mean() > 0.4
    topics = default.catalogue.topic_matrix
    seen = np.bincount(default.log.items, minlength=len(default.catalogue))
    liked = np.bincount(default.log.items, default.log.interest, minlength=len(default.catalogue))
    quality = (liked + 2.0) / (seen + 5.0)
    rng = np.random.default_rng(0)

    def ndcg_at_5(score):
        discount = 1 / np.log2(np.arange(2, 7))
        values = []
        for lst in default.test:
            ranked = lst.truth[np.argsort(-score(lst))]
            values.append(ranked[:5] @ discount / (np.sort(lst.truth)[::-1][:5] @ discount))
        return np.mean(values)

    at_random = ndcg_at_5(lambda lst: rng.random(30))
    by_taste = ndcg_at_5(lambda lst: topics[lst.candidates] @ topics[lst.history].mean(axis=0))
    by_both = ndcg_at_5(lambda lst: topics[lst.candidates] @ topics[lst.history].mean(axis=0) + quality[lst.candidates])
    assert at_random < 0.4
    assert by_taste > at_random + 0.15
    assert by_both > by_taste + 0.15


def test_rising_items_really_rise(default):
    """What was rising before a list is watched more often after it than before, by the log of training users."""
    log = default.log
    ratios = []
    for lst in default.test[::10]:
        if lst.time > 85:
            continue
        ((_, moment),) = moments(log, len(default.catalogue), np.array([lst.time]), trend_window=10.0)
        rises = np.isin(log.items, np.argsort(-moment.trend, kind="stable")[:10])
        earlier = rises & (log.times >= lst.time - 20) & (log.times < lst.time - 10)
        later = rises & (log.times >= lst.time) & (log.times < lst.time + 10)
        ratios.append(later.sum() / max(1, earlier.sum()))
    assert np.median(ratios) > 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_users": 0}, "num_users must be at least 1, got 0"),
        ({"num_test_users": 0}, "num_test_users must be at least 1, got 0"),
        ({"num_topics": 1}, r"num_topics must lie in \[2, 20\], got 1"),
        ({"num_topics": 21}, r"num_topics must lie in \[2, 20\], got 21"),
        ({"observed_share": 0.0}, r"observed_share must lie in \(0, 1\], got 0.0"),
        ({"observed_share": 1.5}, r"observed_share must lie in \(0, 1\], got 1.5"),
        ({"observed_share": float("nan")}, r"observed_share must lie in \(0, 1\], got nan"),
        ({"seed": -3}, "seed must not be negative, got -3"),
        ({"max_train_lists": 0}, "max_train_lists must be at least 1 or None, got 0"),
        ({"num_items": 69}, r"num_items must be at least num_candidates \+ watches_per_user = 70, .*; got 69"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{**SMALL, **arguments})


@pytest.mark.parametrize("num_candidates", [1, 2, 7])
def test_short_lists(num_candidates):
    dataset = simulate(**SMALL, num_candidates=num_candidates)
    assert {lst.candidates.shape for lst in dataset.train} == {(num_candidates,)}


def test_the_noise_is_the_variance_of_feedback_around_the_truth():
    data = simulate(num_users=300, num_items=100, num_topics=4, num_test_users=2, observed_share=1.0)
    interest, truth = (np.concatenate([getattr(lst, n) for lst in data.train]) for n in ("interest", "truth"))
    assert data.noise == pytest.approx(float(np.mean((interest - truth) ** 2)), rel=0.05)
