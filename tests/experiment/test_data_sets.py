"""Every data set trains and is evaluated from the command line, for each need that it can answer."""

import json
import os
from pathlib import Path

import pytest

from flexrec.cli import main

REAL_DATA = Path(os.environ.get("FLEXREC_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
SHORT = ["--steps", "2", "--warmup-steps", "6", "--listwise-steps", "16", "--prompts-per-step", "32"]
OF_LISTS = ["--candidates", "10", "--history", "10", "--max-train-lists", "600", "--max-test-lists", "150"]


@pytest.mark.parametrize(
    ("dataset", "folder", "needs", "options"),
    [
        ("movielens", "ml-latest-small", ["interest", "explore", "trend"], ["--relevant", "4"]),
        ("kuairec", "kuairec", ["interest", "explore"], ["--feedback", "100"]),
        (
            "interactions",
            "ml-latest-small",
            ["interest", "explore", "trend"],
            ["--relevant", "4", "--trend-days", "9"],
        ),
        ("esci", "esci", ["search"], []),
    ],
)
def test_every_data_set_trains_for_every_need(tmp_path, capsys, dataset, folder, needs, options):
    data = REAL_DATA / folder
    if not data.is_dir():
        pytest.skip(f"no {folder} in {REAL_DATA}; name its parent folder in FLEXREC_TEST_DATA")
    run, of_data = tmp_path / "run", [*OF_LISTS, *options]
    if dataset == "esci":
        of_data = ["--candidates", "12"]
    given = ["--dataset", dataset, "--data", str(data), *of_data]
    assert main(["train", "--output", str(run), *given, *SHORT, "--baselines", "random"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["trained"]) == needs
    for need in needs:
        trained, by_chance = metrics["trained"][need]["ndcg@5"], metrics["baselines"]["random"][need]["ndcg@5"]
        assert trained > by_chance, (need, trained, by_chance)
    said = " ".join(capsys.readouterr().out.split())
    for note in json.loads((run / "data.json").read_text())["notes"]:
        assert " ".join(note.split()) in said
    assert main(["evaluate", "--run", str(run), "--need", needs[0], "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores[needs[0]]["ndcg@5"]["mean"] == pytest.approx(metrics["trained"][needs[0]]["ndcg@5"], abs=1e-6)
