"""Studies are executed to the end: resumed at the run where they were killed, failed runs named and retried alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexrec.experiment.studies.design import ANY_LEVEL, Part, Study, Table, in_groups, split_options
from flexrec.experiment.studies.runner import LOG, Job, execute
from flexrec.experiment.studies.store import FAILED, PACKED, RUNS, Store

HERE = Path(__file__).parent
VALUES = {"low": {"value": 1}, "high": {"value": 2}}


def study_of(levels, seeds=2, **more):
    part = Part("own_kind:Noted", datasets=("none",), axes={"level": levels}, seeds=seeds, **more)
    table = Table("t", "T", "level", ("dataset",), "m", next(iter(levels)))
    return Study("own", "Own", "What comes of it?", (part,), (table,))


@pytest.fixture(autouse=True)
def own_kind_is_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))


def run(study, folder, jobs=1, retry=False):
    folder.mkdir(exist_ok=True)
    store, said = Store(folder), []
    failed = execute([Job(store.left(study.runs(), retry), store, folder)], {}, jobs=jobs, say=said.append)
    return failed, said, Store(folder)


def executed(folder):
    return [line for line in (folder / "executed").read_text().splitlines() if not line.startswith("start")]


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_run_is_executed_once_with_a_shared_start(tmp_path, jobs):
    study = study_of(VALUES)
    failed, said, store = run(study, tmp_path / "s", jobs)
    names = [one.name for one in study.runs()]
    assert names == ["none/low/seed0", "none/high/seed0", "none/low/seed1", "none/high/seed1"]
    assert not failed
    assert sorted(executed(tmp_path / "s")) == sorted(names)
    starts = (tmp_path / "s" / "executed").read_text().count("start")
    assert starts == 2, "one for each seed"
    means = [store.of(study.runs())[name]["results"][0]["mean"] for name in names]
    assert means == pytest.approx([0.12, 0.22, 0.12, 0.22])
    assert store.lines[0]["steps"] == 3
    assert said[-1].startswith("[4/4, 0 s left] own: ")
    assert "what it prints" in (tmp_path / "s" / LOG).read_text()
    run(study, tmp_path / "s", jobs)
    assert len(executed(tmp_path / "s")) == 4, "what is done is not done again"


@pytest.mark.parametrize(("do", "reason"), [("fail", "ValueError: not today"), ("die", "ended with signal SIGKILL")])
def test_failed_runs_are_named_left_alone_and_retried_alone(tmp_path, do, reason):
    study = study_of({"low": VALUES["low"], "bad": {"value": 3, "do": do}, "high": VALUES["high"]}, seeds=1)
    folder = tmp_path / "s"
    failed, said, store = run(study, folder)
    assert list(failed) == ["own: none/bad/seed0"]
    assert reason in failed["own: none/bad/seed0"]
    assert any("none/bad/seed0 failed: " in one and reason in one for one in said)
    assert sorted(store.of(study.runs())) == ["none/high/seed0", "none/low/seed0"], "the others were executed"
    assert list(json.loads((folder / FAILED).read_text())) == ["none/bad/seed0"]
    before = executed(folder)
    assert run(study, folder)[0] == {}
    assert executed(folder) == before, "not again unless asked"
    (folder / "mended").touch()
    failed, _, store = run(study, folder, retry=True)
    assert not failed
    assert executed(folder) == [*before, "none/bad/seed0"]
    assert not store.failed
    assert len(store.of(study.runs())) == 3


def test_a_start_that_fails_fails_all_of_its_runs(tmp_path):
    part = Part("own_kind:Nowhere", datasets=("none",), axes={"level": VALUES}, seeds=1)
    failed, _, _ = run(Study("own", "Own", "", (part,), ()), tmp_path / "s")
    assert len(failed) == 2
    assert all("AttributeError" in reason for reason in failed.values())


KILLED = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_study_runs import SLOW, run, study_of
if __name__ == "__main__":
    run(study_of(SLOW, seeds=1), Path({folder!r}))
"""
SLOW = {f"level{i}": {"value": i, "sleep": 0.3} for i in range(6)}


def test_a_study_that_was_killed_goes_on_and_leaves_no_process(tmp_path):
    folder = tmp_path / "s"
    script = KILLED.format(here=str(HERE), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script])
    lines = folder / RUNS
    deadline = time.monotonic() + 60
    while not (lines.exists() and lines.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.8)
    done = executed(folder)
    assert 2 <= len(done) < 6
    time.sleep(0.8)
    assert executed(folder) == done, "the worker has ended with who started it"
    study = study_of(SLOW, seeds=1)
    failed, _, store = run(study, folder)
    assert not failed
    assert len(store.of(study.runs())) == 6
    assert len(executed(folder)) <= 7, "at most the run that was killed is executed again"
    names = [line["run"] for line in store.lines]
    assert sorted(names) == sorted(one.name for one in study.runs())


