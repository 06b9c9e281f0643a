"""Every option of an experiment arrives where it belongs: in the configuration, the trainers, the model, every seed."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from flexrec import cli
from flexrec.data import Catalogue
from flexrec.data.options import all_data_options
from flexrec.experiment import model as model_module
from flexrec.experiment import stages
from flexrec.experiment.config import ExperimentConfig
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.task.descriptions import describing_tokens
from flexrec.task.needs import get_need
from flexrec.trainer.options import TrainerOptions


def test_every_option_of_the_command_line_reaches_the_configuration(tmp_path, monkeypatch):
    given = {
        "output": str(tmp_path / "run"),
        "dataset": "movielens",
        "data": "/somewhere",
        "model": "some/model",
        "encoding": "label",
        "needs": ("trend", "interest"),
        "needs_file": str(tmp_path / "needs.yaml"),
        "credit": "noncausal",
        "tilt": 0.7,
        "show": ("title", "year"),
        "max_title_tokens": 11,
        "mode": "one-pass",
        "reasoning_end": "</thought>",
        "micro_batch": 6,
        "eval_lists": 13,
        "unseen_wordings": 3,
        "dry_run": True,
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
        "shuffle_weights": True,
        "pessimism": 0.5,
        "sample_gains": True,
        "learning_rate": 0.125,
        "warmup_learning_rate": 0.25,
        "entropy_coef": 0.75,
        "beta": 0.375,
        "epsilon_low": 0.15,
        "epsilon_high": 0.35,
        "importance_level": "sequence",
        "share_prompts": False,
        "temperature": 0.6,
        "num_ranked": 8,
        "baselines": ("sasrec", "listwise"),
        "bf16": True,
        "gradient_checkpointing": True,
        "lora": 9,
        "lora_alpha": 10,
        "lora_targets": ("q_proj", "v_proj"),
        "lora_save": "adapter",
        "profile": True,
        "critic": False,
        "cold_items": 0.25,
        "critic_model": "knn",
        "noise": 0.125,
        "fuse_observed": False,
        "eval_every": 14,
        "save_every": 11,
        "report_to": ("tensorboard",),
        "resume": True,
        "seed": 13,
    }
    fields = [field for field in dataclasses.fields(ExperimentConfig) if field.name != "data_options"]
    apart = {"max_reasoning_tokens"}  # has no place in one pass
    assert set(given) | apart == {field.name for field in fields}
    for field in (field for field in fields if field.name not in apart):
        assert given[field.name] != field.default, f"{field.name} is to differ from its default"
    arguments = []
    for name, value in given.items():
        option = "--" + {"needs": "need", "needs_file": "needs"}.get(name, name).replace("_", "-")
        if isinstance(value, bool):
            arguments.append(option if value else "--no-" + name.replace("_", "-"))
        else:
            arguments += [option, *([str(v) for v in value] if isinstance(value, tuple) else [str(value)])]
    configs = []

    def stop(config, say):
        configs.append(config)
        raise ValueError("far enough")

    monkeypatch.setattr(stages, "run_experiment", stop)
    assert cli.main(["train", *arguments]) == 2
    assert cli.main(["train", "--output", given["output"]]) == 2
    assert cli.main(["train", "--output", "x", "--critic", "--need", "trend", "--need", "explore", "trend"]) == 2
    reasons = {"model": "some/model", "encoding": "index", "max_reasoning_tokens": 10}
    of_reasons = [text for name, value in reasons.items() for text in ("--" + name.replace("_", "-"), str(value))]
    assert cli.main(["train", "--output", "x", *of_reasons]) == 2
    full, default, twice, reasoning = configs
    assert reasoning == ExperimentConfig(output="x", **reasons)
    of_data = all_data_options("movielens", {})
    assert dataclasses.asdict(full) == {**given, "max_reasoning_tokens": None, "data_options": of_data}
    assert default == ExperimentConfig(output=given["output"])
    assert twice == ExperimentConfig(output="x", critic=True, needs=("trend", "explore"))


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
        "shuffle_weights": True,
        "pessimism": 0.5,
        "sample_gains": True,
        "entropy_coef": 0.75,
        "beta": 0.375,
        "epsilon_low": 0.15,
        "epsilon_high": 0.35,
        "importance_level": "sequence",
        "mode": "one-pass",
        "share_prompts": False,
        "bf16": True,
        "seed": 13,
    }
    for one in dataclasses.fields(TrainerOptions):
        assert one.name == "tilt" or options[one.name] != one.default, one.name
    rates = {"learning_rate": 0.125, "warmup_learning_rate": 0.25}
    recorded.run(tmp_path / "run", **options, **rates, save_every=3, steps=7)
    format_stage, listwise, reinforcement = recorded.stages
    args = reinforcement.args
    assert {name: getattr(args, name) for name in options} == options
    assert (args.max_steps, args.per_device_train_batch_size, args.learning_rate) == (7, 4, 0.125)
    assert (args.save_strategy, args.save_steps, args.save_total_limit) == ("steps", 3, 2)
    assert args.output_dir == str(tmp_path / "run" / "checkpoints")
    for stage, steps in ((format_stage, 3), (listwise, 2)):
        args = stage.args
        # As many lists as reinforcement's prompts, whose passes decide all of their rankings.
        assert (args.max_steps, args.per_device_train_batch_size, args.learning_rate) == (steps, 4, 0.25)
        assert (args.bf16, args.seed, args.save_strategy) == (True, 13, "no")
    for stage in recorded.stages:
        assert (stage.args.weight_decay, stage.args.max_grad_norm, stage.args.logging_steps) == (0.01, 1.0, 1)
        assert (stage.args.lr_scheduler_type, stage.args.warmup_steps) == ("cosine", stage.args.max_steps // 4)
        assert stage.args.dataloader_drop_last
        assert not stage.args.remove_unused_columns


def test_the_seed_reaches_everything_that_draws(tmp_path, recorded):
    recorded.run(tmp_path / "run", seed=13)
    names = ("simulate", "item_vectors", "build_model", "critic", "set_seed")
    assert recorded.seeds == dict.fromkeys(names, 13)
    for stage in recorded.stages:
        assert (stage.args.seed, stage.examples.seed) == (13, 13)


def test_the_tilt_reaches_the_trainer(tmp_path, recorded):
    recorded.run(tmp_path / "run", tilt=0.7)
    assert recorded.of("reinforcement")[0].args.tilt == 0.7


@pytest.mark.parametrize("name", ["movielens", "kuairec", "esci", "interactions"])
def test_data_sets_are_loaded_with_their_folder_and_seed(monkeypatch, dataset, name):
    asked = []
    monkeypatch.setattr(stages, f"load_{name}", lambda folder, **options: asked.append((folder, options)) or dataset)
    assert stages.load_dataset(name, "somewhere", 13) is dataset
    assert stages.load_dataset(name, "somewhere", 13, {"num_candidates": 7}) is dataset
    assert asked == [("somewhere", {"seed": 13}), ("somewhere", {"seed": 13, "num_candidates": 7})]


def test_what_a_loader_found_is_said_and_what_it_lacks_is_refused(tmp_path, recorded, dataset, monkeypatch):
    found = replace(dataset, notes=("skipped 2 rows of log.csv",), unsupported={"trend": "it has no times"})
    monkeypatch.setattr(stages, "load_dataset", lambda *_, **__: found)
    recorded.run(tmp_path / "run", needs=("interest",))
    assert "skipped 2 rows of log.csv" in recorded.said
    with pytest.raises(ValueError, match="cannot answer the need 'trend': it has no times"):
        recorded.run(tmp_path / "other", needs=("interest", "trend"))
    assert not (tmp_path / "other").exists()


def test_separator_and_end_reach_the_trainers(tmp_path, recorded):
    recorded.run(tmp_path / "run", encoding="index")
    for stage in recorded.stages:
        assert len(stage.options["separator"]) >= 1
        assert len(stage.options["end"]) == 1
        assert stage.options["separator"] == stage.examples.task.builder.separator
        assert stage.options["end"] == stage.examples.task.builder.end


def test_too_few_examples_for_a_step_are_told_before_anything_is_written(tmp_path, recorded, dataset):
    available = len(dataset.train)
    with pytest.raises(ValueError, match=f"a step takes {available + 1} rankings, and there are {available}"):
        recorded.run(tmp_path / "run", prompts_per_step=available + 1)
    with pytest.raises(ValueError, match=f"a step takes {2 * available} rankings"):
        recorded.run(tmp_path / "run", prompts_per_step=available, num_generations=2)
    assert not (tmp_path / "run").exists()
    recorded.run(tmp_path / "run", prompts_per_step=available)


def test_what_the_prompts_of_a_run_show(recorded, dataset):
    def builder(needs=("interest",), **changes):
        config = ExperimentConfig(output="unused", needs=needs, **changes)
        return model_module.make_model(config, dataset, [get_need(need) for need in needs])[2]

    assert builder().encoding == "item_token"
    assert not builder().show_titles
    assert not builder().show_rising
    assert builder(("interest", "trend")).described
    assert not builder(("interest", "trend")).show_rising  # which marks say better
    assert builder(encoding="index").show_titles
    assert not builder(encoding="index").described
    assert not builder(encoding="index").show_rising
    assert builder(("interest", "trend"), encoding="index").show_rising


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The folder of a model that is not the embedded one."""
    folder = tmp_path_factory.mktemp("models") / "other"
    tokenizer = build_tokenizer(Catalogue(ids=("none",), titles=("Of another world",), topics=((),)), ["Rank"])
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    LlamaForCausalLM(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_model_shows_titles_and_scores_in_place(recorded, dataset, other_model):
    interest = [get_need("interest")]
    _, _, builder = model_module.make_model(
        ExperimentConfig(output="unused", model=str(other_model)), dataset, interest
    )
    assert (builder.encoding, builder.show_titles, builder.max_title_tokens) == ("score", True, 24)
    config = ExperimentConfig(output="unused", model=str(other_model), encoding="item_token")
    model, tokenizer, builder = model_module.make_model(config, dataset, interest)
    assert (builder.encoding, builder.show_titles) == ("item_token", True)
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)


