"""Words that were kept from training: asked in the end, and measured by what each asking brings to each need."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from flexrec.data import simulate
from flexrec.evaluation import evaluate
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.stages import run_experiment
from flexrec.experiment.wordings import kept_from_training, measure_unseen
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.task.examples import RankingTask
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder

SIZES = {"num_users": 60, "num_items": 80, "num_topics": 4, "num_test_users": 20, "num_candidates": 8}
SHORT = {"baselines": ("none",), "prompts_per_step": 8, "critic_model": "knn"}


@pytest.fixture(scope="module")
def dataset():
    return simulate(**SIZES, seed=0)


@pytest.fixture(scope="module")
def words(tmp_path_factory, dataset):
    """A language model of the catalogue's words."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = build_tokenizer(dataset.catalogue, get_need("interest").wordings)
    model = build_model(tokenizer, hidden_size=32, num_layers=1, num_heads=2)
    LlamaForCausalLM(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_words_that_were_kept_from_training_are_asked_in_the_end(tmp_path, dataset, words, monkeypatch):
    seen = []
    example = RankingTask._example

    def noted(self, lst, need, wording, *args):
        seen.append(wording)
        return example(self, lst, need, wording, *args)

    monkeypatch.setattr(RankingTask, "_example", noted)
    config = ExperimentConfig(
        output=str(tmp_path / "run"),
        model=str(words),
        listwise_steps=2,
        steps=1,
        needs=("interest", "explore"),
        **SHORT,
    )
    assert config.unseen_wordings == 2
    results = run_experiment(config, lambda text: None, dataset=dataset)
    unseen = {name: get_need(name).wordings[-2:] for name in config.needs}
    first = min(seen.index(wording) for wordings in unseen.values() for wording in wordings)
    assert len(seen[first:]) < 10 * len(dataset.test), "only once, at the end"
    for name in config.needs:
        told = [wording for wording in seen[first:] if wording in unseen[name]]
        assert len(told) == len(dataset.test)
        assert set(told) == set(unseen[name]), "they take turns"

    found = results.unseen_wordings
    assert set(found) == {"interest", "explore"} == set(found["interest"])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["unseen wordings"]
    with np.load(tmp_path / "run" / "per_list.npz") as saved:
        for asked, values in found.items():
            for name, of_need in values.items():
                assert of_need.shape == (len(dataset.test),)
                assert metrics[asked][name]["mean"] == pytest.approx(of_need.mean())
                assert metrics[asked][name]["low"] <= of_need.mean() <= metrics[asked][name]["high"]
                np.testing.assert_array_equal(saved[f"unseen wordings/{asked}/{name}"], of_need)
    assert results.table_of_wordings().row_count == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Does it listen" in page
    assert "asked: explore" in page


def test_what_is_measured_is_the_worth_of_the_ranking_for_each_need(dataset, monkeypatch):
    """A ranker that reads the need's name out of the prompt brings each need its best, and others less."""
    needs = [get_need(name) for name in ("interest", "explore")]
    tokenizer = build_tokenizer(dataset.catalogue, [wording for need in needs for wording in need.wordings])
    builder = PromptBuilder(tokenizer, encoding="score")
    task = RankingTask(dataset.catalogue, needs, builder)
    seen, unseen = kept_from_training(needs, 2)
    assert [len(need.wordings) for need in seen] == [4, 4]
    assert kept_from_training([replace(needs[0], wordings=("one",))], 2)[1] == {}
    lists = dataset.test

    def best_of_the_need(model, examples, builder, **options):
        assert options["num_ranked"] == 5
        asked = zip(lists, examples, strict=True)
        return [np.argsort(-task.test_example(lst, get_need(example.need)).gains)[:5] for lst, example in asked]

    monkeypatch.setattr(evaluate, "rank_examples", best_of_the_need)
    tests = {need.name: [task.test_example(lst, need) for lst in lists] for need in needs}
    found = measure_unseen("model", task, lists, unseen, evaluate.Evaluation(tests, builder, 5))
    for asked in unseen:
        worth_something = [bool((task.test_example(lst, get_need(asked)).gains > 0).any()) for lst in lists]
        np.testing.assert_allclose(found[asked][asked], np.array(worth_something, dtype=float), atol=1e-6)
        for other in set(unseen) - {asked}:
            assert found[other][asked].mean() < found[asked][asked].mean() - 0.02
