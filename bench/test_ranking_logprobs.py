"""Log-probs and entropy of rankings over what remains of their candidates, and what one would use without us.

Forward and backward, to hidden states and output embedding, is what a training step costs; forward alone is what the
old and the reference policy cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import model
from bench.inputs import SMALL, RankingInputs, ranking_inputs
from bench.measure import buffers_needed
from bench.model import Rankings
from bench.peers_logprobs import (
    CANDIDATES,
    VOCABULARY,
    WAITS,
    Method,
    Outputs,
    compiled,
    log_softmax,
    rank_order_log_probs,
)
from flexrec import all_actions_objective, ranking_logprobs
from flexrec.ops.ranking_logprobs import ranking_logprobs_with_kl, ranking_probs
from flexrec.ops.swap_rewards import swap_scores

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 3e-2 if GPU else 1e-4  # of the largest entry
ENTROPY_COEF = 0.01

# MAIN: the shape of the headline, with the plain log-softmax over the vocabulary; VOCABULARY_SHAPE: all such peers;
# SHAPES: what is compiled too; SWEEP: over K, D and N.
if SMALL:
    MAIN = VOCABULARY_SHAPE = Rankings(8, 4, 6, 10, 32, 500)
    SHAPES, SWEEP, MEMORY = [MAIN], [Rankings(4, 4, 10, 10, 32, 500)], [Rankings(2, 2, 4, 8, 16, 300)]
elif GPU:
    # 16,384 steps; 64 lists with 8 rankings each.
    MAIN = VOCABULARY_SHAPE = Rankings(512, 64, 32, 128, 2048, 151_936)
    SHAPES = [MAIN, Rankings(512, 512, 32, 32, 2048, 151_936)]
    SWEEP = [Rankings(512, 64, 32, k, 2048, 151_936) for k in (32, 64, 256)]
    SWEEP += [Rankings(512, 64, 32, 128, d, 151_936) for d in (1024, 4096)]
    SWEEP += [Rankings(512, 512, 32, 128, 2048, 151_936), Rankings(256, 32, 128, 128, 2048, 151_936)]
    SWEEP += [Rankings(n, n // 8, 32, 128, 2048, 151_936) for n in (64, 2048)]
    MEMORY = [Rankings(512, 64, 32, 128, 2048, v) for v in (32_000, 64_000, 128_256)]
else:
    MAIN, VOCABULARY_SHAPE = Rankings(256, 256, 30, 30, 256, 32_000), Rankings(32, 32, 30, 30, 256, 32_000)
    SHAPES = [MAIN, Rankings(256, 32, 30, 30, 256, 32_000), Rankings(192, 192, 30, 30, 128, 5_000)]
    SWEEP = [Rankings(64, 64, k, k, 256, 32_000) for k in (10, 30, 60, 120)]
    SWEEP += [Rankings(n, n, 30, 30, 256, 32_000) for n in (8, 32, 1024)]
    SWEEP += [Rankings(256, 256, 10, 100, 256, 32_000)]
    MEMORY = [Rankings(32, 32, 30, 30, 256, v) for v in (8_000, 32_000, 128_000)]


def ours(inputs: RankingInputs) -> Outputs:
    out = ranking_logprobs(*inputs)
    return out.logprobs, out.entropy


def ours_rows(inputs: RankingInputs) -> Outputs:
    """The gradient of the output embedding as a sparse tensor of the candidates' rows."""
    out = ranking_logprobs(*inputs, weight_grad="rows")
    return out.logprobs, out.entropy


def ours_accumulate(inputs: RankingInputs) -> Outputs:
    """The gradient of the output embedding added to the one that is there."""
    out = ranking_logprobs(*inputs, weight_grad="accumulate")
    return out.logprobs, out.entropy


WEIGHT_GRADS: dict[str, Method] = {"ours_rows": ours_rows, "ours_accumulate": ours_accumulate}
METHODS: dict[str, Method] = {"ours": ours, **WEIGHT_GRADS, **CANDIDATES, **VOCABULARY}


def step_of(method: Method, inputs: RankingInputs) -> Callable[[], tuple[Tensor | None, ...]]:
    """A training step: (log-probs, entropy, gradient of hidden, gradient of weight)."""

    def step() -> tuple[Tensor | None, ...]:
        logprobs, entropy = method(inputs)
        objective = logprobs.sum()
        if entropy is not None:
            objective = objective + ENTROPY_COEF * entropy.sum()
        # None for a weight whose gradient is added elsewhere
        return logprobs, entropy, *torch.autograd.grad(objective, (inputs.hidden, inputs.weight), allow_unused=True)

    return step


@functools.lru_cache(maxsize=1)
def inputs_of(size: Rankings, device: torch.device) -> list[RankingInputs]:
    """Inputs of this shape, kept until another shape is asked for; the output embedding is common to all sets."""
    element = torch.finfo(DTYPE).bits // 8
    touched = 2 * size.steps * size.dim * element
    return ranking_inputs(size, device, DTYPE, buffers_needed(touched, device))


