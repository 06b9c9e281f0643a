"""Where the seconds of training steps go, and how many are left of long work.

Code that does a part of a step says so with :func:`span`, which costs nothing unless somebody listens. Spans nest, and
a part is charged only for what no span inside it is charged for, so that the parts add up to the whole.

Long work says how far it is on standard error: by a bar that knows the time left where that is a terminal, and
otherwise, as in a log file, by a line when it is done, and one every ten minutes until then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from tqdm import tqdm

# In the order of a step. "rewards" are item rewards, uncertainty weights and advantages; "bookkeeping" is what C++ does
# and the laying out of rows; "log-probs and loss" all from the states to the loss.
PARTS = (
    "critic",
    "prefill",
    "decode",
    "bookkeeping",
    "rewards",
    "forward",
    "log-probs and loss",
    "backward",
    "optimizer",
    "other",
)
OUTSIDE = "evaluation"  # happens during training, but in no step

_active: ContextVar[Profile | None] = ContextVar("flexrec_profile", default=None)


class Profile:
    """Seconds by part since it was made. On a GPU every span waits for the device, which slows what it measures."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.steps = 0
        self._open = ["other"]
        self._since = self._now()
        self._last: dict[str, float] = {}

    def enter(self, part: str) -> None:
        self._charge()
        self._open.append(part)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        self._charge()
        found = {part: self.seconds[part] - self._last.get(part, 0.0) for part in PARTS if part in self.seconds}
        self._last = dict(self.seconds)
        return found

    def per_step(self) -> dict[str, float]:
        """Mean seconds of a step by part."""
        self._charge()
        return {part: self.seconds[part] / max(self.steps, 1) for part in PARTS if part in self.seconds}

    def table(self) -> str:
        """Seconds and share of a step by part, as text."""
        found = self.per_step()
        whole = sum(found.values())
        lines = [f"{'part of a step':<20} {'seconds':>9} {'share':>7}"]
        lines += [f"{part:<20} {s:>9.4f} {s / max(whole, 1e-12):>7.1%}" for part, s in found.items()]
        return "\n".join([*lines, f"{'step':<20} {whole:>9.4f} {1:>7.1%}   mean of {self.steps} steps"])

    def _charge(self) -> None:
        now = self._now()
        part = self._open[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def profile_steps() -> Iterator[Profile]:
    """Listen to the spans of the code inside."""
    profile = Profile()
    token = _active.set(profile)
    try:
        yield profile
    finally:
        profile._charge()
        _active.reset(token)


def active_profile() -> Profile | None:
    """Who listens, if anybody does."""
    return _active.get()


@contextmanager
def span(part: str) -> Iterator[None]:
    """Charge the code inside to ``part``, one of PARTS or OUTSIDE."""
    profile = _active.get()
    if profile is None:
        yield
        return
    profile.enter(part)
    try:
        yield
    finally:
        profile.leave()


HEARTBEAT = 600.0  # seconds between lines of a log
Item = TypeVar("Item")


class Progress:
    """How far long work is.

    Args:
        what: it is.
        total: how many units there are of it.
        done: how many of these were done before.
        shown: nothing is said otherwise, as by all processes but one.
        kept: says so when it is done, too.
    """

    def __init__(
        self, what: str, total: int, *, unit: str = "step", done: int = 0, shown: bool = True, kept: bool = True
    ) -> None:
        self.what, self.total, self.unit, self.kept = what, total, unit, kept
        self.done = self._first = done
        self._said, self._started = "", time.perf_counter()
        self._due = self._started + HEARTBEAT
        self._bar = self._log = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, leave=kept, file=sys.stderr)
        elif shown:
            self._log = sys.stderr

    def update(self, done: int, **numbers: float) -> None:
        """So many units are done in all; the latest ``numbers`` stand beside them."""
        self._said = "".join(f", {name} {value:.3f}" for name, value in numbers.items()) or self._said
        if self._bar is not None:
            self._bar.set_postfix({name: round(value, 3) for name, value in numbers.items()}, refresh=False)
            self._bar.update(done - self.done)
        self.done = done
        now = time.perf_counter()
        if self._log is not None and now >= self._due and done < self.total:
            self._due = now + HEARTBEAT
            spent = now - self._started
            left = spent / max(done - self._first, 1) * (self.total - done)
            self._say(f"{done} of {self.total} {self.unit}s in {duration(spent)}, {duration(left)} left")

    def close(self) -> None:
        """It is done."""
        if self._bar is not None:
            self._bar.close()
        if self._log is not None and self.kept:
            self._say(f"{self.done - self._first} {self.unit}s in {duration(time.perf_counter() - self._started)}")

    def _say(self, text: str) -> None:
        print(f"{self.what}: {text}{self._said}", file=self._log, flush=True)


def progress(
    what: str, items: Collection[Item], *, unit: str = "step", shown: bool = True, kept: bool = True
) -> Iterator[Item]:
    """The items one by one, and how far that is; arguments as of :class:`Progress`."""
    told = Progress(what, len(items), unit=unit, shown=shown, kept=kept)
    try:
        for done, item in enumerate(items):
            told.update(done)
            yield item
        told.update(len(items))
    finally:
        told.close()


def duration(seconds: float) -> str:
    """Seconds as a person would say them: 0.4 s, 48 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
