"""Swap rewards: what each ranked item is worth at its rank, and how sure that is; O(K) per list for every metric.

The mathematics stands in ``flexrec/ops/swap_reference.py``; this file chooses a backend for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexrec.checks import (
    check_choice,
    check_finite,
    check_number,
    check_range,
    check_tensor,
    lies_within,
    values_are_checked,
)
from flexrec.metrics import CREDITS, FAMILIES, MAX_GAIN, Metric, parse_metric
from flexrec.ops.library import BACKENDS, Operation, choose_backend, kernels
from flexrec.ops.ranking_metric import (
    Lists,
    Topics,
    as_result,
    call_kernels,
    check_gain_values,
    check_lists,
    check_topics,
    ingredients,
    metric_of,
    of_registered,
    result_dtype,
    term_gains,
)
from flexrec.ops.swap_reference import custom_rewards, scores_of, torch_rewards

WITH_VARIANCE = tuple(name for name, family in FAMILIES.items() if family.form in ("linear", "cascade"))
MAX_TRITON_SIZE = 16384  # longest list that the Triton kernels are compiled for ..
MAX_TRITON_SIZE_OF_TOPICS, MAX_TRITON_TOPICS = 1024, 256  # .. and where there are topics, and how many of these


def swap_rewards(
    gains: torch.Tensor,
    metric: str | Metric,
    *,
    credit: str = "swap",
    lengths: int | torch.Tensor | None = None,
    num_ranked: int | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    topics: torch.Tensor | Topics | None = None,
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
        credit: one of the above. All are O(K) per list (ndcg sorts besides), "policy" is O(K^2); with C topics C times
            that (alpha_ndcg finds the greedy order besides, of its cutoff n in O(n K C)).
        lengths: int or (N,) integer, the number of candidates of each list. What lies beyond is ignored, reward 0.
        num_ranked: int or (N,) integer, how many ranks T are shown. Ranks beyond have discount 0 and reward 0, and
            their items stay in the pool.
        weights: (N, K, K) floating, >= 0, with ``credit="policy"`` only. Entries with j <= k are ignored.
        topics: with "alpha_ndcg" and "err_ia" only: (N, K, C) floating in [0, 1], how much the item at each rank is
            about each topic, or :class:`flexrec.Topics`.
        backend: "auto" (Triton on a GPU where it can, else torch there; numba on the CPU), "triton" (built-in metrics,
            K <= 16384, with topics K <= 1024 and C <= 256; also on the CPU under TRITON_INTERPRET=1), "numba" (CPU),
            "torch" (anywhere).

    Returns:
        (N, K) float64 for float64 gains, else float32 (also for half precision). No gradient. Sums are accumulated in
        float64; by the Triton kernels in float32 unless the gains are float64, but on centred gains, and so that an
        error at a rank is relative to what lies behind it.

    Raises:
        ValueError, TypeError: unknown name, wrong shape or dtype, a value out of its range, a backend that cannot do
            what is asked. Values on a GPU are checked only after :func:`flexrec.set_value_checks`.

    Example:
        >>> gains = torch.tensor([[0.0, 1.0, 0.0]])  # the only good item is second
        >>> flexrec.swap_rewards(gains, "mrr")  # first, it would have been worth 1/2 more; third, 1/6 less
        tensor([[-0.2500,  0.1667,  0.0000]])
        >>> about = torch.eye(2)[torch.tensor([[0, 0, 1]])]  # the first two are about one topic
        >>> flexrec.swap_rewards(torch.ones(1, 3), "alpha_ndcg", topics=about).round(decimals=4)
        tensor([[-0.0174, -0.0348,  0.0000]])
    """
    return _evaluate(gains, None, metric_of(metric), credit, lengths, num_ranked, weights, backend, topics)[0]


