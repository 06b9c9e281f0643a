"""What baselines with settings share: which training lists choose them, ties, and items that nobody had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from flexrec.data.lists import RankingDataset, RankingList
from flexrec.evaluation.statistics import rank_metrics
from flexrec.policy.distributed import process_index
from flexrec.profiling import progress

_TUNING_LISTS = 1000
_TUNING_USERS = 10_000  # that a model is fitted on to choose its settings
_HELD_OUT = 0.2  # of the users
_TUNING_METRIC = "ndcg@10"
_TIE = 1e-9  # weight of what breaks ties: below the resolution of a float32 score

Settings = TypeVar("Settings")


class _Scores(Protocol):
    def scores(self, lst: RankingList) -> np.ndarray: ...


def best_settings(
    grid: Sequence[Settings],
    lists: Sequence[RankingList],
    unobserved: str,
    scores: Callable[[RankingList], Iterable[np.ndarray]],
) -> Settings | None:
    """The settings with the best mean NDCG@10 of interest on (at most 1000 of) the lists; None if they say nothing.

    Candidates without feedback count as 0 where they are sampled negatives, and are left out where feedback is missing.

    Args:
        scores: of a list, its scores (K,) by each settings of the grid, in its order.
        unobserved: as ``RankingDataset.unobserved``.
    """
    chosen = np.random.default_rng(0).permutation(len(lists))[:_TUNING_LISTS]
    gains: list[list[np.ndarray]] = [[] for _ in grid]
    for lst in (lists[i] for i in chosen):
        kept = np.ones(len(lst.candidates), dtype=bool)
        if unobserved == "critic":
            kept = ~np.isnan(lst.interest)
        interest = np.nan_to_num(lst.interest)[kept]
        if not (interest > 0).any():
            continue
        for of_settings, by_settings in zip(gains, scores(lst), strict=True):
            of_settings.append(interest[np.argsort(-by_settings[kept], kind="stable")])
    if not gains[0]:
        return None
    values = [rank_metrics(of_settings, (_TUNING_METRIC,))[_TUNING_METRIC].mean() for of_settings in gains]
    return grid[int(np.argmax(values))]


def best_on_other_users(
    grid: Sequence[Settings], dataset: RankingDataset, fit: Callable[[RankingDataset, Settings], _Scores]
) -> Settings | None:
    """``best_settings`` of models that are fitted without a fifth of the training users, on the lists of that fifth.

    A model that has read the very feedback of a list, or whose items have, would be chosen for what it remembers.
    """
    users = np.random.default_rng(0).permutation(np.unique(dataset.log.users))
    held_out, kept = np.split(users, [max(1, round(_HELD_OUT * len(users)))])
    kept = kept[:_TUNING_USERS]
    lists = [lst for lst in dataset.train if lst.user in set(held_out.tolist())]
    if not len(kept) or not lists:
        return None
    part = replace(dataset, log=dataset.log.select(np.isin(dataset.log.users, kept)))
    shown = process_index() == 0
    models = [
        fit(part, settings) for settings in progress("Choosing settings", grid, unit="model", shown=shown, kept=False)
    ]
    return best_settings(grid, lists, dataset.unobserved, lambda lst: [model.scores(lst) for model in models])


def with_ties(scores: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """(K,) float64 ``scores``, equal ones in the order of ``popularity``."""
    return scores + _TIE * below_one(popularity)


def unknown_last(scores: np.ndarray, known: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """``with_ties``, and just below all others the candidates that are not ``known`` (K,): nothing speaks for them."""
    floor = scores[known].min(initial=0.0 if not known.any() else np.inf)
    return np.where(known, with_ties(scores, popularity), floor - _TIE * (2.0 - below_one(popularity)))


def below_one(popularity: np.ndarray) -> np.ndarray:
    """(K,) float64 in [0, 1), in the order of ``popularity``."""
    popularity = popularity.astype(np.float64)
    return popularity / (1.0 + popularity.max(initial=0.0))
