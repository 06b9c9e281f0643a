"""Constrained sampling against a step-by-step computation with whole, unpadded, uncached sequences."""

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from flexrec.decoding import sample as rollouts
from flexrec.decoding.sample import sample_rankings, search_rankings
from flexrec.policy.batch import make_batch
from flexrec.policy.scores import ranking_scores, ranking_states
from flexrec.rankings import RankingState

VOCAB = 60
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=128))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    with torch.no_grad():  # far from uniform, so that a wrong distribution shows
        model.get_output_embeddings().weight.mul_(8.0)
        if kind == "biased":
            model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB))
    return model.eval()


PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8]]
SINGLE = [[[10], [11], [12], [13]], [[20], [21], [10]], [[30]]]
TITLES = [
    [[10, 11], [10, 12, 13], [10, 12], [14]],
    [[20], [20, 21], [22, 23, 24]],
    [[30, 31]],
]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "biased"])
@pytest.mark.parametrize(
    ("candidates", "separator", "end"), [(SINGLE, (), ()), (TITLES, (50, 51), (52,)), (SINGLE, (50,), ())]
)
@pytest.mark.parametrize(("greedy", "share"), [(False, 1), (False, 2), (False, 4), (True, 4)])
def test_sampled_logprobs_equal_uncached_scores(monkeypatch, kind, candidates, separator, end, greedy, share):
    """Padded prompts, a shared or expanded cache and ragged forced runs change nothing about the distribution."""
    monkeypatch.setattr(rollouts, "sharing", lambda *args, **kwargs: share)
    model = make_model(kind)
    generations = 4
    rollout = sample_rankings(
        model,
        PROMPTS,
        candidates,
        separator=separator,
        end=end,
        num_generations=generations,
        greedy=greedy,
        temperature=0.7,
        generator=torch.Generator().manual_seed(1),
    )
    for n, ranking in enumerate(rollout.rankings):
        p = n // generations
        assert sorted(ranking[ranking >= 0]) == list(range(len(candidates[p])))
        batch = make_batch(
            [PROMPTS[p]], [candidates[p]], ranking[None, : len(candidates[p])], separator=separator, end=end
        )
        with torch.no_grad():
            scores = ranking_scores(ranking_states(model, batch), batch, temperature=0.7)
        expected = np.zeros(rollout.logprobs.shape[1])
        expected[: len(candidates[p])] = scores.logprobs[0].numpy()
        np.testing.assert_allclose(rollout.logprobs[n], expected, atol=2e-5)


@pytest.mark.parametrize("share", [1, 4])
def test_unmoved_policy_has_ratio_one_in_a_padded_batch(monkeypatch, share):
    """The whole ragged batch, scored as training does it, gives the log-probs that were sampled with."""
    monkeypatch.setattr(rollouts, "sharing", lambda *args, **kwargs: share)
    model = make_model("llama")
    for candidates, separator, end in [(SINGLE, (), ()), (TITLES, (50, 51), (52,))]:
        rollout = sample_rankings(model, PROMPTS, candidates, separator=separator, end=end, num_generations=4)
        batch = make_batch(
            PROMPTS,
            candidates,
            rollout.rankings,
            separator=separator,
            end=end,
            num_generations=4,
            rankings_per_row=share,
        )
        with torch.no_grad():
            scores = ranking_scores(ranking_states(model, batch), batch)
        ratio = torch.exp(scores.logprobs - torch.as_tensor(rollout.logprobs))
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)


def test_sampling_follows_the_restricted_distribution():
    """Frequencies of first items over many rollouts of one prompt, against the exact restricted softmax."""
    model = make_model("llama")
    rollout = sample_rankings(
        model, PROMPTS[:1], SINGLE[:1], num_generations=4000, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        logits = model(torch.tensor(PROMPTS[:1])).logits[0, -1, [10, 11, 12, 13]]
    expected = logits.softmax(0).numpy()
    found = np.bincount(rollout.rankings[:, 0], minlength=4) / 4000
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 4000))


