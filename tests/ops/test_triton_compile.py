"""Every configuration of every Triton kernel compiles ahead of time for the GPUs it is meant for, with none at hand."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from flexrec.triton_kernels import aot  # noqa: E402

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
    expected = {(module, variant.name, target) for module, variant in aot.kernel_variants() for target in aot.TARGETS}
    assert compiled == expected
    assert len(rows) == len(expected) > 0


def test_no_register_is_spilled(rows):
    spilling = [f"{row.variant}, {row.target}: {row.resources.spills} bytes" for row in rows if row.resources.spills]
    assert not spilling, "smaller tiles or more warps:\n" + "\n".join(spilling)


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


def test_every_kernel_has_a_variant():
    """A kernel is a @triton.jit function that no other one calls."""
    jitted: set[str] = set()
    called: set[str] = set()
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for function in jit_functions(path):
            jitted.add(function.name)
            calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
            called |= {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    covered = {variant.kernel.__name__ for _, variant in aot.kernel_variants()}
    assert jitted - called == covered


def jit_functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


def test_arguments_are_named_once_and_variants_too(monkeypatch):
    module, variant = next(aot.kernel_variants())
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['nothing'\], named twice \[\]"):
        aot.compile_variant(replace(variant, types={**variant.types, "nothing": "i32"}), "sm_90")
    monkeypatch.setattr(f"flexrec.triton_kernels.{module}.variants", lambda: [variant, variant])
    with pytest.raises(ValueError, match=f"{module}.variants.. names two variants {variant.name!r}"):
        list(aot.kernel_variants())


PROBES = """
import dataclasses, json, sys
import triton, triton.language as tl
from flexrec.triton_kernels.aot import TARGETS, Variant, compile_variant

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

types = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
probes = [
    Variant("fits", scale, types, {"BLOCK": 1024}, 4),
    Variant("spills", scale, types, {"BLOCK": 131072}, 16),
    Variant("product", square, {"x_ptr": "*bf16", "y_ptr": "*fp32"}, {"BLOCK": 64}, 4),
]
print(json.dumps({v.name: {t: dataclasses.asdict(compile_variant(v, t)) for t in TARGETS} for v in probes}))
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