def assert_equal(got: Tensor | None, want: Tensor | None, what: str) -> None:
    assert got is not None
    assert want is not None, what
    got, want = got.detach().float(), want.detach().float()
    largest = float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * largest, msg=lambda text: f"{what}: {text}")


def check_against_ours(inputs: RankingInputs, method: str) -> Callable[[Any], None]:
    """All outputs and gradients equal ours."""
    expected = step_of(ours, inputs)()

    def check(outputs: Any) -> None:
        logprobs, entropy, hidden_grad, weight_grad = outputs
        if method == "ours_accumulate":
            inputs.weight.grad = None
            step_of(METHODS[method], inputs)()
            weight_grad = inputs.weight.grad
        elif method == "ours_rows":
            weight_grad = weight_grad.to_dense()
        got = (logprobs, entropy, hidden_grad, weight_grad)
        for what, value, want in zip(("log-probs", "entropy", "d hidden", "d weight"), got, expected, strict=True):
            assert_equal(value, want, what)

    return check


def equal_outputs(expected: Any, names: tuple[str, ...]) -> Callable[[Any], None]:
    """All outputs equal those of another method."""

    def check(outputs: Any) -> None:
        for what, got, want in zip(names, outputs, expected, strict=True):
            assert_equal(got, want, what)

    return check


def check_against_log_softmax(inputs: RankingInputs) -> Callable[[Any], None]:
    """What concerns the first two rankings equals the log-softmax of all logits: they do not depend on the others."""

    def check(outputs: Any) -> None:
        logprobs, entropy, hidden_grad, _ = outputs
        hidden = inputs.hidden[:2].detach().requires_grad_()
        first = RankingInputs(hidden, inputs.weight, inputs.tokens[:2], inputs.ranking[:2])
        in_order = torch.arange(first.candidates.shape[1], device=hidden.device).expand(2, -1)
        first = first._replace(ranking=in_order)
        want_logprobs, want_entropy = log_softmax(first)
        assert want_entropy is not None
        objective = want_logprobs.sum() + (0 if entropy is None else ENTROPY_COEF * want_entropy.sum())
        assert_equal(hidden_grad[:2], torch.autograd.grad(objective, hidden)[0], "d hidden")
        if logprobs.dim() == 2:
            assert_equal(logprobs[:2], want_logprobs, "log-probs")
        if entropy is not None:
            assert_equal(entropy[:2], want_entropy, "entropy")

    return check


def is_chosen(size: Rankings, method: str) -> bool:
    """What takes seconds, or seconds to compile, is not run at every shape."""
    if method in WEIGHT_GRADS:
        return size in SHAPES
    if method in VOCABULARY and size != VOCABULARY_SHAPE:
        return method == "log_softmax" and size == MAIN
    if method.endswith("compiled"):
        return not SMALL and (size in SHAPES or method in VOCABULARY)
    return True


CHOSEN = [
    pytest.param(size, method, id=f"{size}-{method}".replace(" ", "_"))
    for size in [*SHAPES, *SWEEP]
    for method in METHODS
    if is_chosen(size, method)
]


@pytest.mark.parametrize(("size", "method"), CHOSEN)
def test_forward_backward(measure: Callable[..., None], device: torch.device, size: Rankings, method: str) -> None:
    everywhere = method in VOCABULARY
    sets = inputs_of(size, device)
    if everywhere:
        sets = sets[:2]  # logits alone are far larger than any cache
    element = sets[0].hidden.element_size()
    mode = method.removeprefix("ours_") if method in WEIGHT_GRADS else "dense"
    measure(
        "ranking log-probs, forward + backward",
        str(size),
        method,
        [step_of(METHODS[method], inputs) for inputs in sets],
        check=check_against_log_softmax(sets[0]) if everywhere else check_against_ours(sets[0], method),
        cost=model.ranking_step(size, element, mode),
        warm=GPU or not everywhere or method.endswith("compiled"),
        capturable=method not in WAITS,
        other_distribution=everywhere,
        memory_allowance=model.ranking_memory(size, element, mode),
        **vars(size),
    )


@pytest.mark.parametrize("size", SHAPES[:1], ids=lambda size: str(size).replace(" ", "_"))
@pytest.mark.parametrize("method", [m for m in ("ours", *CANDIDATES) if not (SMALL and m.endswith("compiled"))])
def test_forward(measure: Callable[..., None], device: torch.device, size: Rankings, method: str) -> None:
    sets = [inputs._replace(hidden=inputs.hidden.detach()) for inputs in inputs_of(size, device)]

    def forward(inputs: RankingInputs) -> Outputs:
        with torch.no_grad():
            return METHODS[method](inputs)

    measure(
        "ranking log-probs, forward",
        str(size),
        method,
        [lambda i=inputs: forward(i) for inputs in sets],
        check=equal_outputs(ours(sets[0]), ("log-probs", "entropy")),
        cost=model.ranking_forward(size, sets[0].hidden.element_size()),
    )