def test_options_of_lora_reach_the_adapters(recorded, dataset):
    pytest.importorskip("peft")
    config = ExperimentConfig(output="unused", lora=3, lora_alpha=7, lora_targets=("q_proj", "v_proj"))
    model, tokenizer, _ = model_module.make_model(config, dataset, [get_need("interest")])
    lora = model.active_peft_config
    assert (lora.r, lora.lora_alpha, set(lora.target_modules)) == (3, 7, {"q_proj", "v_proj"})
    items = tokenizer.convert_tokens_to_ids(describing_tokens(dataset.catalogue))
    assert [sorted(ids) for ids in lora.trainable_token_indices.values()] == [sorted(items)]
    index = ExperimentConfig(output="unused", lora=3, encoding="index")
    model, _, _ = model_module.make_model(index, dataset, [get_need("interest")])
    assert not model.active_peft_config.trainable_token_indices, "items have no tokens of their own"


def test_micro_batches_add_up_to_a_step(tmp_path, recorded):
    recorded.run(tmp_path / "run", prompts_per_step=12, num_generations=2, micro_batch=4)
    *supervised, reinforcement = recorded.stages
    for stage, rankings in (*((one, 24) for one in supervised), (reinforcement, 12)):
        args = stage.args
        assert args.per_device_train_batch_size == 4
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == rankings
    with pytest.raises(ValueError, match="--micro-batch 5 must divide --prompts-per-step 12"):
        ExperimentConfig(output="x", prompts_per_step=12, micro_batch=5)


