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

Swap values have a bias: they keep the rest of the list as it was drawn, while what a policy places later depends on
what stands above. With ``foresight`` candidates are valued by what is expected to follow instead, and what was not
foreseen is corrected by the sampled ranking. For a linear metric with term gains g and discounts d let

    h_k(j) = d_k g_j + F_k(j),

F_k(j) any guess, from the state of step k alone, of what the ranks behind k will earn if j is placed at k. With
V_k = E_{j ~ pi_k} h_k(j) and what the sampled ranking earned, corrected from the back by what was foreseen,

    Q_k = d_k g_k + C_{k+1},    C_k = V_k + Q_k - h_k(a_k),    C_{T+1} = 0,

the gradient is that of E_{j ~ pi_k} h_k(j) + log pi_k(a_k) (Q_k - h_k(a_k)), h and Q held fixed. It is the true one for
every F, however later choices depend on the prefix: given the prefix nothing of h_k is random, so that E[h_k(a_k)] =
V_k, hence E[C_k] = E[Q_k], and Q_k is the true value of a_k on average; and E[grad log pi_k(a_k) h_k(a_k)] =
grad E_{j ~ pi_k} h_k(j) (control variates along a trajectory: Cheng, Yan and Boots 2019; doubly robust values: Jiang
and Li 2016). A good guess F makes it nearly as quiet as if the true values were known.

Two guesses are mixed, F = (1 - w) F^any + w F^race:

    F^any_k(j)   what is left besides j in any order: its mean term gain times the discounts behind k
    F^race_k(j)  what is left in the order of a race with the speeds pi_k, i.e. Plackett-Luce: i has arrived by time x
                 with probability 1 - exp(-pi_k(i) x), and the m-th place behind k is taken by time x_m, when m have
                 arrived on average. Without j the m-th arrival is later; between the x_m that all together have, the
                 arrivals of the others and their gain are interpolated. O(K) for each of T^2 / 2 pairs of a step and
                 a later rank

