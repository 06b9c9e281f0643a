"""Models that carry a state from token to token: what is sampled is what is trained, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from flexrec.decoding.sample import sample_rankings, search_rankings
from flexrec.policy.batch import make_batch
from flexrec.policy.packing import can_pack, only_attends
from flexrec.policy.scores import ranking_scores, ranking_states, reasoning_logprobs

VOCAB = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 52}
SIZES = VOCAB | {"hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
LINEAR = {
    f"linear_{name}": size
    for name, size in (("num_value_heads", 2), ("num_key_heads", 2), ("key_head_dim", 8), ("value_head_dim", 8))
}
KINDS = {
    "lfm2": ("Lfm2Config", HEADS | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "mamba2": ("Mamba2Config", {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        HEADS | LINEAR | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 16, "intermediate_size": 32}),
}
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 9]]
TITLES = [[[10, 11], [10, 12, 13], [10, 12], [14]], [[20], [20, 21], [22, 23, 24]]]
SPELLED = {"separator": (50,), "end": (52,)}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    kind, more = KINDS[request.param]
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES | more)).eval()
    with torch.no_grad():  # distributions that are not flat
        model.get_output_embeddings().weight.mul_(20.0)
    return model


def alone(model, prompt, lst, ranking):
    """Log-probs (T,) of a ranking in a row of its own, without padding."""
    batch = make_batch([prompt], [lst], np.array([ranking]), **SPELLED)
    return ranking_scores(ranking_states(model, batch), batch).logprobs[0].detach().numpy()


def test_rankings_do_not_share_rows(model):
    assert not only_attends(model)
    assert not can_pack(model, 20)


def test_samples_have_the_log_probs_that_they_have_alone(model):
    """Prompts and items of unequal lengths, several rollouts: padding gets into no state, nor do other rollouts."""
    noise = torch.Generator().manual_seed(0)
    rollout = sample_rankings(model, PROMPTS, TITLES, num_generations=3, generator=noise, **SPELLED)
    for n, (row, found) in enumerate(zip(rollout.rankings, rollout.logprobs, strict=True)):
        ranking = row[row >= 0].tolist()
        expected = alone(model, PROMPTS[n // 3], TITLES[n // 3], ranking)
        np.testing.assert_allclose(found[: len(ranking)], expected, rtol=1e-4, atol=1e-5)


def test_a_beam_goes_on_from_its_own_tokens(model):
    beams = search_rankings(model, PROMPTS, TITLES, num_beams=24, **SPELLED)
    for n, (row, found) in enumerate(zip(beams.rankings, beams.logprobs, strict=True)):
        if np.isfinite(found).all():
            ranking = row[row >= 0].tolist()
            expected = alone(model, PROMPTS[n // 24], TITLES[n // 24], ranking)
            np.testing.assert_allclose(found[: len(ranking)], expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(beams.logprobs.sum(axis=1)).sum() == 24 + 6, "all rankings of four items and of three"


def test_reasoning_of_plain_tokens_goes_on_behind_a_prompt_of_sums(model):
    prompts, items = [[1, (2, 3), 4], [5, (6, 7)]], [[[(10, 11)], [12]], [[(13, 14)], [15]]]
    noise = torch.Generator().manual_seed(0)
    options = {"reasoning_end": [8], "max_reasoning_tokens": 4, "num_generations": 2, "generator": noise}
    rollout = sample_rankings(model, prompts, items, **options)
    batch = make_batch(prompts, items, rollout.rankings, num_generations=2, reasoning=rollout.reasoning)
    states = ranking_states(model, batch)
    said = reasoning_logprobs(states, batch).detach().numpy()
    np.testing.assert_allclose(said, rollout.reasoning_logprobs, rtol=1e-4, atol=1e-5)
    found = ranking_scores(states, batch).logprobs.detach().numpy()
    np.testing.assert_allclose(found, rollout.logprobs, rtol=1e-4, atol=1e-5)
