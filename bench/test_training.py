"""Rankings per second: constrained rollouts against transformers' generate, whole training steps against TRL's.

How both grow with candidates, generations and prompt length: bench/growth.py. Quality over time: time_to_quality.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bench.inputs import SMALL
from bench.measure import peak_bytes, restart_peak
from bench.training_task import DEFAULT, ROLLOUTS, TRAINERS, TrainingTask, one_step

CPU = torch.device("cpu")
# Smaller than a step of training usually is: generate with a prefix function takes half a minute for one.
ROLLOUT_TASK = DEFAULT if SMALL else DEFAULT.varied(prompts=4)


@pytest.fixture(scope="module", params=["labels", "titles"])
def task(request: pytest.FixtureRequest) -> TrainingTask:
    return ROLLOUT_TASK.varied(encoding=request.param)


@pytest.fixture(scope="module")
def model(task: TrainingTask) -> Any:
    return task.model()


@pytest.mark.parametrize("method", ROLLOUTS)
def test_rollout(benchmark: Any, task: TrainingTask, model: Any, method: str) -> None:
    def check(rankings: np.ndarray) -> None:
        assert (np.sort(rankings, axis=1) == np.arange(task.candidates)).all()

    op = f"constrained rollout, {task.encoding}"
    measure_seconds(
        benchmark, op, task, method, lambda: ROLLOUTS[method](task, model), 3 if method == "ours" else 1, check
    )


@pytest.mark.parametrize("method", TRAINERS)
def test_training_step(benchmark: Any, method: str) -> None:
    if method == "trl_grpo":
        pytest.importorskip("trl", reason="trl is not installed")
    with one_step(method, DEFAULT) as step:
        measure_seconds(benchmark, "training step", DEFAULT, method, step, 2)


def measure_seconds(
    benchmark: Any,
    op: str,
    task: TrainingTask,
    method: str,
    work: Callable[[], Any],
    rounds: int,
    check: Callable[[Any], None] | None = None,
) -> None:
    """Time what takes seconds, so that no round is run for nothing: the peak of memory is that of the last."""
    before: list[int | None] = [None]

    def begin() -> None:
        gc.collect()
        before[0] = restart_peak(CPU)

    benchmark.group = f"{op}, {task.shape}"
    outputs = benchmark.pedantic(work, setup=begin, rounds=1 if SMALL else rounds)
    peak = None if before[0] is None else max(0, peak_bytes(CPU) - before[0])
    if check is not None:
        check(outputs)
    benchmark.extra_info |= {"op": op, "shape": task.shape, "method": method, "peak_memory": peak}
    if benchmark.stats:
        benchmark.extra_info["rankings_per_second"] = task.rankings / benchmark.stats.stats.min
