"""What the Triton launchers of ranking_logprobs settle before a kernel runs: ranks, and choices by shape."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from flexrec.ops.rank_order import rank_positions
from flexrec.triton_kernels import aot
from flexrec.triton_kernels import ranking_logprobs_problem as problems

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(("n", "t", "k"), [(1, 1, 1), (3, 4, 9), (2, 1027, 1030), (2, 0, 5)])
@pytest.mark.parametrize("ragged", [False, True])
def test_ranks(n, t, k, ragged, device):
    generator = torch.Generator().manual_seed(k)
    lengths = torch.randint(0, k + 1, (n,), generator=generator) if ragged else None
    ranking = torch.stack([torch.randperm(k, generator=generator)[:t] for _ in range(n)])
    for i, length in enumerate([] if lengths is None else lengths.tolist()):
        ranking[i] = -1
        ranking[i, : min(t, length)] = torch.randperm(length, generator=generator)[:t]
    found = problems.rank_positions_(ranking.to(device), None if lengths is None else lengths.to(device), k)
    assert found.dtype == torch.int32
    assert found.stride(0) == problems.padded(k)
    assert torch.equal(found.long().cpu(), rank_positions(ranking, k, lengths))


def test_ranks_out_of_range_write_nowhere(device):
    """Where value checks are off: what is out of range is passed over, neighbouring rows stay as they are."""
    ranking = torch.tensor([[0, 1], [-5, 90], [1, 0]], device=device)
    found = problems.rank_positions_(ranking, None, 3)
    assert found.tolist()[::2] == [[0, 1, 2], [1, 0, 2]]
    assert all(rank >= 0 for rank in found[1].tolist())


def test_choices_by_shape():
    assert problems.choose_order(128, 128, 1) == "chosen"
    for steps, size, group in ((127, 128, 1), (128, 127, 1), (512, 512, 2)):
        assert problems.choose_order(steps, size, group) == "canonical"
    assert problems.keeps_logits(512, 2048)
    assert not problems.keeps_logits(513, 2048)
    assert [problems.padded(k) for k in (1, 8, 9)] == [8, 8, 16]


def test_every_launch_is_compiled_ahead_of_time():
    """Tiles and warps that a launcher can choose are among those of the examples, which are checked for spills."""
    compiled = {
        (launch.kernel.__name__, launch.num_warps, *(launch.constants[f"BLOCK_{axis}"] for axis in "TKD"))
        for _, _, launch in aot.variants()
        if launch.kernel.__name__.startswith("ranking_logprobs_")
    }
    launched = set()
    for rows in (1, 32, 33, 64, 5000):
        for size in (1, 32, 33, 64, 65, 128, 129, 200, 16384):
            for arithmetic in ("half", "tf32", "ieee"):
                for reference in (True, False):
                    for name, choose in (("forward", problems.softmax_tiles), ("dlogits", problems.slopes_tiles)):
                        tiles = choose(rows, size, arithmetic, reference)
                        launched.add((f"ranking_logprobs_{name}_kernel", tiles.warps, tiles.t, tiles.k, tiles.d))
                for name, choose in (
                    ("hidden_grad", problems.product_tiles),
                    ("weight_grad", problems.weight_grad_tiles),
                ):
                    tiles = choose(rows, size, arithmetic)
                    launched.add((f"ranking_logprobs_{name}_kernel", tiles.warps, tiles.t, tiles.k, tiles.d))
    assert launched <= compiled, launched - compiled
