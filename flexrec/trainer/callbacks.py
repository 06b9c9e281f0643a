"""What a person sees of a long training: a bar, seconds by stage and part, a line per step, curves of quality."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from flexrec.policy.distributed import of_main_process, process_index
from flexrec.profiling import OUTSIDE, Progress, active_profile, span

# (model, what to call it) -> need -> metric -> (L,) values per list
Evaluate = Callable[[Any, str], dict[str, dict[str, np.ndarray]]]
Intervals = Callable[[Mapping[str, Mapping[str, np.ndarray]]], dict[str, dict[str, tuple[float, float]]]]


class Stage:
    """A running stage of the clock; time spent in ``pause`` does not count.

    Args:
        steps, seconds: trained before it, by what its model comes from.
    """

    def __init__(self, name: str = "", steps: int = 0, seconds: float = 0.0) -> None:
        self.name, self.steps, self.seconds = name, steps, seconds
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def pause(self, seconds: float) -> None:
        self.started += seconds

    def at(self, step: int) -> dict[str, Any]:
        """What the log says of a step: its number in the stage, and steps and seconds since training began."""
        seconds = round(self.seconds + self.elapsed(), 2)
        return {"stage": self.name, "step": step, "steps": self.steps + step, "seconds": seconds}


class Clock:
    """Seconds by stage.

    Attributes:
        ends: of each stage of training, its last step as :meth:`Stage.at` says it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.ends: dict[str, dict[str, Any]] = {}
        self._whole = Stage()

    def elapsed(self) -> float:
        return self._whole.elapsed()

    @contextmanager
    def stage(self, name: str, steps: int = 0, after: str | None = None) -> Iterator[Stage]:
        """Time a stage of so many steps, whose model comes from the stage ``after``; None: training begins with it.

        Where an interrupted run is continued in the middle of it, ``ends`` knows its seconds so far.
        """
        before = self.ends.get(after or "", {"steps": 0, "seconds": 0.0})
        stage = Stage(name, before["steps"], self.ends.get(name, before)["seconds"])
        yield stage
        self.seconds[name] = stage.elapsed()
        self.ends[name] = stage.at(steps)


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON as others read it: numbers that are not finite, of which it knows none, are null."""

    def known(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: known(one) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [known(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(known(content), indent=indent, allow_nan=False)


class StepLog:
    """A line of JSON per optimiser step, written as it happens, by the main process.

    Args:
        intervals: of the values of an evaluation, need -> metric -> [low, high]; None: points of curves have none.
    """

    def __init__(self, path: Path, append: bool, intervals: Intervals | None = None) -> None:
        self.path, self.intervals = path, intervals
        if process_index() == 0 and not append:
            path.write_text("")

    def write(self, **entry: Any) -> None:
        if process_index() == 0:
            with self.path.open("a") as file:
                file.write(to_json(entry) + "\n")

    def evaluation(self, at: Mapping[str, Any], values: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write a point of the curves: the means of ``values``, need -> metric -> (L,), at a :meth:`Stage.at`."""
        means = {need: {m: float(v.mean()) for m, v in metrics.items()} for need, metrics in values.items()}
        more = {} if self.intervals is None else {"intervals": self.intervals(values)}
        self.write(**{**at, "stage": "evaluation", "of": at["stage"]}, means=means, **more)

    def of_stage(self, stage: Stage) -> TrainerCallback:
        log = self

        class _Callback(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                log.write(**stage.at(state.global_step), **(logs or {}))

        return _Callback()


class ProgressBar(TrainerCallback):
    """How far a stage is, with the latest loss or reward beside it."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        shown = process_index() == 0
        self.bar = Progress(self.stage.capitalize(), state.max_steps, done=state.global_step, shown=shown)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        numbers = {name: float(logs[name]) for name in ("ranking_nll", "reward") if name in (logs or {})}
        self.bar.update(state.global_step, **numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class SaveInTime(TrainerCallback):
    """Checkpoints by the clock: one after the first step, for what came before is not to be done again, and others so
    far apart that they take a twentieth of the time at most. Its ``on_save`` comes after that of who writes them."""

    LEAST, SHARE = 60.0, 0.05  # seconds apart, and of the time

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._due = self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()
        if of_main_process(self._began >= self._due):  # clocks of processes differ
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._due = now + max(self.LEAST, (now - self._began) / self.SHARE)


class Curve(TrainerCallback):
    """Evaluates every few steps on the way, and where training begins; who runs a stage evaluates its end."""

    def __init__(self, evaluate: Evaluate, log: StepLog, every: int, stage: Stage) -> None:
        self.evaluate, self.log, self.every, self.stage = evaluate, log, every, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.stage.steps + state.global_step == 0:
            self._add(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step != state.max_steps:
            self._add(state, model)

    def _add(self, state: Any, model: Any) -> None:
        trained = self.stage.elapsed()
        with span(OUTSIDE):
            values = self.evaluate(model, f"step {self.stage.steps + state.global_step}")
        self.stage.pause(self.stage.elapsed() - trained)
        self.log.evaluation(self.stage.at(state.global_step), values)


class ProfileSteps(TrainerCallback):
    """Counts the steps for who listens to the spans, and charges the optimiser, whose step is not ours to wrap."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if profile := active_profile():
            profile.enter("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if profile := active_profile():
            profile.leave()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if profile := active_profile():
            profile.steps += 1
