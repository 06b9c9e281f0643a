"""Docstrings as the site reads them: examples as code, and roles of Sphinx as the names that they hold."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


class AsMarkdown(griffe.Extension):
    """What is written for ``help()`` and for doctest, in the words of Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r":(?:class|func|mod|meth):`~?([^`]+)`", r"`\1`", text)
            # What is returned is said in sentences, whose colons are not those behind a type.
            obj.docstring.value = re.sub(r"^Returns:\n((?:(?: .*)?(?:\n|\Z))+)", _in_words, text, flags=re.MULTILINE)


def _in_words(section: re.Match[str]) -> str:
    return f"**Returns:**\n\n{textwrap.dedent(section[1])}"
