"""Every study from the command line, in short: two minutes on two cores at most, and a page of each."""

import json
import resource

import pytest

from flexrec.cli import main
from flexrec.experiment.studies.catalogue import STUDIES
from flexrec.experiment.studies.options import DATA_VARIABLE, StudyOptions
from flexrec.experiment.studies.store import FAILED, RUNS

CPU_SECONDS = 240.0  # two minutes on two cores


def test_all_studies_in_short(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    command = ["study", "all", "--short", "--jobs", "2", "--output", str(tmp_path)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert main(command) == 0, capsys.readouterr().out
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < CPU_SECONDS
    for study in STUDIES.values():
        folder, page = tmp_path / study.name, (tmp_path / f"{study.name}.md").read_text()
        assert not (folder / FAILED).exists()
        lines = [json.loads(line) for line in (folder / RUNS).read_text().splitlines()]
        assert {line["run"] for line in lines} == {run.name for run in study.runs(short=True)}
        assert f"flexrec study {study.name} --output studies --short" in page
        assert "\n## " in page
        assert page.count("\n| ") > 6
        for line in page.splitlines():
            if line.startswith("!["):
                assert (tmp_path / line.partition("](")[2].removesuffix(")")).is_file()
    assert "## One user under every need" in (tmp_path / "transfer.md").read_text()
    start, trained, *_ = map(json.loads, (tmp_path / "credit" / RUNS).read_text().splitlines())
    assert [start["steps"], start["rollouts"]] == [2, 0]
    assert [trained["steps"], trained["rollouts"]] == [2 + 2, 2 * 16]
    early, late = ({key: one[key] for key in ("mean", "values")} for one in start["results"])
    assert early == late, "nothing is learnt"

    kept = (tmp_path / "main" / RUNS).read_text()
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count(": 0 of ") == len(STUDIES)
    assert (tmp_path / "main" / RUNS).read_text() == kept

    (tmp_path / "cold" / RUNS).unlink()
    (tmp_path / "critic.md").unlink()
    assert main([*command, "--report", "--pack"]) == 0
    page = (tmp_path / "critic.md").read_text()
    assert not (tmp_path / "main" / RUNS).exists()
    (tmp_path / "critic.md").unlink()
    assert main([*command, "--report"]) == 0
    assert (tmp_path / "critic.md").read_text() == page, "made of the packed results"
    assert not (tmp_path / "cold" / RUNS).exists()


def test_data_that_are_not_there_are_named_and_the_rest_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setattr("flexrec.experiment.studies.study.execute", lambda todo, data, **_: {})
    assert main(["study", "main", "--output", str(tmp_path), "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert "main: 2 of 8 runs are left" in said
    for name in ("movielens", "kuairec", "esci"):
        assert f"main: left out: {name}, 2 runs: no --data {name}=DIR" in said
    monkeypatch.setenv(DATA_VARIABLE, f"movielens={tmp_path}")
    assert main(["study", "main", "--output", str(tmp_path), "--seeds", "2", "--data", f"esci={tmp_path}"]) == 0
    assert "main: 6 of 8 runs are left" in capsys.readouterr().out


def test_what_fails_is_said_in_one_line_each(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "flexrec.experiment.studies.study.execute", lambda todo, data, **_: {"main: simulated/seed0": "ValueError: x"}
    )
    assert main(["study", "main", "--output", str(tmp_path), "--seeds", "1"]) == 1
    said = capsys.readouterr().out
    assert "failed: main: simulated/seed0: ValueError: x\n" in said
    assert "1 runs failed; --retry runs these alone" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["nothing"], "there is no study 'nothing': choose of main, "),
        (["main", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["main", "--data", "movielens"], "--data takes NAME=DIR, as in movielens=ml-latest-small, got 'movielens'"),
        (["main", "--data", "movielens=/nowhere/at/all"], "--data movielens=/nowhere/at/all: there is no such folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, more, message):
    assert main(["study", "--output", str(tmp_path / "s"), *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("flexrec study: error: ")
    assert message in said
    assert said.count("\n") == 1


def test_options_name_the_studies_in_their_order():
    assert [study.name for study in StudyOptions(names=("cold", "main"), output="").studies()] == ["main", "cold"]
    assert len(StudyOptions(names=("all",), output="").studies()) == 8
