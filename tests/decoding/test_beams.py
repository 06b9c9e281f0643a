"""Beam search against enumeration and against a search without cache, and the best of several samples."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from flexrec.decoding import sample as rollouts
from flexrec.decoding.logits_processor import RankingLogitsProcessor
from flexrec.decoding.rollout import Rollout, best_of
from flexrec.decoding.sample import sample_rankings, search_rankings
from flexrec.policy.batch import make_batch
from flexrec.policy.scores import ranking_scores, ranking_states
from flexrec.rankings import RankingState
from flexrec.rankings.reasoning import ReasoningTokens

VOCAB, EOS = 60, 52
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8]]
SINGLE = [[[10], [11], [12], [13]], [[20], [21], [10]], [[30]]]
TITLES = [[[10, 11], [10, 12, 13], [10, 12], [14]], [[20], [20, 21], [22, 23, 24]], [[30, 31]]]
FORMS = pytest.mark.parametrize(
    ("candidates", "separator", "end"), [(SINGLE, (), ()), (TITLES, (50, 51), (52,)), (SINGLE, (50,), (52,))]
)
SHARES = pytest.mark.parametrize("shared", [True, False])


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=128)
        model: Any = GPT2LMHeadModel(config)
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    with torch.no_grad():  # far from uniform, so that a wrong distribution shows
        model.get_output_embeddings().weight.mul_(8.0)
    return model.eval()


@pytest.fixture
def share_rows(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """All beams of a prompt in its row, or each in a row of its own."""
    monkeypatch.setattr(rollouts, "sharing", lambda *args, num_generations, **kwargs: num_generations if shared else 1)


def scores_of(model: Any, p: int, candidates: Any, rankings: np.ndarray, **spelling: Any) -> np.ndarray:
    """(N, T) log-probs of rankings of one prompt, in rows of their own and without a cache."""
    batch = make_batch([PROMPTS[p]], [candidates[p]], rankings, num_generations=len(rankings), **spelling)
    with torch.no_grad():
        return ranking_scores(ranking_states(model, batch), batch, temperature=0.7).logprobs.numpy()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@FORMS
@SHARES
def test_as_many_beams_as_rankings_find_them_all(kind, candidates, separator, end, shared, share_rows):
    """Four candidates have 24 rankings: 24 beams return each once, the most probable first, with its log-probs."""
    model = model_of(kind)
    spelling = {"separator": separator, "end": end}
    found = search_rankings(model, PROMPTS, candidates, num_beams=24, temperature=0.7, **spelling)
    for p, size in enumerate((4, 3, 1)):
        rows = slice(24 * p, 24 * (p + 1))
        every = np.array(list(itertools.permutations(range(size))))
        exact = scores_of(model, p, candidates, every, **spelling)
        order = np.argsort(-exact.sum(axis=1), kind="stable")
        np.testing.assert_array_equal(found.rankings[rows][: len(every), :size], every[order])
        np.testing.assert_allclose(found.logprobs[rows][: len(every), :size], exact[order], atol=2e-5)
        assert (found.rankings[rows][len(every) :] == -1).all(), "no more rankings than there are"
        assert np.isneginf(found.logprobs[rows][len(every) :]).all()


@FORMS
@SHARES
def test_one_beam_is_greedy_search(candidates, separator, end, shared, share_rows):
    model = model_of("llama")
    spelling = {"separator": separator, "end": end, "temperature": 0.7}
    beam = search_rankings(model, PROMPTS, candidates, num_beams=1, **spelling)
    greedy = sample_rankings(model, PROMPTS, candidates, greedy=True, **spelling)
    np.testing.assert_array_equal(beam.rankings, greedy.rankings)
    np.testing.assert_allclose(beam.logprobs, greedy.logprobs, atol=1e-6)


def plain_search(model: Any, p: int, candidates: Any, num_beams: int, **spelling: Any) -> list[tuple[float, list[int]]]:
    """Beam search token by token over whole sequences: (log-prob, tokens), best first."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]

    def look(tokens: list[int]) -> tuple[list[int], int]:
        state = RankingState([candidates[p]], **spelling)
        state.advance(tokens, [0, len(tokens)])
        state.advance(*state.forced())
        return state.allowed()[0].tolist(), int((state.rankings() >= 0).sum())

    def settle(tokens: list[int]) -> list[int]:
        state = RankingState([candidates[p]], **spelling)
        state.advance(tokens, [0, len(tokens)])
        return tokens + state.forced()[0].tolist()

    beams = [(0.0, settle([]))]
    while any(look(tokens)[0] for _, tokens in beams):
        fewest = min(ranked for allowed, ranked in (look(tokens) for _, tokens in beams) if allowed)
        grown = []
        for total, tokens in beams:
            allowed, ranked = look(tokens)
            if not allowed or ranked > fewest:
                grown.append((total, tokens))
                continue
            with torch.no_grad():
                logits = model(torch.tensor([PROMPTS[p] + tokens])).logits[0, -1]
            logprobs = (logits[allowed] / 0.7).log_softmax(0).tolist()
            grown += [(total + lp, settle([*tokens, t])) for t, lp in zip(allowed, logprobs, strict=True)]
        beams = sorted(grown, key=lambda beam: -beam[0])[:num_beams]
    return beams