def test_a_language_model_draws_many_rankings_where_they_cost_nothing():
    def of(**options):
        config = ExperimentConfig(output="x", prompts_per_step=6, **options)
        return config.num_generations, config.supervised_lists

    assert of() == (1, 6)
    assert of(mode="one-pass") == (1, 6)
    assert of(model="some/model") == (16, 6)
    assert of(model="some/model", encoding="label", mode="one-pass") == (16, 6)
    assert of(model="some/model", encoding="label") == (1, 6)
    assert of(model="some/model", num_generations=2) == (2, 6)
    assert of(model="some/model", encoding="label", num_generations=2) == (2, 12)


def test_no_format_stage_where_it_has_no_steps(tmp_path, recorded):
    recorded.run(tmp_path / "run", warmup_steps=0, baselines=("listwise",))
    assert [stage.stage for stage in recorded.stages] == ["listwise", "reinforcement", "listwise"]
    assert (tmp_path / "run" / "base" / "model.safetensors").is_file()


def test_results_of_some_lists_are_of_those_that_the_seed_draws(tmp_path, recorded, dataset):
    users = {}
    for run, seed in enumerate((0, 0, 1)):
        results = recorded.run(tmp_path / f"run{run}", eval_lists=3, seed=seed)
        values = next(iter(results.per_list["trained"].values()))["ndcg@5"]
        drawn = np.sort(np.random.default_rng(seed).permutation(len(dataset.test))[:3])
        assert results.users.tolist() == [dataset.test[i].user for i in drawn]
        assert len(values) == 3
        users.setdefault(seed, []).append(results.users.tolist())
        card, page = ((tmp_path / f"run{run}" / name).read_text() for name in ("README.md", "report.html"))
        assert "On 3 test lists of users" in card
        assert f"{len(dataset.train)} training lists, 3 test lists" in page
    assert users[0][0] == users[0][1]
    assert any(f"results are of 3 of {len(dataset.test)} test lists" in said for said in recorded.said)


def test_defaults_are_those_of_the_model():
    embedded, pretrained = (ExperimentConfig(output="x", model=model) for model in ("embedded", "some/model"))
    assert (embedded.encoding, pretrained.encoding) == ("item_token", "score")
    assert (embedded.warmup_steps, embedded.listwise_steps, embedded.prompts_per_step) == (6, 150, 192)
    assert (pretrained.warmup_steps, pretrained.listwise_steps, pretrained.prompts_per_step) == (0, 100, 8)
    assert (embedded.temperature, pretrained.temperature) == (0.3, 1.0)
    assert ExperimentConfig(output="x", model="some/model", steps=3, temperature=0.5).steps == 3


def test_checkpointed_layers_are_those_of_every_stage(tmp_path, recorded):
    recorded.run(tmp_path / "run", gradient_checkpointing=True)
    for stage in recorded.stages:
        args = vars(stage.args)
        name = "activation" if "activation_checkpointing" in args else "gradient"  # since transformers 5.20
        assert args[f"{name}_checkpointing"]
        assert args[f"{name}_checkpointing_kwargs"] == {"use_reentrant": False}
