"""What an experiment hands to its stages, by value: every option where it belongs, what is resumed, what is written.

The trainers are replaced by recorders, which note what they are asked for and mark the model instead of training it.
"""

import dataclasses
import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from flexrec import cli
from flexrec.data import Catalogue, simulate
from flexrec.evaluation.statistics import bootstrap_interval
from flexrec.experiment import model as run_model
from flexrec.experiment import run_folder as results_module
from flexrec.experiment import stages as module
from flexrec.experiment.config import ExperimentConfig
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.trainer import callbacks as progress

SIZES = {"num_users": 24, "num_items": 70, "num_topics": 4, "num_test_users": 6, "num_candidates": 8}
GUESS, DOUBT = 0.625, 0.04  # what the fake critic says of every pair without feedback
MARKS = {"format": 1.0, "listwise": 10.0, "reinforcement": 100.0}  # what a stage adds to a weight that was 1


@pytest.fixture(scope="module")
def dataset():
    """Feedback is scarce, as in the default, but every user has logged more than a history shows."""
    return simulate(**SIZES, observed_share=0.6, history_length=5, lists_per_user=2)


class FakeCritic:
    def fill_many(self, lists):
        unknown = [np.isnan(lst.interest) for lst in lists]
        return [
            (np.where(u, GUESS, lst.interest).astype(np.float32), np.where(u, DOUBT, 0.0).astype(np.float32))
            for u, lst in zip(unknown, lists, strict=True)
        ]


class Recorder:
    """A trainer that trains nothing: what it was made with, and what was asked of it."""

    def __init__(self, recorded, model, args, examples, *, stage="reinforcement", **options):
        self.recorded, self.model, self.args, self.examples = recorded, model, args, examples
        self.stage, self.options = stage, options
        self.callbacks = list(options.pop("callbacks"))
        self.checkpoint = None
        self.mark_before = mark_of(model)
        recorded.stages.append(self)

    def train(self, resume_from_checkpoint=None):
        self.checkpoint = resume_from_checkpoint
        self.recorded.seconds += self.recorded.pace[self.stage] * self.args.max_steps
        with torch.no_grad():
            marked(self.model).add_(MARKS[self.stage])

    def remove_callback(self, callback):
        pass

    def add_callback(self, callback):
        self.callbacks.append(callback)

    @contextmanager
    def whole_model(self):
        yield self.model


def marked(model):
    """The weight that stages mark: the norm before the output layer, or B of the first adapter."""
    named = dict(model.named_parameters())
    return next((p for n, p in named.items() if "lora_B" in n), named.get("model.norm.weight"))


def mark_of(model):
    return marked(model).detach().flatten()[0].item()


class Recorded:
    def __init__(self):
        self.stages, self.evaluated, self.seeds, self.said = [], [], {}, []
        self.num_ranked = set()
        self.seconds = 0.0
        self.pace = {"format": 1.0, "listwise": 1.0, "reinforcement": 1.0}  # seconds a step

    def of(self, stage):
        return [one for one in self.stages if one.stage == stage]


@pytest.fixture
def recorded(monkeypatch, dataset):
    """Runs of the experiment's own code only; time stands still but in the stages."""
    seen = Recorded()

    def seeded(owner, name, result=None):
        function = getattr(owner, name)

        def spy(*args, seed, **kwargs):
            seen.seeds[name] = seed
            return function(*args, seed=seed, **kwargs) if result is None else result

        monkeypatch.setattr(owner, name, spy)

    seeded(module, "simulate", dataset)
    seeded(run_model, "item_vectors")
    seeded(run_model, "build_model")
    monkeypatch.setattr(module, "Critic", type("Critic", (FakeCritic,), {"fit": None}))
    monkeypatch.setattr(
        module.Critic, "fit", lambda *args, seed, **kwargs: seen.seeds.update(critic=seed) or FakeCritic()
    )
    monkeypatch.setattr(module, "set_seed", lambda seed: seen.seeds.update(set_seed=seed))
    for name in ("SupervisedTrainer", "FlexRecTrainer"):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: Recorder(seen, *args, **kwargs))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: seen.seconds)
    rank = results_module.rank_examples

    def spy(model, examples, builder, *, num_ranked, description):
        seen.evaluated.append((description, mark_of(model)))
        seen.num_ranked.add(num_ranked)
        return rank(model, examples, builder, num_ranked=num_ranked)

    monkeypatch.setattr(results_module, "rank_examples", spy)
    return seen


