"""The folder of a run: comparisons over users, and what its files hold."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexrec.data.options import all_data_options
from flexrec.evaluation.statistics import relative_change
from flexrec.experiment import stages
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.results import Results
from flexrec.experiment.run_folder import RunFolder, RunInfo
from flexrec.task.critic import Critic


@pytest.fixture
def results():
    """Noisy values of lists of 12 users with 1 to 5 lists each."""
    users = np.repeat(np.arange(12) * 2, np.arange(12) % 5 + 1)
    rng = np.random.default_rng(0)

    def values(factor):
        of_users = rng.lognormal(0.0, 0.5, users.max() + 1)[users]
        return {m: factor * of_users * rng.uniform(0.1, 0.5, len(users)) for m in ("ndcg@5", "mrr@5")}

    needs = ("interest", "trend")
    factors = {"base": 1.0, "trained": 1.4, "listwise": 1.2, "random": 0.5}
    per_list = {name: {need: values(factor) for need in needs} for name, factor in factors.items()}
    return Results(users, per_list, {"format": 1.23456, "total": 7.0})


def test_comparisons_resample_users(results):
    new, base = (results.per_list[name]["trend"] for name in ("trained", "random"))
    expected = relative_change(new["ndcg@5"], base["ndcg@5"], clusters=results.users)
    assert results.compare("trained", "random", "trend") == expected
    assert expected != relative_change(new["ndcg@5"], base["ndcg@5"])
    assert results.compare("trained", "random", "trend", "mrr@5") == relative_change(
        new["mrr@5"], base["mrr@5"], clusters=results.users
    )


def test_files_hold_every_value_and_every_comparison(tmp_path, results):
    RunFolder(tmp_path).write_results({"seed": 3}, results)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "per_list.npz"}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["config"] == {"seed": 3}
    assert metrics["seconds"] == {"format": 1.23, "total": 7.0}
    assert set(metrics["baselines"]) == {"listwise", "random"}
    for name, needs in results.per_list.items():
        stated = metrics["baselines"].get(name) or metrics[name]
        for need, values in needs.items():
            assert stated[need] == pytest.approx({metric: v.mean() for metric, v in values.items()})
    for need in ("interest", "trend"):
        for base in ("base", "listwise", "random"):
            expected = dataclasses.asdict(results.compare("trained", base, need))
            assert metrics["changes_ndcg@5"][need][base] == pytest.approx(expected)
    saved = np.load(tmp_path / "per_list.npz")
    np.testing.assert_array_equal(saved["users"], results.users)
    for name, needs in results.per_list.items():
        for need, values in needs.items():
            for metric, v in values.items():
                np.testing.assert_array_equal(saved[f"{name}/{need}/{metric}"], v)


def test_histories_are_the_latest_events_with_what_was_liked(tmp_path, recorded, dataset):
    recorded.run(tmp_path / "run")
    histories = json.loads((tmp_path / "run" / "histories.json").read_text())
    log, ids = dataset.log, dataset.catalogue.ids
    logged = {str(user) for user in np.unique(log.users)}
    tested = {str(lst.user): lst for lst in sorted(dataset.test, key=lambda lst: lst.time) if len(lst.history)}
    assert set(histories) == logged | set(tested) > logged
    for user in set(tested) - logged:  # what was known when they were asked last
        lst = tested[user]
        assert [event["id"] for event in histories[user]] == [ids[item] for item in lst.history][-5:]
        interest = [np.nan if event["interest"] is None else event["interest"] for event in histories[user]]
        np.testing.assert_array_equal(np.array(interest, dtype=np.float32), lst.history_interest[-5:])
    liked = []
    for user in logged:
        events = histories[user]
        rows = np.flatnonzero(log.users == int(user))
        assert len(rows) > 5
        in_time = rows[np.argsort(log.times[rows], kind="stable")].tolist()
        latest = sorted({log.items[row]: n for n, row in enumerate(in_time)}.values())[-5:]  # each item once
        latest = np.array(in_time)[latest]
        assert [event["id"] for event in events] == [ids[log.items[row]] for row in latest]
        assert [event["interest"] for event in events] == log.interest[latest].tolist()
        liked += [event["interest"] >= 0.5 for event in events]
    assert set(liked) == {True, False}


def test_a_history_has_an_item_once_at_its_latest_as_lists_have(tmp_path, recorded, dataset, monkeypatch):
    """Of a log in which users come back to items."""
    log, ids = dataset.log, dataset.catalogue.ids
    user = int(log.users[-1])
    rows = np.flatnonzero(log.users == user)[-6:]
    items, interest = log.items.copy(), log.interest.copy()
    items[rows[-1]], interest[rows[-1]] = items[rows[1]], 0.875
    again = dataclasses.replace(dataset, log=dataclasses.replace(log, items=items, interest=interest))
    monkeypatch.setattr(stages, "simulate", lambda **options: again)
    recorded.run(tmp_path / "run")
    history = json.loads((tmp_path / "run" / "histories.json").read_text())[str(user)]
    latest = [rows[0], *rows[2:]]
    assert [event["id"] for event in history] == [ids[items[row]] for row in latest]
    assert [event["interest"] for event in history] == interest[latest].tolist()


def test_the_catalogue_is_saved_with_titles_and_what_rises(tmp_path, recorded, dataset):
    recorded.run(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "catalogue.json").read_text())
    assert (tuple(saved["ids"]), tuple(saved["titles"])) == (dataset.catalogue.ids, dataset.catalogue.titles)
    assert tuple(map(tuple, saved["topics"])) == dataset.catalogue.topics
    trend = dict(zip(dataset.catalogue.ids, dataset.trend.tolist(), strict=True))
    assert saved["trend"] == {i: pytest.approx(t, abs=1e-4) for i, t in trend.items() if t > 0}
    assert len(saved["trend"]) > 3


def test_the_run_says_how_it_is_to_be_asked(tmp_path, recorded):
    options = {"num_ranked": 5, "temperature": 0.6, "seed": 13}
    recorded.run(tmp_path / "run", **options)
    expected = {
        "encoding": "item_token",
        "show_titles": False,
        "show_rising": False,
        "max_history": 5,
        "num_ranked": 5,
        "temperature": 0.6,
        "dataset": "simulated",
        "data": None,
        "data_options": all_data_options("simulated", {}),
        "needs": ["interest"],
        "seed": 13,
        "described": True,
        "show": ["title"],
        "max_title_tokens": None,
        "mode": "decode",
        "max_reasoning_tokens": None,
        "reasoning_end": None,
        "model": "embedded",
        "own_needs": [],
    }
    for folder in (tmp_path / "run", tmp_path / "run" / "base"):
        assert json.loads((folder / "flexrec.json").read_text()) == expected
    assert recorded.saved_mark(tmp_path / "run") == 112.0
    assert recorded.saved_mark(tmp_path / "run" / "base") == 2.0
    recorded.run(tmp_path / "index", encoding="index", needs=("explore", "trend"))
    found = json.loads((tmp_path / "index" / "flexrec.json").read_text())
    assert (found["encoding"], found["show_titles"], found["show_rising"]) == ("index", True, True)
    assert (found["needs"], found["num_ranked"], found["temperature"]) == (["explore", "trend"], None, 0.3)


def test_a_request_may_show_as_much_history_as_the_longest_that_was_trained(dataset):
    """Some users had little before their list: that does not shorten what others are shown."""
    lists = [dataclasses.replace(lst, history=lst.history[: i % 5 + 1]) for i, lst in enumerate(dataset.train[:9])]
    assert {len(lst.history) for lst in lists} == {1, 2, 3, 4, 5}
    trained_on = dataclasses.replace(dataset, train=lists)
    builder = SimpleNamespace(encoding="index", show_titles=True, show_rising=False, show=("title",), described=False)
    builder.max_title_tokens = None
    assert RunInfo.of(ExperimentConfig(output="unused"), builder, trained_on, []).max_history == 5


def test_metrics_compare_users_and_state_the_configuration(tmp_path, recorded):
    folder = tmp_path / "run"
    results = recorded.run(folder, seed=13, metric="recall@3")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["config"] == json.loads(
        json.dumps(
            dataclasses.asdict(
                ExperimentConfig(
                    output=str(folder),
                    steps=4,
                    warmup_steps=3,
                    listwise_steps=2,
                    prompts_per_step=4,
                    needs=("interest",),
                    baselines=("none",),
                    seed=13,
                    metric="recall@3",
                )
            )
        )
    )
    changes = metrics["changes_ndcg@5"]["interest"]
    assert set(changes) == set(results.per_list) - {"trained"}
    for base, change in changes.items():
        assert change == pytest.approx(dataclasses.asdict(results.compare("trained", base, "interest")), nan_ok=True)


@pytest.mark.parametrize("lora", [{}, {"lora": 2, "lora_save": "adapter"}], ids=["whole", "adapter"])
def test_what_a_run_wrote_is_loaded_from_there_alone_and_executes_nothing(tmp_path, recorded, monkeypatch, lora):
    asked = []
    for loader in (AutoModelForCausalLM, AutoTokenizer):

        def spy(name, *args, load=loader.from_pretrained, **options):
            asked.append((Path(name), options.get("local_files_only"), options.get("trust_remote_code")))
            return load(name, *args, **options)

        monkeypatch.setattr(loader, "from_pretrained", spy)
    folder = tmp_path / "run"
    beta = {"beta": 0.1}
    recorded.interrupt(folder, **beta, **lora)
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    recorded.of("reinforcement")[0].model.save_pretrained(checkpoint)
    RunFolder(folder).seal(checkpoint)
    recorded.run(folder, **beta, **lora, resume=True)
    RunFolder(folder).load()
    loaded = {path.relative_to(folder).as_posix() for path, *_ in asked}
    assert loaded >= ({"base", "backbone", "."} if lora else {"base", "reference", "."})
    assert {(local, remote_code) for _, local, remote_code in asked} == {(True, False)}


def test_files_of_a_run_have_the_mode_that_others_have(tmp_path, recorded):
    before = os.umask(0o027)
    try:
        recorded.run(tmp_path / "run", beta=0.1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"model.safetensors", "tokenizer.json", "metrics.json", "per_list.npz", "log.jsonl"} <= set(modes)
    assert {name: mode for name, mode in modes.items() if mode != 0o640} == {}


def test_a_runs_critic_is_loaded_with_its_catalogue(tmp_path, recorded, dataset):
    recorded.run(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    critic = Critic.fit(dataset.log, dataset.catalogue, lists=dataset.train, model="knn", noise=dataset.noise)
    folder.save_critic(critic)
    loaded = folder.load_critic()
    for one, other in zip(critic.fill_many(dataset.train), loaded.fill_many(dataset.train), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    (tmp_path / "run" / "critic.npz").unlink()
    with pytest.raises(FileNotFoundError, match="holds no critic"):
        folder.load_critic()
