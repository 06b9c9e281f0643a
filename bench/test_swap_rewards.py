"""Swap rewards: the published O(K^2) sum over swaps, suffix sums and a matrix product in torch, and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import model
from bench import peers_swap as peers
from bench.inputs import SMALL
from bench.measure import buffers_needed
from bench.peers_logprobs import compiled
from flexrec import swap_rewards, swap_rewards_with_variance, swap_scores

Shape = tuple[int, int]
GPU = torch.cuda.is_available()

PAIRS_LIMIT = 2**31 if GPU else 2**26  # swaps that the pairwise peers may form, in several copies
MATMUL_LIMIT = 4096  # candidates, whose square the coefficients of the matrix product are
REWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "ours": lambda gains: swap_rewards(gains, "ndcg"),
    "ours_in_torch": lambda gains: swap_rewards(gains, "ndcg", backend="torch"),
    "pairwise": peers.rewards_pairwise,
    "pairwise_compiled": compiled(peers.rewards_pairwise),
    "suffix_sums": peers.rewards_suffix_sums,
    "suffix_sums_compiled": compiled(peers.rewards_suffix_sums),
    "matmul": peers.rewards_matmul,
    "matmul_compiled": compiled(peers.rewards_matmul),
}
if SMALL:
    SHAPES = [(64, 100), (32, 30), (2, 300)]
    SWEEP: list[Shape] = [(16, 16)]
    SCORES, METRICS_SHAPE = (16, 30), (64, 30)
    TOPIC_SHAPES = [(8, 30, 20)]
elif GPU:
    SHAPES = [(65_536, 128), (4_096, 128), (1_024, 30), (64, 16_384)]
    SWEEP = [(2**23 // size, size) for size in (16, 32, 64, 256, 1024, 4096, 16_384)]
    SWEEP += [(lists, 128) for lists in (256, 1_024, 16_384)]
    SCORES, METRICS_SHAPE = (16_384, 128), (65_536, 128)
    TOPIC_SHAPES = [(65_536, 128, 20), (64, 30, 20)]
else:
    SHAPES = [(4_096, 100), (1_024, 30), (8, 16_384)]
    SWEEP = [(2**19 // size, size) for size in (16, 32, 64, 256, 1024, 4096)] + [(lists, 100) for lists in (64, 512)]
    SCORES, METRICS_SHAPE = (1_024, 100), (4_096, 100)
    TOPIC_SHAPES = [(1_024, 100, 20), (64, 30, 20)]

METRICS = ("dcg", "ndcg@10", "ndcg_burges", "recall@10", "rbp.8", "mrr", "map", "err")


def show(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"


def gains_of(shape: Shape, device: torch.device, *, grades: bool = False) -> list[Tensor]:
    """Gains (N, K), as many sets as are to be rotated through; ``grades`` 0 to 4 instead of numbers in [0, 1)."""
    generator = torch.Generator(device=device).manual_seed(0)
    count = buffers_needed(8 * shape[0] * shape[1], device)
    gains = [torch.rand(shape, generator=generator, device=device) for _ in range(count)]
    return [(5 * g).floor() for g in gains] if grades else gains


def equal_to(expected: Any) -> Callable[[Any], None]:
    """A check against what another method returned, to 1e-4 of the largest entry."""

    def check(outputs: Any) -> None:
        pairs = zip(outputs, expected, strict=True) if isinstance(expected, tuple) else [(outputs, expected)]
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))

    return check


def fits(method: str, shape: Shape) -> bool:
    """Whether what an O(K^2) method forms is within reason."""
    lists, size = shape
    if method.startswith("matmul"):
        return size <= MATMUL_LIMIT
    return not method.startswith("pairwise") or lists * size**2 <= PAIRS_LIMIT


def chosen_methods() -> list[Any]:
    """Everybody at the main shapes, what need not be compiled at the others."""
    cases = []
    for shape in [*SHAPES, *SWEEP]:
        for method in REWARDS:
            compiles = method.endswith("compiled")
            if fits(method, shape) and not (compiles and (SMALL or shape not in SHAPES)):
                cases.append(pytest.param(shape, method, id=f"{shape[0]}x{shape[1]}-{method}"))
    return cases


@pytest.mark.parametrize(("shape", "method"), chosen_methods())
def test_ndcg_rewards(measure: Callable[..., None], device: torch.device, shape: Shape, method: str) -> None:
    gains = gains_of(shape, device)
    measure(
        "swap rewards, ndcg",
        show(shape),
        method,
        [lambda g=g: REWARDS[method](g) for g in gains],
        check=equal_to(REWARDS["ours"](gains[0])),
        cost=model.swap_rewards(*shape, gains[0].element_size()),
        lists=shape[0],
        size=shape[1],
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", ["ours", "ours_in_torch"])
def test_metrics(measure: Callable[..., None], device: torch.device, metric: str, method: str) -> None:
    gains = gains_of(METRICS_SHAPE, device, grades=True)
    backend = "torch" if method == "ours_in_torch" else "auto"
    measure(
        f"swap rewards, {metric}",
        show(METRICS_SHAPE),
        method,
        [lambda g=g: swap_rewards(g, metric, backend=backend) for g in gains],
        check=equal_to(swap_rewards(gains[0], metric)),
        cost=model.swap_rewards(*METRICS_SHAPE, gains[0].element_size()),
    )


TOPIC_METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": lambda gains, topics: swap_rewards(gains, "alpha_ndcg@10", topics=topics),
    "ours_in_torch": lambda gains, topics: swap_rewards(gains, "alpha_ndcg@10", topics=topics, backend="torch"),
    "exchanges": lambda gains, topics: peers.topic_rewards_by_exchange(gains, topics, 10),
}
TOPIC_LISTS = 64  # that the metric is computed anew for, after every exchange


def topics_of(shape: tuple[int, int, int], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Gains and topics, of which an item has one or two."""
    generator = torch.Generator(device=device).manual_seed(1)
    topics = []
    for gains in gains_of(shape[:2], device)[:4]:
        chosen = torch.randint(0, shape[2], (*shape[:2], 2), generator=generator, device=device)
        topics.append((gains, torch.zeros(shape, device=device).scatter_(2, chosen, 1.0)))
    return topics


