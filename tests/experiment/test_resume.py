"""Resuming an interrupted run: from where, with which weights, with which reference."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexrec import cli
from flexrec.experiment import run_folder, stages, training
from flexrec.experiment.run_folder import RunFolder
from flexrec.trainer.callbacks import SaveInTime


def test_resuming_continues_from_the_latest_checkpoint_and_the_first_reference(tmp_path, recorded):
    folder = tmp_path / "run"
    options = {"steps": 12, "beta": 0.1}
    recorded.interrupt(folder, **options)
    for step in (2, 9, 10):
        (folder / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        RunFolder(folder).seal(folder / "checkpoints" / f"checkpoint-{step}")
    recorded.stages.clear()
    recorded.evaluated.clear()
    results = recorded.run(folder, **options, resume=True)
    (stage,) = recorded.stages
    assert (stage.stage, stage.mark_before) == ("reinforcement", 2.0), "its weights come from the checkpoint"
    assert stage.checkpoint == str(folder / "checkpoints" / "checkpoint-10")
    assert recorded.mark_of(stage.options["reference"]) == 12.0
    assert recorded.marks()["base"] == 2.0
    assert "format" not in results.seconds


def test_reinforcement_is_not_started_anew_by_default(tmp_path, recorded):
    """Somebody who named no interval has checkpoints by the clock; who said 0 has none."""
    recorded.run(tmp_path / "default")
    recorded.run(tmp_path / "never", save_every=0)
    recorded.run(tmp_path / "some", save_every=3)
    by_clock = [any(isinstance(c, SaveInTime) for c in stage.callbacks) for stage in recorded.of("reinforcement")]
    assert by_clock == [True, False, False]


def test_resuming_before_the_first_checkpoint_starts_from_the_base(tmp_path, recorded):
    recorded.interrupt(tmp_path / "run")
    recorded.stages.clear()
    recorded.run(tmp_path / "run", resume=True)
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
    recorded.interrupt(folder, **lora)
    trained = recorded.of("reinforcement")[0].model
    with torch.no_grad():
        recorded.marked(trained).fill_(0.375)
    trained.save_pretrained(folder / "checkpoints" / "checkpoint-4")
    RunFolder(folder).seal(folder / "checkpoints" / "checkpoint-4")
    recorded.stages.clear()
    recorded.evaluated.clear()
    saved = []
    save = run_folder.save_model
    monkeypatch.setattr(
        run_folder, "save_model", lambda to, model, *rest: saved.append((to, model)) or save(to, model, *rest)
    )
    recorded.run(folder, resume=True, **lora)
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
    recorded.interrupt(folder, steps=12)
    with np.load(folder / "warm_start.npz") as saved:
        expected = {name: saved[name] for name in saved.files}
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(b"moments")
    RunFolder(folder).seal(checkpoint)
    recorded.stages.clear()
    results = recorded.run(folder, steps=12, resume=True)
    assert recorded.of("listwise") == [], "the warm start is not made again"
    found = results.per_list["warm start"]["interest"]
    assert len(found) > 3
    for metric, values in found.items():
        np.testing.assert_array_equal(values, expected[f"warm start/interest/{metric}"])
    assert list(results.per_list)[:3] == ["base", "warm start", "trained"]


def test_a_run_is_resumed_as_it_was_configured(tmp_path, recorded):
    """No option need be repeated; one that differs is refused by name, but for those that change no result."""
    folder = tmp_path / "run"
    recorded.interrupt(folder, seed=13)
    before = (folder / "experiment.json").read_text()
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
    assert (folder / "experiment.json").read_text() == before
    recorded.stages.clear()
    recorded.run(folder, seed=13, resume=True, save_every=2, eval_every=1)
    assert [stage.stage for stage in recorded.stages] == ["listwise", "reinforcement"]


def test_resume_needs_no_other_option(tmp_path, recorded, capsys):
    folder = tmp_path / "run"
    recorded.interrupt(folder, seed=13, needs=("trend", "interest"), metric="recall@3")
    command = ["train", "--output", str(folder), "--resume"]
    assert cli.main([*command, "--seed", "0"]) == 2
    assert "seed=13: got 0" in capsys.readouterr().err
    moved = folder.rename(tmp_path / "moved")
    assert cli.main([command[0], "--output", str(moved), "--resume", "--seed", "13"]) == 0
    config = json.loads((moved / "metrics.json").read_text())["config"]
    assert (config["seed"], config["needs"], config["metric"]) == (13, ["trend", "interest"], "recall@3")
    assert config["baselines"] == ["none"]


def test_a_folder_without_a_run_is_not_resumed_by_defaults(tmp_path, recorded, capsys):
    """A mistyped name, say: it would be a run on simulated data. Who gives a run's options may always add --resume."""
    command = ["train", "--output", str(tmp_path / "rnu"), "--resume"]
    assert cli.main(command) == 2
    assert f"there is no run in --output {tmp_path / 'rnu'} to continue" in capsys.readouterr().err
    assert not recorded.stages
    assert not (tmp_path / "rnu").exists()
    few = "--need interest --steps 4 --warmup-steps 3 --listwise-steps 2 --prompts-per-step 4 --baselines none"
    assert cli.main([*command, *few.split()]) == 0


