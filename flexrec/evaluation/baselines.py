"""Baselines that rank without a language model: random, popularity, trend, and neighbours by item similarity.

They are fitted on ``RankingDataset.log`` and see what a list knows before its time; none of them reads needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np

from flexrec.data.lists import Interactions, RankingDataset, RankingList
from flexrec.evaluation.statistics import rank_metrics

_TUNING_LISTS = 1000
_TUNING_METRIC = "ndcg@10"
_TIE = 1e-9  # weight of what breaks ties: below the resolution of a float32 score


class Baseline(Protocol):
    """Scores candidates; the higher, the better. Rank by ``argsort(-scores, kind="stable")``."""

    name: str

    def scores(self, lst: RankingList) -> np.ndarray:
        """(K,) float64, finite, by candidate."""
        ...


class Random:
    """Every order equally likely; a list gets the same scores every time, whatever was ranked before."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, lst: RankingList) -> np.ndarray:
        rng = np.random.default_rng([self.seed, *lst.candidates.tolist(), len(lst.history), *lst.history.tolist()])
        return rng.random(len(lst.candidates))


class Popularity:
    """Interactions with a candidate before the list's time."""

    name = "popularity"

    def scores(self, lst: RankingList) -> np.ndarray:
        return lst.popularity.astype(np.float64)


class Trend:
    """How strongly a candidate rises just before the list's time; ties by popularity."""

    name = "trend"

    def scores(self, lst: RankingList) -> np.ndarray:
        return lst.trend + _TIE * _below_one(lst.popularity)


@dataclass(frozen=True)
class KNNSettings:
    """What ``ItemKNN`` is tuned over.

    Attributes:
        weighting: "implicit", every interaction counts 1, or "interest", it counts its interest.
        neighbours: k, how many of the most similar history items speak for a candidate.
        shrinkage: h, added to the product of norms: similarities that rest on few users are drawn towards 0.
    """

    weighting: str = "implicit"
    neighbours: int = 20
    shrinkage: float = 10.0


class ItemKNN:
    """Item-based nearest neighbours (Sarwar et al. 2001; shrinkage as Ferrari Dacrema et al. 2019).

    With x_i the column of item i in the (users, items) matrix of the log,

        sim(i, j) = <x_i, x_j> / (|x_i| |x_j| + h),    score(c) = sum of the k largest sim(c, j) over j in the history.

    A list of a user who is in the log is scored without that user's row: it holds the very feedback that is to be
    predicted, and it is what makes tuning on training lists honest for users who are not in the log. Candidates
    without a neighbour are ordered by popularity, below all others.
    """

    name = "item-knn"

    def __init__(self, dataset: RankingDataset, settings: KNNSettings | None = None) -> None:
        """Fit on ``dataset.log``; ``settings`` None tunes them on ``dataset.train`` (see ``tune``)."""
        self._matrices = {
            weighting: _interaction_matrix(dataset.log, len(dataset.catalogue), weighting)
            for weighting in ("implicit", "interest")
        }
        self.settings = KNNSettings() if settings is None else settings
        if settings is None:
            self.settings = self.tune(dataset)

    def scores(self, lst: RankingList) -> np.ndarray:
        dot, norms = self._products(lst, self.settings.weighting)
        return _knn_scores(dot, norms, self.settings) + _TIE * _below_one(lst.popularity)

    def tune(self, dataset: RankingDataset, *, seed: int = 0) -> KNNSettings:
        """The settings of a small grid with the best mean NDCG@10 of interest on (at most 1000) training lists.

        Candidates without feedback count as 0 where they are sampled negatives, and are left out where feedback is
        missing. Test lists are not looked at.
        """
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(len(dataset.train))[:_TUNING_LISTS]
        grid = [
            KNNSettings(*values)
            for values in product(("implicit", "interest"), (5, 10, 20, 50, 1000), (0.0, 1.0, 5.0, 20.0))
        ]
        gains: dict[KNNSettings, list[np.ndarray]] = {settings: [] for settings in grid}
        for lst in (dataset.train[i] for i in chosen):
            kept = np.ones(len(lst.candidates), dtype=bool)
            if dataset.unobserved == "critic":
                kept = ~np.isnan(lst.interest)
            interest = np.nan_to_num(lst.interest)[kept]
            if not (interest > 0).any():
                continue
            products = {weighting: self._products(lst, weighting) for weighting in self._matrices}
            ties = _TIE * _below_one(lst.popularity)
            for settings in grid:
                scores = _knn_scores(*products[settings.weighting], settings) + ties
                gains[settings].append(interest[np.argsort(-scores[kept], kind="stable")])
        if not gains[grid[0]]:
            return self.settings
        return max(grid, key=lambda s: rank_metrics(gains[s], (_TUNING_METRIC,))[_TUNING_METRIC].mean())

    def _products(self, lst: RankingList, weighting: str) -> tuple[np.ndarray, np.ndarray]:
        """<x_c, x_j> and |x_c| |x_j|, both (K, H), of candidates c and history items j, without the user's own row."""
        matrix = self._matrices[weighting]  # (items, users)
        of_candidates, of_history = matrix[lst.candidates], matrix[lst.history]  # (K, U), (H, U)
        if 0 <= lst.user < matrix.shape[1]:
            of_candidates[:, lst.user] = 0.0
            of_history[:, lst.user] = 0.0
        norms = np.outer(np.linalg.norm(of_candidates, axis=1), np.linalg.norm(of_history, axis=1))
        return of_candidates @ of_history.T, norms


