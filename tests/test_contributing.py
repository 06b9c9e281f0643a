"""CONTRIBUTING.md is followed to the letter: its examples run as they stand, its files are written and tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL))


def blocks_of(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def file_of(block: str) -> str | None:
    """The file that the block is, if it begins with one's name."""
    found = re.match(r"# (\S+\.py)\n", block)
    return found[1] if found else None


EXAMPLES = {title: [block for block in blocks_of(text) if file_of(block) is None] for title, text in SECTIONS.items()}
FILES = {path: block for block in blocks_of(TEXT) if (path := file_of(block))}


@pytest.mark.parametrize("title", [title for title, blocks in EXAMPLES.items() if blocks])
def test_examples_run(title: str) -> None:
    names: dict[str, object] = {"__name__": "contributing"}
    for block in EXAMPLES[title]:
        exec(compile(block, f"CONTRIBUTING.md, {title}", "exec"), names)


def test_every_kind_has_an_example() -> None:
    assert list(SECTIONS) == [
        f".. {kind}"
        for kind in ("a metric", "a need", "a credit", "a kernel", "a data set", "a study", "an integration")
    ]
    assert all(blocks_of(text) for text in SECTIONS.values())


def test_the_files_of_a_kernel_pass_their_test(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "flexrec", tmp_path / "flexrec", ignore=shutil.ignore_patterns("triton_kernels", "__pycache__")
    )
    shutil.copytree(ROOT / "triton_kernels", tmp_path / "triton_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "flexrec" / "triton_kernels").symlink_to("../triton_kernels")  # an install maps it
    for name, block in FILES.items():
        assert not (ROOT / name).exists(), f"CONTRIBUTING.md would overwrite {name}"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(block, encoding="utf-8")
    tests = [name for name in FILES if name.startswith("tests/")]
    assert tests
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1", "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "9 passed" in result.stdout


def test_the_picture_has_every_room() -> None:
    picture = re.split(r"^```\n", TEXT.partition("one picture")[2], flags=re.MULTILINE)[1]
    rooms = set(re.findall(r"\b(\w+)(?:/|\.py)", picture))
    there = {path.stem for path in (ROOT / "flexrec").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert there - {"__init__", "__pycache__"} <= rooms
