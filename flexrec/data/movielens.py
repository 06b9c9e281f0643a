"""MovieLens, from a folder in the format in which GroupLens publishes it.

F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions on
Interactive Intelligent Systems 5, 4: 19:1-19:19. https://doi.org/10.1145/2827872. The data are free for research use
under the licence in the folder's README; they may not be used commercially without permission of GroupLens.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np

from flexrec.data.build import build_dataset
from flexrec.data.lists import Catalogue, Interactions, RankingDataset

NO_GENRES = "(no genres listed)"
DAY = 24 * 60 * 60  # of MovieLens time stamps, which are seconds

# What a row must look like, for messages, by the stem of the file.
_FIELDS = {"movies": ("movieId", "title", "genres"), "ratings": ("userId", "movieId", "rating", "timestamp")}


def load_movielens(
    folder: str | Path,
    *,
    num_candidates: int = 30,
    num_positives: int = 10,
    history_length: int = 20,
    min_history: int = 10,
    split: Literal["user", "time"] = "user",
    test_fraction: float = 0.2,
    num_test_users: int | None = None,
    time_quantile: float = 0.8,
    lists_per_user: int = 32,
    test_lists_per_user: int = 10,
    max_train_lists: int | None = None,
    max_test_lists: int | None = None,
    trend_days: float = 180.0,
    trend_smoothing: float = 5.0,
    seed: int = 0,
) -> RankingDataset:
    """Lists of the next ``num_positives`` rated movies and popular movies that the user never rated.

    The interest of a rating is clip((rating - 3) / 2, 0, 1): 3 stars and less are worth 0, 5 stars 1. Topics are
    genres. The trend compares a movie's share of the ratings in the last ``trend_days`` days with the share in the
    same number of days before; see ``flexrec.data.build.moments``. How lists are cut and split is said in
    ``flexrec.data.build.ListBuilder`` and ``build_dataset``, which the other arguments go to.

    Args:
        folder: holds ``ratings.csv`` and ``movies.csv``, either of them gzipped or not (ml-latest-small, ml-latest,
            ml-25m, ml-32m), or ``ratings.dat`` and ``movies.dat`` (ml-1m).

    Raises:
        FileNotFoundError: no such folder, or a file is not in it.
        ValueError: a broken row, named with its file and line; a file without rows; bad arguments.

    Example:
        >>> from pathlib import Path
        >>> from flexrec.data import load_movielens
        >>> folder = Path("small")
        >>> folder.mkdir()
        >>> rng = np.random.default_rng(0)
        >>> movies = [f"{i},Film {i} (1999),Drama" for i in range(60)]
        >>> rated = [(user, movie, at) for user in range(25) for at, movie in enumerate(rng.permutation(60)[:40])]
        >>> ratings = [f"{user},{movie},{rng.integers(1, 6)},{86400 * at + user}" for user, movie, at in rated]
        >>> _ = (folder / "movies.csv").write_text("\\n".join(["movieId,title,genres", *movies]))
        >>> _ = (folder / "ratings.csv").write_text("\\n".join(["userId,movieId,rating,timestamp", *ratings]))
        >>> data = load_movielens(folder, num_candidates=10, num_positives=4)
        >>> len(data.catalogue), len(data.test) > 0
        (60, True)
    """
    catalogue, ratings, _ = read_movielens(folder)
    return build_dataset(
        "movielens",
        catalogue,
        ratings,
        trend_window=trend_days * DAY,
        trend_smoothing=trend_smoothing,
        split=split,
        test_fraction=test_fraction,
        num_test_users=num_test_users,
        time_quantile=time_quantile,
        num_candidates=num_candidates,
        num_positives=num_positives,
        history_length=history_length,
        min_history=min_history,
        lists_per_user=lists_per_user,
        test_lists_per_user=test_lists_per_user,
        max_train_lists=max_train_lists,
        max_test_lists=max_test_lists,
        seed=seed,
    )


def read_movielens(folder: str | Path) -> tuple[Catalogue, Interactions, np.ndarray]:
    """The movies in the file's order, everybody's ratings as interest, and the public ids (users,) of the users.

    Ratings are sorted by time, ties by user and movie; times are seconds since 1970 as float64.

    Example:
        >>> from pathlib import Path
        >>> from flexrec.data import read_movielens
        >>> folder = Path("tiny")
        >>> folder.mkdir()
        >>> _ = (folder / "movies.csv").write_text("movieId,title,genres\\n7,Alien (1979),Horror|Sci-Fi\\n")
        >>> _ = (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\\n1,7,4.5,100\\n")
        >>> catalogue, log, _ = read_movielens(folder)
        >>> catalogue.titles, catalogue.topics, log.interest
        (('Alien (1979)',), (('Horror', 'Sci-Fi'),), array([0.75], dtype=float32))
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no MovieLens folder at {folder}: expected a folder with ratings.csv and movies.csv")
    catalogue = _read_movies(_find(folder, "movies"))
    users, movies, stars, times = _read_ratings(_find(folder, "ratings"), catalogue)
    user_ids, users = np.unique(users, return_inverse=True)
    order = np.lexsort((movies, users, times))
    interest = np.clip((stars - 3.0) / 2.0, 0.0, 1.0).astype(np.float32)
    ratings = Interactions(users[order], movies[order], interest[order], times[order])
    return catalogue, ratings, user_ids


def _find(folder: Path, stem: str) -> Path:
    names = [f"{stem}{ending}" for ending in (".csv", ".csv.gz", ".dat", ".dat.gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {stem} file in {folder}: expected one of {', '.join(names)}")


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every row that is not blank; the header of a CSV file is checked and left out."""
    stem = path.name.split(".")[0]
    is_csv = ".csv" in path.suffixes
    expected = _FIELDS[stem]
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig" if is_csv else "latin-1", newline="") as file:
            rows = _csv_rows(file) if is_csv else _dat_rows(file)
            if is_csv and (header := next(rows, (1, [])))[1] != list(expected):
                raise ValueError(f"{path}:1: expected the header {','.join(expected)}, got {','.join(header[1])!r}")
            for line, row in rows:
                if len(row) != len(expected):
                    raise ValueError(
                        f"{path}:{line}: expected {len(expected)} fields ({', '.join(expected)}), got {len(row)}: {row}"
                    )
                yield line, row
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as {stem}: {error}") from error


def _csv_rows(file: IO[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, strict=True)
    return ((reader.line_num, row) for row in reader if row)


def _dat_rows(file: IO[str]) -> Iterator[tuple[int, list[str]]]:
    return ((i, line.rstrip("\r\n").split("::")) for i, line in enumerate(file, start=1) if line.strip())


def _read_movies(path: Path) -> Catalogue:
    ids, titles, topics = [], [], []
    first_line: dict[str, int] = {}
    for line, row in _rows(path):
        movie, title, genres = row
        try:
            movie = str(int(movie))
        except ValueError:
            raise ValueError(f"{path}:{line}: movieId must be a whole number, got {movie!r} in {row}") from None
        if movie in first_line:
            raise ValueError(f"{path}:{line}: movieId {movie} is already on line {first_line[movie]}: {row}")
        first_line[movie] = line
        ids.append(movie)
        titles.append(title)
        topics.append(() if genres in ("", NO_GENRES) else tuple(dict.fromkeys(genres.split("|"))))
    if not ids:
        raise ValueError(f"{path}: no movies in it")
    return Catalogue(tuple(ids), tuple(titles), tuple(topics))


def _read_ratings(path: Path, catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Users' public ids (M,) int64, items (M,) int64, stars (M,) float64 and times (M,) float64, in file order."""
    # Typed arrays: 32 million ratings as Python objects would need many gigabytes.
    users, items, stars, times, lines = array("q"), array("q"), array("d"), array("d"), array("q")
    item_of_movie = {int(movie): i for i, movie in enumerate(catalogue.ids)}
    for line, row in _rows(path):
        try:
            user, movie, rating, time = int(row[0]), int(row[1]), float(row[2]), int(row[3])
        except ValueError:
            raise ValueError(
                f"{path}:{line}: expected whole numbers for userId, movieId and timestamp and a number for rating, "
                f"got {row}"
            ) from None
        if not 0.5 <= rating <= 5.0:
            raise ValueError(f"{path}:{line}: rating must lie in [0.5, 5], got {row[2]} in {row}")
        item = item_of_movie.get(movie)
        if item is None:
            raise ValueError(f"{path}:{line}: movieId {movie} is not in the movies file: {row}")
        users.append(user)
        items.append(item)
        stars.append(rating)
        times.append(time)
        lines.append(line)
    if not users:
        raise ValueError(f"{path}: no ratings in it")
    table = np.array(users), np.array(items), np.array(stars), np.array(times)
    _check_rated_once(path, catalogue, table[0], table[1], np.array(lines))
    return table


def _check_rated_once(
    path: Path, catalogue: Catalogue, users: np.ndarray, items: np.ndarray, lines: np.ndarray
) -> None:
    order = np.lexsort((lines, items, users))
    again = np.flatnonzero((np.diff(users[order]) == 0) & (np.diff(items[order]) == 0))
    if len(again):
        first, second = order[again[0]], order[again[0] + 1]
        raise ValueError(
            f"{path}:{lines[second]}: user {users[second]} has rated movieId {catalogue.ids[items[second]]} already on "
            f"line {lines[first]}; expected one rating per user and movie"
        )
