"""What a study is made of: runs as products of axes, and the tables that compare them. Nothing here runs anything.

A study is data (:mod:`flexrec.experiment.studies.catalogue`): parts, each the product of data sets, seeds and the
levels of its axes, and tables, each of which puts one label of the results into rows and others into columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

Options: TypeAlias = Mapping[str, Any]
ANY_LEVEL = "*"
NO_DATA = ("simulated", "none")  # data sets that need no folder
_OF_DATA = "data."  # options of the data set's loader are called so, among the others


@dataclass(frozen=True)
class Run:
    """One run: what it is called, and all that decides what comes of it.

    Attributes:
        kind: who executes it: a name of ``flexrec.experiment.studies.worker.KINDS``, or MODULE:CLASS.
        labels: its part, where a study has several, its data set, and its level of every axis.
        start: options of what runs with the same start share, such as a world, a critic and a model.
        options: those of the run itself.
    """

    study: str
    kind: str
    dataset: str
    seed: int
    labels: Mapping[str, str]
    start: Options
    options: Options

    @property
    def name(self) -> str:
        return "/".join([*self.labels.values(), f"seed{self.seed}"])

    @property
    def group(self) -> str:
        """Runs of one group have the same start."""
        return json.dumps([self.kind, self.dataset, self.seed, self.start], sort_keys=True)

    @property
    def made_with(self) -> str:
        """Tells results of these options from those of others."""
        options = json.dumps([self.kind, self.start, self.options], sort_keys=True)
        return hashlib.sha256(options.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Setting:
    """What the runs of a group share.

    Attributes:
        data: the folder of the data set, None for simulated data.
        folder: of the study; a run that writes files has a folder of its own in it.
    """

    dataset: str
    data: str | None
    seed: int
    start: dict[str, Any]
    folder: Path


def split_options(options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the data set's loader, and all others.

    Example:
        >>> from flexrec.experiment.studies.design import split_options
        >>> split_options({"data.history_length": 5, "steps": 2})
        ({'history_length': 5}, {'steps': 2})
    """
    of_data = {name.removeprefix(_OF_DATA): value for name, value in options.items() if name.startswith(_OF_DATA)}
    return of_data, {name: value for name, value in options.items() if not name.startswith(_OF_DATA)}


@dataclass(frozen=True)
class Part:
    """Runs of one kind: every data set, seed and combination of levels.

    Attributes:
        axes: axis -> level -> the options that it sets.
        shared: the axes whose options are those of the start.
        start, options: what all of its runs have.
        of_dataset: options of the start by data set.
        without: combinations of labels that make no sense; ``ANY_LEVEL`` stands for all levels.
        seeds: how many, unless the command line says it.
        short_axes, short_start, short_options: what is different with ``--short``, which takes data that need no
            folder, one seed, and of every axis the first two levels unless said here.
    """

    kind: str
    name: str = ""
    datasets: tuple[str, ...] = ("simulated",)
    axes: Mapping[str, Mapping[str, Options]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    start: Options = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    of_dataset: Mapping[str, Options] = field(default_factory=dict)
    without: tuple[Mapping[str, str | tuple[str, ...]], ...] = ()
    seeds: int = 5
    short_axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    short_start: Options = field(default_factory=dict)
    short_options: Options = field(default_factory=dict)

    def runs(self, study: str, seeds: int | None = None, short: bool = False) -> list[Run]:
        datasets = [name for name in self.datasets if name in NO_DATA] if short else self.datasets
        levels = {
            axis: [name for name in of_axis if not short or name in self.short_axes.get(axis, list(of_axis)[:2])]
            for axis, of_axis in self.axes.items()
        }
        found = []
        for seed in range(1 if short else seeds or self.seeds):
            for dataset, *chosen in product(datasets, *levels.values()):
                labels = {"dataset": dataset, **dict(zip(levels, chosen, strict=True))}
                if any(_matches(labels, left_out) for left_out in self.without):
                    continue
                start = {**self.start, **self.of_dataset.get(dataset, {}), **(self.short_start if short else {})}
                options = {**self.options, **(self.short_options if short else {})}
                for axis, level in zip(levels, chosen, strict=True):
                    (start if axis in self.shared else options).update(self.axes[axis][level])
                part = {"part": self.name} if self.name else {}
                found.append(Run(study, self.kind, dataset, seed, {**part, **labels}, start, options))
        return found


def _matches(labels: Mapping[str, str], pattern: Mapping[str, str | tuple[str, ...]]) -> bool:
    def fits(level: str, wanted: str | tuple[str, ...]) -> bool:
        return wanted == ANY_LEVEL or level == wanted or (isinstance(wanted, tuple) and level in wanted)

    return all(name in labels and fits(labels[name], wanted) for name, wanted in pattern.items())


@dataclass(frozen=True)
class Table:
    """What is compared with what, by one metric. p-values are adjusted over the whole table (Holm 1979).

    Attributes:
        rows: the label whose levels are compared; ``base`` is the one that all others are compared with.
        columns: labels that divide the table; what no table names is averaged over (seeds), or an error.
        turned: the differences are base minus row, as is said of a trained model and its baselines.
        where: only results with these labels.
        digits: of means and differences, as they are shown.
        only_means: nothing is compared: the units of the results are no sample.
    """

    name: str
    title: str
    rows: str
    columns: tuple[str, ...]
    metric: str
    base: str = ""
    turned: bool = False
    where: Mapping[str, str] = field(default_factory=dict)
    digits: int = 3
    only_means: bool = False


@dataclass(frozen=True)
class Study:
    """A question, the runs that answer it, and the tables of the answer."""

    name: str
    title: str
    asks: str
    parts: tuple[Part, ...]
    tables: tuple[Table, ...]

    def runs(self, seeds: int | None = None, short: bool = False) -> list[Run]:
        """All runs, those of the first seed first, so that what is there at any time is of all conditions.

        Raises:
            ValueError: two runs of one name.
        """
        found = [run for part in self.parts for run in part.runs(self.name, seeds, short)]
        names = [run.name for run in found]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"study {self.name!r} has two runs called {twice[0]!r}: its parts need names")
        return sorted(found, key=lambda run: run.seed)

    def rank(self, level: str) -> int:
        """Where a level stands in its axis; what is no level stands behind all."""
        levels = [name for part in self.parts for axis in (part.datasets, *part.axes.values()) for name in axis]
        return levels.index(level) if level in levels else len(levels)

    def datasets(self) -> list[str]:
        return list(dict.fromkeys(dataset for part in self.parts for dataset in part.datasets))


def in_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs by group, groups in the order of their first run."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.group, []).append(run)
    return list(found.values())
