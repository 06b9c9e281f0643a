"""What the stages of an experiment learn from, in which order they come, and what is measured after each."""

import dataclasses
import gc
import json
import re
import weakref

import numpy as np
import pytest

from flexrec.data import simulate
from flexrec.data.cold import hold_out_items, lists_of_new_items, new_items
from flexrec.data.options import all_data_options
from flexrec.evaluation.baselines import BASELINES
from flexrec.evaluation.evaluate import Evaluation
from flexrec.evaluation.statistics import bootstrap_interval
from flexrec.experiment import config, stages, training
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.results import Results
from flexrec.experiment.run_folder import RunFolder
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
    recorded.run(tmp_path / "run", metric=metric, num_ranked=num_ranked)
    assert [stage.options["num_imitated"] for stage in recorded.of("listwise")] == [expected]


def test_lists_that_no_answer_can_name_are_left_out_and_counted(tmp_path, recorded, dataset, monkeypatch):
    """A title of which nothing is left costs its lists, in every epoch, not the run."""
    titles = list(dataset.catalogue.titles)
    nameless = int(dataset.test[0].candidates[0])
    titles[nameless] = " \n "
    drawn = []
    broken = dataclasses.replace(
        dataset,
        catalogue=dataclasses.replace(dataset.catalogue, titles=tuple(titles)),
        resample=lambda seed: drawn.append(seed) or dataset.train[::-1],
    )
    monkeypatch.setattr(stages, "simulate", lambda seed, **options: broken)
    results = recorded.run(tmp_path / "run", encoding="title", baselines=("none",))
    bad_train, bad_test = (sum(nameless in lst.candidates for lst in lists) for lists in (dataset.train, dataset.test))
    assert bad_train > 0
    assert bad_test > 0
    reason = rf"candidate '{dataset.catalogue.ids[nameless]}' has the title ' \\n ', which gives no tokens"
    for count, of, purpose in ((bad_train, dataset.train, "train"), (bad_test, dataset.test, "test")):
        assert any(
            re.match(rf"{count} of {len(of)} lists to {purpose} on are left out: {reason}", said)
            for said in recorded.said
        ), recorded.said
    assert len(results.users) == len(dataset.test) - bad_test
    examples = recorded.of("reinforcement")[0].examples
    assert len(examples) == len(dataset.train) - bad_train
    examples.set_epoch(1)
    assert drawn
    assert all(len(examples[i].candidates) == 8 for i in range(len(examples)))


def test_the_warm_start_and_the_critic_are_rows(tmp_path, recorded, dataset):
    results = recorded.run(tmp_path / "run", needs=("interest", "trend"))
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
    monkeypatch.setattr(stages, "simulate", lambda **_: dataclasses.replace(dataset, unobserved=unobserved))
    recorded.run(tmp_path / "run", critic=asked)
    assert ("critic" in recorded.seeds) == fitted
    task = recorded.of("reinforcement")[0].examples.task
    assert (task.critic is not None) == fitted
    if fitted:  # only feedback that was not chosen by what was liked
        assert len(recorded.lists_of_critic) == (len(dataset.train) if unobserved == "critic" else 0)


@pytest.mark.parametrize("asked", [{}, {"critic_model": "mf", "noise": 0.07, "fuse_observed": False}])
def test_the_critic_is_fitted_with_its_options_measured_and_kept(tmp_path, recorded, dataset, asked):
    results = recorded.run(tmp_path / "run", **asked)
    options = recorded.critic_options
    assert options["noise"] == asked.get("noise", dataset.noise) > 0
    assert (options["model"], options["fuse"]) == (
        asked.get("critic_model", "ensemble"),
        asked.get("fuse_observed", True),
    )
    assert (tmp_path / "run" / "critic.npz").is_file()
    guesses = np.concatenate([lst.candidates / 100 for lst in dataset.test])
    truth = np.concatenate([lst.truth for lst in dataset.test])
    assert results.critic["rmse"] == pytest.approx(np.sqrt(np.mean((guesses - truth) ** 2)), abs=1e-4)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["critic"] == results.critic


