"""The Triton kernel against the torch reference in float64: in the interpreter without a GPU, compiled with one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.metrics import FAMILIES
from flexrec.ops import swap_rewards as module
from flexrec.ops.swap_rewards import swap_rewards, swap_rewards_op

LINEAR = [{"rbp": "rbp.8"}.get(name, name) for name, family in FAMILIES.items() if family.form == "linear"]


def check(gains: torch.Tensor, metric: str, device: torch.device, tolerance: float, **ragged: object) -> None:
    """The kernel's rewards lie within ``tolerance`` times the reward's scale of the float64 reference."""
    exact = swap_rewards(gains.double(), metric, backend="torch", **ragged)
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in ragged.items()}
    rewards = swap_rewards(gains.to(device), metric, backend="triton", **on_device).cpu()
    assert rewards.dtype == (torch.float64 if gains.dtype == torch.float64 else torch.float32)
    assert (rewards - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("metric", LINEAR)
@settings(max_examples=4, deadline=None)
@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 9),
    cutoff=st.sampled_from(["", "@1", "@3", "@40"]),
    seed=st.integers(0, 1000),
)
def test_equals_reference(metric, rows, size, cutoff, seed, device):
    generator = torch.Generator().manual_seed(seed)
    gains = torch.randint(0, 4, (rows, size), generator=generator) * torch.rand(rows, size, generator=generator).round()
    lengths = torch.randint(0, size + 1, (rows,), generator=generator)
    num_ranked = torch.randint(0, size + 1, (rows,), generator=generator)
    outside = torch.arange(size) >= lengths[:, None]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        check(gains.to(dtype), metric + cutoff, device, tolerance, num_ranked=size // 2)
        ragged = gains.to(dtype).masked_fill(outside, math.nan)
        check(ragged, metric + cutoff, device, tolerance, lengths=lengths, num_ranked=num_ranked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_float32_out(dtype, device):
    gains = torch.rand(9, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(gains, "ndcg@10", device, 1e-6)


@pytest.mark.parametrize("metric", ["dcg", "ndcg", "ndcg@10", "ndcg_burges"])
def test_large_common_offset(metric, device):
    gains = 1e4 + torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    check(gains, metric, device, 1e-5)


@pytest.mark.parametrize("metric", LINEAR)
def test_ties_give_exactly_zero(metric, device):
    """A rounding error in place of 0 would become an advantage of size 1 where rewards are divided by their spread."""
    tied = torch.full((3, 37), 0.3, device=device)
    assert swap_rewards(tied, metric, backend="triton").eq(0).all()
    if metric in ("recall", "precision"):  # all candidates shown, equal discounts: no order is better than another
        mixed = torch.rand(3, 37, generator=torch.Generator().manual_seed(0)).round().to(device)
        assert swap_rewards(mixed, metric, backend="triton").eq(0).all()


def test_several_lists_per_program_and_a_last_one_that_is_not_full(device):
    gains = torch.rand(35, 40, generator=torch.Generator().manual_seed(0))
    check(gains, "ndcg", device, 1e-6)
    check(gains[:, ::2], "ndcg", device, 1e-6)  # a stride of two
    check(gains[:, :13], "recall@5", device, 1e-6)  # rows further apart than they are long


def test_small_gains_keep_their_digits(device):
    gains = torch.rand(4, 60, generator=torch.Generator().manual_seed(0)) * 1e-3
    check(gains, "dcg_burges", device, 1e-6)
    check(gains, "ndcg_burges", device, 1e-6)


def test_empty_batches(device):
    for shape in ((0, 5), (5, 0)):
        assert swap_rewards(torch.empty(shape, device=device), "ndcg", backend="triton").shape == shape


def test_opcheck(device):
    gains, counts = torch.rand(3, 5, device=device), torch.tensor([5, 3, 1], device=device)
    torch.library.opcheck(swap_rewards_op, (gains, "ndcg@3", "swap", counts, None, 5, None, "triton"))


def test_too_long_lists_are_refused(device):
    with pytest.raises(ValueError, match=f"K <= {module.MAX_TRITON_SIZE}.* K={module.MAX_TRITON_SIZE + 1}"):
        swap_rewards(torch.zeros(1, module.MAX_TRITON_SIZE + 1, device=device), "dcg", backend="triton")


def test_without_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(module, "_triton_interprets", lambda: False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        swap_rewards(torch.zeros(1, 3), "dcg", backend="triton")


@pytest.mark.gpu
def test_auto_chooses_the_kernel_on_a_gpu():
    gains = torch.rand(8, 30, device="cuda")
    assert module._resolve_backend("auto", module.parse_metric("ndcg"), "swap", gains) == "triton"
    assert module._resolve_backend("auto", module.parse_metric("map"), "swap", gains) == "torch"