class MMR:
    """Maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998): at each rank the candidate with the largest

        trade_off x relevance - (1 - trade_off) x the largest similarity to those above it,

    relevance as a share of the list's largest, similarity the cosine of the items' topics.

    Args:
        topics: (items, C), of the catalogue.
        trade_off: in [0, 1]; 1 ranks by relevance alone. :meth:`tuned` chooses it.

    Example:
        >>> from flexrec.evaluation.baselines import MMR
        >>> topics = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # the first two items are of one topic
        >>> MMR(topics, 0.7).order(np.arange(3), np.array([1.0, 0.9, 0.8]))
        array([0, 2, 1])
    """

    name = "mmr"
    TRADE_OFFS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0)

    def __init__(self, topics: np.ndarray, trade_off: float) -> None:
        norms = np.linalg.norm(topics, axis=1, keepdims=True)
        self._directions = topics / np.where(norms > 0, norms, 1.0)
        self.trade_off = trade_off

    def order(self, candidates: np.ndarray, relevance: np.ndarray) -> np.ndarray:
        """(K,) int64: the order of candidates (K,), items, of a relevance (K,) >= 0."""
        directions = self._directions[candidates]  # (K, C)
        similarity = directions @ directions.T  # (K, K)
        relevance = self.trade_off * relevance / max(float(relevance.max(initial=0.0)), 1e-12)
        nearest, left, order = np.zeros(len(candidates)), np.ones(len(candidates), dtype=bool), []
        for _ in candidates:
            worth = np.where(left, relevance - (1.0 - self.trade_off) * nearest, -np.inf)
            chosen = int(worth.argmax())
            order.append(chosen)
            left[chosen] = False
            nearest = np.maximum(nearest, similarity[chosen])
        return np.array(order, dtype=np.int64)

    @classmethod
    def tuned(
        cls,
        topics: np.ndarray,
        lists: Sequence[RankingList],
        relevances: Sequence[np.ndarray],
        gains: Sequence[np.ndarray],
        metric: str,
    ) -> MMR:
        """With the trade-off that has the best mean of a metric of topics on lists with gains (K,), of which the
        ranking knows relevances (K,)."""

        def quality(trade_off: float) -> float:
            mmr = cls(topics, trade_off)
            orders = [mmr.order(lst.candidates, r) for lst, r in zip(lists, relevances, strict=True)]
            about = np.zeros((len(lists), max(map(len, gains)), topics.shape[1]))
            for n, (lst, order) in enumerate(zip(lists, orders, strict=True)):
                about[n, : len(order)] = topics[lst.candidates[order]]
            ranked = [of_list[order] for of_list, order in zip(gains, orders, strict=True)]
            return float(rank_metrics(ranked, (metric,), topics=about)[metric].mean())

        return cls(topics, max(cls.TRADE_OFFS, key=quality))


def _knn_scores(dot: np.ndarray, norms: np.ndarray, settings: KNNSettings) -> np.ndarray:
    """(K,) sums of the k largest similarities per row of ``dot`` and ``norms`` (K, H)."""
    similarity = dot / np.where(norms > 0, norms + settings.shrinkage, 1.0)
    surplus = similarity.shape[1] - settings.neighbours
    if surplus > 0:
        similarity = np.partition(similarity, surplus, axis=1)[:, surplus:]
    return similarity.sum(axis=1, dtype=np.float64)


def _interaction_matrix(log: Interactions, num_items: int, weighting: str) -> np.ndarray:
    """(items, users) float32; 1 or the interest of each logged pair, repeated pairs by their last."""
    matrix = np.zeros((num_items, int(log.users.max(initial=-1)) + 1), dtype=np.float32)
    matrix[log.items, log.users] = 1.0 if weighting == "implicit" else log.interest
    return matrix


def _below_one(popularity: np.ndarray) -> np.ndarray:
    """(K,) float64 in [0, 1), in the order of ``popularity``."""
    popularity = popularity.astype(np.float64)
    return popularity / (1.0 + popularity.max(initial=0.0))


BASELINES: dict[str, Callable[[RankingDataset], Baseline]] = {
    Random.name: lambda dataset: Random(),
    Popularity.name: lambda dataset: Popularity(),
    Trend.name: lambda dataset: Trend(),
    ItemKNN.name: ItemKNN,
}
