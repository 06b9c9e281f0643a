"""Withholding a random share of the feedback, by pairs of a user and an item, whatever else is in the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flexrec.data.lists import RankingList


@dataclass(frozen=True)
class Thinning:
    """Which feedback counts as collected: a random share of the pairs of a user and an item, drawn from the seed.

    Whether a pair is kept depends on the pair and the seed alone.
    """

    share: float
    seed: int

    def keeps(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """(M,) bool for pairs of ``users`` and ``items``, both (M,)."""
        return uniform_hash(self.seed, users, items) < self.share

    def withhold(self, lst: RankingList) -> RankingList:
        """The list with the interest of pairs that are not kept as NaN, and all of it as ``truth``."""
        kept, kept_before = (self.keeps(np.full_like(i, lst.user), i) for i in (lst.candidates, lst.history))
        before = (
            None if lst.history_interest is None else np.where(kept_before, lst.history_interest, np.float32("nan"))
        )
        interest = np.where(kept, lst.interest, np.float32("nan"))
        return replace(lst, interest=interest, truth=np.nan_to_num(lst.interest), history_interest=before)


def uniform_hash(seed: int, *keys: np.ndarray) -> np.ndarray:
    """(M,) float64 in [0, 1): pseudo-random numbers that depend on the seed and each row of the integer keys alone."""
    mixed = np.full(len(keys[0]), np.uint64(seed & 0xFFFFFFFFFFFFFFFF))
    for key in keys:  # the finaliser of splitmix64 (Steele et al. 2014) after each key
        mixed = (mixed ^ key.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
