"""Reasoning before the ranking: one rule for rollout, generate and training, and a gradient that is the true one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from flexrec.decoding import sample as rollouts
from flexrec.decoding.logits_processor import RankingLogitsProcessor
from flexrec.decoding.sample import Rollout, sample_rankings
from flexrec.ops.losses import policy_loss
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.policy.batch import make_batch
from flexrec.policy.scores import ranking_scores, ranking_states, reasoning_logprobs
from flexrec.rankings.reasoning import ReasoningRule, ReasoningTokens, never_tokens, reasoning_rule

VOCAB, EOS, SEPARATOR = 60, 52, 50
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 1]]
SINGLE = [[[10], [11], [12], [13]], [[20], [21], [10]], [[30]]]
TITLES = [[[10, 11], [10, 12, 13], [10, 12], [14]], [[20], [20, 21], [22, 23, 24]], [[30, 31]]]
FORMS = pytest.mark.parametrize(
    ("candidates", "separator", "end"), [(SINGLE, (), ()), (TITLES, (SEPARATOR,), (EOS,))], ids=["tokens", "titles"]
)


def model_of(vocab: int = VOCAB, eos: int | list[int] = EOS, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=eos,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():  # far from uniform, so that a wrong distribution shows
        model.get_output_embeddings().weight.mul_(8.0)
    return model.eval()


def favour(model: Any, **favoured: float) -> Any:
    """The model with these tokens' logits raised: ``t7=3.0`` adds 3 to that of token 7."""
    bias = torch.zeros(model.config.vocab_size, dtype=model.dtype)
    for name, amount in favoured.items():
        bias[int(name[1:])] = amount
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def completed(row: list[int], marker: list[int]) -> list[int]:
    """``row`` with the least that makes it end with the marker."""
    for size in range(len(marker), -1, -1):
        if size == 0 or row[-size:] == marker[:size]:
            return row + marker[size:]
    raise AssertionError


# --------------------------------------------------------------------------------------------------------- the rule


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4), st.data())
def test_where_the_marker_is(rows, data):
    marker = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    width = data.draw(st.integers(0, 6))
    tokens = np.array(rows)[:, :width]
    rule = ReasoningRule(tuple(marker), 10, ())
    for row, length, matched in zip(tokens.tolist(), rule.lengths(tokens), rule.matched(tokens), strict=True):
        ends = [end for end in range(len(marker), width + 1) if row[end - len(marker) : end] == marker]
        assert length == (ends[0] if ends else -1)
        assert row + marker[matched:] == completed(row, marker)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([5], None, ()), ValueError, r"reasoning_end=\[5\] needs max_reasoning_tokens"),
        ((None, 5, ()), ValueError, "max_reasoning_tokens=5 needs reasoning_end"),
        (([], 5, ()), ValueError, "reasoning_end must hold at least one token id"),
        (([3, -1], 5, ()), ValueError, "none negative, got"),
        (([5], -1, ()), ValueError, "max_reasoning_tokens must be at least 0, got -1"),
        (([5], 2.0, ()), TypeError, "max_reasoning_tokens must be an int, got float"),
        (([5, 2], 4, (2,)), ValueError, r"\[5, 2\] holds token 2, which ends a sequence or is not of the tokenizer"),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        reasoning_rule(*arguments)


def test_the_tokens_that_end_a_sequence():
    assert never_tokens(model_of()) == (EOS,)
    several = model_of(eos=[EOS, 3])
    assert never_tokens(several) == (3, EOS)
    several.generation_config.eos_token_id = 7
    several.config.eos_token_id = 1000  # beyond the vocabulary
    assert never_tokens(several) == (7,)


PADDED = 16  # of the embedding's entries no tokenizer has


