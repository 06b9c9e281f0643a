"""A person's log of interactions, read a chunk at a time into arrays; what the feedback means is not decided here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from flexrec.data.columns import INTERACTION_ROLES, find_columns, require
from flexrec.data.items import Codes, ItemIndex
from flexrec.data.layouts import Source
from flexrec.data.tables import BadRows, Chunk
from flexrec.data.values import Moments, id_order, numbers

Feedback = Literal["rating", "watch_ratio", "amount", "clicked", "event", "none"]
FEEDBACK: tuple[Feedback, ...] = ("rating", "watch_ratio", "amount", "clicked", "event")  # earlier ones decide

_EMPTY = frozenset({"", "nan", "none", "null", "na", "n/a", "\\n", "-", "nat"})
_SPLITS = {
    **dict.fromkeys(("train", "training", "0"), 0),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout", "2"), 1),
    **dict.fromkeys(("valid", "validation", "val", "dev", "1"), 2),
}
_YES_NO = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "y", "t"), "1"),
    **dict.fromkeys(("0", "0.0", "false", "no", "n", "f"), "0"),
}


@dataclass
class Log:
    """Interactions as they stand in a file, in the file's order; M rows.

    Attributes:
        users: (M,) int32 numbers in the order of ``user_ids``.
        items: (M,) int32.
        values: (M,) float64, the feedback; NaN where there is none. With feedback "event" the numbers of ``events``.
        times: (M,) float64, or None where the log has no times.
        splits: (M,) int8, 0 train, 1 test, 2 validation; or None.
        groups: (M,) int64, which items were shown together, -1 for none; or None.
        events: the words that the kinds of events are called by.
    """

    feedback: Feedback
    user_ids: list[str]
    users: np.ndarray
    items: np.ndarray
    values: np.ndarray
    times: np.ndarray | None
    splits: np.ndarray | None
    groups: np.ndarray | None
    events: list[str]

    def __len__(self) -> int:
        return len(self.users)

    def select(self, rows: np.ndarray) -> Log:
        """The rows at ``rows``, a boolean mask or indices."""
        parts = {
            name: None if (values := getattr(self, name)) is None else values[rows]
            for name in ("users", "items", "values", "times", "splits", "groups")
        }
        return Log(self.feedback, self.user_ids, events=self.events, **parts)  # type: ignore[arg-type]


@dataclass
class _Reader:
    """The state between chunks."""

    source: Source
    items: Codes | ItemIndex
    bad: BadRows
    moments: Moments
    wanted_events: frozenset[str] | None
    column: dict[str, str]  # of each role
    feedback: Feedback
    users: Codes = field(default_factory=Codes)
    groups: Codes = field(default_factory=Codes)
    events: Codes = field(default_factory=Codes)
    filtered: int = 0
    with_history: set[str] = field(default_factory=set)

    def read(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """The good rows of a chunk, as arrays by the names of ``Log``; "past" marks what lies before a user's rows."""
        past = None
        columns = {role: chunk.columns[name] for role, name in self.column.items() if name in chunk.columns}
        lines = chunk.lines
        if "impressions" in columns:
            lines, columns, past = self._spread(lines, columns)
        ok = np.ones(len(lines), dtype=bool)
        users = list(map(str, columns["user"]))
        items = list(map(str, columns["item"]))
        self._drop(ok, lines, "user", "an id", users, [i for i, user in enumerate(users) if not user])
        self._drop(ok, lines, "item", "an id", items, [i for i, item in enumerate(items) if not item])
        parts: dict[str, np.ndarray] = {}
        if self.wanted_events is not None:
            other = [event.casefold() not in self.wanted_events for event in columns["event"]]
            self.filtered += sum(other)
            ok &= ~np.array(other, dtype=bool)
        parts["values"] = self._values(ok, lines, columns)
        if "timestamp" in columns:
            texts = ["" if text.casefold() in _EMPTY else text for text in map(str, columns["timestamp"])]
            parts["times"] = self.moments(texts)
            if self.moments.form is not None:
                wrong = np.flatnonzero(np.isnan(parts["times"])).tolist()
                if past is not None:
                    wrong = [i for i in wrong if not past[i]]
                self._drop(ok, lines, "timestamp", f"a moment in {self.moments.form}", texts, wrong)
        if "split" in columns:
            splits = [_SPLITS.get(str(text).casefold(), -1) for text in columns["split"]]
            parts["splits"] = np.array(splits, dtype=np.int8)
            wrong = [i for i, split in enumerate(splits) if split < 0]
            self._drop(ok, lines, "split", "train, validation or test", columns["split"], wrong)
        kept = np.flatnonzero(ok).tolist()
        codes = np.fromiter(map(self.items.__getitem__, [items[i] for i in kept]), np.int32, len(kept))
        if (unknown := np.flatnonzero(codes < 0)).size:
            at = [kept[i] for i in unknown.tolist()]
            self._drop(ok, lines, "item", "an id that is among the items", items, at)
            kept, codes = np.flatnonzero(ok).tolist(), codes[codes >= 0]
        parts = {name: values[ok] for name, values in parts.items()}
        parts["items"] = codes
        parts["users"] = np.fromiter(map(self.users.__getitem__, [users[i] for i in kept]), np.int32, len(kept))
        if "impression" in columns:
            names = columns["impression"]
            groups = [self.groups[names[i]] if names[i] else -1 for i in kept]
            parts["groups"] = np.array(groups, dtype=np.int64)
        if past is not None:
            parts["past"] = np.array(past, dtype=np.int32)[ok]
        return parts

    def _values(self, ok: np.ndarray, lines: Sequence[int], columns: Mapping[str, list]) -> np.ndarray:
        if self.feedback == "none":
            return np.ones(len(lines))
        texts = list(map(str, columns[self.feedback]))
        if self.feedback == "event":
            self._drop(ok, lines, "event", "a word", texts, [i for i, text in enumerate(texts) if not text])
            return np.array([self.events[text.casefold()] if text else -1 for text in texts], dtype=np.float64)
        texts = ["" if text.casefold() in _EMPTY else text for text in texts]
        expected = "a number"
        if self.feedback == "clicked":
            texts, expected = [_YES_NO.get(text.casefold(), text) for text in texts], "0 or 1"
        values = numbers([text or "nan" for text in texts])
        wrong = np.isnan(values)
        if self.feedback == "clicked":
            wrong |= (values != 0) & (values != 1)
        elif self.feedback != "rating":
            wrong, expected = wrong | (values < 0), "a number that is not negative"
        at = [i for i in np.flatnonzero(wrong).tolist() if texts[i]]  # an empty field is no feedback
        self._drop(ok, lines, self.feedback, expected, texts, at)
        return values

    def _drop(
        self, ok: np.ndarray, lines: Sequence[int], role: str, expected: str, got: Sequence[object], rows: list[int]
    ) -> None:
        for row in rows:
            if ok[row]:
                ok[row] = False
                self.bad.add(self.source.path, lines[row], self.column.get(role, role), expected, got[row])

    def _spread(self, lines: list[int], columns: Mapping[str, list]) -> tuple[list[int], dict[str, list], list[int]]:
        """Rows of impressions "N1-0 N2-1" as a row for each item; a user's first row begins with the history."""
        roles = [role for role in ("user", "timestamp", "split") if role in columns]
        spread: dict[str, list] = {role: [] for role in (*roles, "item", "clicked", "impression")}
        at: list[int] = []
        past: list[int] = []  # 0, or how many places before the user's first row
        for row, line in enumerate(lines):
            user = str(columns["user"][row])
            shown: list[tuple[str, str, int]] = []
            for token in str(columns["impressions"][row]).split():
                item, dash, click = token.rpartition("-")
                if not dash or click not in ("0", "1"):
                    self.bad.add(self.source.path, line, self.column["impressions"], "items such as N1-0 N2-1", token)
                    shown = []
                    break
                shown.append((item, click, 0))
            if shown and "history" in columns and user not in self.with_history:
                self.with_history.add(user)
                before = str(columns["history"][row]).split()
                shown = [(item, "1", len(before) - i) for i, item in enumerate(before)] + shown
            name = str(columns["impression"][row]) if "impression" in columns else f"line {line}"
            for item, click, places in shown:
                at.append(line)
                past.append(places)
                spread["item"].append(item)
                spread["clicked"].append(click)
                spread["impression"].append("" if places else name)
                for role in roles:
                    spread[role].append(columns[role][row])
        return at, spread, past


