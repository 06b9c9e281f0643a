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
from bench.training_task import DEFAULT, DEVICE, QWEN, ROLLOUTS, TRAINERS, TrainingTask, one_step

# A model of half a billion parameters needs a GPU.
TASKS = [DEFAULT, QWEN] if SMALL or DEVICE.type == "cuda" else [DEFAULT]


@pytest.fixture(
    scope="module",
    params=[(task, encoding) for task in TASKS for encoding in ("labels", "titles")],
    ids=lambda p: f"{p[0].model_name}-{p[1]}",
)
def task(request: pytest.FixtureRequest) -> TrainingTask:
    task, encoding = request.param
    # Smaller than a step of training usually is: generate with a prefix function takes half a minute for one.
    return task.varied(encoding=encoding) if SMALL else task.varied(encoding=encoding, prompts=4)


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


@pytest.mark.parametrize("training_task", TASKS, ids=[task.model_name for task in TASKS])
@pytest.mark.parametrize("method", TRAINERS)
def test_training_step(benchmark: Any, training_task: TrainingTask, method: str) -> None:
    if method == "trl_grpo":
        pytest.importorskip("trl", reason="trl is not installed")
    with one_step(method, training_task) as step:
        measure_seconds(benchmark, "training step", training_task, method, step, 2)


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
        before[0] = restart_peak(DEVICE)

    def whole() -> Any:
        result = work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = f"{op}, {task.shape}"
    outputs = benchmark.pedantic(whole, setup=begin, rounds=1 if SMALL else rounds)
    peak = None if before[0] is None else max(0, peak_bytes(DEVICE) - before[0])
    if check is not None:
        check(outputs)
    benchmark.extra_info |= {"op": op, "shape": task.shape, "method": method, "peak_memory": peak}
    if benchmark.stats:
        benchmark.extra_info["rankings_per_second"] = task.rankings / benchmark.stats.stats.min
