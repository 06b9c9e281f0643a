"""The command line end to end on a small world, and what it says to a user's mistakes."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexrec.cli import main
from flexrec.data import simulate
from flexrec.experiment import stages as experiment
from flexrec.experiment.run_folder import RunFolder
from flexrec.profiling import PARTS
from flexrec.serving import ranker

SMALL = ["--steps", "4", "--warmup-steps", "3", "--listwise-steps", "2", "--prompts-per-step", "16"]
METRICS = {"ndcg@5", "ndcg@10", "ndcg@30", "recall@5", "mrr@5"}


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """The simulator with few users and items, so that a run takes seconds."""
    patch = pytest.MonkeyPatch()
    sizes = {"num_users": 80, "num_items": 90, "num_topics": 4, "num_test_users": 10, "num_candidates": 8}
    patch.setattr(experiment, "simulate", lambda **options: simulate(**{**options, **sizes}))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_world):
    folder = tmp_path_factory.mktemp("runs") / "first"
    trained_too = ["--baselines", "listwise", "sequence_grpo", "rank_grpo"]
    assert main(["train", "--output", str(folder), *SMALL, *trained_too]) == 0
    return folder


def request(run, **changes):
    catalogue = json.loads((run / "catalogue.json").read_text())
    ids, titles = catalogue["ids"], catalogue["titles"]
    base = {
        "history": ids[:3],
        "need": "interest",
        "candidates": [{"id": i, "title": t} for i, t in zip(ids[3:7], titles[3:7], strict=True)],
    }
    return {**base, **changes}


def rank(run, tmp_path, lines, *options):
    source, target = tmp_path / "requests.jsonl", tmp_path / "rankings.jsonl"
    source.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    code = main(["rank", "--run", str(run), "--input", str(source), "--output", str(target), *options])
    return code, [json.loads(line) for line in target.read_text().splitlines()]


def test_metrics_file(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"base", "trained", "baselines", "config", "seconds"} <= set(metrics)
    for system in (metrics["base"], metrics["trained"], *metrics["baselines"].values()):
        assert set(system) == {"interest", "explore", "trend"}
        assert all(set(values) == METRICS for values in system.values())
    quick = {"random", "popularity", "trend", "item-knn", "user-knn", "critic"}
    assert quick | {"listwise", "sequence_grpo", "rank_grpo"} <= set(metrics["baselines"])
    stages = {"format", "listwise warm-up", "reinforcement", "listwise", "sequence_grpo", "rank_grpo"}
    assert stages | {"item-knn", "total"} <= set(metrics["seconds"])
    assert set(metrics["change_by_reinforcement"]["trend"]) == METRICS
    assert metrics["config"]["steps"] == 4
    saved = np.load(run / "per_list.npz")
    mean = saved["trained/trend/ndcg@5"].mean()
    assert mean == pytest.approx(metrics["trained"]["trend"]["ndcg@5"])


def test_log_has_a_line_per_step(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["stage"] == "reinforcement" and "loss" in line]
    assert steps == [1, 2, 3, 4]
    assert all("reward" in line for line in lines if line["stage"] == "reinforcement" and "loss" in line)


def test_profile(tmp_path, capsys):
    """Where a step's seconds go is printed, and in the log step by step."""
    options = ["--warmup", "format", "--warmup-steps", "1", "--steps", "2", "--prompts-per-step", "8", "--profile"]
    options += ["--baselines", "none"]
    folder = tmp_path / "run"
    assert main(["train", "--output", str(folder), "--need", "interest", *options]) == 0
    shown = capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "seconds/decode" in line]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    for part in PARTS:
        if part != "critic":  # its guesses are made once an epoch
            assert part in shown
            assert sum(step.get(f"seconds/{part}", 0.0) for step in steps) > 0, part


def test_a_run_ends_with_its_report(tmp_path, capsys):
    folder = tmp_path / "run"
    few = ["--warmup", "format", "--warmup-steps", "1", "--steps", "2", "--prompts-per-step", "8", "--need", "interest"]
    assert main(["train", "--output", str(folder), *few, "--baselines", "none"]) == 0
    said = "".join(capsys.readouterr().out.split())
    assert f"Lookat{folder / 'report.html'}inabrowser" in said
    assert f"flexrecrank--run{folder}" in said
    assert not (folder / "checkpoints").exists(), "a finished run needs none"
    page = (folder / "report.html").read_text()
    for title in ("Who ranks best", "Learning curves", "Reward by rank", "Where the time goes", "The same user under"):
        assert title in page
    assert main(["report", str(folder), str(folder), "--output", str(tmp_path / "two.html")]) == 0
    assert f"{folder.name} (2) on interest: 0.000" in (tmp_path / "two.html").read_text()


