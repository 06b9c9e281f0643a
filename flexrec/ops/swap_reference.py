"""Swap rewards in torch: the closed forms, O(K) per list for every built-in metric, on any device.

Derivation
----------
Ranks are 1-based; d_k is the discount of rank k (0 beyond cutoff, ``num_ranked`` and length), w_k the term gain of the
item there, Z the normaliser. S[k, j] = R(y) - R(y with ranks k and j exchanged). Below k < j and Z = 1; the causal
reward needs later_k = sum over j > k of S[k, j], the non-causal one earlier_k = sum over j < k of S[j, k] as well. n is
the number of candidates behind k, "sum" without bounds runs over j > k.

Linear metrics (dcg, ndcg, recall, precision, rbp): R = sum d_k w_k, hence
    S[k, j] = (d_k - d_j) (w_k - w_j)
    later_k = d_k (n w_k - sum w_j) - (w_k sum d_j - sum d_j w_j),
  three suffix sums. Adding a constant to w changes nothing but the rounding, so w is centred first, on one of the
  list's own values: ties then give exactly 0. earlier_k is the
  same with prefix sums, by symmetry.

First relevant item (mrr: d_k = 1/k; hit_rate: d_k = 1): R = d_f, f the first rank with w = 1; s is the second such
  rank, d_s = 0 if there is none. As d falls, d at rank min(j, s) is max(d_j, d_s).
    w_k = 1, w_j = 0:  the item moves back.  k = f: S = d_f - max(d_j, d_s).  k > f: S = 0.
    w_k = 0, w_j = 1:  one moves forward.    k < f: S = d_f - d_k.            k > f: S = 0.
  later_k = (number of relevant items) (d_f - d_k) before f; at f the sum of d_f - max(d_j, d_s) over irrelevant j; 0
  behind. earlier_k = sum over j < f of d_f - d_j at relevant ranks (at f too), d_f - max(d_k, d_s) at irrelevant
  ranks behind f, 0 before f.

Average precision (map: d_k = 1/k): R = sum d_k w_k c_k with c_k the relevant items among the first k; H_k = sum of
  d_i w_i over i <= k. Moving a relevant item from k back to j loses its term d_k c_k, lowers c by one at the relevant
  ranks between, and gains the term d_j c_j:
    w_k = 1, w_j = 0:  S = d_k c_k + (H_j - H_k) - d_j c_j                 = E_k - E_j,   E_i = d_i c_i - H_i
    w_k = 0, w_j = 1:  S = d_j c_j - d_k (c_k + 1) - (H_j - d_j - H_k)     = F_j - F_k,   F_i = E_i + d_i
  so the sums are suffix (or prefix) sums of E over irrelevant ranks and of F over relevant ones.

Cascade (err: d_k = 1/k, w = theta): let P_k be the product of (1 - theta_i) over i < k, Q_kj that over k < i < j, and
  M_kj = sum over k < i < j of d_i theta_i Q_ki. From rank k on the old and the new order are worth
    old: d_k theta_k + (1 - theta_k) (M + Q d_j theta_j) + (1 - theta_k) Q (1 - theta_j) (what follows j)
    new: d_k theta_j + (1 - theta_j) (M + Q d_j theta_k) + (1 - theta_j) Q (1 - theta_k) (what follows j)
    S[k, j] = P_k (theta_k - theta_j) (d_k - G_kj),   G_kj = M_kj + Q_kj d_j.
  The factor theta_k - theta_j does not feel a constant either: let x = theta - theta_1, so that ties give exactly 0.
  With Gamma^y_k = sum over j > k of y_j G_kj for y = 1 and y = x,
    later_k = P_k [d_k (n x_k - sum x_j) - x_k Gamma^1_k + Gamma^x_k].
  G_{k,k+1} = d_{k+1} and G_kj = d_{k+1} theta_{k+1} + (1 - theta_{k+1}) G_{k+1,j}, hence backwards
    Gamma^y_k = y_{k+1} d_{k+1} + d_{k+1} theta_{k+1} sum_{j > k+1} y_j + (1 - theta_{k+1}) Gamma^y_{k+1}.
  Never dividing by a product of (1 - theta), which underflows. For earlier_k, forwards, again with y = 1 and y = x:
    A^y_k = sum_{j<k} P_j y_j d_j,  B^y_k = sum_{j<k} P_j y_j M_jk,  C^y_k = sum_{j<k} P_j y_j Q_jk;
    B_{k+1} = B_k + C_k d_k theta_k,  C_{k+1} = (1 - theta_k) C_k + P_k y_k,
    earlier_k = (A^x - B^x - C^x d_k) - x_k (A^1 - B^1 - C^1 d_k).

Topics (alpha_ndcg: d_k = 1/log2(k+1), alpha = 1/2; err_ia: d_k = 1/k, alpha = 1): with p_c the weight of topic c and
  a_kc = w_k m_kc what the item at rank k is worth to it,
    R = sum_c p_c sum_k d_k a_kc P_kc,   P_kc the product of (1 - alpha a_ic) over i < k:
  a cascade for each topic, in which an item is passed with 1 - alpha a instead of 1 - theta. The derivation above holds
  with it, for what an item uses up of a topic is proportional to what it is worth to it: the order of two items then
  matters through the difference a_k - a_j alone,
    S[k, j] = sum_c p_c P_kc (a_kc - a_jc) (d_k - G_kjc),   G_kjc = alpha M_kjc + Q_kjc d_j
  (that (1 - alpha a_k) a_j - (1 - alpha a_j) a_k = a_j - a_k is all that is needed). So the sums over the pool, ranked
  later and never ranked alike, take O(K C) per list, and the scores of all pairs O(K^2 C). From the cutoff on d is 0:
  there G_kjc depends on k alone, and scores are linear in a_j.

Variance: with independent gain variances v_i and the normaliser held fixed, a reward that is linear in the term gains,
r_k = sum_i a_ki w_i, has Var[r_k] = sum_i a_ki^2 v_i. For causal swaps a_kk = mean over j > k of (d_k - d_j) and
a_kj = -(d_k - d_j) / n, so that
    Var[r_k] = a_kk^2 v_k + (d_k^2 V - 2 d_k V' + V'') / n^2,   V, V', V'' = sums over j > k of v_j, d_j v_j, d_j^2 v_j:
  O(K) per list. The other credits change only which ranks the sums run over. err's R, with any two ranks exchanged too,
  is linear in each theta_i while the others are held, so that its slope is the difference between theta_i = 1 and 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from flexrec.checks import check_finite
from flexrec.metrics import LN2, TINY, Metric
from flexrec.ops.ranking_metric import (
    Ingredients,
    Lists,
    Topics,
    ingredients,
    metric_terms,
    of_registered,
    reach,
)


def _before(x: torch.Tensor) -> torch.Tensor:
    """(N, K): sum of x over the ranks before each."""
    return x.cumsum(-1) - x


def _behind(x: torch.Tensor) -> torch.Tensor:
    """(N, K): sum of x over the ranks behind each."""
    return _before(x.flip(-1)).flip(-1)


def _recur(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, K): x_k = a_k + b_k x_{k-1} with x_0 = 0, by doubling: log2(K) steps over whole rows."""
    step = 1
    while step < a.shape[1]:
        a = torch.cat([a[:, :step], a[:, step:] + b[:, step:] * a[:, :-step]], dim=-1)
        b = torch.cat([b[:, :step], b[:, step:] * b[:, :-step]], dim=-1)
        step *= 2
    return a


