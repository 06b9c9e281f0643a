"""Items described in tokens whose rows are summed, so that an item nobody was trained with is not unknown altogether.

A described item is no single vocabulary entry but several, and its row, at the model's input as in its output layer, is
the sum of theirs:

    <item:318>  or, where it has none of its own, <unknown item>
    <topic:Drama> ..        its topics
    <word:redemption> ..    the words of its title that several titles have
    <interest 4>            in a history: how much the user liked it, where that is known
    <rise 3>, <new 1>       among candidates: how strongly it rises, how new its topics are to the history
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from flexrec.data.lists import Catalogue

Token: TypeAlias = "int | tuple[int, ...]"  # a vocabulary entry, or several whose rows are summed

UNKNOWN_ITEM = "<unknown item>"
RISE_LEVELS = np.array([0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], dtype=np.float32)  # a trend from here on is the next
NOVELTY_LEVELS = 5
INTEREST_LEVELS = 4
RISE_MARKS = tuple(f"<rise {level}>" for level in range(1, len(RISE_LEVELS) + 2))  # what does not rise has none
NOVELTY_MARKS = tuple(f"<new {level}>" for level in range(NOVELTY_LEVELS + 1))
INTEREST_MARKS = tuple(f"<interest {level}>" for level in range(1, INTEREST_LEVELS + 1))  # what is not known has none

MIN_TITLES = 2  # a word of fewer titles says nothing of other items
MAX_WORDS = 5000  # the most frequent ones


@dataclass(frozen=True)
class Item:
    """An item as a prompt shows it; one without an id is known by its title and its topics alone.

    Example:
        >>> from flexrec.task import Item
        >>> Item("318", "The Shawshank Redemption", ("Drama",)).title
        'The Shawshank Redemption'
    """

    id: str
    title: str
    topics: tuple[str, ...] = ()


def item_token(item_id: str) -> str:
    """The text of the vocabulary entry that stands for one item under ``encoding="item_token"``.

    Example:
        >>> from flexrec.task import item_token
        >>> item_token("318")
        '<item:318>'
    """
    return f"<item:{item_id}>"


def topic_token(topic: str) -> str:
    return f"<topic:{topic}>"


def word_token(word: str) -> str:
    return f"<word:{word}>"


def title_words(title: str) -> list[str]:
    """The distinct words of a title, in lower case; numbers and years are words."""
    return list(dict.fromkeys(re.findall(r"\w+", title.casefold())))


def shared_words(catalogue: Catalogue) -> list[str]:
    """The words that several titles have, the most frequent first."""
    counts = Counter(word for title in catalogue.titles for word in title_words(title))
    return [word for word, count in counts.most_common(MAX_WORDS) if count >= MIN_TITLES]


def describing_tokens(catalogue: Catalogue) -> list[str]:
    """The texts of all vocabulary entries that describe the items of a catalogue, their own tokens first."""
    return [
        *map(item_token, catalogue.ids),
        *map(topic_token, catalogue.topic_names),
        *map(word_token, shared_words(catalogue)),
        *(UNKNOWN_ITEM, *INTEREST_MARKS, *RISE_MARKS, *NOVELTY_MARKS),
    ]


def token_id(tokenizer: Any, text: str) -> int:
    """The vocabulary entry that is spelled so."""
    found = tokenizer.convert_tokens_to_ids(text)
    if found is None or tokenizer.convert_ids_to_tokens(found) != text:
        raise ValueError(f"the tokenizer has no token {text!r}")
    return int(found)


class Descriptions:
    """Describes items by what a tokenizer has tokens for.

    Raises:
        ValueError: a tokenizer without the tokens that every description may need (:func:`describing_tokens`).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._unknown, *_ = self._ids([UNKNOWN_ITEM])
        self._interest, self._rise, self._novelty = map(self._ids, (INTEREST_MARKS, RISE_MARKS, NOVELTY_MARKS))
        self._described: dict[Item, tuple[int, ...]] = {}

    def _ids(self, texts: Iterable[str]) -> list[int]:
        for text in texts:
            if text not in self._vocabulary:
                raise ValueError(f"the tokenizer has no token {text!r}")
        return [self._vocabulary[text] for text in texts]

    def knows(self, item_id: str) -> bool:
        """Whether an item has a token of its own: whether the model was trained with it."""
        return item_token(item_id) in self._vocabulary

    def of(self, item: Item) -> tuple[int, ...]:
        """What an item is everywhere: its own token, its topics, the words of its title."""
        found = self._described.get(item)
        if found is None:
            texts = [*map(topic_token, item.topics), *map(word_token, title_words(item.title))]
            own = self._vocabulary.get(item_token(item.id), self._unknown)
            found = (own, *(self._vocabulary[text] for text in texts if text in self._vocabulary))
            self._described[item] = found
        return found

    def interests(self, interest: Sequence[float] | np.ndarray) -> list[tuple[int, ...]]:
        """What each item of a history has besides, from the interest (H,) in [0, 1] in it; NaN: not known."""
        values = np.asarray(interest, dtype=np.float32)
        levels = np.minimum(np.nan_to_num(values) * INTEREST_LEVELS, INTEREST_LEVELS - 1).astype(np.int64)
        return [() if np.isnan(x) else (self._interest[n],) for x, n in zip(values, levels.tolist(), strict=True)]

    def marks(self, trend: np.ndarray, novelty: np.ndarray) -> list[tuple[int, ...]]:
        """What each candidate has besides in its list.

        Args:
            trend: (K,) in [0, 1], how strongly each candidate rises.
            novelty: (K,) in [0, 1], how new its topics are to the history (:func:`flexrec.task.needs.novelty`).
        """
        trend, novelty = np.asarray(trend, dtype=np.float32), np.asarray(novelty, dtype=np.float32)
        rise = np.digitize(trend, RISE_LEVELS)
        new = np.ceil(NOVELTY_LEVELS * novelty).astype(np.int64)
        return [
            (*([self._rise[r]] if rises else []), self._novelty[n])
            for r, n, rises in zip(rise, new, trend > 0, strict=True)
        ]
