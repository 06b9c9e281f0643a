"""docs/your-data.md, followed to the letter by somebody with a shop and somebody with news.

Training is shortened, nothing else of the page's commands is changed.
"""

import json
import random
import re
import shlex
from pathlib import Path

import pytest

from flexrec.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "your-data.md").read_text()
SHORTER = {"steps": 2, "warmup_steps": 8, "listwise_steps": 20, "prompts_per_step": 32}
KINDS = ("Furniture", "Kitchen", "Garden", "Toys")


def commands(folder):
    """The page's commands about the data in ``folder``, as words."""
    lines = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    words = [shlex.split(line, comments=True) for block in lines for line in block.splitlines()]
    assert all(line[0] == "flexrec" for line in words)
    return [line[1:] for line in words if folder in line or f"runs/{folder}" in line]


def run(words):
    if words[0] == "train":
        options = [f"--{name.replace('_', '-')}={value}" for name, value in SHORTER.items()]
        words = [*words, *options, "--baselines", "random"]
    assert main(words) == 0, words


def row_of(columns):
    """The names in the page's two tables that begin with these columns."""
    return re.search(rf"^({columns}\S*) +(\S+)$", PAGE, flags=re.MULTILINE).groups()


@pytest.fixture
def taste():
    """Of 90 people, which of the four kinds each likes; items are of the kind that their number says."""
    rng = random.Random(0)
    return rng, [rng.choice(KINDS) for _ in range(90)]


def chosen_by(rng, kind, count):
    """Numbers of items from 1 to 48, most of them of this kind."""
    own = [i for i in range(1, 49) if KINDS[i % 4] == kind]
    taken = rng.sample(own, min(count - 1, len(own)))
    return rng.sample([*taken, rng.randrange(1, 49)], count)


def test_a_shop(tmp_path, monkeypatch, capsys, taste):
    monkeypatch.chdir(tmp_path)
    rng, likes = taste
    log_names, item_names = row_of("customer,")
    rows = []
    for person, kind in enumerate(likes):
        for month, item in enumerate(chosen_by(rng, kind, 9), start=1):
            day, quantity = rng.randrange(13, 28), rng.randrange(1, 4)
            rows.append(f"C-{1001 + person},SKU-{item},{day}.{month:02}.2024 {rng.randrange(10, 24)}:22,{quantity}")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "interactions.csv").write_text("\n".join([log_names, *rng.sample(rows, len(rows))]) + "\n")
    items = [f"SKU-{i},Thing {i},{KINDS[i % 4]},{i}.50" for i in range(1, 49)]
    (tmp_path / "shop" / "items.csv").write_text("\n".join([item_names, *items]) + "\n")
    (request,) = re.findall(r"^```json\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    logged = {row.split(",")[0] for row in rows}
    asked = [json.loads(request)]
    for person in range(len(likes)):
        bought = {row.split(",")[1] for row in rows if row.startswith(f"C-{1001 + person},")}
        new = [f"SKU-{i}" for i in range(1, 49) if f"SKU-{i}" not in bought]
        offered = [next(i for i in rng.sample(new, len(new)) if KINDS[int(i[4:]) % 4] == one) for one in KINDS]
        asked.append({"user": f"C-{1001 + person}", "need": "interest", "candidates": [{"id": i} for i in offered]})
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))

    describe, train, evaluate, rank = commands("shop")[:4]
    assert [describe[:2], train[0], evaluate[0], rank[0]] == [["data", "describe"], "train", "evaluate", "rank"]
    run(describe)
    said = " ".join(capsys.readouterr().out.split())
    assert "amount: interest is 0 up to 0" in said
    assert "need search" in said
    run(train)
    monkeypatch.chdir(tmp_path / "shop")  # the run knows where its data are
    run([word.replace("runs/", str(tmp_path / "runs") + "/") for word in evaluate])
    monkeypatch.chdir(tmp_path)
    assert {"interest", "explore", "trend"} == set(json.loads(Path("runs/shop/metrics.json").read_text())["trained"])
    code = main(rank)
    answers = [json.loads(line) for line in Path("rankings.jsonl").read_text().splitlines()]
    trained_on = set(json.loads(Path("runs/shop/histories.json").read_text()))
    assert trained_on <= logged
    assert code == (trained_on != logged)
    assert len(trained_on) > 0.9 * len(logged), "users who are tested on are known, too"
    right, known = 0, 0
    for one, answer, kind in zip(asked[1:], answers[1:], likes, strict=True):
        if one["user"] in trained_on:
            known += 1
            right += KINDS[int(answer["ranking"][0]["id"][4:]) % 4] == kind
        else:
            assert "is not in the log of this run" in answer["error"]
    assert known == len(trained_on)
    assert right > 0.6 * known, f"{right} of {known}, where chance gives a quarter"


def test_news(tmp_path, monkeypatch, taste):
    monkeypatch.chdir(tmp_path)
    rng, likes = taste
    log_names, item_names = row_of("user,")
    rows = []
    for person, kind in enumerate(likes):
        read = [f"N{i}" for i in chosen_by(rng, kind, 8)]
        for visit in range(3, 7):
            others = [f"N{i}" for i in rng.sample(range(1, 49), 14) if KINDS[i % 4] != kind and f"N{i}" not in read]
            shown = [f"{read[visit]}-1", *(f"{item}-0" for item in others[:5])]
            when = f"11/{13 + visit}/2024 {rng.randrange(1, 12)}:36:57 {rng.choice(['AM', 'PM'])}"
            rows.append(f"U{person},{when},{' '.join(read[:visit])},{' '.join(rng.sample(shown, len(shown)))}")
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "behaviors.csv").write_text("\n".join([log_names, *rows]) + "\n")
    items = [f"N{i},{KINDS[i % 4].lower()},Story {i}" for i in range(1, 49)]
    (tmp_path / "news" / "news.csv").write_text("\n".join([item_names, *items]) + "\n")
    (train,) = commands("news")
    run(train)
    metrics = json.loads(Path("runs/news/metrics.json").read_text())
    assert metrics["trained"]["interest"]["ndcg@5"] > metrics["baselines"]["random"]["interest"]["ndcg@5"] + 0.1
    requests = [
        {
            "history": [f"N{i}" for i in range(1, 49) if KINDS[i % 4] == kind][:5],
            "need": "interest",
            "candidates": [{"id": f"N{i}"} for i in range(41, 49)],
        }
        for kind in KINDS
    ]
    Path("requests.jsonl").write_text("".join(json.dumps(one) + "\n" for one in requests))
    assert main(["rank", "--run", "runs/news", "--input", "requests.jsonl", "--output", "rankings.jsonl"]) == 0
    for kind, line in zip(KINDS, Path("rankings.jsonl").read_text().splitlines(), strict=True):
        best, second = (int(entry["id"][1:]) % 4 for entry in json.loads(line)["ranking"][:2])
        assert KINDS[best] == kind or KINDS[second] == kind
