"""What stands in a request, entry by entry: errors name it, and nothing here knows a model."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Any

KEYS = ("need", "user", "history", "candidates", "query", "top_n")  # of a request


def parse_json(text: bytes) -> Any:
    """What JSON says; a ValueError says why it is none, on one line. Of a key that stands twice nobody knows which
    counts."""

    def no_number(name: str) -> Any:
        raise ValueError(f"no valid JSON: {name} is no number of JSON's")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {shown(twice)} stands more than once in an object")
        return made

    try:
        return json.loads(text.decode("utf-8"), parse_constant=no_number, object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise ValueError(f"no valid UTF-8: byte {text[error.start]:#04x} at {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"no valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("no valid JSON: it is nested too deeply") from error


def misspelt(request: dict[str, Any]) -> list[str]:
    """A warning for every key that means nothing and is nearly one that does; others are the asker's own."""
    found = []
    for key in request:
        if key not in KEYS and (meant := get_close_matches(key, KEYS, n=1, cutoff=0.7)):
            found.append(f"{shown(key)} means nothing in a request and was ignored: {meant[0]!r}?")
    return found


def interest_of(entry: Any, where: str) -> float:
    """How much an item of a history was liked: an id alone was."""
    if not isinstance(entry, dict):
        return 1.0
    if "interest" in entry:
        if "liked" in entry:
            raise ValueError(f"'{where}' says 'liked' and 'interest': give one of the two")
        value = entry["interest"]
        if value is None:
            return float("nan")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"'interest' of '{where}' must lie in [0, 1] or be null, got {shown(value)}")
        return float(value)
    liked = entry.get("liked", True)
    if not isinstance(liked, bool):
        raise ValueError(f"'liked' of '{where}' must be true or false, got {shown(liked)}")
    return float(liked)


def top_n_of(value: Any) -> int | None:
    """How many of the best are asked for; None: all."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"'top_n' must be a positive whole number, got {shown(value)}")
    return value


def check_text(request: Any) -> None:
    """Raise a ValueError where a string anywhere in the request is no text: half of a surrogate pair."""
    waiting = [request]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"half of a surrogate pair is no text, got {shown(value)}")


def id_of(value: Any, where: str) -> str:
    """An id as the catalogue knows it: strings and whole numbers are ids."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"'{where}' must be an id, a string or a whole number, got {shown(value)}")
    return str(value)


def shown(value: Any) -> str:
    """A value for a message: short, on one line, and text."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
