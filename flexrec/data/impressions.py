"""Lists as they were shown: the items of one impression, of which some were chosen and the others passed over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from flexrec.data.build import draw_lists, moment_after, moments, unsupported_needs
from flexrec.data.lists import Catalogue, Interactions, RankingDataset, RankingList
from flexrec.data.options import ListOptions


class Shown(NamedTuple):
    """Impressions of items, row by row; rows of one group were shown together to one user."""

    rows: Interactions  # sorted by time
    groups: np.ndarray  # (M,) int64
    # (M,) float32, the interest that a row tells by itself, 0 where the item was passed over: what is passed over was
    # not chosen, however often it was before.
    told: np.ndarray

    def select(self, mask: np.ndarray) -> Shown:
        return Shown(self.rows.select(mask), self.groups[mask], self.told[mask])


@dataclass(frozen=True)
class ImpressionLists:
    """Draws lists from impressions; what was chosen before is the history, see ``RankingList``.

    A list has all items of one impression, in an order drawn anew; of more than ``num_candidates`` the chosen ones and
    a random choice of the others. An impression without a chosen or without another item gives none.

    Attributes:
        log: what training users chose, sorted by time: for popularity and trend.
        num_items: number of items in the catalogue.
        trend_window: see ``build.moments``.
        options: ``min_history`` and ``history_length``, the least and the most items of a history, and others.
    """

    log: Interactions
    num_items: int
    trend_window: float
    options: ListOptions

    def lists(
        self,
        shown: Shown,
        *,
        lists_per_user: int,
        seed: int,
        not_before: float = -math.inf,
        max_lists: int | None = None,
    ) -> list[RankingList]:
        """Lists of the impressions in ``shown``, at most ``lists_per_user`` of each user and ``max_lists`` in all."""
        rows, options = shown.rows, self.options
        chosen = rows.select(shown.told > 0)
        order = np.lexsort((chosen.times, chosen.users))
        before = chosen.select(order)  # sorted by user
        users = np.unique(before.users)
        starts = dict(zip(users.tolist(), np.searchsorted(before.users, users).tolist(), strict=True))
        ends = dict(zip(users.tolist(), np.searchsorted(before.users, users, side="right").tolist(), strict=True))
        by_user: dict[int, list[tuple[float, int, np.ndarray]]] = {}
        by_group = np.argsort(shown.groups, kind="stable")
        bounds = np.flatnonzero(np.r_[True, np.diff(shown.groups[by_group]) != 0, True])
        for start, end in pairwise(bounds):
            members = by_group[start:end]
            worth = shown.told[members]
            time, user = float(rows.times[members[0]]), int(rows.users[members[0]])
            if shown.groups[members[0]] < 0 or time < not_before or not np.count_nonzero(worth > 0) > 0:
                continue
            past = np.unique(_past(before, starts[user], ends[user], time).items)
            if len(past) >= options.min_history and len(np.unique(rows.items[members])) > np.count_nonzero(worth > 0):
                by_user.setdefault(user, []).append((time, int(shown.groups[members[0]]), members))
        cuts = []
        for user, own in sorted(by_user.items()):
            own.sort(key=lambda one: one[:2])
            rng = np.random.default_rng((seed, user))
            kept = rng.choice(len(own), size=min(lists_per_user, len(own)), replace=False)
            # A list is known by its place among its user's, on which other users have no influence.
            cuts += [(user, own[i][0], i, own[i][2]) for i in sorted(kept.tolist())]
        if max_lists is not None and len(cuts) > max_lists:
            kept = np.random.default_rng(seed).choice(len(cuts), size=max_lists, replace=False)
            cuts = [cuts[i] for i in np.sort(kept)]
        drawn: list[RankingList | None] = [None] * len(cuts)
        times = np.array([cut[1] for cut in cuts])
        window, smoothing = self.trend_window, options.trend_smoothing
        for i, moment in moments(self.log, self.num_items, times, trend_window=window, trend_smoothing=smoothing):
            user, time, place, members = cuts[i]
            rng = np.random.default_rng((seed, user, place))
            items, interest = _strongest(rows.items[members], shown.told[members])
            passed = rng.permutation(np.flatnonzero(interest == 0))
            taken = np.concatenate([np.flatnonzero(interest > 0)[: options.num_candidates - 1], passed])
            order = rng.permutation(taken[: options.num_candidates])
            candidates = items[order]
            known = _past(before, starts[user], ends[user], time)
            history = known.select(_latest(known.items, options.history_length))
            drawn[i] = RankingList(
                user=user,
                time=time,
                history=history.items,
                history_interest=history.interest.astype(np.float32),
                candidates=candidates,
                interest=interest[order].astype(np.float32),
                popularity=moment.popularity[candidates].astype(np.float32),
                trend=moment.trend[candidates],
                rises=moment.rises(candidates),
            )
        return [one for one in drawn if one is not None]


def _past(before: Interactions, start: int, end: int, time: float) -> Interactions:
    return before.select(np.arange(start, start + int(np.searchsorted(before.times[start:end], time, side="left"))))


def _latest(items: np.ndarray, count: int) -> np.ndarray:
    """Where the last ``count`` distinct items stand, each at its latest."""
    _, back = np.unique(items[::-1], return_index=True)
    return len(items) - 1 - np.sort(back)[:count][::-1]


def _strongest(items: np.ndarray, interest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distinct, inverse = np.unique(items, return_inverse=True)
    strongest = np.zeros(len(distinct), dtype=np.float32)
    np.maximum.at(strongest, inverse, interest)
    return distinct, strongest


def build_from_impressions(
    name: str,
    catalogue: Catalogue,
    shown: Shown,
    options: ListOptions,
    *,
    trend_window: float,
    test_rows: np.ndarray,
    time_boundary: float | None,
) -> RankingDataset:
    """Training and test lists from impressions; ``build_dataset`` says what the arguments and options mean.

    Args:
        time_boundary: training lies before it and testing at or after it.
    """
    rows, chosen = shown.rows, shown.told > 0
    background = rows.select(~test_rows & chosen)
    training = ~test_rows if time_boundary is None else ~test_rows & (rows.times < time_boundary)
    log = rows.select(training & chosen)
    builder = partial(ImpressionLists, num_items=len(catalogue), trend_window=trend_window, options=options)
    of_training, most = shown.select(training), options.max_train_lists
    resample = partial(draw_lists, builder(log), of_training, lists_per_user=options.lists_per_user, max_lists=most)
    of_test_users = np.isin(rows.users, np.unique(rows.users[test_rows]))
    tested = shown.select(of_test_users)
    # Rows of a test user that are not test rows are history, and no list.
    tested = tested._replace(groups=np.where(test_rows[of_test_users], tested.groups, -1))
    test = builder(background).lists(
        tested,
        lists_per_user=options.test_lists_per_user,
        seed=options.seed,
        not_before=-math.inf if time_boundary is None else time_boundary,
        max_lists=options.max_test_lists,
    )
    train = resample(options.seed)
    for role, lists, mask in (("train on", train, training), ("test on", test, test_rows)):
        if not lists:
            groups, with_choice = np.unique(shown.groups[mask]), np.unique(shown.groups[mask & chosen])
            raise ValueError(
                f"no list to {role} in {name}: of {len(groups)} impressions {len(with_choice)} have a chosen item, and "
                f"none of them also an item passed over and a user with min_history={options.min_history} items chosen "
                f"before; choose a smaller min_history, or other negatives than those of the impressions"
            )
    last = moment_after(log, len(catalogue), trend_window=trend_window, trend_smoothing=options.trend_smoothing)
    return RankingDataset(
        name=name,
        catalogue=catalogue,
        log=log,
        train=train,
        test=test,
        unobserved="zero",
        resample=resample,
        trend=last.trend,
        rises=last.rises(np.arange(len(catalogue))),
        time_boundary=time_boundary,
        unsupported=unsupported_needs(catalogue, last.trend),
    )
