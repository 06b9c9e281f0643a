"""The data model of the ranking task: a catalogue, a log of interactions, and the lists to be ranked.

Items and users are integers inside the package; the catalogue knows their public ids. Every array of a list is
aligned with its candidates ("by candidate"), not with any ranking.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

WITHOUT_QUERIES = "its lists have no queries"


@dataclass(frozen=True)
class Catalogue:
    """The items that exist: public id, title and topics (genres, categories) of each.

    Attributes:
        columns: what else is known of the items, by name, in the order of ``ids``: (items,) float64 for numbers (NaN
            where there is none), else (items,) object, str.

    Example:
        >>> from flexrec.data import Catalogue
        >>> topics = (("horror",), ("romance", "comedy"))
        >>> catalogue = Catalogue(ids=("a", "b"), titles=("Alien", "Amelie"), topics=topics)
        >>> catalogue.index["b"], catalogue.topic_names
        (1, ('comedy', 'horror', 'romance'))
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...]
    topics: tuple[tuple[str, ...], ...]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.titles) == len(self.topics):
            raise ValueError(
                f"ids, titles and topics must have the same length, got "
                f"{len(self.ids)}, {len(self.titles)} and {len(self.topics)}"
            )
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("ids must be unique")
        for name, values in self.columns.items():
            if len(values) != len(self.ids):
                raise ValueError(f"column {name!r} must have one value per item, {len(self.ids)}, got {len(values)}")

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, items: np.ndarray) -> Catalogue:
        """The catalogue of these items (N,), in this order."""
        chosen = items.tolist()
        return Catalogue(
            tuple(self.ids[i] for i in chosen),
            tuple(self.titles[i] for i in chosen),
            tuple(self.topics[i] for i in chosen),
            {name: values[items] for name, values in self.columns.items()},
        )

    @cached_property
    def index(self) -> dict[str, int]:
        """Item index by public id."""
        return {item_id: i for i, item_id in enumerate(self.ids)}

    @cached_property
    def topic_names(self) -> tuple[str, ...]:
        """All topics, sorted."""
        return tuple(sorted({topic for topics in self.topics for topic in topics}))

    @cached_property
    def topic_matrix(self) -> np.ndarray:
        """(items, topics) float32; 1 where the item has the topic."""
        column = {topic: j for j, topic in enumerate(self.topic_names)}
        matrix = np.zeros((len(self), len(self.topic_names)), dtype=np.float32)
        for i, topics in enumerate(self.topics):
            for topic in topics:
                matrix[i, column[topic]] = 1.0
        return matrix


@dataclass(frozen=True)
class Interactions:
    """A log of feedback, sorted by time.

    Where a user comes back to an item, each row holds the interest as all rows up to it tell it.

    Example:
        >>> from flexrec.data import Interactions
        >>> users, items, times = np.array([7, 7, 8]), np.array([0, 1, 0]), np.array([1.0, 2.0, 3.0])
        >>> log = Interactions(users, items, np.array([1.0, 0.5, 0.0], dtype=np.float32), times)
        >>> len(log.select(log.users == 7))
        2
    """

    users: np.ndarray  # (M,) int64
    items: np.ndarray  # (M,) int64
    interest: np.ndarray  # (M,) float32 in [0, 1]
    times: np.ndarray  # (M,) float

    def __len__(self) -> int:
        return len(self.users)

    def select(self, rows: np.ndarray) -> Interactions:
        """The interactions at ``rows`` (a boolean mask, or indices in increasing order)."""
        return Interactions(self.users[rows], self.items[rows], self.interest[rows], self.times[rows])