def test_a_line_that_was_not_written_to_its_end_is_taken_away(tmp_path):
    study = study_of(VALUES, seeds=1)
    run(study, tmp_path)
    path = tmp_path / RUNS
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    store = Store(tmp_path)
    assert list(store.of(study.runs())) == ["none/low/seed0"]
    assert path.read_bytes() == whole[: whole.index(b"\n") + 1]
    run(study, tmp_path)
    assert len(path.read_text().splitlines()) == 2
    path.write_bytes(b'{"run": 1}\n' + whole)
    with pytest.raises(ValueError, match=r"runs.jsonl, line 1 is damaged \(KeyError"):
        Store(tmp_path)


def test_packed_results_are_gone_on_from(tmp_path):
    more = {**VALUES, "more": {"value": 4}}
    run(study_of(VALUES, seeds=1), tmp_path)
    before = Store(tmp_path).lines
    Store(tmp_path).pack()
    assert not (tmp_path / RUNS).exists()
    assert Store(tmp_path).lines == before
    run(study_of(more, seeds=2), tmp_path)
    added = (tmp_path / RUNS).read_text().splitlines()
    assert [json.loads(line)["run"] for line in added] == [
        "none/more/seed0",
        *(f"none/{level}/seed1" for level in more),
    ], "nothing that is packed is done again"
    store = Store(tmp_path)
    assert len(store.of(study_of(more, seeds=2).runs())) == 6
    store.pack()
    assert len(Store(tmp_path).lines) == 6, "nothing is lost"
    (tmp_path / RUNS).write_text("".join(line + "\n" for line in added))  # as if killed before this was taken away
    store = Store(tmp_path)
    assert len(store.lines) == 10
    store.pack()
    assert len(Store(tmp_path).lines) == 6
    packed = tmp_path / PACKED
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"runs.jsonl.xz is damaged"):
        Store(tmp_path)


def test_results_of_other_options_do_not_count(tmp_path):
    run(study_of(VALUES, seeds=1), tmp_path)
    changed = study_of({**VALUES, "high": {"value": 5}}, seeds=1)
    store = Store(tmp_path)
    assert list(store.of(changed.runs())) == ["none/low/seed0"]
    assert store.outdated(changed.runs()) == 1


def test_parts_are_products_of_their_axes():
    part = Part(
        "k",
        "p",
        datasets=("simulated", "movielens"),
        axes={"a": {"a1": {"x": 1}, "a2": {"x": 2}, "a3": {"x": 3}}, "b": {"b1": {"data.y": 4}, "b2": {"data.y": 5}}},
        shared=("b",),
        start={"z": 6},
        of_dataset={"movielens": {"z": 7}},
        without=({"dataset": "movielens", "a": ("a2", "a3")}, {"a": "a3", "b": ANY_LEVEL}),
        seeds=2,
        short_start={"w": 8},
        short_axes={"a": ("a2",)},
    )
    runs = part.runs("s")
    names = {run.name for run in runs if run.seed == 0}
    simulated = {f"p/simulated/{a}/{b}/seed0" for a in ("a1", "a2") for b in ("b1", "b2")}
    assert names == simulated | {"p/movielens/a1/b1/seed0", "p/movielens/a1/b2/seed0"}
    assert len(runs) == 12
    one = next(run for run in runs if run.name == "p/movielens/a1/b2/seed1")
    assert (one.start, one.options, one.seed) == ({"z": 7, "data.y": 5}, {"x": 1}, 1)
    assert [len(group) for group in in_groups([run for run in runs if run.seed == 0])] == [2, 2, 1, 1]
    assert len(part.runs("s", seeds=4)) == 24
    short = part.runs("s", short=True)
    assert [run.name for run in short] == ["p/simulated/a2/b1/seed0", "p/simulated/a2/b2/seed0"]
    assert short[0].start == {"z": 6, "w": 8, "data.y": 4}
    assert len({run.made_with for run in [*runs[:1], *short]}) == 3
    assert split_options(one.start) == ({"y": 5}, {"z": 7})


def test_two_runs_of_one_name_are_an_error():
    part = Part("k", axes={"a": {"a1": {}}})
    with pytest.raises(ValueError, match="two runs called 'simulated/a1/seed0': its parts need names"):
        Study("s", "S", "", (part, part), ()).runs()
