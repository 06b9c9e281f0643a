"""Run folders that are damaged or foreign: one line that names the file, never a traceback, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest

from flexrec import cli
from flexrec.data import simulate
from flexrec.experiment import stages
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.run_folder import RunFolder, RunInfo
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run, and a request to it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    dataset = simulate(num_users=24, num_items=70, num_topics=4, num_test_users=6, num_candidates=8)
    tokenizer = build_tokenizer(dataset.catalogue, get_need("interest").wordings)
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2, max_length=256)
    config, builder = ExperimentConfig(output=str(folder)), PromptBuilder(tokenizer, encoding="index")
    run = RunFolder(folder)
    run.write_config(config, dataset)
    run.save(model, tokenizer, RunInfo.of(config, builder, dataset, [get_need("interest")]), dataset)
    ids = dataset.catalogue.ids
    request = {"need": "interest", "history": [ids[0]], "candidates": [{"id": i} for i in ids[1:4]]}
    (folder.parent / "requests.jsonl").write_text(json.dumps(request) + "\n")
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(name):
    def change(path: Path) -> None:
        content = json.loads(path.read_text())
        del content[name]
        path.write_text(json.dumps(content))

    return change


def filled(text):
    return lambda path: path.write_bytes(text)


HOSTILE = {
    "no description": ("flexrec.json", Path.unlink, "is not the folder of a finished run: it has no flexrec.json"),
    "an empty description": ("flexrec.json", filled(b""), "flexrec.json is damaged"),
    "half a description": ("flexrec.json", cut, "flexrec.json is damaged"),
    "a list for a description": ("flexrec.json", filled(b"[1]"), "flexrec.json is damaged: it holds a list"),
    "a description without a need": ("flexrec.json", without("needs"), "another version of flexrec"),
    "a description of something else": ("flexrec.json", filled(b'{"foreign": 1}'), "another version of flexrec"),
    "endless nesting": ("flexrec.json", filled(b"[" * 100_000), "flexrec.json is damaged"),
    "no UTF-8": ("flexrec.json", filled(b"\xff\xfe"), "flexrec.json is damaged"),
    "half a catalogue": ("catalogue.json", cut, "catalogue.json is damaged"),
    "a catalogue without titles": (
        "catalogue.json",
        without("titles"),
        "catalogue.json is damaged: KeyError: 'titles'",
    ),
    "no catalogue": ("catalogue.json", Path.unlink, "catalogue.json is missing: copy the whole folder of the run"),
    "no histories": ("histories.json", Path.unlink, "histories.json is missing: copy the whole folder of the run"),
    "half of the histories": ("histories.json", cut, "histories.json is damaged"),
    "half a model": ("model.safetensors", cut, "cannot be loaded"),
    "an empty model": ("model.safetensors", filled(b""), "cannot be loaded"),
    "no model": ("model.safetensors", Path.unlink, "cannot be loaded"),
    "half a tokenizer": ("tokenizer.json", cut, "cannot be loaded"),
    "half a configuration": ("config.json", cut, "cannot be loaded"),
    "a model of no kind": ("config.json", filled(b'{"model_type": "no-such"}'), "cannot be loaded"),
}


@pytest.mark.parametrize(("name", "damage", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_run_is_refused_in_one_line(whole, tmp_path, capsys, name, damage, message):
    run, target = tmp_path / "run", tmp_path / "answers.jsonl"
    shutil.copytree(whole, run)
    damage(run / name)
    requests = str(whole.parent / "requests.jsonl")
    assert cli.main(["rank", "--run", str(run), "--input", requests, "--output", str(target)]) == 2
    *_, said = capsys.readouterr().err.splitlines()  # after the progress of loading
    assert said.startswith("flexrec rank: error: ")
    assert message in said
    assert not target.exists()


RESUMED = {
    "half a configuration": (cut, "experiment.json is damaged"),
    "an empty configuration": (filled(b""), "experiment.json is damaged"),
    "a list for a configuration": (filled(b"[]"), "experiment.json is damaged: it holds a list"),
    "an option that is none": (filled(b'{"output": "run", "no_such": 1}'), "no_such"),
    "a value of another type": (filled(b'{"output": "run", "steps": "many"}'), "steps must be a number, got str"),
    "a value out of range": (filled(b'{"output": "run", "beta": -1}'), "beta must be at least 0"),
    "not a number": (filled(b'{"output": "run", "beta": NaN}'), "beta must be finite"),
}


@pytest.mark.parametrize(("damage", "message"), RESUMED.values(), ids=RESUMED)
def test_a_damaged_configuration_is_not_resumed(whole, tmp_path, capsys, monkeypatch, damage, message):
    monkeypatch.setattr(stages, "load_dataset", lambda *args: pytest.fail("loaded"))
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / "experiment.json", run)
    damage(run / "experiment.json")
    assert cli.main(["train", "--output", str(run), "--resume"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("flexrec train: error: ")
    assert message in said
    assert len(said.splitlines()) == 1
