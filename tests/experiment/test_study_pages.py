"""What tables, figures and pages of studies say; and that the committed ones are what the generator makes."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from flexrec.evaluation.statistics import relative_change
from flexrec.experiment.studies.catalogue import STUDIES
from flexrec.experiment.studies.design import NO_DATA, Part, Study, Table
from flexrec.experiment.studies.figures import forest
from flexrec.experiment.studies.pages import ABOUT, everything, table_of
from flexrec.experiment.studies.results import of_lists, of_numbers
from flexrec.experiment.studies.tables import (
    comparison_rows,
    cost_rows,
    holm,
    read_csv,
    results_of,
    to_csv,
    values_rows,
)
from flexrec.trainer.options import TRAINER_CREDITS

DOCS = Path(__file__).resolve().parents[2] / "docs"
USERS = [1, 1, 2, 3, 3, 3]


def line_of(seed, values, dataset="movielens", level="new", **more):
    result = of_lists(np.array(values), USERS, metric="m", ranker=level)
    about = {"run": f"{level}{seed}", "labels": {"dataset": dataset}, "seed": seed, "made_with": "x"}
    return {**about, "cpu_seconds": [6.0, 30.0], "steps": 4, "rollouts": 8, "results": [result], **more}


def study_of(**table):
    return Study("s", "S", "?", (Part("k"),), (Table("t", "T", "ranker", ("dataset",), "m", "old", **table),))


def lines_of(dataset):
    rng = np.random.default_rng(0)
    made = {}
    for seed in range(2):
        old = rng.random(6)
        made["old", seed], made["new", seed] = old, old + 0.1 + 0.2 * rng.random(6)
    return made, [line_of(seed, values, dataset, level) for (level, seed), values in made.items()]


@pytest.mark.parametrize("dataset", ["movielens", "simulated"])
def test_differences_are_those_of_lists_in_clusters_of_users(dataset):
    """A user of real data is the same in all seeds; every seed of the simulator has users of its own."""
    made, lines = lines_of(dataset)
    (row,) = comparison_rows(study_of(), results_of(lines), num_samples=2000)
    new, old = (np.concatenate([made[level, seed] for seed in range(2)]) for level in ("new", "old"))
    users = np.array(USERS * 2) + (np.repeat([0, 10], 6) if dataset == "simulated" else 0)
    expected = relative_change(new, old, clusters=users)
    assert float(row["difference"]) == pytest.approx(expected.difference, abs=1e-4)
    assert float(row["mean"]) == pytest.approx(new.mean(), abs=1e-4)
    assert float(row["percent"]) == pytest.approx(expected.percent, abs=0.05)
    assert float(row["low"]) == pytest.approx(expected.difference_low, abs=0.02)
    assert int(row["units"]) == (6 if dataset == "simulated" else 3)
    assert int(row["seeds"]) == 2
    assert float(row["p"]) == pytest.approx(1 / 32 if dataset == "simulated" else 1 / 4, abs=0.05)
    assert float(row["effect"]) > 2


def test_a_turned_table_takes_rows_from_the_base():
    _, lines = lines_of("movielens")
    (row,) = comparison_rows(study_of(), results_of(lines), num_samples=200)
    (turned,) = comparison_rows(study_of(turned=True), results_of(lines), num_samples=200)
    assert float(turned["difference"]) == pytest.approx(-float(row["difference"]))
    assert turned["row"] == row["row"] == "new"


def test_what_no_table_tells_apart_is_an_error():
    lines = [line_of(0, [0.1] * 6), line_of(0, [0.2] * 6)]
    with pytest.raises(ValueError, match="several results in a cell"):
        comparison_rows(study_of(), results_of(lines), num_samples=10)


def test_p_values_are_adjusted_over_the_table():
    assert holm([0.01, 0.5, 0.02, 0.04]) == pytest.approx([0.04, 0.5, 0.06, 0.08])
    assert holm([0.3, 0.9]) == pytest.approx([0.6, 0.9])
    rng = np.random.default_rng(1)
    levels = {"old": rng.random(6), "a": rng.random(6), "b": rng.random(6), "c": rng.random(6)}
    lines = [line_of(0, values, level=level) for level, values in levels.items()]
    rows = comparison_rows(study_of(), results_of(lines), num_samples=200)
    assert [float(row["p_holm"]) for row in rows] == pytest.approx(holm([float(row["p"]) for row in rows]), abs=1e-4)
    assert len(rows) == 3


def test_costs_count_a_shared_start_once():
    (row,) = cost_rows([line_of(0, [0.1] * 6), line_of(0, [0.1] * 6, level="old"), line_of(1, [0.1] * 6)])
    assert (row["runs"], row["seeds"], row["steps"], row["rollouts"]) == (3, 2, 4, 8)
    assert float(row["cpu_minutes"]) == pytest.approx((3 * 30 + 2 * 6) / 60, abs=0.06)


def test_a_table_reads_as_it_was_computed(tmp_path):
    made, lines = lines_of("movielens")
    lines[0]["results"] += of_numbers({"other": 0.25}, ranker="old")
    study, results = study_of(), results_of(lines)
    for name, rows in (("v", values_rows(results)), ("c", comparison_rows(study, results, num_samples=200))):
        (tmp_path / name).write_text(to_csv(rows))
    values, comparisons = read_csv(tmp_path / "v"), read_csv(tmp_path / "c")
    assert len(values) == 3
    of_old = next(one for one in values if (one["ranker"], one["metric"]) == ("old", "m"))
    assert of_old["seeds"] == "2"
    assert float(of_old["mean"]) == pytest.approx(np.mean([made["old", 0].mean(), made["old", 1].mean()]), abs=1e-5)
    text = table_of(study, study.tables[0], values, comparisons)
    (row,) = comparisons
    star = "*" if float(row["p_holm"]) < 0.05 else ""
    shown = f"({float(row['difference']):+.3f} [{float(row['low']):+.3f}, {float(row['high']):+.3f}]{star})"
    assert f"| new | {float(row['mean']):.3f} {shown} |" in text
    assert "the row minus `old`" in text
    assert table_of(study, Table("t", "T", "ranker", ("dataset",), "absent"), values, ()) == ""


def test_a_figure_is_for_light_and_dark_pages():
    rows = [
        {"row": f"a & {i}", "column": c, "difference": "0.1", "low": "-0.1", "high": "0.3", "p_holm": p}
        for i in range(3)
        for c, p in (("one", "0.01"), ("two", "0.5"))
    ]
    text = forest("T < U", rows)
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    groups = root.findall(f"{space}g")
    assert len(groups) == 6
    assert sum(group.get("class") == "weak" for group in groups) == 3
    assert len(root.findall(f"{space}rect")) == 0, "the ground is the page's"
    assert "prefers-color-scheme: dark" in text
    shapes = [float(circle.get("cx")) for group in groups for circle in group.findall(f"{space}circle")]
    assert max(shapes) < float(root.get("width"))


def test_committed_pages_are_what_the_generator_makes():
    """After a change: python -m flexrec.experiment.studies.pages docs."""
    made = everything(DOCS)
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, path
    pages = {path.name for path in (DOCS / "results").glob("*.md")}
    assert pages == {path.name for path in made if path.parent == DOCS / "results"}
    assert all((DOCS / "results" / name.removesuffix(".md") / ABOUT).is_file() for name in pages)


def test_the_studies_are_what_was_asked_for():
    assert list(STUDIES) == [
        "main", "credit", "uncertainty", "transfer", "diverse", "critic", "cold", "estimator",
    ]  # fmt: skip
    for study in STUDIES.values():
        runs, short = study.runs(), study.runs(short=True)
        assert {run.seed for run in runs} == set(range(5))
        assert 0 < len(short) <= 10
        assert all(run.dataset in NO_DATA for run in short)
        names = {table.name for table in study.tables}
        assert len(names) == len(study.tables)
        for table in study.tables:
            labels = {name for run in runs for name in run.labels}
            assert {name for name in table.columns if name in labels} or table.columns, table.name
    credits = set(STUDIES["credit"].parts[0].axes["credit"])
    assert set(TRAINER_CREDITS) <= credits
    assert {run.labels["dataset"] for run in STUDIES["main"].runs()} == {"simulated", "movielens", "kuairec", "esci"}
