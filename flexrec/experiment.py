"""One experiment from data to table: warm up, reinforce, compare on unseen users, write the run's folder.

The stages are functions of a few plain objects; what a stage learns is in the model it returns, what it measures in
the :class:`Results` it fills.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from flexrec.baselines import BASELINES
from flexrec.critic import Critic
from flexrec.data import RankingDataset, load_movielens, simulate
from flexrec.embedded import HIDDEN_SIZE, build_model, build_tokenizer, item_vectors
from flexrec.evaluation import METRICS, Comparison, bootstrap_interval, rank_metrics, relative_change
from flexrec.metrics import parse_metric
from flexrec.needs import NEEDS, Need, get_need
from flexrec.profiling import profile_steps
from flexrec.progress import Clock, Curve, ProgressBar, Stage, StepLog
from flexrec.prompts import PromptBuilder, add_item_tokens
from flexrec.ranker import RUN_FILE, Ranker, RunInfo, rank_examples
from flexrec.supervised import SupervisedTrainer
from flexrec.task import Example, RankingTask, TrainingExamples
from flexrec.trainer import FlexRecConfig, FlexRecTrainer

EMBEDDED = "embedded"


@dataclass(frozen=True)
class ExperimentConfig:
    """What ``flexrec train`` takes; the defaults are those of the command line."""

    output: str
    dataset: str = "simulated"
    data: str | None = None
    model: str = EMBEDDED
    encoding: str | None = None  # default: item_token for the embedded model, index for any other
    needs: tuple[str, ...] = tuple(NEEDS)
    credit: str = "all_actions"
    tilt: float | None = None
    metric: str = "ndcg@10"
    warmup: str = "listwise"
    steps: int = 40
    warmup_steps: int = 30
    listwise_steps: int = 40
    prompts_per_step: int = 192
    num_generations: int = 1
    num_iterations: int = 1
    baseline: str = "none"
    scale: str = "batch"
    uncertainty: str = "rollout"
    learning_rate: float = 5e-4  # of reinforcement
    warmup_learning_rate: float = 1e-3  # of the supervised stages
    entropy_coef: float = 0.005
    beta: float = 0.0
    temperature: float = 0.3
    num_ranked: int | None = None
    listwise_baseline: bool = True
    profile: bool = False
    critic: bool | None = None  # default: where the data set says that feedback is missing
    eval_every: int = 0
    save_every: int = 0
    resume: bool = False
    seed: int = 0


@dataclass
class Results:
    """Per-list metrics of every system and need, and the seconds every stage took."""

    users: np.ndarray  # (L,) user of each test list
    per_list: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)  # system, need, metric: (L,)
    seconds: dict[str, float] = field(default_factory=dict)

    def means(self, system: str) -> dict[str, dict[str, float]]:
        return {
            need: {metric: float(values.mean()) for metric, values in metrics.items()}
            for need, metrics in self.per_list[system].items()
        }

    def compare(self, new: str, base: str, need: str, metric: str = "ndcg@5") -> Comparison:
        """Paired comparison over the test lists, lists of one user resampled together."""
        values = self.per_list
        return relative_change(values[new][need][metric], values[base][need][metric], clusters=self.users)


def load_dataset(name: str, folder: str | None, seed: int) -> RankingDataset:
    """The data set of a name; ``folder`` in the published format where it has one."""
    if name == "simulated":
        return simulate(seed=seed)
    if folder is None:
        raise ValueError(f"--dataset {name} needs --data FOLDER, the folder with its published files")
    return load_movielens(folder, seed=seed)


def run_experiment(config: ExperimentConfig, say: Callable[[str], None] = print) -> Results:
    """Train and evaluate as ``config`` says; writes the run's folder and returns the results.

    Raises:
        FileExistsError: the output folder holds something, and ``config.resume`` is not set.
        FileNotFoundError, ValueError: data, needs or options that cannot be used.
    """
    folder = Path(config.output)
    _check_folder(folder, config.resume)
    needs = [get_need(name) for name in config.needs]
    _reinforcement_arguments(config)  # options that contradict each other are an error before anything is loaded
    parse_metric(config.metric)
    set_seed(config.seed)
    clock = Clock()

    say(f"Loading the {config.dataset} data ..")
    dataset = load_dataset(config.dataset, config.data, config.seed)
    model, tokenizer, builder = _make_model(config, dataset, needs)
    say(
        f"{len(dataset.catalogue)} items; {len(dataset.train)} lists of training users, {len(dataset.test)} of "
        f"{len({lst.user for lst in dataset.test})} other users to test on; model {config.model} with "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
    )
    wanted, available = config.prompts_per_step * config.num_generations, len(dataset.train) * len(needs)
    if wanted > available:
        raise ValueError(
            f"a step takes {wanted} rankings, and there are {available} training examples: use fewer --prompts-per-step"
        )
    critic = None
    if config.critic or (config.critic is None and dataset.unobserved == "critic"):
        with clock.stage("critic"):
            critic = Critic.fit(dataset.log, dataset.catalogue, seed=config.seed, progress=True)
    task = RankingTask(dataset.catalogue, needs, builder, critic)
    examples = TrainingExamples(task, dataset.train, resample=dataset.resample, seed=config.seed)
    # Supervision imitates the order of what was observed; a guess of the critic is no label.
    observed = RankingTask(dataset.catalogue, needs, builder)
    labels = TrainingExamples(observed, dataset.train, resample=dataset.resample, seed=config.seed)
    tests = {need.name: [task.test_example(lst, need) for lst in dataset.test] for need in needs}
    results = Results(np.array([lst.user for lst in dataset.test]), seconds=clock.seconds)
    evaluate = _Evaluation(tests, builder, config.num_ranked)

    # From here on the folder is written to; mistakes that can be seen before have left no trace.
    folder.mkdir(parents=True, exist_ok=True)
    log = StepLog(folder / "log.jsonl", append=config.resume)
    if not _has_base(config):
        with clock.stage("format"):
            _supervise(model, "format", config.warmup_steps, config, examples, builder, log)
        _save_model(folder / "base", model, tokenizer, config, builder, dataset)
    results.per_list["base"] = evaluate(model, "base")
    start = copy.deepcopy(model)
    if config.warmup == "listwise" and not _checkpoints(config):
        with clock.stage("listwise warm-up"):
            _supervise(model, "listwise", config.listwise_steps, config, labels, builder, log)

    with clock.stage("reinforcement") as stage, ExitStack() as listening:
        profile = listening.enter_context(profile_steps()) if config.profile else None
        _reinforce(model, start, config, examples, builder, log, evaluate, stage)
    if profile is not None:
        say(profile.table())
    results.per_list["trained"] = evaluate(model, "trained")
    _save_run(folder, model, tokenizer, config, builder, dataset)

    if config.listwise_baseline:
        steps = _equal_time_steps(clock, config)
        with clock.stage("listwise"):
            _supervise(start, "listwise", steps, config, labels, builder, log)
        results.per_list["listwise"] = evaluate(start, "listwise")
    for name, make in BASELINES.items():
        baseline = make(dataset)
        orders = [np.argsort(-baseline.scores(lst), kind="stable") for lst in dataset.test]
        results.per_list[name] = evaluate.of_rankings({need.name: orders for need in needs})
    clock.seconds["total"] = clock.elapsed()
    write_results(folder, config, results)
    return results


def evaluate_run(
    folder: Path, dataset_name: str | None, data: str | None, needs: list[str] | None
) -> dict[str, dict[str, dict[str, float]]]:
    """need -> metric -> mean, low and high (95 % interval over users) of a finished run on a data set's test users.

    Arguments that are None are those that the run was trained with.
    """
    ranker = Ranker(folder)
    trained_with = ranker.info
    name = dataset_name or trained_with.dataset
    dataset = load_dataset(
        name, data or (trained_with.data if name == trained_with.dataset else None), trained_with.seed
    )
    task = RankingTask(dataset.catalogue, [get_need(need) for need in needs or trained_with.needs], ranker.builder)
    tests = {need.name: [task.test_example(lst, need) for lst in dataset.test] for need in task.needs}
    values = _Evaluation(tests, ranker.builder, trained_with.num_ranked)(ranker.model, str(folder))
    users = np.array([lst.user for lst in dataset.test])

    def summary(of_lists: np.ndarray) -> dict[str, float]:
        low, high = bootstrap_interval(of_lists, clusters=users)
        return {"mean": float(of_lists.mean()), "low": low, "high": high}

    return {need: {metric: summary(v) for metric, v in metrics.items()} for need, metrics in values.items()}


def write_results(folder: Path, config: ExperimentConfig, results: Results) -> None:
    """Write metrics.json (means, changes, configuration, seconds) and per_list.npz (every value, for paired tests)."""
    baselines = [name for name in results.per_list if name not in ("base", "trained")]
    changes = {
        need: {base: asdict(results.compare("trained", base, need)) for base in ("base", *baselines)}
        for need in results.per_list["base"]
    }
    metrics = {
        "base": results.means("base"),
        "trained": results.means("trained"),
        "baselines": {name: results.means(name) for name in baselines},
        "changes_ndcg@5": changes,
        "config": asdict(config),
        "seconds": {name: round(seconds, 2) for name, seconds in results.seconds.items()},
    }
    arrays: dict[str, Any] = {
        f"{system}/{need}/{metric}": values
        for system, needs in results.per_list.items()
        for need, per_metric in needs.items()
        for metric, values in per_metric.items()
    }
    np.savez_compressed(folder / "per_list.npz", users=results.users, **arrays)
    partial = folder / "metrics.json.partial"
    partial.write_text(json.dumps(metrics, indent=2) + "\n")
    partial.replace(folder / "metrics.json")


def _check_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder whose contents a run would touch."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--output {folder} exists and is no folder")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise FileExistsError(
            f"--output {folder} exists and is not empty: choose another folder, or continue that run with --resume"
        )
    if resume and (folder / "metrics.json").is_file():
        raise FileExistsError(f"--output {folder} holds a finished run: there is nothing to resume")


def _has_base(config: ExperimentConfig) -> bool:
    """Whether a run to be resumed had finished its format stage."""
    return config.resume and (Path(config.output) / "base" / RUN_FILE).is_file()


def _checkpoints(config: ExperimentConfig) -> list[Path]:
    """Checkpoints of a run to be resumed, the latest last."""
    folder = Path(config.output) / "checkpoints"
    return sorted(folder.glob("checkpoint-*"), key=_step_of) if config.resume else []


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _make_model(config: ExperimentConfig, dataset: RankingDataset, needs: list[Need]) -> tuple[Any, Any, PromptBuilder]:
    """Model, tokenizer and prompt builder: the embedded default, one from a hub or a folder, or a resumed run's."""
    encoding = config.encoding or ("item_token" if config.model == EMBEDDED else "index")
    if _has_base(config):
        base = Path(config.output) / "base"
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
        model: Any = AutoModelForCausalLM.from_pretrained(base)
    elif config.model == EMBEDDED:
        tokenizer = build_tokenizer(dataset.catalogue, [wording for need in needs for wording in need.wordings])
        ids, size = dataset.catalogue.ids, HIDDEN_SIZE
        vectors = item_vectors(dataset.log, len(ids), size, seed=config.seed)
        model = build_model(tokenizer, hidden_size=size, item_ids=ids, vectors=vectors, seed=config.seed)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.model)
            model = AutoModelForCausalLM.from_pretrained(config.model)
        except (OSError, ValueError) as error:
            raise ValueError(f"--model {config.model!r} cannot be loaded: {error}") from error
        if encoding == "item_token":
            add_item_tokens(model, tokenizer, dataset.catalogue)
    if torch.cuda.is_available():
        model.to("cuda")
    builder = PromptBuilder(
        tokenizer,
        encoding=encoding,
        show_titles=config.model != EMBEDDED or encoding != "item_token",
        show_rising=any(need.name == "trend" for need in needs),
    )
    return model, tokenizer, builder


