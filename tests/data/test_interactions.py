"""A person's log as a data set: options, and leakage in every mode."""

import math
import pickle
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from flexrec.data.interactions import read_interactions
from flexrec.data.options import InteractionsOptions

sys.path.insert(0, str(Path(__file__).parent))
from shop_logs import NUM_ITEMS, load, make_rows, write


def as_text(dataset, lists):
    """The lists in public ids, so that data sets with other users can be compared."""
    return [
        (
            dataset.user_ids[lst.user],
            lst.time,
            *(lst.__dict__[n].tolist() for n in ("history", "candidates", "popularity", "trend")),
            *(np.nan_to_num(lst.__dict__[n], nan=-1.0).tolist() for n in ("history_interest", "interest")),
        )
        for lst in lists
    ]


def log_as_text(dataset):
    log = dataset.log
    users = [dataset.user_ids[u] for u in log.users]
    return list(zip(users, log.items.tolist(), log.interest.tolist(), log.times.tolist(), strict=True))


def test_users_numbers_and_boundaries(tmp_path):
    dataset = load(write(tmp_path, make_rows()))
    assert len(dataset.train) > 50
    assert len(dataset.test) > 10
    assert not {lst.user for lst in dataset.test} & set(dataset.log.users.tolist())
    assert dataset.unsupported == {"search": "its lists have no queries"}
    for lst in dataset.train + dataset.test:
        assert len(set(lst.candidates.tolist())) == 8
        assert np.count_nonzero(np.isnan(lst.interest)) == 5
        assert not set(lst.candidates.tolist()) & set(lst.history.tolist())
    assert pickle.loads(pickle.dumps(dataset)).resample(3)[0].user == dataset.resample(3)[0].user


def test_repeats_are_counted_and_known_when_they_happen(tmp_path):
    """Without ratings n interactions are worth n / (n + 1): in a history those before the list, as a label all."""
    rows = [(u, i, t) for u, i, _, t in make_rows()]
    dataset = load(write(tmp_path, rows, ("user", "item", "timestamp")))
    when = {}
    for user, item, time in rows:
        when.setdefault((user, item), []).append(time)
    repeated = 0
    for lst in dataset.train + dataset.test:
        user = dataset.user_ids[lst.user]
        for item, interest in zip(lst.history.tolist(), lst.history_interest.tolist(), strict=True):
            before = sum(time < lst.time for time in when[user, f"i{item}"])
            assert interest == pytest.approx(before / (before + 1))
            repeated += before < len(when[user, f"i{item}"])
        for item, interest in zip(lst.candidates.tolist(), lst.interest.tolist(), strict=True):
            times = when.get((user, f"i{item}"), [])
            if not math.isnan(interest):
                assert min(times) >= lst.time
                assert interest == pytest.approx(len(times) / (len(times) + 1))
    assert repeated > 20
    assert any("repeat a pair: they are counted" in note for note in dataset.notes)


# Leakage: what test users do, and what happens after a boundary, changes nothing of training


MODES = {
    "ratings": ({}, ("user", "item", "rating", "timestamp")),
    "quantiles": ({"gain": "quantile"}, ("user", "item", "rating", "timestamp")),
    "amounts": ({}, ("user", "item", "hours", "timestamp")),
    "thresholds": ({"gain": "threshold"}, ("user", "item", "hours", "timestamp")),
    "no times": ({}, ("user", "item", "rating")),
    "uniform": ({"negatives": "uniform"}, ("user", "item", "rating", "timestamp")),
    "impressions": ({"negatives": "impressions"}, ("user", "item", "clicked", "timestamp")),
}