def window_rewards(
    gains: torch.Tensor,
    metric: str | Metric,
    start: int,
    stop: int,
    *,
    lengths: int | torch.Tensor | None = None,
    num_ranked: int | torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Swap rewards of a window of a longer list, for a model that puts windows in order: each rank from ``start`` up
    to, but not with, ``stop`` is exchanged for those below it in the window alone.

    The metric is that of the whole list, so that a window at its end, of whose ranks the metric knows little, earns
    little, and one at its top as much as it changes there. Of the whole list they are ``swap_rewards``.

    Args:
        gains: (N, K) in rank order, of the whole lists as they stand after the window was ordered.
        start, stop: the window, 0 <= start < stop <= K.
        lengths, num_ranked, backend: those of :func:`swap_rewards`.

    Returns:
        (N, stop - start) as ``swap_rewards``.

    Example:
        >>> gains = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
        >>> flexrec.window_rewards(gains, "mrr", 2, 4).round(decimals=3)  # a third would be better than a quarter
        tensor([[-0.0830,  0.0000]])
    """
    check_tensor("gains", gains, ("N", "K"))
    check_number("start", start, whole=True)
    check_number("stop", stop, whole=True)
    size = gains.shape[1]
    if not 0 <= start < stop <= size:
        raise ValueError(f"a window must lie in the {size} ranks, 0 <= start < stop <= {size}, got {start} to {stop}")
    inside = torch.zeros(size, dtype=torch.bool, device=gains.device)
    inside[start:stop] = True
    weights = (inside[:, None] & inside).float().expand(len(gains), size, size)
    options: dict[str, Any] = {"lengths": lengths, "num_ranked": num_ranked, "backend": backend}
    return swap_rewards(gains, metric, credit="policy", weights=weights, **options)[:, start:stop]


def swap_rewards_with_variance(
    gains: torch.Tensor,
    variance: torch.Tensor,
    metric: str | Metric,
    *,
    credit: str = "swap",
    lengths: int | torch.Tensor | None = None,
    num_ranked: int | torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards as ``swap_rewards`` gives them, and their variance when the gains are uncertain.

    Gains of different items are independent, normalisers (and ``err``'s largest gain) are held fixed. Then the variance

    - of dcg and ndcg is exact;
    - of recall, precision and rbp is exact too, their gains being read as probabilities of relevance instead of being
      thresholded: the rewards are those of the expected relevance, and so is recall's normaliser;
    - of dcg_burges, ndcg_burges and err is a first-order propagation: (d reward / d gain)^2 x variance, summed.

    Args:
        gains: (N, K) floating, >= 0, in rank order; within [0, 1] for recall, precision and rbp.
        variance: (N, K) floating, >= 0, of each gain, in squared units of the gain.
        metric, credit, lengths, num_ranked, weights: as for ``swap_rewards``.
        backend: "auto" (numba on the CPU, Triton on a GPU, torch for what these cannot), "numba" (CPU, O(K) per list,
            any credit but "policy"), "triton" (the same for linear metrics, in the launch that computes the rewards),
            "torch" (anywhere; O(K) per list, but err takes K passes over each, and "policy" is O(K^2), for err O(K^3)).

    Returns:
        (N, K) rewards and (N, K) variances, float64 for float64 gains, else float32; 0 beyond lengths and
        ``num_ranked``. No gradient.

    Raises:
        ValueError, TypeError: as ``swap_rewards``; a negative or non-finite variance; a metric without a variance.

    Example:
        >>> gains, variance = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[0.0, 0.0, 0.4]])
        >>> rewards, spread = flexrec.swap_rewards_with_variance(gains, variance, "dcg")
        >>> spread.round(decimals=4)  # an exchange with the last item is as unsure as its gain
        tensor([[0.0250, 0.0069, 0.0000]])
    """
    metric = metric_of(metric)
    if metric.family not in WITH_VARIANCE:
        raise ValueError(f"metric {str(metric)!r} has no reward variance; those that have: {', '.join(WITH_VARIANCE)}")
    return _evaluate(gains, variance, metric, credit, lengths, num_ranked, weights, backend)


def _evaluate(
    gains: Tensor,
    variance: Tensor | None,
    metric: Metric,
    credit: str,
    lengths: int | Tensor | None,
    num_ranked: int | Tensor | None,
    weights: Tensor | None,
    backend: str,
    topics: Tensor | Topics | None = None,
) -> tuple[Tensor, Tensor]:
    """Rewards and, of size 0 where there is none, their variance."""
    check_choice("credit", credit, CREDITS)
    lists = check_lists(gains, lengths, num_ranked)
    about = check_topics(topics, metric, lists)
    weights = _check_policy_weights(weights, credit, lists)
    if variance is not None:
        check_tensor("variance", variance, tuple(lists.gains.shape))
        if variance.device != lists.gains.device:
            raise ValueError(f"variance must be on the device of gains, {lists.gains.device}; got {variance.device}")
        variance = variance.detach()
    backend = _choose_backend(backend, metric, lists.gains, None if variance is None else credit, about)
    _check_values(lists, metric, backend, variance)
    return _swap_rewards(lists.gains, metric, credit, *lists[1:], weights, backend, variance, *(about or ()))


def swap_scores(
    gains: torch.Tensor,
    metric: str | Metric,
    *,
    lengths: int | torch.Tensor | None = None,
    num_ranked: int | torch.Tensor | None = None,
    topics: torch.Tensor | Topics | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """S[k, j] = R(y) - R(y with ranks k and j exchanged), for all pairs of ranks.

    Positive: the present order is better. Arguments and errors are those of ``swap_rewards``.

    Returns:
        (N, K, K), symmetric with zero diagonal, 0 beyond each list's length; float64 for float64 gains, else float32.
        No gradient.

    Example:
        >>> flexrec.swap_scores(torch.tensor([[0.0, 1.0, 0.0]]), "mrr").round(decimals=3)
        tensor([[[ 0.0000, -0.5000,  0.0000],
                 [-0.5000,  0.0000,  0.1670],
                 [ 0.0000,  0.1670,  0.0000]]])
    """
    metric = metric_of(metric)
    lists = check_lists(gains, lengths, num_ranked)
    about = check_topics(topics, metric, lists)
    backend = _choose_backend(backend, metric, lists.gains, topics=about)
    _check_values(lists, metric, backend)
    return _swap_scores(lists.gains, metric, *lists[1:], backend, *(about or ()))


# --- checks, choice of a backend --------------------------------------------------------------------------------------


def _choose_backend(
    backend: str, metric: Metric, gains: Tensor, credit: str | None = None, topics: Topics | None = None
) -> str:
    """The backend that will run, "triton", "numba" or "torch"; for variances where a ``credit`` is given."""
    if metric.definition.form == "custom":
        check_choice("backend", backend, BACKENDS)
        if backend not in ("auto", "numba") or gains.device.type != "cpu":
            raise ValueError(
                f"metric {metric} is a registered one and runs with backend='numba' on CPU tensors only; "
                f"got backend={backend!r} and gains on {gains.device}"
            )
        return "numba"
    obstacle, size = None, gains.shape[1]
    if topics is not None and (size > MAX_TRITON_SIZE_OF_TOPICS or topics.matrix.shape[1] > MAX_TRITON_TOPICS):
        obstacle = ValueError(
            f"backend='triton' computes lists of K <= {MAX_TRITON_SIZE_OF_TOPICS} candidates and C <= "
            f"{MAX_TRITON_TOPICS} topics, got K={size} and C={topics.matrix.shape[1]}; backend='torch' computes all"
        )
    elif size > MAX_TRITON_SIZE:
        obstacle = ValueError(
            f"backend='triton' computes lists of K <= {MAX_TRITON_SIZE} candidates, got K={size}; "
            "backend='torch' computes all"
        )
    chosen = choose_backend(backend, "gains", gains, obstacle)
    is_linear = metric.definition.form == "linear"
    if credit is None or chosen == "torch" or (credit != "policy" and (chosen == "numba" or is_linear)):
        return chosen
    if backend == "auto":
        return "torch"
    computed = "any metric" if chosen == "numba" else "linear metrics"
    raise ValueError(
        f"backend={backend!r} computes variances of {computed} with any credit but 'policy'; "
        f"got metric={str(metric)!r} and credit={credit!r}. backend='torch' computes all"
    )


def _check_values(lists: Lists, metric: Metric, backend: str, variance: Tensor | None = None) -> None:
    """Raise ValueError at a gain or variance out of its range; numba's kernels check while they read."""
    if backend != "numba" or metric.definition.form in ("custom", "topics"):
        check_gain_values(lists, metric, variance)


def _check_policy_weights(weights: Tensor | None, credit: str, lists: Lists) -> Tensor | None:
    """``weights`` detached; with ``credit="policy"`` and no other (N, K, K), >= 0 where j > k lies inside the list."""
    if (weights is None) == (credit == "policy"):
        got = "none" if weights is None else "some"
        raise ValueError(f"weights are needed with credit='policy' and only then; got {got} with credit={credit!r}")
    if weights is None:
        return None
    rows, size = lists.gains.shape
    check_tensor("weights", weights, (rows, size, size))
    if weights.device != lists.gains.device:
        raise ValueError(f"weights must be on the device of gains, {lists.gains.device}; got {weights.device}")
    if values_are_checked(weights) and not lies_within(weights, 0.0, MAX_GAIN):
        position = torch.arange(size, device=weights.device)
        used = (position > position[:, None]) & (position < lists.real_lengths[:, None, None])  # (N, K, K)
        check_finite("weights", weights, used)
        check_range("weights", weights, 0.0, MAX_GAIN, used)
    return weights.detach()


# --- the operations ---------------------------------------------------------------------------------------------------


def _launch_of_topics(
    backend: str, name: str, lists: Lists, metric: Metric, topics: Topics, *arguments: Any, **options: Any
) -> Tensor:
    """The function ``name`` of the backend's module ``topic_swaps``, which takes what the metric makes of each gain."""
    gains = torch.where(lists.inside, lists.gains.double(), 0.0)
    worth = term_gains(gains, metric) if gains.shape[1] else gains  # (N, K)
    dtype = torch.float64 if backend == "numba" else result_dtype(lists.gains)
    counts = {"lengths": lists.real_lengths, "num_ranked": lists.real_ranked}
    function = getattr(kernels(backend, "topic_swaps"), name)
    found: Tensor = function(worth.to(dtype), metric, *topics, *arguments, **counts, **options)
    return found


def _run_rewards(
    gains: Tensor,
    metric: str,
    credit: str,
    lengths: Tensor | None,
    num_ranked: Tensor | None,
    max_ranked: int,
    weights: Tensor | None,
    backend: str,
    variance: Tensor | None = None,
    topics: Tensor | None = None,
    items: Tensor | None = None,
    topic_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    lists, parsed = Lists(gains, lengths, num_ranked, max_ranked), parse_metric(metric)
    about = None if topics is None else Topics(topics, items, topic_weights)
    spread = None
    if parsed.definition.form == "custom":
        rewards = custom_rewards(lists, parsed, credit, weights)
    elif backend == "torch":
        rewards, spread = torch_rewards(lists, parsed, credit, weights, variance, about)
    elif about is not None and credit == "policy":
        rewards = _launch_of_topics(backend, "swap_scores", lists, parsed, about, weights=weights)
    elif about is not None:
        rewards = _launch_of_topics(backend, "swap_rewards", lists, parsed, about, credit)
    elif credit == "policy":
        rewards = call_kernels(backend, "swap_scores", lists, parsed, weights=weights)
    else:
        rewards, spread = call_kernels(backend, "swap_rewards", lists, parsed, credit, variance=variance)
    return as_result(rewards, gains), gains.new_empty(0) if spread is None else as_result(spread, gains)


def _run_scores(
    gains: Tensor,
    metric: str,
    lengths: Tensor | None,
    num_ranked: Tensor | None,
    max_ranked: int,
    backend: str,
    topics: Tensor | None = None,
    items: Tensor | None = None,
    topic_weights: Tensor | None = None,
) -> Tensor:
    about = None if topics is None else Topics(topics, items, topic_weights)
    lists, parsed = Lists(gains, lengths, num_ranked, max_ranked), parse_metric(metric)
    if parsed.definition.form == "custom":
        scores = of_registered("custom_swap_scores", lists, parsed)
        check_finite(f"the swap scores of metric {parsed}", scores)
    elif backend == "torch":
        scores = scores_of(ingredients(lists, parsed, topics=about), parsed)
    elif about is not None:
        scores = _launch_of_topics(backend, "swap_scores", lists, parsed, about)
    else:
        scores = call_kernels(backend, "swap_scores", lists, parsed)
    return as_result(scores, gains)


def _fake_rewards(gains: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rewards = torch.empty_like(gains, dtype=result_dtype(gains), memory_format=torch.contiguous_format)
    has_variance = len(others) > 7 and others[7] is not None
    return rewards, torch.empty_like(rewards) if has_variance else gains.new_empty(0)


def _fake_scores(gains: Tensor, *_: object) -> Tensor:
    return gains.new_empty((*gains.shape, gains.shape[1]), dtype=result_dtype(gains))


_swap_rewards = Operation("swap_rewards", _run_rewards, _fake_rewards)
_swap_scores = Operation("swap_scores", _run_scores, _fake_scores)
