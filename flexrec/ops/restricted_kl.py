"""Exact KL divergence between two policies over the same restricted support.

    KL(pi || ref) = sum over the support of pi (log pi - log ref),       0 log 0 = 0

The support is small and at hand, so this is the divergence itself, where trainers over a full vocabulary use
single-sample estimates of it. It is infinite where the policy allows what the reference's bias makes impossible.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexrec.ops.ranked_lists import IMPOSSIBLE, check_lists, step_log_probs
from flexrec.ops.restricted_logprobs import allowed_log_probs, check_sets, sum_per_row


def ranking_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    candidates: Tensor,
    ranking: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    lengths: Tensor | None = None,
) -> Tensor:
    """KL(policy || reference) at every step of N rankings, over the candidates that remain.

    Args:
        hidden, weight, bias: of the policy; candidates, ranking, temperature, lengths: as of
            :func:`flexrec.ops.ranking_logprobs.ranking_logprobs`.
        ref_hidden, ref_weight, ref_bias: (N, T, D'), (V, D') and (V,) of the reference. They get no gradient.

    Returns:
        (N, T) float32 (float64 if the policy's inputs are), >= 0 up to rounding, exactly 0 at steps t >= length.
        Differentiable in ``hidden``, ``weight`` and ``bias``.
    """
    policy = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    try:
        reference = check_lists(
            ref_hidden, ref_weight, candidates, ranking, bias=ref_bias, temperature=temperature, lengths=lengths
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"of the reference (ref_hidden, ref_weight, ref_bias): {error}") from error
    log_probs, pool = step_log_probs(policy)
    with torch.no_grad():
        ref_log_probs, _ = step_log_probs(reference)
    return torch.where(pool, _terms(log_probs, ref_log_probs), 0.0).sum(-1)


def restricted_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    allowed_ids: Tensor,
    allowed_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """KL(policy || reference) of M rows, each over its own allowed tokens.

    Args:
        hidden, weight, bias: of the policy; allowed_ids, allowed_offsets, temperature: as of
            :func:`flexrec.ops.restricted_logprobs.restricted_logprobs`.
        ref_hidden, ref_weight, ref_bias: (M, D'), (V, D') and (V,) of the reference. They get no gradient.

    Returns:
        (M,) float32 (float64 if the policy's inputs are), >= 0 up to rounding; exactly 0 where one token is allowed, or
        none. Differentiable in ``hidden``, ``weight`` and ``bias``.
    """
    policy = check_sets(hidden, weight, allowed_ids, allowed_offsets, bias=bias, temperature=temperature)
    try:
        reference = check_sets(
            ref_hidden, ref_weight, allowed_ids, allowed_offsets, bias=ref_bias, temperature=temperature
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"of the reference (ref_hidden, ref_weight, ref_bias): {error}") from error
    log_probs = allowed_log_probs(policy)
    with torch.no_grad():
        ref_log_probs = allowed_log_probs(reference)
    return sum_per_row(_terms(log_probs, ref_log_probs), policy)


def _terms(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """pi (log pi - log ref) of every entry: 0 where the policy cannot go, inf where only the reference cannot."""
    ref_log_probs = ref_log_probs.to(log_probs.dtype)
    probs = log_probs.exp()
    terms = probs * (log_probs - ref_log_probs)
    unreachable = (ref_log_probs < IMPOSSIBLE) & (probs > 0)
    return torch.where(unreachable, math.inf, terms)