def _training_arguments(config: ExperimentConfig, steps: int, prompts: int, learning_rate: float) -> dict[str, Any]:
    return {
        "output_dir": str(Path(config.output) / "checkpoints"),
        "max_steps": steps,
        "per_device_train_batch_size": prompts,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(10, steps // 4),
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
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
        model,
        TrainingArguments(**_training_arguments(config, steps, rankings, config.warmup_learning_rate)),
        examples,
        stage=stage,
        separator=builder.separator,
        end=builder.end,
        callbacks=[log.of_stage(stage), ProgressBar(stage)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _reinforcement_arguments(config: ExperimentConfig) -> FlexRecConfig:
    common = _training_arguments(config, config.steps, config.prompts_per_step, config.learning_rate)
    if config.save_every:
        common |= {"save_strategy": "steps", "save_steps": config.save_every, "save_total_limit": 2}
    return FlexRecConfig(
        **common,
        num_generations=config.num_generations,
        num_iterations=config.num_iterations,
        temperature=config.temperature,
        metric=config.metric,
        num_ranked=config.num_ranked,
        credit=config.credit,
        tilt=config.tilt if config.credit == "all_actions" else None,
        baseline=config.baseline,
        scale=config.scale,
        uncertainty=config.uncertainty,
        entropy_coef=config.entropy_coef,
        beta=config.beta,
    )


def _reinforce(
    model: Any,
    start: Any,
    config: ExperimentConfig,
    examples: TrainingExamples,
    builder: PromptBuilder,
    log: StepLog,
    evaluate: _Evaluation,
    stage: Stage,
) -> None:
    callbacks: list[TrainerCallback] = [log.of_stage("reinforcement"), ProgressBar("reinforcement")]
    if config.eval_every:
        callbacks.append(Curve(evaluate, log, config.eval_every, stage))
    trainer = FlexRecTrainer(
        model,
        _reinforcement_arguments(config),
        examples,
        reference=start if config.beta > 0 else None,
        separator=builder.separator,
        end=builder.end,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoints = _checkpoints(config)
    if checkpoints and _step_of(checkpoints[-1]) >= config.steps:  # interrupted after the last step
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(checkpoints[-1]).state_dict())
        return
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)


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


def _save_model(
    folder: Path, model: Any, tokenizer: Any, config: ExperimentConfig, builder: PromptBuilder, dataset: RankingDataset
) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    RunInfo(
        encoding=builder.encoding,
        show_titles=builder.show_titles,
        show_rising=builder.show_rising,
        max_history=max(len(lst.history) for lst in dataset.train),
        num_ranked=config.num_ranked,
        temperature=config.temperature,
        dataset=config.dataset,
        data=config.data,
        needs=list(config.needs),
        seed=config.seed,
    ).save(folder)


def _save_run(
    folder: Path, model: Any, tokenizer: Any, config: ExperimentConfig, builder: PromptBuilder, dataset: RankingDataset
) -> None:
    """The trained model with what is needed to answer requests: the catalogue, what rises, users' last items."""
    catalogue, log = dataset.catalogue, dataset.log
    trend = np.zeros(len(catalogue)) if dataset.trend is None else dataset.trend
    rises = {catalogue.ids[i]: round(float(trend[i]), 4) for i in np.flatnonzero(trend)}
    shown = {"ids": catalogue.ids, "titles": catalogue.titles, "trend": rises}
    (folder / "catalogue.json").write_text(json.dumps(shown) + "\n")
    most = max(len(lst.history) for lst in dataset.train)
    histories: dict[str, list[dict[str, Any]]] = {}
    for user, item, interest in zip(log.users.tolist(), log.items.tolist(), log.interest.tolist(), strict=True):
        histories.setdefault(str(user), []).append({"id": catalogue.ids[item], "liked": interest >= 0.5})
    (folder / "histories.json").write_text(
        json.dumps({user: events[-most:] for user, events in histories.items()}) + "\n"
    )
    _save_model(folder, model, tokenizer, config, builder, dataset)


class _Evaluation:
    """Greedy rankings of the test examples of every need, and their metrics."""

    def __init__(self, tests: dict[str, list[Example]], builder: PromptBuilder, num_ranked: int | None) -> None:
        self.tests = tests
        self.builder = builder
        self.num_ranked = num_ranked

    def __call__(self, model: Any, name: str) -> dict[str, dict[str, np.ndarray]]:
        return self.of_rankings(
            {
                need: rank_examples(
                    model,
                    examples,
                    self.builder,
                    num_ranked=self.num_ranked,
                    description=f"Evaluating {name}, {need}",
                )
                for need, examples in self.tests.items()
            }
        )

    def of_rankings(self, rankings: dict[str, list[np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
        """need -> metric -> (L,) values of rankings given as candidate indices, best first."""
        results = {}
        for need, examples in self.tests.items():
            lengths = np.array([len(example.gains) for example in examples])
            gains = np.zeros((len(examples), lengths.max()), dtype=np.float64)
            ranked = np.array([len(ranking) for ranking in rankings[need]])
            for n, (example, ranking) in enumerate(zip(examples, rankings[need], strict=True)):
                rest = np.setdiff1d(np.arange(lengths[n]), ranking)
                gains[n, : lengths[n]] = example.gains[np.concatenate([ranking, rest])]
            results[need] = rank_metrics(gains, METRICS, lengths=lengths, num_ranked=ranked)
        return results
