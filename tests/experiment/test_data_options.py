"""Options of data sets: said once, taken from the command line and from Python, remembered by the run."""

import inspect
import json
from dataclasses import MISSING, fields, replace

import numpy as np
import pytest

from flexrec import cli
from flexrec.checks import flag_of
from flexrec.data import load_esci, load_interactions, load_kuairec, load_movielens
from flexrec.data.options import OPTIONS, all_data_options, said_of
from flexrec.experiment import stages
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.run_folder import RunFolder

LOADERS = {"movielens": load_movielens, "kuairec": load_kuairec, "esci": load_esci, "interactions": load_interactions}
# What each option is called and is given on the command line, and what becomes of it.
OF_LISTS = {
    "num_candidates": (["--candidates", "7"], 7),
    "history_length": (["--history", "6"], 6),
    "min_history": (["--min-history", "2"], 2),
    "lists_per_user": (["--lists-per-user", "5"], 5),
    "max_train_lists": (["--max-train-lists", "90"], 90),
    "max_test_lists": (["--max-test-lists", "80"], 80),
    "test_fraction": (["--test-fraction", "0.4"], 0.4),
    "num_positives": (["--relevant", "3"], 3),
    "split": (["--split", "time"], "time"),
    "trend_days": (["--trend-days", "2.5"], 2.5),
}
GIVEN = {
    "simulated": {
        **{name: OF_LISTS[name] for name in ("num_candidates", "history_length", "max_train_lists")},
        "observed_share": (["--observed-share", "0.03"], 0.03),
        "missing": (["--missing", "exposure"], "exposure"),
    },
    "movielens": {**OF_LISTS, "strict": (["--no-strict"], False)},
    "kuairec": {
        **{name: value for name, value in OF_LISTS.items() if name != "num_positives"},
        "strict": (["--strict"], True),
        "feedback": (["--feedback", "30"], 30),
        "matrix": (["--matrix", "small"], "small"),
    },
    "esci": {
        **{n: OF_LISTS[n] for n in ("num_candidates", "max_train_lists", "max_test_lists", "test_fraction")},
        "strict": (["--strict"], True),
        "locale": (["--locale", "jp"], "jp"),
        "version": (["--version", "large"], "large"),
        "max_candidates": (["--max-candidates", "9"], 9),
    },
    "interactions": {
        **OF_LISTS,
        "strict": (["--strict"], True),
        "columns": (["--columns", "user=a,id=b"], {"interactions": {"user": ("a",)}, "items": {"id": ("b",)}}),
        "log_file": (["--log-file", "x.csv"], "x.csv"),
        "items_file": (["--items-file", "y.csv"], "y.csv"),
        "events": (["--events", "order", "view"], ("order", "view")),
        "event_values": (["--event-values", "view=0.1, order=1"], {"view": 0.1, "order": 1.0}),
        "gain": (["--gain", "threshold"], "threshold"),
        "gain_range": (["--gain-range", "1", "4.5"], (1.0, 4.5)),
        "threshold": (["--threshold", "4"], 4.0),
        "codes": (["--codes", "0=seen,99=missing"], {0.0: "seen", 99.0: "missing"}),
        "day_first": (["--no-day-first"], False),
        "negatives": (["--negatives", "uniform"], "uniform"),
    },
}


@pytest.fixture
def configured(monkeypatch):
    """The configurations that the command line asks to be run."""
    configs = []

    def stop(config, say):
        configs.append(config)
        raise ValueError("far enough")

    monkeypatch.setattr(stages, "run_experiment", stop)
    return configs


@pytest.mark.parametrize("dataset", OPTIONS)
def test_every_option_reaches_the_configuration_from_the_command_line(configured, dataset):
    given = GIVEN[dataset]
    assert set(given) == {one.name for one in said_of(dataset)}
    for one in said_of(dataset):
        assert given[one.name][1] != one.default, f"{one.name} is to differ from its default"
        assert given[one.name][0][0] in (flag_of(one), flag_of(one).replace("--", "--no-", 1))
    arguments = [word for words, _ in given.values() for word in words]
    assert cli.main(["train", "--output", "x", "--dataset", dataset, *arguments]) == 2
    assert cli.main(["train", "--output", "x", "--dataset", dataset]) == 2
    full, default = configured[:2]
    assert full.data_options == {name: value for name, (_, value) in given.items()}
    assert default.data_options == all_data_options(dataset, {})
    python_names = [word.replace("--candidates", "--num-candidates") for word in arguments]
    assert cli.main(["train", "--output", "x", "--dataset", dataset, *python_names]) == 2
    assert configured[-1] == full, "loaders' messages name the arguments of Python"
    # What was stored is read back as it was.
    assert all_data_options(dataset, json.loads(json.dumps(full.data_options))) == full.data_options


