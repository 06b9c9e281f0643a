"""What a call of every public function costs on the host, whatever the device does: an empty batch, eagerly.

The checks of values are switched off; on the CPU, where they are always on, they find nothing to read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import flexrec
from flexrec import checks as validation
from flexrec.ops.ranking_logprobs import ranking_logprobs_with_kl, ranking_probs
from flexrec.ops.restricted_logprobs import restricted_logprobs_with_kl

CALLS = 100  # per round: a call is near the resolution of the timer
Call = Callable[[], Any]


@pytest.fixture
def unchecked() -> Iterator[None]:
    before = validation._value_checks
    flexrec.set_value_checks(False)
    yield
    flexrec.set_value_checks(before)


def calls(device: torch.device) -> dict[str, Call]:
    """Every function of tensors on N = 0 lists of K = 30 candidates, D = 64."""
    size, dim = 30, 64
    gains, weights = torch.empty(0, size, device=device), torch.empty(0, size, size, device=device)
    mask = torch.empty(0, size, dtype=torch.bool, device=device)
    hidden, weight = torch.empty(0, size, dim, device=device), torch.randn(100, dim, device=device)
    lists = torch.empty(0, size, dtype=torch.int64, device=device)
    rows, ids = torch.empty(0, dim, device=device), torch.empty(0, dtype=torch.int64, device=device)
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    return {
        "swap_rewards": lambda: flexrec.swap_rewards(gains, "ndcg"),
        "swap_rewards, policy": lambda: flexrec.swap_rewards(gains, "ndcg", credit="policy", weights=weights),
        "swap_rewards_with_variance": lambda: flexrec.swap_rewards_with_variance(gains, gains, "ndcg"),
        "swap_scores": lambda: flexrec.swap_scores(gains, "ndcg"),
        "ranking_metric": lambda: flexrec.ranking_metric(gains, "ndcg"),
        "ranking_logprobs": lambda: flexrec.ranking_logprobs(hidden, weight, lists, lists),
        "ranking_probs": lambda: ranking_probs(hidden, weight, lists, lists),
        "ranking_logprobs_with_kl": lambda: ranking_logprobs_with_kl(
            hidden, weight, lists, lists, ref_hidden=hidden, ref_weight=weight
        ),
        "ranking_kl": lambda: flexrec.ranking_kl(hidden, weight, hidden, weight, lists, lists),
        "all_actions_objective": lambda: flexrec.all_actions_objective(hidden, weight, lists, lists, gains, "ndcg"),
        "restricted_logprobs": lambda: flexrec.restricted_logprobs(rows, weight, ids, offsets, ids),
        "restricted_logprobs_with_kl": lambda: restricted_logprobs_with_kl(
            rows, weight, ids, offsets, ids, ref_hidden=rows, ref_weight=weight
        ),
        "restricted_kl": lambda: flexrec.restricted_kl(rows, weight, rows, weight, ids, offsets),
        "item_advantages": lambda: flexrec.item_advantages(gains, 8),
        "uncertainty_weights": lambda: flexrec.uncertainty_weights(gains, 8),
        "policy_loss": lambda: flexrec.policy_loss(gains, gains, gains, mask),
    }


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", calls(torch.device("cpu")))
def test_host_overhead(benchmark: BenchmarkFixture, device: torch.device, function: str) -> None:
    call = calls(device)[function]
    call()
    benchmark.group = "host overhead of a call"
    benchmark.extra_info |= {"op": "host overhead", "shape": function, "method": "ours"}
    benchmark.pedantic(call, rounds=20, iterations=CALLS, warmup_rounds=1)
