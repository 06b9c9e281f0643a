"""What one would use for log-probs without this package.

Every function takes ``RankingInputs`` and returns (log-probs, entropy): (N, T) each; entropy is None where the method
has none, and log-probs are a scalar, their sum, where the method gives no more. ``CANDIDATES`` compute what we do, the
softmax over the remaining candidates. ``VOCABULARY`` are what trainers use: over the whole vocabulary, another
distribution, so that only their cost compares. A method that is not installed, or that has no path on the device, skips
the test and says why.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inputs import RankingInputs

Outputs = tuple[Tensor, Tensor | None]
Method = Callable[[RankingInputs], Outputs]


TRL_CHUNK = 32768  # vocabulary entries, as its trainers have it


def compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method under torch.compile, in one graph, for one shape."""
    return functools.wraps(method)(torch.compile(method, fullgraph=True, dynamic=False))


def _optional(module: str, package: str) -> Any:
    """An optional peer's module; the test is skipped where it, or what it needs, is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{package} is not installed: {error}")


def _needs_gpu(inputs: RankingInputs, name: str) -> None:
    if inputs.hidden.device.type != "cuda":
        pytest.skip(f"{name} has no path on the CPU")


# --- over the remaining candidates ------------------------------------------------------------------------------------


def rank_order_log_probs(inputs: RankingInputs) -> tuple[Tensor, Tensor]:
    """(N, T, K) log-probs by rank, -inf for what is placed, and the mask (T, K) of that.

    The candidates' rows in rank order, a batched product, a triangular mask.
    """
    t, k = inputs.ranking.shape[1], inputs.candidates.shape[1]
    logits = torch.bmm(inputs.hidden, inputs.weight[inputs.ranked_tokens].transpose(1, 2)).float()
    placed = torch.ones(t, k, dtype=torch.bool, device=logits.device).tril(-1)
    return logits.masked_fill(placed, -math.inf).log_softmax(-1), placed


def gather_bmm(inputs: RankingInputs) -> Outputs:
    """What one writes: see ``rank_order_log_probs``."""
    log_p, placed = rank_order_log_probs(inputs)
    return log_p.diagonal(dim1=1, dim2=2), -(log_p.exp() * log_p.masked_fill(placed, 0)).sum(-1)


# --- over the vocabulary ----------------------------------------------------------------------------------------------


def log_softmax(inputs: RankingInputs) -> Outputs:
    """All logits, in float32 as trainers have them, and their log-softmax."""
    log_p = (inputs.hidden @ inputs.weight.t()).float().log_softmax(-1)
    return log_p.gather(2, inputs.tokens[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def torch_linear_cross_entropy(inputs: RankingInputs, chunked: bool = False) -> Outputs:
    """torch's F.linear_cross_entropy: log-probs only; its reference path forms all logits."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"F.linear_cross_entropy is not in torch {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    flat = inputs.hidden.flatten(0, 1)
    return -F.linear_cross_entropy(flat, inputs.weight, inputs.tokens.flatten(), reduction="sum", options=options), None


def torch_linear_cross_entropy_chunked(inputs: RankingInputs) -> Outputs:
    """The same with chunks of the logits only, and gradients computed in the forward pass."""
    return torch_linear_cross_entropy(inputs, chunked=True)


def trl_fused_head(inputs: RankingInputs) -> Outputs:
    """TRL's fused output layer: products with chunks of the vocabulary, folded into log-probs and entropy."""
    kernels = _optional("trl.kernels", "trl >= 1.16")
    _optional("trl.trainer.utils", "trl >= 1.16")  # which its backward pass imports
    flat, targets = inputs.hidden.flatten(0, 1), inputs.tokens.flatten()
    chunk = min(TRL_CHUNK, len(inputs.weight))
    logprobs, entropy, *_ = kernels.ChunkedLogProbFunction.apply(
        flat, inputs.weight, None, targets, 1.0, chunk, None, 1.0, ("entropy",)
    )
    return logprobs.view(inputs.ranking.shape), entropy.view(inputs.ranking.shape)


def trl_fused_softmax(inputs: RankingInputs) -> Outputs:
    """TRL's Triton kernel for log-probs and entropy of given logits."""
    kernels = _optional("trl.kernels", "trl >= 1.16")
    _needs_gpu(inputs, "TRL's selective_log_softmax_and_entropy")
    return kernels.selective_log_softmax_and_entropy(inputs.hidden @ inputs.weight.t(), inputs.tokens)


def liger(inputs: RankingInputs) -> Outputs:
    """Liger's fused linear cross entropy: log-probs only, gradients computed in the forward pass."""
    functional = _optional("liger_kernel.transformers.functional", "liger-kernel")
    _needs_gpu(inputs, "Liger's fused linear cross entropy")
    flat, targets = inputs.hidden.flatten(0, 1), inputs.tokens.flatten()
    return -functional.liger_fused_linear_cross_entropy(flat, inputs.weight, targets, reduction="sum"), None


def cut_cross_entropy(inputs: RankingInputs) -> Outputs:
    """Apple's cut cross entropy: log-probs only, tiles of the logits that are negligible left out of the gradient."""
    package = _optional("cut_cross_entropy", "cut-cross-entropy")
    _needs_gpu(inputs, "cut cross entropy")
    loss = package.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.tokens, reduction="sum")
    return -loss, None


def flash_attn_cross_entropy(inputs: RankingInputs) -> Outputs:
    """flash-attn's Triton cross entropy of given logits: log-probs only."""
    module = _optional("flash_attn.ops.triton.cross_entropy", "flash-attn")
    _needs_gpu(inputs, "flash-attn's cross entropy")
    logits = inputs.hidden.flatten(0, 1) @ inputs.weight.t()
    losses, _ = module.cross_entropy_loss(logits, inputs.tokens.flatten())
    return -losses.view(inputs.ranking.shape), None


CANDIDATES: dict[str, Method] = {"gather_bmm": gather_bmm, "gather_bmm_compiled": compiled(gather_bmm)}
VOCABULARY: dict[str, Method] = {
    "log_softmax": log_softmax,
    "log_softmax_compiled": compiled(log_softmax),
    "torch_linear_cross_entropy": torch_linear_cross_entropy,
    "torch_linear_cross_entropy_chunked": torch_linear_cross_entropy_chunked,
    "trl_fused_head": trl_fused_head,
    "trl_fused_softmax": trl_fused_softmax,
    "liger": liger,
    "cut_cross_entropy": cut_cross_entropy,
    "flash_attn_cross_entropy": flash_attn_cross_entropy,
}
WAITS = ("liger", "cut_cross_entropy")  # read a number back from the GPU, so that no graph can hold them
