"""Needs of one's own, written in a file without Python:

    - name: cheap but good
      wordings:
        - Show me what I will like and can afford.
        - The best for little money, please.
      gain: interest * exp(-price / 20)
      phrase: what costs little

``gain`` is an expression (:mod:`flexrec.task.expressions`); ``phrase``, which may be left out, is what the need is
called in the wordings of mixtures. A run keeps what it was trained with, so that the file is not asked for again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexrec.checks import did_you_mean
from flexrec.data.columns import read_yaml
from flexrec.data.lists import Catalogue
from flexrec.task.expressions import Expression
from flexrec.task.mixtures import parts_of
from flexrec.task.needs import NEEDS, Need

_FIELDS = ("name", "wordings", "gain", "phrase")
_NAME = re.compile(r"[^\W\d_][\w -]*")  # no plus and no number in front, which mixtures are known by
_MAX_NAME, _MAX_WORDING, _MAX_NEEDS = 40, 1000, 100


def read_needs(path: str | Path) -> list[Need]:
    """The needs of a YAML file: a list of them, or such a list under ``needs``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no YAML, or something in it is not as it should be: file, need, field, what was got and what
            was expected, and of an expression the place in it.

    Example:
        >>> from pathlib import Path
        >>> from flexrec.task import read_needs
        >>> lines = "- name: free", "  wordings: It must not cost anything.", "  gain: interest if price == 0 else 0"
        >>> _ = Path("needs.yaml").write_text(chr(10).join(lines))
        >>> [need.name for need in read_needs("needs.yaml")]
        ['free']
    """
    found = read_yaml(Path(path), "needs")
    try:
        return make_needs(found.get("needs") if isinstance(found, Mapping) else found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_needs(definitions: Any) -> list[Need]:
    """The needs that definitions, mappings with ``name``, ``wordings`` and ``gain``, describe."""
    if not isinstance(definitions, Sequence) or isinstance(definitions, str) or not definitions:
        raise ValueError(f"expected a list of needs, each with {', '.join(_FIELDS[:3])}; got {_shown(definitions)}")
    if len(definitions) > _MAX_NEEDS:
        raise ValueError(f"expected at most {_MAX_NEEDS} needs, got {len(definitions)}")
    needs = {**NEEDS}
    owners = {wording: need.name for need in NEEDS.values() for wording in need.wordings}
    for number, definition in enumerate(definitions, start=1):
        need = _need(definition, number)
        if need.name in needs:
            which = "one of FlexRec's own" if need.name in NEEDS else "defined twice"
            raise ValueError(f"need {need.name!r} is {which}: give it another name")
        for wording in need.wordings:
            other = owners.setdefault(wording, need.name)
            if other != need.name:
                raise ValueError(f"need {need.name!r} has a wording of {other!r}, {_shown(wording)}: say it otherwise")
        needs[need.name] = need
    return [need for name, need in needs.items() if name not in NEEDS]


def definitions_of(needs: Sequence[Need]) -> list[dict[str, Any]]:
    """What a run keeps of needs that were written as expressions, so that :func:`make_needs` makes them again."""
    return [
        {"name": need.name, "wordings": list(need.wordings), "gain": gains.text, "phrase": need.phrase}
        for need, gains in written(needs)
    ]


def written(needs: Sequence[Need]) -> list[tuple[Need, Expression]]:
    """The needs, and parts of mixtures, that are written as expressions, each once, and these."""
    parts = {part.name: part for need in needs for part in parts_of(need)}
    return [(part, part.gains) for part in parts.values() if isinstance(part.gains, Expression)]


def columns_of(need: Need) -> tuple[str, ...]:
    """The columns of the items that a need is about."""
    return tuple(dict.fromkeys(name for _, expression in written([need]) for name in expression.columns))


def asks_of_data(need: Need) -> tuple[str, ...]:
    """Names of the needs that data must be able to answer for this one: its parts, and those whose numbers it reads."""
    named: list[str] = []
    for part in parts_of(need):
        read = part.gains.names if isinstance(part.gains, Expression) else ()
        named += [part.name, *(name for name, of in (("trend", "trend"), ("explore", "novelty")) if of in read)]
    return tuple(dict.fromkeys(named))


def check_needs(needs: Sequence[Need], catalogue: Catalogue) -> list[str]:
    """What is worth saying of needs that are written as expressions, in sentences.

    Raises:
        ValueError: one names what these items do not have, or is no gain for one of them.
    """
    notes: dict[str, None] = {}
    for need, expression in written(needs):
        name = need.name
        try:
            expression.check(catalogue)
        except ValueError as error:
            raise ValueError(f"need {name!r}: gain: {error}") from None
        lacking = int(expression.lacking(np.arange(len(catalogue)), catalogue).sum())
        if lacking:
            columns = " or ".join(expression.needed)
            notes[f"need {name!r}: {lacking} of {len(catalogue)} items have nothing in {columns}: their gain is 0"] = (
                None
            )
        if expression.form in ("constant", "zero"):
            notes[f"need {name!r}: its gain does not mention interest: what the user likes does not count"] = None
        elif expression.form == "other":
            notes[
                f"need {name!r}: its gain is not interest times a factor: its variance is that of the first order, and "
                f"it cannot be mixed with others"
            ] = None
    return list(notes)


def _need(definition: Any, number: int) -> Need:
    if not isinstance(definition, Mapping):
        raise ValueError(f"need {number} must have {', '.join(_FIELDS[:3])}; got {_shown(definition)}")
    which = f"need {_shown(definition.get('name', number))}"
    for field in definition:
        if field not in _FIELDS:
            raise ValueError(
                f"{which}: unknown field {field!r}{did_you_mean(str(field), _FIELDS)}; known are {', '.join(_FIELDS)}"
            )
    name = definition.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name != name.strip() or len(name) > _MAX_NAME:
        raise ValueError(
            f"{which}: name must be a text of at most {_MAX_NAME} letters, digits, blanks, - and _ that begins with a "
            f"letter; got {_shown(name)}"
        )
    wordings = definition.get("wordings")
    wordings = [wordings] if isinstance(wordings, str) else wordings
    if not isinstance(wordings, list) or not wordings or not all(_is_text(one, _MAX_WORDING) for one in wordings):
        raise ValueError(
            f"{which}: wordings must be a list of texts, one or more, of at most {_MAX_WORDING} characters; got "
            f"{_shown(definition.get('wordings'))}"
        )
    gain, phrase = definition.get("gain"), definition.get("phrase") or ""
    if not isinstance(gain, str) or not gain.strip():
        raise ValueError(
            f"{which}: gain must be an expression, a text such as 'interest * (price < 20)'; got {_shown(gain)}"
        )
    if not isinstance(phrase, str):
        raise ValueError(f"{which}: phrase must be a text; got {_shown(phrase)}")
    try:
        expression = Expression(gain)
    except ValueError as error:
        raise ValueError(f"{which}: gain: {error}") from None
    return Need(name, tuple(dict.fromkeys(" ".join(one.split()) for one in wordings)), expression, phrase)


def _is_text(value: Any, longest: int) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value) <= longest


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