def read_log(
    source: Source,
    named: Mapping[str, tuple[str, ...]],
    items: Codes | ItemIndex,
    bad: BadRows,
    notes: list[str],
    *,
    events: Collection[str] | None = None,
    day_first: bool | None = None,
    with_splits: bool = True,
) -> Log:
    """Read the log of ``source``; users are numbered in the order of their ids.

    Args:
        named: columns that a person named, by role.
        items: number of an item by its id as the log writes it; -1 makes the row bad.
        events: the kinds of events to read; None: all.
        with_splits: read a column of splits, whose other words make a row bad; else it is no matter what it holds.

    Raises:
        ValueError: no column of users or items, a named column that is not there, no good row.
    """
    found = find_columns(source.path, source.names, INTERACTION_ROLES, named)
    if not with_splits:
        found.pop("split", None)
    column = {role: names[0] for role, names in found.items()}
    require(source.path, source.names, found, "user")
    if "impressions" in column:
        column["item"] = column["clicked"] = ""
        feedback: Feedback = "clicked"
    else:
        require(source.path, source.names, found, "item")
        feedback = next((role for role in FEEDBACK if role in column), "none")
    if events is not None and "event" not in column:
        raise ValueError(f"{source.path}: events={sorted(events)} needs a column of events, which it does not have")
    wanted = None if events is None else frozenset(event.casefold() for event in events)
    if unused := [role for role in FEEDBACK if role in column and role != feedback and role != "event"]:
        notes.append(f"feedback is the column {column[feedback]!r}; {', '.join(column[r] for r in unused)} is not used")
    reader = _Reader(source, items, bad, Moments(day_first), wanted, column, feedback)
    names = tuple(dict.fromkeys(filter(None, column.values())))
    parts = [reader.read(chunk) for chunk in source.chunks(bad, names)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    if not len(joined.get("users", ())):
        reason = f": {bad.notes()[0]}" if bad.counts else ""
        reason += f": {reader.filtered} are other events than {sorted(wanted)}" if wanted and reader.filtered else ""
        raise ValueError(f"{source.path}: no interactions in it{reason}")
    notes += [f"{source.path.name}: {note}" for note in reader.moments.notes]
    if isinstance(items, ItemIndex) and items.rewritten:
        notes.append(f"{items.rewritten} ids of items are written otherwise in {source.path.name} (1.0 or 01 for 1)")
    user_ids = id_order(reader.users)
    rank = np.empty(len(user_ids), dtype=np.int32)
    rank[[reader.users[user_id] for user_id in user_ids]] = np.arange(len(user_ids))
    users, times = rank[joined["users"]], joined.get("times")
    if times is not None and reader.moments.form is None:
        times = None
        notes.append(f"{source.path.name}: the column {column['timestamp']!r} is empty: read as a log without times")
    if times is not None and "past" in joined:
        first = np.full(len(user_ids), np.inf)
        present = joined["past"] == 0
        np.minimum.at(first, users[present], times[present])
        times = np.where(present, times, first[users] - joined["past"])
    log = Log(
        feedback=feedback,
        user_ids=user_ids,
        users=users,
        items=joined["items"],
        values=joined["values"],
        times=times,
        splits=joined.get("splits"),
        groups=joined.get("groups"),
        events=list(reader.events),
    )
    # Without a moment: a history whose user has no good row, or rows from before the first moment of the file.
    return log if times is None or np.isfinite(times).all() else log.select(np.isfinite(times))
