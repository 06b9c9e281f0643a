"""Small faults, kept as data: each is a change that some test must notice.

A fault is a table in one of this folder's TOML files, which are named after the rooms of the house::

    [[mutant]]
    name = "sampling-temperature-dropped"
    file = "flexrec/trainer/flexrec.py"
    before = '''temperature=self.args.temperature,'''
    after = '''temperature=1.0,'''
    tests = ["tests/trainer/test_options.py::test_rollouts_are_sampled_as_asked"]

``before`` stands exactly once in the file. ``equivalent = "why"`` marks a fault that no test can notice.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Mutant:
    """One fault: ``before`` becomes ``after`` in ``file``, and at least one of ``tests`` fails."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def __post_init__(self) -> None:
        if not self.tests:
            raise ValueError(f"mutant {self.name}: names no test")
        if self.before == self.after:
            raise ValueError(f"mutant {self.name}: before and after are the same")

    def applied_to(self, source: str) -> str:
        """The source with the fault; a ValueError where it does not apply."""
        count = source.count(self.before)
        if count != 1:
            raise ValueError(f"mutant {self.name}: its text stands {count} times in {self.file}, not once")
        return source.replace(self.before, self.after)


def load_mutants(folder: Path = HERE) -> list[Mutant]:
    """All mutants of the folder's files, whose names are unique."""
    mutants: dict[str, Mutant] = {}
    for path in sorted(folder.glob("*.toml")):
        for table in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
            mutant = Mutant(**{**table, "tests": tuple(table["tests"])})
            if mutant.name in mutants:
                raise ValueError(f"two mutants are named {mutant.name}")
            mutants[mutant.name] = mutant
    return list(mutants.values())
