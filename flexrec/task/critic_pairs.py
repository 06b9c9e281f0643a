"""Pairs of a user and an item, with what is known of the user: what the models of a critic read.

A user is known by interactions alone, never by number: those of the log, of known interest, and those of a history, of
which the interest may be unknown. What is said of a pair is never evidence about that pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from flexrec.data.lists import Catalogue, Interactions, RankingList


@dataclass(frozen=True)
class Pairs:
    """Users' known interactions and the pairs to predict; "rows" number the users of a batch from 0."""

    num_rows: int
    context_rows: torch.Tensor  # (M,) int64
    context_items: torch.Tensor  # (M,) int64
    context_interest: torch.Tensor  # (M,) float32, 0 where not known
    context_known: torch.Tensor  # (E or 1, M) float32, 1 where a member may see the interest
    context_present: torch.Tensor  # (E or 1, M) float32, 1 where a member may see the interaction
    target_rows: torch.Tensor  # (N,) int64
    target_items: torch.Tensor  # (N,) int64
    target_context: torch.Tensor  # (N,) int64, the context entry that is the target itself (to be left out), or -1


@dataclass(frozen=True)
class Evidence:
    """What a model is fitted on, and what it may try itself on."""

    catalogue: Catalogue
    log: Interactions  # sorted by user and item, without what is held out
    watched: np.ndarray  # (W, 2) user and item of what users of the log watched, of interest unknown
    held_out: Pairs  # to be predicted from ``log``
    interest: np.ndarray  # (N,) float32 of the held-out pairs


class CriticModel(Protocol):
    """What predicts pairs for a critic; its variances are those of a pair's feedback, as far as the model knows."""

    def predict(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Mean (N,) float32 in [0, 1] and variance (N,) float32 > 0 of the targets."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All that the class's ``from_arrays(arrays, catalogue)`` needs to make the model again."""


def pairs_of_lists(lists: Sequence[RankingList], log: Interactions, num_items: int) -> Pairs:
    """The candidates of lists, to be predicted from their users' log, which is sorted by user, and histories."""
    starts = starts_of(log.users)
    items, interest, known, lengths, own = [], [], [], [], []
    position = np.full(num_items, -1, dtype=np.int64)
    start = 0
    for number, lst in enumerate(lists):
        for name, array in (("history", lst.history), ("candidates", lst.candidates)):
            if len(array) and not 0 <= array.min() <= array.max() < num_items:
                raise ValueError(f"lists[{number}].{name} must hold items in [0, {num_items}), got {array}")
        in_log = 0 <= lst.user < len(starts) - 1
        of_user = slice(*starts[lst.user : lst.user + 2]) if in_log else slice(0)
        logged = log.items[of_user]
        unrated = np.setdiff1d(lst.history, logged)
        context = np.concatenate([logged, unrated])
        items.append(context)
        interest.append(np.concatenate([log.interest[of_user], np.zeros(len(unrated), dtype=np.float32)]))
        known.append(np.repeat(np.array([1.0, 0.0], dtype=np.float32), [len(logged), len(unrated)]))
        lengths.append(len(context))
        position[context] = start + np.arange(len(context))
        own.append(position[lst.candidates])
        position[context] = -1
        start += len(context)
    rows = np.arange(len(lists))
    return Pairs(
        num_rows=len(lists),
        context_rows=torch.from_numpy(np.repeat(rows, lengths)),
        context_items=torch.from_numpy(np.concatenate(items)),
        context_interest=torch.from_numpy(np.concatenate(interest)),
        context_known=torch.from_numpy(np.concatenate(known))[None],
        context_present=torch.ones(1, start),
        target_rows=torch.from_numpy(np.repeat(rows, [len(lst.candidates) for lst in lists])),
        target_items=torch.from_numpy(np.concatenate([lst.candidates for lst in lists])),
        target_context=torch.from_numpy(np.concatenate(own)),
    )


def leave_out_pairs(log: Interactions, held_out: np.ndarray) -> Pairs:
    """The held-out interactions, to be predicted from all others of their users."""
    context = log.select(~held_out)
    targets = log.select(held_out)
    return Pairs(
        num_rows=int(log.users.max()) + 1,
        context_rows=torch.from_numpy(context.users),
        context_items=torch.from_numpy(context.items),
        context_interest=torch.from_numpy(context.interest),
        context_known=torch.ones(1, len(context)),
        context_present=torch.ones(1, len(context)),
        target_rows=torch.from_numpy(targets.users),
        target_items=torch.from_numpy(targets.items),
        target_context=torch.full((len(targets),), -1),
    )


def with_nothing_known(pairs: Pairs) -> Pairs:
    """The same pairs, of users of whom no interest is known."""
    return replace(pairs, context_known=torch.zeros_like(pairs.context_known))


def num_known(pairs: Pairs) -> np.ndarray:
    """(N,) how many interests of the user of each target are known, its own left out."""
    known = (pairs.context_known * pairs.context_present).mean(0)
    of_rows = known.new_zeros(pairs.num_rows).index_add(0, pairs.context_rows, known)
    own = torch.cat([known, known.new_zeros(1)])[pairs.target_context]  # -1 is the zero at the end
    return (of_rows[pairs.target_rows] - own).round().numpy()


def watched_pairs(lists: Sequence[RankingList], log: Interactions, num_items: int) -> np.ndarray:
    """(W, 2) user and item of what histories hold and the log does not, each once, sorted; users of the log alone."""
    rows = [lst.user * num_items + lst.history for lst in lists if lst.user >= 0]
    pairs = np.setdiff1d(np.concatenate(rows) if rows else np.zeros(0, np.int64), log.users * num_items + log.items)
    users, items = np.divmod(pairs, num_items)
    return np.stack([users, items], axis=1)[np.isin(users, log.users)]


def topic_shares(catalogue: Catalogue) -> torch.Tensor:
    """(I, C) float32 topics of each item; rows of n topics have length 1, whatever n."""
    topics = torch.from_numpy(catalogue.topic_matrix)
    return topics / topics.sum(1, keepdim=True).clamp(min=1.0).sqrt()


def starts_of(users: np.ndarray) -> np.ndarray:
    """(U + 1,) where each user's interactions begin in a log sorted by user."""
    return np.searchsorted(users, np.arange(int(users.max(initial=-1)) + 2))


def merged(log: Interactions, num_items: int) -> Interactions:
    """Sorted by user and item, repeated pairs averaged (with the time of the first)."""
    pairs, first, member = np.unique(log.users * num_items + log.items, return_index=True, return_inverse=True)
    interest = np.bincount(member, log.interest) / np.bincount(member)
    users, items = np.divmod(pairs.astype(np.int64), num_items)
    return Interactions(users, items, interest.astype(np.float32), log.times[first])


def check_log(log: Interactions, num_items: int) -> None:
    if len(log) < 2:
        raise ValueError(f"log must hold at least 2 interactions to fit a critic on, got {len(log)}")
    if log.users.min() < 0:
        raise ValueError(f"log.users must be >= 0, got {log.users.min()}")
    if not 0 <= log.items.min() <= log.items.max() < num_items:
        raise ValueError(f"log.items must lie in [0, {num_items}), got {log.items.min()} to {log.items.max()}")
    if not np.all((log.interest >= 0) & (log.interest <= 1)):  # also false for NaN
        where = int(np.flatnonzero(~((log.interest >= 0) & (log.interest <= 1)))[0])
        raise ValueError(f"log.interest must lie in [0, 1], got {log.interest[where]} at index {where}")