def test_without_a_critic_none_is_kept_or_measured(tmp_path, recorded):
    recorded.run(tmp_path / "run", critic=False)
    assert not (tmp_path / "run" / "critic.npz").exists()
    assert "critic" not in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_lists_are_drawn_anew_for_every_stage(tmp_path, recorded, monkeypatch, dataset):
    """Where the data set can: the lists of another epoch come from its ``resample``."""
    drawn = []
    again = dataclasses.replace(dataset, resample=lambda seed: drawn.append(seed) or dataset.train[::-1])
    monkeypatch.setattr(stages, "simulate", lambda **_: again)
    recorded.run(tmp_path / "run", seed=13)
    for stage in recorded.stages:
        stage.examples.set_epoch(2)
    assert drawn == [15], "all stages share one set of examples"


def test_systems_are_measured_on_the_test_users_after_their_stages(tmp_path, recorded, dataset):
    results = recorded.run(tmp_path / "run", num_ranked=5, baselines=("listwise",))
    # The base after the format stage; the trained model after the warm-up too; the baseline from the base again.
    assert [stage.stage for stage in recorded.stages] == ["format", "listwise", "reinforcement", "listwise"]
    assert [stage.mark_before for stage in recorded.stages] == [1.0, 2.0, 12.0, 2.0]
    assert recorded.marks() == {"base": 2.0, "warm start": 12.0, "trained": 112.0, "listwise": 12.0}
    assert recorded.num_ranked == {5}
    np.testing.assert_array_equal(results.users, [lst.user for lst in dataset.test])
    for values in results.per_list.values():
        assert {v.shape for v in values["interest"].values()} == {(len(dataset.test),)}


def test_items_kept_from_training_are_measured_by_themselves(tmp_path, recorded, dataset, monkeypatch):
    """They have no token, stand in no training example, and every ranker is a row of the lists of them alone."""
    monkeypatch.setattr(stages, "MIN_NEW_LISTS", 5)
    folder = tmp_path / "run"
    results = recorded.run(folder, cold_items=0.4, seed=3, baselines=("popularity",))
    examples = recorded.of("listwise")[0].examples
    builder = examples.task.builder
    is_new = np.array([not builder.knows(item_id) for item_id in dataset.catalogue.ids])
    assert is_new.sum() == round(0.4 * len(dataset.catalogue))
    np.testing.assert_array_equal(is_new, new_items(hold_out_items(dataset, 0.4, seed=3)))
    for lst, whole in zip(examples._lists, dataset.train, strict=True):
        np.testing.assert_array_equal(lst.candidates, whole.candidates[~is_new[whole.candidates]])
    new = results.new_items
    lists = lists_of_new_items(dataset.test, is_new)
    np.testing.assert_array_equal(new.users, [lst.user for lst in lists])
    assert set(new.per_list) == set(results.per_list) >= {"base", "warm start", "trained", "popularity", "critic"}
    best_first = [lst.truth[np.argsort(-lst.popularity, kind="stable")].astype(np.float64) for lst in lists]
    expected = [ndcg_at_5(np.pad(gains, (0, 5))) for gains in best_first]
    np.testing.assert_allclose(new.per_list["popularity"]["interest"]["ndcg@5"], expected, rtol=1e-6)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["new items"]["trained"]["interest"] == pytest.approx(new.means("trained")["interest"])
    saved = np.load(folder / "per_list.npz")
    values = new.per_list["trained"]["interest"]["ndcg@5"]
    np.testing.assert_array_equal(saved["new items/trained/interest/ndcg@5"], values)
    np.testing.assert_array_equal(saved["new items/users"], new.users)
    again = Results(results.users, new_items=Results(new.users))
    RunFolder(folder).load_warm_start(again)
    for one, before in ((again, results), (again.new_items, new)):
        of_start = before.per_list["warm start"]["interest"]
        np.testing.assert_array_equal(one.per_list["warm start"]["interest"]["ndcg@5"], of_start["ndcg@5"])
    scores = stages.evaluate_run(folder, None, None, None)
    assert list(scores) == ["interest", "interest, new items"]
    assert scores["interest, new items"]["ndcg@5"]["mean"] == pytest.approx(values.mean())


def test_without_enough_new_items_nothing_is_said_of_them(tmp_path, recorded):
    results = recorded.run(tmp_path / "run")
    assert results.new_items is None
    assert "new items" not in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_the_warm_up_is_left_out_where_it_is_not_wanted(tmp_path, recorded):
    recorded.run(tmp_path / "run", warmup="format")
    assert [stage.stage for stage in recorded.stages] == ["format", "reinforcement"]


