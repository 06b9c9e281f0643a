"""One experiment from data to table: warm up, reinforce, compare on unseen users, write the run's folder.

The stages are functions of a few plain objects; what a stage learns is in the model it returns, what it measures in
the :class:`flexrec.experiment.run_folder.Results` it fills.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from flexrec.data.interactions import load_interactions
from flexrec.data.kuairec import load_kuairec
from flexrec.data.lists import RankingDataset, RankingList
from flexrec.data.movielens import load_movielens
from flexrec.data.simulator import simulate
from flexrec.evaluation.baselines import BASELINES, MMR, ItemKNN
from flexrec.evaluation.evaluate import Evaluation
from flexrec.evaluation.statistics import bootstrap_interval
from flexrec.experiment.config import EMBEDDED, ExperimentConfig
from flexrec.experiment.model import make_model
from flexrec.experiment.run_folder import WARM_START, Results, RunFolder, RunInfo, load_checkpoint
from flexrec.metrics import parse_metric
from flexrec.ops.ranking_metric import greedy_ranking
from flexrec.policy.distributed import (
    num_processes,
    of_main_process,
    on_main_process,
    process_index,
    spreads_parameters,
    whole_state_dict,
)
from flexrec.policy.lora import require_peft
from flexrec.profiling import profile_steps
from flexrec.task.critic import Critic
from flexrec.task.examples import RankingTask, TrainingExamples
from flexrec.task.needs import Need, get_need
from flexrec.task.prompts import PromptBuilder
from flexrec.trainer.base import RankingTrainer
from flexrec.trainer.callbacks import Clock, Curve, ProgressBar, Stage, StepLog
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer
from flexrec.trainer.supervised import SupervisedTrainer


def load_dataset(name: str, folder: str | None, seed: int) -> RankingDataset:
    """The data set of a name; ``folder`` in the published format where it has one."""
    if name == "simulated":
        return simulate(seed=seed)
    if folder is None:
        raise ValueError(f"--dataset {name} needs --data FOLDER, the folder with its published files")
    if name == "kuairec":
        return load_kuairec(folder, seed=seed)
    if name == "interactions":
        return load_interactions(folder, seed=seed)
    return load_movielens(folder, seed=seed)


def run_experiment(config: ExperimentConfig, say: Callable[[str], None] = print) -> Results:
    """Train and evaluate as ``config`` says; writes the run's folder and returns the results.

    In several processes (``accelerate launch``, ``torchrun``) all call this; the main one writes and says.

    Raises:
        FileExistsError: the output folder holds something, and ``config.resume`` is not set.
        FileNotFoundError, ValueError: data, needs or options that cannot be used.
        ImportError: ``config.lora`` without PEFT.
    """
    PartialState()  # where there are several processes, they meet
    folder = RunFolder(config.output)
    with folder.locked() if process_index() == 0 else nullcontext():
        return _run_in(folder, config, say if process_index() == 0 else _say_nothing)


def _run_in(folder: RunFolder, config: ExperimentConfig, say: Callable[[str], None]) -> Results:
    on_main_process(lambda: folder.check_usable(config))
    needs = [get_need(name) for name in config.needs]
    _reinforcement_arguments(config)  # options that contradict each other are an error before anything is loaded
    parse_metric(config.metric)
    if config.lora is not None:
        require_peft()
    set_seed(config.seed)
    clock = Clock()

    say(f"Loading the {config.dataset} data ..")
    dataset = load_dataset(config.dataset, config.data, config.seed)
    for note in dataset.notes:
        say(note)
    dataset.check_needs(config.needs)
    model, tokenizer, builder = make_model(config, dataset, needs)
    say(
        f"{len(dataset.catalogue)} items; {len(dataset.train)} lists of training users, {len(dataset.test)} of "
        f"{len({lst.user for lst in dataset.test})} other users to test on; model {config.model} with "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, of which "
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f}M are trained"
    )
    wanted, available = config.prompts_per_step * config.num_generations, len(dataset.train) * len(needs)
    if wanted > available:
        raise ValueError(
            f"a step takes {wanted} rankings, and there are {available} training examples: use fewer --prompts-per-step"
        )
    critic = None
    if config.critic or (config.critic is None and dataset.unobserved == "critic"):
        with clock.stage("critic"):
            critic = Critic.fit(
                dataset.log,
                dataset.catalogue,
                lists=dataset.train if dataset.unobserved == "critic" else (),
                noise=dataset.noise,
                seed=config.seed,
                progress=process_index() == 0,
            )
    task = RankingTask(dataset.catalogue, needs, builder, critic)
    examples = TrainingExamples(task, dataset.train, resample=dataset.resample, seed=config.seed)
    tests = {need.name: [task.test_example(lst, need) for lst in dataset.test] for need in needs}
    results = Results(np.array([lst.user for lst in dataset.test]), seconds=clock.seconds)
    evaluate = Evaluation(tests, builder, config.num_ranked)

    # From here on the folder is written to; mistakes that can be seen before have left no trace.
    on_main_process(lambda: folder.write_config(config))
    info = RunInfo.of(config, builder, dataset)
    resumed = config.resume and folder.has_base()
    checkpoint = of_main_process(folder.latest_checkpoint(say) if resumed and process_index() == 0 else None)
    if resumed:
        on_main_process(lambda: folder.cut_log(checkpoint[0] if checkpoint else None))
    log = StepLog(folder.log, append=resumed)
    if not resumed:
        if config.lora is not None and config.model == EMBEDDED:
            on_main_process(lambda: folder.save_backbone(model))
            model.active_peft_config.base_model_name_or_path = str(folder.backbone.absolute())
        with clock.stage("format"):
            _supervise(model, "format", config.warmup_steps, config, examples, builder, log)
        on_main_process(lambda: folder.save_base(model, tokenizer, info))
    results.per_list["base"] = evaluate(model, "base")
    if config.warmup == "listwise" and checkpoint is None:
        with clock.stage("listwise warm-up"):
            _supervise(model, "listwise", config.listwise_steps, config, examples, builder, log)
        results.per_list[WARM_START] = evaluate(model, WARM_START)
        on_main_process(lambda: folder.save_warm_start(results))
    elif config.warmup == "listwise":
        folder.load_warm_start(results)

    with clock.stage("reinforcement") as stage, ExitStack() as listening:
        profile = listening.enter_context(profile_steps()) if config.profile else None
        _reinforce(model, config, examples, builder, log, evaluate, stage, checkpoint)
    if profile is not None:
        say(profile.table())
    if config.lora is not None and config.lora_save == "merged":
        model = model.merge_and_unload()  # before the evaluation, which is of what is saved
    results.per_list["trained"] = evaluate(model, "trained")
    on_main_process(lambda: folder.save(model, tokenizer, info, dataset))

    if config.listwise_baseline:
        del model  # there is room for one
        start = folder.load_base(tokenizer, config.lora)
        steps = of_main_process(_equal_time_steps(clock, config))
        with clock.stage("listwise"):
            _supervise(start, "listwise", steps, config, examples, builder, log)
        results.per_list["listwise"] = evaluate(start, "listwise")
    for name, make in BASELINES.items():
        baseline = make(dataset)
        orders = [np.argsort(-baseline.scores(lst), kind="stable") for lst in dataset.test]
        results.per_list[name] = evaluate.of_rankings({need.name: orders for need in needs})
    if critic is not None:
        results.per_list["critic"] = evaluate.of_rankings(critic_rankings(critic, task, dataset.test))
    if any(need.metric is not None for need in needs):
        results.per_list[MMR.name] = evaluate.of_rankings(mmr_rankings(task, dataset))
        if critic is not None:
            results.per_list["greedy"] = evaluate.of_rankings(greedy_rankings(critic, task, dataset.test))
    clock.seconds["total"] = clock.elapsed()
    on_main_process(lambda: folder.write_results(asdict(config), results))
    return results


def critic_rankings(critic: Critic, task: RankingTask, lists: Sequence[RankingList]) -> dict[str, list[np.ndarray]]:
    """need -> the order of every list's candidates by the gains that the critic expects, as any baseline is ranked."""
    expected = critic.predict_many(lists)
    return {
        need.name: [
            np.argsort(-need.gains(lst, task.catalogue, *of_list)[0], kind="stable")
            for lst, of_list in zip(lists, expected, strict=True)
        ]
        for need in task.needs
    }


