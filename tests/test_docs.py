"""Pages say what is there: imports run, files that are named exist, links lead somewhere, the index has every page."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
IMPORT = re.compile(r"^(?:from \S+ )?import (?:\([^)]*\)|.*)$", flags=re.MULTILINE)


def imports_of(page: Path) -> list[str]:
    """Every import in a block of Python, one statement for each."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [statement for block in blocks for statement in IMPORT.findall(block)]


def packages_of(statement: str) -> set[str]:
    (node,) = ast.parse(statement).body
    names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if imports_of(page) and page.name != "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_imports_run(page: Path) -> None:
    """Those of packages that are not installed are left out, by name. CONTRIBUTING.md has a test of its own."""
    for statement in imports_of(page):
        missing = {name for name in packages_of(statement) if importlib.util.find_spec(name) is None}
        assert missing <= {"openai", "openrlhf", "sglang", "trl", "verl", "vllm"}, statement
        if not missing:
            exec(statement, {})


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "flexrec").rglob("*.py"))], ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL) if page.suffix == ".md" else text
    folders = "flexrec|triton_kernels|csrc|tests|docs|bench|examples"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", prose):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