@dataclass(frozen=True)
class RankingList:
    """One list to rank: a user at a moment, what is known of them then, and K candidates.

    Everything but ``interest`` and ``truth`` was known before ``time``.

    Example:
        >>> from flexrec.data import simulate
        >>> lst = simulate(num_users=4, num_items=80, num_topics=4, num_test_users=1, num_candidates=6).test[0]
        >>> bool(lst.reordered(np.arange(6)[::-1]).candidates[0] == lst.candidates[-1])
        True
    """

    user: int
    time: float
    history: np.ndarray  # (H,) int64 items, oldest first, all from before `time`
    candidates: np.ndarray  # (K,) int64 items
    interest: np.ndarray  # (K,) float32 in [0, 1], the logged feedback; NaN where there is none
    popularity: np.ndarray  # (K,) float32, interactions with the candidate before `time`
    trend: np.ndarray  # (K,) float32 in [0, 1], how strongly the candidate rises just before `time`
    history_interest: np.ndarray | None = (
        None  # (H,) float32 in [0, 1], feedback on the history; NaN where none is known
    )
    truth: np.ndarray | None = None  # (K,) float32 in [0, 1], the noise-free interest where it is known; scoring only
    rises: np.ndarray | None = None  # (K, 2) int64, interactions in the last window before `time` and in the one before
    query: str = ""  # what the user searches for, in words; empty where nothing is searched

    @property
    def history_liked(self) -> np.ndarray:
        """(H,) bool: the items of the history that are known to have been liked (an interest of at least 1/2)."""
        if self.history_interest is None:
            return np.zeros(len(self.history), dtype=bool)
        return self.history_interest >= 0.5  # NaN is not

    @property
    def known_interest(self) -> np.ndarray:
        """(K,) float32: the noise-free interest where it is known, else the logged feedback."""
        return self.interest if self.truth is None else self.truth

    def reordered(self, order: np.ndarray) -> RankingList:
        """The same list with its candidates in another order: ``order`` (K,) holds their present positions."""
        by_candidate = ("candidates", "interest", "popularity", "trend")
        known = [name for name in ("truth", "rises") if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name)[order] for name in (*by_candidate, *known)})


@dataclass(frozen=True)
class RankingDataset:
    """Lists of users to train on and of other users to test on.

    Attributes:
        log: interactions of training users only: all that anything may be fitted on.
        unobserved: what a candidate without feedback is worth in training: "zero" where it is a sampled negative,
            "critic" where feedback is missing because it was not collected.
        resample: draws the training lists anew (other cuts, other negatives) from a seed, with the same parameters as
            ``train``; None where the lists are given by the data.
        trend: (items,) float32 in [0, 1], how strongly each item rises at the end of ``log``, for requests that come
            after it; None where that is not known.
        rises: (items, 2) int64, the same in numbers: interactions in the last window of ``log`` and in the one before.
        noise: variance of a logged interest around the true one where that is known or was estimated from repeats; 0
            takes what was logged for the truth.
        time_boundary: with a split in time, the moment before which everything in ``log`` and ``train`` lies and at or
            after which every test list lies; None otherwise.
        unsupported: names of needs that these data cannot answer, each with the reason; see ``unanswerable``.
        user_ids: public ids of the users, by their number; None where the numbers are the ids.
        notes: what the loader found worth saying, such as skipped rows, in sentences.

    Example:
        >>> from flexrec.data import simulate
        >>> data = simulate(num_users=4, num_items=80, num_topics=4, num_test_users=1, num_candidates=6)
        >>> {lst.user for lst in data.test} & set(data.log.users.tolist())  # nobody is trained and tested on
        set()
    """

    name: str
    catalogue: Catalogue
    log: Interactions
    train: list[RankingList]
    test: list[RankingList]
    unobserved: Literal["zero", "critic"]
    resample: Callable[[int], list[RankingList]] | None = None
    trend: np.ndarray | None = None
    rises: np.ndarray | None = None
    time_boundary: float | None = None
    noise: float = 0.0
    unsupported: Mapping[str, str] = field(default_factory=dict)
    user_ids: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def unanswerable(self) -> Mapping[str, str]:
        """Needs that these data cannot answer, each with the reason: those that are ``unsupported``, and the search
        where no list has a query."""
        without = {} if any(lst.query for lst in (*self.train, *self.test)) else {"search": WITHOUT_QUERIES}
        return {**without, **self.unsupported}

    def user_id(self, user: int) -> str:
        """The public id of a user."""
        return str(user) if self.user_ids is None else self.user_ids[user]

    def check_needs(self, names: Iterable[str]) -> None:
        """Raise a ValueError naming the first of these needs that the data cannot answer, and why."""
        for name in names:
            if name in self.unanswerable:
                raise ValueError(f"the {self.name} data cannot answer the need {name!r}: {self.unanswerable[name]}")

    def fingerprint(self) -> str:
        """What tells this data set from others: a checksum of its catalogue, its log and its lists."""
        digest = hashlib.sha256()
        catalogue, log = self.catalogue, self.log
        described = (self.name, self.unobserved, self.noise, catalogue.ids, catalogue.titles, catalogue.topics)
        digest.update(repr(described).encode("utf-8", "backslashreplace"))
        for values in (log.users, log.items, log.interest, log.times):
            digest.update(np.ascontiguousarray(values).tobytes())
        for part in (self.train, self.test):
            digest.update(str(len(part)).encode())
            for lst in part:
                digest.update(repr((lst.user, float(lst.time), lst.query)).encode("utf-8", "backslashreplace"))
                for array in (lst.history, lst.candidates, lst.interest, lst.popularity, lst.trend):
                    digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