def ndcg_at_5(gains_in_order):
    discount = 1 / np.log2(np.arange(2, 7))
    ideal = np.sort(gains_in_order)[::-1][:5] @ discount
    return gains_in_order[:5] @ discount / ideal


def test_baselines_rank_best_first_on_the_true_interest(tmp_path, recorded, dataset):
    results = recorded.run(tmp_path / "run", baselines=None)
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
    results = recorded.run(tmp_path / "run", **changes, baselines=("listwise",))
    assert recorded.stages[-1].stage == "listwise"
    assert recorded.stages[-1].args.max_steps == steps
    assert results.seconds["total"] == recorded.seconds
    assert results.seconds["reinforcement"] == 4 * recorded.pace["reinforcement"]


def test_the_curve_is_drawn_as_often_as_asked(tmp_path, recorded):
    recorded.run(tmp_path / "run", eval_every=3)
    for one in recorded.stages:
        (curve,) = [c for c in one.callbacks if isinstance(c, Curve)]
        assert curve.every == 3
    means = {m: v.mean() for m, v in curve.evaluate(None, "step 3")["interest"].items()}
    assert means["ndcg@5"] > 0
    assert recorded.evaluated[-1] == ("Evaluating step 3, interest", 112.0)
    recorded.run(tmp_path / "other")
    assert not [c for c in recorded.of("reinforcement")[1].callbacks if isinstance(c, Curve)]


