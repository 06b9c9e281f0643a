"""Log-probabilities over ragged sets of allowed tokens: one row of hidden states, one set, one target.

With z_e = (hidden[m] . weight[token_e] + bias[token_e]) / temperature for the entries e of row m's set, everything is
a function of z, one number per entry: p_e = exp(z_e) / sum of exp(z_i) over the row, and

    H = -sum_e p_e log p_e,    E_c = sum_e p_e v_ec,    KL = sum_e p_e (log p_e - log q_e)       (q: a reference's p)

The whole support is at hand, so all three are exact sums, where trainers over a full vocabulary use single-sample
estimates. With upstream gradients g_lp of the target's log-probability (y is its one-hot vector), g_H, g_c and g_KL,

    dz_e = g_lp (y_e - p_e) - g_H p_e (log p_e + H) + sum_c g_c p_e (v_ec - E_c) + g_KL p_e (log p_e - log q_e - KL),

since d p_e / d z_i = p_e (1[i = e] - p_i). A step of a ranking is such a row, its set what remains (see
``ranking_logprobs``).

Only z costs D operations per entry, and so do its gradients, d hidden = dZ weight and d weight = dZ^T hidden with dZ
(M, V) sparse. Triton's kernels and the CPU's are functions of the same names and meanings. Neither gathered rows
(nnz, D) nor logits (M, V) exist; between the passes nnz logits are kept, and nnz of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexrec.checks import check_bias, check_finite, check_range, check_temperature, check_tensor, values_are_checked
from flexrec.numba_kernels import FLOOR, IMPOSSIBLE
from flexrec.ops.library import (
    LogprobsOperation,
    accumulation_dtype,
    choose_kernels,
    finite_or_nan,
    kernels,
    log_probs_of,
    without_autocast,
)
from flexrec.ops.weight_grad import accumulated_grad, check_weight_grad


class RankingLogprobs(NamedTuple):
    """Log-probability of what was chosen, entropy, and expectations of the values (None without any)."""

    logprobs: Tensor
    entropy: Tensor
    expectations: Tensor | None


class RankingLogprobsWithKL(NamedTuple):
    """:class:`RankingLogprobs`, and KL(policy || reference)."""

    logprobs: Tensor
    entropy: Tensor
    expectations: Tensor | None
    kl: Tensor


def restricted_logprobs(
    hidden: Tensor,
    weight: Tensor,
    allowed_ids: Tensor,
    allowed_offsets: Tensor,
    targets: Tensor,
    *,
    values: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> RankingLogprobs:
    """Log-probability of M targets, entropy and expectations, each under a softmax over its own allowed tokens.

    Differentiable (once; the "torch" backend any number of times) in ``hidden``, ``weight`` and ``bias``, through all
    three results. ``values`` get no gradient.

    Args:
        hidden: (M, D) floating, the state that predicts the target.
        weight: (V, D) floating, the model's output embedding.
        allowed_ids: (nnz,) integer token ids; set m is ``allowed_ids[allowed_offsets[m] : allowed_offsets[m + 1]]``,
            in any order, no token twice.
        allowed_offsets: (M + 1,) integer, from 0 to nnz.
        targets: (M,) integer token ids, each among its row's allowed tokens.
        values: (nnz, C) floating, values of the allowed tokens.
        bias: (V,) floating, added to the logits; -inf makes a token impossible (probability exactly 0, no gradient).
            Where every allowed token is impossible each is equally likely and nothing has a gradient.
        temperature: what the logits are divided by; positive.
        weight_grad: how ``weight`` gets its gradient, as of ``ranking_logprobs``; the sparse tensor of "rows" has each
            token once.
        backend: "triton" (CUDA or ROCm, or the CPU under TRITON_INTERPRET=1; not float64), "torch" (gathers the rows
            of every entry and pads the sets: simple, anywhere, memory and time of (nnz, D)), "numba" (CPU), or "auto":
            triton on a GPU, numba on a CPU, torch where neither can.

    Returns:
        ``RankingLogprobs(logprobs (M,), entropy (M,), expectations (M, C) or None)``, float32 (float64 if ``hidden``
        or ``weight`` is). A row with one allowed token has log-probability and entropy exactly 0 and no gradient; its
        hidden state and weight row are not read. Where values are not checked (:func:`flexrec.set_value_checks`), a
        target that is not allowed has log-probability NaN.

    Raises:
        TypeError, ValueError: wrong types or shapes, offsets that do not ascend, a token out of range or twice in a
            set, a target that is not among its row's allowed tokens, a backend that cannot do what is asked.

    Example:
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(9, 4)  # all tokens are alike
        >>> allowed, offsets = torch.tensor([5, 6, 7, 3, 4]), torch.tensor([0, 3, 5])  # {5, 6, 7}, then {3, 4}
        >>> flexrec.restricted_logprobs(hidden, weight, allowed, offsets, torch.tensor([6, 3])).logprobs.exp()
        tensor([0.3333, 0.5000])
    """
    sets = check_sets(hidden, weight, bias, allowed_ids, allowed_offsets, targets, temperature)
    logprobs, entropy, expectations, _ = evaluate(sets, values, weight_grad, backend)
    return RankingLogprobs(logprobs, entropy, expectations)


def restricted_logprobs_with_kl(
    hidden: Tensor,
    weight: Tensor,
    allowed_ids: Tensor,
    allowed_offsets: Tensor,
    targets: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logits: Tensor | None = None,
    values: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> RankingLogprobsWithKL:
    """:func:`restricted_logprobs` and, in the same pass, the exact KL(policy || reference) over each row's tokens.

    Differentiable in ``hidden``, ``weight`` and ``bias`` through all four results; nothing of the reference gets a
    gradient.

    Args:
        ref_hidden, ref_weight, ref_bias: (M, D'), (V, D') and (V,) of the reference, whose logits are divided by
            ``temperature`` too; or instead
        ref_logits: (nnz,) floating, the reference's logits of the allowed tokens, saved from before: already divided
            by the temperature, up to a constant per row, so that log-probabilities serve as well. -inf is impossible.
        the others: those of :func:`restricted_logprobs`.

    Returns:
        ``RankingLogprobsWithKL(logprobs (M,), entropy (M,), expectations (M, C) or None, kl (M,))``. kl is >= 0 up
        to rounding, exactly 0 where the two agree bit by bit and where one token is allowed, or none; infinite, and
        without a gradient, where the policy allows what the reference's bias makes impossible.

    Example:
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(9, 4)  # all tokens are alike
        >>> allowed, offsets = torch.tensor([5, 6, 7, 3, 4]), torch.tensor([0, 3, 5])  # {5, 6, 7}, then {3, 4}
        >>> given = hidden, weight, allowed, offsets, torch.tensor([6, 3])
        >>> flexrec.restricted_logprobs_with_kl(*given, ref_hidden=hidden, ref_weight=weight).kl
        tensor([0., 0.])
    """
    sets = check_sets(hidden, weight, bias, allowed_ids, allowed_offsets, targets, temperature)
    sets = _add_reference(sets, ref_hidden, ref_weight, ref_bias, ref_logits)
    logprobs, entropy, expectations, kl = evaluate(sets, values, weight_grad, backend)
    assert kl is not None
    return RankingLogprobsWithKL(logprobs, entropy, expectations, kl)


def restricted_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    allowed_ids: Tensor,
    allowed_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    weight_grad: str = "dense",
    backend: str = "auto",
) -> Tensor:
    """KL(policy || reference) of M rows, each over its own allowed tokens; there need be none.

    Args:
        hidden, weight, bias: of the policy; allowed_ids, allowed_offsets, temperature, weight_grad, backend: as of
            :func:`restricted_logprobs`.
        ref_hidden, ref_weight, ref_bias: (M, D'), (V, D') and (V,) of the reference. They get no gradient.

    Returns:
        (M,) float32 (float64 if the policy's inputs are), as of :func:`restricted_logprobs_with_kl`, which gives the
        log-probabilities as well at no further cost.

    Example:
        >>> hidden, other, weight = torch.zeros(2, 4), torch.ones(2, 4), torch.zeros(9, 4)
        >>> allowed, offsets = torch.tensor([5, 6, 7, 3, 4]), torch.tensor([0, 3, 5])  # {5, 6, 7}, then {3, 4}
        >>> flexrec.restricted_kl(hidden, weight, other, weight, allowed, offsets)  # to both, all tokens are alike
        tensor([0., 0.])
    """
    sets = check_sets(hidden, weight, bias, allowed_ids, allowed_offsets, None, temperature)
    kl = evaluate(_add_reference(sets, ref_hidden, ref_weight, ref_bias, None), None, weight_grad, backend).kl
    assert kl is not None
    return kl


# --- what ranking_logprobs shares -------------------------------------------------------------------------------------


class Results(NamedTuple):
    """Log-probs, entropy, expectations if there are values, KL if there is a reference."""

    logprobs: Tensor
    entropy: Tensor
    expectations: Tensor | None
    kl: Tensor | None


Reference = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # hidden, weight and bias, or logits


def check_reference(
    reference: Sequence[Tensor | None], hidden_shape: Sequence[int | str], logits_shape: Sequence[int]
) -> Reference:
    """Check the arguments ref_hidden, ref_weight, ref_bias and ref_logits, and detach them."""
    hidden, weight, bias, logits = reference
    names = ("ref_hidden", "ref_weight", "ref_bias", "ref_logits")
    given = " and ".join(name for name, x in zip(names, reference, strict=True) if x is not None)
    if logits is not None:
        if not (hidden is None and weight is None and bias is None):
            raise ValueError(f"ref_logits take the place of ref_hidden, ref_weight and ref_bias; got {given}")
        check_tensor("ref_logits", logits, logits_shape)
        check_range("ref_logits", logits, -math.inf, torch.finfo(logits.dtype).max)
    elif hidden is None or weight is None:
        raise ValueError(f"a reference is needed: ref_hidden and ref_weight, or ref_logits; got {given or 'none'}")
    else:
        check_tensor("ref_hidden", hidden, hidden_shape)
        check_tensor("ref_weight", weight, ("V", hidden.shape[-1]))
        check_bias("ref_bias", bias, weight)
    hidden, weight, bias, logits = (None if x is None else x.detach() for x in reference)
    return hidden, weight, bias, logits


def results_of(
    log_probs: Tensor, pool: Tensor, chosen: Tensor, values: Tensor | None = None, ref_log_probs: Tensor | None = None
) -> Results:
    """The results from an explicit distribution, by plain operations under autograd.

    Args:
        log_probs, ref_log_probs: (N, T, K) from :func:`log_probs_of`; pool: (N, T, K) bool.
        chosen: (N, T, K) bool, the entry whose log-probability is wanted; none: 0.
        values: (N, K, C).
    """
    probs = torch.where(pool, log_probs.exp(), 0.0)  # (N, T, K)
    logprobs = torch.where(chosen, log_probs, 0.0).sum(-1)  # (N, T)
    expectations = kl = None
    if values is not None:
        with without_autocast(probs):
            expectations = probs @ values.to(probs.dtype)  # (N, T, C)
    if ref_log_probs is not None:
        unreachable = ((ref_log_probs < IMPOSSIBLE) & (probs > 0)).any(-1)  # (N, T)
        kl = torch.where(unreachable, math.inf, torch.where(pool, probs * (log_probs - ref_log_probs), 0.0).sum(-1))
    return Results(
        logprobs + torch.where(logprobs < IMPOSSIBLE, -math.inf, 0.0),  # adding -inf keeps the gradient of the rest
        -(probs * log_probs).sum(-1),
        expectations,
        kl,
    )


# --- on checked arguments ---------------------------------------------------------------------------------------------


class AllowedSets(NamedTuple):
    """Checked arguments, what the operation takes: M sets, nnz entries in all.

    Attributes:
        hidden: (M, D).
        weight: (V, D).
        bias: (V,) or None.
        ids: (nnz,) int64 token ids, contiguous.
        offsets: (M + 1,) int64, contiguous.
        targets: (M,) int64, contiguous, or None.
        values: (nnz, C) or None.
        ref_hidden, ref_weight, ref_bias: of the reference, or ref_logits (nnz,).
        temperature: what logits are divided by.
        backend: "numba" or "triton".
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    offsets: Tensor
    targets: Tensor | None
    values: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None
    ref_logits: Tensor | None = None
    temperature: float = 1.0
    backend: str = "numba"

    @property
    def reference(self) -> Any:
        """Hidden, weight and bias of the reference, or its logits, or None."""
        return self.ref_logits if self.ref_hidden is None else (self.ref_hidden, self.ref_weight, self.ref_bias)


def check_sets(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    allowed_ids: Tensor,
    allowed_offsets: Tensor,
    targets: Tensor | None,
    temperature: float,
    names: tuple[str, str] = ("allowed_ids", "allowed_offsets"),
    rows: Tensor | None = None,
) -> AllowedSets:
    """The arguments of the operation; ``names`` and ``rows`` (M,) are what messages call the sets and their rows."""
    check_tensor("hidden", hidden, ("M", "D"))
    m, d = hidden.shape
    check_tensor("weight", weight, ("V", d))
    check_tensor(names[0], allowed_ids, ("nnz",), "integer")
    check_tensor(names[1], allowed_offsets, (m + 1,), "integer")
    check_bias("bias", bias, weight)
    check_temperature(temperature)
    ids, offsets = allowed_ids.long().contiguous(), allowed_offsets.long().contiguous()
    if targets is not None:
        check_tensor("targets", targets, (m,), "integer")
        targets = targets.long().contiguous()
    if values_are_checked(ids):
        _check_entries(ids, offsets, targets, weight.shape[0], names, rows)
    return AllowedSets(hidden, weight, bias, ids, offsets, targets, temperature=float(temperature))


def _check_entries(
    ids: Tensor,
    offsets: Tensor,
    targets: Tensor | None,
    vocab_size: int,
    names: tuple[str, str],
    rows: Tensor | None,
) -> None:
    """Raise ValueError at the first fault of the sets' tokens, on the CPU wherever they are."""
    numba, (of_ids, of_offsets) = kernels("numba", "restricted_logprobs"), names
    on_cpu = (numba.NOWHERE if x is None else x.cpu().numpy() for x in (ids, offsets, targets))
    fault, a, b = numba.check_entries(*on_cpu, vocab_size)
    if fault == numba.ENDS:
        raise ValueError(f"{of_offsets} must go from 0 to len({of_ids}) = {len(ids)}, got {a} to {b}")
    if fault == numba.OUTSIDE:
        raise ValueError(f"{of_ids} must lie in [0, {vocab_size - 1}], got {b} at index [{a}]")
    row = a if rows is None or fault == numba.FINE else int(rows[a])
    if fault == numba.DESCENDING:
        raise ValueError(f"{of_offsets} must not descend, but do after entry {row}")
    if fault == numba.REPEATED:
        raise ValueError(f"{of_ids} must name a token once per row; row {row} has {b} twice")
    if fault == numba.MISSING_TARGET:
        allowed = ids[int(offsets[a]) : int(offsets[a + 1])].tolist()
        shown = ", ".join(map(str, allowed[:8])) + (", .." if len(allowed) > 8 else "")
        raise ValueError(
            f"targets must be among their row's {of_ids}; row {row} has target {b} and {len(allowed)} allowed: "
            f"[{shown}]"
        )


def _add_reference(sets: AllowedSets, *reference: Tensor | None) -> AllowedSets:
    hidden, weight, bias, logits = check_reference(reference, (len(sets.hidden), "D'"), (len(sets.ids),))
    if weight is not None:
        check_tensor("ref_weight", weight, (len(sets.weight), "D'"))
    if logits is not None:
        logits = logits.to(accumulation_dtype(sets.hidden, sets.weight)).clamp(min=FLOOR)
    return sets._replace(ref_hidden=hidden, ref_weight=weight, ref_bias=bias, ref_logits=logits)


def evaluate(sets: AllowedSets, values: Tensor | None, weight_grad: str, backend: str) -> Results:
    """Log-probs (M,), 0 without targets, entropy (M,), expectations (M, C) and KL (M,)."""
    if values is not None:
        check_tensor("values", values, (len(sets.ids), "C"))
        check_finite("values", values)
        values = values.detach()
    backend = choose_kernels(backend, sets.hidden, sets.weight)
    check_weight_grad(weight_grad, backend, sets.weight, sets)
    sets = sets._replace(values=values, backend=backend)
    if backend == "torch":
        return _torch_results(sets)
    logprobs, entropy, expectations, kl = _operation(sets, weight_grad)
    return Results(
        logprobs, entropy, None if values is None else expectations, kl if sets.reference is not None else None
    )


def _torch_results(sets: AllowedSets) -> Results:
    """The results from padded sets, of which each is the only step of a ranking."""
    hidden, weight, bias, ids, offsets, targets, values, *_ = sets
    m, dtype = len(hidden), accumulation_dtype(hidden, weight)
    counts = offsets.diff()  # (M,)
    row = torch.arange(m, device=ids.device).repeat_interleave(counts)  # (nnz,)
    column = torch.arange(len(ids), device=ids.device) - offsets[row]  # (nnz,)
    size = int(counts.max()) if m else 0

    def padded(entries: Tensor) -> Tensor:
        return entries.new_zeros((m, size, *entries.shape[1:])).index_put((row, column), entries)

    def log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = finite_or_nan((hidden.to(dtype)[row] * weight.index_select(0, ids).to(dtype)).sum(-1))  # (nnz,)
        if bias is not None:
            logits = logits + bias.to(dtype)[ids]
        return log_probs_of(padded(logits / sets.temperature)[:, None], pool)

    pool = padded(torch.ones_like(ids, dtype=torch.bool))[:, None]  # (M, 1, K)
    chosen = torch.zeros_like(pool) if targets is None else padded(ids == targets[row])[:, None]
    ref_log_probs = None
    with torch.no_grad():
        if sets.ref_logits is not None:
            ref_log_probs = log_probs_of(padded(sets.ref_logits)[:, None], pool)
        elif sets.ref_hidden is not None and sets.ref_weight is not None:
            ref_log_probs = log_probs(sets.ref_hidden, sets.ref_weight, sets.ref_bias)
    by_entry = None if values is None else padded(values)
    found = results_of(log_probs(hidden, weight, bias), pool, chosen, by_entry, ref_log_probs)
    if targets is not None:  # adding NaN keeps the gradients of the rest
        found = found._replace(logprobs=found.logprobs + torch.where(chosen.any(-1), 0.0, math.nan))
    return Results(*(None if x is None else x.squeeze(1) for x in found))  # type: ignore[arg-type]


# --- the operation ----------------------------------------------------------------------------------------------------


def _forward(x: AllowedSets, with_grad: bool) -> tuple[Tensor | None, ...]:
    """The results; for the backward pass norm, logits and row (nnz,), and the logits of a reference that is a model."""
    module = kernels(x.backend, "restricted_logprobs")
    operands = x.hidden, x.weight, x.bias, x.ids, x.offsets, x.targets, x.values
    options = {"keep": with_grad} if x.backend == "numba" else {}
    return module.restricted_logprobs_forward(*operands, x.reference, x.temperature, **options)


def _backward(
    upstream: Sequence[Any], saved: Sequence[Any], x: AllowedSets, needs_grad: Sequence[bool], weight_grad: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    module = kernels(x.backend, "restricted_logprobs")
    *results, logits, row, made = saved
    logits_and_values = logits, x.ref_logits if x.ref_hidden is None else made, x.values
    dlogits = module.set_softmax_backward(
        upstream, results, *logits_and_values, x.ids, x.offsets, row, x.targets, x.temperature
    )  # (nnz,)
    of_hidden = of_weight = of_bias = None
    if needs_grad[0]:
        of_hidden = module.hidden_gradient(dlogits, x.hidden, x.weight, x.ids, x.offsets, row)
    if needs_grad[1]:
        operands = dlogits, x.hidden, x.weight, x.ids, row
        if weight_grad == "rows":
            tokens, rows = module.weight_gradient_rows(*operands)
            of_weight = torch.sparse_coo_tensor(
                tokens[None], rows, x.weight.shape, is_coalesced=True, check_invariants=False
            )
        elif weight_grad == "accumulate":
            module.weight_gradient(*operands, accumulated_grad(x.weight))
        else:
            of_weight = module.weight_gradient(*operands)
    if needs_grad[2] and x.bias is not None:
        of_bias = dlogits.new_zeros(x.bias.shape).index_add_(0, x.ids, dlogits).to(x.bias.dtype)
    return of_hidden, of_weight, of_bias


def _fake(x: AllowedSets) -> list[Tensor]:
    m, dtype = x.hidden.shape[0], accumulation_dtype(x.hidden, x.weight)
    has_reference, channels = x.reference is not None, 0 if x.values is None else x.values.shape[1]
    kl = (m,) if has_reference else (0,)
    made = x.ids.shape if x.ref_hidden is not None else (0,)
    norm = 4 if has_reference or x.backend == "triton" else 2
    shapes = (m,), (m,), (m, channels), kl, (m, norm), x.ids.shape
    results = [x.hidden.new_empty(shape, dtype=dtype) for shape in shapes]
    row = x.ids.new_empty(x.ids.shape, dtype=torch.int32 if x.backend == "triton" else torch.int64)
    return [*results, row, x.hidden.new_empty(made, dtype=dtype if x.ref_hidden is not None else x.hidden.dtype)]


_operation = LogprobsOperation("restricted_logprobs", AllowedSets, forward=_forward, backward=_backward, fake=_fake)
