"""Output rows with marks: the rows by hand, and every score of a ranking by whole softmaxes over them."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexrec.decoding.sample import sample_rankings, search_rankings
from flexrec.ops.rank_order import rank_order
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.policy.batch import make_batch
from flexrec.policy.output_rows import numbered, row_tokens
from flexrec.policy.scores import all_actions, output_rows, ranking_scores, ranking_states

PROMPTS = [[1, 2, 3], [4, 5]]
CANDIDATES = [[[10], [11], [12], [13]], [[12], [21], [10]]]
MARKS = [[[30], [], [31, 35], [30, 35]], [[31], [30], [30]]]  # items 10 and 12 have other marks in the other list
RANKINGS = np.array([[2, 0, 3, 1], [1, 2, 0, -1]])
GAINS = torch.tensor([[1.0, 0.0, 0.5, 0.25], [0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)  # by candidate


def make_model(seed: int = 0, bias: bool = True) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(10.0)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(40, dtype=torch.float64))
    return model


def by_hand(model: Any, row: int, ranking: list[int], temperature: float) -> list[tuple[list[int], torch.Tensor]]:
    """(what is left, its log-probs) at every rank: a candidate's logit is the sum of its tokens' logits."""
    left, said, found = list(range(len(CANDIDATES[row]))), [], []
    for item in ranking:
        logits = model(torch.tensor([PROMPTS[row] + said])).logits[0, -1]
        summed = torch.stack([logits[[*CANDIDATES[row][i], *MARKS[row][i]]].sum() for i in left])
        found.append((list(left), (summed / temperature).log_softmax(0)))
        left.remove(item)
        said += CANDIDATES[row][item]
    return found


def ranked(row: int) -> list[int]:
    return [int(i) for i in RANKINGS[row] if i >= 0]


def test_rows_are_sums_of_the_rows_of_all_tokens():
    weight = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(40, dtype=torch.float64, requires_grad=True)
    tokens = row_tokens(CANDIDATES, MARKS, "cpu")
    rows, biases = tokens.summed(weight, bias)
    assert rows.shape == (8, 8)
    expected = torch.zeros(8, 40, dtype=torch.float64)  # how often each vocabulary entry counts
    for p, k in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)):
        for token in (*CANDIDATES[p][k], *MARKS[p][k]):
            expected[4 * p + k, token] += 1
    torch.testing.assert_close(rows, expected @ weight)
    torch.testing.assert_close(biases, expected @ bias)
    upstream = torch.randn(8, 8, dtype=torch.float64)
    of_weight, of_bias = torch.autograd.grad((rows * upstream).sum() + biases.sum(), (weight, bias))
    torch.testing.assert_close(of_weight, expected.T @ upstream)
    torch.testing.assert_close(of_bias, expected.sum(0))
    assert tokens.summed(weight, None)[1] is None


def test_numbers_stand_for_tokens():
    numbers, tokens = numbered(CANDIDATES)
    assert numbers == [[[0], [1], [2], [3]], [[4], [5], [6]]]
    assert tokens.tolist() == [10, 11, 12, 13, 12, 21, 10, 0]


@pytest.mark.parametrize("bias", [False, True])
def test_scores_and_kl_equal_softmaxes_of_summed_logits(bias):
    """The reference has rows of its own."""
    model, reference = make_model(0, bias), make_model(1, bias)
    batch = make_batch(PROMPTS, CANDIDATES, RANKINGS, marks=MARKS)
    states, other = ranking_states(model, batch), ranking_states(reference, batch)
    alone = ranking_scores(states, batch, temperature=0.6)
    scores = ranking_scores(states, batch, temperature=0.6, reference=other)
    gains = GAINS.gather(1, rank_order(batch.rankings, batch.lengths, 4))
    actions = all_actions(states, batch, gains, "ndcg", temperature=0.6, reference=other)
    for row in range(2):
        expected = torch.zeros(3, 4, dtype=torch.float64)
        pairs = zip(by_hand(model, row, ranked(row), 0.6), by_hand(reference, row, ranked(row), 0.6), strict=True)
        for rank, ((left, p), (_, q)) in enumerate(pairs):
            expected[0, rank] = p[left.index(ranked(row)[rank])]
            expected[1, rank] = -(p.exp() * p).sum()
            expected[2, rank] = (p.exp() * (p - q)).sum()
        for found in (scores, actions):
            torch.testing.assert_close(torch.stack([found.logprobs[row], found.entropy[row], found.kl[row]]), expected)
        torch.testing.assert_close(alone.logprobs[row], expected[0])
    plain = ranking_scores(states, make_batch(PROMPTS, CANDIDATES, RANKINGS), temperature=0.6)
    assert (plain.logprobs - scores.logprobs).abs().max() > 0.1


def test_all_actions_average_over_the_marked_distribution():
    model = make_model()
    batch = make_batch(PROMPTS, CANDIDATES, RANKINGS, marks=MARKS)
    gains = GAINS.gather(1, rank_order(batch.rankings, batch.lengths, 4))
    found = all_actions(ranking_states(model, batch), batch, gains, "ndcg", temperature=0.7)
    for row in range(2):
        ranking = ranked(row)
        value = {r: ranking_metric(GAINS[row][list(r)][None], "ndcg")[0] for r in permutations(ranking)}
        for rank, (left, p) in enumerate(by_hand(model, row, ranking, 0.7)):
            expected = torch.zeros((), dtype=torch.float64)
            for item, lp in zip(left, p, strict=True):
                swapped = list(ranking)
                at = ranking.index(item)
                swapped[rank], swapped[at] = ranking[at], ranking[rank]
                expected += lp.exp() * (value[tuple(swapped)] - value[tuple(ranking)])
            torch.testing.assert_close(found.objective[row, rank], expected)


def test_gradients_flow_into_the_rows_of_marks():
    model = make_model()
    batch = make_batch(PROMPTS, CANDIDATES, RANKINGS, marks=MARKS)
    found = torch.autograd.grad(
        ranking_scores(ranking_states(model, batch), batch).logprobs.sum(), model.lm_head.weight
    )[0]
    by_rank = [
        lp[left.index(item)]
        for row in range(2)
        for item, (left, lp) in zip(ranked(row), by_hand(model, row, ranked(row), 1.0), strict=True)
    ]
    expected = torch.autograd.grad(torch.stack(by_rank).sum(), model.lm_head.weight)[0]
    torch.testing.assert_close(found, expected)
    assert found[[30, 31, 35]].abs().min(dim=1).values.max() > 0


def test_the_rows_of_a_batch_are_those_of_its_lists():
    model = make_model()
    batch = make_batch(PROMPTS, CANDIDATES, RANKINGS, marks=MARKS)
    rows = output_rows(ranking_states(model, batch), batch)
    assert rows.candidates.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    weight = model.lm_head.weight
    torch.testing.assert_close(rows.weight[2], weight[12] + weight[31] + weight[35])
    torch.testing.assert_close(rows.weight[4], weight[12] + weight[31])
    torch.testing.assert_close(rows.bias[6], model.lm_head.bias[[10, 30]].sum())


def test_samples_and_beams_are_of_the_marked_distribution():
    """The most probable ranking by enumeration; and log-probs that are those of training."""
    model = make_model()
    worth = {}
    for ranking in permutations(range(4)):
        with torch.no_grad():
            steps = by_hand(model, 0, list(ranking), 0.9)
        worth[ranking] = sum(float(p[left.index(i)]) for i, (left, p) in zip(ranking, steps, strict=True))
    found = search_rankings(model, PROMPTS, CANDIDATES, marks=MARKS, num_beams=24, temperature=0.9)
    ranked_by_worth = sorted(worth, key=lambda r: -worth[r])
    assert found.rankings[:24].tolist() == [list(r) for r in ranked_by_worth]
    np.testing.assert_allclose(found.logprobs[:24].sum(1), [worth[r] for r in ranked_by_worth], atol=1e-4)
    greedy = sample_rankings(model, PROMPTS, CANDIDATES, marks=MARKS, greedy=True)
    best: list[int] = []
    for rank in range(4):
        left, p = by_hand(model, 0, [*best, *[i for i in range(4) if i not in best]], 1.0)[rank]
        best.append(left[int(p.argmax())])
    assert greedy.rankings[0].tolist() == best
    sampled = sample_rankings(
        model, PROMPTS, CANDIDATES, marks=MARKS, num_generations=3, generator=torch.Generator().manual_seed(0)
    )
    batch = make_batch(PROMPTS, CANDIDATES, sampled.rankings, marks=MARKS, num_generations=3)
    logprobs = ranking_scores(ranking_states(model, batch), batch).logprobs.detach().float()
    torch.testing.assert_close(torch.from_numpy(sampled.logprobs), logprobs, rtol=1e-4, atol=1e-4)


def test_reasoning_comes_from_the_whole_vocabulary_before_marked_rankings():
    model = make_model()
    options: dict[str, Any] = {"reasoning_end": [7], "max_reasoning_tokens": 3}
    generator = torch.Generator().manual_seed(0)
    found = sample_rankings(model, PROMPTS, CANDIDATES, marks=MARKS, generator=generator, **options)
    batch = make_batch(PROMPTS, CANDIDATES, found.rankings, marks=MARKS, reasoning=found.reasoning)
    logprobs = ranking_scores(ranking_states(model, batch), batch).logprobs.detach().float()
    torch.testing.assert_close(torch.from_numpy(found.logprobs), logprobs, rtol=1e-4, atol=1e-4)


def test_marks_are_for_single_tokens_with_nothing_between():
    with pytest.raises(ValueError, match="a row for every candidate of every list"):
        make_batch(PROMPTS, CANDIDATES, RANKINGS, marks=[MARKS[0], MARKS[1][:2]])
    titles = [[[10, 11], [12], [13], [14]], CANDIDATES[1]]
    with pytest.raises(ValueError, match="candidates of a single token: use encoding 'item_token'"):
        make_batch(PROMPTS, titles, RANKINGS, marks=MARKS)
    for options in ({"separator": [9]}, {"by_token": True}):
        with pytest.raises(ValueError, match="single token each, with nothing between"):
            make_batch(PROMPTS, CANDIDATES, RANKINGS, marks=MARKS, **options)
    with pytest.raises(ValueError, match="single token each, with nothing between"):
        sample_rankings(make_model(), PROMPTS, CANDIDATES, marks=MARKS, separator=[9])