def written(folder, rows, names):
    folder.mkdir()
    columns = {"user": 0, "item": 1, "rating": 2, "hours": 2, "timestamp": 3}
    if "clicked" in names:
        # Days are coarse, so that several items are shown at once.
        rows = [(u, i, int(x > 3), t // 1_000_000 * 1_000_000) for u, i, x, t in rows]
        columns["clicked"] = 2
    return write(folder, [tuple(row[columns[name]] for name in names) for row in rows], names)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("split", ["user", "time"])
def test_whatever_test_users_do_training_stays_the_same(tmp_path, mode, split):
    options, names = MODES[mode]
    if split == "time" and "timestamp" not in names:
        with pytest.raises(ValueError, match=r"split='time' needs times, and .* has none"):
            load(written(tmp_path / "a", make_rows(), names), split=split, **options)
        return
    rows = make_rows()
    dataset = load(written(tmp_path / "a", rows, names), split=split, **options)
    tested = {dataset.user_ids[lst.user] for lst in dataset.test}
    assert tested
    rng = random.Random(1)
    changed = [row for row in rows if row[0] not in tested]
    for user in tested:  # other items, other and larger feedback, other times, and other places in the file
        for _ in range(rng.randrange(20, 60)):
            time = 1_600_000_000 + 86_400 * rng.randrange(-100, 600)
            changed.insert(rng.randrange(len(changed)), (user, f"i{rng.randrange(NUM_ITEMS)}", rng.randint(2, 9), time))
    # Feedback beyond the scale is what test users may not teach: 9 of 5.
    again = load(written(tmp_path / "b", changed, names), split=split, **options)
    assert log_as_text(dataset) == log_as_text(again)
    assert as_text(dataset, dataset.train) == as_text(again, again.train)
    assert as_text(dataset, dataset.resample(5)) == as_text(again, again.resample(5))
    assert as_text(dataset, dataset.test) != as_text(again, again.test)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "no times"])
def test_after_the_boundary_nothing_changes_training(tmp_path, mode):
    options, names = MODES[mode]
    rows = make_rows()
    dataset = load(written(tmp_path / "a", rows, names), split="time", time_quantile=0.6, **options)
    boundary = dataset.time_boundary
    assert dataset.log.times.max() < boundary
    assert max(lst.time for lst in dataset.train) < boundary <= min(lst.time for lst in dataset.test)
    rng = random.Random(1)
    changed = [
        row if row[3] < boundary else (row[0], f"i{rng.randrange(NUM_ITEMS)}", rng.randint(1, 5), row[3])
        for row in rows
    ]
    again = load(written(tmp_path / "b", changed, names), split="time", time_quantile=0.6, **options)
    assert again.time_boundary == boundary
    assert log_as_text(dataset) == log_as_text(again)
    assert as_text(dataset, dataset.train) == as_text(again, again.train)


@pytest.mark.parametrize("mode", ["ratings", "uniform", "impressions"])
def test_a_list_depends_on_nothing_that_others_do_from_its_time_on(tmp_path, mode):
    options, names = MODES[mode]
    options = {**options, "gain_range": (3, 5)} if mode != "impressions" else options
    rows = make_rows()
    dataset = load(written(tmp_path / "a", rows, names), **options)
    changes = 0
    for number, lst in enumerate(dataset.train[::9]):
        user = dataset.user_ids[lst.user]
        rng = random.Random(number)
        # Moments of impressions are written coarsely: what is rounded to the list's own time is of its time.
        changed = [
            row
            if row[3] < lst.time or row[0] == user
            else (*row[:2], rng.randint(1, 5), row[3] + 86_400 * rng.randrange(9))
            for row in rows
        ]
        changes += sum(a != b for a, b in zip(rows, changed, strict=True))
        again = load(written(tmp_path / f"b{number}", changed, names), **options)
        same = [one for one in again.train if again.user_ids[one.user] == user and one.time == lst.time]
        assert as_text(again, same) == as_text(dataset, [lst])
    assert changes > 100


