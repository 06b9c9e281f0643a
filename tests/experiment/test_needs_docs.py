"""docs/needs.md is followed to the letter: its files, its commands, its Python."""

import json
import random
import re
import shlex
from pathlib import Path

import pytest

from flexrec import cli
from flexrec.data import simulate
from flexrec.experiment import stages

PAGE = Path(__file__).resolve().parents[2] / "docs" / "needs.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
FEW = ("--steps", "1", "--warmup-steps", "1", "--listwise-steps", "8", "--prompts-per-step", "8")


def commands(word):
    lines = (line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines())
    return [shlex.split(line)[1:] for line in lines if word in line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A shop and a few films, as the page's commands name them, and its files of needs."""
    rng = random.Random(0)
    shop, films = tmp_path / "shop", tmp_path / "ml-latest-small"
    shop.mkdir()
    films.mkdir()
    events = [
        f"u{user},i{item},{5 if (user + item) % 2 else rng.randint(1, 3)},{1_600_000_000 + 3600 * (30 * user + place)}"
        for user in range(120)
        for place, item in enumerate(rng.sample(range(60), 30))
    ]
    (shop / "interactions.csv").write_text("\n".join(["user,item,rating,timestamp", *events]) + "\n")
    items = [f"i{n},Thing {n},{'AB'[n % 2]},{5 * (n % 9)},{2015 + n % 11}" for n in range(60)]
    (shop / "items.csv").write_text("\n".join(["id,title,categories,price,year", *items]) + "\n")
    movies = [f"{n},Film {n} ({1990 + n % 20}),{'Children|Comedy' if n % 3 else 'Drama'}" for n in range(1, 81)]
    (films / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]) + "\n")
    ratings = [
        f"{user},{movie},{rng.choice([2.0, 3.5, 4.5, 5.0])},{1_400_000_000 + 86400 * (40 * user + place)}"
        for user in range(1, 41)
        for place, movie in enumerate(rng.sample(range(1, 81), 45))
    ]
    (films / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]) + "\n")
    files = [text for kind, text in BLOCKS if kind == "yaml"]
    names = [command[command.index("--needs") + 1] for command in commands("--needs")]
    assert len(files) == len(names) == 3
    for name, text in zip(names, files, strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(3))
def test_files_of_needs_are_trained_and_better_than_random(folder, number):
    command = commands("--needs")[number]
    need, output = (command[command.index(option) + 1] for option in ("--need", "--output"))
    assert cli.main([*command, *FEW]) == 0
    metrics = json.loads((Path(output) / "metrics.json").read_text())
    trained, at_random = metrics["trained"][need]["ndcg@5"], metrics["baselines"]["random"][need]["ndcg@5"]
    assert trained > at_random > 0


def test_mixtures_are_trained_and_evaluated(tmp_path, monkeypatch, capsys):
    data = simulate(num_users=30, num_items=80, num_topics=4, num_test_users=6, num_candidates=8)
    monkeypatch.setattr(stages, "simulate", lambda **_: data)
    monkeypatch.chdir(tmp_path)
    (train,), (evaluate,) = commands("flexrec train --need interest"), commands("flexrec evaluate")
    assert cli.main([*train, *FEW]) == 0
    assert cli.main(evaluate) == 0
    assert "0.5 interest + 0.5 explore" in " ".join(capsys.readouterr().out.split())


def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    data = simulate(num_users=30, num_items=80, num_topics=4, num_test_users=6, num_candidates=8)
    monkeypatch.setattr(stages, "simulate", lambda **_: data)
    monkeypatch.chdir(tmp_path)
    names = {}
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
    results = names["train"]("run")
    assert list(results.per_list["trained"]) == ["hidden gems", "familiar"]
    assert Path("judgments.jsonl").is_file()


def test_the_error_that_the_page_shows_is_the_one_that_is_said(folder, capsys):
    Path("needs.yaml").write_text(Path("needs.yaml").read_text().replace("-price", "-prize"))
    (command,) = (command for command in commands("--needs") if "needs.yaml" in command)
    assert cli.main([*command, *FEW]) == 2
    expected = "need 'cheap but good': gain: at character 17, 'prize': unknown name; did you mean 'price'?"
    assert expected in capsys.readouterr().err
    assert expected in " ".join(PAGE.read_text().split())
