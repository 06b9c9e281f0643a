"""Items described in tokens whose rows are summed, so that an item nobody was trained with is not unknown altogether.

A described item is no single vocabulary entry but several, and its row, at the model's input as in its output layer, is
the sum of theirs:

    <item:318>  or, where it has none of its own, <unknown item>
    <topic:Drama> ..        its topics
    <word:redemption> ..    the words of its title that several titles have
    <interest 4>            in a history: how much the user liked it, where that is known
    <rise 3>, <new 1>       among candidates: how strongly it rises, how new its topics are to the history
    <match 2>               among candidates of a search: how many of the query's words its title has

The words of a query are written in the same tokens of words.
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
OFFER_LEVELS = 12
INTEREST_MARKS = tuple(f"<interest {level}>" for level in range(1, INTEREST_LEVELS + 1))  # what is not known has none

MATCH_LEVELS = 5
MATCH_MARKS = tuple(f"<match {level}>" for level in range(MATCH_LEVELS + 1))  # where there are queries

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
    shown: str | None = None  # what prompts in words say of it; None: its title


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


def known_words(catalogue: Catalogue, queries: Sequence[str] = ()) -> list[str]:
    """The words that have tokens: those of several titles, then others of training queries."""
    of_queries = Counter(word for query in queries for word in title_words(query))
    of_both = [*shared_words(catalogue), *(word for word, _ in of_queries.most_common(MAX_WORDS))]
    return list(dict.fromkeys(of_both))


def query_match(query: str, titles: Sequence[str]) -> np.ndarray | None:
    """(K,) float32 in [0, 1]: which share of the query's words stand in each title; None where nothing is searched."""
    words = set(title_words(query))
    if not words:
        return None
    return np.array([len(words.intersection(title_words(title))) for title in titles], dtype=np.float32) / len(words)


def offer_marks(need: str) -> list[str]:
    """The marks of a need of one's own, from nothing to the list's best."""
    return [f"<need:{need} {level}>" for level in range(OFFER_LEVELS + 1)]


def describing_tokens(catalogue: Catalogue, queries: Sequence[str] = (), needs: Iterable[str] = ()) -> list[str]:
    """The texts of all vocabulary entries that describe the items of a catalogue, their own tokens first.

    Args:
        queries: of the training lists, whose words have tokens, too.
        needs: names of those by what is offered to which candidates are described.
    """
    return [
        *map(item_token, catalogue.ids),
        *map(topic_token, catalogue.topic_names),
        *map(word_token, known_words(catalogue, queries)),
        *(UNKNOWN_ITEM, *INTEREST_MARKS, *RISE_MARKS, *NOVELTY_MARKS),
        *(MATCH_MARKS if queries else ()),
        *(mark for need in needs for mark in offer_marks(need)),
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

    def __init__(self, tokenizer: Any, needs: Iterable[str] = ()) -> None:
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._unknown, *_ = self._ids([UNKNOWN_ITEM])
        self._interest, self._rise, self._novelty = map(self._ids, (INTEREST_MARKS, RISE_MARKS, NOVELTY_MARKS))
        self._match = self._ids(MATCH_MARKS) if MATCH_MARKS[0] in self._vocabulary else []
        self._offers = [self._ids(offer_marks(need)) for need in needs]
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

    def word(self, word: str) -> int | None:
        """The token of a word; None where it has none."""
        return self._vocabulary.get(word_token(word))

    def interests(self, interest: Sequence[float] | np.ndarray) -> list[tuple[int, ...]]:
        """What each item of a history has besides, from the interest (H,) in [0, 1] in it; NaN: not known."""
        values = np.asarray(interest, dtype=np.float32)
        levels = np.minimum(np.nan_to_num(values) * INTEREST_LEVELS, INTEREST_LEVELS - 1).astype(np.int64)
        return [() if np.isnan(x) else (self._interest[n],) for x, n in zip(values, levels.tolist(), strict=True)]

    def marks(
        self,
        trend: np.ndarray,
        novelty: np.ndarray,
        match: np.ndarray | None = None,
        offers: Sequence[np.ndarray] = (),
    ) -> list[tuple[int, ...]]:
        """What each candidate has besides in its list.

        Args:
            trend: (K,) in [0, 1], how strongly each candidate rises.
            novelty: (K,) in [0, 1], how new its topics are to the history (:func:`flexrec.task.needs.novelty`).
            match: (K,) in [0, 1], how well it matches the query (:func:`query_match`); None where there is none.
            offers: of each need that candidates are described by, (K,) >= 0, what a candidate is worth to it.
        """
        trend, novelty = np.asarray(trend, dtype=np.float32), np.asarray(novelty, dtype=np.float32)
        rise = np.digitize(trend, RISE_LEVELS)
        new = np.ceil(NOVELTY_LEVELS * novelty).astype(np.int64)
        marks = [
            (*([self._rise[r]] if rises else []), self._novelty[n])
            for r, n, rises in zip(rise, new, trend > 0, strict=True)
        ]
        if match is not None and self._match:
            levels = np.ceil(MATCH_LEVELS * match - 1e-6).astype(np.int64)
            marks = [(*of_item, self._match[level]) for of_item, level in zip(marks, levels, strict=True)]
        for ids, offer in zip(self._offers, offers, strict=True):
            marks = [(*of_item, ids[level]) for of_item, level in zip(marks, offer_levels(offer), strict=True)]
        return marks


def offer_levels(offer: np.ndarray) -> np.ndarray:
    """(K,) int64: of what candidates are worth (K,) >= 0, the level beside the list's best, which is OFFER_LEVELS: one
    less for every factor of the square root of 2, 1 for everything small, 0 for nothing.

    A ranking depends on the ratios of gains alone, so that levels of ratios say all that matters.
    """
    offer = np.asarray(offer, dtype=np.float64)
    ratio = offer / max(offer.max(initial=0.0), 1e-30)
    steps = np.floor(-2 * np.log2(np.maximum(ratio, 1e-30)) + 1e-6).astype(np.int64)
    return np.where(offer > 0, np.maximum(1, OFFER_LEVELS - steps), 0)
