"""The stages in which a run trains a policy: supervision, reinforcement, and what these are compared with."""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from flexrec.evaluation.evaluate import Evaluation
from flexrec.experiment.config import EMBEDDED, ExperimentConfig
from flexrec.experiment.run_folder import FORMAT, REINFORCEMENT, WARM_UP, RunFolder, load_checkpoint
from flexrec.experiment.trackers import tracking
from flexrec.metrics import parse_metric
from flexrec.policy.distributed import num_processes, on_main_process, spreads_parameters, whole_state_dict
from flexrec.profiling import Profile, profile_steps
from flexrec.task.examples import TrainingExamples
from flexrec.task.prompts import PromptBuilder
from flexrec.trainer.base import RankingTrainer
from flexrec.trainer.callbacks import Clock, Curve, ProgressBar, SaveInTime, Stage, StepLog
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer
from flexrec.trainer.supervised import SupervisedTrainer

KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN, of torch in front of it

# How others credit rankings: in groups, whose means are subtracted and whose spreads are divided by, rank by rank
# (GRPO, arXiv 2402.03300). Rec-R1 (arXiv 2503.24289) has one reward for a list and ratios of tokens, Rank-GRPO
# (arXiv 2510.20150) the metric's terms from a rank on and ratios of items.
_GRPO: dict[str, Any] = {"baseline": "rank", "scale": "rank", "uncertainty": "none", "tilt": None}
GRPO: dict[str, dict[str, Any]] = {
    "sequence_grpo": {**_GRPO, "credit": "sequence", "importance_level": "token"},
    "rank_grpo": {**_GRPO, "credit": "rank", "importance_level": "item"},
}
# Arguments that are the same whatever is trained.
EVERY_TRAINING: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "save_strategy": "no",
    "report_to": "none",
    "remove_unused_columns": False,
    "dataloader_drop_last": True,
    "disable_tqdm": True,  # the steps' logs go to a file, and ProgressBar draws the bar
}
MAX_GROUP = 8  # rankings of a prompt that GRPO compares


