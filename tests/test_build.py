"""The wheel: built from a copy of the tracked sources, unpacked elsewhere, imported from elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str], cwd: Path, **environment: str) -> str:
    # Threads of numerical libraries would only slow down short-lived processes.
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone holds: no compiled module, no build folder."""
    target = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml"):
        shutil.copy2(ROOT / name, target)
    if (ROOT / "README.md").exists():
        shutil.copy2(ROOT / "README.md", target)
    for name in ("csrc", "flexrec", "triton_kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return target


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    # A torch that cannot be imported: the build must not need it.
    (target / "poison").mkdir()
    (target / "poison" / "torch.py").write_text("raise ImportError('the build imported torch')\n")
    # Without optimisation, because compiling is all the time that this takes.
    quick = {"CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0"}
    run([*pip, "--wheel-dir", str(target), str(source)], cwd=target, PYTHONPATH=str(target / "poison"), **quick)
    (built,) = target.glob("flexrec-*.whl")
    return built


def test_wheel_holds_every_module_once(wheel: Path, source: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    for folder, package in ((source / "flexrec", "flexrec"), (source / "triton_kernels", "flexrec/triton_kernels")):
        for path in folder.rglob("*.py"):
            assert f"{package}/{path.relative_to(folder).as_posix()}" in names
    assert "flexrec/py.typed" in names
    assert "flexrec/_core.pyi" in names
    assert {"flexrec/serving/page.html", "flexrec/experiment/report/page.html"} <= set(names)
    assert sum(name.startswith("flexrec/_core.") and name.endswith((".so", ".pyd")) for name in names) == 1
    packages = {name.split("/")[0] for name in names}
    assert packages == {"flexrec", next(p for p in packages if p.endswith(".dist-info"))}


def test_wheel_works_outside_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import flexrec, flexrec.triton_kernels, flexrec.rankings as rankings
from flexrec import _core
for module in (flexrec, flexrec.triton_kernels, rankings, _core):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
state = rankings.RankingState([[[1, 2], [1, 3]]], separator=[9])
state.advance(*state.forced())
state.advance([3])
state.advance(*state.forced())
print(state.done().all(), state.rankings().tolist())
"""
    # A script in another folder is what a user has.
    program = tmp_path / "program.py"
    program.write_text(script)
    assert run([sys.executable, str(program), str(site)], cwd=tmp_path) == "True [[1, 0]]"


def test_name_of_tritons_package_stays_free(tmp_path: Path) -> None:
    """Nothing of ours answers to `import triton_kernels`; Triton's own package, if installed, may."""
    script = (
        "import importlib.util as u; print(getattr(u.find_spec('triton_kernels'), 'submodule_search_locations', 0))"
    )
    assert str(ROOT / "triton_kernels") not in run([sys.executable, "-c", script], cwd=tmp_path)
    assert run([sys.executable, "-c", "import flexrec.triton_kernels as t; print(t.__name__)"], cwd=tmp_path)


def failing_build(source: Path, program: str, **environment: str) -> str:
    """What setup.py says when it is run by `program` in a tree that was never built."""
    shutil.rmtree(source / "build", ignore_errors=True)
    result = subprocess.run(
        [sys.executable, "-c", f"import runpy, sys; sys.argv = ['setup.py', '-q', 'build_ext']; {program}"],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    return result.stderr


@pytest.mark.parametrize(("package", "tool"), [("cmake", "cmake"), ("ninja", "ninja"), ("pybind11", "pybind11")])
def test_a_missing_tool_is_named(source: Path, package: str, tool: str) -> None:
    """Neither installed as a package nor on PATH."""
    program = f"sys.modules[{package!r}] = None; runpy.run_path('setup.py', run_name='__main__')"
    message = f"flexrec needs {tool} to build its C++ extension: run `pip install {tool}` and try again."
    assert message in failing_build(source, program, PATH="")


def test_a_missing_compiler_is_named(source: Path) -> None:
    said = failing_build(source, "runpy.run_path('setup.py', run_name='__main__')", CXX="no-such-compiler")
    assert "Is a C++17 compiler installed" in said
