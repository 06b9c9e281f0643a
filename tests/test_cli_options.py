"""Options of the command line: each arrives where it is meant for, or is refused outside its range."""

import json
import sys
import warnings

import numpy as np
import pytest

from flexrec import cli
from flexrec.cli import build_parser, main
from flexrec.experiment import stages as experiment
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.results import Results
from flexrec.experiment.training import reinforcement_arguments


def test_every_option_of_evaluate_reaches_the_run(tmp_path, monkeypatch, capsys):
    asked = []
    scores = {"trend": {"ndcg@5": {"mean": 0.25, "low": 0.125, "high": 0.5}}}
    monkeypatch.setattr(experiment, "evaluate_run", lambda folder, **given: asked.append((folder, given)) or scores)
    options = ["--dataset", "movielens", "--data", "there", "--need", "trend", "--need", "interest"]
    assert main(["evaluate", "--run", str(tmp_path), *options, "--json", str(tmp_path / "scores.json")]) == 0
    assert main(["evaluate", "--run", str(tmp_path)]) == 0
    given = {"dataset": "movielens", "data": "there", "needs": ("trend", "interest")}
    assert asked == [(tmp_path, given), (tmp_path, {})]
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert "0.250 [0.125, 0.500]" in capsys.readouterr().out


def test_an_evaluation_of_one_user_has_no_interval(tmp_path, monkeypatch, capsys):
    nothing = float("nan")
    scores = {
        "interest": {"ndcg@5": {"mean": 0.25, "low": nothing, "high": nothing}},
        "trend": {m: {"mean": 0.125, "low": nothing, "high": nothing} for m in ("ndcg@5", "mrr@5")},
    }
    monkeypatch.setattr(experiment, "evaluate_run", lambda folder: scores)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["evaluate", "--run", str(tmp_path), "--json", str(tmp_path / "scores.json")]) == 0
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert stored["interest"]["ndcg@5"] == {"mean": 0.25, "low": None, "high": None}
    shown = capsys.readouterr().out
    assert "(one user: no interval)" in " ".join(shown.split())
    assert "nan" not in shown
    assert "0.125" in shown


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_an_evaluation_is_shown_whole_on_any_terminal(tmp_path, monkeypatch, capsys, columns):
    value = {"mean": 0.25, "low": 0.125, "high": 0.5}
    metrics = ("ndcg@5", "ndcg@10", "ndcg@30", "recall@5", "mrr@5")
    scores = {need: dict.fromkeys(metrics, value) for need in ("interest", "trend")}
    monkeypatch.setattr(experiment, "evaluate_run", lambda folder: scores)
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["evaluate", "--run", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert shown.count("0.250 [0.125, 0.500]") == len(metrics) * 2
    assert all(shown.count(f"{name} ") >= 1 for name in metrics)


def test_the_table_of_train_resamples_users(tmp_path, monkeypatch, capsys):
    users = np.repeat(np.arange(9), np.arange(9) % 4 + 1)
    rng = np.random.default_rng(0)
    per_list = {
        name: {"interest": {"ndcg@5": rng.lognormal(0.0, 0.6, 9)[users] * rng.uniform(0.2, 0.4, len(users))}}
        for name in ("base", "trained")
    }
    measured = Results(users, per_list, {"total": 7.0})
    monkeypatch.setattr(experiment, "run_experiment", lambda config, say: measured)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["train", "--output", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    change = measured.compare("trained", "base", "interest")
    assert f"{change.percent:+.1f} % [{change.percent_low:+.1f}, {change.percent_high:+.1f}]" in shown
    assert "never trained on: " not in shown
    new = {name: {"interest": {"ndcg@5": values["interest"]["ndcg@5"][:7] / 2}} for name, values in per_list.items()}
    measured.new_items = Results(users[:7], new)
    assert main(["train", "--output", str(tmp_path / "run")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Among items that were never trained on: 7 lists" in shown
    assert f"{new['trained']['interest']['ndcg@5'].mean():.3f}" in shown
    assert f"{len(users)} lists of 9 test users" in shown
    assert "7 seconds in all" in shown


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--beta", "nan", "beta must be finite, got nan"),
        ("--beta", "-1", "beta must be at least 0, got -1.0"),
        ("--learning-rate", "inf", "learning_rate must be finite, got inf"),
        ("--learning-rate", "-0.1", "learning_rate must be at least 0, got -0.1"),
        ("--temperature", "0", "temperature must be positive, got 0.0"),
        ("--entropy-coef", "-1", "entropy_coef must be at least 0"),
        ("--tilt", "0", "tilt must be positive"),
        ("--steps", "0", "steps must be at least 1, got 0"),
        ("--seed", "-1", "seed must lie in [0, 4294967295], got -1"),
        ("--save-every", "-1", "save_every must be at least 0, got -1"),
        ("--lora", "0", "lora must be at least 1, got 0"),
        ("--epsilon-low", "-0.5", "epsilon_low must be at least 0"),
    ],
)
def test_options_outside_of_their_range_are_refused(tmp_path, capsys, option, value, message):
    assert main(["train", "--output", str(tmp_path / "run"), option, value]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["rank", "--help"], ["report", "--help"]]
)
def test_help_has_examples(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "usage: flexrec" in text
    if len(options) > 1:
        assert "examples:" in text


@pytest.mark.parametrize("command", ["train", "evaluate", "report", "rank", "data describe", "study"])
def test_every_option_shows_its_default(command):
    parser = build_parser()
    for name in command.split():
        (commands,) = (action for action in parser._actions if hasattr(action, "choices") and action.nargs == "A...")
        parser = commands.choices[name]
    for action in parser._actions:
        assert action.required or action.dest == "help" or "default" in action.help, action.option_strings
        assert "default: )" not in action.help, action.option_strings


@pytest.mark.parametrize(
    ("called", "path", "shown"),
    [
        (".venv/bin/flexrec", "", ".venv/bin/flexrec"),
        ("of mine/flexrec", "", "'of mine/flexrec'"),
        (".venv/bin/flexrec", "bin", "flexrec"),
        ("-c", "", "flexrec"),
    ],
)
def test_advice_names_the_command_so_that_a_shell_finds_it(tmp_path, monkeypatch, capsys, called, path, shown):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "flexrec").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / path))
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr(cli, "_train", interrupted)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--output", "run"]) == 130
    assert "nothing was written yet: the same command begins again" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.json").touch()
    assert main(["train", "--output", "run"]) == 130
    assert f"to continue: {shown} train --resume --output run" in capsys.readouterr().err


def interrupted(arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_run_asks_nothing_by_an_old_name(tmp_path, checkpointed):
    config = ExperimentConfig(output=str(tmp_path), gradient_checkpointing=checkpointed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert reinforcement_arguments(config).gradient_checkpointing == checkpointed
