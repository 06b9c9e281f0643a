"""Log-probabilities of rankings under the distribution they are sampled from: at each step, the candidates that remain.

A ranking of K candidates is drawn item by item. At step t the model's logits are restricted to the candidates not yet
placed (the pool) and normalised over them alone:

    z_j  = (hidden[t] . weight[token_j] + bias[token_j]) / temperature
    p_j  = exp(z_j) / sum of exp(z_i) over the pool                      for j in the pool, else 0

So a step is a row of ``restricted_logprobs`` whose set is the pool: entropy, expectations, KL and every gradient are
derived there. In rank order the pool of step t are the entries from rank t on, and its target is the first of them.
Only candidate rows of the output embedding are read: neither logits over the vocabulary nor a tensor (N, K, D) or
(N, T, V) exists anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexrec import checks
from flexrec.checks import check_bias, check_finite, check_range, check_temperature, check_tensor
from flexrec.ops.library import (
    LogprobsOperation,
    accumulation_dtype,
    choose_kernels,
    finite_or_nan,
    kernels,
    log_probs_of,
    without_autocast,
)
from flexrec.ops.rank_order import by_candidate, checked_positions, in_rank_order, lengths_per_ranking, pools
from flexrec.ops.restricted_logprobs import (
    RankingLogprobs,
    RankingLogprobsWithKL,
    Results,
    check_reference,
    results_of,
)
from flexrec.ops.weight_grad import accumulated_grad, check_weight_grad, deliver


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
        backend: "triton" (CUDA or ROCm, or the CPU under TRITON_INTERPRET=1; not float64), "numba" (CPU), "torch"
            (plain operations under autograd, anywhere), or "auto": triton on a GPU where it can, numba on a CPU, else
            torch.

    Returns:
        ``RankingLogprobs(logprobs (N, T), entropy (N, T), expectations (N, T, C) or None)``, float32 (float64 if
        ``hidden`` or ``weight`` is). An impossible chosen candidate has log-probability -inf; the only remaining
        candidate exactly 0.

    Raises:
        TypeError, ValueError: wrong types or shapes, a candidate twice in a ranking, an index or token out of range,
            a backend or a ``weight_grad`` that cannot be had.

    Example:
        >>> hidden, weight = torch.zeros(1, 3, 4), torch.zeros(9, 4)  # every token is equally likely
        >>> candidates, ranking = torch.tensor([[5, 6, 7]]), torch.tensor([[2, 0, 1]])  # 7, then 5, then 6
        >>> found = flexrec.ranking_logprobs(hidden, weight, candidates, ranking)
        >>> found.logprobs.exp()  # one of three, one of two, and what is left
        tensor([[0.3333, 0.5000, 1.0000]])
    """
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    values = _check_values(lists, values)
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

    Example:
        >>> given = torch.ones(1, 3, 4), torch.zeros(9, 4), torch.tensor([[5, 6, 7]]), torch.tensor([[2, 0, 1]])
        >>> found = flexrec.ranking_logprobs_with_kl(*given, ref_hidden=given[0], ref_weight=torch.eye(9, 4))
        >>> found.kl  # to both models 5, 6 and 7 are alike
        tensor([[0., 0., 0.]])
    """
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    lists = add_reference(lists, ref_hidden, ref_weight, ref_bias, ref_logits)
    result = evaluate_lists(lists, _check_values(lists, values), weight_grad=weight_grad, backend=backend)
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

    Example:
        >>> models = torch.zeros(1, 3, 4), torch.zeros(9, 4), torch.ones(1, 3, 4), torch.eye(9, 4)
        >>> flexrec.ranking_kl(*models, torch.tensor([[5, 6, 7]]), torch.tensor([[2, 0, 1]]))  # alike to both
        tensor([[0., 0., 0.]])
    """
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    lists = add_reference(lists, ref_hidden, ref_weight, ref_bias, None)
    kl = evaluate_lists(lists, weight_grad=weight_grad, backend=backend).kl
    assert kl is not None
    return kl


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

    Example:
        >>> hidden, weight = torch.zeros(1, 3, 4), torch.zeros(9, 4)  # every token is equally likely
        >>> candidates, ranking = torch.tensor([[5, 6, 7]]), torch.tensor([[2, 0, 1]])  # 7, then 5, then 6
        >>> flexrec.ranking_probs(hidden, weight, candidates, ranking)
        tensor([[[0.3333, 0.3333, 0.3333],
                 [0.0000, 0.5000, 0.5000],
                 [0.0000, 0.0000, 1.0000]]])
    """
    lists = check_lists(hidden, weight, candidates, ranking, bias=bias, temperature=temperature, lengths=lengths)
    log_probs, pool = step_log_probs(lists)
    return in_rank_order(torch.where(pool, log_probs.exp(), 0.0), lists.position)


# --- on checked arguments ---------------------------------------------------------------------------------------------


class RankedLists(NamedTuple):
    """Checked arguments of the ranking operations, in the order of ``candidates``: what the operation takes.

    Attributes:
        hidden: (N, T, D).
        weight: (V, D).
        bias: (V,) or None.
        candidates: (P, K) int64 token ids; entries beyond a list's length replaced by ids that may be read.
        position: (N, K) int32, the rank of every candidate (see ``rank_order``), -1 beyond a list's length.
        values: (N, K, C) or None, in rank order; for Triton's kernels in candidate order.
        ref_hidden, ref_weight, ref_bias: of the reference, or ref_logits (N, T, K) in candidate order, divided by the
            temperature already.
        temperature: what logits are divided by.
        ragged: whether any list may be shorter than K.
        backend: "numba" or "triton".
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    candidates: Tensor
    position: Tensor
    values: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None
    ref_logits: Tensor | None = None
    temperature: float = 1.0
    ragged: bool = False
    backend: str = "numba"

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """What the kernels of every backend take first."""
        return self.hidden, self.weight, self.bias, self.candidates, self.position

    @property
    def reference(self) -> Any:
        """Hidden, weight and bias of the reference, or its logits, or None."""
        return self.ref_logits if self.ref_hidden is None else (self.ref_hidden, self.ref_weight, self.ref_bias)