def test_model_and_tokenizer_load_without_flexrec(run):
    model = AutoModelForCausalLM.from_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)


def test_evaluate_repeats_the_figures_of_training(run, tmp_path, capsys):
    scores = tmp_path / "scores.json"
    assert main(["evaluate", "--run", str(run), "--need", "interest", "--json", str(scores)]) == 0
    assert "interest" in capsys.readouterr().out
    found = json.loads(scores.read_text())
    trained = json.loads((run / "metrics.json").read_text())["trained"]
    assert set(found) == {"interest"}
    for name, value in found["interest"].items():
        assert value["mean"] == pytest.approx(trained["interest"][name])
        assert value["low"] <= value["mean"] <= value["high"]


def test_rank_answers_every_line(run, tmp_path, capsys):
    one = request(run)["candidates"][:1]
    good = request(run)
    code, answers = rank(
        run,
        tmp_path,
        [
            good,
            "{not json",
            "",
            request(run, candidates=one),
            request(run, need="no-such-need"),
            request(run, need="Put what I will love at the top, please"),
            request(run, candidates=[{"id": "unknown"}, *one]),
            request(run, candidates=[*one, *one]),
            request(run, candidates=[]),
            {k: v for k, v in request(run).items() if k != "history"},
            [1, 2],
            request(run, history=[]),
        ],
    )
    assert code == 1
    assert [a["line"] for a in answers] == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    by_line = {a["line"]: a for a in answers}
    assert sorted(x["id"] for x in by_line[1]["ranking"]) == sorted(c["id"] for c in good["candidates"])
    assert all(0 < x["probability"] <= 1 for x in by_line[1]["ranking"])
    assert by_line[1]["ranking"][-1]["probability"] == 1.0, "the last candidate is certain"
    assert by_line[4]["ranking"] == [{"id": one[0]["id"], "probability": 1.0, "score": 1.0}]
    assert "JSON" in by_line[2]["error"]
    assert "known needs" in by_line[5]["error"]
    assert "ranking" in by_line[6]
    assert "the id 'unknown' is not in the run's catalogue" in by_line[7]["error"]
    assert "more than once: the first counts" in by_line[8]["warning"]
    assert len(by_line[8]["ranking"]) == len({x["id"] for x in by_line[8]["ranking"]}) >= 1
    assert "at least one" in by_line[9]["error"]
    assert "'history'" in by_line[10]["error"]
    assert "JSON object" in by_line[11]["error"]
    assert "ranking" in by_line[12]
    assert "requests.jsonl, line 2:" in capsys.readouterr().err


def test_rank_takes_new_items_from_requests_and_tables(run, tmp_path, capsys):
    """By title and topics; a table has more than one name for its columns, and a broken one is told."""
    told = {"id": "film-1", "title": "Deep sky comets", "topics": ["astronomy"]}
    table = tmp_path / "more.csv"
    table.write_text("id,title,genres\nfilm-1,Deep sky comets,astronomy\nfilm-2,Never seen,\n")
    one = request(run)["candidates"][:1]
    by_request = [request(run, candidates=[told, *one], history=[told])]
    code, (first,) = rank(run, tmp_path, by_request)
    assert code == 0
    (tmp_path / "rankings.jsonl").unlink()
    by_table = [
        request(run, candidates=["film-1", *one], history=["film-1"]),
        request(run, candidates=["film-2", *one]),
    ]
    code, (second, third) = rank(run, tmp_path, by_table, "--items", str(table))
    assert code == 0
    assert second == first
    assert {entry["id"] for entry in third["ranking"]} == {"film-2", one[0]["id"]}
    assert main(["rank", "--run", str(run), "--input", "-", "--items", str(tmp_path / "none.csv")]) == 2
    assert f"no table of items at {tmp_path / 'none.csv'}" in capsys.readouterr().err
    table.write_text("name\nA\n")
    assert main(["rank", "--run", str(run), "--input", "-", "--items", str(table)]) == 2
    assert "more.csv" in capsys.readouterr().err


def test_rank_knows_logged_users(run, tmp_path):
    user = next(iter(json.loads((run / "histories.json").read_text())))
    without = {k: v for k, v in request(run).items() if k != "history"}
    code, answers = rank(run, tmp_path, [{**without, "user": int(user)}, {**without, "user": "nobody"}])
    assert code == 1
    assert "ranking" in answers[0]
    assert "nobody" in answers[1]["error"]


