"""A process that executes runs: groups come in by standard input, what came of each run goes out by standard output.

Everything else that is printed goes into the log of the study. Where standard input ends, so does the process: it
outlives nobody.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from queue import Queue
from typing import Any, Protocol

from flexrec.experiment.studies.design import Run, Setting

# kind -> module:class; a kind that is not here says its own
KINDS = {
    "experiment": "flexrec.experiment.studies.experiments:Experiments",
    "transfer": "flexrec.experiment.studies.transfer:Transfers",
    "reinforcement": "flexrec.experiment.studies.reinforcement:Reinforcements",
    "critic": "flexrec.experiment.studies.critics:Critics",
    "estimator": "flexrec.experiment.studies.estimators:Estimators",
}


class Kind(Protocol):
    """Executes runs of a group: made once for its setting, then called for each run with the run's name and options.

    Returns ``results`` and, where there was training, ``steps`` and ``rollouts``.
    """

    def __call__(self, name: str, options: dict[str, Any]) -> dict[str, Any]: ...


def make(run: Run, data: str | None, folder: Path) -> Kind:
    module, _, name = KINDS.get(run.kind, run.kind).partition(":")
    kind = getattr(importlib.import_module(module), name)
    setting = Setting(run.dataset, data, run.seed, dict(run.start), folder)
    made: Kind = kind(setting)
    return made


def execute(runs: list[Run], data: str | None, folder: Path, tell: Any) -> None:
    """Run a group; ``tell(name, line, error)`` takes what came of each, with one of the two last."""
    before = time.process_time()
    try:
        kind = make(runs[0], data, folder)
    except Exception as error:
        for run in runs:
            tell(run.name, None, _said(error))
        return
    of_start = time.process_time() - before
    for run in runs:
        before, begun = time.process_time(), time.monotonic()
        try:
            line = kind(run.name, dict(run.options))
        except Exception as error:
            tell(run.name, None, _said(error))
            continue
        cost = {
            "cpu_seconds": [round(of_start, 1), round(time.process_time() - before, 1)],
            "seconds": round(time.monotonic() - begun + of_start / len(runs), 1),
        }
        tell(run.name, {"steps": 0, "rollouts": 0, **cost, **line}, None)


def _said(error: Exception) -> str:
    traceback.print_exc()
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; the log takes it
    groups: Queue[str] = Queue()

    def read() -> None:
        for line in sys.stdin:
            groups.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    import torch

    torch.set_num_threads(1)

    def tell(name: str, line: dict[str, Any] | None, error: str | None) -> None:
        out.write(json.dumps({"run": name, "line": line, "error": error}) + "\n")
        out.flush()

    while True:
        message = json.loads(groups.get())
        execute([Run(**run) for run in message["runs"]], message["data"], Path(message["folder"]), tell)
        out.write(json.dumps({"run": None}) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
