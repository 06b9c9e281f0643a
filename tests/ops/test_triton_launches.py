"""What is launched is among what is compiled ahead of time: tile sizes, warps, stages and element types.

The launchers run for many shapes with kernels that only note how they are called, so any size costs nothing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from flexrec.triton_kernels import aot
from flexrec.triton_kernels import swap_rewards as swap_kernels

from flexrec.metrics import parse_metric
from flexrec.ops.ranking_logprobs import ranking_logprobs, ranking_logprobs_with_kl
from flexrec.ops.restricted_logprobs import restricted_logprobs, restricted_logprobs_with_kl
from flexrec.ops.swap_rewards import swap_rewards, swap_scores

VARIANTS = [variant for _, variant in aot.kernel_variants()]  # listed before any kernel is replaced


class Launch(NamedTuple):
    """Of one kernel: its tiles, launch options, and the dtype of every tensor it was given."""

    kernel: str
    blocks: dict[str, object]
    num_warps: int
    num_stages: int | None
    dtypes: dict[str, torch.dtype]


def tiles_of(arguments: dict[str, object]) -> dict[str, object]:
    """Tile sizes, but for the C columns of `values`, an optional argument."""
    return {
        name: size
        for name, size in arguments.items()
        if name.startswith("BLOCK") and not (name == "BLOCK_C" and "C" in arguments)
    }


def covers(compiled: str, dtype: torch.dtype) -> bool:
    """Whether a Triton pointer type is of this dtype or a wider one: what is narrower is converted where it is read."""
    is_float, bits = compiled.startswith(("*fp", "*bf")), int(compiled.lstrip("*bfpi"))
    return is_float == dtype.is_floating_point and 8 * dtype.itemsize <= max(bits, 8)


class Recorder:
    """Stands in for a kernel: notes a launch, computes nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: object, num_warps: int = 4, num_stages: int | None = None, **named: object) -> None:
        given = {**dict(zip(self.arg_names, args, strict=False)), **named}
        assert set(given) == set(self.arg_names)
        blocks = tiles_of(given)
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor) and x.numel()}
        dtypes = {name: x.dtype for name, x in tensors.items()}
        self.launches.append(Launch(self.kernel.__name__, blocks, num_warps, num_stages, dtypes))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Filled while a test calls operations; no kernel runs, so results are whatever was in memory."""
    noted: list[Launch] = []
    kernels = {variant.kernel.__name__ for variant in VARIANTS}

    def is_kernel(value: Any) -> bool:
        return hasattr(value, "arg_names") and value.__name__ in kernels

    modules = [module for name, module in sys.modules.items() if name.startswith("flexrec.triton_kernels.")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if is_kernel(value):
                monkeypatch.setattr(module, name, Recorder(value, noted))
            elif isinstance(value, dict):  # of kernels by what they compute
                for key in [key for key in value if is_kernel(value[key])]:
                    monkeypatch.setitem(value, key, Recorder(value[key], noted))
    return noted


def check(launches: list[Launch]) -> None:
    """Each launch is a variant in all but its flags, which variants may take in their heaviest form."""
    assert launches, "nothing was launched"
    for launch in launches:
        alike = [
            variant
            for variant in VARIANTS
            if variant.kernel.__name__ == launch.kernel
            and tiles_of(variant.constants) == launch.blocks
            and (variant.num_warps, variant.num_stages) == (launch.num_warps, launch.num_stages)
        ]
        assert alike, f"no variant has these tiles and options: {launch}"
        for name, dtype in launch.dtypes.items():
            compiled = {variant.types[name] for variant in alike if name in variant.types}
            message = f"{launch.kernel}: {name} is {dtype}, compiled is {compiled} for {launch.blocks}"
            assert not compiled or any(covers(kind, dtype) for kind in compiled), message


def operand(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["ndcg", "ndcg@5", "dcg_burges", "recall@10", "rbp.8", "mrr", "map@10", "err"])
def test_swap_rewards(launches, metric, dtype, device):
    for rows, size in itertools.product(
        (1, 3000), (1, 2, 7, 30, 64, 100, 128, 130, 300, 1000, 1024, 1025, 5000, 16384)
    ):
        if rows * size > 3_000_000:
            continue
        gains = torch.zeros(rows, size, dtype=dtype, device=device)
        lengths = torch.full((rows,), size, device=device)
        swap_rewards(gains, metric, backend="triton")
        swap_rewards(gains, metric, lengths=lengths, num_ranked=lengths, backend="triton")
        if size <= 1024:
            swap_scores(gains[:300], metric, lengths=lengths[:300], backend="triton")
        if parse_metric(metric).definition.form == "linear":
            options = {"lengths": lengths, "max_ranked": size, "variance": gains}
            swap_kernels.swap_rewards(gains, parse_metric(metric), "swap", **options)
    check(launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 3), (40,) * 50, (3000, 2, 9)], ids=["short", "many", "long"])
def test_restricted_logprobs(launches, dtype, sizes, device):
    offsets = torch.tensor([0, *sizes], device=device).cumsum(0)
    ids = torch.cat([torch.arange(size, device=device) for size in sizes])
    for dim, mode, reference in itertools.product((8, 64, 100, 300), ("dense", "rows"), (False, True)):
        hidden, weight = (operand(n, dim, dtype=dtype, device=device) for n in (len(sizes), 3000))
        arguments = (hidden, weight, ids, offsets, ids[offsets[:-1]])
        options = {"bias": operand(3000, dtype=dtype, device=device), "weight_grad": mode, "backend": "triton"}
        if reference:
            values = torch.zeros(len(ids), 3, device=device)
            ref = {"ref_hidden": hidden.detach(), "ref_weight": weight.detach()}
            result = restricted_logprobs_with_kl(*arguments, **ref, values=values, **options)
        else:
            result = restricted_logprobs(*arguments, **options)
        sum(output.sum() for output in result if output is not None).backward()
    check(launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 8])
def test_ranking_logprobs(launches, dtype, group, device):
    for size, dim, mode, reference in itertools.product(
        (3, 30, 64, 130, 2000), (8, 64, 300), ("dense", "rows"), (False, True)
    ):
        for steps in {1, min(size, 40)}:
            hidden, weight = (
                operand(group, steps, dim, dtype=dtype, device=device),
                operand(2000, dim, dtype=dtype, device=device),
            )
            candidates = torch.arange(size, device=device)[None]
            ranking = torch.arange(steps, device=device).expand(group, steps)
            options = {"bias": operand(2000, dtype=dtype, device=device), "weight_grad": mode, "backend": "triton"}
            if reference:
                options |= {"ref_hidden": hidden.detach(), "ref_weight": weight.detach()}
                options |= {"values": torch.zeros(group, size, 3, device=device)}
            evaluate = ranking_logprobs_with_kl if reference else ranking_logprobs
            result = evaluate(hidden, weight, candidates, ranking, **options)
            sum(output.sum() for output in result if output is not None).backward()
    check(launches)