def test_the_folder_of_something_else_is_not_resumed(tmp_path, recorded):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no experiment\.json"):
        recorded.run(tmp_path, resume=True)
    recorded.run(tmp_path / "new", resume=True)
    assert [stage.stage for stage in recorded.stages] == ["format", "listwise", "reinforcement"]


def test_a_run_killed_at_its_first_file_begins_anew(tmp_path, recorded):
    for name, options in {"resumed": {"resume": True}, "again": {}}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "experiment.json.partial").write_text('{"output": ')
        recorded.run(folder, baselines=("none",), **options)
        assert json.loads((folder / "experiment.json").read_text())["output"] == str(folder)
        assert not list(folder.glob("*.partial"))


@pytest.fixture
def interrupted(tmp_path, recorded):
    """A run with whole checkpoints of steps 2 and 9, and what was said when it was resumed."""
    folder = tmp_path / "run"
    recorded.interrupt(folder, steps=12)
    for step in (2, 9):
        checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(b"moments" * 1000)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        RunFolder(folder).seal(checkpoint)
    recorded.stages.clear()
    return folder


def resume(recorded, folder):
    """The checkpoint that a resumed run goes on from."""
    recorded.run(folder, steps=12, resume=True)
    return recorded.of("reinforcement")[0].checkpoint


