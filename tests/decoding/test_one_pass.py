"""Rankings by the first decision alone: its probabilities, the rankings drawn from them, and training by them."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from flexrec.data import simulate
from flexrec.decoding.one_pass import first_choices
from flexrec.decoding.sample import sample_rankings
from flexrec.policy.batch import make_batch
from flexrec.policy.scores import all_actions, ranking_scores, ranking_states
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder

SIZES = (7, 3, 5)
ENCODINGS = {"label": {}, "item_token": {}, "described": {"encoding": "item_token", "described": True}}


def world_of(name):
    """A model, a builder, and prompts of unequal lengths with lists of unequal sizes."""
    data = simulate(num_users=10, num_items=90, num_topics=4, num_test_users=3, num_candidates=8, seed=0)
    wording = get_need("interest").wordings[0]
    tokenizer = build_tokenizer(data.catalogue, [wording])
    model = build_model(tokenizer, hidden_size=32, num_layers=2).eval()
    with torch.no_grad():  # distributions that are not flat
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    builder = PromptBuilder(tokenizer, **{"encoding": name, "show_titles": True} | ENCODINGS.get(name, {}))
    lists = [lst.reordered(np.arange(size)) for lst, size in zip(data.test, SIZES, strict=False)]
    prompts = [builder.prompt_of(lst, data.catalogue, wording)[0] for lst in lists]
    return model, builder, prompts, [builder.candidate_tokens_of(lst, data.catalogue) for lst in lists]


@pytest.fixture(scope="module", params=ENCODINGS)
def world(request):
    return world_of(request.param)


def decoded(model, builder, prompts, candidates):
    """P arrays (K,) probabilities of each candidate at the first rank of a decoded ranking, by scoring one of each."""
    found = []
    for prompt, lst in zip(prompts, candidates, strict=True):
        size = len(lst)
        orders = np.array([np.roll(np.arange(size), -k) for k in range(size)])
        batch = make_batch([prompt], [lst], orders, separator=builder.separator, end=builder.end, num_generations=size)
        logprobs = ranking_scores(ranking_states(model, batch), batch, temperature=0.7).logprobs
        found.append(logprobs[:, 0].exp().detach().numpy())
    return found


@pytest.mark.parametrize("name", [*ENCODINGS, "index", "title"])
def test_first_choices_are_those_of_decoding(name):
    """Spelled by one token or by several, a list alone or among longer ones."""
    model, builder, prompts, candidates = world_of(name)
    spelled = {"separator": builder.separator, "end": builder.end}
    probs = first_choices(model, prompts, candidates, temperature=0.7, **spelled)
    for got, expected in zip(probs, decoded(model, builder, prompts, candidates), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-6)
        assert got.sum() == pytest.approx(1, abs=1e-5)
        assert got.max() > 1.5 * got.min(), "a flat distribution shows nothing"
    rollout = sample_rankings(model, prompts, candidates, greedy=True, one_pass=True, **spelled)
    for row, of_list in zip(rollout.rankings, probs, strict=True):
        assert row[row >= 0].tolist() == np.argsort(-of_list, kind="stable").tolist()


@pytest.mark.parametrize("end", [(), (9,)])
def test_a_candidate_that_begins_another_is_followed_by_the_separator_not_the_end(end):
    """As where [1] and [1, 0] are numbers: the answer goes on, and so does what is weighed against another digit."""
    model, _, prompts, _ = world_of("index")
    spelled = {"separator": (12,), "end": end}
    candidates = [[[20], [20, 21], [22], [20, 21, 23]], [[24, 20], [24]], [[20, 20], [20], [21]]]
    found = first_choices(model, prompts, candidates, temperature=0.7, **spelled)
    for prompt, lst, probs in zip(prompts, candidates, found, strict=True):
        orders = np.array(list(permutations(range(len(lst)))))
        batch = make_batch([prompt], [lst], orders, num_generations=len(orders), **spelled)
        logprobs = ranking_scores(ranking_states(model, batch), batch, temperature=0.7).logprobs
        expected = np.bincount(orders[:, 0], weights=logprobs.sum(1).exp().detach().numpy())
        np.testing.assert_allclose(probs, expected, atol=1e-4)


def test_where_one_item_is_ranked_the_end_follows_it():
    model, _, prompts, _ = world_of("index")
    candidates, spelled = [[[20], [20, 21], [22]]] * len(prompts), {"separator": (12,), "end": (9,)}
    found = sample_rankings(model, prompts, candidates, num_ranked=1, one_pass=True, **spelled)
    batch = make_batch(prompts, candidates, found.rankings, **spelled)
    logprobs = ranking_scores(ranking_states(model, batch), batch).logprobs.detach().numpy()
    np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-4)


def test_scores_are_the_logits_behind_the_prompt(world):
    model, _, prompts, candidates = world
    torch.manual_seed(0)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape[0]))
    try:
        everything = np.where(np.arange(7) < np.array(SIZES)[:, None], np.arange(7), -1)
        batch = make_batch(prompts, candidates, everything, one_pass=True)
        assert batch.tokens.input_ids.shape == (3, max(map(len, prompts))), "no answer is spelled"
        scores = ranking_states(model, batch).weight.view(3, 7)
        plain = decoded_logits(model, prompts, candidates)
        for p, expected in enumerate(plain):
            torch.testing.assert_close(scores[p, : len(expected)], expected, rtol=1e-3, atol=1e-4)
    finally:
        model.lm_head.bias = None


def decoded_logits(model, prompts, candidates):
    """P tensors (K,), from the state behind each prompt and the sums of the candidates' output rows."""
    found = []
    for prompt, lst in zip(prompts, candidates, strict=True):
        batch = make_batch([prompt], [lst], np.zeros((1, 1), dtype=np.int64))
        hidden = ranking_states(model, batch).hidden[0, 0]
        rows = [list(token) if isinstance(token, tuple) else [token] for (token,) in lst]
        weight, bias = model.lm_head.weight, model.lm_head.bias
        found.append(torch.stack([(weight[row] @ hidden + bias[row]).sum() for row in rows]))
    return found


