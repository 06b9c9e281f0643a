"""What is on the disk of a study: a line for every run that is done, and which failed."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flexrec.experiment.files import read_json, write_bytes, write_json
from flexrec.experiment.studies.design import Run
from flexrec.trainer.callbacks import to_json

RUNS, PACKED, FAILED = "runs.jsonl", "runs.jsonl.xz", "failed.json"


class Store:
    """The results of a study's runs, each written whole or not at all.

    A line of ``runs.jsonl`` is an object: ``run`` (its name), ``labels``, ``seed``, ``made_with``, what it cost
    (``steps`` and ``rollouts`` of training, ``cpu_seconds``: of the start that it shares and of its own), and
    ``results``, each with labels of its own, ``metric``, ``mean`` and, where units are paired, ``units`` with their
    ``values``. :meth:`pack` puts the lines into ``runs.jsonl.xz``, to which those of later runs come as before.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.packed_path, self.failed_path = folder / RUNS, folder / PACKED, folder / FAILED
        self.lines: list[dict[str, Any]] = [*self._unpacked(), *self._read()]
        self.failed: dict[str, str] = read_json(self.failed_path) if self.failed_path.is_file() else {}

    def _unpacked(self) -> list[dict[str, Any]]:
        if not self.packed_path.is_file():
            return []
        try:
            return _parsed(self.packed_path, lzma.decompress(self.packed_path.read_bytes()))
        except lzma.LZMAError as error:
            raise ValueError(f"{self.packed_path} is damaged: {error}") from None

    def _read(self) -> list[dict[str, Any]]:
        """The lines; the last is taken away where it was not written to its end."""
        if not self.path.is_file():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return _parsed(self.path, whole)

    def of(self, runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
        """name -> line of those runs that are done, with the options that they have now."""
        wanted = {run.name: run.made_with for run in runs}
        return {line["run"]: line for line in self.lines if wanted.get(line["run"]) == line["made_with"]}

    def left(self, runs: Iterable[Run], retry: bool = False) -> list[Run]:
        """The runs that are to be executed: those that are not done and have not failed, or with ``retry`` those that
        have."""
        runs = list(runs)
        done = self.of(runs)
        return [run for run in runs if run.name not in done and (run.name in self.failed) == retry]

    def outdated(self, runs: Iterable[Run]) -> int:
        """How many lines are of runs with other options."""
        wanted = {run.name: run.made_with for run in runs}
        return sum(wanted.get(line["run"], line["made_with"]) != line["made_with"] for line in self.lines)

    def add(self, run: Run, line: dict[str, Any]) -> dict[str, Any]:
        """Keep what came of a run."""
        about = {"run": run.name, "labels": dict(run.labels), "seed": run.seed, "made_with": run.made_with}
        whole = {**about, **line}
        with self.path.open("ab") as file:
            file.write((to_json(whole) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(whole)
        if self.failed.pop(run.name, None) is not None:
            write_json(self.failed_path, self.failed, indent=1)
        return whole

    def fail(self, run: Run, reason: str) -> None:
        """Keep why a run came to nothing."""
        self.failed[run.name] = reason
        write_json(self.failed_path, self.failed, indent=1)

    def pack(self) -> None:
        """Keep all lines compressed, in a twentieth of the room, to be passed on."""
        lines = {
            (line["run"], line["made_with"]): line for line in self.lines
        }  # a pack that was killed left some twice
        text = "".join(to_json(line) + "\n" for line in lines.values())
        write_bytes(self.packed_path, lzma.compress(text.encode(), preset=9))
        self.path.unlink(missing_ok=True)


def _parsed(path: Path, text: bytes) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(text.decode("utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            entry["run"], entry["made_with"], entry["results"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({type(error).__name__}: {error}): take it out of the file"
            ) from None
        found.append(entry)
    return found
