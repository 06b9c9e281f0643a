"""Swap rewards: what each ranked item is worth at its rank, in O(K) per list for every built-in metric.

Derivation
----------
Ranks are 1-based; d_k is the discount of rank k (0 beyond cutoff, ``num_ranked`` and length), w_k the term gain of the
item there, Z the normaliser. S[k, j] = R(y) - R(y with ranks k and j exchanged). Below k < j and Z = 1; the causal
reward needs later_k = sum over j > k of S[k, j], the non-causal one earlier_k = sum over j < k of S[j, k] as well. n is
the number of candidates behind k, "sum" without bounds runs over j > k.

Linear metrics (dcg, ndcg, recall, precision, rbp): R = sum d_k w_k, hence
    S[k, j] = (d_k - d_j) (w_k - w_j)
    later_k = d_k (n w_k - sum w_j) - (w_k sum d_j - sum d_j w_j),
  three suffix sums. Adding a constant to w changes nothing but the rounding, so w is centred first. earlier_k is the
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
  With Gamma^x_k = sum over j > k of x_j G_kj for x = 1 and x = theta,
    later_k = P_k [d_k (n theta_k - sum theta_j) - theta_k Gamma^1_k + Gamma^theta_k].
  G_{k,k+1} = d_{k+1} and G_kj = d_{k+1} theta_{k+1} + (1 - theta_{k+1}) G_{k+1,j}, hence backwards
    Gamma^x_k = x_{k+1} d_{k+1} + d_{k+1} theta_{k+1} sum_{j > k+1} x_j + (1 - theta_{k+1}) Gamma^x_{k+1}.
  Never dividing by a product of (1 - theta), which underflows. For earlier_k, forwards, with y = 1 and y = theta:
    A^y_k = sum_{j<k} P_j y_j d_j,  B^y_k = sum_{j<k} P_j y_j M_jk,  C^y_k = sum_{j<k} P_j y_j Q_jk;
    B_{k+1} = B_k + C_k d_k theta_k,  C_{k+1} = (1 - theta_k) C_k + P_k y_k,
    earlier_k = (A^theta - B^theta - C^theta d_k) - theta_k (A^1 - B^1 - C^1 d_k).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import get_num_threads

from flexrec import metrics
from flexrec.metrics import Ingredients, Lists, Metric, check_lists, ingredients, metric_terms, parse_metric
from flexrec.ops import swap_rewards_numba as kernels
from flexrec.validation import check_choice, check_finite, check_range, check_tensor

CREDITS = ("swap", "noncausal", "independent", "rank", "sequence", "policy")
BACKENDS = ("auto", "triton", "numba", "torch")
MAX_TRITON_SIZE = 16384  # a list lies in one program's registers


# ---------------------------------------------------------------------------------------------- reference in torch


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
    mean = parts.weight.sum(-1, keepdim=True) / parts.length.clamp(min=1)  # (N, 1)
    w = torch.where(inside, parts.weight - mean, 0.0)  # (N, K)

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
    d, theta, inside = parts.discount, parts.weight, parts.inside.double()  # (N, K)
    go_on, reach = 1.0 - theta, metrics.reach(theta)  # (N, K)

    def gamma(x: torch.Tensor) -> torch.Tensor:  # what rank k+1 adds, seen from the end of the list
        added = x * d + d * theta * _behind(x)
        return _shift(_recur(added.flip(-1), go_on.flip(-1))).flip(-1)

    later = reach * (d * (_behind(inside) * theta - _behind(theta)) - theta * gamma(inside) + gamma(theta))

    def lost(y: torch.Tensor) -> torch.Tensor:  # A - B - C d
        c = _shift(_recur(reach * y, torch.cat([torch.zeros_like(go_on[:, :1]), go_on[:, 1:]], dim=-1)))
        return _before(reach * y * d) - _before(c * d * theta) - c * d

    return later, lost(theta) - theta * lost(inside)


_SUMS = {
    "linear": _linear_sums,
    "first": _first_sums,
    "average_precision": _average_precision_sums,
    "cascade": _cascade_sums,
}


def swap_sums(parts: Ingredients, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K), (N, K) float64: sums of the swap scores of each rank with all later and with all earlier ranks."""
    later, earlier = _SUMS[metric.definition.form](parts)
    return later * parts.inverse_norm, earlier * parts.inverse_norm


