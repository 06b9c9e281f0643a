"""Needs from the command line: mixtures and a file of one's own are trained, evaluated and served."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from flexrec import cli
from flexrec.data import simulate
from flexrec.experiment import stages
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.needs import choose_needs, known_needs
from flexrec.experiment.run_folder import RunInfo
from flexrec.serving.ranker import Ranker
from flexrec.task import InterestTimes, JudgedGains, Need, get_need

sys.path.insert(0, str(Path(__file__).parent))
from ranking_at_random import check_above_random

REAL_DATA = Path(os.environ.get("FLEXREC_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))

NEEDS = """
- name: cheap but good
  wordings: [Show me what I will like and can afford., "The best for little money, please."]
  gain: interest * exp(-price / 20)
- name: only the best
  wordings: [Only what I will love.]
  gain: interest ** 3
- name: trending jazz
  wordings: ["Which jazz is on the rise?"]
  gain: interest * (0.1 + trend) if category in ("jazz", "cats", "football") else 0
"""
FEW = ("--steps", "1", "--warmup-steps", "4", "--prompts-per-step", "12", "--baselines", "none")


@pytest.fixture(scope="module")
def dataset():
    data = simulate(num_users=150, num_items=120, num_topics=8, num_test_users=20, num_candidates=12, history_length=8)
    price = 20 * np.exp(np.random.default_rng(5).normal(size=120))
    price[:2] = np.nan
    return dataclasses.replace(data, catalogue=dataclasses.replace(data.catalogue, columns={"price": price}))


@pytest.fixture
def simulated(dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "simulate", lambda **_: dataset)
    monkeypatch.chdir(tmp_path)
    Path("needs.yaml").write_text(NEEDS)
    return dataset


def test_each_is_trained_evaluated_and_served_from_the_command_line(simulated, capsys):
    names = ["0.6 interest + 0.4 explore", "0.5 trend + 0.3 interest + 0.2 cheap but good"]
    names += ["cheap but good", "only the best", "trending jazz"]
    asked = ["6 interest + 4 explore", *names[1:]]
    command = ["train", "--needs", "needs.yaml", "--need", *asked, "--output", "run", "--listwise-steps", "20", *FEW]
    assert cli.main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "need '6 interest + 4 explore' is '0.6 interest + 0.4 explore': weights are made to sum to 1" in said
    assert "need 'cheap but good': 2 of 120 items have nothing in price: their gain is 0" in said
    assert "need 'only the best': its gain is not interest times a factor" in said
    check_above_random("run", names, simulated, times=1.15)
    info = RunInfo.load(Path("run"))
    assert info.needs == names
    assert [need["name"] for need in info.own_needs] == ["cheap but good", "only the best", "trending jazz"]

    Path("needs.yaml").unlink()  # a run keeps what it was trained with
    again = ["0.6 interest + 0.4 explore", "cheap but good", "interest + cheap but good"]
    assert cli.main(["evaluate", "--run", "run", "--need", *again, "--json", "scores.json"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "was not trained on the need '0.5 interest + 0.5 cheap but good': it knows 0.6 interest + 0.4 explore" in said
    )
    scores = json.loads(Path("scores.json").read_text())
    assert list(scores) == [*again[:2], "0.5 interest + 0.5 cheap but good"]
    trained = json.loads(Path("run/metrics.json").read_text())["trained"]
    for name in again[:2]:
        assert scores[name]["ndcg@5"]["mean"] == pytest.approx(trained[name]["ndcg@5"], abs=1e-6)

    lst, ids = simulated.test[0], simulated.catalogue.ids
    lines = [
        {"need": need, "history": [ids[i] for i in lst.history], "candidates": [ids[i] for i in lst.candidates]}
        for need in ("cheap but good", "0.6 interest + 0.4 explore", "0.5 explore + 0.5 trend")
    ]
    Path("requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["rank", "--run", "run", "--input", "requests.jsonl", "--output", "answers.jsonl"]) == 0
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [len(answer["ranking"]) for answer in answers] == [12, 12, 12]
    assert [("warning" in answer) for answer in answers] == [False, False, True]


def test_a_description_counts_what_a_need_finds(simulated, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    given = ["data", "describe", "--needs", "needs.yaml"]
    assert cli.main([*given, "--need", "cheap but good", "0.5 interest + 0.5 trend"]) == 0
    said = capsys.readouterr().out
    assert "need 'cheap but good': 2 of 120 items have nothing in price: their gain is 0" in said
    assert [line for line in said.splitlines() if "need interest" in line] == []
    (found,) = (line for line in said.splitlines() if "need cheap but good" in line)
    assert f"{len(simulated.train)} lists" in found
    assert cli.main(given) == 0
    said = capsys.readouterr().out
    assert all(f"need {name}" in said for name in ("interest", "diverse", "cheap but good", "trending jazz"))


FILES = {
    "movielens": (
        "ml-latest-small",
        "- {name: old ones, wordings: [For all of us.], gain: 'interest * (\"Children\" in genre and year < 2000)'}",
    ),
    "kuairec": ("kuairec", "- {name: often seen, wordings: [What all know.], gain: interest * log(2 + popularity)}"),
}


@pytest.mark.parametrize("name", FILES)
def test_real_data(name, tmp_path, monkeypatch, capsys):
    folder, text = FILES[name]
    if not (REAL_DATA / folder).is_dir():
        pytest.skip(f"no {folder} in {REAL_DATA}; name its parent folder in FLEXREC_TEST_DATA")
    load = stages.load_dataset

    read = []

    def fewer(*arguments, **options):
        loaded = load(*arguments, **options)
        read.append(dataclasses.replace(loaded, train=loaded.train[:2000], test=loaded.test[:250]))
        return read[0]

    monkeypatch.setattr(stages, "load_dataset", fewer)
    monkeypatch.chdir(tmp_path)
    Path("needs.yaml").write_text(text)
    own = text.partition("name: ")[2].partition(",")[0]
    needs = ("0.7 interest + 0.3 explore", own)
    command = ["train", "--dataset", name, "--data", str(REAL_DATA / folder), "--needs", "needs.yaml", "--need", *needs]
    assert cli.main([*command, "--output", "run", "--listwise-steps", "12", *FEW]) == 0
    check_above_random("run", needs, read[0], times=1.2 if name == "movielens" else 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--need", "0.7 intrest + 0.3 explore"], "unknown need 'intrest'; did you mean 'interest'?"),
        (["--needs", "needs.yaml", "--need", "cheap but god"], "did you mean 'cheap but good'?"),
        (["--needs", "nothing.yaml"], "nothing.yaml"),
        (
            ["--needs", "wrong.yaml", "--need", "dear"],
            "wrong.yaml: need 'dear': gain: at character 12, 'prize[0]': a subscript is not allowed",
        ),
        (
            ["--needs", "unknown.yaml", "--need", "0.5 dear + 0.5 interest"],
            "need 'dear': gain: at character 12, 'prize': unknown name; did you mean 'price'?",
        ),
        (["--needs", "needs.yaml", "--need", "only the best + interest"], "'only the best' cannot be mixed"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(simulated, capsys, options, message):
    Path("wrong.yaml").write_text("- {name: dear, wordings: [W.], gain: 'interest * prize[0]'}")
    Path("unknown.yaml").write_text("- {name: dear, wordings: [W.], gain: interest * prize}")
    assert cli.main(["train", "--output", "run", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("flexrec train: error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not Path("run").exists()


def test_needs_that_the_data_cannot_answer(simulated, monkeypatch, capsys):
    without = dataclasses.replace(simulated, unsupported={"trend": "there are no times", "explore": "no categories"})
    monkeypatch.setattr(stages, "simulate", lambda **_: without)
    Path("novel.yaml").write_text("- {name: novel, wordings: [W.], gain: interest * novelty}")
    for need, reason in (
        ("0.5 interest + 0.5 trend", "cannot answer the need 'trend': there are no times"),
        ("trending jazz", "cannot answer the need 'trend': there are no times"),
    ):
        assert cli.main(["train", "--output", "run", "--needs", "needs.yaml", "--need", need]) == 2
        assert reason in capsys.readouterr().err
    assert cli.main(["train", "--output", "run", "--needs", "novel.yaml", "--need", "novel"]) == 2
    assert "cannot answer the need 'explore': no categories" in capsys.readouterr().err


def test_a_resumed_run_has_the_needs_that_it_began_with(simulated, recorded):
    options = {"needs": ("cheap but good",), "needs_file": "needs.yaml", "save_every": 2}
    recorded.interrupt(Path("run"), **options)
    Path("needs.yaml").write_text(NEEDS.replace("-price / 20", "-price / 1"))
    results = recorded.run(Path("run"), **options, resume=True)
    assert list(results.per_list["trained"]) == ["cheap but good"]
    (kept,) = RunInfo.load(Path("run")).own_needs
    assert kept["gain"] == "interest * exp(-price / 20)"
    example = recorded.stages[-1].examples[0]
    assert example.gains.max() > np.exp(-20)


def test_needs_made_in_python(simulated, recorded):
    asked = []

    def long_titles(words, histories, candidates):
        asked.append(len(histories))
        return [[len(title) for title in titles] for titles in candidates]

    def few_know(lst, catalogue):
        return 1.0 / (1.0 + lst.popularity)

    needs = [
        Need("long", ("Long titles.",), JudgedGains(long_titles, "Long titles.", high=60)),
        Need("gems", ("What few know.",), InterestTimes(few_know)),
        get_need("trend"),
    ]
    config = ExperimentConfig(
        output="run", steps=1, warmup_steps=1, listwise_steps=1, prompts_per_step=4, baselines=("none",)
    )
    results = stages.run_experiment(config, say=recorded.said.append, needs=needs)
    assert sum(count < 16 for count in asked) <= 2, "of those to train on and those to test on the last batches alone"
    assert len(asked) > 2
    names = ["long", "gems", "trend"]
    assert list(results.per_list["trained"]) == names
    assert RunInfo.load(Path("run")).needs == names
    assert json.loads(Path("run/experiment.json").read_text())["needs"] == names
    assert list(stages.evaluate_run(Path("run"), needs=[needs[0], "trend"])) == ["long", "trend"]
    with pytest.raises(ValueError, match="unknown need 'long'"):
        stages.evaluate_run(Path("run"))
    Ranker("run", needs=needs)


def test_the_needs_of_a_file_count_before_those_that_a_run_kept(simulated, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("- {name: a, wordings: [New.], gain: interest}")
    kept = [{"name": "a", "wordings": ["Old."], "gain": "interest"}, {"name": "b", "wordings": ["B."], "gain": "trend"}]
    known = known_needs(str(path), kept)
    assert known["a"].wordings == ("New.",)
    assert known["b"].wordings == ("B.",)
    asked = ["b", "trend", "b", "a + trend", "2 trend + 2 a"]
    assert [need.name for need in choose_needs(asked, known, simulated)] == ["b", "trend", "0.5 trend + 0.5 a"]
    without = dataclasses.replace(simulated, unsupported={"trend": "no times", "search": "no queries"})
    assert [need.name for need in choose_needs(None, known, without)] == [
        *("interest", "explore"),
        *("a", "b"),
    ]


def test_columns_that_prompts_do_not_show_are_said(simulated, recorded):
    changes = {"needs": ("cheap but good",), "needs_file": "needs.yaml"}
    recorded.run(Path("run"), encoding="index", **changes)
    note = "need 'cheap but good' is about price, which prompts do not show"
    assert any(said.startswith(note) for said in recorded.said)
    recorded.said.clear()
    recorded.run(Path("other"), **changes)
    assert not any("do not show" in said for said in recorded.said)
