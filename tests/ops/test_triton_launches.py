"""What is launched is among what is compiled ahead of time: tile sizes, warps, stages and element types.

What is None and what flags there are makes other code, which need not be among it: that Triton can read it in every
such form is seen here and, of what other tests of this folder launch, by ``conftest.py`` where all of it is run.

The launchers run for many shapes with kernels that only note how they are called, so any size costs nothing.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from front_end import front_end

pytest.importorskip("triton")

from flexrec.metrics import parse_metric
from flexrec.ops.ranking_logprobs import ranking_logprobs, ranking_logprobs_with_kl
from flexrec.ops.restricted_logprobs import restricted_logprobs, restricted_logprobs_with_kl
from flexrec.ops.swap_rewards import swap_rewards, swap_scores
from flexrec.triton_kernels import aot
from flexrec.triton_kernels import launch as launching
from flexrec.triton_kernels import swap_rewards as swap_kernels
from flexrec.triton_kernels.launch import Launch, launch, recorded

COMPILED = [variant.launch for variant in aot.variants()]


def configuration(launch: Launch) -> tuple[object, ...]:
    """The kernel, its tiles but for the C columns of `values`, an optional argument, and its warps."""
    names = [name for name in launch.constants if name.startswith("BLOCK")]
    blocks = {name: launch.constants[name] for name in names if name != "BLOCK_C" or "C" not in launch.constants}
    return launch.kernel, blocks, launch.num_warps


def covers(compiled: str, launched: str) -> bool:
    """Whether a pointer is of this type or a wider one: what is narrower is converted where it is read."""
    floats, bits = zip(
        *((kind[1] != "i", int(kind.partition(":")[0].lstrip("*bfpi"))) for kind in (compiled, launched)), strict=True
    )
    return floats[0] == floats[1] and bits[1] <= bits[0]


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    """Filled while a test calls operations; no kernel runs, so results are whatever was in memory."""
    with recorded() as noted:
        yield noted


def check(launches: list[Launch]) -> None:
    """Each launch is compiled in all but its flags, which examples may take in their heaviest form, and can be read."""
    assert launches, "nothing was launched"
    for found in launches:
        alike = [compiled for compiled in COMPILED if configuration(compiled) == configuration(found)]
        assert alike, f"no example has these tiles and warps: {found}"
        for name, kind in found.types.items():
            if kind.startswith("*"):
                compiled = {other.types[name] for other in alike if name in other.types}
                message = f"{found.kernel.__name__}: {name} is {kind}, compiled is {compiled} for {found.constants}"
                assert not compiled or any(covers(other, kind) for other in compiled), message
    complaints = front_end().complaints(launches)
    assert not complaints, "\n\n".join(complaints)


def operand(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["alpha_ndcg", "alpha_ndcg@5", "err_ia"])
def test_topic_swaps(launches, metric, dtype, device):
    for size, columns in itertools.product((1, 30, 128, 129, 1000), (1, 16, 17, 64, 65, 256)):
        gains, topics = torch.zeros(3, size, dtype=dtype, device=device), torch.zeros(3, size, columns, device=device)
        weights = torch.zeros(3, size, size, dtype=dtype, device=device)
        swap_scores(gains, metric, topics=topics, backend="triton")
        swap_rewards(gains, metric, topics=topics, credit="policy", weights=weights, backend="triton")
        for credit in ("swap", "noncausal", "independent", "rank", "sequence"):
            swap_rewards(gains, metric, topics=topics, credit=credit, backend="triton")
    check(launches)


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


def compiled_by(launches: list[Launch]) -> int:
    """How many kernels Triton would compile."""
    return len({repr(found) for found in launches})


@pytest.mark.parametrize("weight_grad", ["dense", "rows"])
def test_ragged_batches_compile_no_kernel_anew(launches, weight_grad, device):
    """Every size of a batch differs, the model does not: what is compiled depends on the tiles alone, which are few."""
    generator = torch.Generator().manual_seed(0)
    hidden_size, vocabulary, counts = 256, 3000, []
    weight, bias = operand(vocabulary, hidden_size, dtype=torch.bfloat16, device=device), torch.zeros(vocabulary)
    for batch in range(75):
        draw = [int(torch.randint(1, most, (), generator=generator)) for most in (4, 9, 60, 300, 2000)]
        lists, group, steps, size, entries = draw
        steps = min(steps, size)
        state = operand(lists * group, steps, hidden_size, dtype=torch.bfloat16, device=device)
        candidates = torch.arange(size, device=device).expand(lists, size)
        ranking = torch.arange(steps, device=device).expand(lists * group, steps)
        options = {"bias": bias, "backend": "triton", "weight_grad": weight_grad}
        ranked = ranking_logprobs(state, weight, candidates, ranking, **options)
        cuts = torch.randint(0, entries, (steps - 1,), generator=generator).sort().values + torch.arange(steps - 1)
        offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([entries + steps])]).unique().to(device)
        ids = torch.cat([torch.arange(end - begin, device=device) for begin, end in offsets.unfold(0, 2, 1).tolist()])
        rows = operand(len(offsets) - 1, hidden_size, dtype=torch.bfloat16, device=device)
        restricted = restricted_logprobs(rows, weight, ids, offsets, ids[offsets[:-1]], **options)
        (ranked.logprobs.sum() + ranked.entropy.sum() + restricted.logprobs.sum()).backward()
        gains, lengths = torch.rand(lists * group, size, device=device), torch.full((lists * group,), size)
        for metric in ("ndcg@10", "err"):
            swap_rewards(gains, metric, lengths=lengths.to(device), backend="triton")
            swap_rewards(gains, metric, num_ranked=steps, backend="triton")
        if batch in (44, 74):
            counts.append(compiled_by(launches))
    assert len(launches) > 1000
    assert counts[0] == counts[1]
    assert counts[1] <= 64


class OnSecondGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 1))


@pytest.mark.parametrize(("current", "made_current"), [(0, [1]), (1, [])])
def test_kernels_are_launched_on_the_gpu_of_their_tensors(current, made_current, monkeypatch):
    happened: list[object] = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **named: happened.append((grid, len(arguments), named))

    @contextlib.contextmanager
    def device(chosen):
        happened.append(chosen.index)
        yield
        happened.append("back")

    monkeypatch.setattr(launching, "_record", None)  # a kernel that is none cannot be noted
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    launch(Kernel(), (3,), None, torch.zeros(2).as_subclass(OnSecondGpu), 2, BLOCK=8, num_warps=8)
    assert happened[: len(made_current)] == made_current
    grid, count, named = happened[len(made_current)]
    assert (grid, count) == ((3,), 3)
    assert named == {"BLOCK": 8, "num_warps": 8, "enable_fp_fusion": True}
    assert happened[len(made_current) + 1 :] == ["back"] * len(made_current)


def test_no_kernel_is_launched_elsewhere():
    """kernel[grid](...) stands in launch.py only, which makes the GPU of the tensors the current one."""
    found = []
    for path in sorted((Path(__file__).resolve().parents[2] / "triton_kernels").glob("*.py")):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        found += [path.name for call in calls if isinstance(call.func, ast.Subscript)]
    assert found == ["launch.py"]
