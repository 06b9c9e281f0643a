"""The byte and FLOP counts of the benchmarks, against sizes counted by hand and against tensors laid out in full."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import model
from bench.measure import Ceilings
from bench.model import AllowedSets, Cost, Rankings

H200 = Ceilings(copy={2**31: 4.3e12}, gemm=790e12, dtype="bfloat16")
TEXTBOOK = Rankings(rankings=512, lists=64, ranks=32, candidates=128, dim=2048, vocabulary=151_936)


def test_swap_rewards_read_and_write_every_entry_once():
    gains, rewards = torch.zeros(65_536, 128), torch.zeros(65_536, 128)
    assert model.swap_rewards(65_536, 128, 4).bytes == gains.nbytes + rewards.nbytes
    assert model.swap_rewards(65_536, 128, 2).bytes == gains.half().nbytes + rewards.nbytes
    assert model.swap_rewards(65_536, 128, 4, variance=True).bytes == 2 * (gains.nbytes + rewards.nbytes)


def test_rewards_of_topics_read_the_topics_of_every_item_once():
    topics, gains, rewards = torch.zeros(16, 30, 20), torch.zeros(16, 30), torch.zeros(16, 30)
    cost = model.topic_rewards(16, 30, 20, 10, 4)
    assert cost.bytes == topics.nbytes + gains.nbytes + rewards.nbytes
    assert cost.flops == topics.numel() * (3 + 2 * 10) + 27 * topics[:, :10].numel()


def test_swap_scores_are_bound_by_what_they_write():
    assert model.swap_scores(16, 30, 4).bytes == torch.zeros(16, 30).nbytes + torch.zeros(16, 30, 30).nbytes


def test_policy_rewards_read_the_later_half_of_the_weights():
    later = int(torch.ones(30, 30).triu(1).sum())
    assert model.policy_rewards(16, 30, 4).bytes == 2 * torch.zeros(16, 30).nbytes + 16 * later * 4


@pytest.mark.parametrize(("ranks", "candidates"), [(1, 1), (3, 3), (4, 9)])
def test_pool_counts_the_remaining_candidates(ranks, candidates):
    pools = [candidates - t for t in range(ranks)]
    assert Rankings(5, 5, ranks, candidates, 8, 100).pool == 5 * sum(pools)


def test_forward_moves_states_rows_and_indices():
    size = Rankings(rankings=6, lists=3, ranks=4, candidates=5, dim=64, vocabulary=1000)
    hidden, rows = torch.zeros(6, 4, 64), torch.zeros(3 * 5, 64)
    candidates, ranking = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(6, 4, dtype=torch.int64)
    results = 2 * torch.zeros(6, 4).nbytes
    forward = model.ranking_forward(size, 4)
    assert forward.bytes == hidden.nbytes + rows.nbytes + candidates.nbytes + ranking.nbytes + results
    assert model.ranking_forward(size, 4, keeps=True).bytes == forward.bytes + torch.zeros(6, 4, 5).nbytes
    assert forward.flops == 2 * 6 * (5 + 4 + 3 + 2) * 64


def test_rows_are_at_most_the_vocabulary():
    assert Rankings(8, 8, 30, 30, 16, vocabulary=100).rows == 100
    assert AllowedSets(sets=10, entries=500, dim=16, vocabulary=100).rows == 100


def test_logits_are_saved_only_where_that_moves_less():
    few, many = Rankings(1, 1, 8, 16, 64, 99), Rankings(1, 1, 8, 17, 64, 99)
    assert few.saved_logits == torch.zeros(1, 8, 16).nbytes
    assert many.saved_logits == 0
    # Forming them again is paid in FLOPs instead.
    assert model.ranking_step(few, 4).flops == 3 * model.ranking_forward(few, 4).flops
    assert model.ranking_step(many, 4).flops == 4 * model.ranking_forward(many, 4).flops


def test_gradient_of_the_embedding_by_mode():
    size = Rankings(rankings=6, lists=3, ranks=4, candidates=5, dim=64, vocabulary=1000)
    read = torch.zeros(6, 4, 64).half().nbytes + size.saved_logits
    out = {mode: model.weight_gradient(size, 2, mode).bytes - read for mode in ("dense", "rows", "accumulate")}
    assert out["dense"] == torch.zeros(1000, 64).half().nbytes
    assert out["rows"] == torch.zeros(15, 64).nbytes
    assert out["accumulate"] == 2 * torch.zeros(15, 64).nbytes


def test_step_is_the_sum_of_its_passes():
    passes = [
        model.ranking_forward(TEXTBOOK, 2, keeps=True),
        model.hidden_gradient(TEXTBOOK, 2),
        model.weight_gradient(TEXTBOOK, 2, "rows"),
    ]
    step = model.ranking_step(TEXTBOOK, 2, "rows")
    assert step == Cost(sum(p.bytes for p in passes), sum(p.flops for p in passes))


def test_floors_of_the_textbook_shape_on_an_h200():
    """64 prompts x 8 rollouts, T = 32, K = 128, D = 2048: 23 us forward, 25 us and 33 us for the gradients."""
    forward = H200.floor(model.ranking_forward(TEXTBOOK, 2))
    hidden = H200.floor(model.hidden_gradient(TEXTBOOK, 2))
    weight = H200.floor(model.weight_gradient(TEXTBOOK, 2, "rows"))
    assert [round(1e6 * s, 1) for s in (forward, hidden, weight)] == [23.5, 25.4, 33.2]


def test_memory_is_saved_logits_sixteen_bytes_a_step_and_gradients():
    size = Rankings(rankings=6, lists=3, ranks=4, candidates=5, dim=64, vocabulary=1000)
    kept = torch.zeros(6, 4, 5).nbytes + 16 * 24 + torch.zeros(6, 4, 64).nbytes
    assert model.ranking_memory(size, 4, "accumulate") == kept
    assert model.ranking_memory(size, 4, "rows") == kept + torch.zeros(15, 64).nbytes
    assert model.ranking_memory(size, 4, "dense") == kept + torch.zeros(1000, 64).nbytes


def test_restricted_step():
    size = AllowedSets(sets=10, entries=50, dim=16, vocabulary=1000)
    hidden, rows, logits = torch.zeros(10, 16).nbytes, torch.zeros(50, 16).nbytes, torch.zeros(50).nbytes
    indices = torch.zeros(50 + 11 + 10, dtype=torch.int64).nbytes
    forward = hidden + rows + indices + logits + 2 * torch.zeros(10).nbytes
    backward = 2 * logits + 2 * torch.zeros(10).nbytes + 2 * hidden + rows + torch.zeros(1000, 16).nbytes
    cost = model.restricted_step(size, 4)
    assert cost == Cost(forward + backward, 3 * 2 * 50 * 16)


def test_floor_is_the_larger_bound():
    ceilings = Ceilings(copy={2**20: 1e9}, gemm=1e10, dtype="float32")
    assert ceilings.floor(Cost(bytes=1_000_000, flops=1)) == pytest.approx(1e-3)
    assert ceilings.floor(Cost(bytes=1, flops=10_000_000)) == pytest.approx(1e-3)


def test_bandwidth_is_that_of_a_copy_of_about_the_same_size():
    ceilings = Ceilings(copy={2**16: 9e10, 2**20: 5e10, 2**30: 1e10}, gemm=1.0, dtype="float32")
    assert [ceilings.bandwidth(n) for n in (0, 2**16, 2**19, 2**24, 2**40)] == [9e10, 9e10, 5e10, 5e10, 1e10]
