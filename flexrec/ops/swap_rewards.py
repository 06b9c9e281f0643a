"""Swap rewards: what each ranked item is worth at its rank, in O(K) per list for every built-in metric.

The mathematics stands in ``flexrec/ops/swap_rewards_torch.py``, the reference; this file chooses a backend for it.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from flexrec import metrics
from flexrec.metrics import Lists, Metric, check_lists, ingredients, parse_metric
from flexrec.ops import swap_rewards_numba as kernels
from flexrec.ops.swap_rewards_torch import custom_rewards, rewards_of, scores_of
from flexrec.validation import check_choice, check_finite, check_range, check_tensor

CREDITS = ("swap", "noncausal", "independent", "rank", "sequence", "policy")
BACKENDS = ("auto", "triton", "numba", "torch")
MAX_TRITON_SIZE = 16384  # a list lies in one program's registers


def _follow_torch_threads() -> None:
    """Run numba on as many threads as torch.

    The two may share one OpenMP runtime, in which the start of numba's threads overrides ``torch.set_num_threads``;
    torch's number is put back.
    """
    threads = torch.get_num_threads()
    wanted = min(threads, numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _numba_arguments(lists: Lists, metric: Metric) -> tuple:
    """The arguments that both numba kernels share, in their order."""
    _follow_torch_threads()
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
        chunks = min(lists.gains.shape[0], 8 * numba.get_num_threads())
        return torch.from_numpy(kernels.swap_rewards(*arguments, kernels.CREDITS[credit], chunks))
    assert weights is not None
    dtype = metrics.result_dtype(lists.gains)
    means = kernels.swap_scores(*arguments, weights.detach().to(dtype).contiguous().numpy())
    return torch.from_numpy(means).squeeze(-1)


def _numba_swap_scores(lists: Lists, metric: Metric) -> torch.Tensor:
    arguments = _numba_arguments(lists, metric)
    return torch.from_numpy(kernels.swap_scores(*arguments, np.empty((0, 0, 0), dtype=arguments[0].dtype)))


def _triton_swap_rewards(lists: Lists, metric: Metric) -> torch.Tensor:
    from flexrec.triton_kernels.swap_rewards import MAX_SORTED, swap_rewards_linear

    definition, inverse_norms = metric.definition, None
    if definition.normaliser == "ideal" and lists.gains.shape[1] > MAX_SORTED:
        inverse_norms = ingredients(lists, metric).inverse_norm.squeeze(-1)
    return swap_rewards_linear(
        lists.gains,
        lists.lengths,
        lists.num_ranked,
        inverse_norms,
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
                f"backend='triton' computes swap_rewards with credit='swap' for {linear} and K <= {MAX_TRITON_SIZE}; "
                f"got metric={str(metric)!r}, credit={credit!r}, K={gains.shape[1]}. backend='torch' computes all"
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
        rewards = _triton_swap_rewards(lists, parsed)
    elif backend == "numba":
        rewards = _numba_swap_rewards(lists, parsed, credit, weights)
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
        scores = _numba_swap_scores(lists, parsed)
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
    call = swap_rewards_op if _is_traced(gains) else _run_rewards
    detached = None if weights is None else weights.detach()
    return call(lists.gains, str(metric), credit, lists.lengths, lists.num_ranked, lists.max_ranked, detached, backend)


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
    """S[k, j] = R(y) - R(y with ranks k and j exchanged), for all pairs of ranks.

    Positive: the present order is better. Arguments and errors are those of ``swap_rewards``; no Triton kernel.

    Returns:
        (N, K, K), symmetric with zero diagonal, 0 beyond each list's length; float64 for float64 gains, else float32.
        No gradient.
    """
    metric = parse_metric(metric)
    lists = check_lists(gains, metric, lengths, num_ranked)
    if backend == "triton":
        raise ValueError("swap_scores has no Triton kernel; backend must be 'auto', 'numba' or 'torch'")
    backend = _resolve_backend(backend, metric, "scores", lists.gains)
    call = swap_scores_op if _is_traced(gains) else _run_scores
    return call(lists.gains, str(metric), lists.lengths, lists.num_ranked, lists.max_ranked, backend)
