"""Log-probabilities of rankings under the distribution they are sampled from: at each step, the candidates that remain.

A ranking of K candidates is drawn item by item. At step t the model's logits are restricted to the candidates not yet
placed (the pool) and normalised over them alone:

    z_j  = (hidden[t] . weight[token_j] + bias[token_j]) / temperature
    p_j  = exp(z_j) / sum of exp(z_i) over the pool                      for j in the pool, else 0
    H    = -sum_j p_j log p_j,        E_c = sum_j p_j v_jc,        KL = sum_j p_j (log p_j - log q_j)

with q the same distribution of a reference policy. The whole support is at hand, so all three are exact sums, where
trainers over a full vocabulary use single-sample estimates of KL. With upstream gradients g_lp of the chosen
candidate's log-probability (y is its one-hot vector), g_H of H, g_c of E_c and g_KL of KL,

    dz_j = g_lp (y_j - p_j) - g_H p_j (log p_j + H) + sum_c g_c p_j (v_jc - E_c) + g_KL p_j (log p_j - log q_j - KL),

since d p_j / d z_i = p_j (1[i = j] - p_i). Only candidate rows of the output embedding are read: neither logits over
the vocabulary nor a tensor (N, K, D) or (N, T, V) exists anywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flexrec.checks import check_choice
from flexrec.ops.ranked_lists import (
    IMPOSSIBLE,
    RankedLists,
    Reference,
    accumulation_dtype,
    check_lists,
    check_reference,
    check_values,
    in_rank_order,
    log_probs_of_logits,
    step_log_probs,
    values_by_candidate,
    without_autocast,
)
from flexrec.ops.ranking_logprobs_op import Inputs, evaluate
from flexrec.ops.weight_grads import WEIGHT_GRADS, check_accumulates

BACKENDS = ("auto", "torch", "triton")


class RankingLogprobs(NamedTuple):
    """Per step: log-probability of the chosen candidate, entropy, and expectations of the values (None without any)."""

    logprobs: Tensor
    entropy: Tensor
    expectations: Tensor | None


class RankingLogprobsWithKL(NamedTuple):
    """:class:`RankingLogprobs`, and per step KL(policy || reference)."""

    logprobs: Tensor
    entropy: Tensor
    expectations: Tensor | None
    kl: Tensor


def ranking_logprobs(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    ranking: Tensor,
    *,
    values: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    lengths: Tensor | None = None,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> RankingLogprobs:
    """Log-probability, entropy and expectations at every step of N rankings, each over its remaining candidates.

    Differentiable (once; the "torch" backend any number of times) in ``hidden``, ``weight`` and ``bias``, through the
    entropy and the expectations too. ``values`` get no gradient. Operands are taken as they are and everything is
    accumulated in float32: under autocast too, where ``hidden`` comes in half precision and ``weight`` in float32.

    Args:
        hidden: (N, T, D) floating, the state that predicts rank t.
        weight: (V, D) floating, the model's output embedding.
        candidates: (P, K) integer token ids, N = P * G, the G rankings of one list adjacent (P = N without groups).
            A token id that occurs twice in a list is two candidates, each with its own place in the softmax.
        ranking: (N, T) integer, T <= K, index into the candidates of the item at rank t. With T < K the candidates
            that are never ranked stay in every pool.
        values: (N, K, C) floating in rank order: ``values[n, k]`` belongs to the item at rank k, and from position T on
            to the unranked candidates by ascending candidate index. Ignored beyond ``lengths``.
        bias: (V,) floating, added to the logits. -inf makes a token impossible: probability exactly 0 and no gradient
            through it. Where only impossible candidates remain, each is equally likely and nothing has a gradient.
        temperature: what the logits are divided by; positive.
        lengths: (N,) or (P,) integer, how many of the K candidates are real (all, if not given). What lies beyond is
            in no pool; steps t >= length are exactly 0 in every output and give no gradient; ``hidden``, ``ranking``
            and ``candidates`` may hold anything there.
        weight_grad: how ``weight`` gets its gradient. "dense": a tensor (V, D), as usual. "rows": a sparse COO tensor
            with a row (D,) for each candidate of each list, as from ``nn.Embedding(sparse=True)``; nothing of (V, D)
            is made. "accumulate": it is added to ``weight.main_grad`` (Megatron's) if there is one, else to
            ``weight.grad`` (made if need be), and autograd sees none: ``weight`` must be a leaf, and hooks on its
            gradient, DDP's among them, do not run. The gradient of ``bias`` is dense. The last two are for eager mode:
            torch.compile and the "torch" backend know "dense" only. On a GPU "dense" and "accumulate" add up in any
            order, unless ``torch.use_deterministic_algorithms`` is on; everything else is bitwise repeatable.
        backend: "triton" (CUDA or ROCm, or the CPU under TRITON_INTERPRET=1; not float64), "torch" (plain operations
            under autograd, anywhere), or "auto": triton on a GPU where it can, parallel loops on a CPU, else torch.

    Returns:
        ``RankingLogprobs(logprobs (N, T), entropy (N, T), expectations (N, T, C) or None)``, float32 (float64 if
        ``hidden`` or ``weight`` is). An impossible chosen candidate has log-probability -inf; the only remaining
        candidate exactly 0.

    Raises:
        TypeError, ValueError: wrong types or shapes, a candidate twice in a ranking, an index or token out of range,
            a backend or a ``weight_grad`` that cannot be had.
    """
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    logprobs, entropy, expectations, _ = evaluate_lists(lists, values, weight_grad=weight_grad, backend=backend)
    return RankingLogprobs(logprobs, entropy, expectations)


def ranking_logprobs_with_kl(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    ranking: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logits: Tensor | None = None,
    values: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    lengths: Tensor | None = None,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> RankingLogprobsWithKL:
    """:func:`ranking_logprobs`, and in the same pass the exact KL(policy || reference) of every step.

    Args:
        ref_hidden, ref_weight, ref_bias: (N, T, D'), (V', D') and (V',) or None of the reference; no gradient.
        ref_logits: instead of these, the reference's logits (N, T, K) in the order of ``candidates``, before they are
            divided by ``temperature``; a constant added to all logits of a step changes nothing. No gradient.
        others: as of :func:`ranking_logprobs`.

    Returns:
        ``RankingLogprobsWithKL(logprobs, entropy, expectations, kl (N, T))``. The divergence is >= 0 up to rounding
        and exactly 0 at steps t >= length. Where the policy allows what the reference makes impossible it is infinite
        and has no gradient.

    Raises:
        TypeError, ValueError: as of :func:`ranking_logprobs`; no reference, or two.
    """
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    reference = check_reference(Reference(ref_hidden, ref_weight, ref_bias, ref_logits), lists)
    result = evaluate_lists(lists, values, reference, weight_grad=weight_grad, backend=backend)
    assert result.kl is not None
    return RankingLogprobsWithKL(result.logprobs, result.entropy, result.expectations, result.kl)


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
    weight_grad: str = "dense",
    backend: str = "auto",
) -> Tensor:
    """KL(policy || reference) at every step of N rankings, over the candidates that remain: (N, T).

    Where log-probs are wanted too, :func:`ranking_logprobs_with_kl` has both for the price of one; arguments, results
    and errors are its own.
    """
    return ranking_logprobs_with_kl(
        hidden,
        weight,
        candidates,
        ranking,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        bias=bias,
        temperature=temperature,
        lengths=lengths,
        weight_grad=weight_grad,
        backend=backend,
    ).kl


def ranking_probs(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    ranking: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    lengths: Tensor | None = None,
) -> Tensor:
    """The restricted distribution of every step, in rank order; arguments as of :func:`ranking_logprobs`.

    Returns:
        (N, T, K) float32 (float64 if an input is): entry [n, t, k] is the probability at step t of the candidate whose
        position in rank order is k. Exactly 0 for k < t (already placed) and beyond ``lengths``, so that the diagonal
        holds the probabilities of the ranked items. Differentiable in ``hidden``, ``weight`` and ``bias``.
    """
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    log_probs, pool = step_log_probs(lists)
    return in_rank_order(torch.where(pool, log_probs.exp(), 0.0), lists.position)


# --- on checked arguments ---------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """Log-probs (N, T), entropy (N, T), expectations (N, T, C) if there are values, KL (N, T) if a reference."""

    logprobs: Tensor
    entropy: Tensor
    expectations: Tensor | None
    kl: Tensor | None


def evaluate_lists(
    lists: RankedLists,
    values: Tensor | None,
    reference: Reference | None = None,
    *,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> Results:
    """What the public functions have in common: arguments of :func:`ranking_logprobs_with_kl`, checked."""
    check_choice("backend", backend, BACKENDS)
    check_choice("weight_grad", weight_grad, WEIGHT_GRADS)
    if values is not None:
        values = check_values(values, lists)
    if backend == "auto":
        backend = _best_backend(lists)
    elif backend == "triton":
        _require_triton(lists)
    if backend == "torch":
        if weight_grad != "dense":
            raise ValueError(f"backend='torch' has no weight_grad={weight_grad!r}; use 'dense', or backend='auto'")
        return from_distribution(*step_log_probs(lists), lists, values, reference)
    if weight_grad == "accumulate":
        check_accumulates(lists.weight)
    use_triton = backend == "triton"
    if values is not None and use_triton:
        values = values_by_candidate(values, lists)
    options = lists.temperature, lists.ragged, use_triton
    inputs = Inputs(*lists[:5], values, *(reference or Reference()), *options)
    logprobs, entropy, expectations, kl = evaluate(inputs, weight_grad)
    return Results(logprobs, entropy, None if values is None else expectations, None if reference is None else kl)


def _best_backend(lists: RankedLists) -> str:
    kind = lists.hidden.device.type
    if kind == "cpu":
        return "loops"
    on_gpu = kind == "cuda" and accumulation_dtype(lists.hidden, lists.weight) == torch.float32
    return "triton" if on_gpu else "torch"


def _require_triton(lists: RankedLists) -> None:
    """Raise where the Triton kernels cannot run: no Triton, float64, or a CPU without the interpreter."""
    try:
        from flexrec.triton_kernels.ranking_logprobs import INTERPRETED
    except ModuleNotFoundError as error:
        raise ValueError("backend='triton' needs the package triton, which is not installed; use 'auto'") from error
    if accumulation_dtype(lists.hidden, lists.weight) == torch.float64:
        raise TypeError("backend='triton' computes in float32, got float64 operands; use 'auto' or 'torch'")
    if lists.hidden.device.type == "cpu" and not INTERPRETED:
        raise ValueError("backend='triton' needs a GPU, or TRITON_INTERPRET=1 set before the first import of triton")


def from_distribution(
    log_probs: Tensor,
    pool: Tensor,
    lists: RankedLists,
    values: Tensor | None = None,
    reference: Reference | None = None,
) -> Results:
    """The results from an explicit distribution as :func:`step_log_probs` gives it; values in rank order."""
    probs = torch.where(pool, log_probs.exp(), 0.0)  # (N, T, K)
    steps = torch.arange(log_probs.shape[1], device=pool.device)
    chosen = lists.position[:, None] == steps[:, None]  # (N, T, K)
    logprobs = torch.where(chosen, log_probs, 0.0).sum(-1)
    expectations = kl = None
    if values is not None:
        with without_autocast(probs):
            expectations = probs @ values_by_candidate(values, lists).to(probs.dtype)
    if reference is not None:
        with torch.no_grad():
            if reference.logits is not None:
                ref_log_probs, _ = log_probs_of_logits(reference.logits, lists)
            else:
                assert reference.hidden is not None
                assert reference.weight is not None
                other = lists._replace(hidden=reference.hidden, weight=reference.weight, bias=reference.bias)
                ref_log_probs = step_log_probs(other)[0].to(probs.dtype)
        unreachable = ((ref_log_probs < IMPOSSIBLE) & (probs > 0)).any(-1)  # (N, T)
        divergence = torch.where(pool, probs * (log_probs - ref_log_probs), 0.0).sum(-1)
        kl = torch.where(unreachable, math.inf, divergence)
    return Results(
        logprobs + torch.where(logprobs < IMPOSSIBLE, -math.inf, 0.0),  # adding -inf keeps the gradient of the rest
        -(probs * log_probs).sum(-1),
        expectations,
        kl,
    )
