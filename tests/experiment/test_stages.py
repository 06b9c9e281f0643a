"""What the stages of an experiment learn from, in which order they come, and what is measured after each."""

import dataclasses
import json

import numpy as np
import pytest

from flexrec.evaluation.statistics import bootstrap_interval
from flexrec.experiment import stages
from flexrec.trainer.callbacks import Curve


def test_every_stage_learns_from_what_the_critic_filled(tmp_path, recorded, dataset):
    recorded.run(tmp_path / "run")
    unknown = [np.isnan(lst.interest).sum() for lst in dataset.train]
    assert sum(unknown) > len(unknown)
    for stage in (*recorded.of("listwise"), *recorded.of("reinforcement")):
        for i, lst in enumerate(dataset.train):
            example = stage.examples[i]
            filled = np.where(np.isnan(lst.interest), np.float32(recorded.guess), lst.interest)
            np.testing.assert_array_equal(np.sort(example.gains), np.sort(filled))
            assert (example.variance > 0).sum() == unknown[i]


def test_without_a_critic_supervision_imitates_the_feedback(tmp_path, recorded, dataset):
    recorded.run(tmp_path / "run", critic=False)
    for stage in recorded.of("listwise"):
        for i, lst in enumerate(dataset.train):
            np.testing.assert_array_equal(np.sort(stage.examples[i].gains), np.sort(np.nan_to_num(lst.interest)))
            assert not stage.examples[i].variance.any()


@pytest.mark.parametrize(
    ("metric", "num_ranked", "expected"),
    [("ndcg@4", None, 4), ("ndcg@4", 3, 3), ("ndcg@4", 6, 4), ("ndcg", None, None)],
)
def test_supervision_imitates_the_ranks_that_earn(tmp_path, recorded, metric, num_ranked, expected):
    recorded.run(tmp_path / "run", metric=metric, num_ranked=num_ranked, listwise_baseline=False)
    assert [stage.options["num_imitated"] for stage in recorded.of("listwise")] == [expected]


def test_the_warm_start_and_the_critic_are_rows(tmp_path, recorded, dataset):
    results = recorded.run(tmp_path / "run", needs=("interest", "trend"), listwise_baseline=False)
    assert recorded.marks()["warm start"] == 12.0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["warm start"]["trend"] == pytest.approx(results.means("warm start")["trend"])
    assert "warm start" not in metrics["baselines"]
    of_start = dataclasses.asdict(results.compare("trained", "warm start", "trend"))
    assert metrics["changes_ndcg@5"]["trend"]["warm start"] == pytest.approx(of_start, nan_ok=True)
    for need, factor in (("interest", lambda lst: 1.0), ("trend", lambda lst: lst.trend)):
        expected = []
        for lst in dataset.test:
            gains = (lst.truth * factor(lst)).astype(np.float64)
            order = np.argsort(-lst.candidates.astype(np.float32) * factor(lst), kind="stable")
            expected.append(ndcg_at_5(gains[order]) if gains.any() else 0.0)
        np.testing.assert_allclose(results.per_list["critic"][need]["ndcg@5"], expected, rtol=1e-5)
    assert "critic" in metrics["baselines"]


@pytest.mark.parametrize(
    ("asked", "unobserved", "fitted"),
    [(None, "critic", True), (None, "zero", False), (False, "critic", False), (True, "zero", True)],
)
def test_the_critic_is_fitted_as_asked_or_as_the_data_need_it(
    tmp_path, recorded, monkeypatch, dataset, asked, unobserved, fitted
):
    monkeypatch.setattr(stages, "simulate", lambda seed: dataclasses.replace(dataset, unobserved=unobserved))
    recorded.run(tmp_path / "run", critic=asked, listwise_baseline=False)
    assert ("critic" in recorded.seeds) == fitted
    task = recorded.of("reinforcement")[0].examples.task
    assert (task.critic is not None) == fitted
    if fitted:  # only feedback that was not chosen by what was liked
        assert len(recorded.lists_of_critic) == (len(dataset.train) if unobserved == "critic" else 0)