def _shift(x: torch.Tensor) -> torch.Tensor:
    """(N, K): x of the rank before, 0 at the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=-1)


def _linear_sums(parts: Ingredients) -> tuple[torch.Tensor, torch.Tensor]:
    d, inside = parts.discount, parts.inside  # (N, K)
    w = torch.where(inside, parts.weight - parts.weight[:, :1], 0.0)  # (N, K)

    def sums(over: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return d * (over(inside.double()) * w - over(w)) - (w * over(d) - over(d * w))

    return sums(_behind), sums(_before)


def _first_sums(parts: Ingredients) -> tuple[torch.Tensor, torch.Tensor]:
    d, w = parts.discount, parts.weight  # (N, K)
    count = w.cumsum(-1)  # (N, K)
    first, ahead = w * (count == 1), count == 0  # (N, K)
    d_first = (d * first).sum(-1, keepdim=True)  # (N, 1)
    d_second = (d * w * (count == 2)).sum(-1, keepdim=True)  # (N, 1)
    rise = torch.where(ahead, d_first - d, 0.0)  # (N, K)
    fall = torch.where(parts.inside & ~ahead & (w == 0), d_first - torch.maximum(d, d_second), 0.0)  # (N, K)
    later = w.sum(-1, keepdim=True) * rise + first * fall.sum(-1, keepdim=True)
    earlier = w * rise.sum(-1, keepdim=True) + fall
    return later, earlier


def _average_precision_sums(parts: Ingredients) -> tuple[torch.Tensor, torch.Tensor]:
    d, one = parts.discount, parts.weight  # (N, K)
    zero = parts.inside.double() - one  # (N, K), irrelevant
    e = d * one.cumsum(-1) - (d * one).cumsum(-1)  # (N, K)
    f = e + d
    later = one * (_behind(zero) * e - _behind(zero * e)) + zero * (_behind(one * f) - _behind(one) * f)
    earlier = zero * (_before(one * e) - _before(one) * e) + one * (_before(zero) * f - _before(zero * f))
    return later, earlier


def _cascade_sums(parts: Ingredients) -> tuple[torch.Tensor, torch.Tensor]:
    d, w, one = parts.discount, parts.weight, parts.inside.double()  # (N, K)
    theta = parts.decay * w  # (N, K)
    x = torch.where(parts.inside, w - w[:, :1], 0.0)  # (N, K)
    go_on, reached = 1.0 - theta, reach(theta)  # (N, K)

    def gamma(y: torch.Tensor) -> torch.Tensor:
        added = y * d + d * theta * _behind(y)  # what rank k + 1 adds
        return _shift(_recur(added.flip(-1), go_on.flip(-1))).flip(-1)

    def lost(y: torch.Tensor) -> torch.Tensor:  # A - B - C d
        c = _shift(_recur(reached * y, go_on))
        return _before(reached * y * d) - _before(c * d * theta) - c * d

    later = reached * (d * (_behind(one) * x - _behind(x)) - x * gamma(one) + gamma(x))
    return later, lost(x) - x * lost(one)


def _topic_sums(parts: Ingredients) -> tuple[torch.Tensor, torch.Tensor]:
    later, earlier = _cascade_sums(parts.by_topic())
    return parts.over_topics(later), parts.over_topics(earlier)


_SUMS = {
    "linear": _linear_sums,
    "first": _first_sums,
    "average_precision": _average_precision_sums,
    "cascade": _cascade_sums,
    "topics": _topic_sums,
}


def _scores_of_later(parts: Ingredients, form: str) -> torch.Tensor:
    """(N, K, K) float64: S[k, j] for k < j; what lies on or below the diagonal is meaningless."""
    d, w = parts.discount, parts.weight
    d_k, d_j, w_k, w_j = d[:, :, None], d[:, None, :], w[:, :, None], w[:, None, :]
    if form == "linear":
        return (d_k - d_j) * (w_k - w_j)
    if form in ("cascade", "topics"):
        each, columns = w[:, None], []  # (N, C, K): err has a single topic
        weights = torch.ones_like(w[:, :1])  # (N, C)
        if form == "topics":
            each, weights = each * parts.about.transpose(1, 2), parts.topic_weights
        used = parts.decay * each
        reached, g = reach(used), torch.zeros_like(each)  # (N, C, K): G_kj over j
        for k in range(d.shape[1] - 1, -1, -1):
            lost = (each[:, :, k, None] - each) * (d[:, None, k, None] - g)  # (N, C, K)
            columns.append(((weights * reached[:, :, k])[:, :, None] * lost).sum(1))
            g = d[:, None, k, None] * used[:, :, k, None] + (1.0 - used[:, :, k, None]) * g
            g[:, :, k] = d[:, None, k]
        return torch.stack(columns[::-1], dim=1) if columns else d_k * d_j
    count = w.cumsum(-1)  # (N, K)
    back, forward = w_k * (1.0 - w_j), (1.0 - w_k) * w_j  # (N, K, K): a relevant item moves to j, to k
    if form == "first":
        d_first = (d * w * (count == 1)).sum(-1)[:, None, None]
        d_second = (d * w * (count == 2)).sum(-1)[:, None, None]
        back = back * (count == 1)[:, :, None]
        forward = forward * (count == 0)[:, :, None]
        return back * (d_first - torch.maximum(d_j, d_second)) + forward * (d_first - d_k)
    e = d * count - (d * w).cumsum(-1)  # (N, K)
    f = e + d
    return back * (e[:, :, None] - e[:, None, :]) + forward * (f[:, None, :] - f[:, :, None])


def scores_of(parts: Ingredients, metric: Metric) -> torch.Tensor:
    """(N, K, K) float64: the swap scores of a built-in metric."""
    scores = _scores_of_later(parts, metric.definition.form) * parts.inverse_norm[:, :, None]
    scores = torch.where(parts.inside[:, :, None] & parts.inside[:, None, :], scores, 0.0).triu(1)
    return scores + scores.transpose(1, 2)


def _credit_terms(terms: torch.Tensor, total: torch.Tensor, credit: str) -> torch.Tensor:
    """(N, K): "independent", "rank" or "sequence" rewards from the terms (N, K) of R and R itself (N, 1)."""
    if credit == "sequence":
        return total.expand_as(terms)
    return terms if credit == "independent" else _behind(terms) + terms


def _credit_sums(later: torch.Tensor, earlier: torch.Tensor, length: torch.Tensor, credit: str) -> torch.Tensor:
    """(N, K): "swap" or "noncausal" rewards, means over the pool from the sums (N, K) of swap scores over it."""
    if credit == "swap":
        position = torch.arange(later.shape[1], device=later.device)  # (K,)
        return later / (length - 1 - position).clamp(min=1)
    return (later + earlier) / (length - 1).clamp(min=1)


def _credit_scores(scores: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """(N, K): "policy" rewards from the swap scores (N, K, K) and the ``policy_shares``."""
    return (scores * shares).sum(-1)


def policy_shares(weights: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """(N, K, K) float64: the weights of each rank k over j > k inside the list, summing to 1 (to 0 if all are 0)."""
    position = torch.arange(weights.shape[1], device=weights.device)  # (K,)
    behind = (position > position[:, None]) & (position < length[:, :, None])  # (N, K, K)
    weight = torch.where(behind, weights.double(), 0.0)
    return weight / weight.sum(-1, keepdim=True).clamp(min=TINY)


def rewards_of(parts: Ingredients, metric: Metric, credit: str, weights: torch.Tensor | None) -> torch.Tensor:
    """(N, K) float64: the rewards of a built-in metric."""
    if credit in ("independent", "rank", "sequence"):
        terms = metric_terms(parts, metric)
        rewards = _credit_terms(terms, terms.sum(-1, keepdim=True), credit)
    elif credit == "policy":
        assert weights is not None
        rewards = _credit_scores(scores_of(parts, metric), policy_shares(weights, parts.length))
    else:
        later, earlier = _SUMS[metric.definition.form](parts)
        rewards = _credit_sums(later, earlier, parts.length, credit) * parts.inverse_norm
    return _only_ranked(rewards, parts.num_ranked)


def custom_rewards(lists: Lists, metric: Metric, credit: str, weights: torch.Tensor | None) -> torch.Tensor:
    """(N, K) float64: the rewards of a registered metric."""
    length = lists.real_lengths[:, None]  # (N, 1)
    if credit in ("independent", "rank", "sequence"):
        values = of_registered("custom_prefix_values", lists, metric)  # (N, K + 1)
        rewards = _credit_terms(values.diff(dim=-1), values[:, -1:], credit)
    else:
        scores = of_registered("custom_swap_scores", lists, metric)  # (N, K, K)
        if credit == "policy":
            assert weights is not None
            rewards = _credit_scores(scores, policy_shares(weights, length))
        else:
            rewards = _credit_sums(scores.triu().sum(-1), scores.tril().sum(-1), length, credit)
    check_finite(f"the rewards of metric {metric}", rewards)
    return _only_ranked(rewards, lists.real_ranked[:, None])


def _only_ranked(rewards: torch.Tensor, num_ranked: torch.Tensor) -> torch.Tensor:
    position = torch.arange(rewards.shape[1], device=rewards.device)  # (K,)
    return torch.where(position < num_ranked, rewards, 0.0)


def torch_rewards(
    lists: Lists,
    metric: Metric,
    credit: str,
    weights: torch.Tensor | None,
    variance: torch.Tensor | None,
    topics: Topics | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(N, K) float64 rewards of a built-in metric and, where that of the gains is given, their variance."""
    definition = metric.definition
    parts = ingredients(lists, metric, probabilities=variance is not None, topics=topics)
    rewards = rewards_of(parts, metric, credit, weights)
    if variance is None:
        return rewards, None
    v = torch.where(parts.inside, variance.double(), 0.0)  # (N, K), of the gain ..
    if definition.gain in ("burges", "burges_scaled", "stop"):
        # .. and of the term gain: d/dg 2^g = ln 2 x 2^g, over 2^top where the term gains are.
        g = torch.where(parts.inside, lists.gains.double(), 0.0)
        if definition.gain != "burges" and g.shape[1]:
            g = g - (g.amax(-1, keepdim=True) if metric.max_gain is None else metric.max_gain)
        v = v * (LN2 * torch.exp2(g)) ** 2
    if definition.form == "cascade":
        spread = _first_order_variance(parts, v, metric, credit, weights)
    else:
        spread = _linear_variance(parts, v, credit, weights) * parts.inverse_norm**2
    return rewards, _only_ranked(spread, parts.num_ranked)


