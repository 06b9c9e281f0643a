"""Log-probabilities of rankings under the distribution they are sampled from: at each step, the candidates that remain.

A ranking of K candidates is drawn item by item. At step t the model's logits are restricted to the candidates not yet
placed (the pool) and normalised over them alone:

    z_j  = (hidden[t] . weight[token_j] + bias[token_j]) / temperature
    p_j  = exp(z_j) / sum of exp(z_i) over the pool                      for j in the pool, else 0
    H    = -sum_j p_j log p_j,        E_c = sum_j p_j v_jc

The whole support is at hand, so entropy and expectations are exact sums. With upstream gradients g_lp of the chosen
candidate's log-probability (y is its one-hot vector), g_H of H and g_c of E_c,

    dz_j = g_lp (y_j - p_j) - g_H p_j (log p_j + H) + sum_c g_c p_j (v_jc - E_c),

since d p_j / d z_i = p_j (1[i = j] - p_i). Only candidate rows of the output embedding are read: neither logits over
the vocabulary nor a tensor (N, K, D) or (N, T, V) exists anywhere.

Candidates stay in the order given ("canonical"), and who is in the pool follows from each candidate's position in
the ranking: position[j] >= t. The G rollouts of one prompt then share one matrix product with the prompt's rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexrec.ops.ranked_lists import (
    FLOOR,
    IMPOSSIBLE,
    RankedLists,
    check_lists,
    compute_dtype,
    gather_operands,
    in_rank_order,
    pools,
    ranked_candidates,
    step_log_probs,
    values_by_candidate,
)
from flexrec.validation import check_choice

BACKENDS = ("auto", "torch", "triton")


class RankingLogprobs(NamedTuple):
    """Per step: log-probability of the chosen candidate, entropy, and expectations of the values (None without any)."""

    logprobs: Tensor
    entropy: Tensor
    expectations: Tensor | None


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
    backend: str = "auto",
) -> RankingLogprobs:
    """Log-probability, entropy and expectations at every step of N rankings, each over its remaining candidates.

    Differentiable (once; the "torch" backend any number of times) in ``hidden``, ``weight`` and ``bias``, through the
    entropy and the expectations too. ``values`` get no gradient.

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
        backend: "triton" (CUDA or ROCm, or the CPU under TRITON_INTERPRET=1; not float64), "torch" (plain operations
            under autograd, anywhere), or "auto": triton on a GPU, else one matrix product per prompt with a backward
            pass that keeps nothing but the logits.

    Returns:
        ``RankingLogprobs(logprobs (N, T), entropy (N, T), expectations (N, T, C) or None)``, float32 (float64 if
        ``hidden`` or ``weight`` is). An impossible chosen candidate has log-probability -inf; the only remaining
        candidate exactly 0.

    Raises:
        TypeError, ValueError: wrong types or shapes, a candidate twice in a ranking, an index or token out of range.
    """
    check_choice("backend", backend, BACKENDS)
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    by_candidate = None if values is None else values_by_candidate(values, lists.position)
    if backend == "torch":
        return from_distribution(*step_log_probs(lists), lists, by_candidate)
    use_triton = backend == "triton" or (hidden.device.type == "cuda" and compute_dtype(lists) == torch.float32)
    if use_triton:
        _require_triton(lists)
    if by_candidate is None:
        by_candidate = torch.empty((*lists.position.shape, 0), device=hidden.device, dtype=compute_dtype(lists))
    logprobs, entropy, expectations, _, _ = _ranking_logprobs(
        lists.hidden,
        lists.weight,
        lists.candidates,
        lists.position,
        by_candidate,
        lists.bias,
        lists.temperature,
        lists.ragged,
        use_triton,
    )
    return RankingLogprobs(logprobs, entropy, None if values is None else expectations)


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


# --- reference --------------------------------------------------------------------------------------------------------


def from_distribution(
    log_probs: Tensor, pool: Tensor, lists: RankedLists, values: Tensor | None = None
) -> RankingLogprobs:
    """The three results from an explicit distribution as :func:`step_log_probs` gives it; values in candidate order."""
    probs = torch.where(pool, log_probs.exp(), 0.0)  # (N, T, K)
    steps = torch.arange(log_probs.shape[1], device=pool.device)
    chosen = lists.position[:, None] == steps[:, None]  # (N, T, K)
    logprobs = torch.where(chosen, log_probs, 0.0).sum(-1)
    return RankingLogprobs(
        logprobs + torch.where(logprobs < IMPOSSIBLE, -math.inf, 0.0),  # adding -inf keeps the gradient of the rest
        -(probs * log_probs).sum(-1),
        None if values is None else probs @ values.to(probs.dtype),
    )


def _require_triton(lists: RankedLists) -> None:
    """Raise where the Triton kernels cannot run: no Triton, float64, or a CPU without the interpreter."""
    try:
        from flexrec.triton_kernels.ranking_logprobs import INTERPRETED
    except ModuleNotFoundError as error:
        raise ValueError("backend='triton' needs the package triton, which is not installed; use 'auto'") from error
    if compute_dtype(lists) == torch.float64:
        raise TypeError("backend='triton' computes in float32, got float64 operands; use 'auto' or 'torch'")
    if lists.hidden.device.type == "cpu" and not INTERPRETED:
        raise ValueError("backend='triton' needs a GPU, or TRITON_INTERPRET=1 set before the first import of triton")


# --- custom ops -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flexrec::ranking_logprobs", mutates_args=())
def _ranking_logprobs(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    position: Tensor,
    values: Tensor,
    bias: Tensor | None,
    temperature: float,
    ragged: bool,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs (N, T), entropy (N, T), expectations (N, T, C); for the backward pass logits (N, T, K), norm (N, T, 2).

    Takes the fields of :class:`RankedLists` and values (N, K, C) in candidate order. norm holds what to subtract from
    the logits, one after the other, to have log-probs: their maximum (below IMPOSSIBLE: a step without gradient) and
    the log of the sum relative to it.
    """
    lists = RankedLists(hidden, weight, bias, candidates, position, ragged, temperature)
    if use_triton:
        from flexrec.triton_kernels.ranking_logprobs import ranking_logprobs_forward

        return ranking_logprobs_forward(hidden, weight, bias, candidates, position, values, temperature)
    return _forward(lists, values)


