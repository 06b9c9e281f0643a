"""Nearest neighbours among items and among users, on the sparse matrix of the log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import sparse

from flexrec.data.lists import Interactions, RankingDataset, RankingList
from flexrec.evaluation.tuning import best_settings, with_ties

WEIGHTINGS = ("implicit", "interest")


@dataclass(frozen=True)
class KNNSettings:
    """What ``ItemKNN`` and ``UserKNN`` are tuned over.

    Attributes:
        weighting: "implicit", every interaction counts 1, or "interest", it counts its interest.
        neighbours: k, how many of the most similar history items, or users, speak for a candidate.
        shrinkage: h, added to the product of norms: similarities that rest on little are drawn towards 0.
    """

    weighting: str = "implicit"
    neighbours: int = 20
    shrinkage: float = 10.0


class ItemKNN:
    """Item-based nearest neighbours (Sarwar et al. 2001; shrinkage as Ferrari Dacrema et al. 2019).

    With x_i the column of item i in the (users, items) matrix of the log,

        sim(i, j) = <x_i, x_j> / (|x_i| |x_j| + h),    score(c) = sum of the k largest sim(c, j) over j in the history.

    Only the similarities of a list are ever computed, from sparse columns: memory is that of the log.

    A list of a user who is in the log is scored without that user's row: it holds the very feedback that is to be
    predicted, and it is what makes tuning on training lists honest for users who are not in the log. Candidates
    without a neighbour are ordered by popularity, below all others.
    """

    name = "item-knn"
    scores_interest = True

    def __init__(self, dataset: RankingDataset, settings: KNNSettings | None = None) -> None:
        """Fit on ``dataset.log``; ``settings`` None chooses those that are best on ``dataset.train``."""
        self._matrices = {w: interaction_matrix(dataset.log, len(dataset.catalogue), w) for w in WEIGHTINGS}
        if settings is None:
            grid = [
                KNNSettings(*values) for values in product(WEIGHTINGS, (5, 10, 20, 50, 1000), (0.0, 1.0, 5.0, 20.0))
            ]
            settings = best_settings(grid, dataset.train, dataset.unobserved, lambda lst: self._by_settings(lst, grid))
        self.settings = settings or KNNSettings()

    def scores(self, lst: RankingList) -> np.ndarray:
        return next(self._by_settings(lst, [self.settings]))

    def _by_settings(self, lst: RankingList, grid: list[KNNSettings]) -> Iterator[np.ndarray]:
        products = {w: self._products(lst, w) for w in {settings.weighting for settings in grid}}
        for settings in grid:
            yield with_ties(_knn_scores(*products[settings.weighting], settings), lst.popularity)

    def _products(self, lst: RankingList, weighting: str) -> tuple[np.ndarray, np.ndarray]:
        """<x_c, x_j> and |x_c| |x_j|, both (K, H), of candidates c and history items j, without the user's own row."""
        matrix = self._matrices[weighting]  # (items, users)
        of_candidates, of_history = matrix[lst.candidates], matrix[lst.history]  # (K, U), (H, U)
        for rows in (of_candidates, of_history):
            rows.data[rows.indices == lst.user] = 0.0
        return (of_candidates @ of_history.T).toarray(), np.outer(_norms(of_candidates), _norms(of_history))


def _knn_scores(dot: np.ndarray, norms: np.ndarray, settings: KNNSettings) -> np.ndarray:
    """(K,) sums of the k largest similarities per row of ``dot`` and ``norms`` (K, H)."""
    similarity = dot / np.where(norms > 0, norms + settings.shrinkage, 1.0)
    surplus = similarity.shape[1] - settings.neighbours
    if surplus > 0:
        similarity = np.partition(similarity, surplus, axis=1)[:, surplus:]
    return similarity.sum(axis=1)


