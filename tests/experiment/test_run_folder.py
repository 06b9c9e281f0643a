"""What an experiment measured: metrics of whole rankings, comparisons over users, and the files they are written to."""

import dataclasses
import json

import numpy as np
import pytest

from flexrec.evaluation.statistics import METRICS, relative_change
from flexrec.experiment import run_folder as module
from flexrec.experiment.run_folder import Evaluation, Results, write_results
from flexrec.task.examples import Example


def example(gains, user=0, need="interest"):
    gains = np.array(gains, dtype=np.float32)
    return Example([1], [[10 + i] for i in range(len(gains))], gains, np.zeros_like(gains), (0, 0), need, user)


def ndcg(in_order, cutoff, shown=None, ideal=None):
    ideal = np.sort(in_order if ideal is None else ideal)[::-1]
    discount = 1 / np.log2(np.arange(2, len(in_order) + 2))
    seen = np.where(np.arange(len(in_order)) < (len(in_order) if shown is None else shown), in_order, 0.0)
    return (seen * discount)[:cutoff].sum() / (ideal * discount)[:cutoff].sum()


def test_rankings_are_scored_item_by_item():
    tests = {"interest": [example([0.1, 0.9, 0.0, 0.4, 0.2, 0.7, 0.3]), example([0.5, 0.0, 1.0])]}
    rankings = [np.array([3, 0, 5, 1, 2, 6, 4]), np.array([1, 2, 0])]
    values = Evaluation(tests, None, None).of_rankings({"interest": rankings})["interest"]
    assert set(values) == set(METRICS)
    in_order = [e.gains[ranking] for e, ranking in zip(tests["interest"], rankings, strict=True)]
    np.testing.assert_allclose(values["ndcg@5"], [ndcg(gains, 5) for gains in in_order], rtol=1e-6)
    np.testing.assert_allclose(values["ndcg@30"], [ndcg(gains, 30) for gains in in_order], rtol=1e-6)
    assert values["ndcg@5"][0] != pytest.approx(values["ndcg@30"][0])


def test_items_that_were_not_ranked_count_in_the_ideal_and_nowhere_else():
    tests = {"interest": [example([0.1, 0.9, 0.0, 0.4, 1.0]), example([0.5, 0.0, 1.0])]}
    rankings = [np.array([3, 0]), np.array([1, 2])]
    values = Evaluation(tests, None, 2).of_rankings({"interest": rankings})["interest"]
    expected = [
        ndcg(np.array([0.4, 0.1, 0.9, 0.0, 1.0]), 5, shown=2),
        ndcg(np.array([0.0, 1.0, 0.5]), 5, shown=2),
    ]
    np.testing.assert_allclose(values["ndcg@5"], expected, rtol=1e-6)
    np.testing.assert_allclose(values["recall@5"], [2 / 4, 1 / 2], rtol=1e-6)


def test_every_need_is_ranked_with_the_prompt_builder_and_length_given(monkeypatch):
    asked = []

    def rank(model, examples, builder, *, num_ranked, description):
        asked.append((model, [e.need for e in examples], builder, num_ranked, description))
        return [np.arange(num_ranked)[::-1] for _ in examples]

    monkeypatch.setattr(module, "rank_examples", rank)
    tests = {"interest": [example([0.1, 0.2, 1.0])], "trend": [example([0.3, 0.5, 1.0], need="trend")] * 2}
    values = Evaluation(tests, "builder", 2)("model", "step 5")
    assert asked == [
        ("model", ["interest"], "builder", 2, "Evaluating step 5, interest"),
        ("model", ["trend", "trend"], "builder", 2, "Evaluating step 5, trend"),
    ]
    np.testing.assert_allclose(values["interest"]["ndcg@5"], [ndcg(np.array([0.2, 0.1, 1.0]), 5, shown=2)], rtol=1e-6)
    np.testing.assert_allclose(values["trend"]["ndcg@5"], [ndcg(np.array([0.5, 0.3, 1.0]), 5, shown=2)] * 2, rtol=1e-6)


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
    write_results(tmp_path, {"seed": 3}, results)
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
