"""Items that training never sees, to measure how a ranker treats what is new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from flexrec.data.lists import RankingDataset, RankingList


def hold_out_items(dataset: RankingDataset, share: float, *, seed: int = 0) -> RankingDataset:
    """The data set with a random share of its items taken out of the log and of all training lists.

    Test lists, and what is written of items (titles, topics, what rises), stay as they are. A training list of which
    fewer than two candidates are left is left out.

    Args:
        share: of the items, in (0, 1).

    Raises:
        ValueError: a share outside of its range, or so large that no training list is left.

    Example:
        >>> from flexrec.data import simulate
        >>> from flexrec.data.cold import hold_out_items, new_items
        >>> data = simulate(num_users=8, num_items=80, num_topics=4, num_test_users=2, num_candidates=6)
        >>> new_items(hold_out_items(data, 0.25)).sum() >= 20
        True
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie strictly between 0 and 1, got {share}")
    held_out = np.zeros(len(dataset.catalogue), dtype=bool)
    held_out[np.random.default_rng(seed).permutation(len(held_out))[: round(share * len(held_out))]] = True
    train = _without(dataset.train, held_out)
    if not train:
        raise ValueError(f"without a share of {share} of the items no training list has two candidates left")
    resample = None if dataset.resample is None else partial(_resampled, dataset.resample, held_out)
    log = dataset.log.select(~held_out[dataset.log.items])
    return replace(dataset, log=log, train=train, resample=resample)


def new_items(dataset: RankingDataset) -> np.ndarray:
    """(items,) bool: which are neither in the log nor in a training list, so that nothing was trained with them."""
    lists = [items for lst in dataset.train for items in (lst.history, lst.candidates)]
    seen = np.zeros(len(dataset.catalogue), dtype=bool)
    seen[np.concatenate([dataset.log.items, *lists])] = True
    return ~seen


def lists_of_new_items(lists: Sequence[RankingList], is_new: np.ndarray) -> list[RankingList]:
    """The lists with their new candidates alone, where there are two at least of which one is known to be better.

    Args:
        is_new: (items,) bool.
    """
    restricted = [lst.reordered(np.flatnonzero(is_new[lst.candidates])) for lst in lists]
    return [lst for lst in restricted if len(lst.candidates) > 1 and np.ptp(np.nan_to_num(lst.known_interest)) > 0]


def _without(lists: Sequence[RankingList], held_out: np.ndarray) -> list[RankingList]:
    kept = []
    for lst in lists:
        shown = ~held_out[lst.history]
        interest = None if lst.history_interest is None else lst.history_interest[shown]
        known = replace(lst, history=lst.history[shown], history_interest=interest)
        kept.append(known.reordered(np.flatnonzero(~held_out[lst.candidates])))
    return [lst for lst in kept if len(lst.candidates) > 1]


def _resampled(resample: Callable[[int], list[RankingList]], held_out: np.ndarray, seed: int) -> list[RankingList]:
    # A module-level function, so that RankingDataset.resample survives pickling into data-loading workers.
    return _without(resample(seed), held_out)