def check_lists(
    hidden: Tensor,
    weight: Tensor,
    candidates: Tensor,
    ranking: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    lengths: Tensor | None = None,
) -> RankedLists:
    """Check the arguments that all ranking operations share; meanings as of :func:`ranking_logprobs`."""
    check_tensor("hidden", hidden, ("N", "T", "D"))
    n, t, d = hidden.shape
    check_tensor("weight", weight, ("V", d))
    check_tensor("candidates", candidates, ("P", "K"), "integer")
    check_tensor("ranking", ranking, (n, t), "integer")
    p, k = candidates.shape
    if (n == 0) != (p == 0) or (p and n % p):
        raise ValueError(f"hidden must hold the same number of rankings per list of candidates, got N={n} and P={p}")
    if k == 0:
        raise ValueError(f"candidates must hold at least one candidate per list, got shape {tuple(candidates.shape)}")
    if t > k:
        raise ValueError(f"ranking must not be longer than its list, got T={t} ranks of K={k} candidates")
    check_bias("bias", bias, weight)
    check_temperature(temperature)
    candidates, ranking = candidates.long(), ranking.long()
    vocab = weight.shape[0]
    if lengths is not None:
        lengths = lengths_per_ranking(lengths, n, p, k)
        if checks.values_are_checked(lengths) and checks.lies_within(lengths, k, k):
            lengths = None  # the usual case: all lists are full
    ragged = lengths is not None
    position = checked_positions(candidates, vocab, ranking, lengths)
    if lengths is not None:
        # A list's tail is never read: its tokens give way to the list's first, or to token 0 where the list is empty.
        longest = lengths.view(p, -1).amax(1, keepdim=True) if n else lengths.view(0, 1)  # (P, 1)
        real = torch.arange(k, device=candidates.device) < longest  # (P, K)
        candidates = torch.where(real, candidates, candidates[:, :1]).masked_fill(longest == 0, 0)
    return RankedLists(hidden, weight, bias, candidates, position, temperature=float(temperature), ragged=ragged)


def _check_values(lists: RankedLists, values: Tensor | None) -> Tensor | None:
    """``values`` (N, K, C), detached; their numbers are checked up to each list's length."""
    if values is None:
        return None
    n, k = lists.position.shape
    check_tensor("values", values, (n, k, "C"))
    mask = None
    if lists.ragged:
        in_list = torch.arange(k, device=values.device) <= lists.position.amax(1, keepdim=True)  # (N, K)
        mask = in_list[..., None].expand(values.shape)
    check_finite("values", values, mask)
    return values.detach()