@_ranking_logprobs.register_fake
def _ranking_logprobs_fake(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    position: Tensor,
    values: Tensor,
    bias: Tensor | None,
    temperature: float,
    ragged: bool,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lists = RankedLists(hidden, weight, bias, candidates, position, ragged, temperature)
    (n, t), k = hidden.shape[:2], candidates.shape[1]

    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=compute_dtype(lists))

    return new(n, t), new(n, t), new(n, t, values.shape[2]), new(n, t, k), new(n, t, 2)


@torch.library.custom_op("flexrec::ranking_logprobs_backward", mutates_args=())
def _ranking_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    grad_expectations: Tensor,
    entropy: Tensor,
    expectations: Tensor,
    logits: Tensor,
    norm: Tensor,
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    position: Tensor,
    values: Tensor,
    bias: Tensor | None,
    temperature: float,
    ragged: bool,
    use_triton: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each of the three that ``needs_grad`` leaves out."""
    lists = RankedLists(hidden, weight, bias, candidates, position, ragged, temperature)
    upstream = (grad_logprobs, grad_entropy, grad_expectations)
    if use_triton:
        from flexrec.triton_kernels.ranking_logprobs import ranking_logprobs_backward

        grads = ranking_logprobs_backward(
            upstream,
            (entropy, expectations, logits, norm),
            hidden,
            weight,
            bias,
            candidates,
            position,
            values,
            temperature,
            needs_grad,
        )
    else:
        grads = _backward(upstream, (entropy, expectations, logits, norm), lists, values, needs_grad)
    hidden_grad, weight_grad, bias_grad = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return hidden_grad, weight_grad, bias_grad


@_ranking_logprobs_backward.register_fake
def _ranking_logprobs_backward_fake(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    grad_expectations: Tensor,
    entropy: Tensor,
    expectations: Tensor,
    logits: Tensor,
    norm: Tensor,
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    position: Tensor,
    values: Tensor,
    bias: Tensor | None,
    temperature: float,
    ragged: bool,
    use_triton: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden, weight, bias)
    hidden_grad, weight_grad, bias_grad = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else hidden.new_empty(0)
        for need, x in zip(needs_grad, shapes, strict=True)
    )
    return hidden_grad, weight_grad, bias_grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, candidates, position, values, bias, *ctx.options = inputs
    _, entropy, expectations, logits, norm = output
    ctx.mark_non_differentiable(logits, norm)
    ctx.save_for_backward(entropy, expectations, logits, norm, hidden, weight, candidates, position, values, bias)


def _autograd(
    ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, grad_expectations: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    needs_grad = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[5]]
    upstream = (grad_logprobs, grad_entropy, grad_expectations)
    grads = _ranking_logprobs_backward(*upstream, *ctx.saved_tensors, *ctx.options, needs_grad)
    hidden, weight, bias = (grad if need else None for grad, need in zip(grads, needs_grad, strict=True))
    return hidden, weight, None, None, None, bias, None, None, None


_ranking_logprobs.register_autograd(_autograd, setup_context=_setup_context)


# --- the CPU's implementation -----------------------------------------------------------------------------------------


def _forward(lists: RankedLists, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, t, _ = lists.hidden.shape
    k = lists.candidates.shape[1]
    hidden, rows = gather_operands(lists)
    logits = torch.bmm(hidden, rows.transpose(1, 2))  # (P, G T, K)
    if lists.bias is not None:
        logits += lists.bias.to(logits.dtype)[lists.candidates][:, None]
    logits = logits.div_(lists.temperature).clamp_(min=FLOOR).view(n, t, k)

    pool, live = pools(lists.position, t)
    logits.masked_fill_(~pool, 2 * FLOOR)
    log_probs = logits.log_softmax(-1)
    probs = logits.softmax(-1)  # not exp(log_probs): vectorised exp is slow where it underflows
    logprobs = log_probs.gather(2, ranked_candidates(lists.position, t)[..., None]).squeeze(-1)
    logprobs.masked_fill_(logprobs < IMPOSSIBLE, -math.inf)
    entropy = -(probs * log_probs).sum(-1)
    expectations = torch.bmm(probs, values.to(probs.dtype))
    if lists.ragged:
        logprobs.masked_fill_(~live, 0)
        entropy.masked_fill_(~live, 0)
        expectations.masked_fill_(~live[..., None], 0)
    # What is kept are logits already normalised: nothing is left to subtract, but steps without a gradient are marked.
    constant = ~live if lists.bias is None else logits.amax(-1) < IMPOSSIBLE
    norm = torch.where(constant[..., None], FLOOR, log_probs.new_zeros(2))
    return logprobs, entropy, expectations, log_probs, norm


def _backward(
    upstream: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    lists: RankedLists,
    values: Tensor,
    needs_grad: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_logprobs, grad_entropy, grad_expectations = upstream
    entropy, expectations, log_probs, norm = saved
    n, t, k = log_probs.shape
    p = len(lists.candidates)
    has_gradient = norm[..., 0] > IMPOSSIBLE  # (N, T)
    probs = log_probs.softmax(-1)
    # dz = g_lp (y - p) - g_H p (log p + H) + sum_c g_c p (v_c - E_c), see the top of this file.
    dlogits = log_probs * -grad_entropy[..., None]
    dlogits -= (grad_logprobs + grad_entropy * entropy + (grad_expectations * expectations).sum(-1))[..., None]
    if values.shape[2]:
        dlogits += torch.bmm(grad_expectations, values.to(log_probs.dtype).transpose(1, 2))
    dlogits *= probs
    chosen = ranked_candidates(lists.position, t)[..., None]
    possible = log_probs.gather(2, chosen) > IMPOSSIBLE
    dlogits.scatter_add_(2, chosen, torch.where(possible, grad_logprobs[..., None], 0))
    dlogits *= has_gradient.to(dlogits.dtype)[..., None] / lists.temperature
    dlogits = dlogits.view(p, n // max(p, 1) * t, k)  # (P, G T, K)

    hidden, rows = gather_operands(lists)
    hidden_grad = weight_grad = bias_grad = None
    if needs_grad[0]:
        hidden_grad = torch.bmm(dlogits, rows).view(lists.hidden.shape).to(lists.hidden.dtype)
    flat = lists.candidates.flatten()
    if needs_grad[1]:
        # Into the gathered rows, which are done with: fresh pages would cost as much as the product.
        row_grads = torch.bmm(dlogits.transpose(1, 2), hidden, out=rows).view(p * k, lists.hidden.shape[2])
        weight_grad = torch.zeros(lists.weight.shape, dtype=row_grads.dtype, device=row_grads.device)
        weight_grad = weight_grad.index_add_(0, flat, row_grads).to(lists.weight.dtype)
    if needs_grad[2] and lists.bias is not None:
        bias_grad = torch.zeros(lists.bias.shape, dtype=dlogits.dtype, device=dlogits.device)
        bias_grad = bias_grad.index_add_(0, flat, dlogits.sum(1).flatten()).to(lists.bias.dtype)
    return hidden_grad, weight_grad, bias_grad