def points_of(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {line["of"]: (line["steps"], line["seconds"], line["means"]) for line in lines if "of" in line}


def test_every_stage_ends_in_a_point_of_the_curves(tmp_path, recorded):
    """Counted from where training began; baselines from where their model did."""
    recorded.pace |= {"format": 1.5, "listwise": 2.0, "reinforcement": 3.0}
    names = ("listwise", "sequence_grpo", "rank_grpo")
    results = recorded.run(tmp_path / "run", baselines=names)
    points = points_of(tmp_path / "run")
    assert {of: point[:2] for of, point in points.items()} == {
        "format": (3, 4.5),
        "listwise warm-up": (5, 8.5),
        "reinforcement": (9, 20.5),
        "listwise": (3 + 8, 4.5 + 16.0),
        "sequence_grpo": (9, 20.5),
        "rank_grpo": (9, 20.5),
    }
    systems = {"format": "base", "listwise warm-up": "warm start", "reinforcement": "trained"}
    for of, (*_, means) in points.items():
        assert means["interest"] == pytest.approx(results.means(systems.get(of, of))["interest"])


@pytest.mark.parametrize("warmup", ["listwise", "format"])
def test_baselines_by_reinforcement_start_where_reinforcement_did(tmp_path, recorded, warmup):
    options = {"prompts_per_step": 12, "num_generations": 2, "beta": 0.1, "num_iterations": 2, "learning_rate": 0.125}
    folder = tmp_path / "run"
    recorded.run(folder, warmup=warmup, baselines=("rank_grpo", "sequence_grpo"), **options, save_every=2)
    own, sequence, rank = recorded.of("reinforcement")
    start = 12.0 if warmup == "listwise" else 2.0
    assert [one.mark_before for one in (own, sequence, rank)] == [start] * 3
    assert recorded.saved_mark(folder / "reference") == start
    assert recorded.marks()["sequence_grpo"] == recorded.marks()["rank_grpo"] == start + 100.0
    for one, credit, level in ((sequence, "sequence", "token"), (rank, "rank", "item")):
        args = one.args
        assert (args.credit, args.importance_level) == (credit, level)
        assert (args.baseline, args.scale, args.uncertainty, args.tilt) == ("rank", "rank", "none", None)
        assert (args.per_device_train_batch_size, args.num_generations) == (3, 8), "24 rankings in groups of 8"
        assert (args.max_steps, args.beta, args.num_iterations, args.learning_rate) == (4, 0.1, 2, 0.125)
        assert args.save_strategy == "no"
        assert recorded.mark_of(one.options["reference"]) == start
    assert (own.args.credit, own.args.per_device_train_batch_size, own.args.num_generations) == ("all_actions", 12, 2)


def test_baselines_by_reinforcement_have_the_groups_that_one_pass_decides():
    config = ExperimentConfig(output="x", mode="one-pass", prompts_per_step=12, num_generations=6)
    found = training.grpo_config(config, "rank_grpo")
    assert (found.prompts_per_step, found.num_generations, found.credit) == (12, 6, "rank")
    assert training.grpo_config(config, "sequence_grpo").credit == "sequence"


def test_baselines_by_reinforcement_need_groups_and_a_kept_start(tmp_path, recorded):
    with pytest.raises(ValueError, match="'rank_grpo' compares rankings of one prompt: it needs an even number"):
        recorded.run(tmp_path / "odd", prompts_per_step=5, baselines=("rank_grpo",))
    assert not (tmp_path / "odd").exists()
    folder = tmp_path / "run"
    recorded.interrupt(folder, steps=12)
    (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    RunFolder(folder).seal(folder / "checkpoints" / "checkpoint-2")
    with pytest.raises(ValueError, match="--baselines rank_grpo: this run is past its warm start"):
        recorded.run(folder, steps=12, baselines=("rank_grpo",), resume=True)


def test_which_baselines_run(tmp_path, recorded, monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    quick = ("random", "popularity", "trend", "item-knn", "user-knn")
    assert ExperimentConfig(output="x").chosen_baselines() == quick
    assert ExperimentConfig(output="x", baselines=("sasrec", "listwise")).chosen_baselines() == (
        "listwise",
        *quick,
        "sasrec",
    )
    assert ExperimentConfig(output="x", baselines=("none",)).chosen_baselines() == ()
    for asked in (("bpr",), ("all",)):
        with pytest.raises(
            ImportError, match=r"als|bpr needs the package implicit: .venv/bin/pip install -e '.\[baselines\]'"
        ):
            ExperimentConfig(output="x", baselines=asked).chosen_baselines()
    monkeypatch.setattr(config, "find_spec", lambda name: name)
    assert ExperimentConfig(output="x").chosen_baselines() == (*quick, "als", "bpr", "bm25")
    everything = ExperimentConfig(output="x", baselines=("all",)).chosen_baselines()
    assert (
        set(everything) == {*BASELINES, "listwise", *training.GRPO} == {*config.QUICK_BASELINES, *config.SLOW_BASELINES}
    )
    with pytest.raises(ValueError, match="unknown baseline 'itemknn'; --baselines takes random, popularity"):
        ExperimentConfig(output="x", baselines=("itemknn",))
    with pytest.raises(ValueError, match="--baselines none leaves all of them away, got none sasrec"):
        ExperimentConfig(output="x", baselines=("none", "sasrec"))
    results = recorded.run(tmp_path / "run", baselines=("none",))
    assert set(results.per_list) == {"base", "warm start", "trained", "critic"}


def test_what_a_need_multiplies_counts_for_baselines_that_estimate_interest(tmp_path, recorded, monkeypatch, dataset):
    class Latest:
        """The later in the catalogue, the better, below 0 all of it: only the order within a list counts."""

        def __init__(self, interest):
            self.scores_interest = interest

        def scores(self, lst):
            return lst.candidates.astype(np.float64) - 1000.0

    made = {"item-knn": lambda dataset: Latest(True), "random": lambda dataset: Latest(False)}
    monkeypatch.setattr(stages, "BASELINES", made)
    results = recorded.run(tmp_path / "run", needs=("interest", "trend"), baselines=None)
    for need, factor in (("interest", lambda lst: 1.0), ("trend", lambda lst: lst.trend)):
        expected = {"item-knn": [], "random": []}
        for lst in dataset.test:
            gains = (lst.truth * factor(lst)).astype(np.float64)
            interest = (lst.candidates - lst.candidates.min()) / (lst.candidates.max() - lst.candidates.min())
            known = np.lexsort((-interest, -factor(lst) * np.ones(len(interest)), -interest * factor(lst)))
            for name, order in (("item-knn", known), ("random", np.argsort(-lst.candidates))):
                expected[name].append(ndcg_at_5(gains[order]) if gains.any() else 0.0)
        for name, values in expected.items():
            np.testing.assert_allclose(results.per_list[name][need]["ndcg@5"], values, rtol=1e-5)
    assert results.means("item-knn")["trend"] != results.means("random")["trend"]


def test_the_kl_refers_to_the_policy_before_reinforcement(tmp_path, recorded):
    folder = tmp_path / "run"
    recorded.run(folder, beta=0.1, save_every=2)
    (stage,) = recorded.of("reinforcement")
    assert recorded.mark_of(stage.options["reference"]) == 12.0
    assert recorded.mark_of(stage.model) == 112.0
    assert recorded.saved_mark(folder / "reference") == 12.0
    recorded.run(tmp_path / "other")
    assert recorded.of("reinforcement")[1].options["reference"] is None


def test_a_run_is_evaluated_on_what_is_asked_or_on_what_it_was_trained_with(tmp_path, recorded, monkeypatch, dataset):
    folder = tmp_path / "run"
    options = {"missing": "exposure"}
    recorded.run(folder, seed=13, num_ranked=5, needs=("interest", "explore"), data_options=options)
    asked = []
    monkeypatch.setattr(stages, "load_dataset", lambda *arguments: asked.append(arguments) or dataset)
    info = json.loads((folder / "flexrec.json").read_text())
    (folder / "flexrec.json").write_text(json.dumps({**info, "data": "there"}))
    of_run, of_movielens = info["data_options"], all_data_options("movielens", {})
    recorded.num_ranked.clear()
    scores = stages.evaluate_run(folder, None, None, None)
    assert list(scores) == ["interest", "explore"]
    assert set(scores["interest"]) == {"ndcg@5", "ndcg@10", "ndcg@30"}, "everybody likes everything a little"
    assert {"recall@5", "mrr@5"} <= set(scores["explore"])
    assert list(stages.evaluate_run(folder, "movielens", None, ["trend"])) == ["trend"]
    stages.evaluate_run(folder, "movielens", "elsewhere", None)
    stages.evaluate_run(folder, "simulated", None, None, {"history_length": 3})
    assert asked == [
        ("simulated", "there", 13, of_run),
        ("movielens", None, 13, of_movielens),
        ("movielens", "elsewhere", 13, of_movielens),
        ("simulated", "there", 13, {**of_run, "history_length": 3}),
    ]
    assert list(stages.evaluate_run(folder, dataset)) == ["interest", "explore"], "one that was made in Python"
    assert len(asked) == 4
    assert recorded.num_ranked == {5}
    saved = np.load(folder / "per_list.npz")
    users = np.array([lst.user for lst in dataset.test])
    for need, metrics in scores.items():
        for metric, value in metrics.items():
            values = saved[f"trained/{need}/{metric}"]
            low, high = bootstrap_interval(values, clusters=users)
            assert value == pytest.approx({"mean": values.mean(), "low": low, "high": high})


def test_a_need_of_whole_lists_has_its_metric_and_mmr_beside_the_others(tmp_path, recorded, dataset):
    results = recorded.run(tmp_path / "run", needs=("interest", "diverse"))
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
    assert "mmr" not in recorded.run(tmp_path / "run").per_list


def test_a_stage_leaves_no_optimiser_and_no_gradients(tmp_path, monkeypatch):
    """Which hold three times the model, the former in cycles of references that nobody would collect for a while."""
    trainers, outlived = [], []
    train, evaluate = training._train, Evaluation.__call__

    def noted(trainer, *arguments):
        trainers.append(weakref.ref(trainer))
        train(trainer, *arguments)

    def measured(self, model, name):
        outlived.append(sum(one() is not None for one in trainers))
        assert all(parameter.grad is None for parameter in model.parameters())
        return evaluate(self, model, name)

    monkeypatch.setattr(training, "_train", noted)
    monkeypatch.setattr(Evaluation, "__call__", measured)
    short = {"warmup_steps": 1, "listwise_steps": 1, "steps": 1, "prompts_per_step": 8, "critic_model": "knn"}
    config = ExperimentConfig(output=str(tmp_path / "run"), needs=("interest",), baselines=("listwise",), **short)
    gc.disable()
    try:
        dataset = simulate(num_users=24, num_items=70, num_topics=4, num_test_users=6, num_candidates=8)
        stages.run_experiment(config, lambda text: None, dataset=dataset)
    finally:
        gc.enable()
    assert len(trainers) == 4
    assert outlived == [0, 0, 0, 0]  # base, warm start, trained, listwise
