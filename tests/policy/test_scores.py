"""Scores of rankings against whole-sequence softmaxes, and all actions over branches against their definition."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexrec.ops.rank_order import rank_order
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.policy.batch import make_batch
from flexrec.policy.scores import all_actions, ranking_scores, ranking_states, reasoning_logprobs
from flexrec.rankings import RankingState
from flexrec.rankings.reasoning import ReasoningTokens

PROMPTS = [[1, 2, 3], [4, 5]]
TITLES = [[[10, 11], [10, 12, 13], [10, 12], [14]], [[20], [20, 21], [22, 23]]]
SINGLE = [[[10], [11], [12], [13]], [[20], [21], [22]]]
RANKINGS = np.array([[2, 0, 3, 1], [1, 2, 0, -1]])
GAINS = torch.tensor([[1.0, 0.0, 0.5, 0.25], [0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)  # by candidate
FORMS = pytest.mark.parametrize(
    ("candidates", "separator", "end"), [(SINGLE, (), ()), (TITLES, (30, 31), (32,)), (SINGLE, (30,), (32,))]
)


def make_model(seed=0, bias=False):
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


def decisions_of(model, row, candidates, separator, end, temperature, num_ranked=None):
    """(rank, allowed ids, log-probs, target, item's tokens so far) of a ranking's tokens, one model call per token.

    A separator or end belongs to the item it closes.
    """
    ranking = RANKINGS[row][: len(candidates[row])][:num_ranked]
    state = RankingState([candidates[row]], separator=separator, end=end, num_ranked=num_ranked)
    prefix = []
    for rank, item in enumerate(ranking):
        spelled = []
        for token in [*candidates[row][item], *(separator if rank + 1 < len(ranking) else end)]:
            ids, _ = state.allowed()
            logits = model(torch.tensor([PROMPTS[row] + prefix])).logits[0, -1]
            logprobs = (logits[torch.as_tensor(ids, dtype=torch.int64)] / temperature).log_softmax(0)
            yield rank, ids.tolist(), logprobs, token, list(spelled)
            state.advance([token])
            prefix.append(token)
            spelled.append(token)


@FORMS
@pytest.mark.parametrize("bias", [False, True])
def test_scores_equal_token_by_token_softmaxes(candidates, separator, end, bias):
    model = make_model(bias=bias)
    batch = make_batch(PROMPTS, candidates, RANKINGS, separator=separator, end=end)
    scores = ranking_scores(ranking_states(model, batch), batch, temperature=0.8)
    for row in range(2):
        logprobs, entropy = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for rank, ids, lp, target, _ in decisions_of(model, row, candidates, separator, end, 0.8):
            if len(ids) > 1:
                logprobs[rank] += lp[ids.index(target)]
                entropy[rank] -= (lp.exp() * lp).sum()
        torch.testing.assert_close(scores.logprobs[row], logprobs)
        torch.testing.assert_close(scores.entropy[row], entropy)


@FORMS
@pytest.mark.parametrize("bias", [False, True])
def test_kl_equals_the_sum_over_the_support(candidates, separator, end, bias):
    model, reference = make_model(0), make_model(1, bias=bias)
    batch = make_batch(PROMPTS, candidates, RANKINGS, separator=separator, end=end)
    states, other = ranking_states(model, batch), ranking_states(reference, batch)
    scores = ranking_scores(states, batch, temperature=0.6, reference=other)
    alone = ranking_scores(states, batch, temperature=0.6)
    assert alone.kl is None
    torch.testing.assert_close((scores.logprobs, scores.entropy), (alone.logprobs, alone.entropy))
    for row in range(2):
        expected = torch.zeros(4, dtype=torch.float64)
        pairs = zip(
            decisions_of(model, row, candidates, separator, end, 0.6),
            decisions_of(reference, row, candidates, separator, end, 0.6),
            strict=True,
        )
        for (rank, _, p, _, _), (_, _, q, _, _) in pairs:
            expected[rank] += (p.exp() * (p - q)).sum()
        torch.testing.assert_close(scores.kl[row], expected)
    gains = GAINS.gather(1, rank_order(batch.rankings, batch.lengths, 4))
    for tilt in (None, 0.1):
        options = {"temperature": 0.6, "tilt": tilt}
        result = all_actions(states, batch, gains, "ndcg", reference=other, **options)
        torch.testing.assert_close(result.kl, scores.kl)
        torch.testing.assert_close(result.objective, all_actions(states, batch, gains, "ndcg", **options).objective)
    assert ranking_scores(states, batch, reference=states).kl.abs().max() < 1e-12


@FORMS
@pytest.mark.parametrize(
    ("metric", "width", "num_ranked", "tilt"),
    [
        ("ndcg", None, None, None),
        ("recall@2", None, None, None),
        ("mrr", None, None, None),
        ("ndcg", 2, 2, None),  # the first two are ranked
        ("ndcg", None, 2, None),  # all are ranked, and the first two are shown
        ("ndcg", None, None, 0.2),
    ],
)
def test_all_actions_over_branches(candidates, separator, end, metric, width, num_ranked, tilt):
    """At each decision: the mean over branches, by their probability, of how much better it is on average to swap in
    an item below the branch, or with a tilt ``tilt`` log of the mean of ``exp(better / tilt)``."""
    model = make_model(bias=True)
    batch = make_batch(PROMPTS, candidates, RANKINGS[:, :width], separator=separator, end=end)
    order = rank_order(batch.rankings, batch.lengths, 4)
    options = {"temperature": 0.7, "num_ranked": num_ranked, "tilt": tilt}
    result = all_actions(ranking_states(model, batch), batch, GAINS.gather(1, order), metric, **options)
    for row, size in ((0, 4), (1, 3)):
        ranking = order[row, :size].tolist()
        ranked = len(RANKINGS[row, :size][:width])
        gains = GAINS[row]

        def value(ranking, gains=gains):
            return ranking_metric(gains[ranking][None], metric, num_ranked=num_ranked)[0]

        def change(rank, item, ranking=ranking, value=value):
            swapped = list(ranking)
            other = swapped.index(item)
            swapped[rank], swapped[other] = swapped[other], swapped[rank]
            return value(swapped) - value(ranking)

        expected = torch.zeros(batch.shape[1], dtype=torch.float64)
        for rank, ids, lp, _, spelled in decisions_of(model, row, candidates, separator, end, 0.7, width):
            if len(ids) == 1:
                continue
            last = rank == ranked - 1
            worth = []
            for token in ids:
                terminated = [
                    (item, candidates[row][item] + list(end if last else separator)) for item in ranking[rank:]
                ]
                below = [i for i, text in terminated if (text[: len(spelled) + 1]) == [*spelled, token]]
                worth.append(sum(change(rank, item) for item in below) / len(below))
            worth = torch.stack(worth).double()
            expected[rank] += lp.exp() @ worth if tilt is None else tilt * (lp.exp() @ (worth / tilt).exp()).log()
        torch.testing.assert_close(result.objective[row].double(), expected, atol=1e-6, rtol=1e-5)


def test_foresight_is_of_whole_items():
    model = make_model()
    batch = make_batch(PROMPTS, TITLES, RANKINGS, separator=(30, 31), end=(32,))
    gains = GAINS.gather(1, rank_order(batch.rankings, batch.lengths, 4))
    with pytest.raises(ValueError, match="needs the probability of whole items: use encoding 'item_token'"):
        all_actions(ranking_states(model, batch), batch, gains, "ndcg", foresight="auto")


def test_all_actions_gradient_reaches_the_model():
    model = make_model()
    batch = make_batch(PROMPTS, TITLES, RANKINGS, separator=(30, 31), end=(32,))
    gains = GAINS.gather(1, rank_order(batch.rankings, batch.lengths, 4))
    all_actions(ranking_states(model, batch), batch, gains, "ndcg").objective.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("candidates", "separator", "end"), [(SINGLE, (), ()), (TITLES, (30, 31), (32,))])
def test_rows_may_rank_different_numbers_of_items(candidates, separator, end):
    """A row that stops early has its own scores up to there and exactly 0 behind, beside rows that go on."""
    model = make_model()
    partial = np.array([[2, 0, 3], [1, -1, -1]])
    whole = make_batch(PROMPTS, candidates, RANKINGS, separator=separator, end=end)
    batch = make_batch(PROMPTS, candidates, partial, separator=separator, end=end)
    scores = ranking_scores(ranking_states(model, batch), batch)
    with_kl = ranking_scores(
        ranking_states(model, batch), batch, reference=ranking_states(make_model(1, bias=True), batch)
    )
    expected = ranking_scores(ranking_states(model, whole), whole)
    torch.testing.assert_close(scores.logprobs[0, :2], expected.logprobs[0, :2])
    for values in (*scores[:2], *with_kl):
        assert values[0].all(), "a rank that the row has"
        assert values[1, 0] != 0
        assert (values[1, 1:] == 0).all()
    if not end:  # what closes the row's only item is an end now
        torch.testing.assert_close(scores.entropy[1, 0], expected.entropy[1, 0])
    gains = GAINS.gather(1, rank_order(batch.rankings, batch.lengths, 4))
    objective = all_actions(ranking_states(model, batch), batch, gains, "ndcg").objective
    assert not objective[1, 1:].any()
    objective.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("bias", [False, True])
def test_reasoning_has_the_logprobs_of_the_whole_vocabulary(bias):
    """Of its sampled tokens, without those that could not come; what was forced has none."""
    model = make_model(bias=bias)
    said = ReasoningTokens([np.array([7, 8, 9]), np.array([9, 7])], np.array([2, 2]), never=(3, 20))
    batch = make_batch(PROMPTS, SINGLE, RANKINGS, reasoning=said)
    found = reasoning_logprobs(ranking_states(model, batch), batch, temperature=0.6)
    for row, tokens in enumerate(said.tokens):
        logits = model(torch.tensor([PROMPTS[row] + tokens.tolist()])).logits[0] / 0.6
        logits[:, [3, 20]] = -torch.inf
        logprobs = logits[len(PROMPTS[row]) - 1 :].log_softmax(1)
        torch.testing.assert_close(found[row], torch.stack([logprobs[step, tokens[step]] for step in range(2)]))


def test_rank_order_puts_unranked_candidates_behind_in_candidate_order():
    rankings = torch.tensor([[3, 0], [1, -1], [2, 1]])
    order = rank_order(rankings, torch.tensor([5, 2, 3]), 5)
    assert order[0].tolist() == [3, 0, 1, 2, 4]
    assert order[1, :2].tolist() == [1, 0]
    assert order[2, :3].tolist() == [2, 1, 0]
    assert sorted(order[1].tolist()) == [0, 1, 2, 3, 4]
