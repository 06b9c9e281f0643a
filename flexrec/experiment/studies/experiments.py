"""Runs of ``flexrec train``, as a user starts it, in folders of their own; a run that was killed is resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from flexrec.evaluation.statistics import headline_of
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.results import Results
from flexrec.experiment.run_folder import RunFolder
from flexrec.experiment.stages import run_experiment
from flexrec.experiment.studies.design import Setting, split_options
from flexrec.experiment.studies.results import of_lists
from flexrec.task.needs import Need

METRICS = ("recall@5",)  # beside the one that a need is compared by


class Experiments:
    """Called with options of :class:`ExperimentConfig`, it trains, and measures all rankers of the run's table."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def __call__(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        config, results = self.trained(name, {**self.setting.start, **options})
        found = [
            result
            for items, of in (("all", results), ("new", results.new_items))
            if of is not None
            for result in _of_rankers(of, items)
        ]
        return {"results": found, **cost(config)}

    def trained(
        self, name: str, options: dict[str, Any], needs: list[Need] | None = None
    ) -> tuple[ExperimentConfig, Results]:
        """Train, or go on with what was begun."""
        folder, (of_data, others) = folder_of(self.setting, name), split_options(options)
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in others.items()}
        setting = self.setting
        given |= {"dataset": setting.dataset, "data": setting.data, "data_options": of_data, "seed": setting.seed}
        config = ExperimentConfig(output=str(folder), **given)
        run = RunFolder(folder)
        if (folder / "metrics.json").is_file() or (folder.is_dir() and not run.is_whole(run.base)):
            shutil.rmtree(folder)  # done, but not said so; or hardly begun
        config.resume = run.is_whole(run.base)
        return config, run_experiment(config, print, needs=needs)


def cost(config: ExperimentConfig) -> dict[str, int]:
    """Steps and rollouts of the trained model, those of baselines not counted."""
    supervised = config.warmup_steps + (config.listwise_steps if config.warmup == "listwise" else 0)
    rollouts = config.steps * config.prompts_per_step * config.num_generations
    return {"steps": supervised + config.steps, "rollouts": rollouts}


def _of_rankers(results: Results, items: str) -> list[dict[str, Any]]:
    found = []
    for ranker, needs in results.per_list.items():
        for need, values in needs.items():
            for metric in dict.fromkeys((headline_of(values), "ndcg@5", *METRICS)):
                labels = {"ranker": ranker, "need": need, "items": items}
                found.append(of_lists(np.asarray(values[metric]), results.users, metric=metric, **labels))
    return found


def folder_of(setting: Setting, name: str) -> Path:
    return setting.folder / "folders" / name.replace("/", "-")
