"""Completions as text and as token ids: one parser, the same rewards, and what is done with what is no ranking."""

import time

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


READINGS = {  # of three labels: the ranks of the characters
    "2 > 1 > 3": "0...1...2",
    "2>1>3.": "0.1.2.",
    "[2, 1, 3]": "00..1..22",
    "[2]>[1]>[3]": "000.111.222",
    "[02] > [01] > [03]": "0000...1111...2222",
    "[ 2 ] > [1] > [3]": "00000...111...222",
    "\uff3b\uff12\uff3d\uff1e\uff3b\uff11\uff3d\uff1e\uff3b\uff13\uff3d": "000.111.222",
    "\uff12 > \uff11 > \uff13": "0...1...2",
    "\u30102\u3011 > \u30101\u3011 > \u30103\u3011": "000...111...222",
    "1. [2]\n2. [1]\n3. [3]": "...000....111....222",
    "1) [2]\n 2) [1]\n 3) [3]": "...000.....111.....222",
    "I would say: 2 > 1 > 3": ".............0...1...2",
    "Passage [3] is about [1]; final: [2] > [1] > [3]": "." * 33 + "000...111...222",
    "[1] > [2] > [3]? No: [2] > [1] > [3]": "." * 21 + "000...111...222",
    "Passages [3] and [1].\n\n1. [2]\n2. [1]\n3. [3]": "." * 26 + "000....111....222",
}


@pytest.mark.parametrize("text", READINGS)
def test_texts_are_read_as_a_person_would(text):
    parsed = parse_ranking_texts([text, "[1] > [2] > [3]"], [index_labels(3)] * 2, separator=" > ")
    assert parsed.ranking.tolist() == [[1, 0, 2], [0, 1, 2]]
    assert (parsed.valid.tolist(), parsed.missing.tolist(), parsed.repeated.tolist()) == ([False, True], [0, 0], [0, 0])
    ranks = "".join("." if rank < 0 else str(rank) for rank in parsed.item_ids[0])
    assert ranks[: len(text)] == READINGS[text]
    assert not ranks[len(text) :].strip(".")


@pytest.mark.parametrize(
    ("text", "ranking"),
    [
        ("I like 2 and 3 of them", []),  # numbers that nothing joins
        ("[2] costs 7 > 3 > 1", [1]),  # numbers beside labels
        ("version 1.2 > 1.3", []),
        ("x2 > y1", []),
        ("1. 2\n2. 1\n3. 3", []),
        ("[2] > [9] > [1]", [1, 0]),  # an item that is none of them
        ("0 > 2 > 17 > 1", [1, 0]),
        ("[2] > [1], then perhaps [3]", [1, 0]),
        (f"[{'9' * 6000}] > [3] > [{'0' * 6000}2]", [2, 1]),
        ("", []),
    ],
)
def test_what_cannot_be_read_is_not_guessed(text, ranking):
    parsed = parse_ranking_texts([text], [index_labels(3)], separator=" > ")
    assert parsed.missing[0] == 3 - len(ranking)
    assert parsed.ranking[0, : len(ranking)].tolist() == ranking
    assert parsed.unknown[0] > 0 or not text


def test_loose_texts_of_many_lists():
    """Lists of different lengths, several texts each, ranks cut short: every row goes by its own list."""
    texts = ["2 > 1", "[2, 1, 3, 4]", "[3] > [1]", "4 > 3", "<t>1 > 2</t> 3>2>1", "1 > 2"]
    options = {"separator": " > ", "num_generations": 2, "after": None}
    parsed = parse_ranking_texts(texts, [index_labels(k) for k in (2, 4, 3)], num_ranked=[1, 2, 2, 4, 3, 3], **options)
    assert parsed.ranking.tolist() == [
        [1, -1, -1, -1],
        [1, 0, -1, -1],
        [2, 0, -1, -1],
        [3, 2, 0, 1],
        [2, 1, 0, -1],
        [0, 1, 2, -1],
    ]
    assert parsed.missing.tolist() == [0, 0, 0, 2, 0, 1]
    assert parsed.valid.tolist() == [False, False, True, False, False, False]