def greedy_rankings(critic: Critic, task: RankingTask, lists: Sequence[RankingList]) -> dict[str, list[np.ndarray]]:
    """:func:`critic_rankings`, but for needs with a metric of their own the greedy order of the expected gains."""
    expected, topics = critic.predict_many(lists), task.catalogue.topic_matrix

    def order(need: Need, metric: str, lst: RankingList, of_list: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        gains, about = need.gains(lst, task.catalogue, *of_list)[0], topics[lst.candidates]
        return greedy_ranking(torch.from_numpy(gains)[None], metric, topics=torch.from_numpy(about)[None])[0].numpy()

    return critic_rankings(critic, task, lists) | {
        need.name: [order(need, need.metric, lst, of_list) for lst, of_list in zip(lists, expected, strict=True)]
        for need in task.needs
        if need.metric is not None
    }


_VALIDATION_LISTS = 500


def mmr_rankings(task: RankingTask, dataset: RankingDataset) -> dict[str, list[np.ndarray]]:
    """need -> rankings of the test lists by maximal marginal relevance.

    Relevance is the gain that the critic expects, or the score of item-KNN where there is no critic. The trade-off is
    that with the best metric of the need's on training lists, by the gains that training knows.
    """
    catalogue, knn = dataset.catalogue, None if task.critic is not None else ItemKNN(dataset)
    validation = dataset.train[:_VALIDATION_LISTS]

    def relevances(need: Need, lists: Sequence[RankingList]) -> list[np.ndarray]:
        if knn is not None:
            return [knn.scores(lst) for lst in lists]
        assert task.critic is not None
        expected = zip(lists, task.critic.predict_many(lists), strict=True)
        return [need.gains(lst, catalogue, *of_list)[0] for lst, of_list in expected]

    def rankings(need: Need) -> list[np.ndarray]:
        feedback = zip(validation, task.training_feedback(validation), strict=True)
        gains = [need.gains(lst, catalogue, *of_list)[0] for lst, of_list in feedback]
        metric, topics = f"{need.metric or 'alpha_ndcg'}@5", catalogue.topic_matrix
        mmr = MMR.tuned(topics, validation, relevances(need, validation), gains, metric)
        found = zip(dataset.test, relevances(need, dataset.test), strict=True)
        return [mmr.order(lst.candidates, relevance) for lst, relevance in found]

    return {need.name: rankings(need) for need in task.needs}


def evaluate_run(
    folder: Path, dataset: str | None = None, data: str | None = None, needs: Sequence[str] | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """need -> metric -> mean, low and high (95 % interval over users) of a finished run on a data set's test users.

    Arguments that are None are those that the run was trained with.
    """
    trained_with, model, builder = RunFolder(folder).load()
    name = dataset or trained_with.dataset
    loaded = load_dataset(
        name, data or (trained_with.data if name == trained_with.dataset else None), trained_with.seed
    )
    task = RankingTask(loaded.catalogue, [get_need(need) for need in needs or trained_with.needs], builder)
    tests = {need.name: [task.test_example(lst, need) for lst in loaded.test] for need in task.needs}
    values = Evaluation(tests, builder, trained_with.num_ranked)(model, str(folder))
    users = np.array([lst.user for lst in loaded.test])

    def summary(of_lists: np.ndarray) -> dict[str, float]:
        low, high = bootstrap_interval(of_lists, clusters=users)
        return {"mean": float(of_lists.mean()), "low": low, "high": high}

    return {need: {metric: summary(v) for metric, v in metrics.items()} for need, metrics in values.items()}


def _say_nothing(text: str) -> None:
    """What the other processes say."""


def _training_arguments(config: ExperimentConfig, steps: int, prompts: int, learning_rate: float) -> dict[str, Any]:
    per_process, rest = divmod(prompts, num_processes())
    if rest or config.prompts_per_step % num_processes():
        raise ValueError(
            f"--prompts-per-step {config.prompts_per_step} cannot be split evenly among {num_processes()} processes"
        )
    return {
        "output_dir": str(RunFolder(config.output).checkpoints),
        "max_steps": steps,
        "per_device_train_batch_size": per_process,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(10, steps // 4),
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "bf16": config.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": config.seed,
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "log_level": "error",
        "disable_tqdm": True,  # the steps' logs go to a file, and ProgressBar draws the bar
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _supervise(
    model: Any,
    stage: str,
    steps: int,
    config: ExperimentConfig,
    examples: TrainingExamples,
    builder: PromptBuilder,
    log: StepLog,
) -> None:
    # As many rankings in a step as reinforcement has, each of another prompt.
    rankings = config.prompts_per_step * config.num_generations
    trainer = SupervisedTrainer(
        _to_train(model),
        TrainingArguments(**_training_arguments(config, steps, rankings, config.warmup_learning_rate)),
        examples,
        stage=stage,
        num_imitated=min((n for n in (config.num_ranked, parse_metric(config.metric).cutoff) if n), default=None),
        separator=builder.separator,
        end=builder.end,
        callbacks=[log.of_stage(stage), ProgressBar(stage)],
    )
    _train(trainer, model)


def _to_train(model: Any) -> Any:
    """``model``, or a copy where its parameters will be spread: what is spread is of no use to other stages."""
    return copy.deepcopy(model) if spreads_parameters() else model


def _train(trainer: RankingTrainer, model: Any, checkpoint: Path | None = None) -> None:
    """Train what :func:`_to_train` has made of ``model``, which is the trained model in the end."""
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if spreads_parameters():
        state = whole_state_dict(trainer.model_wrapped)
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        unset_hf_deepspeed_config()  # which would spread the next model while it is loaded


def _reinforcement_arguments(config: ExperimentConfig) -> FlexRecConfig:
    common = _training_arguments(config, config.steps, config.prompts_per_step, config.learning_rate)
    if config.save_every:
        common |= {"save_strategy": "steps", "save_steps": config.save_every, "save_total_limit": 2}
    return FlexRecConfig(**common, **config.of_trainer())


class _Seal(TrainerCallback):
    """Says of every checkpoint that it is whole, after all processes have written their part."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_main_process(lambda: None)
        on_main_process(lambda: self.folder.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}"))


def _reference(model: Any, config: ExperimentConfig, resumed: bool) -> Any:
    """A copy of the policy that reinforcement starts from, where the KL needs one; adapters need none."""
    if config.beta == 0 or config.lora is not None:
        return None
    folder = RunFolder(config.output)
    if resumed:  # the policy has moved on
        return folder.load_reference()
    on_main_process(lambda: folder.save_reference(model))
    return copy.deepcopy(model)


def _reinforce(
    model: Any,
    config: ExperimentConfig,
    examples: TrainingExamples,
    builder: PromptBuilder,
    log: StepLog,
    evaluate: Evaluation,
    stage: Stage,
    checkpoint: tuple[int, Path] | None,
) -> None:
    step, saved = checkpoint or (0, None)
    if saved is not None and step >= config.steps:  # interrupted after the last step
        load_checkpoint(model, saved)
        return
    reference = _reference(
        model, config, resumed=saved is not None
    )  # before there are arguments, by which DeepSpeed would spread it
    trainer = FlexRecTrainer(
        _to_train(model),
        _reinforcement_arguments(config),
        examples,
        reference=reference,
        separator=builder.separator,
        end=builder.end,
        callbacks=[log.of_stage("reinforcement"), ProgressBar("reinforcement"), _Seal(RunFolder(config.output))],
    )
    if config.eval_every:

        def evaluate_whole(_: Any, name: str) -> dict[str, dict[str, np.ndarray]]:
            with trainer.whole_model() as whole:
                return evaluate(whole, name)

        trainer.add_callback(Curve(evaluate_whole, log, config.eval_every, stage))
    _train(trainer, model, saved)


def _equal_time_steps(clock: Clock, config: ExperimentConfig) -> int:
    """Steps of listwise supervision in the time that the trained model took from the base on."""
    seconds = clock.seconds
    spent = seconds.get("listwise warm-up", 0.0) + seconds["reinforcement"]
    if "listwise warm-up" in seconds:
        pace = seconds["listwise warm-up"] / config.listwise_steps
    elif "format" in seconds:
        pace = seconds["format"] / config.warmup_steps
    else:  # a resumed run did not time its supervised stages
        return config.listwise_steps + config.steps
    return max(1, round(spent / pace))