def run(folder, **changes):
    few = {"steps": 4, "warmup_steps": 3, "listwise_steps": 2, "prompts_per_step": 4, "needs": ("interest",)}
    return module.run_experiment(ExperimentConfig(str(folder), **{**few, **changes}), say=lambda text: None)


def marks(recorded):
    """need-free: {what is evaluated: the mark of the model then}."""
    return {description.removeprefix("Evaluating ").split(",")[0]: mark for description, mark in recorded.evaluated}


def saved_mark(folder):
    return mark_of(AutoModelForCausalLM.from_pretrained(folder))


# Options


def test_every_option_of_the_command_line_reaches_the_configuration(tmp_path, monkeypatch):
    given = {
        "output": str(tmp_path / "run"),
        "dataset": "movielens",
        "data": "somewhere",
        "model": "some/model",
        "encoding": "title",
        "needs": ("trend", "interest"),
        "credit": "noncausal",
        "tilt": 0.7,
        "metric": "recall@3",
        "warmup": "format",
        "steps": 7,
        "warmup_steps": 5,
        "listwise_steps": 6,
        "prompts_per_step": 12,
        "num_generations": 3,
        "num_iterations": 2,
        "baseline": "group",
        "scale": "rank",
        "uncertainty": "item",
        "learning_rate": 0.125,
        "warmup_learning_rate": 0.25,
        "entropy_coef": 0.75,
        "beta": 0.375,
        "temperature": 0.6,
        "num_ranked": 8,
        "listwise_baseline": False,
        "bf16": True,
        "lora": 9,
        "lora_alpha": 10,
        "lora_targets": ("q_proj", "v_proj"),
        "lora_save": "adapter",
        "profile": True,
        "critic": False,
        "eval_every": 14,
        "save_every": 11,
        "resume": True,
        "seed": 13,
    }
    fields = dataclasses.fields(ExperimentConfig)
    assert set(given) == {field.name for field in fields}
    for field in fields:
        assert given[field.name] != field.default, f"{field.name} is to differ from its default"
    arguments = []
    for name, value in given.items():
        option = "--" + {"needs": "need"}.get(name, name).replace("_", "-")
        if isinstance(value, bool):
            arguments.append(option if value else "--no-" + name.replace("_", "-"))
        else:
            arguments += [option, *([str(v) for v in value] if isinstance(value, tuple) else [str(value)])]
    configs = []

    def stop(config, say):
        configs.append(config)
        raise ValueError("far enough")

    monkeypatch.setattr(module, "run_experiment", stop)
    assert cli.main(["train", *arguments]) == 2
    assert cli.main(["train", "--output", given["output"]]) == 2
    assert cli.main(["train", "--output", "x", "--critic", "--need", "trend", "--need", "explore", "trend"]) == 2
    full, default, twice = configs
    assert dataclasses.asdict(full) == given
    assert default == ExperimentConfig(given["output"])
    assert twice == ExperimentConfig("x", critic=True, needs=("trend", "explore"))