def test_samples_have_the_probabilities_they_say(world):
    model, _, prompts, candidates = world
    draws, temperature = 6000, 0.7
    arguments = (model, prompts[1:2], candidates[1:2])
    (first,) = first_choices(*arguments, temperature=temperature)
    rollout = sample_rankings(
        *arguments,
        num_generations=draws,
        temperature=temperature,
        one_pass=True,
        generator=torch.Generator().manual_seed(0),
    )
    for order in permutations(range(3)):
        left, probability = list(range(3)), 1.0
        for item in order:
            probability *= first[item] / first[left].sum()
            left.remove(item)
        same = (rollout.rankings == order).all(axis=1)
        assert abs(same.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / draws) + 1e-9
        if same.any():
            np.testing.assert_allclose(rollout.logprobs[same].sum(axis=1), np.log(probability), rtol=1e-3, atol=1e-4)
    batch = make_batch(prompts[1:2], candidates[1:2], rollout.rankings, num_generations=draws, one_pass=True)
    trained_with = ranking_scores(ranking_states(model, batch), batch, temperature=temperature).logprobs
    np.testing.assert_allclose(trained_with.detach().numpy(), rollout.logprobs, atol=1e-5)


def test_the_gradient_is_that_of_plackett_and_luce_of_the_first_logits(world):
    model, _, prompts, candidates = world
    rankings = np.full((6, 7), -1)
    for n in range(6):
        rankings[n, : SIZES[n // 2]] = np.random.default_rng(n).permutation(SIZES[n // 2])
    gains = torch.rand(6, 7, generator=torch.Generator().manual_seed(1))
    batch = make_batch(prompts, candidates, rankings, num_generations=2, one_pass=True)
    states = ranking_states(model, batch)
    weight = model.model.layers[0].mlp.up_proj.weight
    logprobs = ranking_scores(states, batch).logprobs
    objective = all_actions(states, batch, gains, "ndcg").objective.sum() + logprobs.sum()
    (gradient,) = torch.autograd.grad(objective, [weight])

    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.weight.shape[0]))
    try:
        padded = [torch.nn.functional.pad(row, (0, 7 - len(row))) for row in decoded_logits(model, prompts, candidates)]
    finally:
        model.lm_head.bias = None
    by_hand = states._replace(weight=torch.stack(padded).reshape(-1, 1))
    again = all_actions(by_hand, batch, gains, "ndcg").objective.sum()
    again = again + ranking_scores(by_hand, batch).logprobs.sum()
    torch.testing.assert_close(again, objective, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(again, [weight])[0], gradient, rtol=2e-3, atol=1e-5)
    assert gradient.abs().max() > 1e-6


def test_what_one_pass_cannot_do_is_said():
    model, builder, prompts, candidates = world_of("index")
    rankings = np.zeros((3, 1), dtype=np.int64)
    with pytest.raises(ValueError, match="candidates of one token each: use encoding 'label'"):
        make_batch(prompts, candidates, rankings, separator=builder.separator, end=builder.end, one_pass=True)
    with pytest.raises(ValueError, match="take no reasoning and no top_p"):
        sample_rankings(model, prompts, candidates, one_pass=True, top_p=0.9)
    with pytest.raises(ValueError, match="got 2 prompts and 3 lists"):
        first_choices(model, prompts[:2], candidates)
    with pytest.raises(ValueError, match="temperature must be positive"):
        first_choices(model, prompts, candidates, temperature=0.0)