def test_a_given_split_is_kept_on_both_sides(tmp_path):
    """A user's training rows are the history of a test list whose candidates are its test rows, and nothing else."""
    rows = make_rows()
    cut = 1_600_000_000 + 86_400 * 300
    split = [(*row, "test" if row[3] >= cut else "train") for row in rows]
    names = ("user", "item", "rating", "timestamp", "split")
    dataset = load(write(tmp_path, split, names), num_positives=2)
    assert cut == dataset.time_boundary
    assert dataset.log.times.max() < cut
    assert max(lst.time for lst in dataset.train) < cut <= min(lst.time for lst in dataset.test)
    first = {}
    for user, item, _, time in rows:
        first[user, item] = min(time, first.get((user, item), time))
    for lst in dataset.test:
        user = dataset.user_ids[lst.user]
        known = lst.candidates[~np.isnan(lst.interest)].tolist()
        assert all(first[user, f"i{item}"] >= lst.time for item in known)
    assert {dataset.user_ids[lst.user] for lst in dataset.test} & {dataset.user_ids[u] for u in dataset.log.users}
    # A test row's feedback, of a pair that is in training too, is told by no training row.
    other = [(*row[:2], 6 - row[2], *row[3:]) if row[4] == "test" else row for row in split]
    (tmp_path / "b").mkdir()
    again = load(write(tmp_path / "b", other, names), num_positives=2)
    assert as_text(dataset, dataset.train) == as_text(again, again.train)
    assert log_as_text(dataset) == log_as_text(again)


@pytest.mark.parametrize("split", ["user", "time"])
def test_another_split_reads_no_column_of_splits(tmp_path, split):
    """Folds of a cross-validation, say: no row is left out for what stands there, nor for validation."""
    rows = make_rows()
    names = ("user", "item", "rating", "timestamp", "fold")
    for folder, with_folds in (("a", rows), ("b", [(*row, n % 10) for n, row in enumerate(rows)])):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, with_folds, names[: len(with_folds[0])])
    plain, folds = load(tmp_path / "a", split=split), load(tmp_path / "b", split=split)
    assert log_as_text(folds) == log_as_text(plain)
    assert as_text(folds, folds.test) == as_text(plain, plain.test)
    assert not any("skipped" in note for note in folds.notes)


def test_a_column_of_splits_without_a_test_row_says_what_it_was_read_as(tmp_path):
    rows = [(*row, n % 2) for n, row in enumerate(make_rows())]
    with pytest.raises(ValueError, match=r"0 are to test on, 750 to train on and 750 for validation.* split='user'"):
        load(write(tmp_path, rows, ("user", "item", "rating", "timestamp", "split")))


def test_without_times_the_order_is_drawn_from_the_seed_and_not_from_the_file(tmp_path):
    rows = sorted({row[:2]: (*row[:2], row[2]) for row in make_rows()}.values())
    names = ("user", "item", "rating")
    for folder, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, order, names)
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert as_text(a, a.train) == as_text(b, b.train)
    assert as_text(a, a.test) == as_text(b, b.test)
    assert a.unsupported["trend"] == "its interactions have no times, so that nothing can be seen to rise"
    with pytest.raises(
        ValueError, match="the interactions data cannot answer the need 'trend': its interactions have no"
    ):
        a.check_needs(["interest", "trend"])
    a.check_needs(["interest", "explore"])
    assert a.trend is None
    assert not any(lst.trend.any() for lst in a.train)
    assert [lst.time for lst in a.train] != [lst.time for lst in load(tmp_path / "a", seed=1).train]


