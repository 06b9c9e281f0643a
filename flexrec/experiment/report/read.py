"""What a report is made of: everything that a run's folder holds, however old or unfinished the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from flexrec.experiment.files import read_json
from flexrec.experiment.results import Results
from flexrec.experiment.run_folder import REINFORCEMENT


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it; what the folder lacks is empty."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)  # report.json
    log: list[dict[str, Any]] = field(default_factory=list)
    results: Results | None = None

    @classmethod
    def read(cls, folder: Path, metrics: Mapping[str, Any] | None = None) -> Record:
        """The run of a folder; ``metrics`` are those of a run that is about to write them.

        Raises:
        FileNotFoundError: no folder of a run.
        ValueError: a file that is damaged.
        """
        known = ("metrics.json", "log.jsonl", "experiment.json")
        if not any((folder / name).is_file() for name in known):
            raise FileNotFoundError(f"{folder} is not the folder of a run: it has none of {', '.join(known)}")
        config, data, written, shown = (
            read_json(folder / name) if (folder / name).is_file() else {}
            for name in ("experiment.json", "data.json", "metrics.json", "report.json")
        )
        metrics = dict(written if metrics is None else metrics)
        stated = metrics.get("config", {})
        return cls(
            name=folder.resolve().name,
            config={**config, **(stated if isinstance(stated, dict) else {})},
            data=data,
            metrics=metrics,
            shown=shown,
            log=_lines(folder / "log.jsonl"),
            results=_results(folder / "per_list.npz", metrics),
        )

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The log of the steps of reinforcement."""
        return [line for line in self.log if line["stage"] == REINFORCEMENT and "loss" in line]

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        """The evaluations of the trained model on its way, and of the base where training began."""
        stages = ("format", "listwise warm-up", REINFORCEMENT)
        found = [line for line in self.log if line["stage"] == "evaluation" and line.get("of") in stages]
        return sorted(found, key=lambda line: line["steps"])

    @property
    def needs(self) -> list[str]:
        if self.results is not None:
            return list(next(iter(self.results.per_list.values())))
        return list(self.points[0]["means"]) if self.points else []

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of what the log of reinforcement calls so; numbers that were not finite are left out."""
        found = [(line["step"], line[name]) for line in self.steps if line.get(name) is not None]
        return [step for step, _ in found], [float(value) for _, value in found]

    def named(self, prefix: str) -> list[str]:
        """What the log of reinforcement knows whose name begins so, without the prefix, in the log's order."""
        names: Iterable[str] = dict.fromkeys(name for line in self.steps for name in line)
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _lines(path: Path) -> list[dict[str, Any]]:
    """A log up to the line in which a run was killed, if it was."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if isinstance(entry, dict) and {"stage", "step", "steps"} <= set(entry):
            found.append(entry)
    return found


def _results(path: Path, metrics: dict[str, Any]) -> Results | None:
    """Every value of every test list, as ``RunFolder.write_results`` wrote them."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as saved:
            results = Results(saved["users"], seconds=metrics.get("seconds", {}), critic=metrics.get("critic", {}))
            for name in saved.files:
                if name != "users" and not name.startswith(("new items/", "unseen wordings/")):
                    system, _, rest = name.partition("/")
                    need, _, metric = rest.rpartition("/")
                    results.per_list.setdefault(system, {}).setdefault(need, {})[metric] = saved[name]
    except (OSError, ValueError, KeyError, BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return results if results.per_list else None