@pytest.mark.parametrize("shape", TOPIC_SHAPES, ids=str)
@pytest.mark.parametrize("method", TOPIC_METHODS)
def test_topics(measure: Callable[..., None], device: torch.device, shape: tuple[int, int, int], method: str) -> None:
    if method == "exchanges" and shape[0] > TOPIC_LISTS:
        pytest.skip("the metric of every exchange takes K times the memory of the topics")
    inputs = topics_of(shape, device)
    measure(
        "swap rewards, alpha_ndcg@10",
        f"{shape[0]} x {shape[1]} x {shape[2]} topics",
        method,
        [lambda g=g, m=m: TOPIC_METHODS[method](g, m) for g, m in inputs],
        check=equal_to(TOPIC_METHODS["ours"](*inputs[0])),
        cost=model.topic_rewards(*shape, 10, 4),
    )


@pytest.mark.skipif(not GPU, reason="half precision is for GPUs")
def test_half_precision(measure: Callable[..., None], device: torch.device) -> None:
    gains = [g.bfloat16() for g in gains_of(SHAPES[0], device)]
    measure(
        "swap rewards, ndcg, bfloat16",
        show(SHAPES[0]),
        "ours",
        [lambda g=g: swap_rewards(g, "ndcg") for g in gains],
        cost=model.swap_rewards(*SHAPES[0], 2),
    )


VARIANCE: dict[str, Callable[..., Any]] = {
    "ours": lambda gains, variance: swap_rewards_with_variance(gains, variance, "ndcg"),
    "matmul": peers.variance_matmul,
    "matmul_compiled": compiled(peers.variance_matmul),
}


@pytest.mark.parametrize("method", [m for m in VARIANCE if not (SMALL and m.endswith("compiled"))])
def test_variance(measure: Callable[..., None], device: torch.device, method: str) -> None:
    inputs = [(g, 0.1 + g) for g in gains_of(METRICS_SHAPE, device)]
    measure(
        "swap rewards with variance, ndcg",
        show(METRICS_SHAPE),
        method,
        [lambda g=g, v=v: VARIANCE[method](g, v) for g, v in inputs],
        check=equal_to(VARIANCE["ours"](*inputs[0])),
        cost=model.swap_rewards(*METRICS_SHAPE, 4, variance=True),
    )


def test_variance_of_err(measure: Callable[..., None], device: torch.device) -> None:
    gains = gains_of(METRICS_SHAPE, device, grades=True)
    measure(
        "swap rewards with variance, err",
        show(METRICS_SHAPE),
        "ours",
        [lambda g=g: swap_rewards_with_variance(g, 0.1 * g, "err") for g in gains],
        cost=model.swap_rewards(*METRICS_SHAPE, 4, variance=True),
    )


SCORE_METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "ours": lambda gains: swap_scores(gains, "ndcg"),
    "ours_in_torch": lambda gains: swap_scores(gains, "ndcg", backend="torch"),
    "pairwise": peers.scores_pairwise,
    "pairwise_compiled": compiled(peers.scores_pairwise),
}


@pytest.mark.parametrize("method", [m for m in SCORE_METHODS if not (SMALL and m.endswith("compiled"))])
def test_scores(measure: Callable[..., None], device: torch.device, method: str) -> None:
    gains = gains_of(SCORES, device)
    measure(
        "swap scores, ndcg",
        show(SCORES),
        method,
        [lambda g=g: SCORE_METHODS[method](g) for g in gains[:2]],  # what is written is large enough to rotate
        check=equal_to(SCORE_METHODS["ours"](gains[0])),
        cost=model.swap_scores(*SCORES, 4),
    )


POLICY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": lambda gains, weights: swap_rewards(gains, "ndcg", credit="policy", weights=weights),
    "ours_in_torch": lambda gains, weights: swap_rewards(
        gains, "ndcg", credit="policy", weights=weights, backend="torch"
    ),
    "pairwise": peers.policy_pairwise,
    "pairwise_compiled": compiled(peers.policy_pairwise),
}


@pytest.mark.parametrize("method", [m for m in POLICY if not (SMALL and m.endswith("compiled"))])
def test_policy_credit(measure: Callable[..., None], device: torch.device, method: str) -> None:
    gains = gains_of(SCORES, device)[:2]
    weights = [torch.rand(*SCORES, SCORES[1], device=device) for _ in gains]
    measure(
        "swap rewards, ndcg, policy-weighted",
        show(SCORES),
        method,
        [lambda g=g, w=w: POLICY[method](g, w) for g, w in zip(gains, weights, strict=True)],
        check=equal_to(POLICY["ours"](gains[0], weights[0])),
        cost=model.policy_rewards(*SCORES, 4),
    )