def _linear_variance(parts: Ingredients, v: torch.Tensor, credit: str, weights: torch.Tensor | None) -> torch.Tensor:
    """(N, K) float64: Var[r_k] times the squared normaliser, from the variances v (N, K) of the term gains."""
    d, inside = parts.discount, parts.inside.double()  # (N, K)
    if credit == "policy":
        assert weights is not None
        effect = policy_shares(weights, parts.length) * (d[:, :, None] - d[:, None, :])  # (N, K, K)
        return effect.sum(-1) ** 2 * v + (effect**2 * v[:, None, :]).sum(-1)
    if credit == "independent":
        return d**2 * v

    def pool(x: torch.Tensor) -> torch.Tensor:  # (N, K): sum over the ranks that k is compared with
        total = x.sum(-1, keepdim=True)
        return total - x if credit == "noncausal" else x.flip(-1).cumsum(-1).flip(-1) - x

    if credit == "rank":
        return pool(d**2 * v) + d**2 * v
    if credit == "sequence":
        return (d**2 * v).sum(-1, keepdim=True).expand_as(v)
    n = pool(inside).clamp(min=1)  # (N, K)
    own = d * pool(inside) - pool(d)  # (N, K)
    others = d**2 * pool(v) - 2 * d * pool(d * v) + pool(d**2 * v)  # (N, K)
    return (own**2 * v + others.clamp(min=0)) / n**2


def _first_order_variance(
    parts: Ingredients, v: torch.Tensor, metric: Metric, credit: str, weights: torch.Tensor | None
) -> torch.Tensor:
    """(N, K) float64: sum over i of (d r_k / d w_i)^2 v_i."""
    spread = torch.zeros_like(v)
    for i in range(v.shape[1]):
        at_one, at_zero = parts.weight.clone(), parts.weight.clone()
        at_one[:, i], at_zero[:, i] = 1.0, 0.0
        high, low = (rewards_of(replace(parts, weight=w), metric, credit, weights) for w in (at_one, at_zero))
        spread += (high - low) ** 2 * v[:, i, None]
    return spread
