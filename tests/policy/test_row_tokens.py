"""Tokens that are sums: their rows by hand, and every score of a ranking by whole softmaxes over summed logits."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexrec.decoding.logits_processor import RankingLogitsProcessor
from flexrec.decoding.sample import sample_rankings, search_rankings
from flexrec.integrations.vllm_request import RankingRequest
from flexrec.ops.rank_order import rank_order
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.policy.batch import make_batch
from flexrec.policy.row_tokens import numbered, with_summed_rows
from flexrec.policy.scores import all_actions, output_rows, ranking_scores, ranking_states

# Items 10 and 12 have other marks in the other list; two candidates of the second list are alike.
PROMPTS = [[1, (2, 36), 3, (12, 31, 35)], [4, (5,)]]
CANDIDATES = [[[(10, 30)], [(11,)], [(12, 31, 35)], [(13, 30, 35)]], [[(12, 31)], [(21, 30)], [(21, 30)]]]
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


def entries(token: Any) -> list[int]:
    return list(token) if isinstance(token, tuple) else [token]


def by_hand(model: Any, row: int, ranking: list[int], temperature: float) -> list[tuple[list[int], torch.Tensor]]:
    """(what is left, its log-probs) at every rank: a candidate's input row is the sum of its tokens' rows, as is every
    position's of the prompt, and its logit the sum of their logits."""
    left, said, found = list(range(len(CANDIDATES[row]))), [], []
    weight = model.get_input_embeddings().weight
    for item in ranking:
        inputs = torch.stack([weight[entries(token)].sum(0) for token in [*PROMPTS[row], *said]])
        logits = model(inputs_embeds=inputs[None]).logits[0, -1]
        summed = torch.stack([logits[entries(CANDIDATES[row][i][0])].sum() for i in left])
        found.append((list(left), (summed / temperature).log_softmax(0)))
        left.remove(item)
        said += CANDIDATES[row][item]
    return found


def ranked(row: int) -> list[int]:
    return [int(i) for i in RANKINGS[row] if i >= 0]


def test_rows_are_sums_of_the_rows_of_all_tokens():
    weight = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(40, dtype=torch.float64, requires_grad=True)
    batch = numbered(PROMPTS, CANDIDATES)
    rows, biases = batch.output(weight, bias)
    assert rows.shape == (8, 8)
    expected = torch.zeros(8, 40, dtype=torch.float64)  # how often each vocabulary entry counts
    for p, lst in enumerate(CANDIDATES):
        for k, (token,) in enumerate(lst):
            for entry in entries(token):
                expected[4 * p + k, entry] += 1
    torch.testing.assert_close(rows, expected @ weight)
    torch.testing.assert_close(biases, expected @ bias)
    upstream = torch.randn(8, 8, dtype=torch.float64)
    of_weight, of_bias = torch.autograd.grad((rows * upstream).sum() + biases.sum(), (weight, bias))
    torch.testing.assert_close(of_weight, expected.T @ upstream)
    torch.testing.assert_close(of_bias, expected.sum(0))
    assert batch.output(weight, None)[1] is None


def test_numbers_stand_for_tokens():
    """Candidates have their own, alike or not; what a prompt lists has that of its first candidate; the rest comes
    behind, once each."""
    prompts, candidates, table = numbered(PROMPTS, CANDIDATES)
    assert candidates == [[[0], [1], [2], [3]], [[4], [5], [6]]]
    assert prompts == [[8, 9, 10, 2], [11, 12]]
    assert table.first.tolist() == [10, 11, 12, 13, 12, 21, 21, 0, 1, 2, 3, 4, 5]
    assert len(table) == 13
    shorter_first = numbered(PROMPTS, CANDIDATES[::-1])
    assert shorter_first.candidates == [[[0], [1], [2]], [[4], [5], [6], [7]]]
    assert shorter_first.table.first[:8].tolist() == [12, 21, 21, 0, 10, 11, 12, 13], "a shorter list is filled up"
    some = table.take(np.array([7, 2, 9, 2]))
    assert np.split(some.ids, some.offsets[1:-1])[1].tolist() == [12, 31, 35]
    assert some.first.tolist() == [0, 12, 2, 12]
    again = numbered([[1, (2, 36), 1, (2, 36)]], CANDIDATES[:1])
    assert again.prompts == [[4, 5, 4, 5]]


