"""Values as people write them: numbers, moments, categories, ids."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import numpy as np

NO_CATEGORIES = frozenset({"", "(no genres listed)", "nan", "none", "null", "unknown", "n/a", "[]", "\\n"})

# Units of a number that is a moment: name, the size of a second in it, and the range of the years 1973 to 5138.
_UNITS = (
    ("seconds", 1.0, 1e8, 1e11),
    ("milliseconds", 1e3, 1e11, 1e14),
    ("microseconds", 1e6, 1e14, 1e17),
    ("nanoseconds", 1e9, 1e17, 1e20),
)
# Dates written as numbers: how, the pattern, and the range. 20200705 is a day, not a second of 1970.
_DATE_NUMBERS = (
    ("days such as 20201231", "%Y%m%d", 19000101, 21001231),
    ("minutes such as 202012312359", "%Y%m%d%H%M", 190001010000, 210012312359),
    ("seconds such as 20201231235959", "%Y%m%d%H%M%S", 19000101000000, 21001231235959),
)
_DAY_FIRST = ("%d/%m/%Y", "%d/%m/%y")
_MONTH_FIRST = ("%m/%d/%Y", "%m/%d/%y")
_CLOCKS = ("", " %H:%M:%S", " %H:%M", " %I:%M:%S %p", " %I:%M %p")
_YEAR_FIRST = ("%Y/%m/%d",)


def number(text: Any) -> float:
    """The number that a text is, NaN where it is none; a comma may be the decimal point."""
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        if not isinstance(text, str) or len(text) > 40 or text.count(",") != 1:
            return math.nan
        try:
            value = float(text.replace(",", "."))
        except ValueError:
            return math.nan
    return value if math.isfinite(value) else math.nan


def numbers(texts: Sequence[Any]) -> np.ndarray:
    """(n,) float64 of ``number``."""
    try:
        values = np.array(list(map(float, texts)))
    except (TypeError, ValueError, OverflowError):
        return np.array([number(text) for text in texts], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


@dataclass
class Moments:
    """Reads a column of moments; how they are written is seen from the first rows and then expected of all.

    Attributes:
        day_first: in 03/04/2020 the day is 3; None: as the first rows tell, and True where they do not.
        form: how the moments are written, in words; None before any was read.
        notes: what was found.
    """

    day_first: bool | None = None
    form: str | None = None
    notes: list[str] = field(default_factory=list)
    _read: Callable[[Sequence[str]], np.ndarray] | None = None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) float64 seconds since 1970, or small numbers as they are; NaN where a text is no moment."""
        if self._read is None:
            given = [text for text in texts if text]
            if not given:
                return np.full(len(texts), np.nan)
            self._read = self._see(given)
        return self._read(texts)

    def _see(self, texts: Sequence[str]) -> Callable[[Sequence[str]], np.ndarray]:
        values = numbers(texts)
        if np.count_nonzero(~np.isnan(values)) * 2 > len(texts):
            self.form, read = number_moments(values)
            if self.form not in ("seconds", "numbers of no known unit"):
                self.notes.append(f"moments are in {self.form}: converted to seconds")
            elif self.form != "seconds":
                self.notes.append("moments are small numbers: kept as they are, windows of trends are in their unit")
            return lambda texts: read(numbers(texts))
        sample = list(dict.fromkeys(texts))[:2000]
        iso = sum(not math.isnan(_iso(text)) for text in sample)
        if iso * 2 > len(sample):
            self.form = "ISO 8601"
            return lambda texts: np.array([_iso(text) for text in texts], dtype=np.float64)
        return self._see_format(sample)

    def _see_format(self, sample: list[str]) -> Callable[[Sequence[str]], np.ndarray]:
        dates = {True: _DAY_FIRST + _YEAR_FIRST, False: _MONTH_FIRST + _YEAR_FIRST}
        fits: list[tuple[int, bool, str]] = []
        for day_first in (True, False) if self.day_first is None else (self.day_first,):
            for pattern in (date + clock for date in dates[day_first] for clock in _CLOCKS):
                fits.append((sum(not math.isnan(_formatted(text, pattern)) for text in sample), day_first, pattern))
        most = max(count for count, _, _ in fits)
        if not most:
            self.form = "seconds, milliseconds, ISO 8601 or a date such as 31/12/2020 23:59"
            return lambda texts: np.full(len(texts), np.nan)
        best = [(day_first, pattern) for count, day_first, pattern in fits if count == most]
        day_first, pattern = best[0]  # day first, where both fit
        self.form = f"dates such as {datetime(2020, 12, 31, 23, 59).strftime(pattern)}"
        note = f"moments are {self.form}"
        if self.day_first is None and "%Y/%m" not in pattern and {True, False} <= {first for first, _ in best}:
            note += "; the day may as well stand second: day_first=False reads them so"
        self.notes.append(note)
        return lambda texts: np.array([_formatted(text, pattern) for text in texts], dtype=np.float64)