"auto" takes the w with the least mean square of what was not foreseen, V_{k+1} - F_k(a_k), on the other half of the
prompts (of a single prompt w = 1), so that no ranking chooses its own guess.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flexrec.checks import MIN_TILT, check_choice, check_number, check_range, check_tensor
from flexrec.metrics import FAMILIES, Metric
from flexrec.numba_kernels import FLOOR
from flexrec.ops.library import BACKENDS, accumulation_dtype, numba_reads
from flexrec.ops.rank_order import in_rank_order, lengths_per_ranking
from flexrec.ops.ranking_logprobs import (
    RankedLists,
    add_reference,
    check_lists,
    evaluate_lists,
    from_distribution,
    step_log_probs,
)
from flexrec.ops.ranking_metric import Topics, call_kernels, check_gain_values, check_topics, ingredients, metric_of
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
    foresight: float | str | None = None,
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
        foresight: None, candidates are worth what swapping them in would change of the ranking as it was drawn; else
            what is expected to follow, corrected so that the gradient has no bias: how far the policy's present
            distribution says what follows (0 not at all, 1 all of it), or "auto", estimated. Linear metrics only, no
            tilt; by torch operations, and the distribution is formed.

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
        lists, lengths, gains, metric, num_ranked, topics, tilt, foresight, weight_grad=weight_grad, backend=backend
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
    foresight: float | str | None = None,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> AllActionsWithKL:
    """:func:`all_actions_objective`, and in the same pass the exact KL(policy || reference) of every step, (N, T).

    The reference is given as to :func:`flexrec.ops.ranking_logprobs.ranking_logprobs_with_kl`.
    """
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    lists = add_reference(lists, ref_hidden, ref_weight, ref_bias, ref_logits)
    objective, result = _evaluate(
        lists, lengths, gains, metric, num_ranked, topics, tilt, foresight, weight_grad=weight_grad, backend=backend
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
    foresight: float | str | None,
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
    shown = _check_num_ranked(num_ranked, n, t)
    per_ranking = None if lengths is None else lengths_per_ranking(lengths, n, len(lists.candidates), k)
    _check_tilt(tilt)
    _check_foresight(foresight, metric, tilt)
    if foresight is not None and weight_grad != "dense":
        raise ValueError(f"weight_grad={weight_grad!r} needs foresight=None, got {foresight!r}")

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

    by_numba = foresight is None and numba_reads(gains)
    ranked = check_gains(gains, per_ranking, shown)
    if not by_numba:
        check_gain_values(ranked, metric)
    check_topics(topics, metric, ranked)  # linear metrics take none
    dtype = accumulation_dtype(lists.hidden, lists.weight)
    if by_numba:
        values, factors, own = call_kernels("numba", "linear_values", ranked, metric, num_steps=t, dtype=dtype)
        result = evaluate_lists(lists, values, weight_grad=weight_grad, backend=backend)
        assert result.expectations is not None
        return (result.expectations * factors).sum(-1) - own, result
    parts = ingredients(ranked, metric)
    if foresight is not None:
        return _foreseen(lists, parts.weight * parts.inverse_norm, parts.discount, foresight)
    mean = parts.weight.sum(-1, keepdim=True) / parts.length.clamp(min=1)
    centred = torch.where(parts.inside, parts.weight - mean, 0.0) * parts.inverse_norm
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


def _foreseen(lists: RankedLists, gains: Tensor, discount: Tensor, foresight: float | str) -> tuple[Tensor, Results]:
    """The corrected objective; term gains, normalised, and discounts (N, K)."""
    log_probs, pool = step_log_probs(lists)
    probs = in_rank_order(torch.where(pool, log_probs.exp(), 0.0), lists.position)  # (N, T, K)
    result = from_distribution(log_probs, pool, lists)
    with torch.no_grad():
        present = probs.double()
        length = lists.position.amax(1) + 1  # (N,)
        guesses = guesses_of_the_rest(present, gains, discount, length)
        weight: float | Tensor
        if isinstance(foresight, str):
            surprises = [unforeseen(present, gains, discount, guess) for guess in guesses]
            weight = _weight_from_others(surprises[0], surprises[1], len(lists.candidates))[:, None, None]
        else:
            weight = foresight
        rest = torch.lerp(guesses[0], guesses[1], torch.as_tensor(weight, dtype=gains.dtype, device=gains.device))
        surprise = unforeseen(present, gains, discount, rest)  # (N, T)
        # Q_k - h_k(a_k) is what was not foreseen at k and at all later steps.
        correction = surprise.flip(1).cumsum(1).flip(1)
        values = discount[:, : probs.shape[1], None] * gains[:, None] + rest  # (N, T, K)
        values = (values - values.diagonal(dim1=1, dim2=2)[..., None]).to(probs.dtype)  # what was placed counts as 0
    logprobs = result.logprobs
    of_sampled = (logprobs - logprobs.detach()) * correction.to(logprobs.dtype)
    return (probs * values).sum(-1) + of_sampled, result


def guesses_of_the_rest(probs: Tensor, gains: Tensor, discount: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """What the ranks behind each step earn if a candidate is placed there: F^any and F^race, both (N, T, K).

    Args:
        probs: (N, T, K) float64 in rank order, the distribution of every step, 0 outside of the pool.
        gains: (N, K) float64 in rank order, normalised term gains, 0 beyond a list's length.
        discount: (N, K) float64, 0 at ranks that are not shown.
        length: (N,) integer, how many candidates there are.

    Returns:
        float64; finite everywhere, and of no meaning for candidates that are not in the pool.
    """
    steps, size = probs.shape[1:]
    later = discount.flip(1).cumsum(1).flip(1) - discount  # (N, K), of all ranks behind
    in_pool = torch.ones(size, size, dtype=torch.bool, device=probs.device).triu()[:steps]  # (T, K)
    others = (length[:, None] - torch.arange(steps, device=probs.device) - 1).clamp(min=1)  # (N, T)
    left = gains.flip(1).cumsum(1).flip(1)[:, :steps, None] - gains[:, None]  # (N, T, K) besides j
    any_order = left * (later[:, :steps] / others)[..., None]

    race = torch.zeros_like(probs)
    for k in range(steps - 1):
        race[:, k] = _race(probs[:, k], torch.where(in_pool[k], gains, 0.0), discount[:, k + 1 : steps])
    return any_order, race


_NEWTON = 5
_NEVER = 1e200


def _race(speeds: Tensor, gains: Tensor, discount: Tensor) -> Tensor:
    """(N, K): the discounted gains of the others' order of arrival, for each candidate left out.

    ``speeds`` and ``gains`` (N, K) are 0 outside of the pool; ``discount`` (N, M) of the next ranks.
    """
    runners = (speeds > 0).sum(1, keepdim=True)  # (N, 1)
    time = torch.zeros_like(speeds[:, :1])
    # Of all candidates by the present time: how many have arrived, with which gain; and each without itself.
    count, total = time, time  # (N, 1)
    alone = torch.zeros_like(speeds)  # (N, K) probability that the one left out has arrived
    found, earned = torch.zeros_like(speeds), torch.zeros_like(speeds)
    ranks = discount.shape[1]
    for m in range(1, ranks + 2):
        for _ in range(_NEWTON):  # the number of arrivals is concave: from below, no step goes too far
            staying = (-speeds * time).exp() * (speeds > 0)  # (N, K)
            pace = (speeds * staying).sum(1, keepdim=True)
            missing = m - (runners - staying.sum(1, keepdim=True))
            time = (time + missing.clamp(min=0) / pace.clamp(min=1 / _NEVER)).clamp(max=_NEVER)
        time = torch.where(m < runners, time, _NEVER)
        gone = torch.where(speeds > 0, -torch.expm1(-speeds * time), 0.0)
        next_count, next_total = gone.sum(1, keepdim=True), (gone * gains).sum(1, keepdim=True)
        if m > 1:
            # Place m - 1 of the others is taken between the two times.
            before, after = count - alone, next_count - gone  # (N, K)
            share = ((m - 1 - before) / (after - before).clamp(min=1e-9)).clamp(0, 1)
            by_now = torch.lerp(total - alone * gains, next_total - gone * gains, share)
            found = found + discount[:, m - 2 : m - 1] * (by_now - earned)
            earned = by_now
        count, total, alone = next_count, next_total, gone
    return found


def unforeseen(probs: Tensor, gains: Tensor, discount: Tensor, rest: Tensor) -> Tensor:
    """(N, T): what the state after each step promises more than was expected to follow, V_{k+1} - F_k(a_k).

    Arguments as of :func:`guesses_of_the_rest`; ``rest`` (N, T, K) is what was expected.
    """
    steps = probs.shape[1]
    promised = (probs * (discount[:, :steps, None] * gains[:, None] + rest)).sum(-1)  # (N, T)
    return torch.nn.functional.pad(promised[:, 1:], (0, 1)) - rest.diagonal(dim1=1, dim2=2)


def _weight_from_others(of_any: Tensor, of_race: Tensor, num_prompts: int) -> Tensor:
    """(N,) the weight of the second guess by least squares of what was not foreseen (N, T), on the other half of the
    prompts."""
    n = len(of_any)
    prompt = torch.arange(n, device=of_any.device) * num_prompts // max(n, 1)
    change = of_race - of_any
    weights = torch.ones_like(of_any[:, 0])
    for half in (0, 1):
        others = prompt % 2 != half
        fit, size = -(of_any * change)[others].sum(), change[others].square().sum()
        found = torch.where(size > 0, fit / size.clamp(min=1 / _NEVER), 1.0)
        weights = torch.where(prompt % 2 == half, found, weights)
    return weights


def _check_foresight(foresight: float | str | None, metric: Metric, tilt: float | None) -> None:
    if foresight is None:
        return
    if foresight != "auto":
        check_number("foresight", foresight)
        if not 0 <= float(foresight) <= 1:
            raise ValueError(f"foresight must lie in [0, 1], or be 'auto' or None, got {foresight}")
    if metric.definition.form != "linear":
        linear = ", ".join(name for name, family in FAMILIES.items() if family.form == "linear")
        raise ValueError(f"foresight needs a metric that is linear in its items ({linear}), got {metric}")
    if tilt is not None:
        raise ValueError(f"foresight corrects the expected value, without tilt: got tilt={tilt}")


def _check_tilt(tilt: float | None) -> None:
    if tilt is None:
        return
    check_number("tilt", tilt)
    if not MIN_TILT <= tilt < math.inf:
        raise ValueError(
            f"tilt must be positive and finite, and at least {MIN_TILT:g}, or None for the expectation; got {tilt}"
        )


def _check_num_ranked(num_ranked: int | Tensor | None, n: int, t: int) -> int | Tensor:
    """How many ranks are shown, at most T: of all, or (N,) int64."""
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
    return num_ranked
