"""The all-actions objective: every remaining candidate's swap value, weighted by the policy.

At step k the policy pi_k chooses among the candidates that remain. What choosing the candidate now at rank j instead
would have been worth is known: it is the ranking with ranks k and j exchanged. So nothing needs to be sampled:

    objective_k = E_{j ~ pi_k} [R(y^{k<->j}) - R(y)] = -sum_j pi_k(j) S_kj,

differentiated through pi_k alone (the all-actions policy gradient, Sutton et al. 2001; the swap is FlexRec's
counterfactual, arXiv 2603.11901). The sampled candidate j = k itself contributes 0.

For a metric linear in a term per item, R = sum_k d_k g_k / Z, exchanging two ranks changes R by
(d_k - d_j)(g_j - g_k) / Z, and the expectation needs three numbers per step:

    objective_k = (d_k E[g] - d_k g_k - E[d g] + g_k E[d]) / Z       (g here the term gain, and centred: a constant
                                                                       added to all g changes nothing but the rounding)

These are expectations of values that do not depend on the step, so no tensor (N, T, K) is formed. Other metrics take
their swap scores (N, K, K) and the explicit distribution (N, T, K).

The expectation has a weakness: its gradient in the logits, pi_j (change_j - E[change]), vanishes for a good candidate
that the policy holds improbable. With a ``tilt`` tau > 0 the objective is the exponential utility instead,

    objective_k = tau log E_{j ~ pi_k} exp((R(y^{k<->j}) - R(y)) / tau),

whose gradient in the logits is tau (q - pi) with the improvement target q_j ~ pi_j exp(change_j / tau): the step of
regularised policy improvement (mirror descent; MPO, arXiv 1806.06920) instead of the policy gradient. tau -> infinity
gives the expectation back; tau -> 0 gives tau log pi of the best candidate left, that is, listwise likelihood along
the policy's own rankings. It takes the explicit distribution for every metric.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flexrec.checks import MIN_TILT, check_choice, check_number, check_range, check_tensor
from flexrec.metrics import Metric
from flexrec.numba_kernels import FLOOR
from flexrec.ops.library import BACKENDS, accumulation_dtype
from flexrec.ops.rank_order import in_rank_order, lengths_per_ranking
from flexrec.ops.ranking_logprobs import (
    RankedLists,
    add_reference,
    check_lists,
    evaluate_lists,
    from_distribution,
    step_log_probs,
)
from flexrec.ops.ranking_metric import Topics, check_topics, ingredients, metric_of
from flexrec.ops.ranking_metric import check_lists as check_gains
from flexrec.ops.restricted_logprobs import Results
from flexrec.ops.swap_rewards import swap_scores


class AllActions(NamedTuple):
    """Per step: the objective to maximise, log-probability of the chosen candidate, and entropy."""

    objective: Tensor
    logprobs: Tensor
    entropy: Tensor


class AllActionsWithKL(NamedTuple):
    """:class:`AllActions`, and per step KL(policy || reference)."""

    objective: Tensor
    logprobs: Tensor
    entropy: Tensor
    kl: Tensor


def all_actions_objective(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    ranking: Tensor,
    gains: Tensor,
    metric: str | Metric,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    lengths: Tensor | None = None,
    num_ranked: int | Tensor | None = None,
    topics: Tensor | Topics | None = None,
    tilt: float | None = None,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> AllActions:
    """The expected change of a metric at every step, over what the policy could have placed there.

    Differentiable in ``hidden``, ``weight`` and ``bias``; ``gains`` get no gradient.

    Args:
        hidden, weight, candidates, ranking, bias, temperature, lengths, weight_grad, backend: as of
            :func:`flexrec.ops.ranking_logprobs.ranking_logprobs`. Where ``metric`` is not linear ("hit_rate", "mrr",
            "map", "err", registered ones), "auto" and "triton" too form the distribution (N, T, K) by torch
            operations, and ``weight_grad`` must be "dense".
        gains: (N, K) floating >= 0 in rank order: ``gains[n, k]`` is that of the item at rank k, and from position T
            on of the unranked candidates by ascending candidate index. Ignored beyond ``lengths``.
        metric: a metric's name, see :func:`flexrec.ranking_metric`.
        num_ranked: int or (N,), how many ranks are shown (discount 0 beyond); at most T, and T if not given.
        topics: as of :func:`flexrec.swap_rewards`, for metrics of topics.
        tilt: tau, in the metric's unit, of the exponential utility that replaces the expectation; None, the
            expectation itself. Forms the distribution (N, T, K) by torch operations, whatever the backend.

    Returns:
        ``AllActions(objective (N, T), logprobs (N, T), entropy (N, T))``, float32 (float64 if ``hidden`` or ``weight``
        is), exactly 0 at steps t >= length. The objective is in the metric's unit.

    Raises:
        TypeError, ValueError: as of :func:`ranking_logprobs` and :func:`flexrec.ranking_metric`.

    Example:
        >>> hidden, weight = torch.zeros(1, 3, 4), torch.zeros(9, 4)  # every token is equally likely
        >>> candidates, ranking = torch.tensor([[5, 6, 7]]), torch.tensor([[2, 0, 1]])  # 7, then 5, then 6
        >>> gains = torch.tensor([[0.0, 1.0, 0.0]])  # of 7, 5 and 6
        >>> found = flexrec.all_actions_objective(hidden, weight, candidates, ranking, gains, "dcg")
        >>> found.objective.round(decimals=3)  # at rank 1, 5 is one of three and would gain 1 - 1 / log2(3)
        tensor([[ 0.1230, -0.0650,  0.0000]])
    """
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    objective, result = _evaluate(
        lists, lengths, gains, metric, num_ranked, topics, tilt, weight_grad=weight_grad, backend=backend
    )
    return AllActions(objective, result.logprobs, result.entropy)


def all_actions_objective_with_kl(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    ranking: Tensor,
    gains: Tensor,
    metric: str | Metric,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logits: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    lengths: Tensor | None = None,
    num_ranked: int | Tensor | None = None,
    topics: Tensor | Topics | None = None,
    tilt: float | None = None,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> AllActionsWithKL:
    """:func:`all_actions_objective`, and in the same pass the exact KL(policy || reference) of every step, (N, T).

    The reference is given as to :func:`flexrec.ops.ranking_logprobs.ranking_logprobs_with_kl`.
    """
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    lists = add_reference(lists, ref_hidden, ref_weight, ref_bias, ref_logits)
    objective, result = _evaluate(
        lists, lengths, gains, metric, num_ranked, topics, tilt, weight_grad=weight_grad, backend=backend
    )
    assert result.kl is not None
    return AllActionsWithKL(objective, result.logprobs, result.entropy, result.kl)


def all_actions_of_scores(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    ranking: Tensor,
    scores: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    lengths: Tensor | None = None,
    tilt: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The fields of :class:`AllActionsWithKL` from swap scores (N, K, K), where rankings differ in their metric.

    KL is None where no reference is given. By torch operations on the distribution (N, T, K), on any device; the other
    arguments as of :func:`all_actions_objective_with_kl`.
    """
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    if ref_hidden is not None:
        lists = add_reference(lists, ref_hidden, ref_weight, ref_bias, None)
    n, k = lists.position.shape
    check_tensor("scores", scores, (n, k, k))
    _check_tilt(tilt)
    objective, result = _over_distribution(lists, -scores[:, : lists.hidden.shape[1]], tilt)
    return objective, result.logprobs, result.entropy, result.kl