def number_moments(values: np.ndarray) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """Unit of most of these numbers (M,), and what turns numbers into seconds, or into NaN where they do not fit."""
    known = values[np.isfinite(values)]
    for form, pattern, first, last in _DATE_NUMBERS:
        if len(known) and np.mean((known >= first) & (known <= last) & (known % 1 == 0)) > 0.5:
            read = _dates(pattern)
            # Milliseconds of 1976 are as long as a date with minutes, and hardly one of them is a date.
            if np.mean(np.isnan(read(known[:2000]))) < 0.5:
                return form, read
    size = np.median(np.abs(known)) if len(known) else 0.0
    unit = next((unit for unit in _UNITS if unit[2] <= size < unit[3]), None)
    if unit is not None:
        name, per_second, low, high = unit
        return name, lambda v: np.where((v >= low) & (v < high), v, np.nan) / per_second
    return "numbers of no known unit", lambda v: np.where(np.isfinite(v), v, np.nan)


def _dates(pattern: str) -> Callable[[np.ndarray], np.ndarray]:
    """Reads dates that are written as numbers."""
    one = np.vectorize(lambda v: _formatted(f"{v:.0f}", pattern), otypes=[np.float64])
    return lambda values: one(np.nan_to_num(values)) if len(values) else values


@lru_cache(maxsize=1 << 16)
def _iso(text: str) -> float:
    """Seconds since 1970 of an ISO moment; without a zone it is UTC."""
    if len(text) > 40:
        return math.nan
    text = text[:-1] + "+00:00" if text.endswith(("Z", "z")) else text.removesuffix(" UTC")
    # Python 3.10 wants 3 or 6 digits of a second.
    text = re.sub(r"\.(\d{1,9})", lambda m: "." + m[1][:6].ljust(6, "0"), text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return math.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


@lru_cache(maxsize=1 << 16)
def _formatted(text: str, pattern: str) -> float:
    if len(text) > 40:
        return math.nan
    try:
        moment = datetime.strptime(text.replace(".", "/").replace("-", "/") if "/" in pattern else text, pattern)
    except ValueError:
        return math.nan
    return moment.replace(tzinfo=timezone.utc).timestamp()


def categories(value: Any) -> tuple[str, ...]:
    """The categories that a field names: "A|B", "A, B", "['A', 'B']", "[{'id': 16, 'name': 'A'}]", "A" or a list."""
    if isinstance(value, str):
        text = value.strip()
        if text.casefold() in NO_CATEGORIES:
            return ()
        if text[:1] in "[{(" and text[-1:] in "]})" and (parsed := _literal(text)) is not None:
            value = parsed
        else:
            text = text.strip("[]") if text.startswith("[") else text
            mark = next((mark for mark in ("|", ";", ",") if mark in text), None)
            value = text.split(mark) if mark else [text]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, set):
        value = sorted(value, key=str)
    names: dict[str, None] = {}
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, dict):
            one = next((one[key] for key in ("name", "title", "label", "id") if key in one), "")
        name = " ".join(str(one).split()).strip("'\" ")
        if name.casefold() not in NO_CATEGORIES:
            names[name[:100]] = None
    return tuple(names)


def _literal(text: str) -> Any:
    """A list written in JSON or in Python, or None."""
    if len(text) > 20000:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(value, (list, tuple, dict, set)):
            return value
    return None


def canonical_id(text: str) -> str:
    """The form in which two writings of a whole number are equal: 1.0, 01 and 1 are "1"; other ids are themselves."""
    match = re.fullmatch(r"0*(\d+?)(?:\.0*)?", text, re.ASCII)
    return match[1] if match else text


def id_order(ids: Iterable[str]) -> list[str]:
    """The ids sorted, whole numbers by size and before all others: an order that the order of rows has no part in."""

    def key(text: str) -> tuple[int, int, str]:
        is_number = text.isascii() and text.isdigit()
        return (0, len(text.lstrip("0")), text.lstrip("0") + " " + text) if is_number else (1, 0, text)

    return sorted(ids, key=key)
