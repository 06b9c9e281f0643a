"""What a run keeps for people to look at: users' lists under every need, answers without a constraint."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flexrec.data import simulate
from flexrec.evaluation.evaluate import rank_examples
from flexrec.evaluation.statistics import bootstrap_interval, rank_metrics
from flexrec.experiment.report.page import write_report
from flexrec.experiment.shown import LATEST, TOP, USERS, free_answers, intervals_of, shown_of_run, side_by_side
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.task.examples import Example, RankingTask
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder

NEEDS = ("interest", "explore")
SEPARATOR, END = 50, 51


@pytest.fixture(scope="module")
def world():
    data = simulate(num_users=24, num_items=80, num_topics=4, num_test_users=5, num_candidates=12, lists_per_user=2)
    needs = [get_need(name) for name in NEEDS]
    tokenizer = build_tokenizer(data.catalogue, [wording for need in needs for wording in need.wordings])
    task = RankingTask(data.catalogue, needs, PromptBuilder(tokenizer, encoding="item_token"))
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    return SimpleNamespace(data=data, task=task, model=model)


def test_the_lists_are_those_that_the_model_makes(world):
    data, task = world.data, world.task
    found = side_by_side(world.model, task, data)
    first = [next(lst for lst in data.test if lst.user == user) for user in dict.fromkeys(t.user for t in data.test)]
    assert [one["user"] for one in found] == [str(lst.user) for lst in first[:USERS]]
    for one, lst in zip(found, first, strict=False):
        assert [item["title"] for item in one["history"]] == [data.catalogue.titles[i] for i in lst.history[-LATEST:]]
        for need in task.needs:
            example = task.test_example(lst, need)
            (ranking,) = rank_examples(world.model, [example], task.builder)
            shown = one["needs"][need.name]
            in_order = example.gains[ranking]
            assert [item["id"] for item in shown["ranking"]] == [
                data.catalogue.ids[lst.candidates[k]] for k in ranking[:TOP]
            ]
            assert [item["gain"] for item in shown["ranking"]] == pytest.approx(in_order[:TOP].tolist(), abs=1e-4)
            assert [item["gain"] for item in shown["best"]] == sorted(
                (item["gain"] for item in shown["best"]), reverse=True
            )
            assert shown["value"] == pytest.approx(rank_metrics(in_order[None], ["ndcg@5"])["ndcg@5"][0], abs=1e-4)


def test_users_have_their_public_names(world):
    from dataclasses import replace

    names = tuple(f"customer {n}" for n in range(max(lst.user for lst in world.data.test) + 1))
    found = side_by_side(world.model, world.task, replace(world.data, user_ids=names))
    assert all(one["user"].startswith("customer ") for one in found)


class Writer:
    """A model that writes what it is told to."""

    device = torch.device("cpu")

    def __init__(self, answers):
        self.answers, self.asked = answers, {}

    def generate(self, input_ids, attention_mask, **options):
        self.asked = {"ids": input_ids, "mask": attention_mask, **options}
        written = [row + [END] * (options["max_new_tokens"] - len(row)) for row in self.answers]
        return torch.cat([input_ids, torch.tensor(written)], dim=1)


def test_answers_are_read_by_hand():
    builder = SimpleNamespace(separator=(SEPARATOR,), end=(END,), described=False)
    gains = np.zeros(3, dtype=np.float32)
    examples = [
        Example(list(range(1, 2 + n)), [[10, 11], [12], [13]], gains, gains, (0, 0), "interest", n) for n in range(4)
    ]
    writer = Writer(
        [
            [12, SEPARATOR, 10, 11, SEPARATOR, 13, END],  # as it should be
            [12, SEPARATOR, 12, SEPARATOR, 13, END],  # one twice, so that one is missing
            [40, 41],  # nothing of a ranking
            [13, SEPARATOR, 12, SEPARATOR, 10, 11],  # the end is missing, but for the padding's
        ]
    )
    found = free_answers(writer, examples, builder)
    assert writer.asked["max_new_tokens"] == 4 + 3 + 1
    assert writer.asked["mask"].sum(1).tolist() == [1, 2, 3, 4], "prompts end where answers begin"
    assert writer.asked["ids"][0].tolist() == [END, END, END, 1]
    assert not writer.asked["do_sample"]
    assert found["answers"] == 4
    assert found["valid"] == 0.5
    assert found["repeated"] == 0.25
    assert found["missing"] == pytest.approx((0 + 1 / 3 + 1 + 0) / 4, abs=1e-4)
    assert found["unknown"] > 0
    assert free_answers(writer, [], builder) == {"answers": 0}


def test_a_real_model_answers(world):
    shown = shown_of_run(world.model, world.task, world.data, None)
    assert set(shown) == {"users", "answers"}, "no critic, and a model that writes tokens"
    assert shown["answers"]["answers"] == len(world.data.test)
    assert 0 <= shown["answers"]["valid"] <= 1


def test_points_of_curves_have_intervals_over_users():
    users = np.repeat(np.arange(10), 3)
    values = {"interest": {"ndcg@5": np.random.default_rng(0).random(30), "mrr@5": np.ones(30)}}
    expected = bootstrap_interval(values["interest"]["ndcg@5"], clusters=users)
    assert intervals_of(values, users) == {"interest": {"ndcg@5": expected}}
    assert expected != bootstrap_interval(values["interest"]["ndcg@5"])


def test_a_run_writes_them(tmp_path, recorded):
    recorded.run(tmp_path / "run")
    shown = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [set(one["needs"]) for one in shown["users"]] == [{"interest"}] * USERS
    assert len(shown["critic"]["intervals"]) == 10
    assert "answers" not in shown, "the embedded model writes no text"
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(line["intervals"]["interest"]["ndcg@5"] for line in log if line["stage"] == "evaluation")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Who ranks best" in page
    assert "not finished" not in page
    write_report([tmp_path / "run"], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page, "made before metrics.json, and as after it"


def test_a_report_that_cannot_be_written_costs_no_run(tmp_path, recorded, monkeypatch):
    def fail(*arguments):
        raise OSError("No space left")

    monkeypatch.setattr("flexrec.experiment.stages.page_of", fail)
    recorded.run(tmp_path / "run")
    assert recorded.said[-1] == "The run is whole, its report was not written: No space left"
    assert (tmp_path / "run" / "metrics.json").is_file()
