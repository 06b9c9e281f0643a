"""What a person sees of a long training: log lines, curves, seconds by stage, and the bar."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexrec.profiling import profile_steps
from flexrec.trainer import callbacks as module
from flexrec.trainer.callbacks import Clock, Curve, ProgressBar, SaveInTime, StepLog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The seconds that are read, to be set by hand."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now.seconds)
    return now


def lines_of(path: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def state_at(step: int, max_steps: int = 10) -> Any:
    return SimpleNamespace(global_step=step, max_steps=max_steps)


def test_every_log_of_a_stage_is_a_line(tmp_path, clock):
    log, whole = StepLog(tmp_path / "log.jsonl", append=False), Clock()
    clock.seconds += 50  # of something that is no training
    with whole.stage("format", 3) as stage:
        clock.seconds += 1.5
        log.of_stage(stage).on_log(None, state_at(3), None, logs={"loss": 0.5, "reward": 0.25})
    clock.seconds += 50
    with whole.stage("warm-up", 5, after="format") as stage:
        clock.seconds += 2
        log.of_stage(stage).on_log(None, state_at(4), None)
    assert lines_of(log.path) == [
        {"stage": "format", "step": 3, "steps": 3, "seconds": 1.5, "loss": 0.5, "reward": 0.25},
        {"stage": "warm-up", "step": 4, "steps": 7, "seconds": 3.5},
    ]
    assert whole.ends["warm-up"] == {"stage": "warm-up", "step": 5, "steps": 8, "seconds": 3.5}


def test_a_run_that_is_continued_keeps_the_lines_of_before(tmp_path):
    path = tmp_path / "log.jsonl"
    for append, expected in ((False, [1]), (True, [1, 2]), (False, [3])):
        StepLog(path, append=append).write(n=expected[-1])
        assert [line["n"] for line in lines_of(path)] == expected


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 1}\n')
    monkeypatch.setattr(module, "process_index", lambda: 1)
    StepLog(path, append=False).write(n=2)
    assert lines_of(path) == [{"n": 1}]


def test_seconds_by_stage_without_pauses(clock):
    whole = Clock()
    with whole.stage("warm-up"):
        clock.seconds += 5
    clock.seconds += 1
    with whole.stage("reinforcement") as stage:
        clock.seconds += 7
        stage.pause(3)
        assert stage.elapsed() == 4
    assert whole.seconds == {"warm-up": 5, "reinforcement": 4}
    assert whole.elapsed() == 13


def test_a_curve_has_the_means_where_training_begins_and_every_few_steps(tmp_path, clock):
    evaluated = []

    def evaluate(model: Any, what: str) -> dict[str, dict[str, np.ndarray]]:
        evaluated.append((model, what))
        clock.seconds += 100  # which is no time of training
        return {"interest": {"ndcg": np.array([0.25, 0.75]), "mrr": np.array([0.0, 1.0, 1.0, 0.0])}}

    log = StepLog(tmp_path / "log.jsonl", append=False)
    whole = Clock()
    for name, after in (("format", None), ("reinforcement", "format")):
        with whole.stage(name, 8, after) as stage:
            curve = Curve(evaluate, log, 4, stage)
            curve.on_train_begin(None, state_at(0), None, model="the model")
            for step in range(1, 9):
                clock.seconds += 1.5
                curve.on_step_end(None, state_at(step, max_steps=8), None, model="the model")
    assert evaluated == [("the model", f"step {step}") for step in (0, 4, 12)], "who runs a stage evaluates its end"
    means = {"interest": {"ndcg": 0.5, "mrr": 0.5}}
    assert lines_of(log.path) == [
        {"stage": "evaluation", "of": of, "step": step, "steps": steps, "seconds": 1.5 * steps, "means": means}
        for of, step, steps in (("format", 0, 0), ("format", 4, 4), ("reinforcement", 4, 12))
    ]
    assert stage.elapsed() == 12


def test_a_stage_that_is_continued_goes_on_counting(clock):
    whole = Clock()
    whole.ends = {
        "format": {"stage": "format", "step": 3, "steps": 3, "seconds": 10.0},
        "reinforcement": {"stage": "reinforcement", "step": 2, "steps": 5, "seconds": 14.0},
    }
    with whole.stage("reinforcement", 4, after="format") as stage:
        clock.seconds += 6
        assert stage.at(3) == {"stage": "reinforcement", "step": 3, "steps": 6, "seconds": 20.0}
    with whole.stage("another", 2, after="format") as stage:
        assert stage.at(1) == {"stage": "another", "step": 1, "steps": 4, "seconds": 10.0}


def test_a_curve_is_no_part_of_a_step(tmp_path):
    heard = {}

    def evaluate(model: Any, what: str) -> dict[str, dict[str, np.ndarray]]:
        heard["part"] = profile._open[-1]
        return {}

    log = StepLog(tmp_path / "log.jsonl", append=False)
    with profile_steps() as profile, Clock().stage("reinforcement") as stage:
        Curve(evaluate, log, 1, stage).on_step_end(None, state_at(1), None)
    assert heard == {"part": "evaluation"}
    assert "evaluation" not in profile.per_step()


def test_the_bar_counts_steps_and_says_the_latest_number(monkeypatch):
    told = []

    class Told:
        def __init__(self, what: str, total: int, *, done: int, shown: bool) -> None:
            told.append((what, total, done, shown))

        def update(self, done: int, **numbers: float) -> None:
            told.append((done, numbers))

        def close(self) -> None:
            told.append("closed")

    monkeypatch.setattr(module, "Progress", Told)
    bar = ProgressBar("listwise")
    bar.on_train_begin(None, state_at(3, 9), None)
    bar.on_log(None, state_at(5, 9), None, logs={"reward": 0.12345, "loss": 7.0})
    bar.on_log(None, state_at(9, 9), None, logs={"ranking_nll": 2.5})
    bar.on_train_end(None, state_at(9, 9), None)
    assert told == [
        ("Listwise", 9, 3, True),
        (5, {"reward": 0.12345}),
        (9, {"ranking_nll": 2.5}),
        "closed",
    ]
    monkeypatch.setattr(module, "process_index", lambda: 1)
    bar.on_train_begin(None, state_at(0, 9), None)
    assert told[-1] == ("Listwise", 9, 0, False), "one process draws"


@pytest.mark.parametrize(("cost", "apart"), [(0.0, 60.0), (2.0, 60.0), (30.0, 600.0)])
def test_checkpoints_come_at_once_and_then_cost_a_twentieth_of_the_time(clock, cost, apart):
    saves = SaveInTime()
    found = []
    control = SimpleNamespace(should_save=False)
    saves.on_train_begin(None, state_at(0), control)
    for step in range(1, 2000):
        clock.seconds += 1
        control.should_save = False
        saves.on_step_end(None, state_at(step, 10_000), control)
        if control.should_save:
            found.append(clock.seconds)
            clock.seconds += cost
            saves.on_save(None, state_at(step), control)
    assert len(found) > 2
    assert found[0] == 101.0, "the warm start is never trained again"
    assert np.diff(found).min() >= apart + cost
    assert np.diff(found).max() <= apart + cost + 1


def test_a_checkpoint_that_was_not_written_is_due_still(clock):
    saves, control = SaveInTime(), SimpleNamespace(should_save=False)
    saves.on_train_begin(None, state_at(0), control)
    for step in (1, 2):  # after an update that was not finite nothing is saved
        control.should_save = False
        saves.on_step_end(None, state_at(step), control)
        assert control.should_save
