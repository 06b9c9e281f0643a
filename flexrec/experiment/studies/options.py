"""What ``flexrec study`` is configured with. Nothing heavy is loaded."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, field
from pathlib import Path

from flexrec.checks import check_options, option
from flexrec.experiment.studies.catalogue import STUDIES
from flexrec.experiment.studies.design import Study

ALL = "all"
DATA_VARIABLE = "FLEXREC_DATA"


@dataclass(kw_only=True)
class StudyOptions:
    """What ``flexrec study`` takes.

    Raises:
        ValueError: an unknown study, a data set that is not of the form NAME=DIR, or a number out of its range.
    """

    names: tuple[str, ...] = field(default=())
    output: str = option(MISSING, "folder for the results, each study's in one of its name", metavar="DIR")
    seeds: int | None = option(None, "of every condition; default: 5", low=1)
    jobs: int = option(1, "processes at a time, of one thread each", low=1, metavar="J")
    short: bool = option(False, "small worlds and few steps, to see that everything works; says nothing of quality")
    retry: bool = option(False, "only the runs that failed")
    report: bool = option(False, "run nothing, write tables and pages of what is done")
    pack: bool = option(False, "keep the results compressed afterwards, to pass them on; the study goes on from them")
    data: tuple[str, ...] = option(
        (),
        f"where data sets are, as in movielens=DIR kuairec=DIR; default: what {DATA_VARIABLE} holds, of the same form; "
        f"what is not given is not run",
        metavar="NAME=DIR",
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in self.names:
            if name not in (*STUDIES, ALL):
                raise ValueError(f"there is no study {name!r}: choose of {', '.join(STUDIES)}, or {ALL}")

    def studies(self) -> list[Study]:
        return [study for name, study in STUDIES.items() if name in self.names or ALL in self.names]

    def folders(self) -> dict[str, str]:
        """data set -> absolute folder."""
        found = {}
        for pair in (*os.environ.get(DATA_VARIABLE, "").split(), *self.data):
            name, sign, folder = pair.partition("=")
            if not sign or not name or not folder:
                raise ValueError(f"--data takes NAME=DIR, as in movielens=ml-latest-small, got {pair!r}")
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"--data {pair}: there is no such folder")
            found[name] = str(Path(folder).absolute())
        return found
