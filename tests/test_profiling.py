"""Seconds by part: what is charged to whom, and that a training's parts add up to its time."""

import io
import time
from types import SimpleNamespace

import pytest

from flexrec import profiling as module
from flexrec.profiling import Progress, active_profile, duration, profile_steps, progress, span
from flexrec.trainer.callbacks import ProfileSteps


def test_laps_and_steps_to_the_second(monkeypatch):
    now = SimpleNamespace(seconds=50.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now.seconds)
    callback = ProfileSteps()
    callback.on_step_end(None, None, None)  # nobody listens
    with profile_steps() as profile:
        with span("backward"):
            now.seconds += 1
            with span("forward"):
                now.seconds += 2
            with span("evaluation"):
                now.seconds += 64
        callback.on_pre_optimizer_step(None, None, None)
        now.seconds += 4
        callback.on_optimizer_step(None, None, None)
        callback.on_step_end(None, None, None)
        now.seconds += 8
        assert profile.lap() == {"forward": 2, "backward": 1, "optimizer": 4, "other": 8}
        assert list(profile.lap()) == ["forward", "backward", "optimizer", "other"], "in the order of a step"
        with span("forward"):
            now.seconds += 16
        callback.on_step_end(None, None, None)
        assert profile.lap() == {"forward": 16, "backward": 0, "optimizer": 0, "other": 0}
        now.seconds += 32
    assert profile.seconds == {"forward": 18, "backward": 1, "evaluation": 64, "optimizer": 4, "other": 40}
    assert profile.per_step() == {"forward": 9, "backward": 0.5, "optimizer": 2, "other": 20}
    lines = profile.table().splitlines()
    assert lines[1].split() == ["forward", "9.0000", "28.6%"]
    assert lines[-1].split() == ["step", "31.5000", "100.0%", "mean", "of", "2", "steps"]


def test_a_part_is_charged_for_what_no_inner_part_is():
    with profile_steps() as profile:
        with span("backward"):
            time.sleep(0.02)
            with span("forward"):
                time.sleep(0.05)
            time.sleep(0.02)
        time.sleep(0.01)
    assert profile.seconds["forward"] == pytest.approx(0.05, abs=0.02)
    assert profile.seconds["backward"] == pytest.approx(0.04, abs=0.02)
    assert profile.seconds["other"] == pytest.approx(0.01, abs=0.02)


def test_laps_add_up_and_the_evaluation_is_no_part_of_a_step():
    with profile_steps() as profile:
        laps = []
        for _ in range(3):
            with span("decode"):
                time.sleep(0.01)
            with span("evaluation"):
                time.sleep(0.01)
            profile.steps += 1
            laps.append(profile.lap())
    assert sum(lap["decode"] for lap in laps) == pytest.approx(profile.seconds["decode"])
    assert "evaluation" not in profile.per_step()
    assert profile.per_step()["decode"] == pytest.approx(profile.seconds["decode"] / 3)
    assert "mean of 3 steps" in profile.table()


def test_a_span_that_raises_is_closed():
    with profile_steps() as profile:
        with pytest.raises(ValueError, match="broken"), span("decode"):
            raise ValueError("broken")
        time.sleep(0.02)
    assert profile.seconds["other"] >= 0.02
    assert active_profile() is None
    with span("decode"):  # nobody listens
        pass


@pytest.fixture
def now(monkeypatch):
    """The seconds that are read, to be set by hand."""
    told = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: told.seconds)
    return told


def test_a_log_file_gets_a_line_when_work_is_done_and_one_every_ten_minutes(now, capsys):
    told = Progress("Format", 40, done=10)
    for done in range(11, 41):
        now.seconds += 50
        told.update(done, loss=done / 100)
    told.close()
    assert capsys.readouterr().err.splitlines() == [
        "Format: 22 of 40 steps in 10 min, 15 min left, loss 0.220",
        "Format: 34 of 40 steps in 20 min, 5 min left, loss 0.340",
        "Format: 30 steps in 25 min, loss 0.400",
    ]


def test_short_work_that_is_not_kept_says_nothing(now, capsys):
    assert list(progress("Evaluating", [7, 8, 9], kept=False)) == [7, 8, 9]
    assert list(progress("Elsewhere", [7, 8], shown=False)) == [7, 8]
    assert capsys.readouterr().err == ""
    now.seconds += 1
    list(progress("SASRec", range(3), unit="epoch"))
    assert capsys.readouterr().err == "SASRec: 3 epochs in 0.0 s\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    told = Progress("Format", 4, done=1)
    told.update(4, reward=0.12345)
    told.close()
    shown = terminal.getvalue()
    assert "Format" in shown
    assert "4/4" in shown
    assert "reward=0.123" in shown


@pytest.mark.parametrize(("seconds", "said"), [(0.04, "0.0 s"), (48.4, "48 s"), (720.0, "12 min"), (12600.0, "3.5 h")])
def test_durations_are_short(seconds, said):
    assert duration(seconds) == said