def test_what_lies_beyond_the_tokenizer_never_comes():
    """Embeddings are padded to round numbers, with rows that mean nothing and may be probable."""
    size = VOCAB + PADDED
    model = favour(model_of(vocab=size), **{f"t{token}": 9.0 for token in range(VOCAB, size)})
    assert never_tokens(model, VOCAB) == (EOS, *range(VOCAB, size))
    common = {"num_generations": 8, "reasoning_end": [7], "max_reasoning_tokens": 12, "temperature": 1.0}
    for more in ({}, {"top_p": 0.8}, {"greedy": True}):
        generator = torch.Generator().manual_seed(0)
        told = sample_rankings(model, PROMPTS, SINGLE, num_tokens=VOCAB, generator=generator, **common, **more)
        assert max(max(row) for row in told.reasoning.tokens) < VOCAB
        untold = sample_rankings(model, PROMPTS, SINGLE, generator=generator, **common, **more)
        assert max(max(row) for row in untold.reasoning.tokens) >= VOCAB, "the test would not see it"
    batch = make_batch(PROMPTS, SINGLE, told.rankings, num_generations=8, reasoning=told.reasoning)
    scored = reasoning_logprobs(ranking_states(model, batch), batch)
    np.testing.assert_allclose(scored.detach().numpy(), told.reasoning_logprobs, rtol=1e-3, atol=1e-4)
    for wrong in (0, size + 1):
        with pytest.raises(ValueError, match=f"the tokenizer's size, from 1 to the model's {size}, got {wrong}"):
            never_tokens(model, wrong)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 5}, {"do_sample": False, "num_beams": 3}])
def test_the_processor_keeps_to_the_tokenizer(options):
    model = favour(model_of(vocab=VOCAB + PADDED), **{f"t{token}": 9.0 for token in range(VOCAB, VOCAB + PADDED)})
    torch.manual_seed(0)
    processor = RankingLogitsProcessor(
        SINGLE[:1],
        end=[EOS],
        reasoning_end=[7],
        max_reasoning_tokens=12,
        num_tokens=VOCAB,
        num_beams=options.get("num_beams", 1),
    )
    sequences = model.generate(
        torch.tensor(PROMPTS[:1]),
        logits_processor=[processor],
        max_new_tokens=processor.max_new_tokens,
        **{"do_sample": True, "num_return_sequences": 1, **options},
    )
    assert sequences.max() < VOCAB
    assert len(processor.reasoning(sequences).tokens[0]) > 1


# -------------------------------------------------------------------------------------------------------- our rollout


