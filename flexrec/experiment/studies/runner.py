"""Executes the runs of studies that are not done yet, a process of one thread for each job."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from flexrec.experiment.studies.design import Run, in_groups
from flexrec.experiment.studies.store import Store

LOG = "log.txt"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """A study's runs that are to be executed, and where what comes of them goes."""

    runs: Sequence[Run]
    store: Store
    folder: Path


def execute(
    todo: Sequence[Job], data: Mapping[str, str], *, jobs: int = 1, say: Callable[[str], None] = print
) -> dict[str, str]:
    """Execute the runs; returns what went wrong by "study: run".

    Args:
        data: data set -> folder.
        jobs: how many at a time.
        say: told of each run that is done, and how long the others will take.

    Raises:
        KeyboardInterrupt: with everything that was done kept.
    """
    return _Runner(todo, data, say).run(jobs)


class _Runner:
    def __init__(self, todo: Sequence[Job], data: Mapping[str, str], say: Callable[[str], None]) -> None:
        self.data, self.say = data, say
        self.groups: queue.Queue[tuple[Job, list[Run]]] = queue.Queue()
        for job in todo:
            for group in in_groups(job.runs):
                self.groups.put((job, group))
        self.lock = threading.Lock()
        self.progress = _Progress(todo)
        self.failed: dict[str, str] = {}
        self.workers: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def run(self, jobs: int) -> dict[str, str]:
        self.progress.jobs = jobs = max(1, min(jobs, self.groups.qsize()))
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        finally:
            with self.lock:
                self.stopped = True
                for worker in self.workers:
                    worker.kill()
                    worker.wait()
        return self.failed

    def _work(self) -> None:
        worker: subprocess.Popen[str] | None = None
        while True:
            try:
                job, group = self.groups.get_nowait()
            except queue.Empty:
                break
            with (job.folder / LOG).open("a") as log:
                rest = group
                while rest and not self.stopped:
                    if worker is None:
                        worker = self._start(log)
                    rest = self._send(worker, job, rest)
                    if worker.poll() is not None:
                        self.workers.discard(worker)
                        worker = None
            if worker is not None and not self.groups.empty():
                continue  # its log stays that of the first study, which is where it says what it prints
        if worker is not None:
            worker.kill()
            worker.wait()

    def _start(self, log: TextIO) -> subprocess.Popen[str]:
        environment = {**os.environ, **dict.fromkeys(_THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"}
        with self.lock:
            if self.stopped:
                raise SystemExit
            worker = subprocess.Popen(
                [sys.executable, "-m", "flexrec.experiment.studies.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
            self.workers.add(worker)
        return worker

    def _send(self, worker: subprocess.Popen[str], job: Job, group: list[Run]) -> list[Run]:
        """Have a group executed; returns what is left of it where the process has ended before the last run."""
        assert worker.stdin is not None
        assert worker.stdout is not None
        data = self.data.get(group[0].dataset)
        message = {"runs": [asdict(run) for run in group], "data": data, "folder": str(job.folder)}
        left = {run.name: run for run in group}
        try:
            worker.stdin.write(json.dumps(message) + "\n")
            worker.stdin.flush()
            for line in worker.stdout:
                told = json.loads(line)
                if told["run"] is None:
                    return []
                self._done(job, left.pop(told["run"]), told["line"], told["error"])
        except (BrokenPipeError, ValueError):
            pass
        code = worker.wait()
        if self.stopped or not left:
            return []
        first, *others = left.values()  # runs of a group are executed in their order
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._done(job, first, None, f"its process ended with {ended}, see {job.folder / LOG}")
        return others

    def _done(self, job: Job, run: Run, line: dict[str, Any] | None, error: str | None) -> None:
        with self.lock:
            if line is None:
                job.store.fail(run, str(error))
                self.failed[f"{run.study}: {run.name}"] = str(error)
                self.say(f"{self.progress.after(run, None)} {run.study}: {run.name} failed: {error}")
                return
            job.store.add(run, line)
            self.say(f"{self.progress.after(run, line['seconds'])} {run.study}: {run.name}: {_headline(line)}")


def _headline(line: Mapping[str, Any]) -> str:
    """A figure of the trained model, or the last one, and how long it took."""
    trained = [result for result in line["results"] if result.get("ranker") == "trained"] or line["results"][-1:]
    return "".join(f"{one['metric']} {one['mean']:.4g}, " for one in trained[:1]) + f"{line['seconds']:.0f} s"


class _Progress:
    """Counts runs, and guesses the time of those to come by the mean of those like them."""

    def __init__(self, todo: Sequence[Job]) -> None:
        self.jobs = 1
        self.left: dict[str, int] = {}
        self.seconds: dict[str, list[float]] = {}
        for job in todo:
            for run in job.runs:
                self.left[_like(run.labels)] = self.left.get(_like(run.labels), 0) + 1
            for line in job.store.lines:
                self.seconds.setdefault(_like(line["labels"]), []).append(line.get("seconds", 0.0))
        self.total = sum(self.left.values())

    def after(self, run: Run, seconds: float | None) -> str:
        """[done/total, time left] after a run that took ``seconds``, or failed."""
        self.left[_like(run.labels)] -= 1
        if seconds is not None:
            self.seconds.setdefault(_like(run.labels), []).append(seconds)
        known = [s for of_like in self.seconds.values() for s in of_like]
        typical = sum(known) / len(known) if known else 0.0
        left = 0.0
        for like, count in self.left.items():
            of_like = self.seconds.get(like, [])
            left += count * (sum(of_like) / len(of_like) if of_like else typical)
        done = self.total - sum(self.left.values())
        return f"[{done}/{self.total}, {_duration(left / self.jobs)} left]"


def _like(labels: Mapping[str, str]) -> str:
    """Runs of a part on a data set take about as long as each other."""
    return f"{labels.get('part', '')}/{labels.get('dataset', '')}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
