"""Which needs a run has: named, mixed, from a file, kept by an earlier run, or made in Python; and what data make of
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexrec.data.lists import Catalogue, RankingDataset
from flexrec.experiment.run_folder import RunInfo
from flexrec.task.expression_values import find_column
from flexrec.task.mixtures import find_need, told_apart
from flexrec.task.needs import NEEDS, Need
from flexrec.task.own_needs import asks_of_data, check_needs, columns_of, make_needs, read_needs
from flexrec.task.prompts import PromptBuilder


def known_needs(
    file: str | None = None, kept: Sequence[Mapping[str, Any]] = (), made: Sequence[Need] = ()
) -> dict[str, Need]:
    """The needs that can be named, by name.

    Args:
        file: of needs of one's own (``--needs``).
        kept: those that a run was trained with (``RunInfo.own_needs``); the file's count where both have one.
        made: in Python.
    """
    own = [*(make_needs(kept) if kept else ()), *(read_needs(file) if file else ()), *made]
    return {**NEEDS, **{need.name: need for need in own}}


def choose_needs(names: Sequence[str] | None, known: Mapping[str, Need], dataset: RankingDataset) -> list[Need]:
    """The needs of these names, mixtures among them, each once; None: all of one's own, and those of FlexRec's that
    value items and that the data can answer."""
    if names is None:
        answerable = [name for name in NEEDS if name not in dataset.unanswerable and NEEDS[name].metric is None]
        names = [*answerable, *(name for name in known if name not in NEEDS)]
    return _found(names, known)


def _found(names: Sequence[str], known: Mapping[str, Need]) -> list[Need]:
    found = {need.name: need for need in (find_need(name, known) for name in names)}
    return told_apart(list(found.values()))


def renamed(names: Sequence[str], known: Mapping[str, Need]) -> list[str]:
    """Which names of needs were taken as others, in sentences."""
    pairs = ((name.strip(), find_need(name, known).name) for name in names)
    return [f"need {name!r} is {found!r}: weights are made to sum to 1" for name, found in pairs if found != name]


def untrained(needs: Sequence[Need], info: RunInfo) -> list[str]:
    """Which needs a run was not trained on, in sentences."""
    return [
        f"the run was not trained on the need {need.name!r}: it knows {', '.join(info.needs)}"
        for need in needs
        if need.name not in info.needs
    ]


def wordings_of(info: RunInfo, known: Mapping[str, Need]) -> set[str]:
    """The wordings that a run was trained on; none where it has needs that are not known here."""
    try:
        return {wording for need in _found(info.needs, known) for wording in need.wordings}
    except ValueError:  # made in Python
        return set()


def check_answerable(needs: Sequence[Need], dataset: RankingDataset) -> list[str]:
    """What is worth saying of needs on these data, in sentences; a ValueError where the data cannot answer one."""
    dataset.check_needs(name for need in needs for name in asks_of_data(need))
    return check_needs(needs, dataset.catalogue)


def unseen_columns(needs: Sequence[Need], builder: PromptBuilder, catalogue: Catalogue) -> list[str]:
    """Which needs are about columns that prompts do not show, in sentences; marks say it without a prompt."""
    if builder.described:
        return []
    missing = {need.name: [find_column(name, catalogue) or name for name in columns_of(need)] for need in needs}
    return [
        f"need {need!r} is about {' and '.join(hidden)}, which prompts do not show: the model can only guess it from "
        f"what else it knows of an item; --show {','.join([*builder.show, *hidden])} shows it"
        for need, columns in missing.items()
        if (hidden := [name for name in columns if name not in builder.show])
    ]