class UserKNN:
    """User-based nearest neighbours (Resnick et al. 1994; with cosine and shrinkage as Ferrari Dacrema et al. 2019).

    With x_v the row of user v in the (users, items) matrix of the log and h_u the list's history as such a row,

        sim(u, v) = <h_u, x_v> / (|h_u| |x_v| + h),    score(c) = sum of sim(u, v) x_v[c] over the k most similar v.

    A list's own user is nobody's neighbour, for the reasons of :class:`ItemKNN`. Where the interest in an item of the
    history is not known, it counts as the log's mean.
    """

    name = "user-knn"
    scores_interest = True

    def __init__(self, dataset: RankingDataset, settings: KNNSettings | None = None) -> None:
        """Fit on ``dataset.log``; ``settings`` None chooses those that are best on ``dataset.train``."""
        self._by_item = {w: interaction_matrix(dataset.log, len(dataset.catalogue), w) for w in WEIGHTINGS}
        self._by_user = {w: matrix.T.tocsr() for w, matrix in self._by_item.items()}
        self._norms = {w: _norms(matrix) for w, matrix in self._by_user.items()}
        self._mean = mean_interest(dataset.log)
        if settings is None:
            grid = [
                KNNSettings(*values) for values in product(WEIGHTINGS, (5, 20, 50, 100, 300, 1000), (0.0, 5.0, 20.0))
            ]
            settings = best_settings(grid, dataset.train, dataset.unobserved, lambda lst: self._by_settings(lst, grid))
        self.settings = settings or KNNSettings()

    def scores(self, lst: RankingList) -> np.ndarray:
        return next(self._by_settings(lst, [self.settings]))

    def _by_settings(self, lst: RankingList, grid: list[KNNSettings]) -> Iterator[np.ndarray]:
        most = max(settings.neighbours for settings in grid)
        kinds = {(settings.weighting, settings.shrinkage) for settings in grid}
        votes = {kind: self._votes(lst, *kind, most) for kind in kinds}
        for settings in grid:
            nearest = votes[settings.weighting, settings.shrinkage][: settings.neighbours]
            yield with_ties(nearest.sum(axis=0), lst.popularity)

    def _votes(self, lst: RankingList, weighting: str, shrinkage: float, most: int) -> np.ndarray:
        """(V, K): what each of the V nearest users, nearest first, adds to each candidate."""
        items, weights = history_weights(lst, weighting, self._mean)
        dot = self._by_item[weighting][items].T @ weights  # (U,)
        norms = self._norms[weighting] * np.linalg.norm(weights)
        similarity = dot / np.where(norms > 0, norms + shrinkage, 1.0)
        if 0 <= lst.user < len(similarity):
            similarity[lst.user] = 0.0
        nearest = np.argsort(-similarity, kind="stable")[:most]
        nearest = nearest[similarity[nearest] > 0]
        return similarity[nearest, None] * self._by_user[weighting][nearest][:, lst.candidates].toarray()


def interaction_matrix(log: Interactions, num_items: int, weighting: str) -> sparse.csr_matrix:
    """(items, users) float64; 1 or the interest of each logged pair, repeated pairs by their last."""
    num_users = int(log.users.max(initial=-1)) + 1
    pairs = log.items * num_users + log.users
    last = len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1]
    values = np.ones(len(last)) if weighting == "implicit" else log.interest[last].astype(np.float64)
    matrix = sparse.csr_matrix((values, (log.items[last], log.users[last])), shape=(num_items, num_users))
    matrix.eliminate_zeros()
    return matrix


def history_weights(lst: RankingList, weighting: str, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """The different items (H,) of a history and their weights (H,): 1, or their interest, ``mean`` where not known."""
    items, last = np.unique(lst.history[::-1], return_index=True)
    if weighting == "implicit":
        return items, np.ones(len(items))
    if lst.history_interest is None:
        return items, np.full(len(items), mean)
    return items, np.nan_to_num(lst.history_interest[::-1][last].astype(np.float64), nan=mean)


def mean_interest(log: Interactions) -> float:
    return float(log.interest.mean()) if len(log) else 0.0


def _norms(rows: sparse.csr_matrix) -> np.ndarray:
    """(N,) Euclidean norms of the rows."""
    return np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
