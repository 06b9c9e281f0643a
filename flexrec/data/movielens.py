"""MovieLens, from a folder in the format in which GroupLens publishes it.

F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions on
Interactive Intelligent Systems 5, 4: 19:1-19:19. https://doi.org/10.1145/2827872. The data are free for research use
under the licence in the folder's README; they may not be used commercially without permission of GroupLens.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from flexrec.data.build import build_dataset
from flexrec.data.layouts import GENRES_100K, LAYOUTS
from flexrec.data.lists import Catalogue, Interactions, RankingDataset
from flexrec.data.options import MovieLensOptions, takes
from flexrec.data.tables import BadRows, Dialect, errors_of, iter_rows, shown
from flexrec.data.values import number_moments

NO_GENRES = "(no genres listed)"
DAY = 24 * 60 * 60  # of MovieLens time stamps, which are seconds

# What a row must look like, for messages, by the stem of the file.
_FIELDS = {"movies": ("movieId", "title", "genres"), "ratings": ("userId", "movieId", "rating", "timestamp")}


@takes(MovieLensOptions)
def load_movielens(folder: str | Path, options: MovieLensOptions) -> RankingDataset:
    """Lists of the next ``num_positives`` rated movies and popular movies that the user never rated.

    The interest of a rating is clip((rating - 3) / 2, 0, 1): 3 stars and less are worth 0, 5 stars 1. Topics are
    genres. The trend compares a movie's share of the ratings in the last ``trend_days`` days with the share in the
    same number of days before; see ``flexrec.data.build.moments``. How lists are cut and split is said in
    ``flexrec.data.build.ListBuilder`` and ``build_dataset``, which the other arguments go to; what each is for and its
    default stand in ``flexrec.data.options.MovieLensOptions``.

    Args:
        folder: holds ``ratings.csv`` and ``movies.csv``, either of them gzipped or not (ml-latest-small, ml-latest,
            ml-25m, ml-32m), or ``ratings.dat`` and ``movies.dat`` (ml-1m, ml-10m), or ``u.data`` and ``u.item``
            (ml-100k).
        strict: a broken row is an error; False skips it, counts it and says so in the data set's ``notes``.

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
    bad = BadRows(options.strict)
    notes: list[str] = []
    catalogue, ratings, user_ids = _read(Path(folder), bad, notes)
    dataset = build_dataset(
        "movielens",
        catalogue,
        ratings,
        trend_window=options.trend_days * DAY,
        num_positives=options.num_positives,
        split=options.split,
        time_quantile=options.time_quantile,
        **options.of_lists(),
    )
    return replace(dataset, user_ids=tuple(map(str, user_ids.tolist())), notes=(*notes, *bad.notes()))


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
    return _read(Path(folder), BadRows(strict=True), [])


def _read(folder: Path, bad: BadRows, notes: list[str]) -> tuple[Catalogue, Interactions, np.ndarray]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no MovieLens folder at {folder}: expected a folder with ratings.csv and movies.csv")
    catalogue = _read_movies(_find(folder, "movies"), bad)
    users, movies, stars, times = _read_ratings(_find(folder, "ratings"), catalogue, bad, notes)
    user_ids, users = np.unique(users, return_inverse=True)
    order = np.lexsort((movies, users, times))
    interest = np.clip((stars - 3.0) / 2.0, 0.0, 1.0).astype(np.float32)
    ratings = Interactions(users[order], movies[order], interest[order], times[order])
    return catalogue, ratings, user_ids


