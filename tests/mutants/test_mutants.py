"""Every mutant still applies, and names tests that exist; ``make test-mutants`` says whether they notice it."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutants import ROOT, Mutant, load_mutants

MUTANTS = load_mutants()


@functools.cache
def definitions(path: str) -> dict[str, set[str]]:
    """The names that a file of tests defines, and those inside of its classes."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    return {
        node.name: {inner.name for inner in getattr(node, "body", []) if hasattr(inner, "name")}
        for node in body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_it_applies_and_its_tests_exist(mutant: Mutant) -> None:
    changed = mutant.applied_to((ROOT / mutant.file).read_text(encoding="utf-8"))
    if mutant.file.endswith(".py"):
        compile(changed, mutant.file, "exec")
    for test in mutant.tests:
        path, *names = test.partition("[")[0].split("::")
        if names:
            assert names[0] in definitions(path), f"{path} has no {names[0]}"
            assert set(names[1:]) <= definitions(path)[names[0]], f"{path} has no {test}"
        else:
            assert definitions(path)


def test_faults_that_do_not_apply_are_refused() -> None:
    mutant = Mutant("twice", "x.py", "a", "b", ("tests/test_x.py",))
    with pytest.raises(ValueError, match="stands 2 times"):
        mutant.applied_to("a a")
    with pytest.raises(ValueError, match="stands 0 times"):
        mutant.applied_to("c")
    assert mutant.applied_to("a c") == "b c"