@pytest.mark.parametrize("dataset", [name for name in OPTIONS if name != "simulated"])
def test_a_loader_takes_what_its_options_say(dataset):
    parameters = inspect.signature(LOADERS[dataset]).parameters
    assert {name: p.default for name, p in parameters.items() if name != "folder"} == {
        one.name: one.default for one in fields(OPTIONS[dataset])
    }
    with pytest.raises(TypeError, match="colour"):
        LOADERS[dataset]("nowhere", colour="red")


def test_an_option_is_the_same_for_every_data_set():
    by_name = {}
    for dataset in OPTIONS:
        for one in said_of(dataset):
            assert one.default is not MISSING
            about = {k: v for k, v in one.metadata.items() if k != "choices"}
            assert by_name.setdefault(one.name, about) == about, f"{one.name} of {dataset}"


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("movielens", ["--gain", "linear"], "--gain is no option of --dataset movielens: it is one of interactions"),
        (
            "esci",
            ["--history", "9"],
            "--history is no option of --dataset esci: it is one of simulated, movielens, kua",
        ),
        ("kuairec", ["--relevant", "3"], "--relevant is no option of --dataset kuairec: it is one of movielens, inter"),
        ("kuairec", ["--feedback", "50"], "feedback must be one of 100, 30, 10, 3 per cent, got 50"),
        ("movielens", ["--split", "given"], "split must be one of 'user', 'time'; got 'given'"),
        ("interactions", ["--candidates", "0"], "num_candidates must be at least 1, got 0"),
        ("interactions", ["--event-values", "view"], "event_values must look like view=0.1,order=1, got"),
        ("interactions", ["--codes", "none=seen"], "codes must look like 0=seen,99=missing, got"),
        ("interactions", ["--columns", "buyer=a"], "columns: unknown role 'buyer'"),
        ("python", ["--candidates", "9"], "--candidates is no option of --dataset python"),
        ("python", [], "hand it over in Python, as in run_experiment(config, dataset=dataset)"),
        ("interactions", [], "--dataset interactions needs --data FOLDER, the folder with your log"),
    ],
)
def test_what_a_data_set_does_not_take_is_refused_by_name(tmp_path, capsys, dataset, options, message):
    folder = tmp_path / "run"
    assert cli.main(["train", "--output", str(folder), "--dataset", dataset, *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not folder.exists()


def test_the_data_of_a_run_are_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ExperimentConfig(output="x", dataset="interactions", data="shop").data == str(tmp_path / "shop")
    (tmp_path / "columns.yaml").write_text("user: customer\n")
    options = ExperimentConfig(
        output="x", dataset="interactions", data_options={"columns": "columns.yaml"}
    ).data_options
    assert options["columns"] == {"interactions": {"user": ("customer",)}, "items": {}}


def test_options_of_the_data_are_remembered_by_the_run(tmp_path, recorded, monkeypatch, dataset):
    """By the one that continues it, and by whoever evaluates it."""
    asked = []
    monkeypatch.setattr(stages, "load_dataset", lambda *arguments: asked.append(arguments) or dataset)
    folder = tmp_path / "run"
    given = {"num_candidates": 9, "events": ["order"], "gain_range": [1, 5]}
    of_run = all_data_options("interactions", given)
    data = {"dataset": "interactions", "data": str(tmp_path)}
    recorded.interrupt(folder, **data, data_options=given)
    assert RunFolder(folder).read_config()["data_options"] == of_run
    with pytest.raises(ValueError, match=r"--resume continues the run .* with num_candidates=9: got 8"):
        recorded.run(folder, **data, data_options={**given, "num_candidates": 8}, resume=True)
    resumed = ["train", "--output", str(folder), "--resume", "--steps", "4"]
    assert cli.main([*resumed, "--candidates", "8"]) == 2
    assert cli.main(resumed) == 0
    assert cli.main(["evaluate", "--run", str(folder), "--relevant", "2"]) == 0
    assert asked == [
        ("interactions", str(tmp_path), 0, of_run),
        ("interactions", str(tmp_path), 0, of_run),
        ("interactions", str(tmp_path), 0, {**of_run, "num_positives": 2}),
    ]


def test_needs_are_those_that_the_data_can_answer(tmp_path, recorded, monkeypatch, dataset):
    without = replace(dataset, unsupported={"trend": "it has no times", "search": "it has no queries"})
    monkeypatch.setattr(stages, "load_dataset", lambda *_: without)
    results = recorded.run(tmp_path / "run", needs=None)
    assert list(results.per_list["trained"]) == ["interest", "explore"]
    assert json.loads((tmp_path / "run" / "flexrec.json").read_text())["needs"] == ["interest", "explore"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]["needs"] == ["interest", "explore"]
    with pytest.raises(ValueError, match="cannot answer the need 'trend': it has no times"):
        stages.evaluate_run(tmp_path / "run", needs=["trend"])


def test_a_data_set_made_in_python(tmp_path, recorded, dataset):
    """It has no name to be loaded by: who continues or evaluates the run hands it over again, the same one."""
    folder = tmp_path / "run"
    few = {"steps": 4, "warmup_steps": 3, "listwise_steps": 2, "prompts_per_step": 4, "needs": ("interest",)}
    few["baselines"] = ("none",)
    config = ExperimentConfig(output=str(folder), **few)
    recorded.stops_after = "reinforcement"
    with pytest.raises(KeyboardInterrupt):
        stages.run_experiment(config, say=recorded.said.append, dataset=dataset)
    recorded.stops_after = None
    about = json.loads((folder / "data.json").read_text())
    assert (about["name"], about["items"], about["train"]) == ("simulated", len(dataset.catalogue), len(dataset.train))
    again = replace(config, resume=True)
    with pytest.raises(ValueError, match="--resume continues the run as it was configured, with dataset='python'"):
        stages.run_experiment(again, say=recorded.said.append)
    other = replace(dataset, train=dataset.train[:-1])
    with pytest.raises(ValueError, match="on the data that it began with, and these are others"):
        stages.run_experiment(again, say=recorded.said.append, dataset=other)
    named = {"dataset": "movielens", "data": "/there"}
    for more in (named, {"data_options": {"num_candidates": 9}}):
        with pytest.raises(ValueError, match="a data set is given: leave away dataset, data and data_options"):
            stages.run_experiment(ExperimentConfig(output=str(tmp_path / "x"), **more), dataset=dataset)
    results = stages.run_experiment(again, say=recorded.said.append, dataset=dataset)
    with pytest.raises(ValueError, match=r"evaluate_run\(folder, dataset\)"):
        stages.evaluate_run(folder)
    scores = stages.evaluate_run(folder, dataset)
    assert scores["interest"]["ndcg@5"]["mean"] == pytest.approx(results.means("trained")["interest"]["ndcg@5"])


def test_who_was_trained_on_is_not_tested_on_without_a_word(tmp_path, recorded, dataset):
    """Where a log has grown, others are drawn to be tested."""
    folder, said = tmp_path / "run", []
    recorded.run(folder)
    stages.evaluate_run(folder, dataset, say=said.append)
    assert said == []
    trained = np.unique(dataset.log.users)[:2]
    changed = [replace(lst, user=int(user)) for user, lst in zip(trained, dataset.test, strict=False)]
    grown = replace(dataset, test=[*changed, *dataset.test[2:]])
    users = {lst.user for lst in grown.test}
    assert len(users) > 2
    stages.evaluate_run(folder, grown, say=said.append)
    assert len(said) == 1
    assert said[0].startswith(f"2 of {len(users)} users to test on have the ids of users that the run was trained on")
    (folder / "data.json").unlink()  # as of what was saved for others
    stages.evaluate_run(folder, grown, say=said.append)
    assert len(said) == 1


def test_the_fingerprint_knows_every_part_of_the_data(dataset):
    changed = {
        "name": "other",
        "noise": 0.5,
        "catalogue": replace(dataset.catalogue, titles=dataset.catalogue.titles[::-1]),
        "log": replace(dataset.log, interest=dataset.log.interest / 2),
        "train": [replace(dataset.train[0], query="red shoes"), *dataset.train[1:]],
        "test": [*dataset.test[:-1], replace(dataset.test[-1], interest=1 - dataset.test[-1].interest)],
    }
    prints = {replace(dataset, **{name: value}).fingerprint() for name, value in changed.items()}
    assert len(prints | {dataset.fingerprint()}) == len(changed) + 1
    assert replace(dataset, notes=("said",)).fingerprint() == dataset.fingerprint()


def test_a_data_set_is_described(tmp_path, monkeypatch, capsys, dataset):
    asked = []
    monkeypatch.setattr(stages, "load_dataset", lambda *arguments: asked.append(arguments) or dataset)
    given = ["--dataset", "interactions", "--data", str(tmp_path), "--candidates", "9", "--seed", "4"]
    assert cli.main(["data", "describe", *given]) == 0
    assert asked == [("interactions", str(tmp_path), 4, all_data_options("interactions", {"num_candidates": 9}))]
    said = " ".join(capsys.readouterr().out.split())
    for what in ("sparsity", "lists", "interest that is known", "need interest", "need explore", "need trend"):
        assert what in said
    pytest.importorskip("matplotlib")
    assert cli.main(["data", "describe", *given, "--figure", str(tmp_path / "data.png")]) == 0
    assert (tmp_path / "data.png").stat().st_size > 1000


def test_a_bad_file_is_one_line(tmp_path, capsys):
    """With the file, the line, the column, what was got and expected, and what to do."""
    rows = [f"u{user},i{item},{10**9 + 1000 * item}" for user in range(20) for item in range(12)]
    rows[3] = "u0,i3,yesterday"
    (tmp_path / "interactions.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    given = ["--dataset", "interactions", "--data", str(tmp_path)]
    assert cli.main(["data", "describe", *given, "--strict"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for what in ("flexrec data describe: error: ", "interactions.csv:5:", "timestamp", "got 'yesterday'"):
        assert what in said
    assert cli.main(["data", "describe", *given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "choose smaller min_history, num_positives or num_candidates" in said
