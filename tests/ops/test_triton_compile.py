"""Every configuration of every Triton kernel compiles ahead of time for the GPUs it is meant for, with none at hand."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from flexrec.triton_kernels import aot, launch, segment_sum  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "kernels.md"
SECONDS = 600  # that all compilations may take together: on one core and without Triton's cache they take a fifth


def run_without_interpreter(*arguments: str) -> Any:
    """What a Python program prints as JSON, in a process of its own: the interpreter replaces triton.jit at import."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=SECONDS)
    assert result.returncode == 0, result.stderr[-3000:]
    print(result.stderr)  # seconds per variant, for `pytest -s` and for failures
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def rows() -> list[aot.Row]:
    """Every variant compiled for every target."""
    found = run_without_interpreter("-m", "flexrec.triton_kernels.aot", "--json")
    assert found["triton"] == triton.__version__
    return [aot.Row(**{**row, "resources": aot.Resources(**row["resources"])}) for row in found["rows"]]


def test_all_variants_compile_for_all_targets(rows):
    compiled = {(row.module, row.variant, row.target) for row in rows}
    expected = {(variant.module, variant.name, target) for variant in aot.variants() for target in aot.TARGETS}
    assert compiled == expected
    assert len(rows) == len(expected) > 0


# What a GPU was asked about: 47.5 us with the spills of 4 warps, 98.8 without any by 8, which exchange dz through
# shared memory for every tile of dh (H200, N=512, P=64, T=32, K=128, D=2048; bench/NOTES.md). Bytes, at most.
SPILLS_THAT_PAY = {"ranking_logprobs_dlogits bf16 K=100 64x128x64": 600}


def test_no_register_is_spilled(rows):
    spilling = [
        f"{row.variant}, {row.target}: {row.resources.spills} bytes"
        for row in rows
        if row.resources.spills > SPILLS_THAT_PAY.get(row.variant, 0)
    ]
    assert not spilling, "smaller tiles or more warps:\n" + "\n".join(spilling)


def test_no_reduction_goes_over_lanes_that_lie_apart(rows):
    apart = [f"{row.variant}, {row.target}" for row in rows if row.resources.lanes_apart]
    assert not apart, "Triton 3.6 takes their neighbours; see scans.sum_of_rows:\n" + "\n".join(apart)


def test_lanes_that_lie_apart_are_seen():
    """A row in lanes 0, 1 and 3 (copies in 2), as Triton 3.6 laid out the largest gains of lists; and neighbours."""
    layouts = """
#blocked = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [2, 16], warpsPerCTA = [4, 1], order = [1, 0]}>
#linear = #ttg.linear<{register = [[8, 0]], lane = [[0, 8], [0, 16], [0, 0], [0, 1], [1, 0]], warp = [], block = []}>
#linear1 = #ttg.linear<{register = [], lane = [[0, 8, 0], [0, 0, 1], [0, 16, 0], [1, 0, 0]], warp = [], block = []}>
"""

    def reduction(axis: int, layout: str) -> str:
        return f"""
    %a = "tt.reduce"(%b) <{{axis = {axis} : i32}}> ({{
    ^bb0(%c: f32 loc(#loc), %d: f32 loc(#loc)):
      tt.reduce.return %e : f32 loc(#loc)
    }}) : (tensor<16x32xf32, {layout}>) -> tensor<16xf32, #ttg.slice<{{dim = {axis}, parent = {layout}}}>> loc(#loc)"""

    for expected, axis, layout in (
        (0, 1, "#blocked"),
        (1, 1, "#linear"),
        (0, 0, "#linear"),
        (1, 1, "#linear1"),
        (0, 0, "#linear1"),
        (1, 1, "#ttg.slice<{dim = 2, parent = #linear1}>"),
        (0, 1, "#ttg.slice<{dim = 1, parent = #linear1}>"),
    ):
        assert aot.reductions_of_lanes_apart(layouts + 2 * reduction(axis, layout)) == 2 * expected, (axis, layout)


def test_shared_memory_fits(rows):
    excess = [
        f"{row.variant}, {row.target}: {row.resources.shared_bytes} of {aot.SHARED_LIMIT[row.target]} bytes"
        for row in rows
        if row.resources.shared_bytes > aot.SHARED_LIMIT[row.target]
    ]
    assert not excess, "smaller tiles or fewer stages:\n" + "\n".join(excess)


def test_table_is_up_to_date(rows):
    """Equal to the letter under the version that made it; versions differ in figures, never in what there is."""
    committed, fresh = TABLE.read_text(), aot.table(rows, triton.__version__)
    if triton.__version__ != table_version(committed):
        committed, fresh = (
            re.findall(r"^## .*|^\| [^|]*\| [^|]*\|", text, re.MULTILINE) for text in (committed, fresh)
        )
    assert committed == fresh, f"docs/kernels.md is stale; if no figure got worse, run `{aot.COMMAND}` and commit it"


