"""Greedy rankings of examples, and the metrics of whole and partial rankings."""

from dataclasses import replace

import numpy as np
import pytest

from flexrec.data import simulate
from flexrec.decoding.sample import Rollout
from flexrec.evaluation import evaluate as module
from flexrec.evaluation.evaluate import Evaluation, rank_examples
from flexrec.evaluation.statistics import METRICS
from flexrec.policy.small_model import build_tokenizer
from flexrec.task.examples import Example, RankingTask
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder


def example(gains, user=0, need="interest"):
    gains = np.array(gains, dtype=np.float32)
    return Example([1], [[10 + i] for i in range(len(gains))], gains, np.zeros_like(gains), (0, 0), need, user)


def ndcg(in_order, cutoff, shown=None, ideal=None):
    ideal = np.sort(in_order if ideal is None else ideal)[::-1]
    discount = 1 / np.log2(np.arange(2, len(in_order) + 2))
    seen = np.where(np.arange(len(in_order)) < (len(in_order) if shown is None else shown), in_order, 0.0)
    return (seen * discount)[:cutoff].sum() / (ideal * discount)[:cutoff].sum()


def test_rankings_are_scored_item_by_item():
    tests = {"interest": [example([0.1, 0.9, 0.0, 0.4, 0.2, 0.7, 0.3]), example([0.5, 0.0, 1.0])]}
    rankings = [np.array([3, 0, 5, 1, 2, 6, 4]), np.array([1, 2, 0])]
    values = Evaluation(tests, None, None).of_rankings({"interest": rankings})["interest"]
    assert set(values) == set(METRICS)
    in_order = [e.gains[ranking] for e, ranking in zip(tests["interest"], rankings, strict=True)]
    np.testing.assert_allclose(values["ndcg@5"], [ndcg(gains, 5) for gains in in_order], rtol=1e-6)
    np.testing.assert_allclose(values["ndcg@30"], [ndcg(gains, 30) for gains in in_order], rtol=1e-6)
    assert values["ndcg@5"][0] != pytest.approx(values["ndcg@30"][0])


def test_items_that_were_not_ranked_count_in_the_ideal_and_nowhere_else():
    tests = {"interest": [example([0.1, 0.9, 0.0, 0.4, 1.0]), example([0.5, 0.0, 1.0])]}
    rankings = [np.array([3, 0]), np.array([1, 2])]
    values = Evaluation(tests, None, 2).of_rankings({"interest": rankings})["interest"]
    expected = [
        ndcg(np.array([0.4, 0.1, 0.9, 0.0, 1.0]), 5, shown=2),
        ndcg(np.array([0.0, 1.0, 0.5]), 5, shown=2),
    ]
    np.testing.assert_allclose(values["ndcg@5"], expected, rtol=1e-6)
    np.testing.assert_allclose(values["recall@5"], [2 / 4, 1 / 2], rtol=1e-6)


def test_every_need_is_ranked_with_the_prompt_builder_and_length_given(monkeypatch):
    asked = []

    def rank(model, examples, builder, *, num_ranked, description):
        asked.append((model, [e.need for e in examples], builder, num_ranked, description))
        return [np.arange(num_ranked)[::-1] for _ in examples]

    monkeypatch.setattr(module, "rank_examples", rank)
    tests = {"interest": [example([0.1, 0.2, 1.0])], "trend": [example([0.3, 0.5, 1.0], need="trend")] * 2}
    values = Evaluation(tests, "builder", 2)("model", "step 5")
    assert asked == [
        ("model", ["interest"], "builder", 2, "Evaluating step 5, interest"),
        ("model", ["trend", "trend"], "builder", 2, "Evaluating step 5, trend"),
    ]
    np.testing.assert_allclose(values["interest"]["ndcg@5"], [ndcg(np.array([0.2, 0.1, 1.0]), 5, shown=2)], rtol=1e-6)
    np.testing.assert_allclose(values["trend"]["ndcg@5"], [ndcg(np.array([0.5, 0.3, 1.0]), 5, shown=2)] * 2, rtol=1e-6)


