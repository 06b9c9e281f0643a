"""Lists from a log: what they hold, and that nothing of a test user or of the future reaches a training list.

The leakage tests change exactly what must not matter, draw everything again and compare bit by bit.
"""

import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.data.build import ListBuilder, build_dataset, moments
from flexrec.data.lists import Catalogue, Interactions, RankingDataset, RankingList

NUM_ITEMS = 80
NUM_USERS = 30


def make_events(seed: int = 0, num_users: int = NUM_USERS, num_items: int = NUM_ITEMS, horizon: int = 400):
    """At most one event per user and item, at whole times, so that many are equal; popular items come first."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        size = int(rng.integers(3, num_items // 2))
        weights = 1.0 / np.arange(1, num_items + 1)
        items = rng.choice(num_items, size=size, replace=False, p=weights / weights.sum())
        start = rng.integers(0, horizon - 50)
        times = start + rng.integers(0, 50, size)
        rows += [(t, user, i, x) for t, i, x in zip(times, items, rng.random(size), strict=True)]
    return sorted_events(rows)


def sorted_events(rows) -> Interactions:
    times, users, items, interest = zip(*sorted(rows), strict=True)
    return Interactions(
        np.array(users, np.int64), np.array(items, np.int64), np.array(interest, np.float32), np.array(times, float)
    )


def rows_of(events: Interactions):
    columns = (events.times, events.users, events.items, events.interest)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def make_catalogue(num_items: int = NUM_ITEMS) -> Catalogue:
    names = tuple(f"i{i}" for i in range(num_items))
    return Catalogue(names, names, ((),) * num_items)


SMALL = {
    "num_candidates": 12,
    "num_positives": 4,
    "history_length": 6,
    "min_history": 3,
    "lists_per_user": 5,
    "trend_window": 30.0,
}


def make_dataset(events: Interactions, **changes) -> RankingDataset:
    return build_dataset("made", make_catalogue(), events, **{**SMALL, **changes})


def users_to_test_on(events: Interactions, seed: int = 0) -> set[int]:
    """With a split by user alone, the log holds every event of the others."""
    return set(events.users.tolist()) - set(make_dataset(events, seed=seed).log.users.tolist())


def assert_same_list(one: RankingList, other: RankingList) -> None:
    assert (one.user, one.time) == (other.user, other.time)
    for name in ("history", "history_interest", "candidates", "interest", "popularity", "trend"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=name)


def assert_same_lists(ones, others) -> None:
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert_same_list(one, other)


def assert_same_log(one: Interactions, other: Interactions) -> None:
    for name in ("users", "items", "interest", "times"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def moment_by_hand(log: Interactions, num_items: int, time: float, window: float, smoothing: float):
    def counted(start: float, end: float) -> list[int]:
        return [
            sum(1 for i, t in zip(log.items, log.times, strict=True) if i == item and start <= t < end)
            for item in range(num_items)
        ]

    before, recent = counted(-math.inf, time), counted(time - window, time)
    previous = counted(time - 2 * window, time - window)
    trend = [
        max(0.0, a - b * sum(recent) / sum(previous)) / (a + smoothing) if sum(previous) else 0.0
        for a, b in zip(recent, previous, strict=True)
    ]
    return before, trend


@settings(max_examples=40, deadline=None)
@given(
    log_times=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    times=st.lists(st.integers(-2, 35), min_size=1, max_size=5),
    window=st.sampled_from([1.0, 4.0, 7.5]),
    data=st.data(),
)
def test_moments_equal_counting_by_hand(log_times, times, window, data):
    items = data.draw(st.lists(st.integers(0, 3), min_size=len(log_times), max_size=len(log_times)))
    log = sorted_events([(float(t), 0, i, 0.5) for t, i in zip(log_times, items, strict=True)])
    seen = set()
    for index, moment in moments(log, 4, np.array(times, float), trend_window=window):
        seen.add(index)
        before, trend = moment_by_hand(log, 4, times[index], window, 5.0)
        assert moment.popularity.tolist() == before
        np.testing.assert_allclose(moment.trend, trend, rtol=1e-6, atol=1e-7)
        assert ((moment.trend >= 0) & (moment.trend <= 1)).all()
    assert seen == set(range(len(times)))


def test_a_busier_window_makes_nothing_rise():
    """Item 0 keeps its half of a window with three times the events; item 1 goes from a quarter to a half."""
    items = [0, 0, 1, 2] + [0] * 6 + [1] * 6
    times = [1.0] * 4 + [11.0] * 12
    log = sorted_events([(t, user, i, 0.5) for user, (t, i) in enumerate(zip(times, items, strict=True))])
    ((_, moment),) = moments(log, 3, np.array([20.0]), trend_window=10.0)
    np.testing.assert_allclose(moment.trend, [0.0, (6 - 3) / (6 + 5), 0.0], rtol=1e-6)
    assert moment.rises(np.array([1, 0, 2])).tolist() == [[6, 1], [6, 2], [0, 1]], "now, and in the window before"


@pytest.mark.parametrize(
    ("argument", "value"), [("trend_window", 0.0), ("trend_window", math.nan), ("trend_smoothing", 0.0)]
)
def test_moments_refuses(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be positive, got {value}"):
        list(moments(make_events(), NUM_ITEMS, np.zeros(1), **{"trend_window": 1.0, argument: value}))


def test_moments_refuses_an_unsorted_log():
    events = make_events()
    with pytest.raises(ValueError, match="sorted by time"):
        list(moments(events.select(np.arange(len(events))[::-1]), NUM_ITEMS, np.zeros(1), trend_window=1.0))


@pytest.mark.parametrize("split", ["user", "time"])
def test_a_list_is_a_cut_in_its_users_events(split):
    events = make_events()
    dataset = make_dataset(events, split=split, time_quantile=0.6)
    when = {(u, i): t for t, u, i, _ in rows_of(events)}
    how_much = {(u, i): x for _, u, i, x in rows_of(events)}
    for lst in dataset.train + dataset.test:
        assert len(set(lst.candidates.tolist())) == len(lst.candidates) == 12
        assert 3 <= len(lst.history) <= 6
        past = [when[lst.user, item] for item in lst.history.tolist()]
        assert past == sorted(past)
        assert past[-1] < lst.time
        with_feedback = [i for i, x in zip(lst.candidates.tolist(), lst.interest, strict=True) if not math.isnan(x)]
        next_times = sorted(t for (u, _), t in when.items() if u == lst.user and t >= lst.time)
        assert sorted(when[lst.user, item] for item in with_feedback) == next_times[:4]
        # The history is the latest of what lies before the cut.
        older = sorted(t for (u, _), t in when.items() if u == lst.user and t < lst.time)
        assert past == older[-6:]
        for item, x in zip(lst.candidates.tolist(), lst.interest.tolist(), strict=True):
            if not math.isnan(x):
                assert x == pytest.approx(how_much[lst.user, item])
        of_history = [how_much[lst.user, item] for item in lst.history.tolist()]
        assert lst.history_interest.tolist() == pytest.approx(of_history)


def test_negatives_are_items_the_user_never_touched_in_proportion_to_past_popularity():
    # One user with a fixed cut; 3, 2 and 1 past interactions of others with the items 10, 11 and 12, one with item 13
    # only after the cut.
    own = [(float(t), 0, t, 0.5) for t in range(6)]
    others = [(0.5, 1, 10, 1.0), (0.5, 2, 10, 1.0), (0.5, 3, 10, 1.0), (0.5, 1, 11, 1.0), (0.5, 2, 11, 1.0)]
    others += [(0.5, 1, 12, 1.0), (5.5, 1, 13, 1.0), (5.0, 2, 13, 1.0), (0.7, 2, 4, 1.0)]
    events = sorted_events(own + others)
    builder = ListBuilder(events, 14, trend_window=1.0, num_candidates=2, num_positives=1, min_history=5)
    own_events = events.select(events.users == 0)
    negatives = []
    for seed in range(3000):
        (lst,) = builder.lists(own_events, lists_per_user=1, seed=seed)
        negatives += lst.candidates[np.isnan(lst.interest)].tolist()
    share = np.bincount(negatives, minlength=14) / 3000
    # 3000 draws: standard error at most 0.0092.
    np.testing.assert_allclose(share[10:13], [3 / 6, 2 / 6, 1 / 6], atol=0.035)
    assert share[10:13].sum() == pytest.approx(1.0)


def test_a_place_in_the_list_says_nothing():
    dataset = make_dataset(make_events(num_users=60), lists_per_user=20)
    has_feedback = np.array([~np.isnan(lst.interest) for lst in dataset.train + dataset.test])
    assert len(has_feedback) > 150
    # Each place holds one of the 4 next events with probability 1/3; 4.5 standard errors.
    np.testing.assert_allclose(
        has_feedback.mean(axis=0), 1 / 3, atol=4.5 * math.sqrt(1 / 3 * 2 / 3 / len(has_feedback))
    )


def test_popularity_and_trend_are_those_of_the_log_before_the_cut():
    dataset = make_dataset(make_events())
    for lst in dataset.train[::4] + dataset.test[::4]:
        before, trend = moment_by_hand(dataset.log, NUM_ITEMS, lst.time, 30.0, 5.0)
        np.testing.assert_array_equal(lst.popularity, np.array(before)[lst.candidates])
        np.testing.assert_allclose(lst.trend, np.array(trend)[lst.candidates], rtol=1e-6)


def test_no_cut_inside_a_burst_of_equal_times():
    burst = sorted_events([(7.0, 0, i, 0.5) for i in range(20)] + [(1.0, 1, i, 0.5) for i in range(40, 60)])
    builder = ListBuilder(burst, NUM_ITEMS, trend_window=1.0, num_candidates=6, num_positives=2, min_history=3)
    assert builder.lists(burst, lists_per_user=5, seed=0) == []
    before = sorted_events([(float(t), 0, 60 + t, 0.5) for t in range(3)] + rows_of(burst))
    (lst,) = builder.lists(before, lists_per_user=5, seed=0)
    assert lst.history.tolist() == [60, 61, 62]


# Leakage 1: test users


@pytest.mark.parametrize("split", ["user", "time"])
@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_test_users_do_training_stays_the_same(split, seed):
    events = make_events()
    dataset = make_dataset(events, split=split, seed=seed)
    test_users = users_to_test_on(events, seed)
    assert len(test_users) == 6
    rng = np.random.default_rng(seed)
    rows = [row for row in rows_of(events) if row[1] not in test_users]
    for user in test_users:  # other items, other feedback, other times, another number of events
        for item in rng.permutation(NUM_ITEMS)[: rng.integers(20, 60)]:
            rows.append((float(rng.integers(-300, 900)), user, int(item), float(rng.random())))
    changed = make_dataset(sorted_events(rows), split=split, seed=seed)
    assert_same_log(dataset.log, changed.log)
    assert dataset.time_boundary == changed.time_boundary
    assert_same_lists(dataset.train, changed.train)
    assert_same_lists(dataset.resample(9), changed.resample(9))
    # And the change was one: the test lists are others.
    assert [lst.time for lst in dataset.test] != [lst.time for lst in changed.test]


@pytest.mark.parametrize("split", ["user", "time"])
def test_no_test_user_in_log_or_training(split):
    events = make_events()
    dataset = make_dataset(events, split=split, time_quantile=0.5)
    tested = users_to_test_on(events)
    assert {lst.user for lst in dataset.test} <= tested
    assert not tested & set(dataset.log.users.tolist())
    assert not tested & {lst.user for lst in dataset.train}
    assert not tested & {lst.user for lst in dataset.resample(3)}


# Leakage 2: the future


def lists_by_user_and_time(lists):
    return {(lst.user, lst.time): lst for lst in lists}


def change_the_future(events: Interactions, user: int, time: float, rng) -> Interactions:
    """Replace everything that others do at or after ``time``: other users, items, feedback and times."""
    kept = [row for row in rows_of(events) if row[0] < time or row[1] == user]
    invented = {}
    for _ in range(int(rng.integers(0, 300))):
        other, item = int(rng.integers(NUM_USERS)), int(rng.integers(NUM_ITEMS))
        if other != user:
            invented[other, item] = (time + float(rng.integers(0, 200)), other, item, float(rng.random()))
    # At the very moment of the cut, so that a window closed at the wrong end shows.
    invented.update({(u, 1): (time, u, 1, 1.0) for u in range(NUM_USERS) if u != user})
    done = {row[1:3] for row in kept}
    return sorted_events(kept + [row for pair, row in invented.items() if pair not in done])


def sizes() -> dict[str, float]:
    return {name: value for name, value in SMALL.items() if name != "lists_per_user"}


def builder_of(log: Interactions) -> ListBuilder:
    return ListBuilder(log, NUM_ITEMS, **sizes())


def test_what_others_do_from_the_cut_on_changes_nothing_of_the_list():
    events = make_events()
    rng = np.random.default_rng(5)
    lists = builder_of(events).lists(events, lists_per_user=3, seed=2)
    for lst in lists[::3]:
        changed = change_the_future(events, lst.user, lst.time, rng)
        own = changed.select(changed.users == lst.user)
        again = lists_by_user_and_time(builder_of(changed).lists(own, lists_per_user=3, seed=2))
        assert_same_list(lst, again[lst.user, lst.time])


def test_the_users_own_future_changes_labels_and_which_negatives_are_withheld_only():
    events = make_events()
    fresh = list(range(NUM_ITEMS, NUM_ITEMS + 60))  # items that nobody ever touched
    lists = builder_of(events).lists(events, lists_per_user=2, seed=2)
    for lst in lists[::3]:
        rows, replaced = [], set()
        for t, u, i, x in rows_of(events):
            if u == lst.user and t >= lst.time:
                replaced.add(i)
                rows.append((t, u, fresh[len(replaced)], 1.0 - x))
            else:
                rows.append((t, u, i, x))
        changed = sorted_events(rows)
        builder = ListBuilder(changed, NUM_ITEMS + 61, **sizes())
        own = changed.select(changed.users == lst.user)
        again = lists_by_user_and_time(builder.lists(own, lists_per_user=2, seed=2))[lst.user, lst.time]
        np.testing.assert_array_equal(lst.history, again.history)
        of_item = {i: (p, t) for i, p, t in zip(lst.candidates, lst.popularity, lst.trend, strict=True)}
        for item, popularity, trend in zip(again.candidates, again.popularity, again.trend, strict=True):
            assert of_item.get(item, (popularity, trend)) == (popularity, trend)
        # Popular items that were withheld as the user's own come in; no other item does.
        negatives = set(lst.candidates[np.isnan(lst.interest)].tolist())
        assert set(again.candidates[np.isnan(again.interest)].tolist()) <= negatives | replaced


def test_a_negative_that_the_user_takes_up_later_is_withheld_and_one_other_comes_in():
    events = make_events()
    lists = builder_of(events).lists(events, lists_per_user=1, seed=4)
    tried = 0
    for lst in lists:
        negatives = lst.candidates[np.isnan(lst.interest)]
        last = np.flatnonzero(events.users == lst.user)[-1]
        if events.items[last] in lst.candidates or np.sum((events.users == lst.user) & (events.times >= lst.time)) < 6:
            continue
        tried += 1
        items = events.items.copy()
        items[last] = negatives[0]
        changed = Interactions(events.users, items, events.interest, events.times)
        own = changed.select(changed.users == lst.user)
        again = lists_by_user_and_time(builder_of(changed).lists(own, lists_per_user=1, seed=4))[lst.user, lst.time]
        now = set(again.candidates[np.isnan(again.interest)].tolist())
        assert set(negatives.tolist()) - now == {int(negatives[0])}
        assert len(now) == len(negatives)
    assert tried >= 5


def test_a_split_in_time_keeps_training_before_the_boundary_and_testing_after_it():
    events = make_events()
    dataset = make_dataset(events, split="time", time_quantile=0.5, test_lists_per_user=20)
    boundary = dataset.time_boundary
    when = {(u, i): t for t, u, i, _ in rows_of(events)}
    assert dataset.log.times.max() < boundary <= events.times.max()
    for lst in dataset.train + dataset.resample(7):
        observed = lst.candidates[~np.isnan(lst.interest)].tolist()
        assert max(when[lst.user, item] for item in [*observed, *lst.history.tolist()]) < boundary
    assert min(lst.time for lst in dataset.test) >= boundary
    # A test list is described by what training users did up to its own time, past the boundary too.
    background = events.select(~np.isin(events.users, list(users_to_test_on(events))))
    latest = max(dataset.test, key=lambda lst: lst.time)
    assert latest.time > boundary
    before, _ = moment_by_hand(background, NUM_ITEMS, latest.time, 30.0, 5.0)
    np.testing.assert_array_equal(latest.popularity, np.array(before)[latest.candidates])


def test_after_the_boundary_nothing_changes_training():
    events = make_events()
    dataset = make_dataset(events, split="time", time_quantile=0.5)
    rng = np.random.default_rng(0)
    after = np.flatnonzero(events.times >= dataset.time_boundary)
    items, interest = events.items.copy(), events.interest.copy()
    used = set(zip(events.users.tolist(), items.tolist(), strict=True))
    for row in after:
        free = [i for i in range(NUM_ITEMS) if (events.users[row], i) not in used]
        items[row] = rng.choice(free)
        used.add((events.users[row], items[row]))
        interest[row] = rng.random()
    changed = make_dataset(Interactions(events.users, items, interest, events.times), split="time", time_quantile=0.5)
    assert_same_log(dataset.log, changed.log)
    assert_same_lists(dataset.train, changed.train)
    np.testing.assert_array_equal(dataset.trend, changed.trend)
    assert dataset.trend.any()


@pytest.mark.parametrize("options", [{}, {"split": "time", "time_quantile": 0.5}, {"trend_smoothing": 2.0}])
def test_the_saved_trend_is_of_the_end_of_the_log(options):
    dataset = make_dataset(make_events(), **options)
    end = np.nextafter(dataset.log.times.max(), np.inf)
    _, trend = moment_by_hand(dataset.log, NUM_ITEMS, end, 30.0, options.get("trend_smoothing", 5.0))
    np.testing.assert_allclose(dataset.trend, trend, rtol=1e-6, atol=1e-7)


# Seeds, limits, errors


def test_every_option_reaches_the_lists():
    events = make_events(num_users=60)
    smoothing = make_dataset(events, trend_smoothing=2.0)
    for lst in smoothing.train[::20] + smoothing.test[::9]:
        _, trend = moment_by_hand(smoothing.log, NUM_ITEMS, lst.time, 30.0, 2.0)
        np.testing.assert_allclose(lst.trend, np.array(trend)[lst.candidates], rtol=1e-6)
    window = make_dataset(events, trend_window=11.0)
    for lst in window.train[::20]:
        _, trend = moment_by_hand(window.log, NUM_ITEMS, lst.time, 11.0, 5.0)
        np.testing.assert_allclose(lst.trend, np.array(trend)[lst.candidates], rtol=1e-6)
    tested = len(set(events.users.tolist())) - len(set(make_dataset(events, test_fraction=0.5).log.users.tolist()))
    assert tested == 30
    tested = 60 - len(set(make_dataset(events, test_fraction=0.5, num_test_users=7).log.users.tolist()))
    assert tested == 7
    early, late = (make_dataset(events, split="time", time_quantile=q).time_boundary for q in (0.3, 0.7))
    background = events.select(np.isin(events.users, np.unique(make_dataset(events).log.users)))
    for boundary, share in ((early, 0.3), (late, 0.7)):
        assert np.mean(background.times < boundary) == pytest.approx(share, abs=0.02)


def test_the_seed_decides():
    events = make_events()
    dataset = make_dataset(events, seed=3)
    assert_same_lists(dataset.train, make_dataset(events, seed=3).train)
    assert_same_lists(dataset.test, make_dataset(events, seed=3).test)
    assert_same_lists(dataset.train, dataset.resample(3))
    other = make_dataset(events, seed=4)
    assert {lst.user for lst in other.test} != {lst.user for lst in dataset.test}
    drawn = dataset.resample(4)
    assert [lst.time for lst in drawn] != [lst.time for lst in dataset.train]
    assert_same_lists(drawn, pickle.loads(pickle.dumps(dataset)).resample(4))


def test_a_list_does_not_depend_on_which_others_are_drawn():
    events = make_events()
    builder = builder_of(events)
    together = lists_by_user_and_time(builder.lists(events, lists_per_user=3, seed=0))
    for user in range(0, NUM_USERS, 5):
        for alone in builder.lists(events.select(events.users == user), lists_per_user=3, seed=0):
            assert_same_list(alone, together[alone.user, alone.time])


def test_limits_on_the_number_of_lists():
    events = make_events()
    everything = make_dataset(events, lists_per_user=3, test_lists_per_user=2)
    per_user = np.bincount([lst.user for lst in everything.train])
    assert per_user.max() == 3
    assert np.bincount([lst.user for lst in everything.test]).max() == 2
    some = make_dataset(events, lists_per_user=3, max_train_lists=7, max_test_lists=2)
    assert (len(some.train), len(some.test)) == (7, 2)
    whole = lists_by_user_and_time(everything.train)
    for lst in some.train:
        assert_same_list(lst, whole[lst.user, lst.time])


def test_lists_without_negatives_and_lists_of_one():
    events = make_events()
    full = make_dataset(events, num_candidates=4)
    assert not np.isnan([lst.interest for lst in full.train]).any()
    single = make_dataset(events, num_candidates=1, num_positives=1)
    assert {len(lst.candidates) for lst in single.train} == {1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "random"}, "split must be one of 'user', 'time'; got 'random'"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"test_fraction": 1.0}, "test_fraction must lie strictly between 0 and 1, got 1.0"),
        ({"num_test_users": 0}, "got 0 test users of 30"),
        ({"num_test_users": 30}, "got 30 test users of 30"),
        ({"time_quantile": 0.0}, "time_quantile must lie strictly between 0 and 1, got 0.0"),
        ({"num_positives": 13}, "num_positives must not exceed num_candidates, got 13 and 12"),
        ({"history_length": 0}, "history_length must be at least 1, got 0"),
        ({"min_history": 0}, "min_history must be at least 1, got 0"),
        ({"min_history": 500}, "no list to train on in made: no user has 500 events, then 4 more"),
        ({"num_candidates": 80}, "no list to train on in made: .* 76 items popular before them"),
    ],
)
def test_errors_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(make_events(), **changes)


def test_a_reordered_list_is_the_same_list():
    lst = make_dataset(make_events()).train[0]
    lst = dataclasses.replace(lst, truth=np.arange(12, dtype=np.float32) / 12)
    order = np.random.default_rng(0).permutation(12)
    again = lst.reordered(order)
    for name in ("candidates", "interest", "popularity", "trend", "truth"):
        np.testing.assert_array_equal(getattr(again, name), getattr(lst, name)[order], err_msg=name)
        assert len(np.unique(getattr(lst, name))) > 1, name
    for name in ("user", "time", "history", "history_interest"):
        np.testing.assert_array_equal(getattr(again, name), getattr(lst, name), err_msg=name)


def test_what_was_liked_has_an_interest_of_a_half():
    lst = make_dataset(make_events()).train[0]
    told = dataclasses.replace(
        lst, history=np.arange(4), history_interest=np.array([0.49, 0.5, np.nan, 1.0], dtype=np.float32)
    )
    assert told.history_liked.tolist() == [False, True, False, True]
    assert dataclasses.replace(told, history_interest=None).history_liked.tolist() == [False] * 4
