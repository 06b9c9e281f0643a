"""Whole runs that rank in one pass, or reason before they rank: trained, measured, saved and asked as one thing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

from flexrec.data import simulate
from flexrec.decoding import Decoding
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.stages import run_experiment
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.serving.ranker import Ranker
from flexrec.task.needs import get_need
from flexrec.trainer.flexrec import FlexRecTrainer
from flexrec.trainer.supervised import SupervisedTrainer

SIZES = {"num_users": 60, "num_items": 80, "num_topics": 4, "num_test_users": 20, "num_candidates": 8}
SHORT = {"needs": ("interest",), "baselines": ("none",), "prompts_per_step": 16, "critic_model": "knn"}


@pytest.fixture(scope="module")
def dataset():
    return simulate(**SIZES, seed=0)


@pytest.fixture
def batches(monkeypatch):
    """Of every step of a trainer, the batch that it scored."""
    seen = []
    for trainer in (SupervisedTrainer, FlexRecTrainer):
        make = trainer._batch

        def noted(self, *args, make=make, **kwargs):
            batch = make(self, *args, **kwargs)
            seen.append((type(self).__name__, batch))
            return batch

        monkeypatch.setattr(trainer, "_batch", noted)
    return seen


def requests_of(dataset, count=5):
    return [
        {
            "need": "interest",
            "history": [
                {"id": dataset.catalogue.ids[i], "interest": None if np.isnan(known) else float(known)}
                for i, known in zip(lst.history, lst.history_interest, strict=True)
            ],
            "candidates": [dataset.catalogue.ids[i] for i in lst.candidates],
        }
        for lst in dataset.test[:count]
    ]


def test_a_run_in_one_pass(tmp_path, dataset, batches):
    config = ExperimentConfig(
        output=str(tmp_path / "run"), mode="one-pass", warmup_steps=4, listwise_steps=30, steps=6, **SHORT
    )
    results = run_experiment(config, lambda text: None, dataset=dataset)
    assert {name for name, _ in batches} == {"SupervisedTrainer", "FlexRecTrainer"}
    for _, batch in batches:
        assert batch.one_pass
        assert (batch.tokens.ranking_of < 0).all(), "an answer was spelled"
    before, after = (results.per_list[name]["interest"]["ndcg@5"].mean() for name in ("base", "trained"))
    assert after > before + 0.1, "nothing was learnt"

    ranker = Ranker(tmp_path / "run")
    assert ranker.info.mode == "one-pass"
    requests = requests_of(dataset)
    answers = ranker.rank(requests)
    in_one_pass, decoded = (ranker.rank(requests, Decoding(mode=mode)) for mode in ("one-pass", "decode"))
    assert answers == in_one_pass
    assert answers != decoded
    for one, other in zip(answers, decoded, strict=True):
        first, of_decoding = one["ranking"][0], other["ranking"][0]
        assert first["id"] == of_decoding["id"]
        assert first["probability"] == pytest.approx(of_decoding["probability"], abs=1e-4)


@pytest.fixture(scope="module")
def words(tmp_path_factory, dataset):
    """A language model of the catalogue's words whose embedding is padded."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = build_tokenizer(dataset.catalogue, get_need("interest").wordings)
    model = build_model(tokenizer, hidden_size=32, num_layers=1, num_heads=2)
    model.config.vocab_size = len(tokenizer) + 24
    LlamaForCausalLM(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_that_reasons(tmp_path, dataset, words, batches):
    config = ExperimentConfig(
        output=str(tmp_path / "run"),
        model=str(words),
        encoding="label",
        max_reasoning_tokens=5,
        reasoning_end="</think>",
        num_generations=2,
        listwise_steps=2,
        steps=2,
        **{**SHORT, "prompts_per_step": 8},
    )
    run_experiment(config, lambda text: None, dataset=dataset)
    ranker = Ranker(tmp_path / "run")
    tokenizer, reasoning = ranker.builder.tokenizer, ranker.builder.reasoning
    marker = list(reasoning["reasoning_end"])
    assert tokenizer.decode(marker).replace(" ", "") == "</think>"
    assert reasoning["max_reasoning_tokens"] == 5
    assert reasoning["num_tokens"] == len(tokenizer) < ranker.model.config.vocab_size
    for name, batch in batches:
        rows = batch.reasoning.tokens
        if name == "SupervisedTrainer":
            assert all(row.tolist() == marker for row in rows), "supervised rankings stand behind the marker"
            assert batch.reasoning.num_sampled.max() == 0
        else:
            assert batch.reasoning.num_sampled.max() == 5
            assert max(row.max() for row in rows) < len(tokenizer), "what no tokenizer reads was sampled"
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("reasoning" in key for line in lines for key in line)

    lst = dataset.test[0]
    prompt, _ = ranker.builder.prompt_of(lst, dataset.catalogue, get_need("interest").wordings[0])
    text = tokenizer.decode(prompt).replace(" ", "")
    assert "Thinkfirst" in text
    assert text.endswith("<think>\n") or text.endswith("<think>")
    (answer,) = ranker.rank(requests_of(dataset, 1))
    assert len(answer["ranking"]) == 8
    (error,) = ranker.rank([{**requests_of(dataset, 1)[0], "candidates": []}])
    assert "candidates" in error["error"]
    with pytest.raises(ValueError, match="reasons before it ranks, which beams do not"):
        ranker.rank(requests_of(dataset, 1), Decoding(num_beams=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "one-pass", "model": "some/model", "encoding": "title"}, "takes --encoding label, item_token, score"),
        ({"mode": "one-pass", "importance_level": "token"}, "spells no tokens"),
        ({"max_reasoning_tokens": 5}, "the embedded model has no words to reason in"),
        ({"max_reasoning_tokens": 5, "model": "some/model"}, "ranked before a word is said"),
        (
            {"max_reasoning_tokens": 5, "model": "some/model", "encoding": "label", "mode": "one-pass"},
            "ranked before a word is said",
        ),
        (
            {"max_reasoning_tokens": 5, "model": "some/model", "encoding": "label", "reasoning_end": " "},
            "--reasoning-end must be a text",
        ),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(output="unused", **options)


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"top_p": 0.9}])
def test_one_pass_decodes_nothing(more):
    with pytest.raises(ValueError, match="'one-pass' decodes nothing"):
        Decoding(mode="one-pass", **more)