def test_examples_are_ranked_greedily_as_asked(monkeypatch):
    dataset = simulate(num_users=4, num_items=70, num_topics=4, num_test_users=6, num_candidates=8)
    calls = []

    def sample(model, prompts, candidates, **options):
        calls.append((prompts, candidates, options))
        first = [len(prompt) % 8 for prompt in prompts]  # tells whose ranking it is
        return Rollout(np.array([[i, 8, -1] for i in first]), np.zeros((len(prompts), 3)))

    monkeypatch.setattr(module, "sample_rankings", sample)
    tokenizer = build_tokenizer(dataset.catalogue, [])
    builder = PromptBuilder(tokenizer, encoding="index")
    task = RankingTask(dataset.catalogue, [get_need("interest")], builder)
    examples = [task.test_example(lst, get_need("interest")) for lst in dataset.test[:5]]
    assert len({len(example.prompt) % 8 for example in examples}) > 1
    rankings = rank_examples("model", examples, builder, num_ranked=2, batch_size=3)
    assert [ranking.tolist() for ranking in rankings] == [[len(example.prompt) % 8, 8] for example in examples]
    assert [len(prompts) for prompts, _, _ in calls] == [3, 2]
    by_length = sorted(examples, key=lambda example: len(example.prompt))  # so that little is padding
    assert [p for prompts, _, _ in calls for p in prompts] == [example.prompt for example in by_length]
    assert [c for _, candidates, _ in calls for c in candidates] == [example.candidates for example in by_length]
    calls.clear()
    monkeypatch.setattr(module, "MAX_TOKENS", 2 * len(by_length[-1].prompt))
    rank_examples("model", examples, builder, num_ranked=2, batch_size=3)
    assert max(len(prompts) for prompts, _, _ in calls) == 2, "of long prompts there are fewer together"
    for _, _, options in calls:
        assert options == {
            "separator": builder.separator,
            "end": builder.end,
            "num_ranked": 2,
            "greedy": True,
            "one_pass": False,
        }


def test_a_need_of_whole_lists_is_scored_by_its_own_metric_too():
    """Lists of different lengths and rankings of different ones; the topics follow the items."""
    topics = [np.eye(2, dtype=np.float32)[rows] for rows in ([0, 0, 1, 1], [1, 0, 0])]
    gains = [[1.0, 0.9, 0.8, 0.0], [0.5, 0.4, 0.1]]
    tests = {
        "diverse": [
            replace(example(g, need="diverse"), metric="alpha_ndcg", topics=t)
            for g, t in zip(gains, topics, strict=True)
        ],
        "interest": [example(g) for g in gains],
    }
    rankings = [np.array([2, 0, 1]), np.array([0, 1, 2])]
    values = Evaluation(tests, None, None).of_rankings(dict.fromkeys(tests, rankings))
    assert list(values["diverse"]) == ["alpha_ndcg@5", *METRICS]
    assert list(values["interest"]) == list(METRICS)
    np.testing.assert_array_equal(values["diverse"]["ndcg@5"], values["interest"]["ndcg@5"])
    d = 1 / np.log2([2, 3, 4])
    found, best = d @ [0.8, 1.0, 0.9 * 0.5], d @ [1.0, 0.8, 0.45]
    np.testing.assert_allclose(values["diverse"]["alpha_ndcg@5"], [found / best, 1.0], rtol=1e-6)
    evaluation = Evaluation(tests, None, None)
    told = {need: [name for name in of if evaluation.telling(need, name)] for need, of in values.items()}
    assert told["diverse"] == ["alpha_ndcg@5", *told["interest"]]
    assert told["interest"] == ["ndcg@5", "ndcg@10", "ndcg@30", "mrr@5"], "of at most 5 any order recalls all"
