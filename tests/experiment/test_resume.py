"""Resuming an interrupted run: from where, with which weights, with which reference."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

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
    recorded.interrupt(tmp_path / "run")
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
    recorded.interrupt(folder, listwise_baseline=False, **{**lora, **({"lora_save": "adapter"} if lora else {})})
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


def test_a_resumed_run_keeps_what_the_warm_start_was_worth(tmp_path, recorded):
    folder = tmp_path / "run"
    recorded.interrupt(folder, steps=12, listwise_baseline=False)
    with np.load(folder / "warm_start.npz") as saved:
        expected = {name: saved[name] for name in saved.files}
    (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    results = recorded.run(folder, steps=12, listwise_baseline=False, resume=True)
    found = results.per_list["warm start"]["interest"]
    assert len(found) > 3
    for metric, values in found.items():
        np.testing.assert_array_equal(values, expected[f"warm start/interest/{metric}"])
    assert list(results.per_list)[:3] == ["base", "warm start", "trained"]
