"""Candidates that are scored where they stand in the prompt: scores, the rankings drawn by them, gradients."""

import copy
from itertools import permutations

import numpy as np
import pytest
import torch

from flexrec.data import simulate
from flexrec.decoding.sample import sample_rankings, search_rankings
from flexrec.policy.batch import make_batch
from flexrec.policy.places import are_places
from flexrec.policy.scores import all_actions, ranking_scores, ranking_states
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.task.labels import Place
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder

SIZES = (7, 3, 5)


@pytest.fixture(scope="module")
def world():
    """A model, and prompts of unequal lengths with lists of unequal sizes."""
    data = simulate(num_users=10, num_items=90, num_topics=4, num_test_users=3, num_candidates=8, seed=0)
    wording = get_need("interest").wordings[0]
    tokenizer = build_tokenizer(data.catalogue, [wording])
    model = build_model(tokenizer, hidden_size=32, num_layers=2).eval()
    with torch.no_grad():  # states that differ from candidate to candidate
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim == 2 else 1.0)
    builder = PromptBuilder(tokenizer, encoding="score")
    lists = [lst.reordered(np.arange(size)) for lst, size in zip(data.test, SIZES, strict=False)]
    prompts = [builder.prompt_of(lst, data.catalogue, wording)[0] for lst in lists]
    candidates = [builder.candidate_tokens_of(lst, data.catalogue) for lst in lists]
    assert len({len(prompt) for prompt in prompts}) == 3
    return model, tokenizer, builder, prompts, candidates


def by_hand(model, prompt, lst):
    """(K,) the scores from the logits of the whole vocabulary, a prompt at a time."""
    logits = model(torch.tensor([prompt])).logits[0]
    return torch.stack([logits[-p.before_end, p.yes] - logits[-p.before_end, p.no] for (p,) in lst])


def test_every_candidate_is_read_at_the_end_of_its_question(world):
    _, tokenizer, builder, prompts, candidates = world
    for prompt, lst in zip(prompts, candidates, strict=True):
        text = tokenizer.decode(prompt)
        assert text.count(" | match?\n") == len(lst)
        assert text.endswith(" | match?\n"), "nothing comes behind the last question"
        for (place,) in lst:
            end = len(prompt) - place.before_end + 1
            assert tokenizer.decode(prompt[:end]).endswith("| match?")
            assert tokenizer.decode(prompt[end:]).startswith("\n")
            assert (place.yes, place.no) == builder._answers
        assert len({place.before_end for (place,) in lst}) == len(lst)
    assert builder.separator == builder.end == ()


def test_scores_are_those_of_the_logits(world):
    model, _, _, prompts, candidates = world
    first = np.where(np.arange(7) < np.array(SIZES)[:, None], np.arange(7), -1)
    batch = make_batch(prompts, candidates, first)
    states = ranking_states(model, batch)
    assert batch.tokens.input_ids.shape == (3, max(map(len, prompts)))
    scores = states.weight.view(3, 7)
    for p, (prompt, lst) in enumerate(zip(prompts, candidates, strict=True)):
        torch.testing.assert_close(scores[p, : len(lst)], by_hand(model, prompt, lst), rtol=1e-4, atol=1e-4)


