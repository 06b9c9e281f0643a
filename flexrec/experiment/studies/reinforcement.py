"""Runs that share a world, a critic and a start, and are reinforced from it, each in its own way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from flexrec.evaluation.critic import critic_quality
from flexrec.evaluation.evaluate import Evaluation
from flexrec.experiment.stages import load_dataset
from flexrec.experiment.studies.design import Setting, split_options
from flexrec.experiment.studies.results import of_lists
from flexrec.experiment.training import EVERY_TRAINING
from flexrec.policy.small_model import build_model, build_tokenizer, item_vectors, starting_rows
from flexrec.task.critic import Critic
from flexrec.task.examples import Example, RankingTask, TrainingExamples, answerable
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer
from flexrec.trainer.supervised import SupervisedTrainer

# What a start is made with: steps are of ``rankings`` rankings, supervised ones of as many prompts.
START: dict[str, Any] = {
    "need": "interest",
    "metric": "ndcg@5",
    "hidden_size": 64,
    "layers": 2,
    "rankings": 64,
    "format_steps": 20,
    "listwise_steps": 0,
    "learning_rate": 2e-3,
    "described": True,
}
# What a run is made with, beside options of the trainer; ``early``: it is measured after so many steps, too.
RUN: dict[str, Any] = {"steps": 40, "early": 0, "fuse": True, "temperature": 0.3, "num_generations": 1}


class Reinforcements:
    """Made for a setting, it has the start; called, it reinforces a copy of it and measures every test list."""

    def __init__(self, setting: Setting) -> None:
        of_data, given = split_options(setting.start)
        self.setting, self.start = setting, {**START, **given}
        seed, start = setting.seed, self.start
        set_seed(seed)
        dataset = load_dataset(setting.dataset, setting.data, seed, of_data)
        catalogue, self.need = dataset.catalogue, get_need(start["need"])
        self.critic = None
        if dataset.unobserved == "critic":
            self.critic = Critic.fit(dataset.log, catalogue, lists=dataset.train, noise=dataset.noise, seed=seed)
        queries = [lst.query for lst in dataset.train if lst.query]
        tokenizer = build_tokenizer(catalogue, self.need.wordings, queries=queries)
        size = start["hidden_size"]
        vectors = item_vectors(dataset.log, len(catalogue), size, seed=seed)
        rows = starting_rows(catalogue, vectors, queries=queries, seed=seed)
        self.model = build_model(tokenizer, rows=rows, hidden_size=size, num_layers=start["layers"], seed=seed)
        described = start["described"]
        self.builder = PromptBuilder(tokenizer, encoding="item_token", show_titles=False, described=described)
        self.num_ranked = int(start["metric"].partition("@")[2])
        self.dataset = answerable(dataset, self.builder, self.num_ranked)
        task = RankingTask(catalogue, [self.need], self.builder)
        self.tests = [task.test_example(lst, self.need) for lst in self.dataset.test]
        self.evaluate = Evaluation({self.need.name: self.tests}, self.builder, self.num_ranked)
        self.quality = {} if self.critic is None else critic_quality(self.critic, self.dataset.test)
        self._made: dict[bool, _Kept] = {}
        self._done: dict[str, dict[str, Any]] = {}
        for stage in ("format", "listwise"):
            if steps := start[f"{stage}_steps"]:
                self._supervise(stage, steps)

    def __call__(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        options = {**RUN, **options}
        changed = {key: value for key, value in options.items() if value != getattr(FlexRecConfig, key, None)}
        known = json.dumps(changed, sort_keys=True)  # another part's run may be this one
        if known not in self._done:
            self._done[known] = self._run(options)
        return self._done[known]

    def _run(self, options: dict[str, Any]) -> dict[str, Any]:
        steps, early, fuse = (options.pop(name) for name in ("steps", "early", "fuse"))
        model = self.model
        measured: dict[int, np.ndarray] = {}
        if steps:
            model = self.reinforced(steps, options, _Early(self, early, measured), fuse=fuse)
        else:  # the start itself
            measured[0] = self.measure(model)
        users, own = [lst.user for lst in self.dataset.test], self._metric
        results = [
            *(of_lists(values, users, need=self.need.name, metric=f"{own} early") for values in measured.values()),
            of_lists(self.measure(model), users, need=self.need.name, metric=own),
        ]
        supervised = self.start["format_steps"] + self.start["listwise_steps"]
        rollouts = steps * self.start["rankings"]
        return {"results": results, "steps": supervised + steps, "rollouts": rollouts, "critic": self.quality}

    def reinforced(self, steps: int, options: dict[str, Any], watch: TrainerCallback, *, fuse: bool = True) -> Any:
        """A copy of the start after so many steps with these options of the trainer."""
        model, prompts = copy.deepcopy(self.model), self.start["rankings"] // options["num_generations"]
        trainer = FlexRecTrainer(
            model,
            FlexRecConfig(**{**self._arguments(steps, prompts), "metric": self._metric, **options}),
            self.examples(fuse),
            separator=self.builder.separator,
            end=self.builder.end,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return model

    @property
    def _metric(self) -> str:
        return str(self.start["metric"])

    def examples(self, fuse: bool = True) -> _Kept:
        """The training lists as prompts, with what is known of them filled in by the critic."""
        if self.critic is not None:
            self.critic.fuse = fuse
        if fuse not in self._made or self._made[fuse].epoch:
            data, task = self.dataset, RankingTask(self.dataset.catalogue, [self.need], self.builder, self.critic)
            examples = TrainingExamples(task, data.train, resample=data.resample, seed=self.setting.seed)
            self._made[fuse] = _Kept(examples)
        return self._made[fuse]

    def _supervise(self, stage: str, steps: int) -> None:
        trainer = SupervisedTrainer(
            self.model,
            TrainingArguments(**self._arguments(steps, self.start["rankings"])),
            self.examples(),
            stage=stage,
            num_imitated=self.num_ranked,
            separator=self.builder.separator,
            end=self.builder.end,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def measure(self, model: Any) -> np.ndarray:
        """The metric of every test list, (L,)."""
        rankings = self.evaluate.rank(model, self.tests)
        return self.evaluate.of_rankings({self.need.name: rankings})[self.need.name][self._metric]

    def _arguments(self, steps: int, prompts: int) -> dict[str, Any]:
        return {
            **EVERY_TRAINING,
            "output_dir": str(Path(self.setting.folder) / "nothing"),  # which is not made
            "max_steps": steps,
            "per_device_train_batch_size": prompts,
            "learning_rate": self.start["learning_rate"],
            "warmup_steps": min(5, steps // 4),
            "use_cpu": True,
            "logging_strategy": "no",
            "seed": self.setting.seed,
            "dataloader_pin_memory": False,
        }


class _Kept(Dataset):
    """The examples of all runs, which are the same in each: made by the first that asks."""

    def __init__(self, examples: TrainingExamples) -> None:
        self._examples, self.epoch = examples, 0
        self._known: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        if index not in self._known:
            self._known[index] = self._examples[index]
        return self._known[index]

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self._known.clear()
        self._examples.set_epoch(epoch)
        self.epoch = epoch


class _Early(TrainerCallback):
    """Measures the model on the way."""

    def __init__(self, runs: Reinforcements, step: int, measured: dict[int, np.ndarray]) -> None:
        self.runs, self.step, self.measured = runs, step, measured

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            model.eval()
            self.measured[self.step] = self.runs.measure(model)
            model.train()