def test_plain_tokens_stay_as_they_are():
    prompts, candidates = [[1, 2]], [[[10, 20], [11]]]
    assert numbered(prompts, candidates, [9]) == (prompts, candidates, None)
    weight = torch.randn(40, 8)
    assert numbered(prompts, candidates).output(weight, None) == (weight, None)


@pytest.mark.parametrize("bias", [False, True])
def test_scores_and_kl_equal_softmaxes_of_summed_logits(bias):
    """The reference has rows of its own."""
    model, reference = make_model(0, bias), make_model(1, bias)
    batch = make_batch(PROMPTS, CANDIDATES, RANKINGS)
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
    first = [[[entries(token)[0]] for (token,) in lst] for lst in CANDIDATES]
    plain = make_batch(PROMPTS, [first[0], [[12], [21], [22]]], RANKINGS)
    plain_scores = ranking_scores(ranking_states(model, plain), plain, temperature=0.6)
    assert (plain_scores.logprobs - scores.logprobs).abs().max() > 0.1


def test_all_actions_average_over_the_marked_distribution():
    model = make_model()
    batch = make_batch(PROMPTS, CANDIDATES, RANKINGS)
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
    batch = make_batch(PROMPTS, CANDIDATES, RANKINGS)
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
    batch = make_batch(PROMPTS, CANDIDATES, RANKINGS)
    rows = output_rows(ranking_states(model, batch), batch)
    assert rows.candidates.tolist() == [[0, 1, 2, 3], [4, 5, 6, 0]]
    weight = model.lm_head.weight
    torch.testing.assert_close(rows.weight[2], weight[12] + weight[31] + weight[35])
    torch.testing.assert_close(rows.weight[4], weight[12] + weight[31])
    torch.testing.assert_close(rows.bias[6], model.lm_head.bias[[21, 30]].sum())


def test_samples_and_beams_are_of_the_marked_distribution():
    """The most probable ranking by enumeration; and log-probs that are those of training."""
    model = make_model()
    worth = {}
    for ranking in permutations(range(4)):
        with torch.no_grad():
            steps = by_hand(model, 0, list(ranking), 0.9)
        worth[ranking] = sum(float(p[left.index(i)]) for i, (left, p) in zip(ranking, steps, strict=True))
    found = search_rankings(model, PROMPTS, CANDIDATES, num_beams=24, temperature=0.9)
    ranked_by_worth = sorted(worth, key=lambda r: -worth[r])
    assert found.rankings[:24].tolist() == [list(r) for r in ranked_by_worth]
    np.testing.assert_allclose(found.logprobs[:24].sum(1), [worth[r] for r in ranked_by_worth], atol=1e-4)
    greedy = sample_rankings(model, PROMPTS, CANDIDATES, greedy=True)
    best: list[int] = []
    for rank in range(4):
        left, p = by_hand(model, 0, [*best, *[i for i in range(4) if i not in best]], 1.0)[rank]
        best.append(left[int(p.argmax())])
    assert greedy.rankings[0].tolist() == best
    sampled = sample_rankings(model, PROMPTS, CANDIDATES, num_generations=3, generator=torch.Generator().manual_seed(0))
    batch = make_batch(PROMPTS, CANDIDATES, sampled.rankings, num_generations=3)
    logprobs = ranking_scores(ranking_states(model, batch), batch).logprobs.detach().float()
    torch.testing.assert_close(torch.from_numpy(sampled.logprobs), logprobs, rtol=1e-4, atol=1e-4)


