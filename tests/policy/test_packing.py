"""Rankings that share their prompt's row: the same loss and the same gradients as a row for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from flexrec.policy import packing
from flexrec.policy.batch import make_batch
from flexrec.policy.packing import attention_mask, can_pack, pack_rankings, rankings_per_row
from flexrec.policy.scores import ranking_scores, ranking_states

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
}
# Whatever the model's dtype, its norms (and eager attention its softmax) compute in float32.
FLOAT32 = {"rtol": 0, "atol": 1e-7}
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]  # unequal, so that short ones are put behind one another
SINGLE = [[[20], [21], [22], [23]], [[24], [25], [26], [27]], [[28], [29], [30], [31]]]
TITLES = [
    [[20, 21], [20, 22], [23], [24, 25, 26]],
    [[27], [28], [29, 30], [29, 31]],
    [[32, 33, 34], [32, 33, 35], [36], [37]],
]


def model_of(kind: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=attention)
    return model.double().eval()


def rankings(num_generations: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(4) for _ in range(3 * num_generations)])


def loss_and_gradients(model, candidates, separator, num_generations, per_row):
    batch = make_batch(
        PROMPTS,
        candidates,
        rankings(num_generations),
        separator=separator,
        end=(49,),
        num_generations=num_generations,
        rankings_per_row=per_row,
    )
    scores = ranking_scores(ranking_states(model, batch), batch, temperature=0.7)
    weights = torch.linspace(-1, 2, scores.logprobs.numel(), dtype=torch.float64).view_as(scores.logprobs)
    loss = (weights * scores.logprobs).sum() + 0.3 * scores.entropy.sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return batch, scores, gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("candidates", "separator"), [(SINGLE, ()), (TITLES, (40, 41))], ids=["tokens", "titles"])
def test_loss_and_every_gradient_equal_the_unpacked(kind, attention, candidates, separator):
    model = model_of(kind, attention)
    _, scores, gradients = loss_and_gradients(model, candidates, separator, 4, 1)
    for per_row in (2, 3, 4):
        batch, packed, packed_gradients = loss_and_gradients(model, candidates, separator, 4, per_row)
        assert batch.tokens.shared
        assert per_row != 3 or batch.tokens.part_of.max() > 0, "no row holds two prompts"
        torch.testing.assert_close(packed.logprobs, scores.logprobs, **FLOAT32)
        torch.testing.assert_close(packed.entropy, scores.entropy, **FLOAT32)
        for ours, theirs, (name, _) in zip(packed_gradients, gradients, model.named_parameters(), strict=True):
            error = (ours - theirs).abs().max() / theirs.abs().max()
            assert error < 2e-6, f"{name}: {error}"


def test_flex_attention_sees_the_same():
    candidates, separator = TITLES, (40,)
    expected = loss_and_gradients(model_of("llama", "sdpa"), candidates, separator, 4, 1)[1]
    model = model_of("llama", "flex_attention").float()
    batch = make_batch(
        PROMPTS, candidates, rankings(4), separator=separator, end=(49,), num_generations=4, rankings_per_row=3
    )
    assert batch.tokens.part_of.max() > 0, "no row holds two prompts"
    with torch.no_grad():  # torch has no backward pass of flex attention on the CPU
        scores = ranking_scores(ranking_states(model, batch), batch, temperature=0.7)
    torch.testing.assert_close(scores.logprobs.double(), expected.logprobs, rtol=1e-4, atol=1e-5)


def test_flex_attention_is_given_the_same_mask():
    batch = make_batch(PROMPTS, TITLES, rankings(4), num_generations=4, rankings_per_row=3)
    assert batch.tokens.part_of.max() > 0, "no row holds two prompts"
    seen = attention_mask(batch.tokens, "sdpa", torch.float32)  # (B, 1, L, L)
    blocks = attention_mask(batch.tokens, "flex_attention", torch.float32)
    found = create_mask(blocks.mask_mod, len(seen), None, *seen.shape[2:], device="cpu")
    assert torch.equal(found, seen)


def test_each_prompt_is_encoded_once_and_short_rows_are_filled():
    batch, *_ = loss_and_gradients(model_of("llama", "sdpa"), SINGLE, (), 4, 4)
    tokens = batch.tokens
    # Answers have 4 tokens and the end, of which the last is not fed. Row 1: 7 + 4 x 4 = 23 tokens; rows of 18 and 19
    # fit behind nothing.
    assert tokens.input_ids.shape == (3, 23)
    of_prompts = (tokens.part_of >= 0) & (tokens.ranking_of < 0)
    assert sorted(of_prompts.sum(1).tolist()) == sorted(len(prompt) for prompt in PROMPTS)
    # With two rankings a row the six parts have 15, 15, 10, 10, 11 and 11 tokens: none shares a row. With room they do.
    filled = pack_rankings([[1] * 20, [2] * 3, [3] * 4], [np.array([5, 6])] * 3, per_row=2)
    assert filled.input_ids.shape == (2, 22)
    assert filled.row.tolist() == [0, 1, 1]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_layout(data):
    """Every answer lies behind its own prompt, and sees exactly what it would see in a row of its own."""
    num_prompts = data.draw(st.integers(1, 4))
    generations, per_row = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    prompts = [data.draw(st.lists(st.integers(1, 99), min_size=1, max_size=6)) for _ in range(num_prompts)]
    answers = [
        np.array(data.draw(st.lists(st.integers(1, 99), max_size=5)), dtype=np.int64)
        for _ in range(num_prompts * generations)
    ]
    rows = pack_rankings(prompts, answers, num_generations=generations, per_row=per_row)
    if rows.shared:
        seen = attention_mask(rows, "sdpa", torch.float32)[:, 0]
        assert torch.equal(attention_mask(rows, "eager", torch.float32)[:, 0] == 0, seen)
    else:
        causal = torch.ones(rows.input_ids.shape[1], rows.input_ids.shape[1], dtype=torch.bool).tril()
        seen = causal & attention_mask(rows, "sdpa", torch.float32).bool()[:, None]
    for n, answer in enumerate(answers):
        prompt = prompts[n // generations]
        whole = [*prompt, *answer]
        b = rows.row[n]
        for t in range(len(answer) + 1):
            column = int(rows.predicting_columns(np.array([n]), np.array([t]))[0])
            visible = seen[b, column].nonzero()[:, 0]
            assert rows.input_ids[b, visible].tolist() == whole[: len(prompt) + t]
            assert rows.position_ids[b, visible].tolist() == list(range(len(prompt) + t))


def test_models_that_cannot_pack():
    assert can_pack(model_of("qwen2", "sdpa"))
    windowed = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=4))
    assert not can_pack(windowed)
    mixed = AutoModelForCausalLM.from_config(
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    )
    assert not can_pack(mixed)
    shared = pack_rankings([[1, 2]], [np.array([3]), np.array([4])], num_generations=2, per_row=2)
    with pytest.raises(ValueError, match=r"flash_attention_2.*attn_implementation"):
        attention_mask(shared, "flash_attention_2", torch.float32)
    with pytest.raises(ValueError, match="per_row must be at least 1, got 0"):
        pack_rankings([[1]], [np.array([2])], per_row=0)


def test_how_many_share_a_row():
    # A long prompt is worth sharing with all; a short one in a narrow model is not worth much attention.
    assert rankings_per_row(1000, 30, 8, 128) == 8
    assert rankings_per_row(200, 30, 8, 128) == 8
    assert rankings_per_row(1, 400, 8, 16) == 1
    assert rankings_per_row(100, 30, 1, 128) == 1


def test_sharing_is_decided_by_the_longest_prompt_and_answer(monkeypatch):
    asked = []
    monkeypatch.setattr(packing, "rankings_per_row", lambda *sizes: asked.append(sizes) or 2)
    model = model_of("llama", "sdpa")
    options = {"separator": (40, 41), "num_generations": 4}
    assert packing.sharing(model, PROMPTS, TITLES, **options) == 2
    assert packing.sharing(model, PROMPTS, TITLES, **options, num_ranked=3, reasoning_length=50) == 2
    # Titles of up to three tokens, each with a separator of two.
    assert asked == [(7, 4 * (3 + 2), 4, 16), (7, 50 + 3 * (3 + 2), 4, 16)]
    assert packing.sharing(model, PROMPTS, TITLES) == 1, "one ranking of each prompt"
    model.config._attn_implementation = "flash_attention_2"
    assert packing.sharing(model, PROMPTS, TITLES, **options) == 1, "no mask of one's own"
    assert len(asked) == 2
