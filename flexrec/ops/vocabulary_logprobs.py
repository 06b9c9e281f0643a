"""Log-probabilities over the whole vocabulary, for tokens that no candidate restricts: reasoning before a ranking.

Logits of ``chunk_size`` positions exist at a time, in the forward pass and, formed once more, in the backward pass:
memory is that of a few (chunk_size, V) in float32 and of the gradients, and does not grow with the number of positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flexrec.checks import check_temperature, check_tensor, values_are_checked
from flexrec.ops.library import accumulation_dtype


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
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    size = weight.shape[0]
    if any(not 0 <= token < size for token in never):
        raise ValueError(f"never must hold token ids from 0 to {size - 1}, got {list(never)}")
    impossible = torch.tensor(sorted(set(never)), dtype=torch.int64, device=hidden.device)
    if values_are_checked(targets):
        wrong = (targets < 0) | (targets >= size) | torch.isin(targets, impossible)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"targets must hold token ids from 0 to {size - 1} and none of never, got {int(targets[at])} at "
                f"index {at}"
            )
    dtype = accumulation_dtype(hidden, weight)

    def of_chunk(states: Tensor, of_targets: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(states, weight, bias).to(dtype)  # (chunk, V)
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        logits = (logits / temperature).index_fill(1, impossible, -torch.inf)
        return logits.log_softmax(dim=1).gather(1, of_targets[:, None])[:, 0]

    chunks = zip(hidden.split(chunk_size), targets.long().split(chunk_size), strict=True)
    return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])
