"""Swap rewards: what each ranked item is worth at its rank, in O(K) per list for every built-in metric.

The mathematics stands in ``flexrec/ops/swap_rewards_torch.py``, the reference; this file chooses a backend for it.
"""

from __future__ import annotations

import torch

from flexrec import metrics
from flexrec.checks import check_choice, check_finite, check_range, check_tensor, lies_within, values_are_checked
from flexrec.metrics import CREDITS, Lists, Metric, check_lists, ingredients, parse_metric
from flexrec.ops.swap_rewards_cpu import numba_swap_rewards, numba_swap_scores
from flexrec.ops.swap_rewards_torch import custom_rewards, rewards_of, scores_of

BACKENDS = ("auto", "triton", "numba", "torch")
MAX_TRITON_SIZE = 16384  # longest list that the Triton kernels are compiled for


def _triton_swap_rewards(lists: Lists, metric: Metric, credit: str, weights: torch.Tensor | None) -> torch.Tensor:
    from flexrec.triton_kernels.swap_rewards import swap_rewards
    from flexrec.triton_kernels.swap_scores import swap_scores

    counts = {"lengths": lists.lengths, "num_ranked": lists.num_ranked, "max_ranked": lists.max_ranked}
    if credit == "policy":
        return swap_scores(lists.gains, metric, **counts, weights=weights)
    return swap_rewards(lists.gains, metric, credit, **counts)[0]


def triton_rewards_with_variance(
    lists: Lists, variance: torch.Tensor, metric: Metric, credit: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and their variance, (N, K) each, of a linear metric and any credit but "policy", in one launch."""
    from flexrec.triton_kernels.swap_rewards import swap_rewards

    counts = {"lengths": lists.lengths, "num_ranked": lists.num_ranked, "max_ranked": lists.max_ranked}
    rewards, spread = swap_rewards(lists.gains, metric, credit, **counts, variance=variance)
    assert spread is not None
    return rewards, spread


def _triton_swap_scores(lists: Lists, metric: Metric) -> torch.Tensor:
    from flexrec.triton_kernels.swap_scores import swap_scores

    counts = {"lengths": lists.lengths, "num_ranked": lists.num_ranked, "max_ranked": lists.max_ranked}
    return swap_scores(lists.gains, metric, **counts)


def resolve_backend(backend: str, metric: Metric, gains: torch.Tensor) -> str:
    """The backend that will run: "triton", "numba" or "torch"; ValueError if the one asked for cannot."""
    check_choice("backend", backend, BACKENDS)
    on_cpu, is_custom = gains.device.type == "cpu", metric.definition.form == "custom"
    able = not is_custom and gains.shape[1] <= MAX_TRITON_SIZE  # by Triton
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
            raise ValueError(
                f"backend='triton' computes lists of K <= {MAX_TRITON_SIZE} candidates, got K={gains.shape[1]}; "
                "backend='torch' computes all"
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


def _run_rewards(
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
    if parsed.definition.form == "custom":
        rewards = custom_rewards(lists, parsed, credit, weights)
    elif backend == "triton":
        rewards = _triton_swap_rewards(lists, parsed, credit, weights)
    elif backend == "numba":
        rewards = numba_swap_rewards(lists, parsed, credit, weights)
    else:
        rewards = rewards_of(ingredients(lists, parsed), parsed, credit, weights)
    return rewards.to(metrics.result_dtype(gains))


def _run_scores(
    gains: torch.Tensor,
    metric: str,
    lengths: torch.Tensor | None,
    num_ranked: torch.Tensor | None,
    max_ranked: int,
    backend: str,
) -> torch.Tensor:
    lists, parsed = Lists(gains, lengths, num_ranked, max_ranked), parse_metric(metric)
    if parsed.definition.form == "custom":
        scores = metrics.custom_swap_scores(lists, parsed)
        check_finite(f"the swap scores of metric {parsed}", scores)
    elif backend == "numba":
        scores = numba_swap_scores(lists, parsed)
    elif backend == "triton":
        scores = _triton_swap_scores(lists, parsed)
    else:
        scores = scores_of(ingredients(lists, parsed), parsed)
    return scores.to(metrics.result_dtype(gains))


swap_rewards_op = torch.library.custom_op("flexrec::swap_rewards", _run_rewards, mutates_args=())
swap_scores_op = torch.library.custom_op("flexrec::swap_scores", _run_scores, mutates_args=())


@swap_rewards_op.register_fake
def _(gains: torch.Tensor, *_: object) -> torch.Tensor:
    return gains.new_empty(gains.shape, dtype=metrics.result_dtype(gains))


@swap_scores_op.register_fake
def _(gains: torch.Tensor, *_: object) -> torch.Tensor:
    return gains.new_empty((*gains.shape, gains.shape[1]), dtype=metrics.result_dtype(gains))


def _is_traced(gains: torch.Tensor) -> bool:
    """Whether the registered op must be called; otherwise its function is, which saves torch.library's overhead."""
    return torch.compiler.is_compiling() or type(gains) is not torch.Tensor


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
        backend: "auto" (Triton on a GPU where it can, else torch there; numba on the CPU), "triton" (built-in metrics,
            K <= 16384; also on the CPU under TRITON_INTERPRET=1), "numba" (CPU), "torch" (anywhere).

    Returns:
        (N, K) float64 for float64 gains, else float32 (also for half precision). No gradient. Sums are accumulated in
        float64; by the Triton kernels in float32 unless the gains are float64, but on centred gains, and so that an
        error at a rank is relative to what lies behind it.

    Raises:
        ValueError, TypeError: unknown name, wrong shape or dtype, a value out of its range, a backend that cannot do
            what is asked. Values on a GPU are checked only where ``flexrec.checks`` is told to.
    """
    metric = parse_metric(metric)
    check_choice("credit", credit, CREDITS)
    lists = check_lists(gains, metric, lengths, num_ranked, values=False)
    check_policy_weights(weights, credit, lists)
    backend = resolve_backend(backend, metric, lists.gains)
    _check_values(lists, metric, backend)
    call = swap_rewards_op if _is_traced(gains) else _run_rewards
    detached = None if weights is None else weights.detach()
    return call(lists.gains, str(metric), credit, lists.lengths, lists.num_ranked, lists.max_ranked, detached, backend)


def _check_values(lists: Lists, metric: Metric, backend: str) -> None:
    if backend != "numba" or metric.definition.form == "custom":  # numba's kernels check while they read
        metrics.check_gain_values(lists, metric)


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
    if not values_are_checked(weights) or lies_within(weights, 0.0, metrics.MAX_GAIN):
        return
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
    """S[k, j] = R(y) - R(y with ranks k and j exchanged), for all pairs of ranks.

    Positive: the present order is better. Arguments and errors are those of ``swap_rewards``.

    Returns:
        (N, K, K), symmetric with zero diagonal, 0 beyond each list's length; float64 for float64 gains, else float32.
        No gradient.
    """
    metric = parse_metric(metric)
    lists = check_lists(gains, metric, lengths, num_ranked, values=False)
    backend = resolve_backend(backend, metric, lists.gains)
    _check_values(lists, metric, backend)
    call = swap_scores_op if _is_traced(gains) else _run_scores
    return call(lists.gains, str(metric), lists.lengths, lists.num_ranked, lists.max_ranked, backend)
