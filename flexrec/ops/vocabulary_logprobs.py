"""Log-probabilities over the whole vocabulary, or, where a sampler had cut it, over the tokens that it had left.

Positions without a restriction: reasoning before a ranking, or tokens sampled from all. Logits of ``chunk_size`` of
them exist at a time, in the forward pass and, formed once more, in the backward pass: memory is that of a few
(chunk_size, V) in float32 and of the gradients, and does not grow with the number of positions. Restricted positions
take the kernels of :mod:`flexrec.ops.restricted_logprobs`, which form no logit but those that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flexrec.checks import check_bias, check_temperature, check_tensor, values_are_checked
from flexrec.numba_kernels import FLOOR, IMPOSSIBLE
from flexrec.ops.library import accumulation_dtype, without_autocast
from flexrec.ops.restricted_logprobs import check_sets, evaluate


class ReplayedLogprobs(NamedTuple):
    """Log-probability of what was sampled, and the entropy of what it was sampled from."""

    logprobs: Tensor
    entropy: Tensor


def replay_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    offsets: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    weight_grad: str = "dense",
    chunk_size: int = 512,
    backend: str = "auto",
) -> ReplayedLogprobs:
    """Log-probability of M sampled tokens, each under the support that it was sampled from, and the entropies.

    Top-k, top-p and min-p sampling draw from a softmax over the tokens that they keep. Engines return these: row m's
    are ``token_ids[offsets[m] : offsets[m + 1]]``, and none at all mean that nothing was cut, the whole vocabulary.
    Rows of both kinds may stand in one call. The arguments are of the layout in which engines hold sampling masks;
    :mod:`flexrec.integrations.sampling_masks` reads their objects.

    Differentiable (once) in ``hidden``, ``weight`` and ``bias``, through both results.

    Args:
        hidden: (M, D) floating, the state that predicts the target.
        weight: (V, D) floating, the model's output embedding.
        token_ids: (nnz,) integer token ids, in any order, no token twice in a row.
        offsets: (M + 1,) integer, from 0 to nnz; two that are equal stand for the whole vocabulary.
        targets: (M,) integer token ids, each among its row's tokens.
        bias: (V,) floating, added to the logits; -inf makes a token impossible.
        temperature: what the logits are divided by; positive.
        weight_grad: how ``weight`` gets its gradient from restricted rows, as of :func:`restricted_logprobs`; from the
            others it is dense.
        chunk_size: rows over the whole vocabulary whose logits exist at a time.
        backend: of restricted rows, as of :func:`restricted_logprobs`; the others are a matrix product on any device.

    Returns:
        ``ReplayedLogprobs(logprobs (M,), entropy (M,))``, float32 (float64 if ``hidden`` or ``weight`` is).

    Raises:
        TypeError, ValueError: wrong types or shapes, offsets that do not ascend, a token out of range or twice in a
            row, a target that is not among its row's tokens, a backend that cannot do what is asked.

    Example:
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)  # all tokens are alike
        >>> kept, offsets = torch.tensor([5, 6]), torch.tensor([0, 2, 2])  # {5, 6}, then nothing was cut
        >>> flexrec.replay_logprobs(hidden, weight, kept, offsets, torch.tensor([6, 3])).logprobs.exp()
        tensor([0.5000, 0.1250])
    """
    check_tensor("hidden", hidden, ("M", "D"))
    check_tensor("weight", weight, ("V", hidden.shape[1]))
    check_tensor("token_ids", token_ids, ("nnz",), "integer")
    check_tensor("offsets", offsets, (len(hidden) + 1,), "integer")
    check_tensor("targets", targets, (len(hidden),), "integer")
    check_bias("bias", bias, weight)
    check_temperature(temperature)
    _check_chunk_size(chunk_size)
    offsets, targets = offsets.long(), targets.long()
    is_whole = offsets.diff() == 0  # (M,)
    whole = is_whole.nonzero()[:, 0]  # on a GPU this waits for the device: sizes depend on it
    if values_are_checked(targets):
        _check_targets(targets[whole], weight.shape[0], rows=whole)
    rows = torch.arange(len(hidden), device=hidden.device) if not len(whole) else (~is_whole).nonzero()[:, 0]
    ends = torch.cat([offsets[:1], offsets[1:][rows]])  # rows without tokens leave no trace in token_ids
    if not len(rows) and len(token_ids):
        raise ValueError(
            f"offsets must go from 0 to len(token_ids) = {len(token_ids)}, got {int(offsets[0])} everywhere"
        )
    found = None
    if len(rows):
        states = hidden if not len(whole) else hidden.index_select(0, rows)
        names = ("token_ids", "offsets")
        sets = check_sets(states, weight, bias, token_ids, ends, targets[rows], temperature, names, rows)
        restricted = evaluate(sets, None, weight_grad, backend)
        found = ReplayedLogprobs(restricted.logprobs, restricted.entropy)
        if not len(whole):
            return found
    unrestricted = _whole_vocabulary(
        hidden.index_select(0, whole), weight, bias, targets[whole], temperature, chunk_size
    )
    if found is None:
        return unrestricted
    place = torch.empty_like(targets).index_copy_(0, torch.cat([rows, whole]), torch.arange(len(targets)).to(targets))
    return ReplayedLogprobs(*(torch.cat(parts)[place] for parts in zip(found, unrestricted, strict=True)))


def vocabulary_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    never: Sequence[int] = (),
    chunk_size: int = 512,
) -> Tensor:
    """Log-probability of M targets, each under a softmax over all tokens but ``never``.

    Differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: (M, D) floating, the state that predicts the target.
        weight: (V, D) floating, the model's output embedding.
        targets: (M,) integer token ids, none of ``never``.
        bias: (V,) floating, added to the logits.
        temperature: what the logits are divided by; positive.
        soft_cap: c, where logits are c tanh(logit / c) before that; positive. None: they are not.
        never: token ids that are impossible.
        chunk_size: positions whose logits exist at a time.

    Returns:
        (M,) float32 (float64 if ``hidden`` or ``weight`` is).

    Raises:
        TypeError, ValueError: wrong types or shapes, a token out of range, a target that is impossible.
    """
    check_tensor("hidden", hidden, ("M", "D"))
    check_tensor("weight", weight, ("V", hidden.shape[1]))
    check_tensor("targets", targets, (hidden.shape[0],), "integer")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],))
    check_temperature(temperature)
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
    _check_chunk_size(chunk_size)
    size = weight.shape[0]
    if any(not 0 <= token < size for token in never):
        raise ValueError(f"never must hold token ids from 0 to {size - 1}, got {list(never)}")
    impossible = torch.tensor(sorted(set(never)), dtype=torch.int64, device=hidden.device)
    if values_are_checked(targets):
        _check_targets(targets, size, impossible)
    dtype = accumulation_dtype(hidden, weight)

    def of_chunk(states: Tensor, of_targets: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(states, weight, bias).to(dtype)  # (chunk, V)
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        logits = (logits / temperature).index_fill(1, impossible, -torch.inf)
        return logits.log_softmax(dim=1).gather(1, of_targets[:, None])[:, 0]

    chunks = zip(hidden.split(chunk_size), targets.long().split(chunk_size), strict=True)
    return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def _whole_vocabulary(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int
) -> ReplayedLogprobs:
    """Log-probs and entropies (M,), a chunk of rows at a time; impossible tokens as in :func:`restricted_logprobs`."""
    dtype = accumulation_dtype(hidden, weight)
    common = torch.promote_types(hidden.dtype, weight.dtype)  # a product's operands must agree, as autocast had seen to

    def of_chunk(states: Tensor, of_targets: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(states):
            logits = torch.nn.functional.linear(states.to(common), weight.to(common)).to(dtype)  # (chunk, V)
        if bias is not None:
            logits = logits + bias.to(dtype)
        logits = logits / temperature
        log_probs = torch.where(logits < FLOOR, FLOOR, logits).log_softmax(dim=1)
        logprobs = log_probs.gather(1, of_targets[:, None])[:, 0]
        logprobs = logprobs + torch.where(logprobs < IMPOSSIBLE, -torch.inf, 0.0)
        return logprobs, -(log_probs.exp() * log_probs).sum(dim=1)

    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return ReplayedLogprobs(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _check_targets(targets: Tensor, size: int, impossible: Tensor | None = None, *, rows: Tensor | None = None) -> None:
    """Raise ValueError at the first target that is no possible token; ``rows`` are the caller's numbers of them."""
    wrong = (targets < 0) | (targets >= size)
    if impossible is not None:
        wrong |= torch.isin(targets, impossible)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        never = "" if impossible is None else " and none of never"
        raise ValueError(
            f"targets must hold token ids from 0 to {size - 1}{never}, got {int(targets[at])} at index "
            f"{at if rows is None else int(rows[at])}"
        )
