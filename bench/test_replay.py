"""A sampler's supports replayed: log-probs of sampled tokens, beside all logits with what was cut masked out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.inputs import SMALL, SetInputs, set_inputs
from bench.model import AllowedSets
from bench.peers_logprobs import compiled
from flexrec import replay_logprobs

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 3e-2 if GPU else 1e-4  # of the largest entry
ROWS, DIM, VOCABULARY, TYPICAL = (
    (40, 32, 500, 8) if SMALL else (16_384, 2048, 151_936, 40) if GPU else (1_024, 576, 49_152, 40)
)
CASES = {"top-p": 0, "top-k": 0, "a tenth whole": 10}  # of which every so manieth row was not cut
Outputs = tuple[Tensor, Tensor]


def counts_of(case: str) -> Tensor:
    """(M,) tokens in every support: what top-p 0.8 of a language model keeps, of few tokens mostly; 0 for all."""
    if case == "top-k":
        return torch.full((ROWS,), TYPICAL // 2)
    share = torch.rand(ROWS, generator=torch.Generator().manual_seed(0))
    counts = (-TYPICAL * (1 - share).log()).long().clamp(1, VOCABULARY // 4)  # exponential, mean about TYPICAL
    if CASES[case]:
        counts[:: CASES[case]] = 0
    return counts


def ours(inputs: SetInputs) -> Outputs:
    found = replay_logprobs(*inputs)
    return found.logprobs, found.entropy


def ours_in_torch(inputs: SetInputs) -> Outputs:
    found = replay_logprobs(*inputs, backend="torch")
    return found.logprobs, found.entropy


def masked_logits(inputs: SetInputs) -> Outputs:
    """All logits, and -inf where a token was cut: what trainers do that were given masks."""
    counts = inputs.offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=len(inputs.ids))
    logits = (inputs.hidden @ inputs.weight.t()).float()
    kept = (counts == 0)[:, None].repeat(1, logits.shape[1])
    kept[row, inputs.ids] = True
    log_p = logits.masked_fill(~kept, -math.inf).log_softmax(-1)
    chosen = log_p.gather(1, inputs.targets[:, None])[:, 0]
    return chosen, -(log_p.exp() * log_p.masked_fill(~kept, 0)).sum(-1)


METHODS: dict[str, Callable[[SetInputs], Outputs]] = {
    "ours": ours,
    "ours_in_torch": ours_in_torch,
    "masked_logits": masked_logits,
    "masked_logits_compiled": compiled(masked_logits),
}


def step_of(method: Callable[[SetInputs], Outputs], inputs: SetInputs) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        logprobs, entropy = method(inputs)
        return logprobs, entropy.detach(), *torch.autograd.grad(logprobs.sum(), (inputs.hidden, inputs.weight))

    return step


@functools.lru_cache(maxsize=1)
def inputs_of(case: str, device: torch.device) -> SetInputs:
    """As of restricted sets, where a row that was not cut has no tokens and any target."""
    counts = counts_of(case)
    made = set_inputs(counts.clamp(min=1), DIM, VOCABULARY, device, DTYPE)
    keeps = torch.repeat_interleave(counts > 0, counts.clamp(min=1)).to(device)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device)
    return made._replace(ids=made.ids[keeps], offsets=offsets)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", [m for m in METHODS if not (SMALL and m.endswith("compiled"))])
def test_forward_backward(measure: Callable[..., None], device: torch.device, case: str, method: str) -> None:
    inputs = inputs_of(case, device)
    size = AllowedSets(ROWS, len(inputs.ids), DIM, VOCABULARY)
    expected = step_of(ours, inputs)()

    def check(outputs: Any) -> None:
        for got, want in zip(outputs, expected, strict=True):
            largest = float(want.detach().abs().max())
            torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=TOLERANCE * largest)

    measure(
        "replayed log-probs, forward + backward",
        f"{case}, {size}",
        method,
        [step_of(METHODS[method], inputs)],
        check=check,
        capturable=False,  # which rows were not cut is read back
        **vars(size),
    )
