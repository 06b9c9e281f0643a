"""What the ranking operations share: argument checks, orders, and the restricted distribution as a plain tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flexrec.validation import check_finite, check_range, check_tensor, values_are_checked

# Stands for a logit of -inf. Being finite it needs no special case: its probability underflows to exactly 0, 0 * FLOOR
# is 0 and not NaN, and where nothing else remains the softmax over equal FLOORs is uniform.
FLOOR = -1e20
IMPOSSIBLE = FLOOR / 2  # a logit or log-probability below this is that of an impossible candidate


class RankedLists(NamedTuple):
    """Checked arguments of the ranking operations, in the order of ``candidates``.

    Attributes:
        hidden: (N, T, D).
        weight: (V, D).
        bias: (V,) or None.
        candidates: (P, K) int64 token ids; entries beyond a list's length replaced by ids that may be read.
        position: (N, K) int64, the rank of every candidate (see :func:`rank_positions`), -1 beyond a list's length.
        ragged: whether any list may be shorter than K.
        temperature: what logits are divided by.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    candidates: Tensor
    position: Tensor
    ragged: bool
    temperature: float


def check_lists(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    ranking: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    lengths: Tensor | None = None,
) -> RankedLists:
    """Check the arguments that all ranking operations share; meanings as of :func:`ranking_logprobs`."""
    check_tensor("hidden", hidden, ("N", "T", "D"))
    n, t, d = hidden.shape
    check_tensor("weight", weight, ("V", d))
    check_tensor("candidates", candidates, ("P", "K"), "integer")
    check_tensor("ranking", ranking, (n, t), "integer")
    p, k = candidates.shape
    if (n == 0) != (p == 0) or (p and n % p):
        raise ValueError(f"hidden must hold the same number of rankings per list of candidates, got N={n} and P={p}")
    if k == 0:
        raise ValueError(f"candidates must hold at least one candidate per list, got shape {tuple(candidates.shape)}")
    if t > k:
        raise ValueError(f"ranking must not be longer than its list, got T={t} ranks of K={k} candidates")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],))
        check_range("bias", bias, -math.inf, torch.finfo(bias.dtype).max)
    check_temperature(temperature)
    candidates, ranking = candidates.long(), ranking.long()
    if lengths is None:
        check_range("candidates", candidates, 0, weight.shape[0] - 1)
        _check_indices(ranking, k, None)
        position = rank_positions(ranking, k)
        _check_distinct(ranking, position)
        return RankedLists(hidden, weight, bias, candidates, position, False, float(temperature))

    lengths = lengths_per_ranking(lengths, n, p, k)
    # A list's tail is never read: its tokens give way to the list's first, or to token 0 where the list is empty.
    longest = lengths.view(p, -1).amax(1, keepdim=True) if n else lengths.view(0, 1)  # (P, 1)
    real = torch.arange(k, device=candidates.device) < longest  # (P, K)
    check_range("candidates", candidates, 0, weight.shape[0] - 1, mask=real)
    candidates = torch.where(real, candidates, candidates[:, :1]).masked_fill(longest == 0, 0)
    _check_indices(ranking, k, lengths)
    position = rank_positions(ranking, k, lengths)
    _check_distinct(ranking, position)
    return RankedLists(hidden, weight, bias, candidates, position, True, float(temperature))


