"""From a log of interactions to lists to rank, without a look at test users or at the future.

A list is a *cut* in one user's sequence of events: what lies before the cut is the history, the next events are the
candidates with feedback, and popular items that the user never touched fill the list up. Popularity, trend and the
order in which negatives are taken are functions of what the users of ``log`` did strictly before the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from flexrec.checks import check_choice
from flexrec.data.lists import WITHOUT_QUERIES, Catalogue, Interactions, RankingDataset, RankingList
from flexrec.data.thinning import Thinning


class Moment(NamedTuple):
    """What the log says about every item strictly before one moment."""

    counts: np.ndarray  # (3, items) int64, interactions before t, t - w and t - 2w; reused, copy what you keep
    trend: np.ndarray  # (items,) float32 in [0, 1]

    @property
    def popularity(self) -> np.ndarray:
        """(items,) int64, interactions so far."""
        return self.counts[0]

    def rises(self, items: np.ndarray) -> np.ndarray:
        """(K, 2) int64: interactions with each of ``items`` in the last window and in the one before it."""
        of_items = self.counts[:, items]
        return (of_items[:2] - of_items[1:]).T


def moments(
    log: Interactions,
    num_items: int,
    times: np.ndarray,
    *,
    trend_window: float,
    trend_smoothing: float = 5.0,
) -> Iterator[tuple[int, Moment]]:
    """Yield (index into ``times``, the log's ``Moment`` then) for every time, in order of time.

    With a and b the item's interactions in the last window [t - w, t) and in the one before it, [t - 2w, t - w), and
    A and B those of all items, b A / B is what the item would have had if its share had not moved, and

        trend = max(0, a - b A / B) / (a + s)

    is the part of its recent interactions that its past does not explain, drawn towards 0 by s pseudo-counts where
    there are few. Shares, not counts, are compared, so that a busier month does not make every item rise. Where the
    earlier window is empty nothing can be compared and every trend is 0.

    The three counts slide over the sorted log: O(interactions) in all, and O(items) per moment.

    Args:
        log: interactions sorted by time.
        num_items: number of items in the catalogue.
        times: (L,) moments in any order.
        trend_window: w, in the unit of the log's times.
        trend_smoothing: s.
    """
    if np.any(np.diff(log.times) < 0):
        raise ValueError("log must be sorted by time")
    if not trend_window > 0:
        raise ValueError(f"trend_window must be positive, got {trend_window}")
    if not trend_smoothing > 0:
        raise ValueError(f"trend_smoothing must be positive, got {trend_smoothing}")
    # Interactions before t, before t - w and before t - 2w: their differences are the two windows.
    counts = np.zeros((3, num_items), dtype=np.int64)
    seen = [0, 0, 0]
    for index in np.argsort(times, kind="stable"):
        for lag in range(3):
            # side="left": an interaction at the very moment of the cut is not yet known.
            end = int(np.searchsorted(log.times, times[index] - lag * trend_window, side="left"))
            np.add.at(counts[lag], log.items[seen[lag] : end], 1)
            seen[lag] = end
        trend = np.zeros(num_items, dtype=np.float32)
        in_recent, in_previous = seen[0] - seen[1], seen[1] - seen[2]
        if in_recent and in_previous:
            touched = np.flatnonzero(counts[0] > counts[1])
            recent = counts[0, touched] - counts[1, touched]
            expected = (counts[1, touched] - counts[2, touched]) * (in_recent / in_previous)
            trend[touched] = np.maximum(recent - expected, 0.0) / (recent + trend_smoothing)
        yield int(index), Moment(counts, trend)


def moment_after(log: Interactions, num_items: int, *, trend_window: float, trend_smoothing: float = 5.0) -> Moment:
    """The moment just after the log's last interaction; see ``moments``."""
    end = np.nextafter(log.times[-1:], np.inf)
    for _, moment in moments(log, num_items, end, trend_window=trend_window, trend_smoothing=trend_smoothing):
        return moment
    return Moment(np.zeros((3, num_items), np.int64), np.zeros(num_items, dtype=np.float32))  # of an empty log


@dataclass(frozen=True)
class ListBuilder:
    """Draws lists from users' sequences of events.

    A cut at position p of a user's events (in order of time, ties by item) gives the list

    - history: the up to ``history_length`` events before p;
    - candidates with feedback: the ``num_positives`` events from p on, whatever their feedback was;
    - candidates without: items that the user has no event with, drawn without replacement with probability
      proportional to their popularity in ``log`` before the cut, or equal for all that are in it (``negatives``);
      their interest is NaN;
    - shuffled, so that a candidate's place says nothing.

    Where a user has several events with an item, it is a candidate once, at the first, with what the last of them
    tells as its interest, and stands in the history once, at the latest before the cut, with what was known then.
    Items whose interest is NaN (seen, but not rated) are in histories and never among the candidates.
    Cuts lie only where time moves on (t[p-1] < t[p]), so that all of the history is strictly older than the list's
    ``time`` t[p]: the order inside a burst of equal time stamps is unknown and never turned into past and future.

    Each list has its own random stream, seeded by (seed, user, position): it does not depend on which other lists are
    drawn. Random order first, exclusion after: the user's own later events decide which items are withheld from the
    negatives (they would be false negatives; the usual practice in evaluation by sampled candidates), and nothing
    else of a list but its labels depends on what happens at or after its time.

    Attributes:
        log: interactions of training users, sorted by time, for popularity, trend and negatives.
        num_items: number of items in the catalogue.
        num_candidates: K, candidates of a list.
        num_positives: of these, how many are the user's next events.
        history_length: the most items that a history shows.
        min_history: the least number of events before a cut.
        trend_window, trend_smoothing: see ``moments``.
        negatives: "popularity" or "uniform".
        thinning: which feedback was collected; the interest of all other is NaN in the lists, and their ``truth``.

    Example:
        >>> from flexrec.data import Interactions, ListBuilder
        >>> rng = np.random.default_rng(0)
        >>> users = np.tile(np.arange(30), 25)
        >>> items = np.stack([rng.permutation(40)[:25] for _ in range(30)]).T.ravel()
        >>> log = Interactions(users, items, rng.random(750).astype(np.float32), np.repeat(np.arange(25.0), 30))
        >>> builder = ListBuilder(log, 40, trend_window=5.0, num_candidates=8, num_positives=3)
        >>> lists = builder.lists(log, lists_per_user=1, seed=0)
        >>> len(lists), lists[0].candidates.shape
        (30, (8,))
    """

    log: Interactions
    num_items: int
    trend_window: float
    trend_smoothing: float = 5.0
    num_candidates: int = 30
    num_positives: int = 10
    history_length: int = 20
    min_history: int = 10
    negatives: str = "popularity"
    thinning: Thinning | None = None

    def __post_init__(self) -> None:
        check_choice("negatives", self.negatives, ("popularity", "uniform"))
        for name in ("num_items", "num_candidates", "num_positives", "history_length", "min_history"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_positives > self.num_candidates:
            raise ValueError(
                f"num_positives must not exceed num_candidates, got {self.num_positives} and {self.num_candidates}"
            )

    def lists(
        self,
        events: Interactions,
        *,
        lists_per_user: int,
        seed: int,
        not_before: float = -math.inf,
        max_lists: int | None = None,
        candidate_rows: np.ndarray | None = None,
    ) -> list[RankingList]:
        """Lists at random cuts of every user in ``events``, ordered by user and time.

        Args:
            events: interactions to cut, sorted by time; of training users, or of others.
            lists_per_user: at most how many lists a user gives; fewer where their candidates would mostly overlap.
            seed: which cuts, negatives and orders.
            not_before: no list lies before this time.
            max_lists: of more cuts than this, a random choice of this many is kept.
            candidate_rows: (M,) bool, the rows of ``events`` that may be candidates; the others are history. None: all.

        A user with fewer than ``min_history + num_positives`` events gives no list, nor does a cut before which the
        log knows too few items to fill the list.
        """
        cuts = []  # (time, user, position, the user's events)
        for user, rows in _rows_by_user(events):
            own = _UserEvents.of(events, rows, None if candidate_rows is None else candidate_rows[rows])
            rng = np.random.default_rng((seed, user))
            for position in self._cut_positions(own, lists_per_user, not_before, rng):
                cuts.append((own.times[own.targets[position]], user, position, own))
        if max_lists is not None and len(cuts) > max_lists:
            kept = np.random.default_rng(seed).choice(len(cuts), size=max_lists, replace=False)
            cuts = [cuts[i] for i in np.sort(kept)]
        drawn: list[RankingList | None] = [None] * len(cuts)
        for i, moment in moments(
            self.log,
            self.num_items,
            np.array([cut[0] for cut in cuts]),
            trend_window=self.trend_window,
            trend_smoothing=self.trend_smoothing,
        ):
            time, user, position, own = cuts[i]
            rng = np.random.default_rng((seed, user, position))
            drawn[i] = self._list(user, float(time), position, own, moment, rng)
        return [one for one in drawn if one is not None]

    def _cut_positions(
        self, own: _UserEvents, lists_per_user: int, not_before: float, rng: np.random.Generator
    ) -> list[int]:
        """Positions in ``own.targets`` of the first candidate after each cut."""
        times = own.times[own.targets]
        positions = np.arange(0, len(times) - self.num_positives + 1)
        positions = positions[np.searchsorted(own.times[own.first], times[positions]) >= self.min_history]
        moved = (positions == 0) | (times[positions - 1] < times[positions])
        positions = positions[moved & (times[positions] >= not_before)]
        count = min(lists_per_user, math.ceil(len(positions) / self.num_positives))
        return sorted(rng.choice(positions, size=count, replace=False).tolist())

    def _list(
        self, user: int, time: float, position: int, own: _UserEvents, moment: Moment, rng: np.random.Generator
    ) -> RankingList | None:
        num_negatives = self.num_candidates - self.num_positives
        # Exponential races: the item whose Exp(popularity) clock rings first is drawn with probability proportional
        # to its popularity, and the order of ringing is that of drawing without replacement.
        known = np.flatnonzero(moment.popularity)
        clock = rng.exponential(size=len(known))
        if self.negatives == "popularity":
            clock /= moment.popularity[known]
        untouched = np.ones(self.num_items, dtype=bool)
        untouched[own.items] = False
        clock, pool = clock[untouched[known]], known[untouched[known]]
        if len(pool) < num_negatives:
            return None
        first = np.argpartition(clock, num_negatives - 1)[:num_negatives] if num_negatives else np.zeros(0, np.int64)
        negatives = pool[first[np.argsort(clock[first])]]
        observed = slice(position, position + self.num_positives)
        order = rng.permutation(self.num_candidates)
        candidates = np.concatenate([own.items[own.targets[observed]], negatives])[order]
        feedback = np.concatenate([own.labels[observed], np.full(num_negatives, np.nan, dtype=np.float32)])[order]
        shown = own.latest_before(time, self.history_length)
        drawn = RankingList(
            user=user,
            time=time,
            history=own.items[shown].copy(),
            history_interest=own.interest[shown].astype(np.float32),
            candidates=candidates,
            interest=feedback.astype(np.float32),
            popularity=moment.popularity[candidates].astype(np.float32),
            trend=moment.trend[candidates],
            rises=moment.rises(candidates),
        )
        return drawn if self.thinning is None else self.thinning.withhold(drawn)


@dataclass(frozen=True)
class _UserEvents:
    """One user's events in order of time, ties by item."""

    items: np.ndarray  # (n,)
    times: np.ndarray  # (n,)
    interest: np.ndarray  # (n,), as known after each event
    first: np.ndarray  # rows at which an item occurs for the first time
    targets: np.ndarray  # those of them that may be candidates
    labels: np.ndarray  # (targets,) the interest that the item's last event tells

    @classmethod
    def of(cls, events: Interactions, rows: np.ndarray, allowed: np.ndarray | None) -> _UserEvents:
        items, interest = events.items[rows], events.interest[rows]
        distinct, first, inverse = np.unique(items, return_index=True, return_inverse=True)
        last = np.zeros(len(distinct), dtype=np.int64)
        last[inverse] = np.arange(len(items))
        labels = interest[last[inverse]]
        first = np.sort(first)
        targets = first[~np.isnan(labels[first])]
        if allowed is not None:
            targets = targets[allowed[targets]]
        return cls(items, events.times[rows], interest, first, targets, labels[targets])

    def latest_before(self, time: float, count: int) -> np.ndarray:
        """Rows of the last ``count`` distinct items strictly before ``time``, each at its latest, oldest first."""
        end = int(np.searchsorted(self.times, time, side="left"))
        _, back = np.unique(self.items[:end][::-1], return_index=True)
        return end - 1 - np.sort(back)[:count][::-1]


def _rows_by_user(events: Interactions) -> Iterator[tuple[int, np.ndarray]]:
    """(user, rows of ``events`` in order of time, ties by item) for every user, in order of user."""
    order = np.lexsort((events.items, events.times, events.users))
    users, starts = np.unique(events.users[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    for user, start, end in zip(users.tolist(), starts, ends, strict=True):
        yield user, order[start:end]


def build_dataset(
    name: str,
    catalogue: Catalogue,
    events: Interactions,
    *,
    trend_window: float | None,
    trend_smoothing: float = 5.0,
    split: Literal["user", "time"] = "user",
    test_rows: np.ndarray | None = None,
    test_fraction: float = 0.2,
    num_test_users: int | None = None,
    time_quantile: float = 0.8,
    time_boundary: float | None = None,
    num_candidates: int = 30,
    num_positives: int = 10,
    history_length: int = 20,
    min_history: int = 10,
    lists_per_user: int = 32,
    test_lists_per_user: int = 10,
    max_train_lists: int | None = None,
    max_test_lists: int | None = None,
    negatives: Literal["popularity", "uniform"] = "popularity",
    thinning: Thinning | None = None,
    seed: int = 0,
) -> RankingDataset:
    """Training and test lists of disjoint users from one log of feedback; see ``ListBuilder`` for a list.

    The users to test on are drawn from the set of users alone, so that nothing they did moves the split. Candidates
    without feedback are sampled negatives (``unobserved="zero"``) unless ``thinning`` withholds feedback ("critic").

    Args:
        name: of the data set.
        catalogue: the items that ``events.items`` points into.
        events: everybody's interactions, sorted by time; NaN interest where an item was seen and not rated.
        trend_window: see ``moments``; None where the times order each user's events and mean nothing else.
        split: "user": test users are never trained on, but training users' events from after a test list's time may
            be. "time": in addition one boundary is drawn, the ``time_quantile`` quantile of the training users' event
            times; ``log`` and ``train`` hold only what lies before it, and test lists lie at or after it.
        test_rows: (M,) bool, a split given by the data: the rows of ``events`` to test on, which nothing else sees.
            A test list then has test rows as candidates, and all of its user's earlier rows as history.
        test_fraction: share of the users to test on, unless ``num_test_users`` says how many.
        time_boundary: the boundary itself, instead of a quantile.
        lists_per_user, test_lists_per_user, max_train_lists, max_test_lists: see ``ListBuilder.lists``.
        negatives, thinning: see ``ListBuilder``.
        seed: of the split and of all lists.

    Popularity, trend and negatives of a list, training or test, come from training users' events before the list's
    time, with ``split="time"`` also those after the boundary: a recommender knows what is popular today, although
    nothing was fitted on it.

    Example:
        >>> from flexrec.data import Catalogue, Interactions, build_dataset
        >>> rng = np.random.default_rng(0)
        >>> users = np.tile(np.arange(30), 25)
        >>> items = np.stack([rng.permutation(40)[:25] for _ in range(30)]).T.ravel()
        >>> log = Interactions(users, items, rng.random(750).astype(np.float32), np.repeat(np.arange(25.0), 30))
        >>> names = tuple(f"book {i}" for i in range(40))
        >>> catalogue = Catalogue(names, names, (("prose",),) * 40)
        >>> data = build_dataset("books", catalogue, log, trend_window=5.0, num_candidates=8, num_positives=3)
        >>> len({lst.user for lst in data.test})  # a fifth of the users
        6
    """
    check_choice("split", split, ("user", "time"))
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if not 0.0 < time_quantile < 1.0:
        raise ValueError(f"time_quantile must lie strictly between 0 and 1, got {time_quantile}")
    given = test_rows is not None
    if test_rows is None:
        test_rows = choose_test_users(events.users, test_fraction, num_test_users, seed)[events.users]
    of_test_users = np.isin(events.users, np.unique(events.users[test_rows]))
    background, boundary = events.select(~test_rows), None
    if not 0 < len(background) < len(events):
        raise ValueError(f"{len(background)} of {len(events)} interactions are to train on; some must be, and not all")
    if thinning is not None:
        collected = background.select(thinning.keeps(background.users, background.items))
    else:
        collected = background
    log, cut = collected, background
    if split == "time":
        quantile = float(np.quantile(background.times, time_quantile, method="higher"))
        boundary = quantile if time_boundary is None else time_boundary
        log, cut = (some.select(some.times < boundary) for some in (collected, background))
    elif given and trend_window is not None and background.times[-1] < events.times[test_rows].min():
        boundary = float(events.times[test_rows].min())
    builder = ListBuilder(
        collected,
        len(catalogue),
        # Times drawn from [0, 1) have no window before the last 2: no item rises.
        trend_window=2.0 if trend_window is None else trend_window,
        trend_smoothing=trend_smoothing,
        num_candidates=num_candidates,
        num_positives=num_positives,
        history_length=history_length,
        min_history=min_history,
        negatives=negatives,
        thinning=thinning,
    )
    # A training list is older than the boundary, so that the log alone gives it the same popularity and trend.
    resample = partial(
        draw_lists, replace(builder, log=log), cut, lists_per_user=lists_per_user, max_lists=max_train_lists
    )
    test = builder.lists(
        events.select(of_test_users),
        lists_per_user=test_lists_per_user,
        seed=seed,
        not_before=boundary if split == "time" and boundary is not None else -math.inf,
        max_lists=max_test_lists,
        candidate_rows=test_rows[of_test_users],
    )
    train = resample(seed)
    for role, lists, candidates in (("train on", train, cut), ("test on", test, events.select(of_test_users))):
        if not lists:
            raise ValueError(
                f"no list to {role} in {name}: no user has {min_history} events, then {num_positives} more at later "
                f"times, and {num_candidates - num_positives} items popular before them to fill the list; choose "
                f"smaller min_history, num_positives or num_candidates, or more users. "
                + why_few_lists(candidates, min_history, num_positives)
                + (f" Test lists lie at or after {boundary:.0f}." if role == "test on" and split == "time" else "")
            )
    trend = rises = None
    if trend_window is not None:
        last = moment_after(log, len(catalogue), trend_window=trend_window, trend_smoothing=trend_smoothing)
        trend, rises = last.trend, last.rises(np.arange(len(catalogue)))
    return RankingDataset(
        name=name,
        catalogue=catalogue,
        log=log.select(~np.isnan(log.interest)),
        train=train,
        test=test,
        unobserved="zero" if thinning is None else "critic",
        resample=resample,
        trend=trend,
        rises=rises,
        time_boundary=boundary,
        unsupported=unsupported_needs(catalogue, trend),
    )


def unsupported_needs(catalogue: Catalogue, trend: np.ndarray | None) -> dict[str, str]:
    reasons = {"search": WITHOUT_QUERIES}
    if trend is None:
        reasons["trend"] = "its interactions have no times, so that nothing can be seen to rise"
    if not any(catalogue.topics):
        reasons["explore"] = "its items have no categories, so that none is new to a history"
        reasons["diverse"] = "its items have no categories, of which a list could have many"
    return reasons


def why_few_lists(events: Interactions, min_history: int, num_positives: int) -> str:
    """In numbers, how many users have enough events for a list, and what would let more of them have one."""
    if not len(events):
        return "There are no interactions."
    pairs = np.unique(np.stack([events.users, events.items]), axis=1)
    sizes = np.unique(pairs[0], return_counts=True)[1]
    needed = min_history + num_positives
    median, most = np.quantile(sizes, (0.5, 0.9)).astype(int)
    enough = np.count_nonzero(sizes >= needed)
    text = (
        f"Of {len(sizes)} users {enough} have the {needed} items that min_history={min_history} and "
        f"num_positives={num_positives} take; half of the users have {median} or more, a tenth {most} or more."
    )
    times = np.unique(np.stack([events.users.astype(np.float64), events.times]), axis=1)
    moments_of = np.unique(times[0], return_counts=True)[1]
    if still := np.count_nonzero(moments_of == 1):
        text += f" {still} users have all their events at one moment, where nothing is past and nothing to come."
    for fewer in ((min_history + 1) // 2, (num_positives + 1) // 2), (1, 1):
        if sum(fewer) < needed and (would := np.count_nonzero(sizes >= sum(fewer))) > enough:
            text += f" With min_history={fewer[0]} and num_positives={fewer[1]} it would be {would}."
    return text


def draw_lists(
    builder: Any, events: Any, seed: int, *, lists_per_user: int, max_lists: int | None
) -> list[RankingList]:
    """Lists of a ``ListBuilder``, or of an ``ImpressionLists``, and the events that it draws them from."""
    # A module-level function, so that RankingDataset.resample survives pickling into data-loading workers.
    return builder.lists(events, lists_per_user=lists_per_user, max_lists=max_lists, seed=seed)


def choose_test_users(users: np.ndarray, fraction: float, count: int | None, seed: int) -> np.ndarray:
    """(largest user + 1,) bool: who is tested on, drawn from the set of ``users`` (any shape, repeated or not)."""
    users = np.unique(users)
    if count is None:
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"test_fraction must lie strictly between 0 and 1, got {fraction}")
        count = max(1, round(fraction * len(users)))
    if not 0 < count < len(users):
        raise ValueError(
            f"at least one user must remain to train on and one to test on: got {count} test users of {len(users)}"
        )
    is_test = np.zeros(int(users.max()) + 1, dtype=bool)
    is_test[np.random.default_rng(seed).permutation(users)[:count]] = True
    return is_test