def _find(folder: Path, stem: str) -> Path:
    of_100k = {"movies": "u.item", "ratings": "u.data"}[stem]
    names = [*(f"{stem}{ending}" for ending in (".csv", ".csv.gz", ".dat", ".dat.gz")), of_100k, f"{of_100k}.gz"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {stem} file in {folder}: expected one of {', '.join(names)}")


def _rows(path: Path, stem: str, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every row that is not blank; the header of a CSV file is checked and left out."""
    expected = _FIELDS[stem]
    is_csv, is_item = ".csv" in path.suffixes, ".item" in path.suffixes
    dialect = Dialect() if is_csv else LAYOUTS[path.name.removesuffix(".gz")].dialect
    width = len(LAYOUTS["u.item"].names) if is_item else len(expected)
    with errors_of(path):
        rows = iter_rows(path, dialect, bad)
        if is_csv and (header := next(rows, (1, [])))[1] != list(expected):
            raise ValueError(f"{path}:1: expected the header {','.join(expected)}, got {','.join(header[1])!r}")
        for line, row in rows:
            if len(row) != width:
                reason = f"expected {width} fields ({', '.join(expected)})"
                bad.reject(path, line, reason, f"{reason}, got {len(row)}: {shown(row, 200)}")
            elif is_item:
                genres = (genre for genre, flag in zip(GENRES_100K, row[5:], strict=True) if flag == "1")
                yield line, [row[0], row[1], "|".join(genre for genre in genres if genre != "unknown")]
            else:
                yield line, row


def _read_movies(path: Path, bad: BadRows) -> Catalogue:
    ids, titles, topics = [], [], []
    first_line: dict[str, int] = {}
    for line, row in _rows(path, "movies", bad):
        movie, title, genres = row
        try:
            movie = str(int(movie))
        except ValueError:
            reason = "movieId must be a whole number"
            bad.reject(path, line, reason, f"{reason}, got {shown(movie)} in {shown(row, 200)}")
            continue
        if movie in first_line:
            message = f"movieId {movie} is already on line {first_line[movie]}: {shown(row, 200)}"
            bad.reject(path, line, "movieId is already there", message)
            continue
        first_line[movie] = line
        ids.append(movie)
        titles.append(title)
        topics.append(() if genres in ("", NO_GENRES) else tuple(dict.fromkeys(genres.split("|"))))
    if not ids:
        raise ValueError(f"{path}: no movies in it")
    return Catalogue(tuple(ids), tuple(titles), tuple(topics), {"year": _years(titles)})


def _years(titles: list[str]) -> np.ndarray:
    """(movies,) float64: the year in brackets that a title ends with, the first of two; NaN where there is none."""
    found = (re.search(r"\((\d{4})(?:[-\u2013]\s*(?:\d{4})?)?\)\s*$", title) for title in titles)
    return np.array([np.nan if year is None else float(year[1]) for year in found])


def _read_ratings(
    path: Path, catalogue: Catalogue, bad: BadRows, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Users' public ids (M,) int64, items (M,) int64, stars (M,) float64 and times (M,) float64, in file order."""
    # Typed arrays: 32 million ratings as Python objects would need many gigabytes.
    users, items, stars, times, lines = array("q"), array("q"), array("d"), array("d"), array("q")
    item_of_movie = {int(movie): i for i, movie in enumerate(catalogue.ids)}
    for line, row in _rows(path, "ratings", bad):
        try:
            user, movie, rating, time = int(row[0]), int(row[1]), float(row[2]), float(int(row[3]))
            if not -(2**63) <= user < 2**63:
                raise ValueError
        except (ValueError, OverflowError):
            reason = "expected whole numbers for userId, movieId and timestamp and a number for rating"
            bad.reject(path, line, reason, f"{reason}, got {shown(row, 200)}")
            continue
        if not 0.5 <= rating <= 5.0:
            reason = "rating must lie in [0.5, 5]"
            bad.reject(
                path,
                line,
                reason,
                f"{reason}, got {row[2][:60]} in {shown(row, 200)}",
            )
            continue
        item = item_of_movie.get(movie)
        if item is None:
            reason = "movieId is not in the movies file"
            bad.reject(path, line, reason, f"movieId {row[1][:60]} is not in the movies file: {shown(row, 200)}")
            continue
        users.append(user)
        items.append(item)
        stars.append(rating)
        times.append(time)
        lines.append(line)
    if not users:
        raise ValueError(f"{path}: no ratings in it")
    unit, in_seconds = number_moments(np.array(times))
    seconds = in_seconds(np.array(times))
    if unit not in ("seconds", "numbers of no known unit"):
        notes.append(f"{path.name}: timestamps are in {unit}: converted to seconds")
    for row_number in np.flatnonzero(np.isnan(seconds)).tolist():
        bad.add(path, lines[row_number], "timestamp", f"{unit}, as the others are in", times[row_number])
    kept = ~np.isnan(seconds) & _rated_once(path, catalogue, np.array(users), np.array(items), np.array(lines), bad)
    return np.array(users)[kept], np.array(items)[kept], np.array(stars)[kept], seconds[kept]


def _rated_once(
    path: Path, catalogue: Catalogue, users: np.ndarray, items: np.ndarray, lines: np.ndarray, bad: BadRows
) -> np.ndarray:
    """(M,) bool: the first row of each user and movie; the others are bad."""
    order = np.lexsort((lines, items, users))
    again = 1 + np.flatnonzero((np.diff(users[order]) == 0) & (np.diff(items[order]) == 0))
    kept = np.ones(len(users), dtype=bool)
    kept[order[again]] = False
    for at in again.tolist():
        row = order[at]
        message = (
            f"user {users[row]} has rated movieId {catalogue.ids[items[row]]} already on line {lines[order[at - 1]]}; "
            f"expected one rating per user and movie"
        )
        bad.reject(path, int(lines[row]), "expected one rating per user and movie", message)
    return kept
