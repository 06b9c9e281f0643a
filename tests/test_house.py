"""The house: which rooms there are, and that imports go one way, from a floor to those below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "triton_kernels"  # a folder of its own, installed as flexrec.triton_kernels

# From the top: a file may import from its own room and from the floors below.
FLOORS = (
    ("cli",),
    ("serving",),
    ("experiment", "integrations"),
    ("trainer", "evaluation"),
    ("decoding",),
    ("policy",),
    ("task",),
    ("data",),
    ("rankings",),
    ("ops",),
    ("numba_kernels", KERNELS, "_core"),
    ("metrics", "checks", "profiling"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder, prefix in ((ROOT / "flexrec", "flexrec"), (ROOT / KERNELS, f"flexrec.{KERNELS}")):
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder).with_suffix("").parts
            if folder.name == "flexrec" and inside[0] == KERNELS:
                continue  # a link that makes the folder importable without an install
            found[".".join([prefix, *inside]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """The package's own modules that a module imports, at its top or inside of functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES or whole == "flexrec._core" else str(node.module))
    return {module for module in found if module.split(".")[0] == "flexrec"}


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "flexrec"])
def test_imports_go_down(name: str) -> None:
    assert room_of(name) in FLOOR, f"{name} is in no room that this test knows"
    for other in imports_of(name):
        assert other != "flexrec", f"{name} imports from the package's front, not from where the name lives"
        mine, its = room_of(name), room_of(other)
        assert mine == its or FLOOR[its] > FLOOR[mine], f"{name} imports {other}, which is not below it"


def test_no_two_files_import_each_other() -> None:
    imports = {name: imports_of(name) for name in MODULES}
    for name, others in imports.items():
        assert name not in others
        for other in others:
            assert name not in imports.get(other, ()), f"{name} and {other} import each other"


def test_the_listing_stays_short() -> None:
    entries = {name.split(".")[1] for name in MODULES if name != "flexrec"} - {KERNELS}
    assert len(entries) <= 16, sorted(entries)
    assert len([name for name in MODULES if name.startswith("flexrec.ops")]) <= 13
    for path in (*MODULES.values(), *Path(__file__).parent.rglob("*.py")):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path


def test_every_cpu_kernel_says_what_its_arithmetic_may_do() -> None:
    """numba gives a function that does not say it the fast math of whoever calls it first, and caches that."""
    for name, path in MODULES.items():
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "njit":
                assert "fastmath" in {keyword.arg for keyword in call.keywords}, f"{name}, line {call.lineno}"
        if room_of(f"{name}.") == "numba_kernels":
            bare = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() == "@njit"]
            assert not bare, name


def test_front_names_what_exists() -> None:
    import flexrec

    for name in flexrec.__all__:
        home = getattr(flexrec, name).__module__
        assert home.startswith("flexrec."), name
    assert set(flexrec.__all__) <= set(dir(flexrec))