def test_rank_decodes_as_asked(run, tmp_path):
    """Greedily, by beams, by samples: what each says it does shows in its answers and their probabilities."""
    catalogue = json.loads((run / "catalogue.json").read_text())
    items = [{"id": i, "title": t} for i, t in zip(catalogue["ids"], catalogue["titles"], strict=True)]
    lines = [request(run, candidates=items[n : n + 4]) for n in range(3, 15)]

    def answers(*options):
        folder = tmp_path / "_".join(("answers", *options))
        folder.mkdir()
        code, found = rank(run, folder, lines, *options)
        assert code == 0
        return [answer["ranking"] for answer in found]

    def ids(rankings):
        return [[entry["id"] for entry in ranking] for ranking in rankings]

    def probabilities(rankings):
        return np.array([np.prod([entry["probability"] for entry in ranking]) for ranking in rankings])

    greedy, every_beam = answers(), answers("--num-beams", "24")
    assert (probabilities(every_beam) >= probabilities(greedy) - 1e-5).all(), "four candidates have 24 rankings"
    assert ids(answers("--num-beams", "1")) == ids(greedy)
    assert ids(answers("--top-p", "1e-9")) == ids(greedy), "the nucleus is the most probable item alone"

    best = answers("--best-of", "60", "--seed", "3")
    assert best == answers("--best-of", "60", "--seed", "3", "--temperature", str(info_of(run)["temperature"]))
    assert (probabilities(best) <= probabilities(every_beam) + 1e-5).all()
    one = answers("--temperature", "5.0")
    assert one == answers("--temperature", "5.0", "--seed", "0")
    assert ids(one) != ids(answers("--temperature", "5.0", "--seed", "1"))
    assert ids(one) != ids(greedy)
    assert ids(answers("--num-ranked", "2")) == [ranking[:2] for ranking in ids(greedy)]