def test_log_probs_and_objective_are_those_of_plackett_and_luce(world):
    model, _, _, prompts, candidates = world
    rng = np.random.default_rng(0)
    generations, temperature = 2, 1.7
    rankings = np.full((6, 7), -1)
    for n in range(6):
        size = SIZES[n // generations]
        rankings[n, :size] = rng.permutation(size)
    batch = make_batch(prompts, candidates, rankings, num_generations=generations)
    states = ranking_states(model, batch)
    found = ranking_scores(states, batch, temperature=temperature)
    for n in range(6):
        scores = by_hand(model, prompts[n // generations], candidates[n // generations]) / temperature
        left = list(range(len(scores)))
        for rank, item in enumerate(rankings[n][rankings[n] >= 0].tolist()):
            of_left = scores[left].log_softmax(0)
            expected = of_left[left.index(item)]
            torch.testing.assert_close(found.logprobs[n, rank], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.entropy[n, rank], -(of_left.exp() * of_left).sum(), rtol=1e-4, atol=1e-4)
            left.remove(item)
    # The objective's gradient in the model is that of the same objective of the scores by hand.
    gains = torch.rand(6, 7, generator=torch.Generator().manual_seed(1))
    objective = all_actions(states, batch, gains, "ndcg").objective.sum()
    weight = model.model.layers[0].mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(objective, [weight])
    model.zero_grad()
    rows = torch.zeros(3, 7)
    rows = torch.stack(
        [
            torch.nn.functional.pad(by_hand(model, prompt, lst), (0, 7 - len(lst)))
            for prompt, lst in zip(prompts, candidates, strict=True)
        ]
    )
    again = all_actions(states._replace(weight=rows.reshape(-1, 1)), batch, gains, "ndcg").objective.sum()
    torch.testing.assert_close(again, objective, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(again, [weight])[0], gradient, rtol=1e-3, atol=1e-6)
    assert gradient.abs().max() > 1e-6


def test_samples_have_the_probabilities_they_say(world):
    model, _, _, prompts, candidates = world
    draws, temperature = 6000, 0.4
    rollout = sample_rankings(
        model,
        prompts[1:2],
        candidates[1:2],
        num_generations=draws,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    scores = by_hand(model, prompts[1], candidates[1]) / temperature
    assert scores.max() - scores.min() > 1, "a temperature of 1 would show"
    for order in permutations(range(3)):
        left, probability = list(range(3)), 1.0
        for item in order:
            probability *= float(scores[left].softmax(0)[left.index(item)].detach())
            left.remove(item)
        same = (rollout.rankings == order).all(axis=1)
        assert abs(same.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / draws) + 1e-9
        if same.any():
            np.testing.assert_allclose(rollout.logprobs[same].sum(axis=1), np.log(probability), rtol=1e-3, atol=1e-4)
    batch = make_batch(prompts[1:2], candidates[1:2], rollout.rankings, num_generations=draws)
    trained_with = ranking_scores(ranking_states(model, batch), batch, temperature=temperature).logprobs
    np.testing.assert_allclose(trained_with.detach().numpy(), rollout.logprobs, atol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["as it is", "the other way about"])
@pytest.mark.parametrize("num_ranked", [None, 4])
def test_the_greedy_ranking_is_the_order_of_the_scores(world, num_ranked, sign):
    """What is read behind a short list's candidates is above them all with one of the two signs."""
    model, _, _, prompts, candidates = world
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(sign)
    rollout = sample_rankings(model, prompts, candidates, greedy=True, num_ranked=num_ranked, num_generations=2)
    assert rollout.rankings.shape == (6, 7 if num_ranked is None else 4)
    for n, row in enumerate(rollout.rankings):
        scores = by_hand(model, prompts[n // 2], candidates[n // 2]).detach().numpy()
        expected = np.argsort(-scores, kind="stable")[:num_ranked]
        assert row[row >= 0].tolist() == expected.tolist()
        assert not rollout.logprobs[n, row < 0].any()
    assert not model.training


def test_what_does_not_go_together_is_refused(world):
    model, _, _, prompts, candidates = world
    mixed = [[*candidates[0][:2], [5]]]
    with pytest.raises(ValueError, match="every candidate of a batch is one Place"):
        are_places(mixed)
    with pytest.raises(ValueError, match="read outside of its prompt"):
        make_batch([[1, 2, 3]], [[[Place(4, 1, 2)]]], np.zeros((1, 1), dtype=int))
    with pytest.raises(ValueError, match="the same two tokens"):
        make_batch([[1, 2, 3]], [[[Place(1, 1, 2)], [Place(2, 2, 1)]]], np.array([[0, 1]]))
    with pytest.raises(ValueError, match="no reasoning and no top_p"):
        sample_rankings(model, prompts, candidates, top_p=0.5)
    with pytest.raises(ValueError, match="no reasoning and no top_p"):
        sample_rankings(model, prompts, candidates, reasoning_end=[5], max_reasoning_tokens=3)
    with pytest.raises(ValueError, match="greedy ranking is the most probable"):
        search_rankings(model, prompts, candidates, num_beams=2)
    with pytest.raises(ValueError, match="temperature must be positive"):
        sample_rankings(model, prompts, candidates, temperature=0.0)
    with pytest.raises(ValueError, match="no answers and no reasoning"):
        make_batch(prompts, candidates, np.full((3, 7), -1), by_token=True)