def lengths_per_ranking(lengths: Tensor, n: int, p: int, k: int) -> Tensor:
    """Check ``lengths`` (N,) or (P,) against K and return them as (N,) int64."""
    check_tensor("lengths", lengths, (None,), "integer")
    if lengths.shape[0] not in (n, p):
        raise ValueError(f"lengths must have shape (N,) = ({n},) or (P,) = ({p},), got {tuple(lengths.shape)}")
    check_range("lengths", lengths, 0, k)
    lengths = lengths.long()
    return lengths if lengths.shape[0] == n else lengths.repeat_interleave(n // p, output_size=n)


def check_temperature(temperature: float) -> None:
    """Raise unless ``temperature`` is a positive finite number."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def rank_positions(ranking: Tensor, num_candidates: int, lengths: Tensor | None = None) -> Tensor:
    """The position in rank order of every candidate: ranked ones first, then the unranked by ascending index.

    Args:
        ranking: (N, T) int64, index of the candidate at rank t; ignored at ranks t >= length.
        num_candidates: K.
        lengths: (N,) int64, or None where every list has K candidates.

    Returns:
        (N, K) int64: 0 .. length - 1, each once, and -1 for candidates beyond the length.
    """
    n, t = ranking.shape
    steps = torch.arange(t, device=ranking.device).expand(n, t)  # (N, T)
    # Column K takes what is to be ignored.
    rank = torch.full((n, num_candidates + 1), -1, dtype=torch.int64, device=ranking.device)
    if lengths is None:
        unranked = rank.scatter_(1, ranking, steps)[:, :num_candidates] < 0  # (N, K)
        num_ranked = torch.full((n, 1), t, device=ranking.device)
    else:
        rank.scatter_(1, torch.where(steps < lengths[:, None], ranking, num_candidates), steps)
        real = torch.arange(num_candidates, device=ranking.device) < lengths[:, None]  # (N, K)
        unranked = (rank[:, :num_candidates] < 0) & real
        num_ranked = lengths[:, None].clamp(max=t)
    return torch.where(unranked, num_ranked + unranked.cumsum(1) - 1, rank[:, :num_candidates])


def _check_indices(ranking: Tensor, num_candidates: int, lengths: Tensor | None) -> None:
    """Raise ValueError where a ranking indexes no candidate of its list."""
    if not values_are_checked(ranking):
        return
    limit = ranking.new_full((len(ranking), 1), num_candidates) if lengths is None else lengths[:, None]
    steps = torch.arange(ranking.shape[1], device=ranking.device)
    outside = (steps < limit) & ((ranking < 0) | (ranking >= limit))  # (N, T)
    if bool(outside.any()):
        row, step = outside.nonzero()[0].tolist()
        raise ValueError(
            f"ranking must index the candidates of its list, 0 to {int(limit[row]) - 1}; "
            f"got {int(ranking[row, step])} at row {row}, rank {step}"
        )


def _check_distinct(ranking: Tensor, position: Tensor) -> None:
    """Raise ValueError where a ranking names a candidate twice: the candidate's position can equal only one rank."""
    if not values_are_checked(ranking) or ranking.numel() == 0:
        return
    steps = torch.arange(ranking.shape[1], device=ranking.device)
    used = steps <= position.amax(1, keepdim=True)  # (N, T)
    repeated = used & (position.gather(1, torch.where(used, ranking, 0)) != steps)
    if bool(repeated.any()):
        row, step = repeated.nonzero()[0].tolist()
        raise ValueError(
            f"ranking must name every candidate at most once; row {row} names candidate {int(ranking[row, step])} twice"
        )


def values_by_candidate(values: Tensor, position: Tensor) -> Tensor:
    """Check ``values`` (N, K, C) in rank order and return them in candidate order, 0 beyond a list's length."""
    n, k = position.shape
    check_tensor("values", values, (n, k, "C"))
    in_list = torch.arange(k, device=position.device) <= position.amax(1, keepdim=True)  # (N, K)
    check_finite("values", values, in_list[..., None].expand(values.shape))
    index = position.clamp(min=0)[..., None].expand(values.shape)
    return values.detach().gather(1, index).masked_fill((position < 0)[..., None], 0)


def in_rank_order(by_candidate: Tensor, position: Tensor) -> Tensor:
    """(N, T, K) by candidate to (N, T, K) by position in rank order, 0 beyond a list's length."""
    k = position.shape[1]
    # Column K of the result takes the candidates that have no position.
    index = torch.where(position < 0, k, position)[:, None].expand(by_candidate.shape)
    ordered = by_candidate.new_zeros((*by_candidate.shape[:2], k + 1))
    return ordered.scatter(2, index, by_candidate)[..., :k]


def ranked_candidates(position: Tensor, num_steps: int) -> Tensor:
    """The inverse of :func:`rank_positions`: (N, T) int64, the candidate at each rank; 0 beyond a list's length."""
    n, k = position.shape
    candidates = torch.arange(k, device=position.device).expand(n, k)
    # Column K takes the candidates that have no position.
    order = position.new_zeros((n, k + 1)).scatter_(1, torch.where(position < 0, k, position), candidates)
    return order[:, :num_steps]


def pools(position: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Who is in the pool at each step (N, T, K), and which steps have anybody in it (N, T)."""
    steps = torch.arange(num_steps, device=position.device)
    pool = position[:, None] >= steps[:, None]
    live = position.amax(1, keepdim=True) >= steps
    return pool, live


def compute_dtype(lists: RankedLists) -> torch.dtype:
    """float64 where an operand is, else float32: half precision is accumulated and returned in float32."""
    return torch.promote_types(torch.promote_types(lists.hidden.dtype, lists.weight.dtype), torch.float32)


def gather_operands(lists: RankedLists) -> tuple[Tensor, Tensor]:
    """hidden (P, G T, D) without the steps that have no pool, and the candidates' weight rows (P, K, D)."""
    n, t, d = lists.hidden.shape
    p, k = lists.candidates.shape
    dtype = compute_dtype(lists)
    hidden = lists.hidden.to(dtype)
    if lists.ragged:
        _, live = pools(lists.position, t)
        hidden = hidden.masked_fill(~live[..., None], 0)
    rows = lists.weight.index_select(0, lists.candidates.flatten()).to(dtype)
    return hidden.reshape(p, n // max(p, 1) * t, d), rows.view(p, k, d)


def step_log_probs(lists: RankedLists) -> tuple[Tensor, Tensor]:
    """The restricted distribution of every step as an ordinary differentiable tensor.

    Returns:
        log-probabilities (N, T, K) in candidate order, finite everywhere: below ``IMPOSSIBLE`` for impossible
        candidates, meaningless outside the pool; and the pool (N, T, K) bool.
    """
    n, t, _ = lists.hidden.shape
    dtype = compute_dtype(lists)
    hidden, rows = gather_operands(lists)
    logits = hidden @ rows.transpose(1, 2)  # (P, G T, K)
    if lists.bias is not None:
        logits = logits + lists.bias.to(dtype)[lists.candidates][:, None]
    logits = (logits / lists.temperature).clamp(min=FLOOR).view(n, t, lists.candidates.shape[1])
    pool, _ = pools(lists.position, t)
    return torch.where(pool, logits, 2 * FLOOR).log_softmax(-1), pool
