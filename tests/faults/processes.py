"""The command in processes of its own, in a small world, and ways to disturb it.

The processes are forked from one that has loaded everything, so that a run takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOADED = ["flexrec.cli", "flexrec.experiment.stages", "flexrec.evaluation.summary", "flexrec.serving.ranker", "peft"]
LOADED += ["flexrec.numba_kernels.ranking_logprobs", "flexrec.numba_kernels.swap_rewards", __name__]
WORLD = {"num_users": 24, "num_items": 70, "num_topics": 4, "num_test_users": 4, "num_candidates": 6}
WORLD["lists_per_user"] = 1
FILE_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")  # and open, to write


@dataclass(frozen=True)
class Outcome:
    """How a command ended; seconds of CPU and events of files are those of one that was not disturbed."""

    code: int  # negative: the signal that ended it
    said: str  # on both streams
    seconds: float
    file_events: int


@dataclass(frozen=True)
class KillAfter:
    """Ended after so many seconds of CPU, wherever it is: by a signal that nothing in it handles, as SIGKILL."""

    seconds: float

    def __call__(self) -> None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)


@dataclass(frozen=True)
class KillAtFile:
    """SIGKILL when it is about to open a file to write, to rename or remove one .., for the n-th time."""

    number: int

    def __call__(self) -> None:
        def count(number: int) -> None:
            if number == self.number:
                os.kill(os.getpid(), signal.SIGKILL)

        on_file_events(count)


@dataclass(frozen=True)
class InterruptTwice:
    """Ctrl-C after so many seconds of CPU, and another one while the first is dealt with."""

    seconds: float
    again: float

    def __call__(self) -> None:
        left = [self.again, 0.0]  # a timer of 0 is off

        def interrupt(number: int, frame: Any) -> None:
            if left:
                signal.setitimer(signal.ITIMER_PROF, left.pop(0))
                signal.raise_signal(signal.SIGINT)

        signal.signal(signal.SIGPROF, interrupt)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)


def on_file_events(listener: Callable[[int], None]) -> None:
    """Have ``listener`` called with 1, 2, .. before every change of a file that Python makes in this process."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or event in FILE_EVENTS:
            count += 1
            listener(count)

    sys.addaudithook(hook)


def command(arguments: list[str], log: Path, disturb: Callable[[], None] | None = None) -> Outcome:
    """``flexrec`` with these arguments; TimeoutError where it hangs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(arguments, log, disturb, send))
    process.start()
    send.close()
    process.join(600)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"flexrec {' '.join(arguments)} hangs: {log.read_text()}")
    spent = receive.recv() if receive.poll() and disturb is None else (0.0, 0)
    return Outcome(process.exitcode or 0, log.read_text(), *spent)


def _run(arguments: list[str], log: Path, disturb: Callable[[], None] | None, account: Any) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from flexrec import cli
    from flexrec.data import simulate
    from flexrec.experiment import stages

    stages.simulate = lambda **options: simulate(**{**options, **WORLD})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a server of processes ignores it
    begin, events = time.process_time(), [0]
    (disturb or (lambda: on_file_events(lambda number: events.__setitem__(0, number))))()
    code = cli.main(arguments)
    sys.stdout.flush()
    account.send((time.process_time() - begin, events[0]))
    os._exit(code)
