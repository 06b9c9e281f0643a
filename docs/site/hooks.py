"""Pages of the site that nobody writes, and what a code host reads otherwise than the site does.

- The command line's reference is made of its parser, the reference of Python of the fronts (``__init__.pyi``).
- CONTRIBUTING.md and CHANGELOG.md lie outside of docs/. So do examples and sources that pages link to: each gets a
  page with its text.
- Links are written as they lead in the repository, lists as a code host takes them, formulas between dollars.
"""

from __future__ import annotations

import argparse
import ast
import html
import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks.flexrec")

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=(?:#[^)\s]*)?\))")
FENCE = re.compile(r"^ *(```|~~~)")
ITEM = re.compile(r"^( *)([-*]|\d+\.)( +)\S")
WITHOUT_A_FRONT = {
    "flexrec.rankings": ("state", "text", "reasoning"),
    "flexrec.policy": ("batch", "scores", "lora", "small_model", "row_tokens"),
    "flexrec.integrations": ("ranking_reward", "trl", "verl", "openrlhf", "vllm", "vllm_request"),
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".sbatch": "bash", ".md": "markdown"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    made = {site: (ROOT / name).read_text(encoding="utf-8") for name, site in OUTSIDE.items() if site != "index.md"}
    made |= {"cli.md": command_line(), **python_pages()}
    pages = {
        f.src_uri: Path(str(f.abs_src_path)).read_text(encoding="utf-8") for f in files if f.is_documentation_page()
    }
    for uri, text in {**pages, **made}.items():
        for target in LINK.findall(text):
            path = in_repository(uri, target)
            if (ROOT / path).is_file() and site_of(path) == source_page(path):
                made[source_page(path)] = source_text(path)
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    uri = page.file.src_uri
    if uri.startswith(("source/", "api/")) or uri == "cli.md":
        return markdown
    return lists_apart(with_links(markdown, uri))


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML, which browsers draw themselves."""
    content = re.sub(
        r'<div class="arithmatex">\\\[(.*?)\\\]</div>',
        lambda found: convert(html.unescape(found[1]).strip(), display="block"),
        content,
        flags=re.DOTALL,
    )
    return re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>',
        lambda found: convert(html.unescape(found[1]).strip()),
        content,
        flags=re.DOTALL,
    )


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Nothing of a page may be asked for elsewhere; in a strict build a warning is an error."""
    for address in outside_assets(output):
        log.warning("%s takes %s from another host", page.file.src_uri, address)
    return output


def outside_assets(page: str) -> list[str]:
    """What a browser would fetch from other hosts to show a page; links that a reader may follow are none of it."""
    tags = re.findall(r"<(?:script|link|img|iframe|source|video|audio|object|embed|use)\b[^>]*>", page)
    styles = re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)", page)
    return styles + [
        found for tag in tags for found in re.findall(r"\b(?:src|href|data)=\"?((?:https?:)?//[^\"\s>]+)", tag)
    ]


def in_repository(uri: str, target: str) -> str:
    """Where a link of a page leads, from the repository's root."""
    folder = "" if uri in OUTSIDE.values() and uri != "index.md" else posixpath.join("docs", posixpath.dirname(uri))
    return posixpath.normpath(posixpath.join(folder, target))


def source_page(path: str) -> str:
    return f"source/{path}.md"


def site_of(path: str) -> str:
    """The page, or the file, that the site has for a file of the repository."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return source_page(path)


def with_links(text: str, uri: str) -> str:
    """Links as the site has them. A folder has no page: its name alone is left."""

    def changed(found: re.Match[str]) -> str:
        path = in_repository(uri, found[1])
        return posixpath.relpath(site_of(path), posixpath.dirname(uri) or ".")

    def folder_or_link(found: re.Match[str]) -> str:
        return found[1] if (ROOT / in_repository(uri, found[2])).is_dir() else found[0]

    text = outside_of_code(text, lambda part: re.sub(r"\[([^]\n]*)\]\(([^)\s#:]+)\)", folder_or_link, part))
    return outside_of_code(text, lambda part: LINK.sub(changed, part))


def outside_of_code(text: str, change: Any) -> str:
    """``change`` applied to what stands between blocks of code."""
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if n % 2 else change(part) for n, part in enumerate(parts))


def lists_apart(text: str) -> str:
    """Lists with an empty line before them, and four spaces for each level: Python's Markdown sees no others."""
    lines: list[str] = []
    levels: list[tuple[int, int]] = []  # of the items that are open: where they begin, and where their text does
    fenced = False  # within a block of code
    was_text = False  # the last line was of a paragraph outside of lists
    loose = False  # the item that is open has more than one paragraph
    for line in text.split("\n"):
        if not line.strip():
            lines.append("")
            was_text, loose = False, bool(levels)
            continue
        indent = len(line) - len(line.lstrip())
        item = None if fenced else ITEM.match(line)
        if not fenced:
            while levels and indent < levels[-1][1] and not (item is None and lines[-1] and not FENCE.match(line)):
                levels.pop()  # but a lazy line goes on with the item's paragraph
            if item is None and levels and indent < levels[-1][1] and line.lstrip()[0] in "#|":
                levels.clear()
        if item is not None:
            if (was_text or loose) and lines[-1]:
                lines.append("")
            loose = False
            lines.append(" " * (4 * len(levels)) + item[2] + " " * max(1, 4 - len(item[2])) + line[item.end() - 1 :])
            levels.append((indent, item.end() - 1))
        elif levels:
            lines.append(" " * (4 * len(levels)) + line[min(indent, levels[-1][1]) :])
        else:
            lines.append(line)
        if FENCE.match(line):
            fenced = not fenced
        was_text = not levels and item is None
    return "\n".join(lines)


def source_text(path: str) -> str:
    content = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    if path.endswith(".md"):  # read as text; its links are not the site's
        content = content.replace("````", "```")
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n````{language}\n{content}\n````\n"


def command_line() -> str:
    """Every command with its options, as ``--help`` says them."""
    sys.path.insert(0, str(ROOT))
    from flexrec.cli import build_parser

    lines = ["# Command line", "", "Made of what `flexrec COMMAND --help` says.", ""]
    parser = build_parser()
    lines += [f"{parser.description}", "", *options_of(parser)]
    for name, command, summary in commands_of(parser):
        lines += [f"## flexrec {name}", "", cell(summary), "", *options_of(command)]
        if command.epilog:
            lines += ["````text", command.epilog.rstrip(), "````", ""]
    return "\n".join(lines)


def commands_of(parser: argparse.ArgumentParser, before: str = "") -> list[tuple[str, argparse.ArgumentParser, str]]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                within = commands_of(command, f"{before}{name} ")
                found += within or [(f"{before}{name}", command, command.description or "")]
    return found


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    lines: list[str] = []
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if a.help and not isinstance(a, argparse._SubParsersAction)]
        shown = [a for a in shown if a.dest != "help"]
        if not shown:
            continue
        if group.title not in ("options", "positional arguments", "optional arguments"):
            lines += [f"**{group.title}**", ""]
        lines += ["| option | what |", "|---|---|"]
        for action in shown:
            says = formatter._expand_help(action)
            value = "" if action.nargs == 0 else action.metavar or action.dest.rpartition(" ")[2].upper()
            if isinstance(value, tuple):
                value = " ".join(value)
            if action.choices:
                says += f"; one of {', '.join(map(str, action.choices))}"
            if action.nargs == "+":
                value += " .."
            flags = [flag for flag in action.option_strings if not flag.startswith("--no-")] or action.option_strings
            needed = " (required)" if action.required and flags else ""
            lines.append(f"| {code(' '.join([', '.join(flags), value]).strip())}{needed} | {cell(says)} |")
        lines.append("")
    return lines