def test_impressions_are_lists(tmp_path):
    options, names = MODES["impressions"]
    dataset = load(written(tmp_path / "a", make_rows(), names), min_history=1, **options)
    shown = {}
    for user, item, rating, time in make_rows():
        shown.setdefault((user, time // 1_000_000 * 1_000_000), {}).setdefault(item, []).append(int(rating > 3))
    for lst in dataset.train + dataset.test:
        items = shown[dataset.user_ids[lst.user], lst.time]
        candidates = dict(zip((f"i{i}" for i in lst.candidates), lst.interest.tolist(), strict=True))
        assert set(candidates) <= set(items)
        assert len(candidates) == min(8, len(items))
        assert 0 < sum(candidates.values()) < len(candidates)
        past = {
            i
            for (u, t), of in shown.items()
            if u == dataset.user_ids[lst.user] and t < lst.time
            for i, c in of.items()
            if 1 in c
        }
        assert {f"i{i}" for i in lst.history} <= past
        assert len(lst.history) == min(len(past), 6)
    assert len(dataset.train) > 20


def test_uniform_negatives_know_nothing_of_popularity(tmp_path):
    folder = write(tmp_path, make_rows())
    popular, uniform = (
        np.mean([lst.popularity[np.isnan(lst.interest)].mean() for lst in load(folder, negatives=kind).train])
        for kind in ("popularity", "uniform")
    )
    assert popular > 1.2 * uniform


def test_columns_by_text_mapping_and_yaml(tmp_path):
    (tmp_path / "orders.csv").write_text("who,what,when_,stars_\nann,a1,2020-01-01,5\nbob,a2,2020-01-02,3\n")
    (tmp_path / "articles.csv").write_text("nr,label_,kind,brand\na1,Chair,Home,Acme\na2,Lamp,Home|Light,Zed\n")
    text = "user=who,item=what,timestamp=when_,rating=stars_,id=nr,title=label_,categories=kind+brand"
    yaml = tmp_path / "columns.yaml"
    yaml.write_text(
        "interactions: {user: who, item: what, timestamp: when_, rating: stars_}\n"
        "items: {id: nr, title: label_, categories: [kind, brand]}\n"
    )
    mapping = {"user": "who", "item": "what", "timestamp": "when_", "rating": "stars_"}
    mapping |= {"items": {"id": "nr", "title": "label_", "categories": ["kind", "brand"]}}
    for columns in (text, yaml, str(yaml), mapping):
        result = read_interactions(tmp_path, InteractionsOptions(columns=columns))
        assert result.user_ids == ("ann", "bob")
        assert result.rows.interest.tolist() == [1.0, 0.0]
        assert result.catalogue.titles == ("Chair", "Lamp")
        assert result.catalogue.topics == (("Home", "Acme"), ("Home", "Light", "Zed"))


def test_columns_by_number_in_a_file_without_names(tmp_path):
    (tmp_path / "events.csv").write_text("ann;a1;5\nbob;a2;3\n")
    result = read_interactions(tmp_path, InteractionsOptions(columns="user=1,item=2,rating=3"))
    assert result.rows.interest.tolist() == [1.0, 0.0] or result.rows.interest.tolist() == [0.0, 1.0]
    assert len(result.rows) == 2


def test_a_file_alone_is_a_log(tmp_path):
    write(tmp_path, make_rows(), items=True)
    dataset = load(tmp_path / "interactions.csv")
    assert dataset.catalogue.titles == dataset.catalogue.ids
    assert dataset.unsupported["explore"] == "its items have no categories, so that none is new to a history"
    assert dataset.unsupported["diverse"] == "its items have no categories, of which a list could have many"


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        ({}, [0.0, 0.5, 1.0]),
        ({"gain_range": (1, 5)}, [0.25, 0.75, 1.0]),
        ({"gain": "threshold"}, [0.0, 1.0, 1.0]),
        ({"gain": "threshold", "threshold": 4.5}, [0.0, 0.0, 1.0]),
        ({"gain": "quantile"}, [1 / 6, 0.5, 5 / 6]),
    ],
)
def test_gains(tmp_path, gain, expected):
    rows = [("u1", "a", 2, 1), ("u1", "b", 4, 2), ("u1", "c", 5, 3), ("u2", "a", 1, 4), ("u3", "b", 1, 5)]
    low = "gain_range" in gain
    folder = write(tmp_path, rows, items=False)
    seeds = (read_interactions(folder, InteractionsOptions(seed=s, test_fraction=0.6, **gain)) for s in range(9))
    result = next(r for r in seeds if {r.user_ids[u] for u in r.rows.users[r.training]} == {"u1"})
    got = [
        x for x, u in zip(result.rows.interest.tolist(), result.rows.users, strict=True) if result.user_ids[u] == "u1"
    ]
    if not low:
        assert got == pytest.approx(expected)
    else:
        assert got == pytest.approx([0.25, 0.75, 1.0])