def info_of(run):
    return json.loads((run / "flexrec.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-beams", "2", "--best-of", "2"], "choose one of the two"),
        (["--num-beams", "2", "--temperature", "1.0"], "choose one of the two"),
        (["--temperature", "0"], "temperature must be positive"),
        (["--top-p", "1.5"], "top_p must lie in (0, 1]"),
    ],
)
def test_rank_refuses_what_contradicts_itself(tmp_path, capsys, options, message):
    """Before anything is loaded: there is no such run."""
    assert main(["rank", "--run", str(tmp_path), "--input", "-", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_rank_does_not_overwrite(run, tmp_path, capsys):
    rank(run, tmp_path, [request(run)])
    before = (tmp_path / "rankings.jsonl").read_text()
    again = ["rank", "--run", str(run), "--input", str(tmp_path / "requests.jsonl")]
    assert main([*again, "--output", str(tmp_path / "rankings.jsonl")]) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "rankings.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "movielens"], "needs --data FOLDER"),
        (["--dataset", "movielens", "--data", "/no/such/folder"], "/no/such/folder"),
        (["--need", "fame"], "unknown need 'fame'"),
        (["--metric", "ndgc"], "ndgc"),
        (["--model", "/no/such/model"], "cannot be loaded"),
        (["--baseline", "rank"], "num_generations > 1"),
        (["--prompts-per-step", "100000"], "use fewer --prompts-per-step"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    folder = tmp_path / "out"
    assert main(["train", "--output", str(folder), *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert main(["train", "--output", str(folder), *SMALL, *arguments]) == 2
    assert "exists" not in capsys.readouterr().err, "a mistake leaves no folder behind that blocks the next try"


def test_existing_output_is_kept(run, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert main(["train", "--output", str(run), *SMALL]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["train", "--output", str(run), "--resume", *SMALL]) == 2
    assert "finished run" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_interrupted_run_resumes(tmp_path, monkeypatch, capsys):
    """After its last step or in the middle: what comes of it are the weights of a run that nobody interrupted."""
    options = ["--save-every", "2", *SMALL, "--need", "interest", "--beta", "0.1", "--baselines", "none"]
    folder, middle, whole = (tmp_path / name for name in ("end", "middle", "whole"))
    assert main(["train", "--output", str(whole), *options]) == 0

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", stop)
        assert main(["train", "--output", str(folder), *options]) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (folder / "metrics.json").exists()
    shutil.copytree(folder, middle)
    shutil.rmtree(middle / "checkpoints" / "checkpoint-4")
    expected = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    base = AutoModelForCausalLM.from_pretrained(whole / "base").state_dict()
    for resumed in (folder, middle):
        assert main(["train", "--output", str(resumed), *options, "--resume"]) == 0
        metrics = json.loads((resumed / "metrics.json").read_text())
        assert not {"format", "listwise warm-up"} & set(metrics["seconds"]), "finished stages are not run again"
        for system in ("base", "trained"):
            assert metrics[system] == json.loads((whole / "metrics.json").read_text())[system]
        found = AutoModelForCausalLM.from_pretrained(resumed).state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)
        assert any((expected[name] - base[name]).abs().max() > 1e-4 for name in expected)
        lines = [json.loads(line) for line in (resumed / "log.jsonl").read_text().splitlines()]
        assert [s["step"] for s in lines if s["stage"] == "reinforcement" and "loss" in s] == [1, 2, 3, 4]


def test_every_option_of_rank_reaches_the_ranker(tmp_path, monkeypatch):
    made, asked = [], []

    class Fake:
        model = torch.nn.Module()

        def __init__(self, folder, items):
            made.append(folder)
            assert items is None

        def rank(self, requests, *, decoding, generator):
            asked.append(([request["need"] for request in requests], decoding, generator.initial_seed()))
            return [{"ranking": [{"id": request["need"], "probability": 1.0}]} for request in requests]

    Fake.model.device = torch.device("cpu")
    monkeypatch.setattr(ranker, "Ranker", Fake)
    lines = [{"need": str(n)} for n in range(5)]
    options = ["--batch-size", "2", "--num-ranked", "3", "--best-of", "4", "--temperature", "0.5", "--top-p", "0.75"]
    code, answers = rank(tmp_path / "run", tmp_path, lines, *options, "--seed", "13")
    assert code == 0
    assert answers == [{"line": n + 1, "ranking": [{"id": str(n), "probability": 1.0}]} for n in range(5)]
    decoding = ranker.Decoding(num_ranked=3, best_of=4, temperature=0.5, top_p=0.75)
    assert made == [str(tmp_path / "run")]
    assert asked == [(["0", "1"], decoding, 13), (["2", "3"], decoding, 13), (["4"], decoding, 13)]
    asked.clear()
    (tmp_path / "rankings.jsonl").unlink()
    rank(tmp_path / "run", tmp_path, lines, "--num-beams", "6")
    assert asked == [(["0", "1", "2", "3", "4"], ranker.Decoding(num_beams=6), 0)]


def test_a_run_that_diverges_ends_with_advice(tmp_path, capsys):
    """And reports nothing; the last good checkpoint stays. (The first step is of a warm-up, at the rate 0.)"""
    folder = tmp_path / "run"
    options = ["--learning-rate", "1e38", "--save-every", "1", "--steps", "6", "--warmup", "format"]
    arguments = [*SMALL, "--need", "interest", "--no-critic", "--baselines", "none", *options]
    assert main(["train", "--output", str(folder), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "of reinforcement: the loss or its gradient was not finite 3 times in a row; lower the learning" in error
    assert not (folder / "metrics.json").exists()
    assert not (folder / "model.safetensors").exists()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 704 vs 598"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["open", "torch", "safetensors"],
)
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys, error):
    """However the library that was writing says it."""

    def fail(config, say):
        raise error

    monkeypatch.setattr(experiment, "run_experiment", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    for begun, what_to_do in ((False, "the same command begins again"), (True, "--resume")):
        if begun:
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "experiment.json").write_text("{}")
        assert main(["train", "--output", str(tmp_path / "run")]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert "no space is left on the disk" in shown
        assert what_to_do in shown
        assert ("--resume" in shown) == begun
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="unexpected pos"):
            main(["train", "--output", str(tmp_path / "run")])


def test_title_and_index_answers(tmp_path):
    """The other encodings, with the embedded model, through training and ranking."""
    for encoding in ("index", "title"):
        folder = tmp_path / encoding
        few = [
            "--steps",
            "2",
            "--warmup-steps",
            "1",
            "--listwise-steps",
            "1",
            "--prompts-per-step",
            "4",
        ]
        arguments = ["--encoding", encoding, "--need", "interest", "--output", str(folder)]
        assert main(["train", *few, *arguments]) == 0
        unknown = {"id": "new", "title": "Never seen before"}
        (tmp_path / encoding / "work").mkdir()
        code, answers = rank(
            folder,
            folder / "work",
            [
                request(folder, candidates=[unknown, *request(folder)["candidates"]]),
                request(folder, candidates=[{"id": "x", "title": " "}]),
            ],
        )
        assert len(answers[0]["ranking"]) == 5, "titles and labels need no vocabulary entry of their own"
        if encoding == "title":
            assert "gives no tokens" in answers[1]["error"]
        else:
            assert (code, answers[1]["ranking"][0]["id"]) == (0, "x")


def test_the_module_is_the_command():
    """`python -m flexrec.cli` did nothing, and said nothing."""
    ran = subprocess.run(
        [sys.executable, "-m", "flexrec.cli", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert (ran.returncode, ran.stdout.split()[0]) == (0, "flexrec")


def test_a_run_ends_with_its_card(run):
    """With the results that metrics.json is going to have."""
    card = (run / "README.md").read_text(encoding="utf-8")
    stored = json.loads((run / "metrics.json").read_text())["changes_ndcg@5"]
    for need, changes in stored.items():
        assert f"| {need} | **trained** | **{changes['base']['mean_new']:.3f}** | |" in card
    assert f'Ranker.from_pretrained("{run.name}")' in card
