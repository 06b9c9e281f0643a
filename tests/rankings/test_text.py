"""Completions as text and as token ids: one parser, the same rewards, and what is done with what is no ranking."""

import numpy as np
import pytest
import torch

import flexrec
from flexrec.rankings.text import index_labels, item_values_to_tokens, parse_ranking_texts, score_completions


def test_rankgpt_output_is_read_unchanged():
    parsed = parse_ranking_texts(["[3] > [1] > [2]", " [2] > [3] > [1]\n"], [index_labels(3)] * 2, separator=" > ")
    assert parsed.ranking.tolist() == [[2, 0, 1], [1, 2, 0]]
    assert parsed.valid.tolist() == [True, True]


def test_characters_of_an_item_carry_its_rank():
    parsed = parse_ranking_texts([" [2] > [1]"], [index_labels(2)], separator=" > ")
    assert parsed.item_ids.tolist() == [[-1, 0, 0, 0, -1, -1, -1, 1, 1, 1]]


def test_two_digits_are_one_label():
    labels = index_labels(12)
    text = " > ".join(reversed(labels))
    parsed = parse_ranking_texts([text], [labels], separator=" > ")
    assert parsed.valid.all()
    assert parsed.ranking.tolist() == [list(range(11, -1, -1))]


@pytest.mark.parametrize(
    ("text", "ranking", "repeated", "missing"),
    [
        ("I think [2] is best, then [2] and [1].", [1, 0, 2], 1, 1),
        ("[9] > [1]", [0, 1, 2], 0, 2),
        ("", [0, 1, 2], 0, 3),
        ("\ud800[3]", [2, 0, 1], 0, 2),
    ],
)
def test_what_is_no_ranking_is_repaired_and_flagged(text, ranking, repeated, missing):
    parsed = parse_ranking_texts([text], [index_labels(3)], separator=" > ")
    assert parsed.ranking.tolist() == [ranking]
    assert (parsed.valid[0], parsed.repeated[0], parsed.missing[0]) == (False, repeated, missing)


def test_reasoning_belongs_to_no_item():
    text = "<think>[1] is old, </think>no [2]</think>[3] > [1] > [2]"
    parsed = parse_ranking_texts([text, "<think>[3] > [1]"], [index_labels(3)] * 2, separator=" > ", after="</think>")
    assert parsed.ranking.tolist() == [[2, 0, 1], [0, 1, 2]]
    assert parsed.valid.tolist() == [True, False]
    assert parsed.item_ids[0, : text.rindex("[3]")].max() == -1
    assert parsed.item_ids[1].max() == -1


def test_token_ids_and_text_agree():
    """A token for every character: the same rankings, spans and rewards, reasoning before them or not."""
    rng = np.random.default_rng(0)
    texts, gains = [], []
    for _ in range(20):
        text = " > ".join(f"[{i + 1}]" for i in rng.permutation(5)[: rng.integers(1, 6)])
        texts.append("".join(rng.choice(["", "hm [1] ", "?"])) + "|" + text)
        gains.append(rng.random(5).tolist())
    as_ids = [[ord(c) for c in text] for text in texts]
    labels = [index_labels(5)] * 20
    options = {"credit": "swap", "num_ranked": 4}
    of_text = score_completions(texts, labels, gains, "ndcg", separator=" > ", after="|", **options)
    of_ids = score_completions(
        as_ids,
        [[[ord(c) for c in label] for label in row] for row in labels],
        gains,
        "ndcg",
        separator=[ord(c) for c in " > "],
        after=[ord("|")],
        **options,
    )
    for a, b in zip(of_text.parsed, of_ids.parsed, strict=True):
        np.testing.assert_array_equal(a, b)
    torch.testing.assert_close(of_text.item_rewards, of_ids.item_rewards, rtol=0, atol=0)


def test_rewards_are_those_of_the_ranking():
    gains, variance = [[0.0, 1.0, 0.5], [1.0, 0.0]], [[0.1, 0.2, 0.3], [0.0, 0.1]]
    texts = ["[2] > [3] > [1]", "[1] > [2] > [3]", "[2] > [1]", "[1] > [2]"]
    scored = score_completions(texts, None, gains, "ndcg", variance=variance, separator=" > ", num_generations=2)
    assert scored.parsed.valid.all()
    ranked = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    spread = torch.tensor([[0.2, 0.3, 0.1], [0.1, 0.2, 0.3], [0.1, 0.0, 0.0], [0.0, 0.1, 0.0]])
    lengths = torch.tensor([3, 3, 2, 2])
    rewards, of_rewards = flexrec.swap_rewards_with_variance(ranked, spread, "ndcg", lengths=lengths)
    torch.testing.assert_close(scored.gains, ranked)
    torch.testing.assert_close(scored.item_rewards, rewards)
    torch.testing.assert_close(scored.variance, of_rewards)
    torch.testing.assert_close(scored.metric, flexrec.ranking_metric(ranked, "ndcg", lengths=lengths))


def test_ranks_beyond_num_ranked_count_for_nothing():
    """By hand: gains 0 and 0.5 are shown, the 1 that is not shown counts in the ideal list only."""
    gains = [[0.5, 0.0, 1.0]]
    scored = score_completions(["[2] > [1]"], None, gains, "dcg", separator=" > ", num_ranked=2)
    np.testing.assert_allclose(scored.metric, [0.5 / np.log2(3)], rtol=1e-6)
    scored = score_completions(["[2] > [1]"], None, gains, "ndcg", separator=" > ", num_ranked=2)
    np.testing.assert_allclose(scored.metric, [0.5 / np.log2(3) / (1 + 0.5 / np.log2(3))], rtol=1e-6)
    # Rank 1 loses to both that were left: to the item at rank 2, and to the one that no rank shows.
    ideal = 1 + 0.5 / np.log2(3)
    swaps = [(0 - 0.5) * (1 - 1 / np.log2(3)), 0 - 1.0]
    beyond = (0.5 - 1.0) / np.log2(3)
    np.testing.assert_allclose(scored.item_rewards, [[np.mean(swaps) / ideal, beyond / ideal, 0]], rtol=1e-5)


def test_values_at_tokens():
    item_ids = torch.tensor([[-1, 0, 0, -1, 1, 2, 2]])
    values = torch.tensor([[3.0, 4.0, 5.0]])
    assert item_values_to_tokens(values, item_ids).tolist() == [[0, 3, 3, 0, 4, 5, 5]]
    assert item_values_to_tokens(values, item_ids, at="end").tolist() == [[0, 0, 3, 0, 4, 0, 5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gains": [[1.0, 2.0]]}, r"gains\[0\] must have one number per candidate, 3, got 2"),
        ({"gains": []}, "gains must have one row per list of candidates, 1, got 0"),
        ({"variance": [[1.0]]}, r"variance\[0\] must have one number per candidate"),
        ({"credit": "policy"}, "policy's probabilities"),
        ({"after": ""}, "after must not be empty"),
        ({"completions": [[1, 2]], "candidates": None}, "for texts only"),
        ({"completions": ["a", "b"]}, "one row per ranking, 1, got 2"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"completions": ["[1]"], "candidates": [index_labels(3)], "gains": [[1.0, 0.0, 0.0]], "metric": "ndcg"}
    with pytest.raises(ValueError, match=message):
        score_completions(**{**arguments, **change})
    with pytest.raises(TypeError, match="texts must hold strings, got int at index 1"):
        parse_ranking_texts(["[1]", 3], [["[1]"]] * 2)
