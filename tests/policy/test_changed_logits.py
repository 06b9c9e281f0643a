"""Models that scale or cap their logits behind the output layer: what is trained and sampled is what they would say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
)

from flexrec.decoding.logits_processor import RankingLogitsProcessor
from flexrec.decoding.one_pass import first_choices
from flexrec.decoding.sample import sample_rankings, search_rankings
from flexrec.policy.batch import make_batch
from flexrec.policy.lm_head import capped, last_hidden, output_layer, soft_cap
from flexrec.policy.scores import all_actions, ranking_scores, ranking_states, reasoning_logprobs
from flexrec.task.labels import Place

VOCAB, EOS = 60, 52
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
KINDS = {
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.4),
    "cohere2": lambda: Cohere2Config(**SIZES, logit_scale=3.0),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=0.5),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8, final_logit_softcapping=1.5, query_pre_attn_scalar=8),
}
CAPPED = ("gemma2", "gemma3")
# Of other kinds: (class of the configuration, what it is given besides SIZES).
OTHERS = {
    "falcon_h1": (
        "FalconH1Config",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 0.3},
    ),
    "hyperclovax": ("HyperCLOVAXConfig", {"logits_scaling": 0.4}),  # multiplies by what Granite divides by
    "inkling": ("InklingTextConfig", {"head_dim": 8, "logits_mup_width_multiplier": 3.0, "num_experts_per_tok": 1}),
    "llama4": ("Llama4TextConfig", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32}),
    "opt": ("OPTConfig", {"ffn_dim": 32, "word_embed_proj_dim": 8}),  # its head passes its model by
    "recurrent_gemma": ("RecurrentGemmaConfig", {"num_hidden_layers": 3, "lru_width": 16, "logits_soft_cap": 2.0}),
}
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 9]]
SINGLE = [[[10], [11], [12], [13]], [[20], [21], [10]]]
TITLES = [[[10, 11], [10, 12, 13], [10, 12], [14]], [[20], [20, 21], [22, 23, 24]]]
PLACES = [[[Place(end, 30, 31)] for end in (4, 3, 1)], [[Place(end, 30, 31)] for end in (2, 1)]]
SPELLINGS = {"tokens": (SINGLE, (), ()), "titles": (TITLES, (50,), (EOS,))}


def model_of(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind](), attn_implementation="eager").eval()
    with torch.no_grad():  # far from flat, and where caps bend
        model.get_output_embeddings().weight.mul_(20.0)
    return model


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


def other_model(name):
    kind, more = OTHERS[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES | more)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return model


@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
def test_states_layer_and_cap_make_the_models_logits(name):
    model = other_model(name) if name in OTHERS else model_of(name)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    hidden = last_hidden(model, input_ids=tokens, use_cache=False)
    weight, bias = output_layer(model)
    made = capped(torch.nn.functional.linear(hidden, weight, bias), soft_cap(model))
    torch.testing.assert_close(made, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)
    if name not in ("llama4", "opt"):
        plain = torch.nn.functional.linear(model.base_model(tokens).last_hidden_state, weight)
        assert (plain - made).abs().max() > 0.05, "without it the logits would be others"


@pytest.mark.parametrize(("kind", "more"), [("ModernBertDecoderConfig", {}), ("RobertaConfig", {"is_decoder": True})])
def test_a_head_of_several_layers_is_refused(kind, more):
    """The last of them reads what the others make of the states."""
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no {kind}")
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES | more))
    with pytest.raises(ValueError, match="is not all of its head"):
        sample_rankings(model, PROMPTS, SINGLE)


def by_hand(model, prompt, lst, ranking, separator, end, temperature):
    """Log-prob of each item of a ranking of a whole list, decision by decision, from the logits of generate's kind."""
    found, tokens, left = [], list(prompt), {tuple(sequence): k for k, sequence in enumerate(lst)}
    for rank, item in enumerate(ranking):
        total, written = torch.zeros(()), ()
        last = rank == len(ranking) - 1
        behind = end if last else separator
        spelled = [tuple(lst[item]), *([tuple(behind)] if len(behind) else [])]
        for token in [t for part in spelled for t in part]:
            options = {
                option[len(written)]
                for sequence in left
                for option in [(*sequence, *behind)]
                if option[: len(written)] == written and len(option) > len(written)
            }
            logits = model(torch.tensor([tokens])).logits[0, -1] / temperature
            allowed = sorted(options)
            total = total + logits[allowed].log_softmax(0)[allowed.index(token)]
            tokens.append(token)
            written = (*written, token)
        found.append(total)
        del left[tuple(lst[item])]
    return torch.stack(found)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_log_probs_and_their_gradients_are_those_of_the_models_logits(kind, spelling):
    model = model_of(kind)
    candidates, separator, end = SPELLINGS[spelling]
    rankings = np.array([[2, 0, 3, 1], [0, 1, 2, 3], [1, 2, 0, -1], [2, 0, 1, -1]])
    for per_row in (1, 2):
        batch = make_batch(
            PROMPTS,
            candidates,
            rankings,
            separator=separator,
            end=end,
            num_generations=2,
            rankings_per_row=per_row if kind in ("cohere", "granite") else 1,
        )
        found = ranking_scores(ranking_states(model, batch), batch, temperature=0.8).logprobs
        total = torch.zeros(())
        for n, row in enumerate(rankings):
            items = row[row >= 0].tolist()
            expected = by_hand(model, PROMPTS[n // 2], candidates[n // 2], items, separator, end, 0.8)
            torch.testing.assert_close(found[n, : len(items)], expected, rtol=1e-3, atol=2e-4)
            total = total + expected.sum()
        weights = [model.get_output_embeddings().weight, model.base_model.layers[0].mlp.down_proj.weight]
        for got, true in zip(
            torch.autograd.grad(found.sum(), weights), torch.autograd.grad(total, weights), strict=True
        ):
            torch.testing.assert_close(got, true, rtol=5e-3, atol=2e-4)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_sampled_searched_and_generated_rankings_are_of_one_distribution(kind, spelling):
    model = model_of(kind)
    candidates, separator, end = SPELLINGS[spelling]
    spelled = {"separator": separator, "end": end}
    rollout = sample_rankings(
        model, PROMPTS, candidates, num_generations=3, generator=torch.Generator().manual_seed(0), **spelled
    )
    batch = make_batch(PROMPTS, candidates, rollout.rankings, num_generations=3, **spelled)
    scored = ranking_scores(ranking_states(model, batch), batch).logprobs.detach().numpy()
    np.testing.assert_allclose(scored, rollout.logprobs, rtol=1e-3, atol=2e-4)

    greedy = sample_rankings(model, PROMPTS, candidates, greedy=True, **spelled)
    beam = search_rankings(model, PROMPTS, candidates, num_beams=1, **spelled)
    assert np.array_equal(greedy.rankings, beam.rankings)
    for prompt, lst, ranking in zip(PROMPTS, candidates, greedy.rankings, strict=True):
        processor = RankingLogitsProcessor([lst], eos_token_id=EOS, **spelled)
        sequences = model.generate(
            torch.tensor([prompt]), logits_processor=[processor], max_new_tokens=processor.max_new_tokens
        )
        assert processor.rankings(sequences)[0].tolist() == ranking[ranking >= 0].tolist()


def test_a_reference_and_the_objective_see_the_cap(kind):
    """Of one distribution the KL is 0, and it is that of the probabilities where the two differ."""
    model = model_of(kind)
    other = model_of(kind)
    with torch.no_grad():
        other.base_model.layers[0].mlp.down_proj.weight.mul_(-40.0)
    gains = torch.rand(2, 4, generator=torch.Generator().manual_seed(1))
    for candidates, separator, end in SPELLINGS.values():
        rankings = np.array([[2, 0, 3, 1], [1, 2, 0, -1]])
        batch = make_batch(PROMPTS, candidates, rankings, separator=separator, end=end)
        states = ranking_states(model, batch)
        same = all_actions(states, batch, gains, "ndcg", reference=ranking_states(model, batch))
        torch.testing.assert_close(same.kl, torch.zeros_like(same.kl), rtol=0, atol=1e-5)
        differs = all_actions(states, batch, gains, "ndcg", reference=ranking_states(other, batch))
        torch.testing.assert_close(differs.objective, same.objective)
        if candidates is SINGLE:
            p, q = (m(torch.tensor([PROMPTS[0]])).logits[0, -1, 10:14].log_softmax(0) for m in (model, other))
            torch.testing.assert_close(differs.kl[0, 0], (p.exp() * (p - q)).sum(), rtol=1e-3, atol=1e-5)
            assert differs.kl[0, 0] > 1e-3


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_reference_whose_logits_alone_are_bent_is_refused(spelling):
    """One reader takes capped logits as states, or states and a head: it would take the one for the other."""
    candidates, separator, end = SPELLINGS[spelling]
    batch = make_batch(PROMPTS, candidates, np.array([[2, 0, 3, 1], [1, 2, 0, -1]]), separator=separator, end=end)
    bent, plain = (ranking_states(model_of(kind), batch) for kind in ("gemma2", "granite"))
    gains = torch.rand(2, 4)
    for policy, reference in ((bent, plain), (plain, bent)):
        with pytest.raises(ValueError, match="reference: its logits have a soft cap"):
            ranking_scores(policy, batch, reference=reference)
        with pytest.raises(ValueError, match="reference: its logits have a soft cap"):
            all_actions(policy, batch, gains, "ndcg", reference=reference)


def test_one_pass_and_places_read_the_models_logits(kind):
    model = model_of(kind)
    for prompt, lst, probs in zip(PROMPTS, SINGLE, first_choices(model, PROMPTS, SINGLE), strict=True):
        expected = model(torch.tensor([prompt])).logits[0, -1, [token for (token,) in lst]].softmax(0)
        np.testing.assert_allclose(probs, expected.detach().numpy(), rtol=1e-3, atol=1e-5)
    for prompt, lst, probs in zip(PROMPTS, PLACES, first_choices(model, PROMPTS, PLACES), strict=True):
        logits = model(torch.tensor([prompt])).logits[0]
        expected = torch.stack([logits[-p.before_end, p.yes] - logits[-p.before_end, p.no] for (p,) in lst])
        np.testing.assert_allclose(probs, expected.softmax(0).detach().numpy(), rtol=1e-3, atol=1e-5)


def test_reasoning_is_scored_as_it_was_sampled(kind):
    model = model_of(kind)
    rollout = sample_rankings(
        model,
        PROMPTS,
        SINGLE,
        num_generations=2,
        reasoning_end=[7],
        max_reasoning_tokens=5,
        temperature=1.3,
        generator=torch.Generator().manual_seed(0),
    )
    batch = make_batch(PROMPTS, SINGLE, rollout.rankings, num_generations=2, reasoning=rollout.reasoning)
    states = ranking_states(model, batch)
    scored = reasoning_logprobs(states, batch, temperature=1.3).detach().numpy()
    np.testing.assert_allclose(scored, rollout.reasoning_logprobs, rtol=1e-3, atol=2e-4)
    of_rankings = ranking_scores(states, batch, temperature=1.3).logprobs.detach().numpy()
    np.testing.assert_allclose(of_rankings, rollout.logprobs, rtol=1e-3, atol=2e-4)


def test_what_is_tested_is_far_from_flat(kind):
    logits = model_of(kind)(torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert logits[10:14].std() > 0.2
    assert (kind in CAPPED) == (soft_cap(model_of(kind)) is not None)