def test_lines_of_a_numbered_list_are_joined_whatever_the_names():
    names = ["Alien", "Brazil", "2001: A Space Odyssey"]
    text = "Brazil is my favourite, Alien was fun.\n\n1. 2001: A Space Odyssey\n2. Alien\n3. Brazil"
    parsed = parse_ranking_texts([text], [names], separator=", ")
    assert parsed.ranking.tolist() == [[2, 0, 1]]
    assert [text[i] for i in np.flatnonzero(parsed.item_ids[0] == 1)] == list("Alien")
    numbered = ["1. FC", "2. FC"]  # names that begin as lines do are left as they are
    assert parse_ranking_texts(["x\n2. FC, 1. FC"], [numbered], separator=", ").ranking.tolist() == [[1, 0]]


def test_hostile_texts_are_read_quickly():
    for piece in ("[", "[1", "1 >", "[1,", " " * 50, "\n1. ", "]\n", "12" * 50):
        started = time.perf_counter()
        parse_ranking_texts([piece * (100_000 // len(piece))], [index_labels(9)], separator=" > ")
        assert time.perf_counter() - started < 5.0, piece


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


def test_only_what_was_said_is_rewarded():
    gains = [[1.0, 0.5, 0.0]]
    texts = ["", "I cannot rank these.", "[3] > [2] > [1]", "[2]", "1 > [1]", "[1] > [2] > [3]"]
    scored = score_completions(texts, None, gains, "ndcg@3", separator=" > ", num_generations=6)
    ideal = 1 + 0.5 / np.log2(3)
    expected = [0, 0, (0.5 / np.log2(3) + 0.5) / ideal, 0.5 / ideal, 1 / ideal, 1]
    np.testing.assert_allclose(scored.metric, expected, rtol=1e-6)
    assert scored.num_ranked.tolist() == [0, 0, 3, 1, 1, 3]
    assert (scored.item_rewards[:2] == 0).all()
    # By hand: rank 1 shows 0.5 where either of the two that are not shown could stand.
    np.testing.assert_allclose(scored.item_rewards[3], [np.mean([0.5 - 1.0, 0.5 - 0.0]) / ideal, 0, 0], atol=1e-7)
    repaired = score_completions(texts, None, gains, "ndcg@3", separator=" > ", num_generations=6, invalid="repair")
    repaired_to = [1, 1, expected[2], (0.5 + 1 / np.log2(3)) / ideal, 1, 1]
    np.testing.assert_allclose(repaired.metric, repaired_to, rtol=1e-6)
    assert repaired.num_ranked.tolist() == [3] * 6


@pytest.mark.parametrize("metric", ["ndcg", "dcg@2", "err", "mrr", "recall@2", "precision", "rbp.8", "map", "hit_rate"])
@pytest.mark.parametrize("credit", ["swap", "noncausal", "independent", "rank", "sequence"])
def test_a_part_is_worth_what_num_ranked_says(metric, credit):
    """A row that names T of its items has the rewards of a row of which T are asked for, in every metric and credit."""
    rng = np.random.default_rng(0)
    gains = rng.random((8, 5)).round(1)
    said = rng.integers(0, 6, size=8)
    texts = [" > ".join(f"[{i + 1}]" for i in rng.permutation(5)[:size]) for size in said]
    scored = score_completions(texts, None, gains.tolist(), metric, credit=credit, separator=" > ")
    counts = torch.from_numpy(said)
    assert scored.num_ranked.tolist() == said.tolist()
    for row in range(8):
        options = {"num_ranked": int(said[row])}
        one = scored.gains[row : row + 1]
        rewards = flexrec.swap_rewards(one, metric, credit=credit, backend="torch", **options)
        torch.testing.assert_close(scored.item_rewards[row : row + 1], rewards, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(scored.metric[row : row + 1], flexrec.ranking_metric(one, metric, **options))
    assert (scored.item_rewards[torch.arange(5) >= counts[:, None]] == 0).all()
    assert (scored.metric[counts == 0] == 0).all()


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
        ({"invalid": "none"}, "invalid must be one of"),
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