def test_all_of_a_one_pass_ranking_is_of_one_distribution(tmp_path, dataset):
    """Of three equal draws the items come with the probabilities of the first choice, each among what remains."""
    config = ExperimentConfig(
        output=str(tmp_path / "run"), mode="one-pass", warmup_steps=1, listwise_steps=1, steps=1, **SHORT
    )
    run_experiment(config, lambda text: None, dataset=dataset)
    ranker = Ranker(tmp_path / "run")
    (answer,) = ranker.rank(requests_of(dataset, 1))
    left, total = answer["ranking"], 1.0
    for item in left:
        first = item["probability"] * total
        total -= first
        assert 0 <= total < 1 + 1e-6
    assert np.isclose(total, 0, atol=1e-4)


def test_checkpointed_layers_learn_the_same(tmp_path, dataset, words):
    values = {}
    for checkpointed in (False, True):
        config = ExperimentConfig(
            output=str(tmp_path / str(checkpointed)),
            model=str(words),
            gradient_checkpointing=checkpointed,
            micro_batch=4,
            listwise_steps=2,
            steps=2,
            **{**SHORT, "prompts_per_step": 8},
        )
        run_experiment(config, lambda text: None, dataset=dataset)
        with safe_open(tmp_path / str(checkpointed) / "model.safetensors", "pt") as file:
            values[checkpointed] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in values[False].items():
        torch.testing.assert_close(values[True][name], value, rtol=1e-4, atol=1e-5)
