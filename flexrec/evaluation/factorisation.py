"""Matrix factorisations of the log by the package ``implicit`` (the extra ``baselines``): ALS and BPR.

The users of a list are not in the log, so that only the factors of items are used: a user's own are found from the
list's history, by the criterion that the model was fitted with, the items' factors held fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from flexrec.data.lists import RankingDataset, RankingList
from flexrec.evaluation.neighbours import WEIGHTINGS, history_weights, interaction_matrix, mean_interest
from flexrec.evaluation.tuning import best_on_other_users, unknown_last

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

_NEGATIVES = 50  # that a history is compared with
_NEWTON_STEPS = 6
_ONE_THREAD: dict[str, Any] = {"limits": 1, "user_api": "blas"}


@contextmanager
def _implicit(name: str) -> Iterator[tuple[Any, ThreadpoolController]]:
    """The package, with one thread for BLAS inside, as it asks for: it has threads of its own.

    And what limits the threads later: the products of a single user are small, and several threads wait for one
    another longer than they compute, much longer where a machine does something else as well.
    """
    try:
        import implicit.cpu.als
        import implicit.cpu.bpr
        from threadpoolctl import ThreadpoolController
    except ImportError as error:
        raise ImportError(
            f"the baseline {name!r} needs the package implicit: .venv/bin/pip install -e '.[baselines]', "
            f"or leave it out"
        ) from error
    threads = ThreadpoolController()
    with threads.limit(**_ONE_THREAD):
        yield implicit.cpu, threads


@dataclass(frozen=True)
class ALSSettings:
    """What ``ALS`` is tuned over.

    Attributes:
        weighting: an interaction's confidence is alpha ("implicit"), or alpha times its interest ("interest").
        factors, regularization, alpha: as in the paper.
    """

    weighting: str = "implicit"
    factors: int = 64
    regularization: float = 0.01
    alpha: float = 10.0


class ALS:
    """Factorisation of implicit feedback by alternating least squares (Hu, Koren and Volinsky 2008).

    Every pair is a 1 that counts by its confidence where there was an interaction, else a 0 that counts 1. 15 sweeps.
    Candidates that nobody in the log had come last.
    """

    name = "als"
    scores_interest = True

    def __init__(self, dataset: RankingDataset, settings: ALSSettings | None = None, *, seed: int = 0) -> None:
        """Fit on ``dataset.log``; ``settings`` None chooses those that are best on the lists of training users that a
        first fit was without.

        Raises:
            ImportError: the package is not installed.
        """
        if settings is None:
            grid = [ALSSettings(*values) for values in product(WEIGHTINGS, (16, 64), (0.01, 10.0), (1.0, 10.0, 40.0))]
            settings = best_on_other_users(grid, dataset, lambda part, one: ALS(part, one, seed=seed))
        self.settings = settings or ALSSettings()
        self._mean = mean_interest(dataset.log)
        matrix = interaction_matrix(dataset.log, len(dataset.catalogue), self.settings.weighting)  # (items, users)
        self._known = np.diff(matrix.indptr) > 0  # (items,)
        with _implicit(self.name) as (package, self._threads):
            self._model = package.als.AlternatingLeastSquares(
                factors=self.settings.factors,
                regularization=self.settings.regularization,
                alpha=self.settings.alpha,
                iterations=15,
                random_state=seed,
            )
            self._model.fit(matrix.T.tocsr().astype(np.float32), show_progress=False)

    def scores(self, lst: RankingList) -> np.ndarray:
        items, weights = history_weights(lst, self.settings.weighting, self._mean)
        history = sparse.csr_matrix((weights, (np.zeros(len(items), dtype=int), items)), shape=(1, len(self._known)))
        history.eliminate_zeros()
        with self._threads.limit(**_ONE_THREAD):
            user = self._model.recalculate_user(0, history.astype(np.float32))  # (F,)
        scores = (self._model.item_factors[lst.candidates] @ user).astype(np.float64)
        return unknown_last(scores, self._known[lst.candidates], lst.popularity)


@dataclass(frozen=True)
class BPRSettings:
    """What ``BPR`` is tuned over.

    Attributes:
        liked: whether an interaction is positive only with an interest of at least 1/2; one of a history also where
            its interest is not known.
        factors, regularization: as in the paper.
    """

    liked: bool = False
    factors: int = 64
    regularization: float = 0.01


class BPR:
    """Factorisation by Bayesian personalised ranking (Rendle et al. 2009), 100 passes at a learning rate of 0.05.

    The user x of a list with the positive history H maximises the criterion of the paper with the items q_i (and
    biases b_i) fixed, a concave function of x, by Newton steps:

        sum over i in H of [ mean over j of ln sigmoid(<x, q_i - q_j> + b_i - b_j)  -  regularization |x|^2 / 2 ],

    over 50 items j drawn as in training, by how often the log has them. Candidates that nobody in the log had come
    last.
    """

    name = "bpr"
    scores_interest = True

    def __init__(self, dataset: RankingDataset, settings: BPRSettings | None = None, *, seed: int = 0) -> None:
        """Fit on ``dataset.log``; ``settings`` None: as :class:`ALS`.

        Raises:
            ImportError: the package is not installed.
        """
        if settings is None:
            grid = [BPRSettings(*values) for values in product((False, True), (16, 64), (0.01, 0.05))]
            settings = best_on_other_users(grid, dataset, lambda part, one: BPR(part, one, seed=seed))
        self.settings = settings or BPRSettings()
        self._seed = seed
        log = dataset.log.select(dataset.log.interest >= 0.5) if self.settings.liked else dataset.log
        matrix = interaction_matrix(log, len(dataset.catalogue), "implicit")  # (items, users)
        counts = np.diff(matrix.indptr)
        self._known = counts > 0  # (items,)
        self._drawn_from = np.repeat(np.arange(len(counts)), counts)
        with _implicit(self.name) as (package, self._threads):
            model = package.bpr.BayesianPersonalizedRanking(
                factors=self.settings.factors,
                learning_rate=0.05,
                regularization=self.settings.regularization,
                iterations=100,
                num_threads=1,  # several would make the outcome a matter of luck
                random_state=seed,
            )
            if matrix.nnz:
                model.fit(matrix.T.tocsr().astype(np.float32), show_progress=False)
                factors = model.item_factors.astype(np.float64)  # (items, F + 1), the last of which is the bias
            else:
                factors = np.zeros((len(counts), self.settings.factors + 1))
        self._factors, self._biases = factors[:, :-1], factors[:, -1]

    def scores(self, lst: RankingList) -> np.ndarray:
        with self._threads.limit(**_ONE_THREAD):
            scores = self._factors[lst.candidates] @ self._user(lst) + self._biases[lst.candidates]
        return unknown_last(scores, self._known[lst.candidates], lst.popularity)

    def _user(self, lst: RankingList) -> np.ndarray:
        """(F,) the factors of the list's user."""
        items, interest = history_weights(lst, "interest" if self.settings.liked else "implicit", 1.0)
        positive = items[(interest >= 0.5) & self._known[items]]
        user = np.zeros(self._factors.shape[1])
        if not len(positive):
            return user
        drawn = np.random.default_rng(self._seed).choice(self._drawn_from, _NEGATIVES)
        negative = drawn[~np.isin(drawn, positive)]
        if not len(negative):
            return user
        difference = (self._factors[positive, None] - self._factors[negative]).reshape(-1, len(user))
        margin = (self._biases[positive, None] - self._biases[negative]).ravel()
        pull = self.settings.regularization * len(positive)
        for _ in range(_NEWTON_STEPS):
            wrong = 1.0 / (1.0 + np.exp(difference @ user + margin))
            gradient = wrong @ difference / len(negative) - pull * user
            curvature = (difference.T * (wrong * (1 - wrong))) @ difference / len(negative)
            user = user + np.linalg.solve(curvature + pull * np.eye(len(user)), gradient)
        return user
