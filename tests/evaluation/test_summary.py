"""What a table says in words, and what it leaves out."""

import numpy as np
import pytest

from flexrec.evaluation.statistics import comparison_markdown, comparison_table, relative_change
from flexrec.evaluation.summary import summary

USERS = np.repeat(np.arange(40), 2)


def values(mean, need, seed=0):
    noise = np.random.default_rng([seed, len(need)]).normal(0, 0.01, len(USERS))
    return {"ndcg@5": mean + noise, "recall@5": np.full(len(USERS), 0.25)}


def results(**means):
    names = {"warm_start": "warm start", "item_knn": "item-knn"}
    return {
        names.get(ranker, ranker): {
            need: values(mean, need, seed) for need, mean in zip(("interest", "trend"), of_needs, strict=True)
        }
        for seed, (ranker, of_needs) in enumerate(means.items())
    }


def test_above_every_baseline_names_the_closest():
    found = results(
        base=(0.2, 0.2), trained=(0.8, 0.7), warm_start=(0.8, 0.69), item_knn=(0.6, 0.3), critic=(0.78, 0.64)
    )
    first, second = summary(found, USERS)
    change = relative_change(
        found["trained"]["interest"]["ndcg@5"], found["critic"]["interest"]["ndcg@5"], clusters=USERS
    )
    interval = f"{change.difference:+.3f} [{change.difference_low:+.3f}, {change.difference_high:+.3f}]"
    assert (
        first
        == f"trained is above every baseline on every need by ndcg@5; the closest is critic on interest, {interval}."
    )
    of_start = relative_change(
        found["trained"]["trend"]["ndcg@5"], found["warm start"]["trend"]["ndcg@5"], clusters=USERS
    )
    assert second.startswith("Reinforcement changed the warm start's ndcg@5 by ")
    assert f"{of_start.difference:+.3f} [{of_start.difference_low:+.3f}, {of_start.difference_high:+.3f}]" in second
    assert f"p = {of_start.p_value:.3f} on trend" in second


def test_what_is_behind_is_said():
    found = results(base=(0.2, 0.2), trained=(0.8, 0.5), critic=(0.78, 0.64), random=(0.2, 0.5))
    sentences = summary(found, USERS)
    assert sentences[0].startswith("On trend, critic is above trained: -0.1")
    assert sentences[1].startswith("On trend, trained and random cannot be told apart: ")
    assert "--listwise-steps" in sentences[2]
    assert len(sentences) == 3, "there was no warm start"


def test_a_change_that_may_be_none_is_called_so():
    found = results(base=(0.2, 0.2), warm_start=(0.8, 0.7), trained=(0.8, 0.7))
    for need, of_start in found["warm start"].items():  # half of the users gain what the others lose
        found["trained"][need]["ndcg@5"] = of_start["ndcg@5"] + np.where(USERS % 2, 0.01, -0.01)
    *_, last = summary(found, USERS)
    assert last.startswith("That is no change that can be told from none")


def test_one_user_says_nothing_of_others():
    found = results(base=(0.2, 0.2), trained=(0.8, 0.5), warm_start=(0.8, 0.4), critic=(0.78, 0.64))
    (sentence,) = summary(found, np.zeros(len(USERS)))
    assert sentence.startswith("There is one test user")


def test_metrics_that_are_the_same_for_all_are_not_shown():
    found = results(base=(0.2, 0.2), trained=(0.8, 0.5))
    text = comparison_markdown(found, clusters=USERS)
    assert "recall@5" not in text
    assert "ndcg@5" in text
    found["trained"]["trend"]["recall@5"] = np.full(len(USERS), 0.3)
    rows = [line.split(" | ") for line in comparison_markdown(found, clusters=USERS).splitlines()]
    assert rows[0][2:4] == ["ndcg@5", "recall@5"]
    assert [row[3] for row in rows[2:]] == ["", "", "0.250", "0.300"]
    for need in found["base"]:
        found["trained"][need] = found["base"][need]
    found["trained"]["trend"] = {**found["base"]["trend"], "recall@5": np.full(len(USERS), 0.3)}
    rows = [line.split(" | ") for line in comparison_markdown(found, clusters=USERS).splitlines()]
    assert rows[5][2:] == ["0.300", "", "", " |"], "nor is a change where there is none to be had"
    alone = {"base": found["base"]}
    assert "recall@5" in comparison_markdown(alone, clusters=USERS)
    assert pytest.approx(3) == len(comparison_table(results(base=(1, 1), trained=(2, 2)), clusters=USERS).columns)
