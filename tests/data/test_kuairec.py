"""KuaiRec: the published folder, the sample, thinning by pairs, and that nothing leaks."""

import gzip
import os
import random
from pathlib import Path

import numpy as np
import pytest

from flexrec.data import load_kuairec
from flexrec.data.thinning import Thinning

REAL_DATA = Path(os.environ.get("FLEXREC_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
SAMPLE = REAL_DATA / "kuairec"
SMALL = {"num_candidates": 5, "min_history": 3, "history_length": 4, "lists_per_user": 3}
NUM_USERS, NUM_VIDEOS = 20, 40

# Made in the published form: the videos' table has a row broken by a line break, and UNKNOWN categories.
CAPTIONS = """video_id,manual_cover_text,caption,topic_tag,first_level_category_id,first_level_category_name,\
second_level_category_id,second_level_category_name,third_level_category_id,third_level_category_name
"""


def make_views(seed=0, num_users=NUM_USERS):
    rng = random.Random(seed)
    return [
        (user, video, round(rng.uniform(0, 3), 3), 1_593_878_903.4 + 1000.5 * rng.randrange(4000))
        for user in range(num_users)
        for video in rng.sample(range(NUM_VIDEOS), 25)
    ]


def write(folder, views, name="big_matrix.csv"):
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    lines = ["user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio"]
    lines += [f"{u},{v},{int(r * 1e4)},10000,2020-07-05 00:08:23.438,20200705,{t},{r}" for u, v, r, t in views]
    (data / name).write_text("\n".join(lines) + "\n")
    rows = [
        f'{v},UNKNOWN,"视频 {v}",[标签],{v % 3},{"UNKNOWN" if v == 7 else f"类{v % 3}"},-124,UNKNOWN,-124,UNKNOWN'
        for v in range(NUM_VIDEOS)
    ]
    rows[3] = "3,UNKNOWN,a caption\rwith a return,[],0,类0,-124,UNKNOWN,-124,UNKNOWN"
    (data / "kuairec_caption_category.csv").write_text(CAPTIONS + "\n".join(rows) + "\nbroken by a line break,x\n")
    return folder


def signature(dataset, lists):
    names = ("history", "candidates", "interest", "popularity", "trend", "history_interest")
    return [(lst.user, lst.time, *(np.nan_to_num(getattr(lst, n), nan=-1.0).tolist() for n in names)) for lst in lists]


def test_the_published_folder(tmp_path):
    views = make_views()
    dataset = load_kuairec(write(tmp_path, views), **SMALL)
    catalogue = dataset.catalogue
    assert len(catalogue) == NUM_VIDEOS
    assert catalogue.titles[2:4] == ("视频 2", "a caption with a return")
    assert (catalogue.topics[4], catalogue.topics[7]) == (("类1",), ())
    assert dataset.unobserved == "zero"
    assert dataset.unsupported == {"search": "its lists have no queries"}
    assert dataset.trend is not None
    ratio = {(u, v): r for u, v, r, _ in views}
    when = {(u, v): t for u, v, _, t in views}
    for lst in dataset.train + dataset.test:
        assert len(lst.candidates) == 5
        user = int(dataset.user_ids[lst.user])
        for video, interest in zip(lst.candidates.tolist(), lst.interest.tolist(), strict=True):
            assert interest == pytest.approx(min(1.0, ratio[user, video] / 2.0), abs=1e-6)
            assert when[user, video] >= lst.time
        assert all(when[user, video] < lst.time for video in lst.history.tolist())
    assert sum(note.startswith("skipped 1 rows of kuairec_caption_category.csv") for note in dataset.notes) == 1


@pytest.mark.parametrize("feedback", [30, 10])
def test_feedback_is_withheld_by_pair_and_seed(tmp_path, feedback):
    folder = write(tmp_path, make_views())
    whole, thin = load_kuairec(folder, **SMALL), load_kuairec(folder, feedback=feedback, **SMALL)
    assert thin.unobserved == "critic"
    assert 0.5 * feedback < 100 * len(thin.log) / len(whole.log) < 2 * feedback
    kept = Thinning(feedback / 100, 0)
    assert kept.keeps(thin.log.users, thin.log.items).all()
    # By the pair: neither by the user nor by the item alone.
    grid = kept.keeps(*(ids.ravel() for ids in np.indices((200, 200)))).reshape(200, 200)
    assert abs(grid.mean() - feedback / 100) < 0.01  # 4.4 standard errors or more
    assert grid.mean(axis=0).std() < 0.05 > grid.mean(axis=1).std()
    pairs = {}
    for lst, full in zip(thin.train + thin.test, whole.train + whole.test, strict=True):
        assert (lst.user, lst.time, sorted(lst.candidates)) == (full.user, full.time, sorted(full.candidates))
        truth = dict(zip(full.candidates.tolist(), full.interest.tolist(), strict=True))
        assert lst.truth.tolist() == [truth[i] for i in lst.candidates.tolist()]
        known = kept.keeps(np.full(5, lst.user), lst.candidates)
        assert np.array_equal(np.isnan(lst.interest), ~known)
        assert np.array_equal(lst.interest[known], lst.truth[known])
        before = kept.keeps(np.full(len(lst.history), lst.user), lst.history)
        assert np.array_equal(np.isnan(lst.history_interest), ~before)
        for item, known_now in zip(lst.candidates.tolist(), known.tolist(), strict=True):
            assert pairs.setdefault((lst.user, item), known_now) == known_now
    other = load_kuairec(folder, feedback=feedback, seed=1, **SMALL)
    assert set(zip(other.log.users.tolist(), other.log.items.tolist(), strict=True)) != set(
        zip(thin.log.users.tolist(), thin.log.items.tolist(), strict=True)
    )
    assert signature(thin, thin.train) == signature(thin, load_kuairec(folder, feedback=feedback, **SMALL).train)


@pytest.mark.parametrize("feedback", [100, 30])
@pytest.mark.parametrize("split", ["user", "time"])
def test_whatever_test_users_do_training_stays_the_same(tmp_path, feedback, split):
    views = make_views()
    options = {**SMALL, "feedback": feedback, "split": split}
    dataset = load_kuairec(write(tmp_path / "a", views), **options)
    tested = {int(dataset.user_ids[lst.user]) for lst in dataset.test}
    assert tested
    rng = random.Random(1)
    changed = [
        v if v[0] not in tested else (*v[:2], rng.uniform(2, 9), v[3] + rng.randrange(-(10**6), 10**6)) for v in views
    ]
    again = load_kuairec(write(tmp_path / "b", changed), **options)
    assert signature(dataset, dataset.train) == signature(again, again.train)
    for name in ("users", "items", "interest", "times"):
        np.testing.assert_array_equal(getattr(dataset.log, name), getattr(again.log, name))
    assert signature(dataset, dataset.test) != signature(again, again.test)


def test_after_the_boundary_nothing_changes_training(tmp_path):
    views = make_views()
    options = {**SMALL, "feedback": 30, "split": "time"}
    dataset = load_kuairec(write(tmp_path / "a", views), **options)
    changed = [v if v[3] < dataset.time_boundary else (*v[:2], 3.0 - v[2], v[3]) for v in views]
    again = load_kuairec(write(tmp_path / "b", changed), **options)
    assert signature(dataset, dataset.train) == signature(again, again.train)
    assert max(lst.time for lst in dataset.train) < dataset.time_boundary <= min(lst.time for lst in dataset.test)
    assert dataset.log.times.max() < dataset.time_boundary


def test_noise_is_estimated_from_what_training_users_watched_again(tmp_path):
    rng = random.Random(5)
    views = make_views()
    again = [(u, v, round(min(3.0, max(0.0, r + rng.gauss(0, 0.3))), 3), t + 7.5) for u, v, r, t in views if v % 3 == 0]
    dataset = load_kuairec(write(tmp_path, views + again), **SMALL)
    trained = {int(dataset.user_ids[u]) for u in dataset.log.users.tolist()}
    readings = {}
    for user, video, ratio, _ in views + again:
        if user in trained:
            readings.setdefault((user, video), []).append(min(1.0, ratio / 2.0))
    pairs = [values for values in readings.values() if len(values) == 2]
    assert len(pairs) > 60
    assert dataset.noise == pytest.approx(np.mean([np.var(values, ddof=1) for values in pairs]), abs=1e-6)
    assert dataset.noise > 0.005
    assert load_kuairec(write(tmp_path / "once", views), **SMALL).noise == 0
    few = load_kuairec(write(tmp_path / "few", views + again[:20]), **SMALL)
    assert few.noise == 0, "too few to say"


def test_the_small_matrix_and_views_without_a_time(tmp_path):
    write(tmp_path, make_views(num_users=12), "big_matrix.csv")
    write(tmp_path, make_views(), "small_matrix.csv")
    path = tmp_path / "data" / "small_matrix.csv"
    with open(path, "a") as file:
        file.write("0,1,1,1,,,,0.5\n")
    assert len(load_kuairec(tmp_path, **SMALL).user_ids) == 12
    small = load_kuairec(tmp_path, matrix="small", **SMALL)
    assert len(small.user_ids) == NUM_USERS
    assert any("timestamp: expected a moment in seconds, got ''" in note for note in small.notes)
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert signature(small, small.train) == signature(small, load_kuairec(tmp_path, matrix="small", **SMALL).train)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"feedback": 50}, ValueError, "feedback must be one of 100, 30, 10, 3 per cent, got 50"),
        ({"matrix": "medium"}, ValueError, "matrix must be one of 'big', 'small'; got 'medium'"),
        ({"matrix": "small"}, FileNotFoundError, r"none of small_matrix\.csv in .* or its folder data"),
        ({"num_candidates": 30}, ValueError, "no list to train on in kuairec"),
    ],
)
def test_what_cannot_be(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        load_kuairec(write(tmp_path, make_views()), **{**SMALL, **options})


def test_another_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no KuaiRec folder at"):
        load_kuairec(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"none of kuairec_caption_category\.csv, items\.csv"):
        load_kuairec(tmp_path)
    (tmp_path / "items.csv").write_text("id,title\n1,a\n")
    with pytest.raises(ValueError, match=r"items\.csv: has no column video_id"):
        load_kuairec(tmp_path)


def test_the_real_sample():
    if not SAMPLE.is_dir():
        pytest.skip(f"no kuairec in {REAL_DATA}; name its parent folder in FLEXREC_TEST_DATA")
    dataset = load_kuairec(SAMPLE, feedback=10)
    assert len(dataset.catalogue) == 10_728
    assert len(dataset.user_ids) == 1_411
    assert len(dataset.train) > 2_000
    assert len(dataset.test) > 500
    assert len(dataset.catalogue.topic_names) == 39
    assert set(dataset.unsupported) == {"search", "trend"}
    with pytest.raises(
        ValueError, match="the kuairec data cannot answer the need 'trend': its interactions have no times"
    ):
        dataset.check_needs(["trend"])
    assert 0.08 < np.mean([~np.isnan(lst.interest) for lst in dataset.test]) < 0.12
    with pytest.raises(ValueError, match="split='time' needs times"):
        load_kuairec(SAMPLE, split="time")
