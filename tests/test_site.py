"""The documentation as a site: it builds without a warning, asks nobody for anything, and knows every option."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from flexrec.cli import build_parser

for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks_of_the_site", ROOT / "docs" / "site" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return target


def words_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_page_is_there_and_asks_nobody(site: Path, hooks: ModuleType) -> None:
    for path in (ROOT / "docs").glob("*.md"):
        assert (site / path.with_suffix(".html").name).is_file()
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not hooks.outside_assets(text), page
        if "source" not in page.parts:
            prose = re.sub(r"<(pre|code|script)\b.*?</\1>", "", text, flags=re.DOTALL)
            assert "|---" not in prose, f"{page}: a table that is none"
            assert not re.search(r"<p>(?:(?!</p>).)*\n- ", prose, flags=re.DOTALL), f"{page}: a list that is none"


def test_links_out_of_the_folder_lead_to_pages(site: Path) -> None:
    shown = words_of(site / "source" / "examples" / "judge.py.html")
    assert "JudgedGains" in shown
    assert 'href="source/examples/judge.py.html"' in (site / "needs.html").read_text(encoding="utf-8")
    assert "The house in one picture" in words_of(site / "contributing.html")
    assert 'href="contributing.html#the-house-in-one-picture"' in (site / "architecture.html").read_text(
        encoding="utf-8"
    )


def test_formulas_are_drawn_by_the_browser(site: Path) -> None:
    page = (site / "concepts.html").read_text(encoding="utf-8")
    assert page.count("<math") > 30
    assert "arithmatex" not in page
    assert "\\frac" not in page


def test_the_command_line_has_every_option(site: Path, hooks: ModuleType) -> None:
    shown = words_of(site / "cli.html")
    names = [name for name, _, _ in hooks.commands_of(build_parser())]
    assert {"train", "evaluate", "rank", "report", "study", "data describe"} <= set(names)
    for name, command, _ in hooks.commands_of(build_parser()):
        section = shown.partition(f"flexrec {name}¶")[2]
        assert section, name
        for action in command._actions:
            for flag in action.option_strings[:1]:
                assert flag in section or flag == "-h", f"{name} {flag}"
    assert "(default: 0.3, of a language model 1)" in shown
    assert "{" not in re.sub(r"examples:.*?\n\n", "", shown.partition("flexrec train¶")[2][:2000])


def test_python_s_reference_has_what_the_fronts_offer(site: Path) -> None:
    import flexrec

    page = (site / "api" / "flexrec.html").read_text(encoding="utf-8")
    for name in flexrec.__all__:
        if not name.startswith("__"):
            assert re.search(rf'id="flexrec[\w.]*\.{name}"', page), name
    shown = words_of(site / "api" / "flexrec.html")
    assert ":class:" not in shown
    assert ">>> flexrec.set_value_checks(True)" in shown


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("text\n- a\n- b", "text\n\n-   a\n-   b"),
        ("1. a\n   - b\n     more\n2. c", "1.  a\n    -   b\n        more\n2.  c"),
        ("- a\n\n  more\n- b\n\ntext", "-   a\n\n    more\n\n-   b\n\ntext"),
        ("```\ntext\n- no item\n```", "```\ntext\n- no item\n```"),
        ("- a\n\n  ```\n  - no item\n  ```\n\ntext", "-   a\n\n    ```\n    - no item\n    ```\n\ntext"),
    ],
)
def test_lists_are_those_of_a_code_host(hooks: ModuleType, written: str, read: str) -> None:
    assert hooks.lists_apart(written) == read


def test_what_would_be_fetched_is_found(hooks: ModuleType) -> None:
    found = hooks.outside_assets(
        '<a href="https://a.org">x</a><script src="https://b.org/x.js"></script><img src="images/c.png">'
        '<link href="//d.org/y.css"><style>@import "https://e.org/z.css"; a { background: url(f.png) }</style>'
    )
    assert sorted(found) == ["//d.org/y.css", "https://b.org/x.js", "https://e.org/z.css"]