def test_greedy_takes_the_best_allowed_token_at_each_step():
    model = make_model("qwen2")
    rollout = sample_rankings(model, PROMPTS[:1], TITLES[:1], separator=(50,), end=(52,), greedy=True)
    state = RankingState(TITLES[:1], separator=(50,), end=(52,))
    tokens: list[int] = []
    while not state.done()[0]:
        ids, _ = state.allowed()
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[0] + tokens])).logits[0, -1]
        token = int(ids[logits[torch.as_tensor(ids, dtype=torch.int64)].argmax()])
        tokens.append(token)
        state.advance(np.array([token], dtype=np.int32))
    np.testing.assert_array_equal(rollout.rankings, state.rankings())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_and_their_masks(monkeypatch, attention):
    """Decoding in a shared row equals decoding in rows of one's own, whatever form the mask takes."""
    model = make_model("llama")
    model.config._attn_implementation = attention
    found = []
    for share in (1, 2, 4):
        monkeypatch.setattr(rollouts, "sharing", lambda *args, share=share, **kwargs: share)
        generator = torch.Generator().manual_seed(3)
        options = {"separator": (50, 51), "end": (52,), "num_generations": 4, "generator": generator}
        found.append(sample_rankings(model, PROMPTS, TITLES, **options))
    for other in found[1:]:
        np.testing.assert_array_equal(other.rankings, found[0].rankings)
        np.testing.assert_allclose(other.logprobs, found[0].logprobs, atol=2e-5)


def test_top_p_keeps_the_most_probable_allowed_items():
    """The first item is one of the few most probable that reach the nucleus together, in proportion."""
    model = make_model("llama")
    with torch.no_grad():
        logits = model(torch.tensor(PROMPTS[:1])).logits[0, -1, [10, 11, 12, 13]]
    probs, order = logits.softmax(0).sort(descending=True)
    top_p = float(probs[:2].sum() - 0.3 * probs[1])  # the second is needed, and is more than is needed
    assert top_p < 0.9
    expected = torch.zeros(4).index_put((order[:2],), probs[:2] / probs[:2].sum())
    rollout = sample_rankings(
        model, PROMPTS[:1], SINGLE[:1], num_generations=2000, top_p=top_p, generator=torch.Generator().manual_seed(0)
    )
    found = np.bincount(rollout.rankings[:, 0], minlength=4) / 2000
    np.testing.assert_allclose(found, expected.numpy(), atol=4 * np.sqrt(0.25 / 2000))
    assert (found > 0).tolist() == (expected > 0).tolist()
    with pytest.raises(ValueError, match="top_p must lie in"):
        sample_rankings(model, PROMPTS[:1], SINGLE[:1], top_p=0.0)


def test_the_generator_is_all_there_is_of_chance():
    """The same seed gives the same rankings whatever torch's own generator has drawn, and another seed others."""
    model, found = make_model("llama"), []
    for seed, elsewhere in ((1, 2), (1, 3), (2, 2)):
        torch.manual_seed(elsewhere)
        generator = torch.Generator().manual_seed(seed)
        rollout = sample_rankings(model, PROMPTS[:2], SINGLE[:2], num_generations=8, generator=generator)
        found.append(rollout.rankings.tolist())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("num_ranked", [2, 3, 9])
def test_num_ranked_stops_early(num_ranked):
    """Lists that have fewer candidates are ranked whole."""
    model = make_model("llama")
    rollout = sample_rankings(model, PROMPTS[:2], SINGLE[:2], num_ranked=num_ranked, num_generations=2)
    sizes = [min(num_ranked, 4)] * 2 + [min(num_ranked, 3)] * 2
    assert rollout.rankings.shape == (4, sizes[0])
    assert (rollout.rankings >= 0).sum(axis=1).tolist() == sizes


@pytest.mark.parametrize(("num_ranked", "steps"), [(None, 2), (3, 2), (2, 1), (1, 0)])
def test_the_model_is_not_asked_for_what_is_certain(monkeypatch, num_ranked, steps):
    """Of four, the first is drawn behind the prompt and the last is what is left: two steps. Fewer ranks take fewer."""
    extend, fed = rollouts.SharedDecoder.extend, []

    def counted(self, runs, *others):
        fed.append(runs.counts.tolist())
        extend(self, runs, *others)

    monkeypatch.setattr(rollouts.SharedDecoder, "extend", counted)
    rollout = sample_rankings(make_model("llama"), PROMPTS[:1], SINGLE[:1], num_generations=3, num_ranked=num_ranked)
    assert fed == [[1, 1, 1]] * steps
    assert (rollout.rankings >= 0).all()
    if num_ranked is None:
        assert (rollout.logprobs[:, -1] == 0).all()


