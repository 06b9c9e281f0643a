"""Logs for trackers: each stage of a run as a run of theirs, in the run's folder."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from flexrec.cli import main
from flexrec.data import simulate
from flexrec.experiment import stages
from flexrec.experiment import trackers as module

FEW = ["--steps", "2", "--warmup-steps", "1", "--listwise-steps", "1", "--prompts-per-step", "4", "--need", "interest"]


@pytest.fixture
def small(monkeypatch):
    sizes = {"num_users": 24, "num_items": 70, "num_topics": 4, "num_test_users": 4, "num_candidates": 6}
    monkeypatch.setattr(stages, "simulate", lambda **options: simulate(**{**options, **sizes}))


def test_tensorboard_has_a_folder_of_every_stage(tmp_path, small):
    pytest.importorskip("tensorboard", reason="the extra 'test'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = ["train", "--output", str(tmp_path / "run"), *FEW, "--baselines", "none", "--report-to", "tensorboard"]
    assert main(command) == 0
    folder = tmp_path / "run" / "trackers" / "tensorboard"
    assert {path.name for path in folder.iterdir()} == {"format", "listwise-warm-up", "reinforcement"}
    events = EventAccumulator(str(folder / "reinforcement")).Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2]
    assert "train/reward/rank_1" in events.Tags()["scalars"]


def test_weights_and_biases_stays_offline_with_a_run_for_each_stage(tmp_path, monkeypatch):
    made, ended = [], []
    wandb = ModuleType("wandb")
    wandb.init = lambda **options: made.append(options)
    wandb.finish = lambda: ended.append("ended")
    wandb.Settings = SimpleNamespace
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    class Callback:
        def on_train_end(self, *args, **kwargs):
            ended.append("theirs")

    monkeypatch.setattr("transformers.integrations.WandbCallback", Callback)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "shop")
    (callback,) = module.tracking(["wandb"], tmp_path / "run", "format", {"steps": 3})
    (options,) = made
    assert module.os.environ["WANDB_MODE"] == "offline"
    assert (options["project"], options["name"], options["group"]) == ("shop", "run format", "run")
    assert options["dir"] == str(tmp_path / "run" / "trackers" / "wandb")
    assert options["config"] == {"steps": 3}
    callback.on_train_end()
    assert ended == ["theirs", "ended"]
    monkeypatch.setattr(module, "process_index", lambda: 1)
    assert module.tracking(["wandb"], tmp_path / "run", "format", {}) == []


def test_weights_and_biases_itself_writes_a_run_for_each_stage(tmp_path, small, monkeypatch):
    """Where it is installed: its arguments and its callback are those that we think it has."""
    pytest.importorskip("wandb", reason="the extra 'trackers'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = ["train", "--output", str(tmp_path / "run"), *FEW, "--baselines", "none", "--report-to", "wandb"]
    assert main(command) == 0
    runs = [path for path in (tmp_path / "run" / "trackers" / "wandb").rglob("*.wandb") if path.stat().st_size]
    assert len(runs) == 3


def test_a_tracker_that_is_not_there_is_said_before_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert main(["train", "--output", str(tmp_path / "run"), "--report-to", "wandb"]) == 2
    assert "--report-to wandb needs wandb: .venv/bin/pip install -e '.[trackers]'" in capsys.readouterr().err
    assert main(["train", "--output", str(tmp_path / "run"), "--report-to", "tensorbord"]) == 2
    assert "unknown tracker 'tensorbord'; --report-to takes tensorboard, wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
