"""``flexrec study``: executes what is left of studies, and writes what they say."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flexrec.experiment.files import write_json
from flexrec.experiment.run_folder import RunFolder
from flexrec.experiment.studies.design import NO_DATA, Run, Study
from flexrec.experiment.studies.options import StudyOptions
from flexrec.experiment.studies.pages import ABOUT, figures, page
from flexrec.experiment.studies.runner import Job, execute
from flexrec.experiment.studies.store import Store
from flexrec.experiment.studies.tables import (
    COMPARISONS,
    COSTS,
    NUM_SAMPLES,
    VALUES,
    comparison_rows,
    cost_rows,
    results_of,
    to_csv,
    values_rows,
)

SHORT_SAMPLES = 500
_PACKAGES = ("flexrec", "torch", "transformers", "numpy", "numba")


def run_studies(options: StudyOptions, say: Callable[[str], None] = print) -> bool:
    """Execute the runs of studies that are not done yet, and write what is known of each; True if nothing failed.

    What is in a study's folder: ``runs.jsonl``, a line for each run that is done (or ``runs.jsonl.xz``, where they were
    packed); ``failed.json``, what went wrong, and ``log.txt``, what runs printed; ``values.csv``, ``comparisons.csv``
    and ``costs.csv``; ``about.json``; and figures. Beside the folder stands its page. A run that is done is not done
    again, one that failed only with ``retry``.

    Raises:
        FileExistsError: somebody else is at a study's folder.
        ValueError, FileNotFoundError: options, folders or results that cannot be used.
    """
    folders, samples = options.folders(), SHORT_SAMPLES if options.short else NUM_SAMPLES
    with ExitStack() as locks:
        todo, known = [], []
        for study in options.studies():
            folder = Path(options.output) / study.name
            locks.enter_context(RunFolder(folder).locked())
            runs = study.runs(options.seeds, options.short)
            store = Store(folder)
            possible = [run for run in runs if run.dataset in NO_DATA or run.dataset in folders]
            job = Job([] if options.report else store.left(possible, options.retry), store, folder)
            for line in _told(study, runs, folders, job, options.retry):
                say(line)
            todo.append(job)
            known.append((study, runs, job))
        try:
            failed = execute(todo, folders, jobs=options.jobs, say=say)
        finally:
            for study, runs, job in known:
                if lines := list(job.store.of(runs).values()):
                    _write(study, lines, job.folder, _about(study, runs, options, folders, lines), samples)
                    if options.pack:
                        job.store.pack()
                    written = job.folder.with_suffix(".md")
                    say(f"{study.name}: {len(lines)} of {len(runs)} runs are done, {written} says what came of them")
    for name, reason in failed.items():
        say(f"failed: {name}: {reason}")
    if failed:
        say(f"{len(failed)} runs failed; --retry runs these alone, log.txt of the study says what they printed")
    return not failed


def _told(study: Study, runs: Sequence[Run], folders: Mapping[str, str], job: Job, retry: bool) -> list[str]:
    said = [f"{study.name}: {len(job.runs)} of {len(runs)} runs are left"]
    for name in study.datasets():
        count = sum(run.dataset == name for run in runs)
        if name not in NO_DATA and name not in folders and count:
            said.append(f"{study.name}: left out: {name}, {count} runs: no --data {name}=DIR")
    if outdated := job.store.outdated(runs):
        said.append(f"{study.name}: {outdated} results of other options are in {job.store.path}, and do not count")
    if not retry and job.store.failed:
        said.append(f"{study.name}: {len(job.store.failed)} runs failed before and are left alone; --retry runs them")
    return said


def _about(
    study: Study,
    runs: Sequence[Run],
    options: StudyOptions,
    folders: Mapping[str, str],
    lines: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the page says of how the results were made, in terms that are the same on every machine."""
    done = {line["run"] for line in lines}
    used = {run.dataset for run in runs if run.name in done} - set(NO_DATA)
    given = [f"{name}={Path(folders.get(name, name)).name}" for name in study.datasets() if name in used]
    data = f" --data {' '.join(given)}" if given else ""
    short, seeds = " --short" if options.short else "", f" --seeds {options.seeds}" if options.seeds else ""
    left = {name: sum(run.dataset == name and run.name not in done for run in runs) for name in study.datasets()}
    return {
        "command": f"flexrec study {study.name} --output studies{seeds}{short}{data}",
        "machine": f"{processor()}, a thread for each run",
        "versions": {"Python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "not_run": [f"{count} runs of {name}" for name, count in left.items() if count],
        "examples": {line["run"]: line["examples"] for line in lines if "examples" in line and line["seed"] == 0},
    }


def processor() -> str:
    """What the processor is called, where that is known."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _write(
    study: Study, lines: Sequence[Mapping[str, Any]], folder: Path, about: Mapping[str, Any], num_samples: int
) -> None:
    results = results_of(lines)
    (folder / VALUES).write_text(to_csv(values_rows(results)), encoding="utf-8")
    (folder / COSTS).write_text(to_csv(cost_rows(lines)), encoding="utf-8")
    compared = comparison_rows(study, results, num_samples=num_samples)
    (folder / COMPARISONS).write_text(to_csv(compared), encoding="utf-8")
    write_json(folder / ABOUT, about, indent=1)
    for name, svg in figures(study, folder).items():
        (folder / name).write_text(svg, encoding="utf-8")
    folder.with_suffix(".md").write_text(page(study, folder), encoding="utf-8")
