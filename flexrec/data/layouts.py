"""Published files that have no line of names, or hold what no column names tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flexrec.data.tables import BadRows, Chunk, Dialect, Table, find_table, open_table, without_header

LOG_STEMS = (
    *("interactions", "ratings", "events", "log", "behaviors", "clicks", "transactions", "purchases", "orders"),
    *("reviews", "rating", "bx-book-ratings", "book-ratings", "user_ratings", "animelist", "steam-200k"),
    *("jester-data-1", "jester", "jester_ratings"),
)
ITEM_STEMS = (
    *("items", "movies", "products", "books", "news", "videos", "articles", "anime", "games", "tracks", "catalogue"),
    *("catalog", "bx-books", "bx_books", "movies_metadata", "metadata", "meta"),
)
GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_TAB = Dialect(delimiter="\t", quoted=False)
_DOUBLE_COLON = Dialect("latin-1", "::", quoted=False)


@dataclass(frozen=True)
class Layout:
    """How a published file is written: its columns' names, its dialect, and what turns its rows into plain ones."""

    names: tuple[str, ...]
    dialect: Dialect
    plain: Callable[[Iterator[Chunk]], Iterator[Chunk]] = lambda chunks: chunks


def _genres_of_flags(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """MovieLens 100k: a column of 0 and 1 for each genre."""
    for lines, columns in chunks:
        flags = zip(*(columns[name] for name in GENRES_100K[1:]), strict=True)
        genres = ["|".join(n for n, f in zip(GENRES_100K[1:], row, strict=True) if f == "1") for row in flags]
        kept = {name: values for name, values in columns.items() if name not in GENRES_100K}
        yield Chunk(lines, {**kept, "genres": genres})


def _rows_of_matrix(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Jester: a line for each user, with a number of ratings and a column for each joke."""
    for lines, columns in chunks:
        jokes = [name for name in columns if name != "ratings"]
        long: dict[str, list[str]] = {"user": [], "item": [], "rating": []}
        for i, line in enumerate(lines):
            long["user"] += [str(line)] * len(jokes)
            long["item"] += jokes
            long["rating"] += [columns[name][i] for name in jokes]
        yield Chunk([line for line in lines for _ in jokes], long)


def _hours_of_play(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Steam: the 1.0 of a purchase counts no hours."""
    for lines, columns in chunks:
        pairs = zip(columns["event"], columns["hours"], strict=True)
        hours = ["" if event == "purchase" else value for event, value in pairs]
        yield Chunk(lines, {"user": columns["user"], "item": columns["item"], "hours": hours})


LAYOUTS: dict[str, Layout] = {
    "behaviors.tsv": Layout(("impression", "user", "timestamp", "history", "impressions"), _TAB),
    "news.tsv": Layout(
        ("id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities"), _TAB
    ),
    "u.data": Layout(("user", "item", "rating", "timestamp"), _TAB),
    "u.item": Layout(
        ("id", "title", "release_date", "video_release_date", "url", *GENRES_100K),
        Dialect("latin-1", "|", quoted=False),
        _genres_of_flags,
    ),
    "ratings.dat": Layout(("userId", "movieId", "rating", "timestamp"), _DOUBLE_COLON),
    "movies.dat": Layout(("movieId", "title", "genres"), _DOUBLE_COLON),
    "steam-200k.csv": Layout(("user", "item", "event", "hours", "zero"), Dialect(), _hours_of_play),
    "jester-data-1.csv": Layout(("ratings", *map(str, range(1, 101))), Dialect(), _rows_of_matrix),
}


def layout_of(path: Path) -> Layout | None:
    """The layout of a published file by its name."""
    return LAYOUTS.get(path.name.casefold().removesuffix(".gz"))


@dataclass(frozen=True)
class Source:
    """A table with plain rows, whatever its layout."""

    table: Table
    names: tuple[str, ...]
    plain: Callable[[Iterator[Chunk]], Iterator[Chunk]] | None = None

    @property
    def path(self) -> Path:
        return self.table.path

    def chunks(self, bad: BadRows, names: tuple[str, ...] | None = None) -> Iterator[Chunk]:
        """Rows with the columns of ``names`` (None: all)."""
        if self.plain is None:
            return self.table.chunks(bad, names)
        return self.plain(self.table.chunks(bad))


def open_source(path: Path, named: Mapping[str, tuple[str, ...]] | None = None) -> Source:
    """Open a table; a published file without a line of names is known by its own name and width.

    Columns that a person names by numbers (``named``: role -> columns) are those of a file without a line of names.
    """
    wanted = [name for group in (named or {}).values() for name in group]
    layout = layout_of(path)
    if layout is None or wanted:
        table = open_table(path)
        numbers = bool(wanted) and all(name.isdigit() for name in wanted) and not set(wanted) <= set(table.names)
        return _source(without_header(table) if numbers and table.dialect is not None else table)
    table = open_table(path, dialect=layout.dialect)
    if len(table.names) != len(layout.names) or set(map(str.casefold, table.names)) & {"user", "user_id", "item_id"}:
        return _source(open_table(path))  # another's file of the same name
    table = Table(path, layout.names, layout.dialect, named=False)
    if layout.plain is Layout.plain:
        return _source(table)
    first = next(layout.plain(iter([Chunk([], {name: [] for name in layout.names})])))
    return Source(table, tuple(first.columns), layout.plain)


def _source(table: Table) -> Source:
    return Source(table, table.names)


def find_log(folder: Path) -> Path | None:
    """The log in a folder, by the usual names of its file."""
    return find_table(folder, LOG_STEMS) or find_table(folder, ("u",), (".data", ".data.gz"))


def find_items(folder: Path) -> Path | None:
    """The items in a folder, by the usual names of their file."""
    return find_table(folder, ITEM_STEMS) or find_table(folder, ("u",), (".item", ".item.gz"))