def test_reasoning_comes_from_the_whole_vocabulary_before_marked_rankings():
    model = make_model()
    options: dict[str, Any] = {"reasoning_end": [7], "max_reasoning_tokens": 3}
    generator = torch.Generator().manual_seed(0)
    found = sample_rankings(model, PROMPTS, CANDIDATES, generator=generator, **options)
    batch = make_batch(PROMPTS, CANDIDATES, found.rankings, reasoning=found.reasoning)
    logprobs = ranking_scores(ranking_states(model, batch), batch).logprobs.detach().float()
    torch.testing.assert_close(torch.from_numpy(found.logprobs), logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_row", [1, 3])
def test_input_rows_are_sums_in_rows_of_several_rankings_too(per_row):
    """Prompt, listed candidates and ranked items, wherever they lie."""
    model = make_model()
    rankings = np.array([[2, 0, 3, 1], [0, 1, 2, 3], [3, 2, 1, 0]])
    batch = make_batch(PROMPTS[:1], CANDIDATES[:1], rankings, num_generations=3, rankings_per_row=per_row)
    scores = ranking_scores(ranking_states(model, batch), batch)
    for n, ranking in enumerate(rankings.tolist()):
        expected = [
            lp[left.index(item)] for item, (left, lp) in zip(ranking, by_hand(model, 0, ranking, 1.0), strict=True)
        ]
        torch.testing.assert_close(scores.logprobs[n], torch.stack(expected))


def test_gradients_flow_into_the_input_rows_of_all_tokens():
    """Tied or not, with gradient checkpointing, and the layer is called as it would be without."""
    model = make_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda layer, args, rows: calls.append(rows.shape))
    batch = make_batch(PROMPTS, CANDIDATES, RANKINGS)
    weight = model.get_input_embeddings().weight
    logprobs = ranking_scores(ranking_states(model, batch), batch).logprobs
    found = torch.autograd.grad(logprobs.sum(), weight)[0]
    by_rank = [
        lp[left.index(item)]
        for row in range(2)
        for item, (left, lp) in zip(ranked(row), by_hand(model, row, ranked(row), 1.0), strict=True)
    ]
    expected = torch.autograd.grad(torch.stack(by_rank).sum(), weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # Llama's norms compute in float32
    assert found[[36, 30, 31, 35]].abs().max(dim=1).values.min() > 0
    assert calls == [(len(batch.tokens.table.ids), 16)]


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_the_rows_of_a_batch_generates_what_we_decode(tied):
    """Greedily by transformers' generate, in plain tokens, with the same log-probs at every rank."""
    model = make_model().float()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.bias = None
        model.lm_head.weight = model.get_input_embeddings().weight
        with torch.no_grad():
            model.lm_head.weight.mul_(30.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, batch = with_summed_rows(model, PROMPTS[:1], CANDIDATES[:1])
    processor = RankingLogitsProcessor(batch.candidates, eos_token_id=0)
    out = plain.generate(
        input_ids=torch.tensor(batch.prompts),
        attention_mask=torch.ones(1, len(batch.prompts[0]), dtype=torch.int64),
        logits_processor=[processor],
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
    )
    ours = sample_rankings(model, PROMPTS[:1], CANDIDATES[:1], greedy=True)
    assert processor.rankings(out.sequences).tolist() == ours.rankings.tolist()
    scores = [scores[0, token] for scores, token in zip(out.scores, out.sequences[0, len(PROMPTS[0]) :], strict=True)]
    torch.testing.assert_close(torch.stack(scores), torch.from_numpy(ours.logprobs[0]), atol=1e-5, rtol=1e-4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the model itself stays as it was"
    assert with_summed_rows(model, [[1, 2]], [[[3], [4]]])[0] is model


def test_engines_of_plain_tokens_refuse_sums():
    with pytest.raises(TypeError, match=r"candidates\[0\]\[0\]\[0\] must be an integer token id, got tuple"):
        RankingLogitsProcessor(CANDIDATES, eos_token_id=0)
    with pytest.raises(TypeError, match="must be an integer token id, got tuple"):
        RankingRequest(CANDIDATES[0], end=[0])


def test_sums_are_for_single_tokens_with_nothing_between():
    several = [[[(10, 30), 11], [12], [13], [14]], CANDIDATES[1]]
    with pytest.raises(ValueError, match=r"every candidate is a single token.*use encoding 'item_token'"):
        make_batch(PROMPTS, several, RANKINGS)
    with pytest.raises(ValueError, match="single token, with nothing between"):
        make_batch(PROMPTS, CANDIDATES, RANKINGS, separator=[9])
    with pytest.raises(ValueError, match="single token, with nothing between"):
        make_batch(PROMPTS, CANDIDATES, RANKINGS, end=[9])
    with pytest.raises(ValueError, match="scored as wholes: leave by_token out"):
        make_batch(PROMPTS, CANDIDATES, RANKINGS, by_token=True)
    with pytest.raises(ValueError, match="single token, with nothing between"):
        sample_rankings(make_model(), PROMPTS, CANDIDATES, separator=[9])
