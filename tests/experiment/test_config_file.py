"""Options from a file, the file that a run writes, and what is said of a file that cannot be right."""

import dataclasses

import pytest
import yaml

from flexrec.cli import main
from flexrec.experiment import stages
from flexrec.experiment.arguments import options_text, read_options
from flexrec.experiment.config import ExperimentConfig


@pytest.fixture
def configs(monkeypatch):
    """What ``flexrec train`` would have run."""
    found = []

    def stop(config, say):
        found.append(config)
        raise ValueError("far enough")

    monkeypatch.setattr(stages, "run_experiment", stop)
    return found


def test_every_option_arrives_from_the_file_that_a_run_writes(tmp_path):
    config = ExperimentConfig(
        output="runs/first",
        dataset="interactions",
        data=str(tmp_path),
        needs=("trend", "0.7 interest + 0.3 explore"),
        needs_file=str(tmp_path / "needs.yaml"),
        model="some/model",
        show=("title", "year"),
        learning_rate=5e-7,
        profile=True,
        share_prompts=False,
        critic=False,
        lora=4,
        lora_targets=("q_proj",),
        report_to=("tensorboard",),
        save_every=0,
        data_options={
            "columns": "user=customer,item=sku",
            "event_values": "view=0.1,order=1",
            "codes": "0=seen,99=missing",
            "gain_range": (-1.0, 5.0),
            "num_candidates": 12,
            "day_first": True,
        },
    )
    path = tmp_path / "config.yaml"
    path.write_text(options_text(config))
    assert ExperimentConfig(**read_options(path), output="runs/first") == config
    content = yaml.safe_load(path.read_text())
    assert content["need"] == ["trend", "0.7 interest + 0.3 explore"]
    assert not {"output", "resume"} & set(content)
    names = {one.name for one in dataclasses.fields(config) if "help" in one.metadata} - {"output", "resume"}
    assert len(content) >= len(names) + 4, "every option stands in it"


def test_the_file_of_a_run_repeats_it(tmp_path, recorded, configs):
    config = ExperimentConfig(output=str(tmp_path / "run"), needs=("interest",), steps=3, seed=5)
    path = tmp_path / "again.yaml"
    path.write_text(options_text(config))
    assert main(["train", "--config", str(path), "--output", str(tmp_path / "again")]) == 2
    assert configs == [dataclasses.replace(config, output=str(tmp_path / "again"))]


def test_a_run_keeps_its_file(tmp_path, recorded):
    recorded.run(tmp_path / "run", seed=3)
    found = read_options(tmp_path / "run" / "config.yaml")
    assert (found["seed"], found["needs"], found["steps"]) == (3, ("interest",), 4)


def test_the_command_line_comes_before_the_file(tmp_path, configs):
    path = tmp_path / "run.yaml"
    path.write_text("output: from-file\nsteps: 7\nseed: 2\nneed: [trend, explore]\ncandidates: 9\nprofile: true\n")
    command = ["train", "--config", str(path), "--steps", "8", "--need", "interest", "--no-profile"]
    assert main(command) == 2
    assert main([*command, "--output", "given", "--history", "4"]) == 2
    first, second = configs
    assert (first.output, first.steps, first.seed) == ("from-file", 8, 2)
    assert (first.needs, first.profile) == (("interest",), False)
    assert first.data_options["num_candidates"] == 9
    assert second.output == "given"
    assert (second.data_options["history_length"], second.data_options["num_candidates"]) == (4, 9)


def test_options_of_another_data_set_are_left_out(tmp_path, configs):
    path = tmp_path / "run.yaml"
    path.write_text("dataset: interactions\ndata: shop\ncolumns: user=customer\noutput: x\n")
    assert main(["train", "--config", str(path), "--dataset", "movielens"]) == 2
    assert configs[0].dataset == "movielens"
    path.write_text("relevant: 3\noutput: x\n")
    assert main(["train", "--config", str(path), "--dataset", "movielens", "--data", "ml"]) == 2
    assert configs[1].data_options["num_positives"] == 3


def test_a_mapping_says_columns(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("columns:\n  user: customer\n  item: sku\n")
    as_text = ExperimentConfig(output="x", dataset="interactions", data_options={"columns": "user=customer,item=sku"})
    options = {**read_options(path), "dataset": "interactions", "output": "x"}
    assert ExperimentConfig(**options).data_options["columns"] == as_text.data_options["columns"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 4", "there is no option 'stepz'; did you mean 'steps'?"),
        ("learning_rte: 4", "there is no option 'learning_rte'; did you mean 'learning-rate'?"),
        ("learning_rate: 1\nlearning-rate: 2", "'learning-rate' says again what 'learning_rate' said"),
        ("steps: 4\nsteps: 5", "'steps' stands twice"),
        ("steps: many", "argument --steps: invalid int value: 'many'"),
        ("steps: true", "steps takes no such value; quote words such as 'no', got True"),
        ("profile: maybe", "profile takes true or false, got 'maybe'"),
        ("no-profile: true", "there is no option 'no-profile'"),
        ("steps: [4, 5]", "steps takes one value, got [4, 5]"),
        ("steps: {a: 1}", "steps takes one value, got {'a': 1}"),
        ("credit: wap", "invalid choice: 'wap'"),
        ("gain-range: [1]", "argument --gain-range: expected 2 arguments"),
        ("- steps", "must hold options and their values, as in 'steps: 40', got ['steps']"),
        ("steps: [", "is no YAML"),
        ("config: other.yaml", "there is no option 'config'"),
    ],
)
def test_a_file_that_cannot_be_right_is_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path), "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"flexrec train: error: {path}" in said
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_no_file_and_no_output_are_said(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "none.yaml"), "--output", "x"]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "--output DIR is needed" in capsys.readouterr().err
    (tmp_path / "empty.yaml").write_text("")
    assert read_options(tmp_path / "empty.yaml") == {"data_options": {}}