def test_what_was_not_written_to_its_end_is_passed_over(recorded, interrupted):
    """As a kill or a full disk leaves it: without the manifest, which comes last; and so is what is no checkpoint."""
    checkpoints = interrupted / "checkpoints"
    (checkpoints / "checkpoint-best").mkdir()
    (checkpoints / "checkpoint-11").mkdir()
    (checkpoints / "checkpoint-11" / "optimizer.pt").write_bytes(b"mom")
    (checkpoints / "checkpoint-10").mkdir()
    (checkpoints / "checkpoint-10" / "manifest.json.partial").write_text("{")
    assert resume(recorded, interrupted) == str(checkpoints / "checkpoint-9")
    passed_over = [text for text in recorded.said if "passed over" in text]
    assert ["checkpoint-11" in passed_over[0], "checkpoint-10" in passed_over[1]] == [True, True]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing: delete checkpoint-9"),
        (lambda c: flip_a_bit(c / "optimizer.pt"), "optimizer.pt is not as it was written"),
        (lambda c: (c / "optimizer.pt").write_bytes(b"mom"), "optimizer.pt is not as it was written"),
        (lambda c: (c / "trainer_state.json").write_text('{"global_step": 3}'), "trainer_state.json is not as it was"),
        (lambda c: (c / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda c: (c / "manifest.json").write_text('{"run": "a", "files": [1]}'), "manifest.json is damaged"),
        (lambda c: (c / "manifest.json").write_text('{"run": "a", "files": "model"}'), "manifest.json is damaged"),
        (lambda c: (c / "manifest.json").write_text('{"run": "a", "files": {"model": 3}}'), "manifest.json is damaged"),
        (lambda c: (c / "manifest.json").write_text('{"run": "a", "files": {"m": [1]}}'), "manifest.json is damaged"),
        (lambda c: (c / "manifest.json").write_text('{"run": {}, "files": {}}'), "is of another run"),
        (lambda c: (c / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
        (lambda c: (c / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(recorded, interrupted, damage, message):
    checkpoint = interrupted / "checkpoints" / "checkpoint-9"
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        resume(recorded, interrupted)
    shutil.rmtree(checkpoint)
    assert resume(recorded, interrupted).endswith("checkpoint-2")


def test_a_checkpoint_of_another_run_is_refused(tmp_path, recorded, interrupted):
    other = tmp_path / "other"
    recorded.interrupt(other, steps=12, seed=1)
    checkpoint = other / "checkpoints" / "checkpoint-10"
    shutil.copytree(interrupted / "checkpoints" / "checkpoint-9", checkpoint)
    with pytest.raises(ValueError, match="checkpoint-10 is of another run"):
        recorded.run(other, steps=12, seed=1, resume=True)


def test_a_damaged_base_or_reference_is_refused_by_name(tmp_path, recorded):
    folder = tmp_path / "run"
    options = {"beta": 0.1, "steps": 12}
    recorded.interrupt(folder, **options)
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    RunFolder(folder).seal(checkpoint)
    whole = (folder / "reference" / "model.safetensors").read_bytes()
    (folder / "reference" / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"reference/model\.safetensors is not as it was written"):
        recorded.run(folder, **options, resume=True)
    shutil.rmtree(folder / "reference")
    with pytest.raises(FileNotFoundError, match="reference is missing"):
        recorded.run(folder, **options, resume=True)
    flip_a_bit(folder / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"base/model\.safetensors is not as it was written"):
        recorded.run(folder, **options, resume=True)


def test_checkpoints_of_a_training_are_sealed(tmp_path):
    """By the callback that the trainer is given, in the folder that it writes to."""
    run = RunFolder(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "weights").write_bytes(b"1234")
    args, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=3)
    (tmp_path / "experiment.json").write_text("{}")
    training._Seal(run).on_save(args, state, None)
    run.check_sealed(tmp_path / "checkpoint-3")


def steps_of(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(f"{line['of']} evaluation" if "of" in line else line["stage"], line["step"]) for line in lines]


def test_the_log_of_a_resumed_run_has_no_step_twice(tmp_path):
    run = RunFolder(tmp_path)
    done = [("format", 1), ("format", 2), ("format evaluation", 2)]
    done += [("listwise warm-up", 1), ("listwise warm-up", 2), ("listwise warm-up evaluation", 2)]
    reinforced = [("reinforcement", 1), ("reinforcement", 2), ("reinforcement evaluation", 2), ("reinforcement", 3)]
    baselines = [("listwise", 1), ("listwise evaluation", 1), ("rank_grpo", 1), ("rank_grpo evaluation", 1)]

    def cut(lines, step, torn=""):
        text = ""
        for seconds, (name, number) in enumerate(lines):
            of = name.removesuffix(" evaluation")
            stage = {"stage": name} if of == name else {"stage": "evaluation", "of": of}
            text += json.dumps({**stage, "step": number, "steps": 100 + number, "seconds": seconds}) + "\n"
        run.log.write_text(text + torn)
        ends = run.cut_log(step, 4)
        kept = steps_of(tmp_path)
        for name, end in ends.items():
            last = max(i for i, line in enumerate(lines) if line[0].startswith(name) and line in kept)
            number = lines[last][1]
            assert end == {"stage": name, "step": number, "steps": 100 + number, "seconds": last}
        assert set(ends) == {of.removesuffix(" evaluation") for of, _ in kept}
        return kept

    assert cut([*done, *reinforced], 2) == [*done, *reinforced[:3]]
    assert cut([*done, *reinforced, *baselines], 3) == [*done, *reinforced], "the baselines are trained again"
    assert cut([*done, *reinforced], None) == done[:2], "no checkpoint: the warm-up is made again"
    ended = [*done, *reinforced, ("reinforcement", 4), ("reinforcement evaluation", 4)]
    assert cut(ended, 4) == ended[:-1], "what it ended with is evaluated again"
    assert cut(done, 2, torn='{"stage": "rein') == done
    run.log.unlink()
    run.cut_log(2, 4)
    assert run.log.read_text() == ""


# One run at a time


def test_two_runs_into_one_folder_are_refused(tmp_path, recorded, monkeypatch):
    """Before anything is loaded; the folder is free again afterwards."""
    folder = tmp_path / "deep" / "run"
    with RunFolder(folder).locked():
        monkeypatch.setattr(stages, "load_dataset", lambda *args, **options: pytest.fail("loaded"))
        for more in ({}, {"resume": True}):
            with pytest.raises(FileExistsError, match=f"--output {folder} is in use by another run"):
                recorded.run(folder, **more)
    monkeypatch.undo()
    assert not (tmp_path / "deep").exists(), "what came to nothing leaves no folder"
    with RunFolder(folder).locked():
        (folder / "experiment.json.partial").write_text("{")
    assert not (tmp_path / "deep").exists(), "nor what was not written to its end"
    with RunFolder(folder).locked():
        (folder / "log.jsonl").write_text("")
    assert (folder / "log.jsonl").exists()
    with RunFolder(folder).locked():
        pass


def test_a_folder_that_cannot_be_made_is_named_with_what_to_do(tmp_path, recorded):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"--output .*file/run cannot be written \(Not a directory\): choose another folder"
    ):
        recorded.run(tmp_path / "file" / "run")
