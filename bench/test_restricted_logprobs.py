"""Log-probs over ragged allowed sets: items of several tokens, and a sampler's kept tokens replayed in training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import model
from bench.inputs import SMALL, SetInputs, set_inputs
from bench.model import AllowedSets
from bench.peers_logprobs import compiled
from flexrec import restricted_logprobs

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 3e-2 if GPU else 1e-4  # of the largest entry
ENTROPY_COEF = 0.01


def _even(sets: int, allowed: int) -> Tensor:
    return torch.full((sets,), allowed)


def _skewed(sets: int, most: int) -> Tensor:
    """(sets,) one to ``most`` allowed tokens, few sets large: what top-p keeps."""
    share = torch.linspace(0, 1, sets)
    return (most**share).long().clamp(min=1)[torch.randperm(sets, generator=torch.Generator().manual_seed(0))]


# name: (allowed tokens of every set, D, V)
if SMALL:
    CASES = {"titles": (_even(50, 17), 32, 500), "top-p": (_skewed(20, 100), 32, 500)}
elif GPU:
    CASES = {"titles": (_even(16_384, 17), 2048, 151_936), "top-p": (_skewed(4_096, 4_096), 2048, 151_936)}
else:
    CASES = {"titles": (_even(6_000, 17), 128, 5_000), "top-p": (_skewed(512, 2_000), 256, 32_000)}

Outputs = tuple[Tensor, Tensor]


def ours(inputs: SetInputs) -> Outputs:
    out = restricted_logprobs(*inputs)
    return out.logprobs, out.entropy


def ours_in_torch(inputs: SetInputs) -> Outputs:
    out = restricted_logprobs(*inputs, backend="torch")
    return out.logprobs, out.entropy


def gather_padded(inputs: SetInputs) -> Outputs:
    """The rows of every set, padded to the largest, a batched product and a masked softmax."""
    counts = inputs.offsets.diff()  # (M,)
    nth = torch.arange(int(counts.max()), device=counts.device)  # (largest,)
    inside = nth < counts[:, None]  # (M, largest)
    tokens = inputs.ids[(inputs.offsets[:-1, None] + nth).clamp(max=len(inputs.ids) - 1)]  # (M, largest)
    logits = torch.einsum("md,mkd->mk", inputs.hidden, inputs.weight[tokens]).float()
    log_p = logits.masked_fill(~inside, -math.inf).log_softmax(-1)
    chosen = (tokens == inputs.targets[:, None]) & inside
    return log_p.masked_fill(~chosen, 0).sum(-1), -(log_p.exp() * log_p.masked_fill(~inside, 0)).sum(-1)


def masked_logits(inputs: SetInputs) -> Outputs:
    """All logits, what is not allowed masked out: the same distribution, at the price of the vocabulary."""
    row = torch.repeat_interleave(
        torch.arange(len(inputs.hidden), device=inputs.ids.device), inputs.offsets.diff(), output_size=len(inputs.ids)
    )
    logits = (inputs.hidden @ inputs.weight.t()).float()
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[row, inputs.ids] = True
    log_p = logits.masked_fill(~allowed, -math.inf).log_softmax(-1)
    chosen = log_p.gather(1, inputs.targets[:, None])[:, 0]
    return chosen, -(log_p.exp() * log_p.masked_fill(~allowed, 0)).sum(-1)


METHODS: dict[str, Callable[[SetInputs], Outputs]] = {
    "ours": ours,
    "ours_in_torch": ours_in_torch,
    "gather_padded": gather_padded,
    "masked_logits": masked_logits,
    "masked_logits_compiled": compiled(masked_logits),
}


def step_of(method: Callable[[SetInputs], Outputs], inputs: SetInputs) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        logprobs, entropy = method(inputs)
        objective = logprobs.sum() + ENTROPY_COEF * entropy.sum()
        return logprobs, entropy, *torch.autograd.grad(objective, (inputs.hidden, inputs.weight))

    return step


@functools.lru_cache(maxsize=1)
def inputs_of(case: str, device: torch.device) -> SetInputs:
    return set_inputs(*CASES[case], device, DTYPE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", [m for m in METHODS if not (SMALL and m.endswith("compiled"))])
def test_forward_backward(measure: Callable[..., None], device: torch.device, case: str, method: str) -> None:
    inputs = inputs_of(case, device)
    counts, dim, vocabulary = CASES[case]
    size = AllowedSets(len(counts), int(counts.sum()), dim, vocabulary)
    expected = step_of(ours, inputs)()

    def check(outputs: Any) -> None:
        for got, want in zip(outputs, expected, strict=True):
            largest = float(want.detach().abs().max())
            torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=TOLERANCE * largest)

    measure(
        "restricted log-probs, forward + backward",
        f"{case}, {size}",
        method,
        [step_of(METHODS[method], inputs)],  # one set of inputs: the padded peer's rows alone exceed any cache
        check=check,
        cost=model.restricted_step(size, inputs.hidden.element_size()),
        capturable=method not in ("gather_padded",),  # reads the largest set's size back
        **vars(size),
    )
