"""What the ranking operations share: argument checks, orders, and the restricted distribution as a plain tensor."""

from __future__ import annotations

import functools
import importlib.util
import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn import Parameter

from flexrec.checks import check_finite, check_range, check_tensor, values_are_checked
from flexrec.ops.ranking_logprobs_numba import FLOOR
from flexrec.ops.ranking_logprobs_numba import IMPOSSIBLE as IMPOSSIBLE  # for those that import FLOOR from here

FINE, NO_TOKEN, OUTSIDE, REPEATED = 0, 1, 2, 3  # what _place_candidates finds
_NO_LENGTHS = torch.empty(0, dtype=torch.int64)


class RankedLists(NamedTuple):
    """Checked arguments of the ranking operations, in the order of ``candidates``.

    Attributes:
        hidden: (N, T, D).
        weight: (V, D).
        bias: (V,) or None.
        candidates: (P, K) int64 token ids; entries beyond a list's length replaced by ids that may be read.
        position: (N, K) int32, the rank of every candidate (see :func:`rank_positions`), -1 beyond a list's length.
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


class Reference(NamedTuple):
    """Another policy over the same lists: hidden (N, T, D'), weight (V', D') and bias (V',), or logits (N, T, K).

    The logits are in candidate order and divided by the temperature already.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    logits: Tensor | None = None


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
    vocab = weight.shape[0]
    if lengths is None:
        position = _checked_positions(candidates, vocab, ranking, None)
        return RankedLists(hidden, weight, bias, candidates, position, False, float(temperature))

    lengths = lengths_per_ranking(lengths, n, p, k)
    position = _checked_positions(candidates, vocab, ranking, lengths)
    # A list's tail is never read: its tokens give way to the list's first, or to token 0 where the list is empty.
    longest = lengths.view(p, -1).amax(1, keepdim=True) if n else lengths.view(0, 1)  # (P, 1)
    real = torch.arange(k, device=candidates.device) < longest  # (P, K)
    candidates = torch.where(real, candidates, candidates[:, :1]).masked_fill(longest == 0, 0)
    return RankedLists(hidden, weight, bias, candidates, position, True, float(temperature))


def check_reference(reference: Reference, lists: RankedLists) -> Reference:
    """Check the arguments ref_hidden, ref_weight, ref_bias and ref_logits against the lists, and detach them."""
    hidden, weight, bias, logits = reference
    n, t, _ = lists.hidden.shape
    if (logits is None) == (hidden is None and weight is None) or (hidden is None) != (weight is None):
        given = [f"ref_{name}" for name, x in zip(Reference._fields, reference, strict=True) if x is not None]
        raise ValueError(
            f"a reference is ref_hidden and ref_weight, or ref_logits; got {' and '.join(given) or 'none'}"
        )
    if logits is not None:
        if bias is not None:
            raise ValueError("ref_bias goes with ref_hidden and ref_weight; ref_logits contain theirs already")
        check_tensor("ref_logits", logits, (n, t, lists.candidates.shape[1]))
        dtype = accumulation_dtype(lists.hidden, lists.weight)
        return Reference(logits=logits.detach().to(dtype) / lists.temperature)
    hidden = check_tensor("ref_hidden", hidden, (n, t, "D"))
    weight = check_tensor("ref_weight", weight, ("V", hidden.shape[2]))
    if weight.shape[0] < lists.weight.shape[0]:
        check_range("candidates, which index ref_weight too,", lists.candidates, 0, weight.shape[0] - 1)
    if bias is not None:
        check_tensor("ref_bias", bias, (weight.shape[0],))
        check_range("ref_bias", bias, -math.inf, torch.finfo(bias.dtype).max)
    return Reference(hidden.detach(), weight.detach(), None if bias is None else bias.detach())


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
        (N, K) int32: 0 .. length - 1, each once, and -1 for candidates beyond the length.
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
    return torch.where(unranked, num_ranked + unranked.cumsum(1) - 1, rank[:, :num_candidates]).int()


def _checked_positions(candidates: Tensor, vocab: int, ranking: Tensor, lengths: Tensor | None) -> Tensor:
    """:func:`rank_positions`; ValueError where values are checked, and a token or a ranking cannot be."""
    k = candidates.shape[1]
    if not values_are_checked(ranking):
        if ranking.is_cuda and has_triton() and not is_traced(ranking):
            from flexrec.triton_kernels.ranking_logprobs import rank_positions_

            return rank_positions_(ranking, lengths, k)
        return rank_positions(ranking, k, lengths)
    position = torch.empty((len(ranking), k), dtype=torch.int32)
    limits = _NO_LENGTHS if lengths is None else lengths.cpu()
    arrays = candidates.cpu().numpy(), ranking.cpu().numpy(), limits.numpy(), position.numpy()
    found, row, column = _place_candidates(*arrays, vocab)
    if found != FINE:
        raise ValueError(_what_is_wrong(found, row, column, candidates, vocab, ranking, lengths))
    return position.to(ranking.device)


