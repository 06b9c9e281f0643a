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
from tqdm import tqdm
from transformers import TrainerCallback

from flexrec.policy.distributed import process_index
from flexrec.profiling import OUTSIDE, active_profile, span

# (model, what to call it) -> need -> metric -> (L,) values per list
Evaluate = Callable[[Any, str], dict[str, dict[str, np.ndarray]]]


class Stage:
    """A running stage of the clock; time spent in ``pause`` does not count."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def pause(self, seconds: float) -> None:
        self.started += seconds


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._whole = Stage()

    def elapsed(self) -> float:
        return self._whole.elapsed()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        stage = Stage()
        yield stage
        self.seconds[name] = stage.elapsed()


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
    """A line of JSON per optimiser step, written as it happens, by the main process."""

    def __init__(self, path: Path, append: bool) -> None:
        self.path = path
        if process_index() == 0 and not append:
            path.write_text("")

    def write(self, **entry: Any) -> None:
        if process_index() == 0:
            with self.path.open("a") as file:
                file.write(to_json(entry) + "\n")

    def of_stage(self, stage: str) -> TrainerCallback:
        log = self

        class _Callback(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                log.write(stage=stage, step=state.global_step, **(logs or {}))

        return _Callback()


class ProgressBar(TrainerCallback):
    """A progress bar for a stage, with the latest loss or reward beside it."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.stage.capitalize(),
            unit="step",
            disable=process_index() != 0,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {name: round(float(logs[name]), 3) for name in ("ranking_nll", "reward") if name in (logs or {})}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class Curve(TrainerCallback):
    """Evaluates every few steps and logs the means with the seconds trained so far."""

    def __init__(self, evaluate: Evaluate, log: StepLog, every: int, stage: Stage) -> None:
        self.evaluate, self.log, self.every, self.stage = evaluate, log, every, stage

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        trained = self.stage.elapsed()
        with span(OUTSIDE):
            values = self.evaluate(model, f"step {state.global_step}")
        means = {need: {m: float(v.mean()) for m, v in metrics.items()} for need, metrics in values.items()}
        self.log.write(stage="evaluation", step=state.global_step, seconds=round(trained, 2), means=means)
        self.stage.pause(self.stage.elapsed() - trained)


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
