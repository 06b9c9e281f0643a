"""Maximal marginal relevance: what a list is ordered by where it should not say the same thing twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexrec.data.lists import RankingList
from flexrec.evaluation.statistics import rank_metrics


class MMR:
    """Maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998): at each rank the candidate with the largest

        trade_off x relevance - (1 - trade_off) x the largest similarity to those above it,

    relevance as a share of the list's largest, similarity the cosine of the items' topics.

    Args:
        topics: (items, C), of the catalogue.
        trade_off: in [0, 1]; 1 ranks by relevance alone. :meth:`tuned` chooses it.

    Example:
        >>> from flexrec.evaluation.mmr import MMR
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