def code(text: str) -> str:
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def cell(text: str) -> str:
    """Words in a table: nothing of them is Markdown."""
    return re.sub(r"([\\`*_\[\]<>|])", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def python_pages() -> dict[str, str]:
    """A page for each room with what it offers, and one that lists the pages."""
    rooms: dict[str, list[str]] = {}
    for front in sorted((ROOT / "flexrec").rglob("__init__.pyi"), key=lambda path: len(path.parts)):
        room = ".".join(front.parent.relative_to(ROOT).parts)
        rooms[room] = [f"{room}.{name}" for name in offered(front)]
    for room, modules in WITHOUT_A_FRONT.items():
        for module in modules:
            path = ROOT.joinpath(*f"{room}.{module}".split(".")).with_suffix(".py")
            rooms.setdefault(room, []).extend(f"{room}.{module}.{name}" for name in defined(path))
    home: dict[str, str] = {}  # a name is explained on one page, and on others referred to
    for room, names in rooms.items():
        home |= {name: room for name in names if name not in home}
    pages = {}
    for room, names in rooms.items():
        others = [f"[{name.rpartition('.')[2]}]({home[name]}.md#{name})" for name in names if home[name] != room]
        more = [f"And, from there: {', '.join(others)}.", ""] if others else []
        own = [f"::: {name}\n" for name in names if home[name] == room]
        pages[f"api/{room}.md"] = "\n".join([f"# {room}", "", *more, *own])
    table = [
        f"| [{room}]({room}.md) | {', '.join(code(name.rpartition('.')[2]) for name in names)} |"
        for room, names in sorted(rooms.items())
    ]
    return {"api/rooms.md": "\n".join(["# Python", "", "| page | what it has |", "|---|---|", *table, ""]), **pages}


def offered(front: Path) -> list[str]:
    """Where everything lives that a front offers."""
    nodes = ast.parse(front.read_text(encoding="utf-8")).body
    return [f"{n.module}.{alias.name}" for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names]


def defined(path: Path) -> list[str]:
    """The public functions and classes of a file that say what they are."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    found = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node)]
    return [node.name for node in found if not node.name.startswith("_")]