def _what_is_wrong(
    found: int, row: int, column: int, candidates: Tensor, vocab: int, ranking: Tensor, lengths: Tensor | None
) -> str:
    if found == NO_TOKEN:
        token = int(candidates[row, column])
        return f"candidates must lie in [0, {vocab - 1}], got {token} at index {[row, column]}"
    index = int(ranking[row, column])
    if found == REPEATED:
        return f"ranking must name every candidate at most once; row {row} names candidate {index} twice"
    length = candidates.shape[1] if lengths is None else int(lengths[row])
    return f"ranking must index the candidates of its list, 0 to {length - 1}; got {index} at row {row}, rank {column}"


@njit(cache=True, nogil=True)
def _place_candidates(
    candidates: np.ndarray, ranking: np.ndarray, lengths: np.ndarray, position: np.ndarray, vocab: int
) -> tuple[int, int, int]:
    """Fill ``position`` (N, K) with the rank of every candidate: the ranked ones, then the unranked ascending.

    ``lengths`` is (N,), or (0,) where every list has K candidates; candidates beyond have position -1, and neither
    ``ranking`` (N, T) nor ``candidates`` (P, K) is read there. Returns (FINE, 0, 0), or what is wrong and where.
    """
    t, k = ranking.shape[1], position.shape[1]
    group = len(ranking) // max(len(candidates), 1)
    for n in range(len(ranking)):
        length = lengths[n] if len(lengths) else k
        tokens, places = candidates[n // group], position[n]
        ranked = min(t, length)
        for index in range(k):
            places[index] = -1
            if index < length and not 0 <= tokens[index] < vocab:
                return NO_TOKEN, n // group, index
        for rank in range(ranked):
            index = ranking[n, rank]
            if index < 0 or index >= length:
                return OUTSIDE, n, rank
            if places[index] >= 0:
                return REPEATED, n, rank
            places[index] = rank
        for index in range(length):
            if places[index] < 0:
                places[index] = ranked
                ranked += 1
    return FINE, 0, 0


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed, which has no wheel for some platforms."""
    return importlib.util.find_spec("triton") is not None


def check_values(values: Tensor, lists: RankedLists) -> Tensor:
    """Check ``values`` (N, K, C) in rank order, and detach them."""
    n, k = lists.position.shape
    check_tensor("values", values, (n, k, "C"))
    mask = None
    if lists.ragged:
        in_list = torch.arange(k, device=values.device) <= lists.position.amax(1, keepdim=True)  # (N, K)
        mask = in_list[..., None].expand(values.shape)
    check_finite("values", values, mask)
    return values.detach()


def values_by_candidate(values: Tensor, lists: RankedLists) -> Tensor:
    """(N, K, C) in rank order to candidate order, 0 beyond a list's length."""
    position = lists.position[..., None]  # (N, K, 1)
    if not lists.ragged:
        return values.gather(1, position.long().expand(values.shape))
    return values.gather(1, position.clamp(min=0).long().expand(values.shape)).masked_fill(position < 0, 0)


def in_rank_order(by_candidate: Tensor, position: Tensor) -> Tensor:
    """(N, T, K) by candidate to (N, T, K) by position in rank order, 0 beyond a list's length."""
    k = position.shape[1]
    # Column K of the result takes the candidates that have no position.
    index = torch.where(position < 0, k, position).long()[:, None].expand(by_candidate.shape)
    ordered = by_candidate.new_zeros((*by_candidate.shape[:2], k + 1))
    return ordered.scatter(2, index, by_candidate)[..., :k]


def pools(position: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Who is in the pool at each step (N, T, K), and which steps have anybody in it (N, T)."""
    steps = torch.arange(num_steps, device=position.device)
    pool = position[:, None] >= steps[:, None]
    live = position.amax(1, keepdim=True) >= steps
    return pool, live


def accumulation_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float64 where an operand is, else float32: half precision is accumulated and returned in float32."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def gather_operands(lists: RankedLists) -> tuple[Tensor, Tensor]:
    """hidden (P, G T, D) without the steps that have no pool, and the candidates' weight rows (P, K, D)."""
    n, t, d = lists.hidden.shape
    p, k = lists.candidates.shape
    dtype = accumulation_dtype(lists.hidden, lists.weight)
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
    hidden, rows = gather_operands(lists)
    with without_autocast(hidden):
        logits = hidden @ rows.transpose(1, 2)  # (P, G T, K)
    if lists.bias is not None:
        logits = logits + lists.bias.to(logits.dtype)[lists.candidates][:, None]
    return log_probs_of_logits((logits / lists.temperature).view(n, t, lists.candidates.shape[1]), lists)


def log_probs_of_logits(logits: Tensor, lists: RankedLists) -> tuple[Tensor, Tensor]:
    """:func:`step_log_probs` from logits (N, T, K) in candidate order."""
    pool, _ = pools(lists.position, logits.shape[1])
    return torch.where(pool, logits.clamp(min=FLOOR), 2 * FLOOR).log_softmax(-1), pool


def is_traced(*tensors: Tensor) -> bool:
    """Whether registered operations must be called: under torch.compile, or for tensors that have no data."""
    return torch.compiler.is_compiling() or any(type(x) is not Tensor and type(x) is not Parameter for x in tensors)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which operands are taken as they are: autocast has no say inside these operations."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
