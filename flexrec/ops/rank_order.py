"""Rank order: which candidate stands at which rank, both ways, and tensors brought from one order to the other.

A ranking names candidates by index; what it leaves out follows by ascending index, and what lies beyond a list's length
has no place. ``position`` (N, K) says where each candidate stands, ``order`` (N, K) who stands at each position.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexrec.checks import check_range, check_tensor, values_are_checked
from flexrec.ops.library import has_triton, is_traced, kernels

_NO_LENGTHS = np.empty(0, np.int64)


def rank_positions(ranking: Tensor, num_candidates: int, lengths: Tensor | None = None) -> Tensor:
    """The position in rank order of every candidate.

    Args:
        ranking: (N, T) int64, index of the candidate at rank t, -1 for none; ignored at ranks t >= length.
        num_candidates: K.
        lengths: (N,) int64, or None where every list has K candidates.

    Returns:
        (N, K) int32: 0 .. length - 1, each once, and -1 for candidates beyond the length.
    """
    n, t = ranking.shape
    steps = torch.arange(t, device=ranking.device).expand(n, t)  # (N, T)
    named = ranking >= 0  # (N, T)
    if lengths is not None:
        named &= steps < lengths[:, None]
    # Column K takes what is to be ignored.
    rank = torch.full((n, num_candidates + 1), -1, dtype=torch.int64, device=ranking.device)
    rank = rank.scatter_(1, torch.where(named, ranking, num_candidates), steps)[:, :num_candidates]  # (N, K)
    unranked = rank < 0  # (N, K)
    if lengths is not None:
        unranked &= torch.arange(num_candidates, device=ranking.device) < lengths[:, None]
    behind = named.sum(1, keepdim=True) + unranked.cumsum(1) - 1  # (N, K)
    return torch.where(unranked, behind, rank).int()


def rank_order(rankings: Tensor, lengths: Tensor, num_candidates: int) -> Tensor:
    """(N, K) candidate index at each position: the ranking first, then what it left out in candidate order.

    This is the order of ``gains`` and ``values`` in the functions of tensors. Positions beyond a row's length hold
    the padding candidates. Arguments as of :func:`rank_positions`.
    """
    position = rank_positions(rankings, num_candidates, lengths).long()
    candidate = torch.arange(num_candidates, device=rankings.device).expand_as(position)  # (N, K)
    place = torch.where(position < 0, candidate, position)
    return torch.empty_like(place).scatter_(1, place, candidate)


def by_candidate(values: Tensor, position: Tensor) -> Tensor:
    """(N, K, C) in rank order to candidate order, 0 for candidates that have no position."""
    position = position[..., None]  # (N, K, 1)
    return values.gather(1, position.clamp(min=0).long().expand(values.shape)).masked_fill(position < 0, 0)


def in_rank_order(steps: Tensor, position: Tensor) -> Tensor:
    """(N, T, K) by candidate to (N, T, K) by position in rank order, 0 beyond a list's length."""
    k = position.shape[1]
    # Column K of the result takes the candidates that have no position.
    index = torch.where(position < 0, k, position).long()[:, None].expand(steps.shape)
    ordered = steps.new_zeros((*steps.shape[:2], k + 1))
    return ordered.scatter(2, index, steps)[..., :k]


def pools(position: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Who is in the pool at each step (N, T, K), and which steps have anybody in it (N, T)."""
    steps = torch.arange(num_steps, device=position.device)
    pool = position[:, None] >= steps[:, None]
    live = position.amax(1, keepdim=True) >= steps
    return pool, live


# --- checks -----------------------------------------------------------------------------------------------------------


def lengths_per_ranking(lengths: Tensor, n: int, p: int, k: int) -> Tensor:
    """Check ``lengths`` (N,) or (P,) against K and return them as (N,) int64."""
    check_tensor("lengths", lengths, (None,), "integer")
    if lengths.shape[0] not in (n, p):
        raise ValueError(f"lengths must have shape (N,) = ({n},) or (P,) = ({p},), got {tuple(lengths.shape)}")
    check_range("lengths", lengths, 0, k)
    lengths = lengths.long()
    return lengths if lengths.shape[0] == n else lengths.repeat_interleave(n // p, output_size=n)


def checked_positions(candidates: Tensor, vocab: int, ranking: Tensor, lengths: Tensor | None) -> Tensor:
    """:func:`rank_positions`; ValueError where values are checked, and a token or a ranking cannot be."""
    k = candidates.shape[1]
    if not values_are_checked(ranking):
        if ranking.is_cuda and has_triton() and not is_traced(ranking):
            return kernels("triton", "ranking_logprobs").rank_positions_(ranking, lengths, k)
        return rank_positions(ranking, k, lengths)
    position = np.empty((ranking.shape[0], k), np.int32)
    limits = _NO_LENGTHS if lengths is None else lengths.cpu().numpy()
    numba = kernels("numba", "ranking_logprobs")
    found, row, column = numba.place_candidates(
        candidates.cpu().numpy(), ranking.cpu().numpy(), limits, position, vocab
    )
    if found == numba.NO_TOKEN:
        token = int(candidates[row, column])
        raise ValueError(f"candidates must lie in [0, {vocab - 1}], got {token} at index {[row, column]}")
    if found == numba.REPEATED:
        index = int(ranking[row, column])
        raise ValueError(f"ranking must name every candidate at most once; row {row} names candidate {index} twice")
    if found == numba.OUTSIDE:
        length = k if lengths is None else int(lengths[row])
        raise ValueError(
            f"ranking must index the candidates of its list, 0 to {length - 1}; got {int(ranking[row, column])} at row "
            f"{row}, rank {column}"
        )
    return torch.from_numpy(position).to(ranking.device)