def test_table_is_made_with_the_pinned_triton():
    pinned = re.search(r"^triton==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert table_version(TABLE.read_text()) == pinned, f"constraints.txt pins {pinned}; run `{aot.COMMAND}` with it"


def table_version(text: str) -> str:
    return re.search(r"^Generated with Triton (\S+) ", text, re.MULTILINE)[1]


def test_every_kernel_has_an_example():
    """A kernel is a @triton.jit function that no other one calls."""
    jitted: set[str] = set()
    called: set[str] = set()
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for function in jit_functions(path):
            jitted.add(function.name)
            calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
            called |= {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    covered = {variant.launch.kernel.__name__ for variant in aot.variants()}
    assert jitted - called == covered


def jit_functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
        if isinstance(node, ast.FunctionDef) and {"triton.jit", "kernel"} & set(decorators):
            yield node


def test_examples_are_told_apart_by_their_labels(monkeypatch):
    def example(first, size):
        offsets = torch.zeros(40, dtype=torch.int64)
        return lambda: segment_sum.owners(offsets[first : first + size], 3)

    # Lengths make no difference to a kernel, but whether a pointer is a multiple of 16 bytes does.
    monkeypatch.setattr(
        aot, "examples", lambda: [("same", example(0, 5)), ("same", example(0, 17)), ("other", example(1, 5))]
    )
    names = [variant.name for variant in aot.variants.__wrapped__()]
    assert names == ["owners same 256", "owners other 256"]
    monkeypatch.setattr(aot, "examples", lambda: [("same", example(0, 5)), ("same", example(1, 5))])
    with pytest.raises(ValueError, match=r"need different names, .* got twice \['owners same 256'"):
        aot.variants.__wrapped__()


def test_a_record_says_what_triton_makes_of_arguments():
    table = torch.zeros(3, 33, dtype=torch.bfloat16)
    entries = [torch.zeros(16, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.int64)]
    out = torch.zeros(9, 33)
    with launch.recorded() as launches:
        for width in (32, 1, 33):
            segment_sum.scatter_add(*entries[:2], table[1:, :width], entries[2], out[:, :width])
    assert not out.any()
    assert [found.kernel for found in launches] == [segment_sum.scatter_kernel] * 3
    pointers = {"coefficient_ptr": "*fp32:16", "index_ptr": "*i32:16", "place_ptr": "*i64:16", "out_ptr": "*fp32:16"}
    for found, width in zip(launches, ({"D": "i32:16"}, {}, {"D": "i32"}), strict=True):
        sizes = {"entries": "i32", "V": "i32"}  # the former is 16, and no kernel is compiled for that
        assert found.types == {**pointers, "table_ptr": "*bf16", **sizes, **width}
    assert launches[1].constants["D"] == 1
    with launch.recorded(), pytest.raises(TypeError, match=r"owners_kernel takes .*'segments'.* got .*'nothing'"):
        launch.launch(segment_sum.owners_kernel, (1,), table, nothing=1)


PROBES = """
import dataclasses, json, sys
import triton, triton.language as tl
from flexrec.triton_kernels.aot import TARGETS, compile_launch
from flexrec.triton_kernels.launch import Launch

@triton.jit
def scale(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)  # (BLOCK,)
    x = tl.load(x_ptr + i)  # (BLOCK,), all of it alive until the largest is known
    tl.store(y_ptr + i, x * tl.max(x))

@triton.jit
def square(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (BLOCK, BLOCK)
    x = tl.load(x_ptr + i)  # (BLOCK, BLOCK)
    tl.store(y_ptr + i, tl.dot(x, x))

types = {"x_ptr": "*fp32:16", "y_ptr": "*fp32:16"}
probes = {
    "fits": Launch(scale, types, {"BLOCK": 1024}, 4),
    "spills": Launch(scale, types, {"BLOCK": 131072}, 16),
    "product": Launch(square, {"x_ptr": "*bf16:16", "y_ptr": "*fp32:16"}, {"BLOCK": 64}, 4),
}
found = {n: {t: dataclasses.asdict(compile_launch(p, t)) for t in TARGETS} for n, p in probes.items()}
print(json.dumps(found))
"""


def test_spills_and_instructions_are_seen(tmp_path):
    """A kernel that cannot fit the registers, one that does, and one with a matrix product."""
    program = tmp_path / "probes.py"  # a file, because Triton reads the source of a kernel
    program.write_text(PROBES)
    found = run_without_interpreter(str(program))
    for target in aot.TARGETS:
        assert found["fits"][target]["spills"] == 0
        assert found["fits"][target]["instruction"] == ""
        assert 0 < found["fits"][target]["registers"] < 64
        assert found["spills"][target]["spills"] > 0
    assert found["product"]["sm_80"]["instruction"].startswith("HMMA.")
    assert found["product"]["sm_90"]["instruction"].startswith("HGMMA.")
    assert found["product"]["gfx942"]["instruction"].startswith("v_mfma_f32_")
    assert found["product"]["sm_90"]["shared_bytes"] >= 2 * 64 * 64  # the bf16 operand goes through it
