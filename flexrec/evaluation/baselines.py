"""Baselines that rank without the language model, and how they meet a need.

They are fitted on ``RankingDataset.log`` and see what a list knows before its time. Few read words (a query's); what a
need multiplies interest by, novelty or trend, is known of every list and counts for every baseline that estimates
interest, as it does for the critic: :func:`order_for`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from flexrec.data.lists import Catalogue, RankingDataset, RankingList
from flexrec.evaluation.factorisation import ALS, BPR
from flexrec.evaluation.neighbours import ItemKNN, UserKNN
from flexrec.evaluation.sequential import SASRec
from flexrec.evaluation.text import BM25, MiniLM
from flexrec.evaluation.tuning import with_ties
from flexrec.task.needs import Need


class Baseline(Protocol):
    """Scores candidates; the higher, the better. Rank by ``argsort(-scores, kind="stable")``."""

    name: str
    scores_interest: bool  # whether the scores say what a user will like, whatever is asked for

    def scores(self, lst: RankingList) -> np.ndarray:
        """(K,) float64, finite, by candidate."""
        ...


class Random:
    """Every order equally likely; a list gets the same scores every time, whatever was ranked before."""

    name = "random"
    scores_interest = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, lst: RankingList) -> np.ndarray:
        rng = np.random.default_rng([self.seed, *lst.candidates.tolist(), len(lst.history), *lst.history.tolist()])
        return rng.random(len(lst.candidates))


class Popularity:
    """Interactions with a candidate before the list's time."""

    name = "popularity"
    scores_interest = False

    def scores(self, lst: RankingList) -> np.ndarray:
        return lst.popularity.astype(np.float64)


class Trend:
    """How strongly a candidate rises just before the list's time; ties by popularity."""

    name = "trend"
    scores_interest = False

    def scores(self, lst: RankingList) -> np.ndarray:
        return with_ties(lst.trend.astype(np.float64), lst.popularity)


def order_for(need: Need, baseline: Baseline, lst: RankingList, catalogue: Catalogue) -> np.ndarray:
    """(K,) positions of the candidates, best first, as ``baseline`` answers to ``need``.

    Scores of interest are of no common unit. Within the list they are put to [0, 1], the least to 0 and the greatest to
    1, and the need makes gains of them, as of the critic's means: interest x factor. Equal gains are ordered by what
    the need would give to full interest, then by scores. For "interest" that is the order of the scores, as it is for
    baselines that estimate no interest.
    """
    scores = baseline.scores(lst)
    if not baseline.scores_interest or not len(scores):
        return np.argsort(-scores, kind="stable")
    span = scores.max() - scores.min()
    interest = ((scores - scores.min()) / (span if span > 0 else 1.0)).astype(np.float32)
    certain = np.zeros_like(interest)
    gains, _ = need.gains(lst, catalogue, interest, certain)
    at_most, _ = need.gains(lst, catalogue, np.ones_like(interest), certain)
    return np.lexsort((-scores, -at_most, -gains))


# What costs seconds, then what costs minutes.
BASELINES: dict[str, Callable[[RankingDataset], Baseline]] = {
    Random.name: lambda dataset: Random(),
    Popularity.name: lambda dataset: Popularity(),
    Trend.name: lambda dataset: Trend(),
    ItemKNN.name: ItemKNN,
    UserKNN.name: UserKNN,
    ALS.name: ALS,
    BPR.name: BPR,
    SASRec.name: SASRec,
    BM25.name: BM25,
    MiniLM.name: MiniLM,
}
# What a baseline cannot do without; where lists have none of it, its order is that of popularity, or no order.
OF_HISTORY, OF_QUERY = (ItemKNN.name, UserKNN.name, ALS.name, BPR.name, SASRec.name), (BM25.name, MiniLM.name)


def has_what_it_reads(name: str, dataset: RankingDataset) -> bool:
    """Whether the test lists have what the baseline of this name reads.

    Example:
        >>> from flexrec.data import simulate
        >>> from flexrec.evaluation.baselines import has_what_it_reads
        >>> data = simulate(num_users=8, num_items=80, num_topics=4, num_test_users=2, num_candidates=6)
        >>> has_what_it_reads("item-knn", data), has_what_it_reads("bm25", data)
        (True, False)
    """
    if name in OF_HISTORY:
        return any(len(lst.history) > 0 for lst in dataset.test)
    return name not in OF_QUERY or any(lst.query for lst in dataset.test)