@dataclass(frozen=True)
class Training:
    """What the stages of one run share, and the stages. Each trains the model that it is given, and writes a line of
    the log for every step and a point of the curves (``--eval-every``, and in the end ``finished``)."""

    config: ExperimentConfig
    examples: TrainingExamples
    builder: PromptBuilder
    log: StepLog
    clock: Clock
    evaluate: Evaluation

    def format(self, model: Any) -> None:
        """The items and the form of an answer, nothing of what is good; of no steps where there are none."""
        if self.config.warmup_steps:
            self._supervise(model, "format", self.config.warmup_steps, FORMAT, after=None)

    def warm_up(self, model: Any) -> None:
        """Supervision before reinforcement."""
        self._supervise(model, "listwise", self.config.listwise_steps, WARM_UP, after=FORMAT)

    def reinforce(self, model: Any, checkpoint: tuple[int, Path] | None = None) -> Profile | None:
        """Reinforcement, continued from a checkpoint where there is one; where its seconds went, if that was asked."""
        with ExitStack() as listening:
            # Listening costs nothing but on a GPU, which every span would wait for.
            heard = self.config.profile or not torch.cuda.is_available()
            profile = listening.enter_context(profile_steps()) if heard else None
            self._reinforce(model, self.config, REINFORCEMENT, checkpoint)
        return profile if self.config.profile else None

    def supervise_instead(self, model: Any, name: str, steps: int) -> None:
        """The listwise baseline, from the base on."""
        self._supervise(model, "listwise", steps, name, after=FORMAT)

    def reinforce_instead(self, model: Any, name: str) -> None:
        """A baseline by reinforcement, from where reinforcement began: as many steps, and rankings in each."""
        self._reinforce(model, grpo_config(self.config, name), name)

    def finished(self, name: str, values: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Log the evaluation after a stage, need -> metric -> (L,)."""
        self.log.evaluation(self.clock.ends[name], values)

    def equal_time_steps(self) -> int:
        """Steps of listwise supervision in the time that the trained model took from the base on."""
        seconds, config = self.clock.seconds, self.config
        spent = seconds.get(WARM_UP, 0.0) + seconds[REINFORCEMENT]
        if WARM_UP in seconds:
            pace = seconds[WARM_UP] / config.listwise_steps
        elif FORMAT in seconds and config.warmup_steps:
            pace = seconds[FORMAT] / config.warmup_steps
        else:  # a resumed run did not time its supervised stages
            return config.listwise_steps + config.steps
        return max(1, round(spent / pace))

    def _supervise(self, model: Any, kind: str, steps: int, name: str, after: str | None) -> None:
        config = self.config
        arguments = _training_arguments(config, steps, config.supervised_lists, config.warmup_learning_rate)
        cutoffs = (config.num_ranked, parse_metric(config.metric).cutoff)
        with self.clock.stage(name, steps, after) as stage:
            trainer = SupervisedTrainer(
                _to_train(model),
                TrainingArguments(**arguments),
                self.examples,
                stage=kind,
                num_imitated=min((n for n in cutoffs if n), default=None),
                separator=self.builder.separator,
                end=self.builder.end,
                one_pass=self.builder.one_pass,
                reasoning_end=self.builder.reasoning.get("reasoning_end"),
                callbacks=self._listeners(name, stage),
            )
            self._draw_curve(trainer, stage)
            _train(trainer, model)
        del trainer
        _free(model)

    def _reinforce(
        self, model: Any, config: ExperimentConfig, name: str, checkpoint: tuple[int, Path] | None = None
    ) -> None:
        step, saved = checkpoint or (0, None)
        after = WARM_UP if config.warmup == "listwise" else FORMAT
        with self.clock.stage(name, config.steps, after) as stage:
            if saved is not None and step >= config.steps:  # interrupted after the last step
                load_checkpoint(model, saved)
                return
            folder = RunFolder(config.output)
            reference = None
            if config.beta and config.lora is None:  # adapters are their own
                # Before there are arguments, by which DeepSpeed would spread it. A resumed run's policy has moved on.
                reference = copy.deepcopy(model) if saved is None else folder.load_reference()
            trainer = FlexRecTrainer(
                _to_train(model),
                reinforcement_arguments(config),
                self.examples,
                reference=reference,
                separator=self.builder.separator,
                end=self.builder.end,
                reasoning_end=self.builder.reasoning.get("reasoning_end"),
                num_tokens=self.builder.reasoning.get("num_tokens"),
                callbacks=[
                    *self._listeners(name, stage),
                    _Seal(folder),
                    *([SaveInTime()] if config.save_every is None else []),
                ],
            )
            self._draw_curve(trainer, stage)
            _train(trainer, model, saved)
        del trainer, reference
        _free(model)

    def _listeners(self, name: str, stage: Stage) -> list[TrainerCallback]:
        config = self.config
        return [
            self.log.of_stage(stage),
            ProgressBar(name),
            *([] if config.model == EMBEDDED else [_TrimMemory()]),
            *tracking(config.report_to or (), Path(config.output), name, asdict(config)),
        ]

    def _draw_curve(self, trainer: RankingTrainer, stage: Stage) -> None:
        if not self.config.eval_every:
            return

        def evaluate_whole(_: Any, name: str) -> dict[str, dict[str, np.ndarray]]:
            with trainer.whole_model() as whole:
                return self.evaluate(whole, name)

        trainer.add_callback(Curve(evaluate_whole, self.log, self.config.eval_every, stage))


def grpo_config(config: ExperimentConfig, name: str) -> ExperimentConfig:
    """The options of a baseline by reinforcement: as many rankings in a step as ``config`` has, in groups.

    Where one pass decides the rankings, however many, also from as many prompts.
    """
    more: dict[str, Any] = {"save_every": 0, **GRPO[name]}
    if config.mode == "one-pass":
        more["importance_level"] = "item"  # which is its only token
    if config.ranks_in_one_pass and config.num_generations > 1:
        return replace(config, **more)
    rankings = config.prompts_per_step * config.num_generations
    group = math.gcd(MAX_GROUP, rankings // num_processes())
    if group == 1:
        raise ValueError(
            f"the baseline {name!r} compares rankings of one prompt: it needs an even number of rankings in a step and "
            f"process, got {rankings} by --prompts-per-step and --num-generations, in {num_processes()} processes"
        )
    return replace(config, **more, num_generations=group, prompts_per_step=rankings // group)


def reinforcement_arguments(config: ExperimentConfig) -> FlexRecConfig:
    """The trainer's arguments, which say at once where options contradict each other."""
    common = _training_arguments(config, config.steps, config.prompts_per_step, config.learning_rate)
    common["save_total_limit"] = 2  # so that one is whole while the next is written
    if config.save_every:
        common |= {"save_strategy": "steps", "save_steps": config.save_every}
    return FlexRecConfig(**common, **config.of_trainer(), max_reasoning_tokens=config.max_reasoning_tokens)


def _training_arguments(config: ExperimentConfig, steps: int, prompts: int, learning_rate: float) -> dict[str, Any]:
    per_process, rest = divmod(prompts, num_processes())
    if rest or config.prompts_per_step % num_processes():
        raise ValueError(
            f"--prompts-per-step {config.prompts_per_step} cannot be split evenly among {num_processes()} processes"
        )
    at_once = per_process
    if config.micro_batch is not None:
        at_once = math.gcd(per_process, config.micro_batch)
    return {
        **EVERY_TRAINING,
        "output_dir": str(RunFolder(config.output).checkpoints),
        "max_steps": steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": per_process // at_once,
        "learning_rate": learning_rate,
        "warmup_steps": min(10, steps // 4),
        "max_grad_norm": 1.0,
        "bf16": config.bf16,
        **(_checkpointed_layers() if config.gradient_checkpointing else {}),
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "seed": config.seed,
        "log_level": "error",
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _checkpointed_layers() -> dict[str, Any]:
    """By the name that it has from transformers 5.20 on, or the one before."""
    names = {one.name for one in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


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


def _free(model: Any) -> None:
    """Let go of what a stage leaves, before anything is measured: gradients, and the trainer, whose optimiser, twice
    the model, cycles of references would keep."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Give the system back what is free, where the C library is glibc, which keeps it otherwise."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def keep_few_kernels() -> None:
    """Have oneDNN, which multiplies bfloat16 on a CPU, and torch's way to it keep 64 kernels each, not 1,024.

    One is made for every shape, 0.3 MB, and prompts have hundreds of lengths, each with the shapes of all products of a
    layer: within 30 steps they took 0.6 GB. To make one again takes less time than can be measured. Read at the first
    product, so to be called before; what a user has set in the environment stands.
    """
    for cache in KERNEL_CACHES:
        os.environ.setdefault(cache, "64")


class _TrimMemory(TrainerCallback):
    """Prompts of a language model differ in length, and so do the tensors of its micro-batches. What one leaves fits
    the next ones ever less: 8 GB were taken after 110 steps of a model that needs 2.8 between them."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trim_memory()


class _Seal(TrainerCallback):
    """Says of every checkpoint that it is whole, after all processes have written their part."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_main_process(lambda: None)
        on_main_process(lambda: self.folder.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}"))