@FORMS
@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("marker", [[7], [7, 7, 8]])
def test_reasoning_ends_with_its_first_marker_and_never_with_the_sequence(
    monkeypatch, candidates, separator, end, share, marker
):
    monkeypatch.setattr(rollouts, "sharing", lambda *args, **kwargs: share)
    model = favour(model_of(), t7=9.0, t8=8.0, t52=9.0)  # above all it wants to stop
    rollout = sample_rankings(
        model,
        PROMPTS,
        candidates,
        separator=separator,
        end=end,
        num_generations=4,
        reasoning_end=marker,
        max_reasoning_tokens=6,
        temperature=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    said = rollout.reasoning
    for row, num_sampled in zip(said.tokens, said.num_sampled, strict=True):
        tokens = row.tolist()
        assert ReasoningRule(tuple(marker), 6, ()).lengths(row[None])[0] == len(tokens), "it is the first marker"
        assert EOS not in tokens
        assert num_sampled == min(len(tokens), 6)
        assert tokens == completed(tokens[:num_sampled], marker), "no more is forced than is missing"
    assert any(said.num_sampled < said.lengths), "some rows spent their budget"
    assert any(said.num_sampled == said.lengths), "some rows stopped by themselves"
    np.testing.assert_array_equal(
        rollout.reasoning_logprobs < 0, np.arange(said.num_sampled.max()) < said.num_sampled[:, None]
    )
    for n, row in enumerate(said.tokens):  # what follows is what follows a prompt that ends with it
        p = n // 4
        alone = make_batch(
            [PROMPTS[p] + row.tolist()],
            [candidates[p]],
            rollout.rankings[n, None, : len(candidates[p])],
            separator=separator,
            end=end,
        )
        with torch.no_grad():
            scores = ranking_scores(ranking_states(model, alone), alone, temperature=2.0)
        np.testing.assert_allclose(rollout.logprobs[n, : len(candidates[p])], scores.logprobs[0], atol=2e-5)


def test_no_budget_is_a_prompt_that_ends_with_the_marker():
    model = model_of()
    options: dict[str, Any] = {"separator": (SEPARATOR,), "end": (EOS,), "num_generations": 3}
    forced = sample_rankings(
        model,
        PROMPTS,
        TITLES,
        reasoning_end=[4, 5],
        max_reasoning_tokens=0,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    longer = [[*prompt, 4, 5] for prompt in PROMPTS]
    plain = sample_rankings(model, longer, TITLES, generator=torch.Generator().manual_seed(0), **options)
    np.testing.assert_array_equal(forced.rankings, plain.rankings)
    np.testing.assert_allclose(forced.logprobs, plain.logprobs, atol=1e-5)
    assert [row.tolist() for row in forced.reasoning.tokens] == [[4, 5]] * 9
    assert forced.reasoning_logprobs.shape == (9, 0)


def test_reasoning_follows_the_distribution_without_the_end_of_sequence():
    """Frequencies of first tokens over many rollouts, against the softmax over all tokens but one."""
    model = favour(model_of(), t52=4.0)
    rollout = sample_rankings(
        model,
        PROMPTS[:1],
        SINGLE[:1],
        num_generations=4000,
        reasoning_end=[7],
        max_reasoning_tokens=1,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        logits = model(torch.tensor(PROMPTS[:1])).logits[0, -1]
    logits[EOS] = -torch.inf
    found = np.bincount([row[0] for row in rollout.reasoning.tokens], minlength=VOCAB) / 4000
    np.testing.assert_allclose(found, logits.softmax(0).numpy(), atol=4 * np.sqrt(0.25 / 4000))


# --------------------------------------------------------------------------------------------------- inside generate


def generate(model: Any, processor: RankingLogitsProcessor, prompts: list[list[int]] = PROMPTS, **options: Any) -> Any:
    width = max(map(len, prompts))
    torch.manual_seed(1)
    return model.generate(
        input_ids=torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        logits_processor=[processor],
        max_new_tokens=processor.max_new_tokens,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


@FORMS
@pytest.mark.parametrize("marker", [[7], [7, 7, 8]])
def test_greedy_search_says_and_ranks_what_the_rollout_does(candidates, separator, end, marker):
    model = favour(model_of(), t7=2.0, t8=2.0, t52=9.0)
    rule: dict[str, Any] = {"reasoning_end": marker, "max_reasoning_tokens": 6, "separator": separator, "end": end}
    processor = RankingLogitsProcessor(candidates, eos_token_id=EOS, **rule)
    out = generate(model, processor, do_sample=False)
    own = sample_rankings(model, PROMPTS, candidates, greedy=True, **rule)
    np.testing.assert_array_equal(processor.rankings(out.sequences), own.rankings)
    said = processor.reasoning(out.sequences)
    assert [row.tolist() for row in said.tokens] == [row.tolist() for row in own.reasoning.tokens]
    np.testing.assert_array_equal(said.num_sampled, own.reasoning.num_sampled)
    assert said.never == own.reasoning.never == (EOS,)


@pytest.mark.parametrize("reuse", [False, True])
def test_samples_of_generate_keep_the_rule(reuse):
    """Several ends of sequence, of which none is said; rows that stop reasoning at different steps."""
    model = favour(model_of(eos=[EOS, 3]), t7=4.0, t3=9.0, t52=9.0)
    processor = RankingLogitsProcessor(
        TITLES,
        separator=[SEPARATOR],
        end=[EOS],
        eos_token_id=[EOS, 3],
        reasoning_end=[7],
        max_reasoning_tokens=8,
        reuse_scores=reuse,
    )
    out = generate(model, processor, do_sample=True, top_k=0, num_return_sequences=4)
    rankings, said = processor.rankings(out.sequences), processor.reasoning(out.sequences)
    np.testing.assert_array_equal((rankings >= 0).sum(axis=1), [4] * 4 + [3] * 4 + [1] * 4)
    assert len(set(said.lengths.tolist())) > 2
    for row in said.tokens:
        assert row[-1] == 7
        assert not set(row[:-1].tolist()) & {7, EOS, 3}


def everything_that_can_be_said(vocab: int, never: set[int], marker: int, budget: int) -> list[list[int]]:
    """Every reasoning with a marker of one token."""
    free = sorted(set(range(vocab)) - never - {marker})
    return [[*said, marker] for size in range(budget + 1) for said in itertools.product(free, repeat=size)]


def scored(model: Any, said: list[list[int]], candidates: list[list[int]], **options: Any) -> tuple[Any, ...]:
    """Log-probs of every reasoning with every ranking: rows, (N, R) of reasoning, (N, T) of items, and the batch."""
    orders = list(itertools.permutations(range(len(candidates))))
    rows = [(words, order) for words in said for order in orders]
    budget = max(map(len, said)) - 1
    reasoning = ReasoningTokens(
        [np.array(words) for words, _ in rows], np.array([min(len(words), budget) for words, _ in rows]), (0,)
    )
    batch = make_batch(
        [[1, 2]], [candidates], np.array([order for _, order in rows]), num_generations=len(rows), reasoning=reasoning
    )
    states = ranking_states(model, batch)
    return rows, reasoning_logprobs(states, batch), ranking_scores(states, batch).logprobs, batch


def test_as_many_beams_as_completions_find_the_mode_of_reasoning_and_ranking():
    """One token of ten or none, then one of six rankings: all are found, scored by the log-prob of both together."""
    vocab, marker = 12, 11
    model = model_of(vocab, eos=0)
    candidates = [[3], [4], [5]]
    said = everything_that_can_be_said(vocab, {0}, marker, 1)
    with torch.no_grad():
        rows, of_reasoning, of_items, _ = scored(model, said, candidates)
    totals = of_reasoning.sum(dim=1) + of_items.sum(dim=1)
    torch.testing.assert_close(totals.double().exp().sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-5)

    beams = len(rows)
    assert beams == 11 * 6
    processor = RankingLogitsProcessor(
        [candidates], eos_token_id=0, reasoning_end=[marker], max_reasoning_tokens=1, num_beams=beams
    )
    out = generate(
        model,
        processor,
        [[1, 2]],
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=0.0,
        do_sample=False,
    )
    order = totals.argsort(descending=True)
    torch.testing.assert_close(out.sequences_scores, totals[order], rtol=0, atol=1e-4)
    found = zip(processor.reasoning(out.sequences).tokens, processor.rankings(out.sequences).tolist(), strict=True)
    assert {(tuple(words), tuple(ranking)) for words, ranking in found} == {(tuple(w), o) for w, o in rows}
    best = rows[int(order[0])]
    assert processor.reasoning(out.sequences[:1]).tokens[0].tolist() == best[0]
    assert processor.rankings(out.sequences[:1])[0].tolist() == list(best[1])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([[7], [7, 7, 8]]))
def test_any_history_of_calls_gives_what_a_new_processor_gives(seed, reuse, marker):
    """Rows grow, are swapped, replaced, and get shorter, reasoning and ranking side by side."""
    rng = np.random.default_rng(seed)
    rule: dict[str, Any] = {"reasoning_end": marker, "max_reasoning_tokens": 5, "separator": [SEPARATOR], "end": [EOS]}

    def walk(p: int) -> list[int]:
        words: list[int] = []
        while len(words) < 5 and words[-len(marker) :] != marker:
            words.append(int(rng.choice([7, 8, 9])))
        order = rng.permutation(len(TITLES[p])).tolist()
        spelled = [token for k in order for token in [*TITLES[p][k], SEPARATOR]]
        return [*completed(words, marker), *spelled[:-1], EOS, *[0] * 30]

    processor = RankingLogitsProcessor(TITLES, prompt_length=2, reuse_scores=reuse, **rule)
    rows = [walk(n // 2) for n in range(6)]
    for _ in range(8):
        num_steps = int(rng.integers(0, 16))
        for n in np.flatnonzero(rng.random(6) < 0.3):
            rows[n] = walk(n // 2)
        input_ids = torch.tensor([[7, 7, *row[:num_steps]] for row in rows])
        scores = torch.randn(6, VOCAB)
        new = RankingLogitsProcessor(TITLES, prompt_length=2, **rule)
        before = scores.clone()
        result = processor(input_ids, scores)
        assert torch.equal(result, new(input_ids, scores))
        assert torch.equal(scores, before)
        torch.testing.assert_close(result.exp().sum(dim=1), torch.ones(6))


def test_mistakes_of_a_processor():
    rule: dict[str, Any] = {"reasoning_end": [7], "max_reasoning_tokens": 2}
    processor = RankingLogitsProcessor(SINGLE, end=[EOS], prompt_length=1, **rule)
    assert processor.max_new_tokens == 2 + 1 + 4 + 1
    scores = torch.zeros(3, VOCAB)
    scores[1, 33] = torch.nan
    with pytest.raises(ValueError, match="row 1, step 0: the tokens of the vocabulary have scores up to nan"):
        processor(torch.zeros(3, 1, dtype=torch.int64), scores)
    stopped = torch.tensor([[1, 9, 9], [1, 7, 21], [1, 9, 7]])
    np.testing.assert_array_equal(processor.rankings(stopped)[:, 0], [-1, 1, -1])
    assert [row.tolist() for row in processor.reasoning(stopped).tokens] == [[], [7], [9, 7]]
    with pytest.raises(ValueError, match="hold token 59"):
        RankingLogitsProcessor(SINGLE, end=[EOS], reasoning_end=[59], max_reasoning_tokens=2)(
            torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 59)
        )
    with pytest.raises(ValueError, match="reasoning_end was not given"):
        RankingLogitsProcessor(SINGLE, end=[EOS], prompt_length=1).reasoning(stopped)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_gradient_is_that_of_the_expected_metric(baseline):
    """Both losses of all that can be said and ranked, weighted by probability, against the derivative of the mean."""
    vocab, marker = 8, 7
    model = model_of(vocab, eos=0, dtype=torch.float64)
    said = everything_that_can_be_said(vocab, {0}, marker, 2)
    assert len(said) == 1 + 6 + 36
    rows, of_reasoning, of_items, batch = scored(model, said, [[3], [4], [5]])
    gains = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)[torch.tensor([order for _, order in rows])]
    value = ranking_metric(gains, "ndcg").double()  # (N,)
    probability = (of_reasoning.sum(dim=1) + of_items.sum(dim=1)).exp()  # (N,)
    assert probability.sum().item() == pytest.approx(1.0)
    parameters = list(model.parameters())
    true = torch.autograd.grad((probability * value).sum(), parameters, retain_graph=True)

    advantages = (value - baseline) * probability.detach()
    loss_of_reasoning, _ = policy_loss(
        of_reasoning, None, advantages, batch.reasoning_mask, importance_level="token", loss_agg="sum"
    )
    loss_of_items, _ = policy_loss(of_items, None, advantages, torch.ones_like(of_items), loss_agg="sum")
    found = torch.autograd.grad(loss_of_reasoning + loss_of_items, parameters)
    for ours, exact, (name, _) in zip(found, true, model.named_parameters(), strict=True):
        error = (ours + exact).abs().max() / exact.abs().max()
        assert error < 2e-6, f"{name}: {error}"


def test_reasoning_and_ranking_rows_must_fit():
    said = ReasoningTokens([np.array([7])], np.array([1]))
    with pytest.raises(ValueError, match="reasoning must have one row per ranking, 2, got 1"):
        make_batch([[1]], [SINGLE[0]], np.array([[0], [1]]), num_generations=2, reasoning=said)
    batch = make_batch([[1]], [SINGLE[0]], np.array([[0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="the batch holds no reasoning"):
        reasoning_logprobs(ranking_states(model_of(), batch), batch)
    assert Rollout(np.zeros((1, 1)), np.zeros((1, 1))).reasoning is None