def add_reference(lists: RankedLists, *reference: Tensor | None) -> RankedLists:
    """The lists with the arguments ref_hidden, ref_weight, ref_bias and ref_logits, checked."""
    n, t, _ = lists.hidden.shape
    hidden, weight, bias, logits = check_reference(reference, (n, t, "D'"), (n, t, lists.candidates.shape[1]))
    if weight is not None and len(weight) < len(lists.weight):
        check_range("candidates, which index ref_weight too,", lists.candidates, 0, len(weight) - 1)
    if logits is not None:
        logits = logits.to(accumulation_dtype(lists.hidden, lists.weight)) / lists.temperature
    return lists._replace(ref_hidden=hidden, ref_weight=weight, ref_bias=bias, ref_logits=logits)


def evaluate_lists(
    lists: RankedLists, values: Tensor | None = None, *, weight_grad: str = "dense", backend: str = "auto"
) -> Results:
    """What the public functions have in common; ``values`` (N, K, C) finite, in rank order, without gradient."""
    backend = choose_kernels(backend, lists.hidden, lists.weight)
    check_weight_grad(weight_grad, backend, lists.weight, lists)
    lists = lists._replace(values=values, backend=backend)
    if backend == "torch":
        return from_distribution(*step_log_probs(lists), lists)
    if values is not None and backend == "triton":
        lists = lists._replace(values=by_candidate(values, lists.position))
    logprobs, entropy, expectations, kl = _operation(lists, weight_grad)
    return Results(logprobs, entropy, None if values is None else expectations, None if lists.reference is None else kl)


# --- by plain operations ----------------------------------------------------------------------------------------------