def _evaluate(
    lists: RankedLists,
    lengths: Tensor | None,
    gains: Tensor,
    metric: str | Metric,
    num_ranked: int | Tensor | None,
    topics: Tensor | Topics | None,
    tilt: float | None,
    *,
    weight_grad: str,
    backend: str,
) -> tuple[Tensor, Results]:
    """The objective (N, T), and the results of the distribution that it comes from."""
    check_choice("backend", backend, BACKENDS)
    metric = metric_of(metric)
    n, k = lists.position.shape
    t = lists.hidden.shape[1]
    check_tensor("gains", gains, (n, k))
    shown = _check_num_ranked(num_ranked, n, t, gains.device)
    per_ranking = None if lengths is None else lengths_per_ranking(lengths, n, len(lists.candidates), k)
    _check_tilt(tilt)

    if tilt is not None or metric.definition.form != "linear":
        if weight_grad != "dense":
            raise ValueError(
                f"weight_grad={weight_grad!r} needs a linear metric and no tilt, got {metric} and tilt={tilt}"
            )
        scores = swap_scores(
            gains,
            metric,
            lengths=per_ranking,
            num_ranked=shown,
            topics=topics,
            backend="torch" if backend == "torch" else "auto",
        )
        return _over_distribution(lists, -scores[:, :t], tilt)

    ranked = check_gains(gains, metric, per_ranking, shown)
    check_topics(topics, metric, ranked)  # linear metrics take none
    parts = ingredients(ranked, metric)
    mean = parts.weight.sum(-1, keepdim=True) / parts.length.clamp(min=1)
    centred = torch.where(parts.inside, parts.weight - mean, 0.0) * parts.inverse_norm
    dtype = accumulation_dtype(lists.hidden, lists.weight)
    g, d = centred.to(dtype), parts.discount.to(dtype)  # (N, K)
    both = g * d
    values = torch.stack((g, d, both), dim=-1)
    result = evaluate_lists(lists, values, weight_grad=weight_grad, backend=backend)
    assert result.expectations is not None
    factors = torch.stack((d, g, torch.full_like(g, -1.0)), dim=-1)[:, :t]  # (N, T, 3)
    # Beyond a list's length g = d = 0 and all expectations are 0, so the objective is.
    return (result.expectations * factors).sum(-1) - both[:, :t], result


