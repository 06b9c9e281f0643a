"""From feedback of any kind to interest in [0, 1]; what is fitted is fitted on training rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flexrec.checks import check_choice
from flexrec.data.log import Log

GAINS = ("linear", "threshold", "quantile")
MIN_REPEATS = 30

# What an event is worth by its word, lower case. 0: shown, and passed over.
EVENT_VALUES: dict[str, float] = {
    **dict.fromkeys(("impression", "shown", "show", "skip", "dislike", "remove", "remove_from_cart", "refund"), 0.0),
    **dict.fromkeys(("view", "click", "pageview", "page_view", "detail", "open", "visit", "pv", "preview"), 0.3),
    **dict.fromkeys(("addtocart", "add_to_cart", "cart", "wishlist", "fav", "favorite", "favourite", "bookmark"), 0.6),
    **dict.fromkeys(("save", "download", "start", "comment", "add"), 0.6),
    **dict.fromkeys(("purchase", "buy", "transaction", "order", "bought", "checkout", "subscribe", "rent"), 1.0),
    **dict.fromkeys(("play", "watch", "listen", "read", "complete", "finish", "like", "love", "share", "follow"), 1.0),
}
_SCALES = (1.0, 5.0, 10.0, 100.0)
_WATCHED_TWICE = 2.0  # of a watch ratio: KuaiRec's authors count twice the length as a like


@dataclass(frozen=True)
class Gain:
    """How feedback becomes interest.

    Attributes:
        kind: "linear", from 0 at ``low`` to 1 at ``high``; "threshold", 1 from ``threshold`` on; "quantile", the share
            of training feedback that is weaker (that which is equal counts half).
        low, high, threshold: None: by the kind of feedback. Ratings: linear from the middle of the scale to its top,
            threshold three quarters up. Watch ratios: 0 to 2, threshold 1. Amounts: 0 to what a tenth of the training
            rows exceed, threshold their median. Clicks and events are worths in [0, 1], threshold 1/2.
            Interactions without feedback: n of them are worth n / (n + 1), threshold 1.
        codes: ratings that are no ratings: "seen" (an interaction without a rating) or "missing" (none at all).
            None: found out, see ``find_codes``.
        event_values: worths of events in [0, 1], beside and before ``EVENT_VALUES``.
    """

    kind: Literal["linear", "threshold", "quantile"] = "linear"
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    codes: Mapping[float, str] | None = None
    event_values: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_choice("gain", self.kind, GAINS)
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"gain_range must rise, got {self.low} to {self.high}")
        for code, meaning in (self.codes or {}).items():
            check_choice(f"codes[{code}]", meaning, ("seen", "missing"))
        for event, worth in (self.event_values or {}).items():
            if not 0.0 <= worth <= 1.0:
                raise ValueError(f"event_values must lie in [0, 1], got {worth} for {event!r}")


def find_codes(ratings: np.ndarray) -> dict[float, str]:
    """Ratings that by convention are none, from the values that occur.

    -1 among ratings that are not negative (MyAnimeList) and 0 among whole numbers from 1 to more than 5 (Book-Crossing)
    are items seen and not rated; 99 among ratings up to 10 (Jester) is no interaction.
    """
    values = np.unique(ratings[~np.isnan(ratings)])
    codes: dict[float, str] = {}
    if 99.0 in values and len(values) > 1 and np.abs(values[values != 99.0]).max() <= 10:
        codes[99.0] = "missing"
        values = values[values != 99.0]
    if -1.0 in values and np.all(values[values != -1.0] >= 0) and len(values) > 1:
        codes[-1.0] = "seen"
        values = values[values != -1.0]
    others = values[values != 0.0]
    if 0.0 in values and len(others) and np.all(others % 1 == 0) and others.min() >= 1 and 5 < others.max() <= 10:
        codes[0.0] = "seen"
    return codes


def interest_of(
    log: Log, training: np.ndarray, test: np.ndarray, gain: Gain, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Which rows of ``log`` are interactions (M,) bool, the interest (M,) float32, NaN where there is none known, that
    which each row tells by itself (M,) float32, and its noise (:func:`noise_of_repeats`), 0 where that is not known.

    Where a user comes back to an item, a row's interest is what all rows up to it tell: the last rating, the largest
    watch ratio or event, the sum of amounts, the number of interactions.

    Args:
        training: (M,) bool, the rows that scales, codes and quantiles may be found on.
        test: (M,) bool, the rows whose feedback no other row may tell.
    """
    values = log.values.copy()
    kept = np.ones(len(log), dtype=bool)
    if log.feedback == "rating":
        codes = find_codes(values[training]) if gain.codes is None else dict(gain.codes)
        for code, meaning in codes.items():
            at = values == code
            if meaning == "missing":
                kept &= ~at
            values[at] = np.nan
            if at.any():
                what = "no interaction" if meaning == "missing" else "seen, not rated"
                notes.append(f"{np.count_nonzero(at)} ratings are {code:g}: {what}")
    if log.feedback == "event":
        values = _event_worths(log, gain)[values.astype(np.int64)]
    unknown = np.count_nonzero(np.isnan(values) & kept)
    if log.feedback in ("rating", "amount", "watch_ratio") and unknown:
        notes.append(
            f"{unknown} of {np.count_nonzero(kept)} interactions have no {log.feedback}: in histories, never candidates"
        )
    readings = values.copy()
    values[kept], repeats = _so_far(log.select(kept), values[kept], test[kept])
    interest = _scaled(log, values, values[training], gain, notes).astype(np.float32)
    single, noise = interest, 0.0
    if repeats:
        single = _scaled(log, readings, values[training], gain, [])
        if log.feedback in ("rating", "watch_ratio"):
            rows = training & kept
            noise = noise_of_repeats(log.users[rows], log.items[rows], single[rows])
    if log.feedback in ("clicked", "event"):  # what is passed over is so by any gain, where quantiles are above 0
        single = np.where(readings == 0, 0.0, single)
    if repeats:
        how = {"rating": "the last counts", "amount": "they add up", "none": "they are counted"}
        notes.append(f"{repeats} interactions repeat a pair: {how.get(log.feedback, 'the strongest counts')}")
    return kept, interest, single.astype(np.float32), noise


