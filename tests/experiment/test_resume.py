"""Resuming an interrupted run: from where, with which weights, with which reference."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexrec import cli
from flexrec.experiment import run_folder


def test_resuming_continues_from_the_latest_checkpoint_and_the_first_reference(tmp_path, recorded):
    folder = tmp_path / "run"
    options = {"steps": 12, "beta": 0.1, "listwise_baseline": False}
    recorded.interrupt(folder, **options)
    for step in (2, 9, 10):
        (folder / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    recorded.stages.clear()
    recorded.evaluated.clear()
    results = recorded.run(folder, **options, resume=True)
    (stage,) = recorded.stages
    assert (stage.stage, stage.mark_before) == ("reinforcement", 2.0), "its weights come from the checkpoint"
    assert stage.checkpoint == str(folder / "checkpoints" / "checkpoint-10")
    assert recorded.mark_of(stage.options["reference"]) == 12.0
    assert recorded.marks()["base"] == 2.0
    assert "format" not in results.seconds


def test_resuming_before_the_first_checkpoint_starts_from_the_base(tmp_path, recorded):
    recorded.interrupt(tmp_path / "run", listwise_baseline=False)
    recorded.stages.clear()
    recorded.run(tmp_path / "run", resume=True, listwise_baseline=False)
    assert [(s.stage, s.mark_before, s.checkpoint) for s in recorded.stages] == [
        ("listwise", 2.0, None),
        ("reinforcement", 12.0, None),
    ]


@pytest.mark.parametrize(
    "lora",
    [{}, {"lora": 2, "lora_save": "adapter"}, {"lora": 2, "lora_save": "merged"}],
    ids=["whole", "adapter", "merged"],
)
def test_resuming_after_the_last_step_takes_the_checkpoints_weights(tmp_path, recorded, monkeypatch, lora):
    if lora:
        pytest.importorskip("peft")
    folder = tmp_path / "run"
    recorded.interrupt(folder, listwise_baseline=False, **lora)
    trained = recorded.of("reinforcement")[0].model
    with torch.no_grad():
        recorded.marked(trained).fill_(0.375)
    trained.save_pretrained(folder / "checkpoints" / "checkpoint-4")
    recorded.stages.clear()
    recorded.evaluated.clear()
    saved = []
    save = run_folder._save_model
    monkeypatch.setattr(
        run_folder, "_save_model", lambda to, model, *rest: saved.append((to, model)) or save(to, model, *rest)
    )
    recorded.run(folder, resume=True, listwise_baseline=False, **lora)
    assert recorded.stages == [], "there is nothing left to train"
    ((where, model),) = saved
    assert where == folder
    if lora.get("lora_save") == "merged":
        base = AutoModelForCausalLM.from_pretrained(folder / "backbone").state_dict()
        found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        changed = [n for n in base if not torch.equal(base[n], found[n])]
        expected = trained.merge_and_unload().state_dict()
        assert changed
        for name in changed:
            torch.testing.assert_close(found[name], expected[name])
    else:
        assert recorded.mark_of(model) == 0.375
        assert recorded.marks()["trained"] == 0.375
    if not lora:
        assert recorded.saved_mark(folder) == 0.375
        assert recorded.marks()["base"] == 2.0


def test_a_run_is_resumed_as_it_was_configured(tmp_path, recorded):
    """No option need be repeated; one that differs is refused by name, but for those that change no result."""
    folder = tmp_path / "run"
    recorded.interrupt(folder, seed=13)
    before = (folder / "config.json").read_text()
    for name, value in {
        "seed": 14,
        "needs": ("trend",),
        "credit": "swap",
        "encoding": "index",
        "steps": 5,
        "learning_rate": 0.25,
        "temperature": 0.5,
        "lora": 2,
    }.items():
        with pytest.raises(ValueError, match=rf"--resume continues the run .*\b{name}="):
            recorded.run(folder, **{"seed": 13, name: value}, resume=True)
    assert (folder / "config.json").read_text() == before
    recorded.stages.clear()
    recorded.run(folder, seed=13, resume=True, save_every=2, eval_every=1, listwise_baseline=False)
    assert [stage.stage for stage in recorded.stages] == ["listwise", "reinforcement"]


def test_resume_needs_no_other_option(tmp_path, recorded, capsys):
    folder = tmp_path / "run"
    recorded.interrupt(folder, seed=13, needs=("trend", "interest"), metric="recall@3")
    command = ["train", "--output", str(folder), "--resume"]
    assert cli.main([*command, "--seed", "0"]) == 2
    assert "seed=13: got 0" in capsys.readouterr().err
    moved = folder.rename(tmp_path / "moved")
    assert cli.main([command[0], "--output", str(moved), "--resume", "--seed", "13", "--no-listwise-baseline"]) == 0
    config = json.loads((moved / "metrics.json").read_text())["config"]
    assert (config["seed"], config["needs"], config["metric"]) == (13, ["trend", "interest"], "recall@3")
    assert not config["listwise_baseline"]


def test_the_folder_of_something_else_is_not_resumed(tmp_path, recorded):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no config\.json"):
        recorded.run(tmp_path, resume=True)
    recorded.run(tmp_path / "new", resume=True, listwise_baseline=False)
    assert [stage.stage for stage in recorded.stages] == ["format", "listwise", "reinforcement"]
