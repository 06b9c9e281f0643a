"""The items of a person's folder: a catalogue from a table, and which item an id of the log means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from flexrec.data.columns import ITEM_ROLES, find_columns, require
from flexrec.data.layouts import Source, open_source
from flexrec.data.lists import Catalogue
from flexrec.data.tables import BadRows
from flexrec.data.values import canonical_id, categories, number

MAX_TITLE = 200  # characters: a longer title is cut, so that a list of them fits into a prompt
MAX_TOPICS = 500  # the most frequent categories; rarer ones are left out
_NUMERIC_SHARE = 0.9  # of a column's values, for it to hold numbers


class ItemIndex(dict[str, int]):
    """Item by id as the log writes it. Where an id is not among the items' own, it is another writing of one of them
    ("1.0" or "01" for "1"), if of one only, or -1."""

    def __init__(self, ids: Iterable[str]) -> None:
        super().__init__((item_id, i) for i, item_id in enumerate(ids))
        by_form = Counter(map(canonical_id, self))
        self._by_form = {form: i for item_id, i in self.items() if by_form[form := canonical_id(item_id)] == 1}
        self.rewritten = 0

    def __missing__(self, item_id: str) -> int:
        item = self[item_id] = self._by_form.get(canonical_id(item_id), -1)
        self.rewritten += item >= 0
        return item


class Codes(dict[str, int]):
    """Numbers ids by their first appearance."""

    def __missing__(self, key: str) -> int:
        self[key] = code = len(self)
        return code


def read_items(source: Source, named: Mapping[str, tuple[str, ...]], bad: BadRows, notes: list[str]) -> Catalogue:
    """Read a catalogue in the file's order.

    Titles are put on one line and cut to ``MAX_TITLE`` characters; an item without one is called by its first category
    and its id. An id that occurs again is a bad row. Columns without a role are kept by their names: numbers where
    nearly all their values are, else text.

    Raises:
        ValueError: no column of ids, or no row.
    """
    found = find_columns(source.path, source.names, ITEM_ROLES, named)
    require(source.path, source.names, found, "id")
    (id_column,), title_column = found["id"], found.get("title", ("",))[0]
    topic_columns = found.get("categories", ())
    extra = [n for n in source.names if n not in (id_column, title_column, *topic_columns)]
    first_line: dict[str, int] = {}
    titles: list[str] = []
    topics: list[tuple[str, ...]] = []
    columns: dict[str, list[str]] = {name: [] for name in extra}
    untitled = cut = 0
    for chunk in source.chunks(bad):
        given = chunk.columns.get(title_column, chunk.columns[id_column])
        fields = list(zip(*(chunk.columns[name] for name in topic_columns), strict=True))
        kept = []
        for row, (line, item_id) in enumerate(zip(chunk.lines, map(str, chunk.columns[id_column]), strict=True)):
            if not item_id or item_id in first_line:
                expected = f"an id of its own, not that of line {first_line[item_id]}" if item_id else "an id"
                bad.add(source.path, line, id_column, expected if bad.strict else "an id of its own", item_id)
                continue
            first_line[item_id] = line
            kept.append(row)
            title = " ".join(str(given[row]).split())
            untitled += not title
            cut += len(title) > MAX_TITLE
            topics.append(tuple(dict.fromkeys(name for f in (fields[row] if fields else ()) for name in categories(f))))
            titles.append(short_title(title) or " ".join((*topics[-1][:1], item_id)))
        for name in extra:
            values = chunk.columns[name]
            columns[name] += [str(values[row]) for row in kept]
    if not titles:
        raise ValueError(f"{source.path}: no items in it" + _reason(bad))
    if untitled:
        notes.append(f"{untitled} items of {source.path.name} have no title: they are called by category and id")
    if cut:
        notes.append(f"{cut} titles of {source.path.name} are cut to {MAX_TITLE} characters")
    kept_topics = _most_frequent(topics, source.path.name, notes)
    return Catalogue(tuple(first_line), tuple(titles), kept_topics, {n: _column(v) for n, v in columns.items()})


def read_catalogue(path: Path) -> Catalogue:
    """The items of a table (CSV, JSON lines, Parquet ..) with columns for ids, titles and categories.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no column of ids, no row, or a broken one, with its line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no table of items at {path}")
    return read_items(open_source(path), {}, BadRows(strict=True), [])


def bare_catalogue(ids: Iterable[str]) -> Catalogue:
    """Items of which nothing is known but their ids."""
    ids = tuple(ids)
    return Catalogue(ids, tuple(short_title(item_id) or item_id for item_id in ids), ((),) * len(ids))


def _reason(bad: BadRows) -> str:
    return f"; {bad.notes()[0]}" if bad.counts else ""


def short_title(title: str) -> str:
    """A title on one line, cut to ``MAX_TITLE`` characters."""
    title = " ".join(title.split())
    return title if len(title) <= MAX_TITLE else title[: MAX_TITLE - 3].rstrip() + " .."


def _most_frequent(topics: list[tuple[str, ...]], name: str, notes: list[str]) -> tuple[tuple[str, ...], ...]:
    counts = Counter(topic for group in topics for topic in group)
    if len(counts) <= MAX_TOPICS:
        return tuple(topics)
    frequent = dict(counts.most_common(MAX_TOPICS))
    notes.append(f"of {len(counts)} categories in {name} the {MAX_TOPICS} most frequent are kept")
    return tuple(tuple(topic for topic in group if topic in frequent) for group in topics)


def _column(values: list[str]) -> np.ndarray:
    read = np.array([number(value) for value in values], dtype=np.float64)
    given = sum(bool(value) for value in values)
    if given and np.count_nonzero(~np.isnan(read)) >= _NUMERIC_SHARE * given:
        return read
    return np.array(values, dtype=object)