@FORMS
@pytest.mark.parametrize("num_beams", [2, 3])
@SHARES
def test_few_beams_keep_what_a_plain_search_keeps(candidates, separator, end, num_beams, shared, share_rows):
    model = model_of("llama")
    spelling = {"separator": separator, "end": end}
    found = search_rankings(model, PROMPTS, candidates, num_beams=num_beams, temperature=0.7, **spelling)
    for p, size in enumerate((4, 3, 1)):
        rows = slice(num_beams * p, num_beams * (p + 1))
        expected = plain_search(model, p, candidates, num_beams, **spelling)
        totals = found.logprobs[rows].sum(axis=1)
        np.testing.assert_allclose(totals[: len(expected)], [total for total, _ in expected], atol=5e-5)
        ranked = found.rankings[rows][: len(expected), :size]
        np.testing.assert_allclose(
            scores_of(model, p, candidates, ranked, **spelling), found.logprobs[rows][: len(expected), :size], atol=5e-5
        )


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beams_are_those_of_generate_where_items_are_tokens(num_beams):
    model = model_of("llama")
    lists = [[[k] for k in range(20 + 8 * p, 26 + 8 * p)] for p in range(3)]
    processor = RankingLogitsProcessor(lists, end=[EOS], num_beams=num_beams)
    width = max(map(len, PROMPTS))
    out = model.generate(
        input_ids=torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS]),
        attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]),
        logits_processor=LogitsProcessorList([processor]),
        max_new_tokens=processor.max_new_tokens,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        length_penalty=0.0,
    )
    found = search_rankings(model, PROMPTS, lists, num_beams=num_beams, end=[EOS])
    np.testing.assert_array_equal(found.rankings, processor.rankings(out))


def test_the_first_ranks_only():
    """Rankings of the first two of four: there are 12, and of the first two of three 6."""
    model = model_of("qwen2")
    found = search_rankings(model, PROMPTS[:2], SINGLE[:2], num_beams=12, num_ranked=2, temperature=0.7)
    assert found.rankings.shape == (24, 2)
    assert sorted(map(tuple, found.rankings[:12].tolist())) == list(itertools.permutations(range(4), 2))
    assert sorted(map(tuple, found.rankings[12:18].tolist())) == list(itertools.permutations(range(3), 2))
    assert (found.rankings[18:] == -1).all()


def test_beams_find_better_rankings_than_greedy_search():
    model = model_of("llama")
    lists = [[[k] for k in range(10, 30)]] * 3
    greedy = sample_rankings(model, PROMPTS, lists, greedy=True).logprobs.sum(axis=1)
    beams = search_rankings(model, PROMPTS, lists, num_beams=8).logprobs.sum(axis=1)[::8]
    assert (beams >= greedy - 1e-4).all()
    assert (beams > greedy + 1e-2).any()


def test_mistakes_of_a_search():
    model = model_of("llama").train()
    with pytest.raises(ValueError, match="num_beams must be at least 1, got 0"):
        search_rankings(model, PROMPTS, SINGLE, num_beams=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        search_rankings(model, PROMPTS, SINGLE, num_beams=2, temperature=0.0)
    search_rankings(model, PROMPTS, SINGLE, num_beams=2)
    assert model.training, "the mode is restored"


# ------------------------------------------------------------------------------------------------------- best of n


def test_best_of_takes_the_most_probable_or_the_best_scored():
    rankings = np.array([[0, 1], [1, 0], [1, 0], [0, 1]])
    logprobs = np.log(np.array([[0.3, 1.0], [0.7, 1.0], [0.4, 1.0], [0.6, 1.0]], dtype=np.float32))
    rollout = Rollout(rankings, logprobs)
    best = best_of(rollout, 2)
    np.testing.assert_array_equal(best.rankings, [[1, 0], [0, 1]])
    np.testing.assert_array_equal(best.logprobs, logprobs[[1, 3]])
    assert best.reasoning is None
    np.testing.assert_array_equal(best_of(rollout, 2, [5.0, 1.0, 0.0, 0.0]).rankings, rankings[[0, 2]])
    assert best_of(rollout, 1).rankings.tolist() == rankings.tolist()

    said = ReasoningTokens([np.array([n, 9]) for n in range(4)], np.array([1, 1, 1, 1]), (2,))
    reasoned = best_of(Rollout(rankings, logprobs, said, np.log([[0.9], [0.1], [0.9], [0.1]])), 2)
    np.testing.assert_array_equal(reasoned.rankings, rankings[[0, 2]])
    assert reasoned.reasoning is not None
    assert [row.tolist() for row in reasoned.reasoning.tokens] == [[0, 9], [2, 9]]
    np.testing.assert_allclose(reasoned.reasoning_logprobs, np.log([[0.9], [0.9]]))


def test_more_samples_come_closer_to_the_mode():
    model = model_of("llama")
    mode = search_rankings(model, PROMPTS[:1], SINGLE[:1], num_beams=24)
    generator = torch.Generator().manual_seed(0)
    rollout = sample_rankings(model, PROMPTS[:1], SINGLE[:1], num_generations=400, generator=generator)
    first = [Rollout(rollout.rankings[:n], rollout.logprobs[:n]) for n in (1, 4, 400)]
    totals = [best_of(some, len(some.rankings)).logprobs.sum() for some in first]
    assert totals[0] < totals[1] <= totals[2]
    assert totals[2] == pytest.approx(mode.logprobs[0].sum(), abs=1e-5)


@pytest.mark.parametrize(
    ("generations", "scores", "message"),
    [
        (3, None, "num_generations must divide the 4 rankings, got 3"),
        (2, [1.0, 2.0], r"scores must have shape \(4,\), one per ranking, got \(2,\)"),
        (2, [1.0, np.nan, 0.0, 0.0], "got NaN at index 1"),
    ],
)
def test_mistakes_of_best_of(generations, scores, message):
    rollout = Rollout(np.zeros((4, 1), dtype=np.int32), np.zeros((4, 1), dtype=np.float32))
    with pytest.raises(ValueError, match=message):
        best_of(rollout, generations, scores)