@pytest.mark.parametrize("method", ["ours", "gather_bmm", "log_softmax", "trl_fused_head"])
@pytest.mark.parametrize("size", MEMORY, ids=lambda size: f"V={size.vocabulary}")
def test_memory_over_vocabulary(
    measure: Callable[..., None], device: torch.device, size: Rankings, method: str
) -> None:
    """Forward and backward without the gradient of the output embedding, which alone must grow with V."""
    inputs = inputs_of(size, device)[0]
    frozen = inputs._replace(weight=inputs.weight.detach())

    def step() -> tuple[Tensor, ...]:
        logprobs, entropy = METHODS[method](frozen)
        assert entropy is not None
        return torch.autograd.grad(logprobs.sum() + ENTROPY_COEF * entropy.sum(), (frozen.hidden,))

    measure(
        "ranking log-probs, forward + backward, embedding frozen",
        str(size),
        method,
        [step],
        other_distribution=method in VOCABULARY,
        **vars(size),
    )


# --- exact KL against a reference -------------------------------------------------------------------------------------


def ours_with_kl(inputs: RankingInputs, ref_hidden: Tensor) -> tuple[Tensor, Tensor]:
    out = ranking_logprobs_with_kl(*inputs, ref_hidden=ref_hidden, ref_weight=inputs.weight.detach())
    return out.logprobs, out.kl


def two_distributions(inputs: RankingInputs, ref_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Both distributions (N, T, K) by gather + bmm, and the divergence from them."""
    log_p, placed = rank_order_log_probs(inputs)
    with torch.no_grad():
        log_q, _ = rank_order_log_probs(inputs._replace(hidden=ref_hidden))
    kl = (log_p.exp() * (log_p - log_q).masked_fill(placed, 0)).sum(-1)
    return log_p.diagonal(dim1=1, dim2=2), kl


WITH_KL: dict[str, Callable[[RankingInputs, Tensor], tuple[Tensor, Tensor]]] = {
    "ours": ours_with_kl,
    "gather_bmm_twice": two_distributions,
    "gather_bmm_twice_compiled": compiled(two_distributions),
}


@pytest.mark.parametrize("method", [m for m in WITH_KL if not (SMALL and m.endswith("compiled"))])
def test_with_kl(measure: Callable[..., None], device: torch.device, method: str) -> None:
    inputs = inputs_of(MAIN, device)[0]
    ref_hidden = inputs.hidden.detach() + 0.1

    def step_with(name: str) -> Callable[[], tuple[Tensor, ...]]:
        def step() -> tuple[Tensor, ...]:
            logprobs, kl = WITH_KL[name](inputs, ref_hidden)
            objective = logprobs.sum() - 0.01 * kl.sum()
            return logprobs, kl, *torch.autograd.grad(objective, (inputs.hidden, inputs.weight))

        return step

    element = inputs.hidden.element_size()
    measure(
        "ranking log-probs with exact KL, forward + backward",
        str(MAIN),
        method,
        [step_with(method)],
        check=equal_outputs(step_with("ours")(), ("log-probs", "KL", "d hidden", "d weight")),
        cost=model.ranking_step(MAIN, element) + model.ranking_forward(MAIN, element),
    )


# --- all actions ------------------------------------------------------------------------------------------------------


def all_actions_explicit(inputs: RankingInputs, gains: Tensor) -> Tensor:
    """The objective (N, T) from the distribution (N, T, K) and the swap scores (N, K, K) in memory."""
    probs = ranking_probs(*inputs)
    ranks = probs.shape[1]
    return -(probs * swap_scores(gains, "ndcg", num_ranked=ranks)[:, :ranks]).sum(-1)


ALL_ACTIONS: dict[str, Callable[[RankingInputs, Tensor], Tensor]] = {
    "ours": lambda inputs, gains: all_actions_objective(*inputs, gains, "ndcg").objective,
    "explicit_distribution": all_actions_explicit,
}


@pytest.mark.parametrize("method", list(ALL_ACTIONS))
def test_all_actions(measure: Callable[..., None], device: torch.device, method: str) -> None:
    sets = inputs_of(MAIN, device)
    gains = torch.rand(MAIN.rankings, MAIN.candidates, device=device)

    def step_with(name: str, inputs: RankingInputs) -> Callable[[], tuple[Tensor, ...]]:
        def step() -> tuple[Tensor, ...]:
            objective = ALL_ACTIONS[name](inputs, gains)
            return objective, *torch.autograd.grad(objective.sum(), (inputs.hidden, inputs.weight))

        return step

    measure(
        "all actions, forward + backward",
        str(MAIN),
        method,
        [step_with(method, inputs) for inputs in sets],
        check=equal_outputs(step_with("ours", sets[0])(), ("objective", "d hidden", "d weight")),
        cost=model.ranking_step(MAIN, sets[0].hidden.element_size()),
    )