def test_every_option_reaches_the_trainers(tmp_path, recorded):
    options = {
        "num_generations": 3,
        "num_iterations": 2,
        "temperature": 0.6,
        "metric": "recall@3",
        "num_ranked": 5,
        "credit": "swap",
        "baseline": "rank",
        "scale": "rank",
        "uncertainty": "item",
        "entropy_coef": 0.75,
        "beta": 0.375,
        "bf16": True,
        "seed": 13,
    }
    rates = {"learning_rate": 0.125, "warmup_learning_rate": 0.25}
    run(tmp_path / "run", **options, **rates, tilt=0.7, save_every=3, steps=7, listwise_baseline=False)
    format_stage, listwise, reinforcement = recorded.stages
    args = reinforcement.args
    assert {name: getattr(args, name) for name in options} == options
    assert args.tilt is None, "it is of all_actions"
    assert (args.max_steps, args.per_device_train_batch_size, args.learning_rate) == (7, 4, 0.125)
    assert (args.save_strategy, args.save_steps, args.save_total_limit) == ("steps", 3, 2)
    assert args.output_dir == str(tmp_path / "run" / "checkpoints")
    for stage, steps in ((format_stage, 3), (listwise, 2)):
        args = stage.args
        # As many rankings as reinforcement's 4 prompts with 3 generations each.
        assert (args.max_steps, args.per_device_train_batch_size, args.learning_rate) == (steps, 12, 0.25)
        assert (args.bf16, args.seed, args.save_strategy) == (True, 13, "no")
    for stage in recorded.stages:
        assert (stage.args.weight_decay, stage.args.max_grad_norm, stage.args.logging_steps) == (0.01, 1.0, 1)
        assert (stage.args.lr_scheduler_type, stage.args.warmup_steps) == ("cosine", stage.args.max_steps // 4)
        assert stage.args.dataloader_drop_last
        assert not stage.args.remove_unused_columns


def test_the_seed_reaches_everything_that_draws(tmp_path, recorded):
    run(tmp_path / "run", seed=13)
    names = ("simulate", "item_vectors", "build_model", "critic", "set_seed")
    assert recorded.seeds == dict.fromkeys(names, 13)
    for stage in recorded.stages:
        assert (stage.args.seed, stage.examples.seed) == (13, 13)


def test_the_tilt_is_of_all_actions(tmp_path, recorded):
    run(tmp_path / "run", tilt=0.7, listwise_baseline=False)
    assert recorded.of("reinforcement")[0].args.tilt == 0.7


def test_data_sets_are_loaded_with_their_folder_and_seed(monkeypatch, dataset):
    asked = []
    monkeypatch.setattr(module, "load_movielens", lambda folder, *, seed: asked.append((folder, seed)) or dataset)
    assert module.load_dataset("movielens", "somewhere", 13) is dataset
    assert asked == [("somewhere", 13)]


def test_separator_and_end_reach_the_trainers(tmp_path, recorded):
    run(tmp_path / "run", encoding="index")
    for stage in recorded.stages:
        assert len(stage.options["separator"]) >= 1
        assert len(stage.options["end"]) == 1
        assert stage.options["separator"] == stage.examples.task.builder.separator
        assert stage.options["end"] == stage.examples.task.builder.end


def test_too_few_examples_for_a_step_are_told_before_anything_is_written(tmp_path, recorded, dataset):
    available = len(dataset.train)
    with pytest.raises(ValueError, match=f"a step takes {available + 1} rankings, and there are {available}"):
        run(tmp_path / "run", prompts_per_step=available + 1)
    with pytest.raises(ValueError, match=f"a step takes {2 * available} rankings"):
        run(tmp_path / "run", prompts_per_step=available, num_generations=2)
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", prompts_per_step=available)


# What is learned from, and what is measured


def test_supervision_imitates_feedback_and_reinforcement_reads_the_critic(tmp_path, recorded, dataset):
    run(tmp_path / "run")
    warm_up, baseline = recorded.of("listwise")
    unknown = [np.isnan(lst.interest).sum() for lst in dataset.train]
    assert sum(unknown) > len(unknown)
    for stage in (warm_up, baseline):
        for i, lst in enumerate(dataset.train):
            np.testing.assert_array_equal(np.sort(stage.examples[i].gains), np.sort(np.nan_to_num(lst.interest)))
            assert not stage.examples[i].variance.any()
    for i, lst in enumerate(dataset.train):
        example = recorded.of("reinforcement")[0].examples[i]
        filled = np.where(np.isnan(lst.interest), np.float32(GUESS), lst.interest)
        np.testing.assert_array_equal(np.sort(example.gains), np.sort(filled))
        assert (example.variance > 0).sum() == unknown[i]


@pytest.mark.parametrize(
    ("asked", "unobserved", "fitted"),
    [(None, "critic", True), (None, "zero", False), (False, "critic", False), (True, "zero", True)],
)
def test_the_critic_is_fitted_as_asked_or_as_the_data_need_it(
    tmp_path, recorded, monkeypatch, dataset, asked, unobserved, fitted
):
    monkeypatch.setattr(module, "simulate", lambda seed: dataclasses.replace(dataset, unobserved=unobserved))
    run(tmp_path / "run", critic=asked, listwise_baseline=False)
    assert ("critic" in recorded.seeds) == fitted
    task = recorded.of("reinforcement")[0].examples.task
    assert isinstance(task.critic, FakeCritic) == fitted


def test_lists_are_drawn_anew_for_every_stage(tmp_path, recorded, monkeypatch, dataset):
    """Where the data set can: the lists of another epoch come from its ``resample``."""
    drawn = []
    again = dataclasses.replace(dataset, resample=lambda seed: drawn.append(seed) or dataset.train[::-1])
    monkeypatch.setattr(module, "simulate", lambda seed: again)
    run(tmp_path / "run", seed=13)
    for stage in recorded.stages:
        stage.examples.set_epoch(2)
    assert drawn == [15, 15], "the three supervised stages and reinforcement share two sets of examples"


def test_systems_are_measured_on_the_test_users_after_their_stages(tmp_path, recorded, dataset):
    results = run(tmp_path / "run", num_ranked=5)
    # The base after the format stage; the trained model after the warm-up too; the baseline from the base again.
    assert [stage.stage for stage in recorded.stages] == ["format", "listwise", "reinforcement", "listwise"]
    assert [stage.mark_before for stage in recorded.stages] == [1.0, 2.0, 12.0, 2.0]
    assert marks(recorded) == {"base": 2.0, "trained": 112.0, "listwise": 12.0}
    assert recorded.num_ranked == {5}
    np.testing.assert_array_equal(results.users, [lst.user for lst in dataset.test])
    for values in results.per_list.values():
        assert {v.shape for v in values["interest"].values()} == {(len(dataset.test),)}


def test_the_warm_up_is_left_out_where_it_is_not_wanted(tmp_path, recorded):
    run(tmp_path / "run", warmup="format", listwise_baseline=False)
    assert [stage.stage for stage in recorded.stages] == ["format", "reinforcement"]


def ndcg_at_5(gains_in_order):
    discount = 1 / np.log2(np.arange(2, 7))
    ideal = np.sort(gains_in_order)[::-1][:5] @ discount
    return gains_in_order[:5] @ discount / ideal


def test_baselines_rank_best_first_on_the_true_interest(tmp_path, recorded, dataset):
    results = run(tmp_path / "run")
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
    results = run(tmp_path / "run", **changes)
    assert recorded.stages[-1].stage == "listwise"
    assert recorded.stages[-1].args.max_steps == steps
    assert results.seconds["total"] == recorded.seconds
    assert results.seconds["reinforcement"] == 4 * recorded.pace["reinforcement"]


def test_the_curve_is_drawn_as_often_as_asked(tmp_path, recorded):
    run(tmp_path / "run", eval_every=3, listwise_baseline=False)
    (curve,) = [c for c in recorded.of("reinforcement")[0].callbacks if isinstance(c, progress.Curve)]
    assert curve.every == 3
    means = {m: v.mean() for m, v in curve.evaluate(None, "step 3")["interest"].items()}
    assert means["ndcg@5"] > 0
    assert recorded.evaluated[-1] == ("Evaluating step 3, interest", 112.0)
    run(tmp_path / "other", listwise_baseline=False)
    assert not [c for c in recorded.of("reinforcement")[1].callbacks if isinstance(c, progress.Curve)]


def test_the_kl_refers_to_the_policy_before_reinforcement(tmp_path, recorded):
    folder = tmp_path / "run"
    run(folder, beta=0.1, save_every=2, listwise_baseline=False)
    (stage,) = recorded.of("reinforcement")
    assert mark_of(stage.options["reference"]) == 12.0
    assert mark_of(stage.model) == 112.0
    assert saved_mark(folder / "reference") == 12.0
    run(tmp_path / "other", listwise_baseline=False)
    assert recorded.of("reinforcement")[1].options["reference"] is None


# Resuming


def interrupt(monkeypatch, folder, **changes):
    """Run up to where the trained model would be saved."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save_run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, **changes)


def test_resuming_continues_from_the_latest_checkpoint_and_the_first_reference(tmp_path, recorded, monkeypatch):
    folder = tmp_path / "run"
    options = {"steps": 12, "beta": 0.1, "listwise_baseline": False}
    interrupt(monkeypatch, folder, **options)
    for step in (2, 9, 10):
        (folder / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    recorded.stages.clear()
    recorded.evaluated.clear()
    results = run(folder, **options, resume=True)
    (stage,) = recorded.stages
    assert (stage.stage, stage.mark_before) == ("reinforcement", 2.0), "its weights come from the checkpoint"
    assert stage.checkpoint == str(folder / "checkpoints" / "checkpoint-10")
    assert mark_of(stage.options["reference"]) == 12.0
    assert marks(recorded)["base"] == 2.0
    assert "format" not in results.seconds


def test_resuming_before_the_first_checkpoint_starts_from_the_base(tmp_path, recorded, monkeypatch):
    interrupt(monkeypatch, tmp_path / "run")
    recorded.stages.clear()
    run(tmp_path / "run", resume=True, listwise_baseline=False)
    assert [(s.stage, s.mark_before, s.checkpoint) for s in recorded.stages] == [
        ("listwise", 2.0, None),
        ("reinforcement", 12.0, None),
    ]


@pytest.mark.parametrize(
    "lora",
    [{}, {"lora": 2, "lora_save": "adapter"}, {"lora": 2, "lora_save": "merged"}],
    ids=["whole", "adapter", "merged"],
)
def test_resuming_after_the_last_step_takes_the_checkpoints_weights(tmp_path, recorded, monkeypatch, lora):
    if lora:
        pytest.importorskip("peft")
    folder = tmp_path / "run"
    interrupt(monkeypatch, folder, listwise_baseline=False, **{**lora, **({"lora_save": "adapter"} if lora else {})})
    trained = recorded.of("reinforcement")[0].model
    with torch.no_grad():
        marked(trained).fill_(0.375)
    trained.save_pretrained(folder / "checkpoints" / "checkpoint-4")
    recorded.stages.clear()
    recorded.evaluated.clear()
    saved = []
    save = module._save_model
    monkeypatch.setattr(
        module, "_save_model", lambda to, model, *rest: saved.append((to, model)) or save(to, model, *rest)
    )
    run(folder, resume=True, listwise_baseline=False, **lora)
    assert recorded.stages == [], "there is nothing left to train"
    ((where, model),) = saved
    assert where == folder
    if lora.get("lora_save") == "merged":
        base = AutoModelForCausalLM.from_pretrained(folder / "backbone").state_dict()
        found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        changed = [n for n in base if not torch.equal(base[n], found[n])]
        expected = trained.merge_and_unload().state_dict()
        assert changed
        for name in changed:
            torch.testing.assert_close(found[name], expected[name])
    else:
        assert mark_of(model) == 0.375
        assert marks(recorded)["trained"] == 0.375
    if not lora:
        assert saved_mark(folder) == 0.375
        assert marks(recorded)["base"] == 2.0


# What is written


def test_histories_are_the_latest_events_with_what_was_liked(tmp_path, recorded, dataset):
    run(tmp_path / "run", listwise_baseline=False)
    histories = json.loads((tmp_path / "run" / "histories.json").read_text())
    log, ids = dataset.log, dataset.catalogue.ids
    assert set(histories) == {str(user) for user in np.unique(log.users)}
    liked = set()
    for user, events in histories.items():
        rows = np.flatnonzero(log.users == int(user))
        assert len(rows) > 5
        latest = rows[np.argsort(log.times[rows], kind="stable")][-5:]
        assert [event["id"] for event in events] == [ids[log.items[row]] for row in latest]
        assert [event["liked"] for event in events] == [bool(log.interest[row] >= 0.5) for row in latest]
        liked |= {event["liked"] for event in events}
    assert liked == {True, False}


def test_the_catalogue_is_saved_with_titles_and_what_rises(tmp_path, recorded, dataset):
    run(tmp_path / "run", listwise_baseline=False)
    saved = json.loads((tmp_path / "run" / "catalogue.json").read_text())
    assert (tuple(saved["ids"]), tuple(saved["titles"])) == (dataset.catalogue.ids, dataset.catalogue.titles)
    trend = dict(zip(dataset.catalogue.ids, dataset.trend.tolist(), strict=True))
    assert saved["trend"] == {i: pytest.approx(t, abs=1e-4) for i, t in trend.items() if t > 0}
    assert len(saved["trend"]) > 3


def test_the_run_says_how_it_is_to_be_asked(tmp_path, recorded):
    options = {"num_ranked": 5, "temperature": 0.6, "seed": 13, "listwise_baseline": False}
    run(tmp_path / "run", **options)
    expected = {
        "encoding": "item_token",
        "show_titles": False,
        "show_rising": False,
        "max_history": 5,
        "num_ranked": 5,
        "temperature": 0.6,
        "dataset": "simulated",
        "data": None,
        "needs": ["interest"],
        "seed": 13,
    }
    for folder in (tmp_path / "run", tmp_path / "run" / "base"):
        assert json.loads((folder / "flexrec.json").read_text()) == expected
    assert saved_mark(tmp_path / "run") == 112.0
    assert saved_mark(tmp_path / "run" / "base") == 2.0
    run(tmp_path / "index", encoding="index", needs=("explore", "trend"), listwise_baseline=False)
    found = json.loads((tmp_path / "index" / "flexrec.json").read_text())
    assert (found["encoding"], found["show_titles"], found["show_rising"]) == ("index", True, True)
    assert (found["needs"], found["num_ranked"], found["temperature"]) == (["explore", "trend"], None, 0.3)


def test_metrics_compare_users_and_state_the_configuration(tmp_path, recorded):
    folder = tmp_path / "run"
    results = run(folder, seed=13, metric="recall@3")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["config"] == json.loads(
        json.dumps(
            dataclasses.asdict(
                ExperimentConfig(
                    str(folder),
                    steps=4,
                    warmup_steps=3,
                    listwise_steps=2,
                    prompts_per_step=4,
                    needs=("interest",),
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


# A finished run on a data set


def test_a_run_is_evaluated_on_what_is_asked_or_on_what_it_was_trained_with(tmp_path, recorded, monkeypatch, dataset):
    folder = tmp_path / "run"
    run(folder, seed=13, num_ranked=5, needs=("interest", "explore"), listwise_baseline=False)
    asked = []
    monkeypatch.setattr(module, "load_dataset", lambda *arguments: asked.append(arguments) or dataset)
    info = json.loads((folder / "flexrec.json").read_text())
    (folder / "flexrec.json").write_text(json.dumps({**info, "data": "there"}))
    recorded.num_ranked.clear()
    scores = module.evaluate_run(folder, None, None, None)
    assert list(scores) == ["interest", "explore"]
    assert list(module.evaluate_run(folder, "movielens", None, ["trend"])) == ["trend"]
    module.evaluate_run(folder, "movielens", "elsewhere", None)
    module.evaluate_run(folder, "simulated", None, None)
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


# The model of a run


def test_what_the_prompts_of_a_run_show(recorded, dataset):
    def builder(needs=("interest",), **changes):
        config = ExperimentConfig("unused", needs=needs, **changes)
        return run_model.make_model(config, dataset, [module.get_need(need) for need in needs])[2]

    assert builder().encoding == "item_token"
    assert not builder().show_titles
    assert not builder().show_rising
    assert builder(("interest", "trend")).show_rising
    assert builder(encoding="index").show_titles


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The folder of a model that is not the embedded one."""
    folder = tmp_path_factory.mktemp("models") / "other"
    tokenizer = build_tokenizer(Catalogue(ids=("none",), titles=("Of another world",), topics=((),)), ["Rank"])
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    LlamaForCausalLM(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_model_shows_titles_and_answers_by_index(recorded, dataset, other_model):
    interest = [module.get_need("interest")]
    _, _, builder = run_model.make_model(ExperimentConfig("unused", model=str(other_model)), dataset, interest)
    assert (builder.encoding, builder.show_titles) == ("index", True)
    config = ExperimentConfig("unused", model=str(other_model), encoding="item_token")
    model, tokenizer, builder = run_model.make_model(config, dataset, interest)
    assert (builder.encoding, builder.show_titles) == ("item_token", True)
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)


def test_options_of_lora_reach_the_adapters(recorded, dataset):
    pytest.importorskip("peft")
    config = ExperimentConfig("unused", lora=3, lora_alpha=7, lora_targets=("q_proj", "v_proj"))
    model, tokenizer, _ = run_model.make_model(config, dataset, [module.get_need("interest")])
    lora = model.active_peft_config
    assert (lora.r, lora.lora_alpha, set(lora.target_modules)) == (3, 7, {"q_proj", "v_proj"})
    items = tokenizer.convert_tokens_to_ids([run_model.item_token(i) for i in dataset.catalogue.ids])
    assert [sorted(ids) for ids in lora.trainable_token_indices.values()] == [sorted(items)]
    index = ExperimentConfig("unused", lora=3, encoding="index")
    model, _, _ = run_model.make_model(index, dataset, [module.get_need("interest")])
    assert not model.active_peft_config.trainable_token_indices, "items have no tokens of their own"
