"""Items that requests may name: those of catalogues, by id or title, and those that a request tells of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexrec.data.lists import Catalogue, RankingList
from flexrec.serving.requests import id_of, shown
from flexrec.task.descriptions import Item
from flexrec.task.prompts import shown_text


class KnownItems:
    """The items of catalogues, of which the last that has an id counts.

    Args:
        popularity: how often each item was taken, by id.
        show: what prompts show of an item (``PromptBuilder.show``).
    """

    def __init__(
        self, catalogues: Sequence[Catalogue], popularity: Mapping[str, float], show: Sequence[str] = ("title",)
    ) -> None:
        self._items = {item_id: (catalogue, i) for catalogue in catalogues for item_id, i in catalogue.index.items()}
        # Of each column, where it stands for numbers or texts, what stands for nothing.
        self._columns = {
            name: (values.dtype, "" if values.dtype == object else np.nan)
            for catalogue in catalogues
            for name, values in catalogue.columns.items()
        }
        self._popularity, self._show = popularity, tuple(show)
        self._by_title: dict[str, list[str]] = {}
        for item_id, (catalogue, i) in self._items.items():
            self._by_title.setdefault(catalogue.titles[i], []).append(item_id)

    def all(self) -> dict[str, Item]:
        """The items by id."""
        return {i: Item(i, catalogue.titles[at], catalogue.topics[at]) for i, (catalogue, at) in self._items.items()}

    def item(self, entry: Any, where: str) -> Item:
        """What an entry of a request stands for: an id, a title that one item has, or a dictionary."""
        title, topics = None, None
        if isinstance(entry, dict):
            title, topics = entry.get("title"), entry.get("topics")
            if entry.get("id") is not None:
                item_id = id_of(entry["id"], f"{where}.id")
            elif isinstance(title, str):
                item_id = self._titled(title, where)
            else:
                raise ValueError(f"'{where}' has no 'id'")
        else:
            item_id = id_of(entry, where)
            if item_id not in self._items:
                item_id = self._titled(item_id, where)
        catalogue, index = self._items.get(item_id, (None, 0))
        if title is None and catalogue is not None:
            title = catalogue.titles[index]
        if title is None:
            raise ValueError(f"'{where}' has no 'title', and the id {item_id!r} is not in the run's catalogue")
        if not isinstance(title, str):
            raise ValueError(f"the title of '{where}' must be a string, got {type(title).__name__}")
        if topics is None:
            topics = () if catalogue is None else catalogue.topics[index]
        elif not isinstance(topics, list) or not all(isinstance(topic, str) for topic in topics):
            raise ValueError(f"the topics of '{where}' must be a list of strings, got {shown(topics)}")
        topics = tuple(dict.fromkeys(topics))
        if self._show == ("title",):
            return Item(item_id, title, topics)
        columns = {} if catalogue is None else {name: values[index] for name, values in catalogue.columns.items()}
        given = entry if isinstance(entry, dict) else {}
        for name in set(self._show) & set(given) - {"title", "category"}:
            value = given[name]
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError(f"{name!r} of '{where}' must be a text or a number, got {shown(value)}")
            columns[name] = value if isinstance(value, str) else float(value)
        return Item(item_id, title, topics, shown_text(self._show, title, topics, columns))

    def id_titled(self, title: str) -> str | None:
        """The id of the one item of this title; None where there is none, or more than one."""
        found = self._by_title.get(title, ())
        return found[0] if len(found) == 1 else None

    def _titled(self, title: str, where: str) -> str:
        """The id of the one item of this title; what is given alone may have been meant as an id."""
        if (item_id := self.id_titled(title)) is not None:
            return item_id
        if found := self._by_title.get(title):
            raise ValueError(
                f"'{where}': {len(found)} items have the title {shown(title)}: give one of the ids "
                f"{', '.join(map(shown, found[:5]))}"
            )
        raise ValueError(
            f"'{where}' has no 'title', and {shown(title)} is neither an id nor a title of the run's catalogue: give "
            f"{{'id': .., 'title': ..}}"
        )

    def as_list(
        self, history: list[Item], candidates: list[Item], trend: np.ndarray, query: str
    ) -> tuple[RankingList, Catalogue]:
        """A request as data sets have their lists, with a catalogue of its items alone; an item may be in it twice."""
        items = [*history, *candidates]
        columns = {}
        for name, (dtype, nothing) in self._columns.items():
            known = (self._items.get(item.id, (None, 0)) for item in items)
            values = [nothing if of is None else of.columns.get(name, {i: nothing})[i] for of, i in known]
            columns[name] = np.array(values, dtype=dtype)
        catalogue = Catalogue(
            tuple(map(str, range(len(items)))),
            tuple(item.title for item in items),
            tuple(item.topics for item in items),
            columns,
        )
        at, popularity = np.arange(len(items)), [self._popularity.get(item.id, 0.0) for item in candidates]
        lst = RankingList(
            user=-1,
            time=0.0,
            history=at[: len(history)],
            candidates=at[len(history) :],
            interest=np.full(len(candidates), np.nan, dtype=np.float32),
            popularity=np.array(popularity, dtype=np.float32),
            trend=trend.astype(np.float32),
            query=query,
        )
        return lst, catalogue