def test_the_decoder_is_told_how_many_share_a_row(monkeypatch):
    """Every option that decides on it arrives. Flex attention would compile a mask for every step: it shares none."""
    asked, made = [], []

    class Made(Exception):
        pass

    def make(*arguments):
        made.append(arguments[2:])
        raise Made

    monkeypatch.setattr(rollouts, "sharing", lambda *args, **kwargs: asked.append((args, kwargs)) or 2)
    monkeypatch.setattr(rollouts, "SharedDecoder", make)
    model = make_model("llama")
    spelling = {"separator": (50, 51), "end": (52,), "num_ranked": 3, "pad_token_id": 7}
    reasoning = {"reasoning_end": [40, 41], "max_reasoning_tokens": 20}
    with pytest.raises(Made):
        sample_rankings(model, PROMPTS, TITLES, num_generations=4, **spelling, **reasoning)
    with pytest.raises(Made):
        search_rankings(model, PROMPTS, TITLES, num_beams=6, **spelling)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(Made):
        sample_rankings(model, PROMPTS, TITLES, num_generations=4, **spelling)
    options = {"separator": (50, 51), "num_ranked": 3, "decoding": True}
    assert asked == [
        ((model, PROMPTS, TITLES), options | {"num_generations": 4, "reasoning_length": 22}),
        ((model, PROMPTS, TITLES), options | {"num_generations": 6, "reasoning_length": 0}),
    ]
    assert made == [(4, 2, 7), (6, 6, 7), (4, 1, 7)]  # beams share all or none


def test_windows_that_padding_would_shift_are_refused():
    """Rows without padding are decoded in windows as they are scored; with padding they would see too little."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6)).eval()
    prompts, candidates = [PROMPTS[0], PROMPTS[0][::-1]], [SINGLE[0], SINGLE[0]]
    rollout = sample_rankings(model, prompts, candidates, num_generations=2)
    batch = make_batch(prompts, candidates, rollout.rankings, num_generations=2)
    with torch.no_grad():
        scores = ranking_scores(ranking_states(model, batch), batch)
    np.testing.assert_allclose(rollout.logprobs, scores.logprobs, atol=1e-5)
    with pytest.raises(ValueError, match=r"no more than 6 tokens back, .* one at a time, or all together by generate"):
        sample_rankings(model, PROMPTS, TITLES, separator=(50, 51), end=(52,))
    one = sample_rankings(model, PROMPTS[:1], TITLES[:1], separator=(50, 51), end=(52,))
    batch = make_batch(PROMPTS[:1], TITLES[:1], one.rankings, separator=(50, 51), end=(52,))
    with torch.no_grad():
        scores = ranking_scores(ranking_states(model, batch), batch)
    np.testing.assert_allclose(one.logprobs, scores.logprobs, atol=1e-5)


def test_training_mode_is_restored_and_errors_are_clear():
    model = make_model("gpt2").train()  # with dropout
    rollout = sample_rankings(model, PROMPTS[:1], SINGLE[:1])
    assert model.training
    batch = make_batch(PROMPTS[:1], SINGLE[:1], rollout.rankings)
    with torch.no_grad():
        scores = ranking_scores(ranking_states(model.eval(), batch), batch)
    np.testing.assert_allclose(rollout.logprobs, scores.logprobs, atol=1e-5)
    with pytest.raises(ValueError, match="temperature must be positive"):
        sample_rankings(model, PROMPTS[:1], SINGLE[:1], temperature=0.0)
    with pytest.raises(ValueError, match="3 prompts and 1 lists"):
        sample_rankings(model, PROMPTS, SINGLE[:1])
    with pytest.raises(ValueError, match="at least one token"):
        sample_rankings(model, [[]], SINGLE[:1])
