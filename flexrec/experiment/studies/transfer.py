"""Runs that are trained on some needs and asked others: other needs, mixtures, and words that were never seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from flexrec.data.lists import RankingDataset
from flexrec.evaluation.evaluate import Evaluation, rank_examples
from flexrec.experiment.needs import known_needs
from flexrec.experiment.run_folder import RunFolder
from flexrec.experiment.stages import load_dataset
from flexrec.experiment.studies.design import Setting
from flexrec.experiment.studies.experiments import Experiments, cost, folder_of
from flexrec.experiment.studies.results import of_lists
from flexrec.experiment.wordings import kept_from_training
from flexrec.policy.lora import OF_A_RUN, load_model
from flexrec.task.examples import RankingTask, answerable
from flexrec.task.mixtures import find_need
from flexrec.task.needs import NEEDS, Need
from flexrec.task.prompts import PromptBuilder

METRIC, SHOWN = "ndcg@5", 5
UNSEEN_WORDINGS = 2  # the last of each need's wordings, which are kept from training
OTHER_WORDS = ", other words"


class Transfers:
    """Called with ``needs`` to train on and ``asked`` after that, and options of the run.

    The results' label "trained on" is the run's level, "nothing" for the base, which one run of a study measures
    (``base``). A need that is asked in other words is one of "NAME, other words".
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def __call__(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        options = {**self.setting.start, **options}
        trained, asked = options.pop("needs"), options.pop("asked")
        with_base, examples = options.pop("base", False), options.pop("examples", False)
        setting = self.setting
        seen, _ = kept_from_training([NEEDS[need] for need in trained], UNSEEN_WORDINGS)
        config, _ = Experiments(setting).trained(name, options, seen)
        dataset = load_dataset(setting.dataset, setting.data, setting.seed, config.data_options)
        folder = RunFolder(folder_of(setting, name))
        info, model, builder = folder.load()
        dataset = answerable(dataset, builder, info.num_ranked)
        needs = [need for one in asked for need in _asked(one) if _answerable(need, dataset)]
        models = {"": model}
        if with_base:
            models["nothing"] = load_model(folder.base, AutoTokenizer.from_pretrained(folder.base, **OF_A_RUN)).eval()
        found = []
        for trained_on, one in models.items():
            label = {"trained on": trained_on} if trained_on else {}
            values: dict[str, list[np.ndarray]] = {}
            for need in needs:
                values.setdefault(need.name, []).append(_measured(one, need, dataset, builder, info.num_ranked))
            users = [lst.user for lst in dataset.test]
            found += [
                of_lists(np.mean(of_wordings, axis=0), users, metric=METRIC, asked=asked_for, **label)
                for asked_for, of_wordings in values.items()
            ]
        line = {"results": found, **cost(config)}
        if examples:
            line["examples"] = _side_by_side(model, [need for need in needs if need.name in NEEDS], dataset, builder)
        return line


def _asked(name: str) -> list[Need]:
    """The need of a name; for one in other words a need for each wording that was kept from training."""
    plain = name.removesuffix(OTHER_WORDS)
    need = find_need(plain, known_needs())
    if name == plain:
        return [need]
    return [replace(need, name=name, wordings=(wording,)) for wording in need.wordings[-UNSEEN_WORDINGS:]]


def _answerable(need: Need, dataset: RankingDataset) -> bool:
    return not any(name in need.name for name in dataset.unanswerable)


def _measured(
    model: Any, need: Need, dataset: RankingDataset, builder: PromptBuilder, num_ranked: int | None
) -> np.ndarray:
    """(L,) the metric of every test list."""
    task = RankingTask(dataset.catalogue, [need], builder)
    tests = {need.name: [task.test_example(lst, need) for lst in dataset.test]}
    return Evaluation(tests, builder, num_ranked)(model, need.name)[need.name][METRIC]


def _side_by_side(model: Any, needs: list[Need], dataset: RankingDataset, builder: PromptBuilder) -> dict[str, Any]:
    """The first test user's history, and under each need what is ranked first, with topics and true gains."""
    lst, catalogue = dataset.test[0], dataset.catalogue

    def said(item: int) -> str:
        topics = ", ".join(catalogue.topics[item])
        return f"{catalogue.titles[item]} ({topics})" if topics else catalogue.titles[item]

    shown = {"history": [said(item) for item in lst.history[-SHOWN:]]}
    for need in needs:
        example = RankingTask(catalogue, [need], builder).test_example(lst, need)
        (ranking,) = rank_examples(model, [example], builder, num_ranked=SHOWN)
        shown[need.name] = [f"{said(lst.candidates[c])}: {example.gains[c]:.2f}" for c in ranking[:SHOWN]]
    return shown