def noise_of_repeats(users: np.ndarray, items: np.ndarray, interest: np.ndarray) -> float:
    """How much the interest (M,) that one and the same user shows in one and the same item varies about its mean.

    The pooled variance within pairs that are read more than once, as of an analysis of variance; NaN is no reading. 0,
    which says that it is not known, where fewer than ``MIN_REPEATS`` readings repeat one.

    Example:
        >>> from flexrec.data.interest import noise_of_repeats
        >>> users, items = np.repeat(np.arange(50), 2), np.zeros(100, dtype=np.int64)  # each was asked twice
        >>> noise_of_repeats(users, items, np.tile([0.4, 0.6], 50))  # (0.1^2 + 0.1^2) / (2 - 1)
        0.02
    """
    known = ~np.isnan(interest)
    pairs = users[known].astype(np.int64) * (int(items.max(initial=0)) + 1) + items[known]
    _, member, count = np.unique(pairs, return_inverse=True, return_counts=True)
    repeated = len(pairs) - len(count)
    if repeated < MIN_REPEATS:
        return 0.0
    values = interest[known].astype(np.float64)
    about = values - (np.bincount(member, values) / count)[member]
    return round(float(np.square(about).sum()) / repeated, 6)


def _event_worths(log: Log, gain: Gain) -> np.ndarray:
    worths = {**EVENT_VALUES, **{k.casefold(): v for k, v in (gain.event_values or {}).items()}}
    if unknown := [event for event in log.events if event not in worths]:
        raise ValueError(
            f"events of no known worth: {', '.join(map(repr, unknown[:10]))}; say what they are worth between 0 and 1, "
            f"as in event_values={{{unknown[0]!r}: 0.5}}, or which events to read, as in events=[{log.events[0]!r}]"
        )
    return np.array([worths[event] for event in log.events])