def test_lists_are_drawn_anew_for_every_stage(tmp_path, recorded, monkeypatch, dataset):
    """Where the data set can: the lists of another epoch come from its ``resample``."""
    drawn = []
    again = dataclasses.replace(dataset, resample=lambda seed: drawn.append(seed) or dataset.train[::-1])
    monkeypatch.setattr(stages, "simulate", lambda seed: again)
    recorded.run(tmp_path / "run", seed=13)
    for stage in recorded.stages:
        stage.examples.set_epoch(2)
    assert drawn == [15], "all stages share one set of examples"


def test_systems_are_measured_on_the_test_users_after_their_stages(tmp_path, recorded, dataset):
    results = recorded.run(tmp_path / "run", num_ranked=5)
    # The base after the format stage; the trained model after the warm-up too; the baseline from the base again.
    assert [stage.stage for stage in recorded.stages] == ["format", "listwise", "reinforcement", "listwise"]
    assert [stage.mark_before for stage in recorded.stages] == [1.0, 2.0, 12.0, 2.0]
    assert recorded.marks() == {"base": 2.0, "warm start": 12.0, "trained": 112.0, "listwise": 12.0}
    assert recorded.num_ranked == {5}
    np.testing.assert_array_equal(results.users, [lst.user for lst in dataset.test])
    for values in results.per_list.values():
        assert {v.shape for v in values["interest"].values()} == {(len(dataset.test),)}


def test_the_warm_up_is_left_out_where_it_is_not_wanted(tmp_path, recorded):
    recorded.run(tmp_path / "run", warmup="format", listwise_baseline=False)
    assert [stage.stage for stage in recorded.stages] == ["format", "reinforcement"]


def ndcg_at_5(gains_in_order):
    discount = 1 / np.log2(np.arange(2, 7))
    ideal = np.sort(gains_in_order)[::-1][:5] @ discount
    return gains_in_order[:5] @ discount / ideal


def test_baselines_rank_best_first_on_the_true_interest(tmp_path, recorded, dataset):
    results = recorded.run(tmp_path / "run")
    expected = [
        ndcg_at_5(lst.truth[np.argsort(-lst.popularity, kind="stable")].astype(np.float64)) for lst in dataset.test
    ]
    np.testing.assert_allclose(results.per_list["popularity"]["interest"]["ndcg@5"], expected, rtol=1e-6)
    assert {"random", "popularity", "trend", "item-knn"} <= set(results.per_list)
    worst = [ndcg_at_5(lst.truth[np.argsort(lst.popularity, kind="stable")].astype(np.float64)) for lst in dataset.test]
    assert abs(np.mean(worst) - np.mean(expected)) > 0.01, "else the order would not show"


@pytest.mark.parametrize(
    ("changes", "pace", "steps"),
    [
        # Warm-up and reinforcement took 2 x 2 + 4 x 3 = 16 s, a step of the warm-up 2 s.
        ({}, {"listwise": 2.0, "reinforcement": 3.0}, 8),
        # No warm-up: the format stage says what a supervised step takes, 4 x 3 = 12 s at 1.5 s.
        ({"warmup": "format"}, {"format": 1.5, "reinforcement": 3.0}, 8),
        ({}, {"listwise": 100.0, "reinforcement": 0.0}, 2),
        ({"warmup": "format"}, {"format": 100.0, "reinforcement": 1.0}, 1),
    ],
)
def test_the_listwise_baseline_has_as_long_as_the_trained_model_had(tmp_path, recorded, changes, pace, steps):
    recorded.pace |= pace
    results = recorded.run(tmp_path / "run", **changes)
    assert recorded.stages[-1].stage == "listwise"
    assert recorded.stages[-1].args.max_steps == steps
    assert results.seconds["total"] == recorded.seconds
    assert results.seconds["reinforcement"] == 4 * recorded.pace["reinforcement"]