def _scores_of_later(parts: Ingredients, metric: Metric) -> torch.Tensor:
    """(N, K, K) float64: S[k, j] for k < j; what lies on or below the diagonal is meaningless."""
    d, w, form = parts.discount, parts.weight, metric.definition.form
    d_k, d_j, w_k, w_j = d[:, :, None], d[:, None, :], w[:, :, None], w[:, None, :]
    if form == "linear":
        return (d_k - d_j) * (w_k - w_j)
    if form == "cascade":
        columns = []
        g = torch.zeros_like(d)  # (N, K): G_kj over j
        for k in range(d.shape[1] - 1, -1, -1):
            columns.append(metrics.reach(w)[:, k, None] * (w[:, k, None] - w) * (d[:, k, None] - g))
            g = d[:, k, None] * w[:, k, None] + (1.0 - w[:, k, None]) * g
            g[:, k] = d[:, k]
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


def _torch_swap_scores(lists: Lists, metric: Metric) -> torch.Tensor:
    """(N, K, K) float64."""
    if metric.definition.form == "custom":
        scores = metrics.custom_swap_scores(lists, metric)
        check_finite(f"the swap scores of metric {metric}", scores)
        return scores
    parts = ingredients(lists, metric)
    scores = _scores_of_later(parts, metric) * parts.inverse_norm[:, :, None]
    scores = torch.where(parts.inside[:, :, None] & parts.inside[:, None, :], scores, 0.0).triu(1)
    return scores + scores.transpose(1, 2)


def rewards_of_sums(later: torch.Tensor, earlier: torch.Tensor, lists: Lists, credit: str) -> torch.Tensor:
    """(N, K): means over the pool, from sums of swap scores over it."""
    position = torch.arange(later.shape[1], device=later.device)  # (K,)
    length = lists.real_lengths[:, None]  # (N, 1)
    if credit == "swap":
        return later / (length - 1 - position).clamp(min=1)
    return (later + earlier) / (length - 1).clamp(min=1)


def _torch_swap_rewards(lists: Lists, metric: Metric, credit: str, weights: torch.Tensor | None) -> torch.Tensor:
    """(N, K) float64."""
    is_custom = metric.definition.form == "custom"
    position = torch.arange(lists.gains.shape[1], device=lists.gains.device)  # (K,)
    if credit in ("independent", "rank", "sequence"):
        if is_custom:
            values = metrics.custom_prefix_values(lists, metric)  # (N, K + 1)
            check_finite(f"the value of metric {metric}", values)
            total, terms = values[:, -1:], values.diff(dim=-1)
        else:
            terms = metric_terms(ingredients(lists, metric), metric)
            total = terms.sum(-1, keepdim=True)
        if credit == "sequence":
            rewards = total.expand_as(terms)
        else:
            rewards = terms if credit == "independent" else _behind(terms) + terms
    elif credit == "policy":
        assert weights is not None
        behind = (position > position[:, None]) & (position < lists.real_lengths[:, None, None])  # (N, K, K)
        weight = torch.where(behind, weights.double(), 0.0)
        total = weight.sum(-1)
        rewards = (weight * _torch_swap_scores(lists, metric)).sum(-1)
        rewards = torch.where(total > 0, rewards / total, 0.0)
    elif is_custom:
        scores = _torch_swap_scores(lists, metric)
        rewards = rewards_of_sums(scores.triu().sum(-1), scores.tril().sum(-1), lists, credit)
    else:
        later, earlier = swap_sums(ingredients(lists, metric), metric)
        rewards = rewards_of_sums(later, earlier, lists, credit)
    return torch.where(position < lists.real_ranked[:, None], rewards, 0.0)


