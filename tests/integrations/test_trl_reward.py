"""The reward function for TRL: what it makes of completions, and a plain GRPOTrainer with it."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trl

import flexrec
from flexrec.integrations.ranking_reward import COMPLETION_CREDITS
from flexrec.integrations.trl import RankingReward

sys.path.insert(0, str(Path(__file__).parent))

from tiny_trl import GAINS, logged, make_args, make_model, make_rows, make_tokenizer, train_and_compare

# TRL and transformers warn of each other, and TRL of what is experimental.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]


def reward(completions, **options):
    log = {}
    columns = {"gains": [[1.0, 0.0, 0.5]] * len(completions), **options.pop("columns", {})}
    function = pickle.loads(pickle.dumps(RankingReward(**options)))
    values = function(
        prompts=["p"] * len(completions),
        completions=completions,
        completion_ids=[[1]] * len(completions),
        trainer_state=None,
        log_extra=None,
        log_metric=log.__setitem__,
        **columns,
    )
    return values, log


@pytest.mark.parametrize("kind", ["plain", "messages", "parts"])
def test_reward_is_the_metric_of_the_ranking(kind):
    texts = ["[1] > [3] > [2]", "[2] > [1] > [3]"]
    completions = {
        "plain": texts,
        "messages": [[{"role": "assistant", "content": text}] for text in texts],
        "parts": [
            [{"role": "tool", "content": "[2]"}, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
            for text in texts
        ],
    }[kind]
    values, log = reward(completions, metric="ndcg@2")
    ranked = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
    np.testing.assert_allclose(values, flexrec.ranking_metric(ranked, "ndcg@2"), rtol=1e-6)
    assert log["ndcg@2/valid"] == 1
    assert log["ndcg@2/gain@1"] == 0.5
    assert log["ndcg@2/gain@4"] == 0
    assert all(isinstance(value, float) for value in values)


@pytest.mark.parametrize("credit", COMPLETION_CREDITS)
def test_reward_of_a_credit_is_its_mean_over_the_ranks(credit):
    values, log = reward(["[3] > [1] > [2]"], credit=credit)
    of_items = flexrec.swap_rewards(torch.tensor([[0.5, 1.0, 0.0]]), "ndcg", credit=credit)[0]
    assert values == pytest.approx([of_items.mean().item()], rel=1e-6)
    name = "ndcg" if credit == "sequence" else f"ndcg/{credit}"
    assert [log[f"{name}/reward@{k}"] for k in (1, 2, 3, 4)] == pytest.approx([*of_items.tolist(), 0.0], rel=1e-6)


def test_what_is_no_ranking_counts_in_part_or_is_repaired_or_left_out():
    texts = ["best is [3]", "[3] > [1] > [2]", "[3] > [3] > [9]"]
    values, _ = reward(texts, invalid="repair")
    expected = flexrec.ranking_metric(torch.tensor([[0.5, 1.0, 0.0]]), "ndcg").item()  # all three, repaired
    assert values == pytest.approx([expected] * 3, rel=1e-6)
    values, log = reward(texts)
    of_first = flexrec.ranking_metric(torch.tensor([[0.5, 1.0, 0.0]]), "ndcg", num_ranked=1).item()
    assert values == pytest.approx([of_first, expected, of_first], rel=1e-6)
    assert of_first < expected
    assert reward(["I cannot say", ""])[0] == [0.0, 0.0]
    values, _ = reward(texts, invalid="none")
    assert values == [None, pytest.approx(expected, rel=1e-6), None]
    assert log["ndcg/valid"] == pytest.approx(1 / 3)
    assert log["ndcg/missing"] == pytest.approx(4 / 3)
    assert log["ndcg/repeated"] == pytest.approx(1 / 3)


def test_reward_takes_names_from_columns_and_skips_reasoning():
    texts = ["<think>[1] kiwi? </think>fig | kiwi", "pear | fig"]
    columns = {"names": [["kiwi", "fig"], ["fig", "pear"]], "worth": [[0.0, 1.0], [0.0, 1.0]]}
    options = {"separator": " | ", "reasoning_end": None, "candidates_column": "names", "gains_column": "worth"}
    assert reward(texts[1:], columns={k: v[1:] for k, v in columns.items()}, **options)[0] == [1.0]
    values, log = reward(texts, columns=columns, **{**options, "reasoning_end": "</think>"}, metric="mrr")
    assert log["mrr/valid"] == 0.5  # nothing in the second follows the end of its reasoning
    assert values == [1.0, 0.0]


def test_token_ids_say_what_the_text_lacks():
    """Names that are special tokens, and the end of sequence that is no part of the ranking."""
    tokenizer = make_tokenizer(items=3)
    names = [f"<item:{i}>" for i in range(3)]
    ids = [tokenizer.encode(f"{names[0]}{names[2]}{names[1]}</s>")]
    log = {}
    values = RankingReward(separator="", tokenizer=tokenizer)(
        completions=[""], completion_ids=ids, candidates=[names], gains=[[1.0, 0.0, 0.5]], log_metric=log.__setitem__
    )
    assert values == [pytest.approx(1.0)]
    assert log["ndcg/valid"] == 1.0


def test_only_the_first_ranks_count():
    values, log = reward(["[2] > [3]", "[2] > [3] > [1]"], num_ranked=2)
    ranked = torch.tensor([[0.0, 0.5, 1.0]])
    expected = flexrec.ranking_metric(ranked, "ndcg", num_ranked=2).item()
    assert expected < flexrec.ranking_metric(ranked, "ndcg").item()
    assert values == pytest.approx([expected] * 2, rel=1e-6)
    assert log["ndcg/valid"] == 0.5  # two ranks are expected
    assert reward(["[2] > [3] > [1]"], num_ranked=9)[1]["ndcg/valid"] == 1.0  # as many as there are


def test_the_mean_is_over_the_ranks_of_each_list():
    """Lists of two and of three candidates, the first under the padding of the second."""
    lists = [[0.0, 1.0], [0.0, 1.0, 0.5]]
    values, _ = reward(["[1] > [2]", "[1] > [2] > [3]"], credit="swap", columns={"gains": lists})
    means = [flexrec.swap_rewards(torch.tensor([gains]), "ndcg")[0].mean().item() for gains in lists]
    assert values == pytest.approx(means, rel=1e-6)


@pytest.mark.parametrize("credit", COMPLETION_CREDITS)
def test_ranks_that_are_not_filled_count_as_nothing(credit):
    """The mean is over the ranks asked for, so that leaving items out is no way to a higher one."""
    values, _ = reward(["[3] > [1]", "[1]", "", "[2] > [3]"], credit=credit, num_ranked=2)
    for value, named, gains in zip(
        values, (2, 1, 0, 2), ([0.5, 1.0, 0.0], [1.0, 0.0, 0.5], [1.0, 0.0, 0.5], [0.0, 0.5, 1.0]), strict=True
    ):
        of_items = flexrec.swap_rewards(torch.tensor([gains]), "ndcg", credit=credit, num_ranked=named)[0]
        expected = of_items.sum().item() / 2
        if credit == "sequence":
            expected = flexrec.ranking_metric(torch.tensor([gains]), "ndcg", num_ranked=named).item()
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "ndgc"}, ValueError, "ndgc"),
        ({"credit": "policy"}, ValueError, "credit must be one of"),
        ({"invalid": "zero"}, ValueError, "invalid must be one of"),
        ({"gains_column": "worth"}, ValueError, "needs a column 'worth'"),
        ({"columns": {"candidates": [[1, 2, 3]]}}, TypeError, "candidates must be strings, got int in row 0"),
        ({"columns": {"candidates": [["a", "b"]]}}, ValueError, r"gains\[0\] must have one number per candidate, 2"),
    ],
)
def test_mistakes_of_the_reward_are_named(options, error, message):
    with pytest.raises(error, match=message):
        reward(["[1]"], **options)


@pytest.mark.parametrize("conversational", [False, True])
def test_reward_trains_a_plain_grpo_trainer(tmp_path, conversational):
    """Items are special tokens, which are not in the text that TRL hands over."""
    tokenizer = make_tokenizer(items=12)
    rows = make_rows(
        prompt=[[{"role": "user", "content": "rank"}] if conversational else "rank"] * 3,
        candidates=[[f"<item:{i + 4 * p}>" for i in range(len(gains))] for p, gains in enumerate(GAINS)],
    )
    trainer = trl.GRPOTrainer(
        make_model(tokenizer),
        RankingReward("ndcg@5", separator="", tokenizer=tokenizer),
        args=make_args(tmp_path, trl.GRPOConfig, max_completion_length=6),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    train_and_compare(trainer)
    for name in ("ndcg@5/valid", "ndcg@5/gain@1", "rewards/ndcg@5/mean"):
        assert len(logged(trainer, name)) == 2
    assert logged(trainer, "ndcg@5/valid") == [0.0, 0.0]  # an untrained model writes no whole rankings
    assert min(logged(trainer, "ndcg@5/missing")) < 4.0  # but it names some items


def test_completions_without_a_reward_are_left_out(tmp_path):
    tokenizer = make_tokenizer()
    trainer = trl.GRPOTrainer(
        make_model(tokenizer),
        RankingReward(invalid="none"),
        args=make_args(tmp_path, trl.GRPOConfig, max_completion_length=6),
        train_dataset=make_rows(),
        processing_class=tokenizer,
    )
    trainer.train()
    assert logged(trainer, "grad_norm") == [0.0, 0.0]