def _over_distribution(lists: RankedLists, change: Tensor, tilt: float | None) -> tuple[Tensor, Results]:
    """The expectation or exponential utility of ``change`` (N, T, K) in rank order, from the explicit distribution."""
    log_probs, pool = step_log_probs(lists)
    change = change.to(log_probs.dtype)
    if tilt is None:
        probs = in_rank_order(torch.where(pool, log_probs.exp(), 0.0), lists.position)  # (N, T, K)
        objective = (probs * change).sum(-1)
    else:
        in_pool = in_rank_order(pool.to(log_probs.dtype), lists.position) > 0  # (N, T, K)
        # exp of what an action lacks to the best, so that nothing overflows.
        best = torch.where(in_pool, change, -math.inf).amax(-1, keepdim=True)  # (N, T, 1)
        best = torch.where(in_pool.any(-1, keepdim=True), best, 0.0)
        utility = in_rank_order(torch.where(pool, log_probs, 0.0), lists.position) + (change - best) / tilt
        utility = torch.where(in_pool, utility, 2 * FLOOR).logsumexp(-1) * tilt + best.squeeze(-1)
        objective = torch.where(in_pool.any(-1), utility, 0.0)
    return objective, from_distribution(log_probs, pool, lists)


def _check_tilt(tilt: float | None) -> None:
    if tilt is None:
        return
    check_number("tilt", tilt)
    if not MIN_TILT <= tilt < math.inf:
        raise ValueError(
            f"tilt must be positive and finite, and at least {MIN_TILT:g}, or None for the expectation; got {tilt}"
        )


def _check_num_ranked(num_ranked: int | Tensor | None, n: int, t: int, device: torch.device) -> Tensor:
    """(N,) int64: how many ranks are shown, at most T."""
    if num_ranked is None:
        num_ranked = t
    if isinstance(num_ranked, Tensor):
        check_tensor("num_ranked", num_ranked, (n,), "integer")
        check_range("num_ranked", num_ranked, 0, t)
        return num_ranked.long()
    if isinstance(num_ranked, bool) or not isinstance(num_ranked, int):
        raise TypeError(f"num_ranked must be an int or an integer tensor (N,), got {type(num_ranked).__name__}")
    if not 0 <= num_ranked <= t:
        raise ValueError(f"num_ranked must lie in [0, T] = [0, {t}], got {num_ranked}")
    return torch.full((n,), num_ranked, dtype=torch.int64, device=device)