# ------------------------------------------------------------------------------------------------------ the backends


def _numba_arguments(lists: Lists, metric: Metric) -> tuple:
    """The arguments that both numba kernels share, in their order."""
    gains = lists.gains if lists.gains.dtype == torch.float64 else lists.gains.float()
    rows, size = gains.shape
    array, lengths = gains.contiguous().numpy(), lists.real_lengths.numpy()
    definition, cutoff = metric.definition, size if metric.cutoff is None else metric.cutoff
    table, kind = metrics.discount_table(metric, size), kernels.GAINS[definition.gain]
    if definition.normaliser == "relevant":
        inverse = np.empty(0)  # the kernel counts in passing
    elif definition.normaliser == "ideal":
        bits = array.view(np.int64 if array.itemsize == 8 else np.int32)
        lanes = max(8, min(64, 2**16 // max(size, 1)))  # lists side by side, as many as the cache holds
        ideal = kernels.ideal_dcg(array, bits, lengths, table, cutoff, kind, lanes)
        inverse = np.where(ideal > metrics.TINY, 1.0 / np.maximum(ideal, metrics.TINY), 0.0)
    elif definition.normaliser == "cutoff":
        inverse = 1.0 / (np.maximum(lengths, 1.0) if metric.cutoff is None else np.full(rows, float(cutoff)))
    else:
        inverse = np.ones(rows)
    form, top = kernels.FORMS[definition.form], metric.max_gain or 0.0
    return array, lengths, lists.real_ranked.numpy(), inverse, table, cutoff, form, kind, top


def _numba_swap_rewards(lists: Lists, metric: Metric, credit: str, weights: torch.Tensor | None) -> torch.Tensor:
    arguments = _numba_arguments(lists, metric)
    if credit != "policy":
        chunks = min(lists.gains.shape[0], 8 * get_num_threads())
        return torch.from_numpy(kernels.swap_rewards(*arguments, kernels.CREDITS[credit], chunks))
    assert weights is not None
    dtype = metrics.result_dtype(lists.gains)
    means = kernels.swap_scores(*arguments, weights.detach().to(dtype).contiguous().numpy())
    return torch.from_numpy(means).squeeze(-1)


def _numba_swap_scores(lists: Lists, metric: Metric) -> torch.Tensor:
    arguments = _numba_arguments(lists, metric)
    return torch.from_numpy(kernels.swap_scores(*arguments, np.empty((0, 0, 0), dtype=arguments[0].dtype)))


def _triton_swap_rewards(lists: Lists, metric: Metric) -> torch.Tensor:
    from flexrec.triton_kernels.swap_rewards import swap_rewards_linear

    definition = metric.definition
    return swap_rewards_linear(
        lists.gains,
        lists.lengths,
        lists.num_ranked,
        max_ranked=lists.max_ranked,
        cutoff=metric.cutoff,
        discount=definition.discount,
        gain=definition.gain,
        normaliser=definition.normaliser,
        p=metric.p,
    )


def _triton_can(metric: Metric, credit: str, size: int) -> bool:
    return metric.definition.form == "linear" and credit == "swap" and size <= MAX_TRITON_SIZE


def _resolve_backend(backend: str, metric: Metric, credit: str, gains: torch.Tensor) -> str:
    """The backend that will run: "triton", "numba" or "torch"; ValueError if the one asked for cannot."""
    check_choice("backend", backend, BACKENDS)
    on_cpu, is_custom = gains.device.type == "cpu", metric.definition.form == "custom"
    able = _triton_can(metric, credit, gains.shape[1])
    if backend == "auto":
        if on_cpu or is_custom:  # a registered metric on a GPU fails below, with the reason
            backend = "numba"
        else:
            backend = "triton" if gains.is_cuda and able and _has_triton() else "torch"
    if is_custom and (backend != "numba" or not on_cpu):
        raise ValueError(
            f"metric {metric} is a registered one and runs with backend='numba' on CPU tensors only; "
            f"got backend={backend!r} and gains on {gains.device}"
        )
    if backend == "numba" and not on_cpu:
        raise ValueError(f"backend='numba' needs gains on the CPU, got {gains.device}; use 'auto', 'triton' or 'torch'")
    if backend == "triton":
        if not able:
            linear = ", ".join(name for name, family in metrics.FAMILIES.items() if family.form == "linear")
            raise ValueError(
                f"backend='triton' computes swap_rewards with credit='swap' for {linear} and K <= {MAX_TRITON_SIZE}; got "
                f"metric={str(metric)!r}, credit={credit!r}, K={gains.shape[1]}. backend='torch' computes all, anywhere"
            )
        if not _has_triton():
            raise ValueError("backend='triton' needs the triton package, which has no wheel for this platform")
        if not gains.is_cuda and not _triton_interprets():
            raise ValueError(
                f"backend='triton' needs gains on a GPU, got {gains.device}; on the CPU set TRITON_INTERPRET=1 before "
                "triton is imported, or use backend='numba'"
            )
    return backend


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _triton_interprets() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


# ------------------------------------------------------------------------------------- registration as custom ops


def _rewards(
    gains: torch.Tensor,
    metric: str,
    credit: str,
    lengths: torch.Tensor | None,
    num_ranked: torch.Tensor | None,
    max_ranked: int,
    weights: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    lists, parsed = Lists(gains, lengths, num_ranked, max_ranked), parse_metric(metric)
    if backend == "triton":
        return _triton_swap_rewards(lists, parsed)
    if backend == "numba" and parsed.definition.form != "custom":
        return _numba_swap_rewards(lists, parsed, credit, weights)
    return _torch_swap_rewards(lists, parsed, credit, weights).to(metrics.result_dtype(gains))


def _scores(
    gains: torch.Tensor,
    metric: str,
    lengths: torch.Tensor | None,
    num_ranked: torch.Tensor | None,
    max_ranked: int,
    backend: str,
) -> torch.Tensor:
    lists, parsed = Lists(gains, lengths, num_ranked, max_ranked), parse_metric(metric)
    if backend == "numba" and parsed.definition.form != "custom":
        return _numba_swap_scores(lists, parsed)
    return _torch_swap_scores(lists, parsed).to(metrics.result_dtype(gains))


swap_rewards_op = torch.library.custom_op("flexrec::swap_rewards", _rewards, mutates_args=())
swap_scores_op = torch.library.custom_op("flexrec::swap_scores", _scores, mutates_args=())


@swap_rewards_op.register_fake
def _(gains: torch.Tensor, *_: object) -> torch.Tensor:
    return gains.new_empty(gains.shape, dtype=metrics.result_dtype(gains))


@swap_scores_op.register_fake
def _(gains: torch.Tensor, *_: object) -> torch.Tensor:
    return gains.new_empty((*gains.shape, gains.shape[1]), dtype=metrics.result_dtype(gains))


def _is_traced(gains: torch.Tensor) -> bool:
    """Whether the registered op must be called; otherwise its function is, which saves torch.library's overhead."""
    return torch.compiler.is_compiling() or type(gains) is not torch.Tensor


# --------------------------------------------------------------------------------------------- the public functions


def swap_rewards(
    gains: torch.Tensor,
    metric: str | Metric,
    *,
    credit: str = "swap",
    lengths: int | torch.Tensor | None = None,
    num_ranked: int | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The reward of each ranked item: how much better the ranking is than with that item exchanged for another.

    With S[k, j] = R(y) - R(y with ranks k and j exchanged), in the units of the metric R:

    - ``"swap"``: mean of S[k, j] over j > k, the candidates still in the pool (causal swaps: arXiv 2603.11901);
    - ``"noncausal"``: mean over all j != k;
    - ``"policy"``: mean over j > k weighted by ``weights[n, k, j]``; 0 where these sum to 0;
    - ``"independent"``: the term of rank k, what R gains when rank k is shown besides ranks 1..k-1;
    - ``"rank"``: the sum of the terms from rank k on (Rank-GRPO);
    - ``"sequence"``: R, the same for every rank (Rec-R1).

    Args:
        gains: (N, K) floating, >= 0; the gain of the item at each rank. Any device.
        metric: a name such as "ndcg@10" (see ``flexrec.metrics``), or a registered one (CPU only, O(K^2) evaluations).
        credit: one of the above. All are O(K) per list (ndcg sorts besides), "policy" is O(K^2).
        lengths: int or (N,) integer, the number of candidates of each list. What lies beyond is ignored, reward 0.
        num_ranked: int or (N,) integer, how many ranks T are shown. Ranks beyond have discount 0 and reward 0, and
            their items stay in the pool.
        weights: (N, K, K) floating, >= 0, with ``credit="policy"`` only. Entries with j <= k are ignored.
        backend: "auto" (Triton on a GPU where it can, else torch there; numba on the CPU), "triton" (linear metrics,
            credit "swap"; also on the CPU under TRITON_INTERPRET=1), "numba" (CPU), "torch" (anywhere).

    Returns:
        (N, K) float64 for float64 gains, else float32 (also for half precision). No gradient. Sums are accumulated in
        float64; by the Triton kernel in float32 on centred gains, unless the gains are float64.

    Raises:
        ValueError, TypeError: unknown name, wrong shape or dtype, a value out of its range, a backend that cannot do
            what is asked. Values on a GPU are checked only where ``flexrec.validation`` is told to.
    """
    metric = parse_metric(metric)
    check_choice("credit", credit, CREDITS)
    lists = check_lists(gains, metric, lengths, num_ranked)
    check_policy_weights(weights, credit, lists)
    backend = _resolve_backend(backend, metric, credit, lists.gains)
    call = swap_rewards_op if _is_traced(gains) else _rewards
    detached = None if weights is None else weights.detach()
    return call(
        lists.gains, str(metric), credit, lists.lengths, lists.num_ranked, lists.max_ranked, detached, backend
    )


def check_policy_weights(weights: torch.Tensor | None, credit: str, lists: Lists) -> None:
    """``weights`` go with ``credit="policy"`` and no other: (N, K, K), >= 0 where j > k lies inside the list."""
    if (weights is None) == (credit == "policy"):
        got = "none" if weights is None else "some"
        raise ValueError(f"weights are needed with credit='policy' and only then; got {got} with credit={credit!r}")
    if weights is None:
        return
    rows, size = lists.gains.shape
    check_tensor("weights", weights, (rows, size, size))
    if weights.device != lists.gains.device:
        raise ValueError(f"weights must be on the device of gains, {lists.gains.device}; got {weights.device}")
    position = torch.arange(size, device=weights.device)
    used = (position > position[:, None]) & (position < lists.real_lengths[:, None, None])  # (N, K, K)
    check_finite("weights", weights, used)
    check_range("weights", weights, 0.0, metrics.MAX_GAIN, used)


def swap_scores(
    gains: torch.Tensor,
    metric: str | Metric,
    *,
    lengths: int | torch.Tensor | None = None,
    num_ranked: int | torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """S[k, j] = R(y) - R(y with ranks k and j exchanged), for all pairs of ranks; positive: the present order is better.

    Arguments and errors are those of ``swap_rewards``; there is no Triton kernel.

    Returns:
        (N, K, K), symmetric with zero diagonal, 0 beyond each list's length; float64 for float64 gains, else float32.
        No gradient.
    """
    metric = parse_metric(metric)
    lists = check_lists(gains, metric, lengths, num_ranked)
    if backend == "triton":
        raise ValueError("swap_scores has no Triton kernel; backend must be 'auto', 'numba' or 'torch'")
    backend = _resolve_backend(backend, metric, "scores", lists.gains)
    call = swap_scores_op if _is_traced(gains) else _scores
    return call(lists.gains, str(metric), lists.lengths, lists.num_ranked, lists.max_ranked, backend)