def step_log_probs(lists: RankedLists) -> tuple[Tensor, Tensor]:
    """The restricted distribution of every step as an ordinary differentiable tensor.

    Returns:
        log-probabilities (N, T, K) in candidate order, as of :func:`flexrec.ops.restricted_logprobs.log_probs_of`; and
        the pool (N, T, K) bool.
    """
    (n, t, d), (p, k) = lists.hidden.shape, lists.candidates.shape
    dtype = accumulation_dtype(lists.hidden, lists.weight)
    pool, live = pools(lists.position, t)
    hidden = lists.hidden.to(dtype)
    if lists.ragged:  # what a step without a pool holds is not read
        hidden = hidden.masked_fill(~live[..., None], 0)
    hidden = hidden.reshape(p, n // max(p, 1) * t, d)  # (P, G T, D)
    rows = lists.weight.index_select(0, lists.candidates.flatten()).to(dtype).view(p, k, d)
    with without_autocast(hidden):
        logits = finite_or_nan(hidden @ rows.transpose(1, 2))  # (P, G T, K)
    if lists.bias is not None:
        logits = logits + lists.bias.to(dtype)[lists.candidates][:, None]
    return log_probs_of((logits / lists.temperature).view(n, t, k), pool), pool


def from_distribution(log_probs: Tensor, pool: Tensor, lists: RankedLists) -> Results:
    """The results from an explicit distribution as :func:`step_log_probs` gives it."""
    steps = torch.arange(log_probs.shape[1], device=pool.device)
    chosen = lists.position[:, None] == steps[:, None]  # (N, T, K)
    values = None if lists.values is None else by_candidate(lists.values, lists.position)
    ref_log_probs = None
    with torch.no_grad():
        if lists.ref_logits is not None:
            ref_log_probs = log_probs_of(lists.ref_logits, pool)
        elif lists.ref_hidden is not None and lists.ref_weight is not None:
            other = lists._replace(hidden=lists.ref_hidden, weight=lists.ref_weight, bias=lists.ref_bias)
            ref_log_probs = step_log_probs(other)[0].to(log_probs.dtype)
    return results_of(log_probs, pool, chosen, values, ref_log_probs)


# --- the operation ----------------------------------------------------------------------------------------------------


def _forward(x: RankedLists, with_grad: bool) -> Sequence[Tensor | None]:
    """The results; for the backward pass logits and norm, and those of the reference, in the backend's own layout."""
    module = kernels(x.backend, "ranking_logprobs")
    if x.backend == "numba":
        return module.ranking_logprobs_forward(*x.operands, x.values, x.temperature, x.reference, with_grad)
    kept = with_grad and module.keeps_logits(x.candidates.shape[1], x.hidden.shape[2])
    options = {"reference": x.reference, "save_logits": kept}
    with without_autocast(x.hidden):
        return module.ranking_logprobs_forward(*x.operands, _values_or_empty(x), x.temperature, **options)


def _backward(
    upstream: Sequence[Any], saved: Sequence[Any], x: RankedLists, needs_grad: list[bool], weight_grad: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if x.backend == "triton":
        with without_autocast(x.hidden):
            return _triton_backward(upstream, saved, x, needs_grad, weight_grad)
    numba = kernels("numba", "ranking_logprobs")
    hidden_grad, rows, bias_rows = numba.ranking_logprobs_backward(
        upstream, saved, *x.operands, x.values, x.temperature, needs_grad
    )
    return hidden_grad, *_by_token(rows, bias_rows, x, weight_grad)


def _triton_backward(
    upstream: Sequence[Any], saved: Sequence[Any], x: RankedLists, needs_grad: list[bool], weight_grad: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    module = kernels("triton", "ranking_logprobs")
    repeatable = weight_grad == "rows" or torch.are_deterministic_algorithms_enabled()
    mode, bias_grad = "rows" if repeatable else weight_grad, None
    into: tuple[Tensor | None, Tensor | None] = (None, None)
    if mode == "accumulate" and needs_grad[1]:
        if needs_grad[2] and x.bias is not None:  # as rows of weight, so numbers of bias; but its gradient is returned
            bias_grad = torch.zeros_like(x.bias, dtype=torch.float32)
        into = (accumulated_grad(x.weight), bias_grad)
    elif mode == "accumulate":
        mode = "dense"
    arguments = *x.operands, _values_or_empty(x), x.temperature, needs_grad
    options = {"weight_mode": mode, "into": into, "reference": x.reference, "ragged": x.ragged}
    hidden_grad, of_weight, of_bias = module.ranking_logprobs_backward(
        tuple(upstream), module.Forward(None, *saved), *arguments, **options
    )
    if repeatable:
        k = x.candidates.shape[1]
        rows = None if of_weight is None else of_weight.view(-1, k, of_weight.shape[1])
        return hidden_grad, *_by_token(rows, of_bias, x, weight_grad)
    if bias_grad is not None and x.bias is not None:
        of_bias = bias_grad.to(x.bias.dtype)
    return hidden_grad, of_weight, of_bias


def _values_or_empty(x: RankedLists) -> Tensor:
    return x.hidden.new_empty((*x.position.shape, 0)) if x.values is None else x.values


def _by_token(
    rows: Tensor | None, bias_rows: Tensor | None, x: RankedLists, weight_grad: str
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias from those of every candidate of every list, (P, K, D) and (P, K)."""
    tokens = x.candidates.flatten()
    of_weight = of_bias = None
    if rows is not None:
        of_weight = deliver(weight_grad, x.weight, tokens, rows.flatten(0, 1))
    if bias_rows is not None and x.bias is not None:
        of_bias = bias_rows.new_zeros(x.bias.shape).index_add_(0, tokens, bias_rows.flatten()).to(x.bias.dtype)
    return of_weight, of_bias


def _fake(x: RankedLists) -> list[Tensor]:
    n, t, _ = x.hidden.shape
    k, channels = x.candidates.shape[1], 0 if x.values is None else x.values.shape[2]
    dtype, by_triton = accumulation_dtype(x.hidden, x.weight), x.backend == "triton"
    has_reference = x.reference is not None
    shown, kept, ref_kept = k, True, has_reference
    if by_triton:
        module = kernels("triton", "ranking_logprobs")
        shown, kept = module.padded(k), module.keeps_logits(k, x.hidden.shape[2])
        ref_kept = kept and x.ref_hidden is not None
    shapes: list[tuple[int, ...] | None] = [
        (n, t),
        (n, t),
        (n, t, channels),
        (n, t) if has_reference else None,
        (n, t, shown) if kept else None,
        (n, t, 4 if has_reference and not by_triton else 2),
        (n, t, shown) if ref_kept else None,
        (n, t, 2) if has_reference and by_triton else None,
    ]
    return [x.hidden.new_empty(0) if shape is None else x.hidden.new_empty(shape, dtype=dtype) for shape in shapes]


_operation = LogprobsOperation("ranking_logprobs", RankedLists, forward=_forward, backward=_backward, fake=_fake)