def test_the_curve_is_drawn_as_often_as_asked(tmp_path, recorded):
    recorded.run(tmp_path / "run", eval_every=3, listwise_baseline=False)
    (curve,) = [c for c in recorded.of("reinforcement")[0].callbacks if isinstance(c, Curve)]
    assert curve.every == 3
    means = {m: v.mean() for m, v in curve.evaluate(None, "step 3")["interest"].items()}
    assert means["ndcg@5"] > 0
    assert recorded.evaluated[-1] == ("Evaluating step 3, interest", 112.0)
    recorded.run(tmp_path / "other", listwise_baseline=False)
    assert not [c for c in recorded.of("reinforcement")[1].callbacks if isinstance(c, Curve)]


def test_the_kl_refers_to_the_policy_before_reinforcement(tmp_path, recorded):
    folder = tmp_path / "run"
    recorded.run(folder, beta=0.1, save_every=2, listwise_baseline=False)
    (stage,) = recorded.of("reinforcement")
    assert recorded.mark_of(stage.options["reference"]) == 12.0
    assert recorded.mark_of(stage.model) == 112.0
    assert recorded.saved_mark(folder / "reference") == 12.0
    recorded.run(tmp_path / "other", listwise_baseline=False)
    assert recorded.of("reinforcement")[1].options["reference"] is None


def test_a_run_is_evaluated_on_what_is_asked_or_on_what_it_was_trained_with(tmp_path, recorded, monkeypatch, dataset):
    folder = tmp_path / "run"
    recorded.run(folder, seed=13, num_ranked=5, needs=("interest", "explore"), listwise_baseline=False)
    asked = []
    monkeypatch.setattr(stages, "load_dataset", lambda *arguments: asked.append(arguments) or dataset)
    info = json.loads((folder / "flexrec.json").read_text())
    (folder / "flexrec.json").write_text(json.dumps({**info, "data": "there"}))
    recorded.num_ranked.clear()
    scores = stages.evaluate_run(folder, None, None, None)
    assert list(scores) == ["interest", "explore"]
    assert list(stages.evaluate_run(folder, "movielens", None, ["trend"])) == ["trend"]
    stages.evaluate_run(folder, "movielens", "elsewhere", None)
    stages.evaluate_run(folder, "simulated", None, None)
    assert asked == [
        ("simulated", "there", 13),
        ("movielens", None, 13),
        ("movielens", "elsewhere", 13),
        ("simulated", "there", 13),
    ]
    assert recorded.num_ranked == {5}
    saved = np.load(folder / "per_list.npz")
    users = np.array([lst.user for lst in dataset.test])
    for need, metrics in scores.items():
        for metric, value in metrics.items():
            values = saved[f"trained/{need}/{metric}"]
            low, high = bootstrap_interval(values, clusters=users)
            assert value == pytest.approx({"mean": values.mean(), "low": low, "high": high})


def test_a_need_of_whole_lists_has_its_metric_and_mmr_beside_the_others(tmp_path, recorded, dataset):
    results = recorded.run(tmp_path / "run", needs=("interest", "diverse"), listwise_baseline=False)
    for values in results.per_list.values():
        assert "alpha_ndcg@5" in values["diverse"]
        assert "alpha_ndcg@5" not in values["interest"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    own, items = metrics["changes_alpha_ndcg@5"], metrics["changes_ndcg@5"]
    assert set(own) == {"diverse"}
    assert set(items) == {"interest"}
    expected = dataclasses.asdict(results.compare("trained", "mmr", "diverse", "alpha_ndcg@5"))
    assert own["diverse"]["mmr"] == pytest.approx(expected, nan_ok=True)
    greedy, critic = results.per_list["greedy"], results.per_list["critic"]
    np.testing.assert_array_equal(greedy["interest"]["ndcg@5"], critic["interest"]["ndcg@5"])
    assert not np.array_equal(greedy["diverse"]["alpha_ndcg@5"], critic["diverse"]["alpha_ndcg@5"])
    (listwise,) = recorded.of("listwise")
    assert {example.metric for example in (listwise.examples[0], listwise.examples[1])} == {None, "alpha_ndcg"}


def test_without_a_need_of_whole_lists_there_is_no_mmr(tmp_path, recorded):
    assert "mmr" not in recorded.run(tmp_path / "run", listwise_baseline=False).per_list