def test_few_lists_are_explained_with_numbers(tmp_path):
    folder = write(tmp_path, make_rows()[:150])
    with pytest.raises(ValueError, match="no list to train on in interactions") as caught:
        load(folder, min_history=20, num_positives=20, num_candidates=30)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r"Of \d+ users 0 have the 40 items that min_history=20 and num_positives=20 take", message)
    assert re.search(r"half of the users have \d or more, a tenth \d or more", message)
    assert re.search(r"With min_history=1 and num_positives=1 it would be \d\d", message)
    some = load(folder, num_candidates=4, num_positives=2, min_history=2)
    assert any(re.match(r"only \d+ lists to train on\. Of \d+ users", note) for note in some.notes)
    (tmp_path / "b").mkdir()
    at_once = write(tmp_path / "b", [(*row[:3], 1_600_000_000) for row in make_rows()])
    with pytest.raises(ValueError, match=r"\d+ users have all their events at one moment"):
        load(at_once)


def test_both_tables_may_call_the_items_by_one_name(tmp_path):
    (tmp_path / "log.csv").write_text("user,artikel,rating\nann,a1,5\nbob,a2,3\n")
    (tmp_path / "items.csv").write_text("artikel,title\na1,Chair\na2,Lamp\n")
    result = read_interactions(tmp_path, InteractionsOptions(columns="item=artikel"))
    assert result.catalogue.titles == ("Chair", "Lamp")
    assert result.rows.items.tolist() in ([0, 1], [1, 0])


def test_what_a_test_row_tells_is_told_by_no_training_row(tmp_path):
    """Of one pair some rows may be to train and others to test on: amounts add up apart."""
    rng = random.Random(0)
    rows = [(*row, rng.choice(["train", "train", "test"])) for row in make_rows()]
    names = ("user", "item", "hours", "timestamp", "split")
    other = [(*row[:2], 100, *row[3:]) if row[4] == "test" else row for row in rows]
    datasets = []
    for folder, table in (("a", rows), ("b", other)):
        (tmp_path / folder).mkdir()
        datasets.append(load(write(tmp_path / folder, table, names), num_positives=1))
    one, again = datasets
    assert log_as_text(one) == log_as_text(again)
    assert as_text(one, one.train) == as_text(again, again.train)
    assert as_text(one, one.test) != as_text(again, again.test)


def test_noise_is_estimated_from_ratings_that_were_given_again(tmp_path):
    rng = random.Random(1)
    rows = [
        (f"u{u}", f"i{i}", rng.choice((1, 2, 3, 4, 5)), 10**9 + 60 * (u * 100 + n))
        for u in range(30)
        for n, i in enumerate(rng.sample(range(40), 20))
    ]
    rows += [(u, i, rng.choice((1, 2, 3, 4, 5)), t + 30) for u, i, _, t in rows[::3]]
    folder = tmp_path / "shop"
    folder.mkdir()
    lines = ["user,item,rating,timestamp", *(",".join(map(str, row)) for row in rows)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    dataset = load(folder)
    trained = {dataset.user_ids[u] for u in dataset.log.users.tolist()}
    readings = {}
    for user, item, rating, _ in rows:
        if user in trained:
            readings.setdefault((user, item), []).append(np.clip((rating - 3) / 2, 0, 1))
    pairs = [values for values in readings.values() if len(values) == 2]
    assert dataset.noise == pytest.approx(np.mean([np.var(values, ddof=1) for values in pairs]), abs=1e-6)
    assert dataset.noise > 0
