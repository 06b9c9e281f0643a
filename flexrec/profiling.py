"""Where the seconds of training steps go.

Code that does a part of a step says so with :func:`span`, which costs nothing unless somebody listens. Spans nest, and
a part is charged only for what no span inside it is charged for, so that the parts add up to the whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

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