def _so_far(log: Log, values: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, int]:
    """What all rows of the pair up to each row tell, and how many rows repeat a pair; test rows are pairs apart."""
    if not len(log):
        return values, 0
    pairs = (log.users.astype(np.int64) * (int(log.items.max()) + 1) + log.items) * 2 + test
    rows = np.arange(len(log))
    order = np.lexsort((rows, pairs) if log.times is None else (rows, log.times, pairs))
    starts = np.r_[True, np.diff(pairs[order]) != 0]
    repeats = len(log) - int(np.count_nonzero(starts))
    if not repeats:
        return values, 0
    group = np.cumsum(starts) - 1
    first = np.flatnonzero(starts)[group]  # of each row's pair
    ordered = values[order]
    if log.feedback == "rating":  # the last that is known
        latest = np.where(np.isnan(ordered), -1, np.arange(len(ordered)))
        latest = np.maximum.accumulate(latest)
        so_far = np.where(latest >= first, ordered[latest], np.nan)
    else:
        known = np.cumsum(~np.isnan(ordered))
        known -= (known - ~np.isnan(ordered))[first]
        filled = np.nan_to_num(ordered)
        if log.feedback in ("amount", "none"):
            sums = np.cumsum(filled)
            so_far = sums - (sums - filled)[first]
        else:  # a running maximum that begins anew with each pair: offsets rise from pair to pair, of ranks to be exact
            sizes, rank = np.unique(filled, return_inverse=True)
            so_far = sizes[np.maximum.accumulate(rank + group * len(sizes)) - group * len(sizes)]
        so_far[known == 0] = np.nan
    result = np.empty_like(values)
    result[order] = so_far
    return result, repeats


def _scaled(log: Log, values: np.ndarray, fitted_on: np.ndarray, gain: Gain, notes: list[str]) -> np.ndarray:
    known = fitted_on[~np.isnan(fitted_on)]
    if not len(known):
        raise ValueError(f"no training interaction has a {log.feedback}: nothing can be learnt from them")
    if gain.kind == "quantile":
        ordered = np.sort(known)
        weaker, up_to = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
        return np.where(np.isnan(values), np.nan, (weaker + up_to) / (2.0 * len(ordered)))
    low, high, threshold = _defaults(log, known)
    if gain.kind == "threshold":
        threshold = threshold if gain.threshold is None else gain.threshold
        notes.append(f"{_named(log)}: interest is 1 from {threshold:g} on, else 0")
        return np.where(np.isnan(values), np.nan, values >= threshold)
    if log.feedback == "none" and gain.low is None and gain.high is None:
        return values / (values + 1.0)
    low, high = (low if gain.low is None else gain.low), (high if gain.high is None else gain.high)
    if not low < high:
        raise ValueError(f"gain_range must rise, got {low:g} to {high:g}: give both ends")
    if log.feedback not in ("clicked", "event"):
        notes.append(f"{_named(log)}: interest is 0 up to {low:g}, 1 from {high:g} on, and linear between")
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def _named(log: Log) -> str:
    return {"watch_ratio": "watch ratio", "none": "number of interactions"}.get(log.feedback, log.feedback)


def _defaults(log: Log, known: np.ndarray) -> tuple[float, float, float]:
    """low, high and threshold by the kind of feedback."""
    if log.feedback == "rating":
        largest = float(np.abs(known).max())
        high = next((top for top in _SCALES if largest <= top), largest)
        if known.min() < 0:
            low = 0.0
        else:
            low = (high + (0.0 if high in (1.0, 100.0) else 1.0)) / 2
        return low, high, low + (high - low) / 2
    if log.feedback == "watch_ratio":
        return 0.0, _WATCHED_TWICE, 1.0
    if log.feedback == "amount":
        positive = known[known > 0]
        if not len(positive):
            return 0.0, 1.0, 1.0
        return 0.0, float(f"{np.quantile(positive, 0.9):.3g}"), float(f"{np.median(positive):.3g}")
    return 0.0, 1.0, (1.0 if log.feedback == "none" else 0.5)
