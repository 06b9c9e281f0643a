"""Swap rewards on the CPU: the published O(K^2) sum over swaps, suffix sums written in torch, and ours.

    pytest bench/test_swap_rewards.py

``extra_info`` carries the time that reading the gains and writing the rewards would take at the copy bandwidth
measured in the same run, and our share of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from flexrec.ops.swap_rewards import swap_rewards

SHAPES = [(4096, 100), (1024, 30), (8, 16384)]
PAIRWISE_LIMIT = 2**26  # swaps; (8, 16384) has 2^31


def log_discounts(size: int) -> torch.Tensor:
    return 1 / torch.log2(torch.arange(2, size + 2, dtype=torch.float32))


def pairwise(gains: torch.Tensor) -> torch.Tensor:
    """(N, K): ndcg rewards as published, every swap formed."""
    size = gains.shape[1]
    d = log_discounts(size)
    ideal = (gains.sort(-1, descending=True).values * d).sum(-1)
    swaps = (d[:, None] - d) * (gains[:, :, None] - gains[:, None, :])  # (N, K, K)
    behind = torch.ones(size, size, dtype=torch.bool).triu(1)
    count = torch.arange(size - 1, -1, -1).clamp(min=1)
    return (swaps * behind).sum(-1) / count / ideal[:, None]


def suffix_sums(gains: torch.Tensor) -> torch.Tensor:
    """(N, K): the same by three suffix sums, centred."""
    size = gains.shape[1]
    d = log_discounts(size)
    ideal = (gains.sort(-1, descending=True).values * d).sum(-1)
    x = gains - gains.mean(-1, keepdim=True)

    def behind(y: torch.Tensor) -> torch.Tensor:
        return y.flip(-1).cumsum(-1).flip(-1) - y

    n = torch.arange(size - 1, -1, -1)
    return (d * (n * x - behind(x)) - (x * behind(d) - behind(d * x))) / n.clamp(min=1) / ideal[:, None]


def ours(gains: torch.Tensor) -> torch.Tensor:
    return swap_rewards(gains, "ndcg")


def copy_bandwidth() -> float:
    """Bytes per second read and written by a large copy."""
    source = torch.zeros(2**24)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("method", ["pairwise", "pairwise_compiled", "suffix_sums", "ours"])
def test_ndcg_rewards(benchmark: BenchmarkFixture, method: str, shape: tuple[int, int]) -> None:
    rows, size = shape
    if method.startswith("pairwise") and rows * size**2 > PAIRWISE_LIMIT:
        pytest.skip("O(K^2) does not fit")
    if method == "pairwise_compiled" and shape != SHAPES[0]:
        pytest.skip("compiled for one shape only, to save time")
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "pairwise": pairwise,
        "pairwise_compiled": torch.compile(pairwise),
        "suffix_sums": suffix_sums,
        "ours": ours,
    }
    gains = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    rewards = functions[method](gains)  # compiles, fills caches
    torch.testing.assert_close(rewards, ours(gains), rtol=0, atol=1e-4 * float(rewards.abs().max()))
    benchmark.group = f"ndcg rewards, CPU, {rows} x {size}"
    floor = 2 * gains.numel() * gains.element_size() / copy_bandwidth()
    benchmark.pedantic(functions[method], args=(gains,), rounds=10 if method.startswith("pairwise") else 50)
    benchmark.extra_info |= {"floor_s": floor, "share_of_floor": floor / benchmark.stats.stats.min}


@pytest.mark.parametrize("metric", ["dcg", "ndcg@10", "ndcg_burges", "recall@10", "mrr", "map", "err"])
def test_metrics(benchmark: BenchmarkFixture, metric: str) -> None:
    gains = torch.randint(0, 5, (4096, 100), generator=torch.Generator().manual_seed(0)).float()
    benchmark.group = "ours, CPU, 4096 x 100, by metric"
    swap_rewards(gains, metric)
    benchmark.pedantic(swap_rewards, args=(gains, metric), rounds=30)


@pytest.mark.parametrize("size", [256, 1024, 4096, 16384])
def test_linear_in_list_length(benchmark: BenchmarkFixture, size: int) -> None:
    gains = torch.rand(2**20 // size, size, generator=torch.Generator().manual_seed(0))
    benchmark.group = "ours, CPU, 2^20 gains, ndcg, by list length"
    swap_rewards(gains, "ndcg")
    benchmark.pedantic(swap_rewards, args=(gains, "ndcg"), rounds=20)
