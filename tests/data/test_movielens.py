"""The MovieLens folder formats, their errors, and the real ml-latest-small where it is at hand."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from flexrec.data import movielens as module
from flexrec.data.movielens import load_movielens, read_movielens
from flexrec.data.simulator import simulate

REAL_DATA = Path(os.environ.get("FLEXREC_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL_FOLDER = REAL_DATA / "ml-latest-small"

MOVIES = [
    ("1", "Toy Story (1995)", "Animation|Children's"),
    ("7", "Misérables, Les (1995)", "Drama"),
    ("12", "Nothing, Known: Part 2 (2001)", "(no genres listed)"),
]
RATINGS = [("5", "1", "5", "100"), ("2", "12", "3", "90"), ("5", "7", "4", "100"), ("2", "7", "1", "95")]


def write_csv(folder: Path, movies=MOVIES, ratings=RATINGS, gzipped: bool = False) -> Path:
    def quoted(row):
        return ",".join(f'"{value}"' if "," in value else value for value in row)

    for stem, header, rows in (
        ("movies", "movieId,title,genres", movies),
        ("ratings", "userId,movieId,rating,timestamp", ratings),
    ):
        text = "\n".join([header, *map(quoted, rows)]) + "\n"
        if gzipped:
            (folder / f"{stem}.csv.gz").write_bytes(gzip.compress(text.encode("utf-8")))
        else:
            (folder / f"{stem}.csv").write_text(text, encoding="utf-8")
    return folder


def write_dat(folder: Path, movies=MOVIES, ratings=RATINGS) -> Path:
    for stem, rows in (("movies", movies), ("ratings", ratings)):
        text = "".join("::".join(row) + "\n" for row in rows)
        (folder / f"{stem}.dat").write_bytes(text.encode("latin-1"))
    return folder


@pytest.mark.parametrize("form", ["csv", "csv.gz", "dat"])
def test_every_published_form_reads_the_same(tmp_path, form):
    if form == "dat":
        write_dat(tmp_path)
    else:
        write_csv(tmp_path, gzipped=form == "csv.gz")
    catalogue, ratings, user_ids = read_movielens(tmp_path)
    assert catalogue.ids == ("1", "7", "12")
    assert catalogue.titles == tuple(title for _, title, _ in MOVIES)
    assert catalogue.topics == (("Animation", "Children's"), ("Drama",), ())
    assert user_ids.tolist() == [2, 5]
    # By time, ties by movie; interest = clip((stars - 3) / 2, 0, 1).
    assert ratings.times.tolist() == [90, 95, 100, 100]
    assert ratings.users.tolist() == [0, 0, 1, 1]
    assert ratings.items.tolist() == [2, 1, 0, 1]
    assert ratings.interest.tolist() == [0.0, 0.0, 1.0, 0.5]
    assert (ratings.users.dtype, ratings.items.dtype, ratings.interest.dtype) == (np.int64, np.int64, np.float32)


@pytest.mark.parametrize(
    ("stars", "interest"), [("0.5", 0), ("3", 0), ("3.5", 0.25), ("4", 0.5), ("4.5", 0.75), ("5.0", 1)]
)
def test_interest_of_a_rating(tmp_path, stars, interest):
    _, ratings, _ = read_movielens(write_csv(tmp_path, ratings=[("1", "1", stars, "0")]))
    assert ratings.interest.tolist() == [interest]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_errors(tmp_path):
    write_csv(tmp_path)
    for name in ("movies.csv", "ratings.csv"):
        text = (tmp_path / name).read_bytes().replace(b"\n", b"\r\n")
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text + b"\r\n\r\n")
    catalogue, ratings, _ = read_movielens(tmp_path)
    assert (len(catalogue), len(ratings)) == (3, 4)
    assert catalogue.topics[0] == ("Animation", "Children's")


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no MovieLens folder at .*nowhere: expected a folder with ratings\.csv"
    ):
        load_movielens(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no movies file in .*: expected one of movies\.csv, movies\.csv\.gz"):
        load_movielens(tmp_path)
    write_csv(tmp_path)
    (tmp_path / "ratings.csv").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no ratings file in .*: expected one of ratings\.csv, ratings\.csv\.gz"
    ):
        load_movielens(tmp_path)


@pytest.mark.parametrize("write", [write_csv, write_dat])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("5", "1", "5"), r"expected 4 fields \(userId, movieId, rating, timestamp\), got 3: \['5', '1', '5'\]"),
        (("5", "1", "5", "1", "1"), "expected 4 fields .*, got 5"),
        (("5", "1", "good", "1"), "expected whole numbers for userId, .* number for rating, got .*'good'"),
        (("5", "1", "", "1"), "expected .* a number for rating, got .*'1', '', '1'"),
        (("u5", "1", "4", "1"), "expected whole numbers for userId, .*, got .*'u5'"),
        (("5", "1", "4", "noon"), "expected whole numbers for .*timestamp.*, got .*'noon'"),
        (("5", "1", "0", "1"), r"rating must lie in \[0.5, 5\], got 0 in "),
        (("5", "1", "5.5", "1"), r"rating must lie in \[0.5, 5\], got 5.5 in "),
        (("5", "1", "nan", "1"), r"rating must lie in \[0.5, 5\], got nan in "),
        (("5", "99", "5", "1"), "movieId 99 is not in the movies file"),
        (("2", "7", "5", "1"), "user 2 has rated movieId 7 already on line [45]; expected one rating per user"),
    ],
)
def test_a_broken_rating_is_named_with_file_line_and_row(tmp_path, write, row, message):
    write(tmp_path, ratings=[*RATINGS, row])
    line = len(RATINGS) + (2 if write is write_csv else 1)
    with pytest.raises(ValueError, match=rf"ratings\.(csv|dat):{line}: {message}"):
        load_movielens(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("8", "Title"), r"expected 3 fields \(movieId, title, genres\), got 2"),
        (("tt8", "Title", "Drama"), "movieId must be a whole number, got 'tt8'"),
        (("7", "Title", "Drama"), "movieId 7 is already on line 3"),
    ],
)
def test_a_broken_movie_is_named_with_file_line_and_row(tmp_path, row, message):
    write_csv(tmp_path, movies=[*MOVIES, row])
    with pytest.raises(ValueError, match=rf"movies\.csv:5: {message}"):
        load_movielens(tmp_path)


def test_empty_files(tmp_path):
    write_csv(tmp_path, ratings=[])
    with pytest.raises(ValueError, match=r"ratings\.csv: no ratings in it"):
        load_movielens(tmp_path)
    (tmp_path / "ratings.csv").write_text("")
    with pytest.raises(
        ValueError, match=r"ratings\.csv:1: expected the header userId,movieId,rating,timestamp, got ''"
    ):
        load_movielens(tmp_path)
    write_csv(tmp_path, movies=[])
    with pytest.raises(ValueError, match=r"movies\.csv: no movies in it"):
        load_movielens(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ratings.csv.gz", b"this is not gzip"),
        ("ratings.csv.gz", gzip.compress(b"userId,movieId,rating,timestamp\n" * 99, mtime=0)[:-9]),
        ("ratings.csv.gz", gzip.compress(b"x" * 5000, mtime=0)[:20] + b"\xff" * 20),
        ("ratings.csv", b"userId,movieId,rating,timestamp\n1,1,5,\xff\n"),
        ("ratings.csv", b'userId,movieId,rating,timestamp\n1,1,5,"12\n'),
    ],
    # The bytes are not their own names: a time in them once made two workers collect different tests.
    ids=["no gzip", "gzip cut short", "broken gzip", "no UTF-8", "open quote"],
)
def test_a_file_that_cannot_be_decoded_is_named(tmp_path, name, content):
    write_csv(tmp_path)
    (tmp_path / "ratings.csv").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"ratings\.csv"):
        load_movielens(tmp_path)


def test_too_few_ratings_for_any_list_is_said(tmp_path):
    with pytest.raises(ValueError, match="no list to train on in movielens: no user has 10 events, then 10 more"):
        load_movielens(write_csv(tmp_path))


def test_every_option_reaches_the_lists(tmp_path, monkeypatch):
    built, made = [], simulate(num_users=4, num_items=80, num_topics=4, num_test_users=1, num_candidates=6)
    monkeypatch.setattr(module, "build_dataset", lambda *args, **options: built.append((args, options)) or made)
    given = {
        "num_candidates": 7,
        "num_positives": 3,
        "history_length": 4,
        "min_history": 2,
        "split": "time",
        "test_fraction": 0.3,
        "num_test_users": 11,
        "time_quantile": 0.6,
        "lists_per_user": 5,
        "test_lists_per_user": 6,
        "max_train_lists": 12,
        "max_test_lists": 13,
        "trend_smoothing": 2.5,
        "seed": 14,
    }
    assert load_movielens(write_csv(tmp_path), trend_days=90.0, **given).train is made.train
    (((name, catalogue, ratings), options),) = built
    assert (name, catalogue.ids, len(ratings)) == ("movielens", ("1", "7", "12"), 4)
    assert options == {**given, "trend_window": 90.0 * 24 * 60 * 60}


@pytest.mark.parametrize("write", [write_csv, write_dat])
@pytest.mark.parametrize(
    "row",
    [
        (str(2**63), "1", "5", "100"),
        ("9" * 5000, "1", "5", "100"),
        ("5", "9" * 400, "5", "100"),
        ("5", "1", "5", "9" * 400),
        ("5", "1", "5", "1e3"),
        ("5", "1", "5"),
        ("5", "1", "5", ""),
    ],
    ids=[
        "user 2^63",
        "user of 5000 digits",
        "movie of 400 digits",
        "time of 400 digits",
        "float",
        "cut off",
        "no time",
    ],
)
def test_a_bad_row_may_be_skipped(tmp_path, write, row):
    rows = [(str(u), str((1, 7, 12)[m]), "4", str(100 + 10 * m)) for u in range(1, 9) for m in range(3)]
    write(tmp_path, ratings=[*rows, row])
    options = {"num_positives": 1, "min_history": 1, "num_candidates": 1}
    dataset = load_movielens(tmp_path, strict=False, **options)
    (note,) = dataset.notes
    assert note.startswith("skipped 1 rows of ratings.")
    assert f"the first is on line {25 if write is write_dat else 26}: " in note
    assert len(note) < 400
    with pytest.raises(ValueError, match=rf"ratings\.(csv|dat):{25 if write is write_dat else 26}: "):
        load_movielens(tmp_path, **options)


def test_moments_in_milliseconds_are_converted_and_an_odd_one_is_a_bad_row(tmp_path):
    start = 1_500_000_000
    rows = [(str(u), str((1, 7, 12)[m]), "4", str(start + 10 * m)) for u in range(1, 9) for m in range(3)]
    (tmp_path / "s").mkdir()
    (tmp_path / "ms").mkdir()
    options = {"num_positives": 1, "min_history": 1, "num_candidates": 1}
    seconds = load_movielens(write_csv(tmp_path / "s", ratings=rows), **options)
    in_ms = [(*row[:3], row[3] + "000") for row in rows]
    milliseconds = load_movielens(write_csv(tmp_path / "ms", ratings=in_ms), **options)
    assert milliseconds.notes == ("ratings.csv: timestamps are in milliseconds: converted to seconds",)
    assert milliseconds.log.times.tolist() == seconds.log.times.tolist()
    assert [lst.time for lst in milliseconds.train] == [lst.time for lst in seconds.train]
    odd = ("9", "1", "4", str(start))
    with pytest.raises(
        ValueError, match=r"ratings\.csv:26: timestamp: expected milliseconds, as the others are in, got"
    ):
        load_movielens(write_csv(tmp_path / "ms", ratings=[*in_ms, odd]), **options)
    skipped = load_movielens(tmp_path / "ms", strict=False, **options)
    assert len(skipped.notes) == 2
    assert skipped.log.times.tolist() == seconds.log.times.tolist()
    assert "9" not in skipped.user_ids


def test_the_files_of_100k(tmp_path):
    formats = Path(__file__).parent / "formats" / "ml_100k"
    catalogue, ratings, user_ids = read_movielens(formats)
    assert catalogue.ids == ("242", "302", "267")
    assert catalogue.topics == (("Comedy",), ("Crime", "Film-Noir", "Mystery", "Thriller"), ())
    assert catalogue.titles[2] == "Dél"
    assert user_ids.tolist() == [22, 186, 196]
    assert ratings.interest.tolist() == [0.0, 0.0, 1.0]
    assert ratings.times.tolist() == [878887116, 881250949, 891717742]


def test_no_row_of_a_test_user_and_none_after_the_boundary_is_trained_on(tmp_path):
    """On times and interests: another history, feedback and time of test users, and of all after the boundary."""
    rng = np.random.default_rng(0)
    ids = [str(i) for i in range(1, 31)]
    movies = [(i, f"Movie {i}", "Drama" if int(i) % 2 else "Comedy") for i in ids]
    ratings = [
        (str(user), movie, str(rng.integers(1, 6)), str(1_500_000_000 + int(rng.integers(1000)) * 3600))
        for user in range(1, 21)
        for movie in rng.permutation(ids)[:20].tolist()
    ]
    options = {"num_candidates": 6, "num_positives": 3, "min_history": 4, "split": "time", "time_quantile": 0.7}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    dataset = load_movielens(write_csv(tmp_path / "a", movies=movies, ratings=ratings), **options)
    tested = {dataset.user_ids[lst.user] for lst in dataset.test}
    changed = [
        (user, movie, str(6 - int(stars)), str(int(time) + 10**5 if user in tested else int(time)))
        if user in tested or int(time) >= dataset.time_boundary
        else (user, movie, stars, time)
        for user, movie, stars, time in ratings
    ]
    again = load_movielens(write_csv(tmp_path / "b", movies=movies, ratings=changed), **options)
    assert again.time_boundary == dataset.time_boundary
    for name in ("users", "items", "interest", "times"):
        np.testing.assert_array_equal(getattr(dataset.log, name), getattr(again.log, name))
    for one, other in zip(dataset.train, again.train, strict=True):
        assert (one.user, one.time) == (other.user, other.time)
        for name in ("history", "history_interest", "candidates", "interest", "popularity", "trend"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert dataset.log.times.max() < dataset.time_boundary <= min(lst.time for lst in dataset.test)


@pytest.fixture(scope="module")
def real():
    if not REAL_FOLDER.is_dir():
        pytest.skip(f"no ml-latest-small in {REAL_DATA}; name its parent folder in FLEXREC_TEST_DATA")
    return load_movielens(REAL_FOLDER)


def test_real_counts_are_the_official_ones():
    if not REAL_FOLDER.is_dir():
        pytest.skip(f"no ml-latest-small in {REAL_DATA}; name its parent folder in FLEXREC_TEST_DATA")
    catalogue, ratings, user_ids = read_movielens(REAL_FOLDER)
    assert (len(ratings), len(catalogue), len(user_ids)) == (100_836, 9_742, 610)
    assert len(catalogue.topic_names) == 19
    assert catalogue.titles[0] == "Toy Story (1995)"


def test_real_lists(real):
    assert real.unobserved == "zero"
    assert 4000 <= len(real.train) <= 6000
    assert 500 <= len(real.test) <= 700
    assert not {lst.user for lst in real.test} & set(real.log.users.tolist())
    for lst in real.train + real.test:
        assert len(set(lst.candidates.tolist())) == 30
        assert np.isnan(lst.interest).sum() == 20
        assert 10 <= len(lst.history) <= 20
        assert not set(lst.history.tolist()) & set(lst.candidates.tolist())
    # Popularity alone hardly tells the next movies from the negatives: those are drawn by it.
    liked_more_popular = [
        np.mean(lst.popularity[np.isnan(lst.interest)]) > np.mean(lst.popularity[~np.isnan(lst.interest)])
        for lst in real.test
    ]
    assert 0.2 < np.mean(liked_more_popular) < 0.8


def test_real_split_in_time(real):
    dataset = load_movielens(REAL_FOLDER, split="time", max_train_lists=200)
    assert dataset.log.times.max() < dataset.time_boundary
    assert 190 <= len(dataset.train) <= 200
    assert min(lst.time for lst in dataset.test) >= dataset.time_boundary
    assert len(dataset.test) >= 50
