"""Attention without a mask in rows that share a prompt: what a row for each ranking has, forward and backward."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from prefix_rows import by_hand, random_rows, states
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from flexrec.policy import packing, shared_prefix
from flexrec.policy.batch import make_batch
from flexrec.policy.lm_head import hidden_of_rows
from flexrec.policy.packing import attention_inputs, can_pack, pack_rankings, sharing
from flexrec.policy.scores import ranking_scores, ranking_states
from flexrec.policy.shared_prefix import base_attention, can_attend_by_prefix, shared_prefix_attention

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
    "gemma3": Gemma3TextConfig(
        **SMALL,
        head_dim=8,
        query_pre_attn_scalar=5,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
# Whatever a model's dtype, its norms compute in float32.
FLOAT32 = {"rtol": 0, "atol": 1e-7}
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]
TITLES = [
    [[20, 21], [20, 22], [23], [24, 25, 26]],
    [[27], [28], [29, 30], [29, 31]],
    [[32, 33, 34], [32, 33, 35], [36], [37]],
]
SINGLE = [[[20], [21], [22], [23]], [[24], [25], [26], [27]], [[28], [29], [30], [31]]]


@pytest.fixture
def always(monkeypatch):
    """Small rows attend without a mask, too."""
    monkeypatch.setattr(packing, "_PER_ROW", 0)
    monkeypatch.setattr(packing, "_PER_PRODUCT", 0)


def model_of(kind: str, attention: str = "sdpa", **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[kind])
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()


def loss_and_gradients(model, candidates, num_ranked=4, per_row=1, num_generations=4):
    rng = np.random.default_rng(0)
    rankings = np.stack([rng.permutation(4)[:num_ranked] for _ in range(3 * num_generations)])
    batch = make_batch(
        PROMPTS,
        candidates,
        rankings,
        separator=() if candidates is SINGLE else (40, 41),
        end=(49,),
        num_generations=num_generations,
        rankings_per_row=per_row,
    )
    scores = ranking_scores(ranking_states(model, batch), batch, temperature=0.7)
    weights = torch.linspace(-1, 2, scores.logprobs.numel(), dtype=torch.float64).view_as(scores.logprobs)
    loss = (weights * scores.logprobs).sum() + 0.3 * scores.entropy.sum()
    return batch, scores, torch.autograd.grad(loss, list(model.parameters()))


def assert_same(model, found, expected):
    torch.testing.assert_close(found[1].logprobs, expected[1].logprobs, **FLOAT32)
    torch.testing.assert_close(found[1].entropy, expected[1].entropy, **FLOAT32)
    for ours, theirs, (name, _) in zip(found[2], expected[2], model.named_parameters(), strict=True):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 2e-6, f"{name}: {error}"


# --- the attention itself ---------------------------------------------------------------------------------------------


def flash(query, key, value, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale):
    """What torch's kernel of this signature computes on a GPU, by loops: (T, H, D) and log-sum-exps (H, T)."""
    assert dropout_p == 0.0
    assert not return_debug_mask
    assert max_q == cum_q.diff().max()
    assert max_k == cum_k.diff().max()
    assert cum_q.dtype == cum_k.dtype == torch.int32
    out, sums = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0])
    for (q0, q1), (k0, k1) in zip(ranges(cum_q), ranges(cum_k), strict=True):
        scores = scores_of(query[q0:q1], key[k0:k1], is_causal, scale)
        sums[:, q0:q1] = scores.logsumexp(-1)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), grouped(query, value)[k0:k1])
    return out, sums, torch.tensor([1, 2]), torch.tensor([3]), None


def flash_backward(
    grad, query, key, value, out, sums, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, rng, unused, *, scale
):
    """Its backward pass: weights are exp(score - log-sum-exp), by whatever log-sum-exp it is given."""
    assert rng.tolist() == [1, 2]
    assert unused.tolist() == [3]
    assert dropout_p == 0.0
    assert sums.is_contiguous()
    assert sums.shape == (query.shape[1], query.shape[0])
    dq, dk, dv = (
        torch.zeros_like(query),
        torch.zeros_like(grouped(query, key)),
        torch.zeros_like(grouped(query, value)),
    )
    for (q0, q1), (k0, k1) in zip(ranges(cum_q), ranges(cum_k), strict=True):
        weights = (scores_of(query[q0:q1], key[k0:k1], is_causal, scale) - sums[:, q0:q1, None]).exp()
        dv[k0:k1] += torch.einsum("hqk,qhd->khd", weights, grad[q0:q1])
        of_weights = torch.einsum("qhd,khd->hqk", grad[q0:q1], grouped(query, value)[k0:k1])
        of_scores = weights * (of_weights - (grad * out)[q0:q1].sum(-1).T[:, :, None]) * scale
        dq[q0:q1] += torch.einsum("hqk,khd->qhd", of_scores, grouped(query, key)[k0:k1])
        dk[k0:k1] += torch.einsum("hqk,qhd->khd", of_scores, query[q0:q1])
    summed = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (dk, dv))
    return dq, *summed


def ranges(ends):
    return zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)


def grouped(query, key):
    return key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def scores_of(query, key, is_causal, scale):
    scores = scale * torch.einsum("qhd,khd->hqk", query, grouped(query, key))
    if is_causal:
        assert len(query) == len(key)
        scores = scores.masked_fill(torch.ones(len(query), len(key), dtype=torch.bool).triu(1), -torch.inf)
    return scores


@pytest.mark.parametrize("kernel", ["cpu", "cpu without groups", "gpu"])
@pytest.mark.parametrize("seed", range(12))
def test_attention_and_gradients_equal_a_masked_softmax(monkeypatch, kernel, seed):
    if kernel == "gpu":
        assert on_a_gpu(monkeypatch)
    monkeypatch.setattr(shared_prefix, "_CPU_GROUPS", kernel != "cpu without groups")
    rows, seen = random_rows(seed)
    qkv = [x.requires_grad_() for x in states(rows.input_ids.shape)]
    found = shared_prefix_attention(*qkv, rows.layout(), 0.3)
    expected = by_hand(*qkv, seen, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    # An inner dimension of stride 0, as sums have it, and any gradient at padding.
    for grad in (torch.randn_like(found), torch.ones(()).double().expand(found.shape)):
        ours, theirs = (torch.autograd.grad(x, qkv, grad, retain_graph=True) for x in (found, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def on_a_gpu(monkeypatch, forward=flash, backward=flash_backward):
    monkeypatch.setattr(shared_prefix, "_OnCpu", shared_prefix._OnGpu)
    monkeypatch.setattr(shared_prefix, "_flash", forward)
    monkeypatch.setattr(shared_prefix, "_flash_backward", backward)
    with torch.inference_mode():  # as it may be where the first rows come
        return shared_prefix.kernels_agree.__wrapped__(torch.device("cpu"), torch.bfloat16, 2, 8)


def test_a_gpus_kernels_are_tried_before_they_are_trusted(monkeypatch):
    def other_sums(*args, **options):
        out, sums, *rest = flash(*args, **options)
        return out, sums + 1, *rest

    def of_the_part_alone(*args, **options):
        dq, dk, dv = flash_backward(*args, **options)
        return dq, 2 * dk, dv

    def not_compiled(*args, **options):
        raise RuntimeError("no kernel image is available\nsecond line")

    assert on_a_gpu(monkeypatch)
    for kernels, problem in (
        ((other_sums, flash_backward), "is off by"),
        ((flash, of_the_part_alone), "is off by"),
        ((flash, lambda *args, **options: [torch.nan * x for x in flash_backward(*args, **options)]), "off by nan"),
        ((not_compiled, flash_backward), r"fails \(no kernel image is available\)"),
    ):
        with pytest.warns(UserWarning, match=f"flash attention .*{problem}.* heads of 8: .* by a mask"):
            assert not on_a_gpu(monkeypatch, *kernels)


def test_scores_that_overflow_an_exponential():
    rows, seen = random_rows(4)
    qkv = [x.mul(100).requires_grad_() for x in states(rows.input_ids.shape)]
    found, expected = shared_prefix_attention(*qkv, rows.layout(), 1.0), by_hand(*qkv, seen, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(x.sum(), qkv) for x in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_half_precision_is_as_near_as_that_of_torch():
    rows, seen = random_rows(5)
    exact = states(rows.input_ids.shape, key_heads=4)
    half = [x.bfloat16().requires_grad_() for x in exact]
    expected = by_hand(*exact, seen, 0.3)
    mask = seen | torch.eye(seen.shape[1], dtype=torch.bool)  # padding sees itself, lest it be NaN
    theirs = scaled_dot_product_attention(*half, attn_mask=mask[:, None], scale=0.3).transpose(1, 2)
    ours = shared_prefix_attention(*half, rows.layout(), 0.3)
    assert ours.dtype == torch.bfloat16
    real = rows.part_of >= 0
    assert (ours - expected)[real].abs().max() <= 1.5 * (theirs - expected)[real].abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # positions are turned in float32, values are not
        mixed = shared_prefix_attention(half[0].float(), half[1].float(), half[2], rows.layout(), 0.3)
    torch.testing.assert_close(mixed, ours, rtol=0, atol=0)


def test_prompts_of_one_length_are_one_call():
    prompts, answers = [[1, 2, 3]] * 4, [np.array([5, 6])] * 8
    layout = pack_rankings(prompts, answers, num_generations=2, per_row=2).layout()
    assert [tuple((s.start, s.stop) for s in block) for block in layout.blocks] == [((0, 4), (0, 3), (3, 7))]
    assert layout.longest == 5
    assert not layout.padded


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("candidates", [SINGLE, TITLES], ids=["tokens", "titles"])
def test_loss_and_every_gradient_equal_the_unpacked(always, kind, attention, candidates):
    model = model_of(kind, attention)
    expected = loss_and_gradients(model, candidates)
    assert model.config._attn_implementation == attention
    for per_row in (2, 3, 4):
        found = loss_and_gradients(model, candidates, per_row=per_row)
        assert found[0].tokens.shared
        assert model.config._attn_implementation == f"flexrec_shared_prefix_{attention}"
        assert_same(model, found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_gradient_checkpointing(always, kind, reentrant):
    model = model_of(kind)
    expected = loss_and_gradients(model, TITLES)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    if reentrant:  # which has no torch.autograd.grad
        return _by_backward(model, expected)
    assert_same(model, loss_and_gradients(model, TITLES, per_row=4), expected)
    return None


def _by_backward(model, expected):
    model.enable_input_require_grads()
    rng = np.random.default_rng(0)
    rankings = np.stack([rng.permutation(4) for _ in range(12)])
    sizes = {"num_generations": 4, "rankings_per_row": 4}
    batch = make_batch(PROMPTS, TITLES, rankings, separator=(40, 41), end=(49,), **sizes)
    scores = ranking_scores(ranking_states(model, batch), batch, temperature=0.7)
    weights = torch.linspace(-1, 2, scores.logprobs.numel(), dtype=torch.float64).view_as(scores.logprobs)
    ((weights * scores.logprobs).sum() + 0.3 * scores.entropy.sum()).backward()
    assert_same(model, (batch, scores, [p.grad for p in model.parameters()]), expected)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_other_inputs_are_attended_as_before(always, kind, attention):
    model, twin = model_of(kind, attention), model_of(kind, attention)
    loss_and_gradients(model, SINGLE, per_row=4)
    assert model.config._attn_implementation != attention
    assert base_attention(model) == attention
    tokens = torch.randint(0, 50, (2, 45), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0  # padding on the left
    with torch.no_grad():
        for options in ({"attention_mask": mask}, {}):
            ours, theirs = (m(tokens, **options).logits for m in (model, twin))
            # Padding that sees nothing is NaN in float64 by eager attention.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
            assert ours[1].isfinite().all()
    continued = [
        m.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for m in (model, twin)
    ]
    assert torch.equal(*continued)
    assert "flexrec" not in model.config.to_json_string()


def test_no_mask_is_made(always, monkeypatch):
    def refuse(*args):
        raise AssertionError("a mask was made")

    monkeypatch.setattr(packing, "attention_mask", refuse)
    model = model_of("llama")
    batch = loss_and_gradients(model, SINGLE, per_row=4)[0]
    given = attention_inputs(model, batch.tokens)
    assert given["attention_mask"].numel() == 0
    assert torch.equal(given["position_ids"], batch.tokens.position_ids)


def test_windows_are_refused_where_they_are_shorter_than_a_ranking_and_its_prompt(always):
    # Prompt and ranking have up to 7 + 4 tokens, of which the last is fed, as the end is not.
    expected = loss_and_gradients(model_of("gemma3"), SINGLE)
    narrow, wide = model_of("gemma3", sliding_window=10), model_of("gemma3", sliding_window=11)
    for model in (narrow, wide):
        assert not can_pack(model)  # in rows that grow
        assert can_pack(model, 10)
    assert not can_pack(narrow, 11)
    assert can_pack(wide, 11)
    assert_same(wide, loss_and_gradients(wide, SINGLE, per_row=4), expected)
    with pytest.raises(
        ValueError, match=r"Gemma3TextConfig has .*sliding_attention .*window of 10 tokens, .* up to 11"
    ):
        loss_and_gradients(narrow, SINGLE, per_row=4)
    options = {"num_generations": 4}
    assert sharing(wide, PROMPTS, SINGLE, **options) == 4
    assert sharing(narrow, PROMPTS, SINGLE, **options) == 1
    assert sharing(wide, PROMPTS, SINGLE, **options, decoding=True) == 1


def test_attention_that_is_more_than_a_softmax_is_not_computed_here(always):
    torch.manual_seed(0)
    soft = {"attn_logit_softcapping": 30.0, "sliding_window": 64, "head_dim": 8}
    capped = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, **soft), attn_implementation="eager").double()
    dropping = model_of("llama", attention_dropout=0.1)
    gpt2 = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=128)  # drops attention by default
    also_dropping = AutoModelForCausalLM.from_config(gpt2, attn_implementation="sdpa").double()
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    sinking = AutoModelForCausalLM.from_config(GptOssConfig(**SMALL, **experts), attn_implementation="eager")
    assert can_pack(sinking)
    assert not can_attend_by_prefix(sinking)
    for model, name in ((capped, "eager"), (dropping, "sdpa"), (also_dropping, "sdpa")):
        assert not can_attend_by_prefix(model)
        found = loss_and_gradients(model.eval(), SINGLE, per_row=4)  # by a mask
        assert_same(model, found, loss_and_gradients(model, SINGLE))
        assert model.config._attn_implementation == name
    layout = pack_rankings([[1, 2]], [np.array([3]), np.array([4])], num_generations=2, per_row=2).layout()
    attention = shared_prefix.ALL_ATTENTION_FUNCTIONS["flexrec_shared_prefix_sdpa"]
    layer = dropping.model.layers[0].self_attn
    qkv = states((1, 4))
    for option in (
        {"dropout": 0.1},
        {"softcap": 30.0},
        {"sliding_window": 2},
        {"s_aux": torch.ones(4)},
        {"indices": 1},
    ):
        with pytest.raises(ValueError, match=f"LlamaAttention attends with {next(iter(option))}.*rankings_per_row=1"):
            attention(layer, *qkv, None, prefix_layout=layout, **option)
    found, _ = attention(layer, *qkv, None, prefix_layout=layout, dropout=0.0, softcap=None, sliding_window=3)
    torch.testing.assert_close(found, shared_prefix_attention(*qkv, layout, 8**-0.5))


def test_a_model_that_passes_nothing_on_is_noticed(always):
    model = model_of("llama")
    batch = loss_and_gradients(model, SINGLE, per_row=4)[0]
    given = attention_inputs(model, batch.tokens)
    del given["prefix_layout"]
    with pytest.raises(ValueError, match=r"LlamaAttention does not get what the forward pass was given.*share_prompts"):
        model(batch.tokens.input_ids, **given)


def test_flash_attention_of_transformers_is_asked_by_its_own_name(always, monkeypatch):
    """A model that was loaded with it shares rows, and for other inputs gets what it got before."""
    seen = []

    def stand_in(module, query, key, value, attention_mask, **options):
        seen.append((module.config._attn_implementation, module.config.hidden_size, module.is_causal, attention_mask))
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(shared_prefix.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", stand_in)
    model = model_of("qwen2")
    expected = loss_and_gradients(model, SINGLE)
    model.config._attn_implementation = "flash_attention_2"
    assert not can_pack(model)
    assert can_pack(model, 20)
    assert sharing(model, PROMPTS, SINGLE, num_generations=4) == 4
    assert_same(model, loss_and_gradients(model, SINGLE, per_row=4), expected)
    assert not seen
    tokens = torch.ones(1, 5, dtype=torch.int64)
    model(tokens, attention_mask=tokens)
    assert seen == [("flash_attention_2", 16, True, None)] * 2


def test_which_costs_less(monkeypatch):
    """Long prompts attend without a mask; of short rows in a narrow model the mask costs less than the calls."""
    asked = []
    real = packing.attend_by_prefix
    monkeypatch.setattr(packing, "attend_by_prefix", lambda *args: asked.append(1) or real(*args))
    model = model_of("llama").float()
    for prompt, answer, expected in ((5, 3, 0), (1500, 30, 1)):
        answers = [np.arange(answer)] * 4
        rows = pack_rankings([[1] * prompt], answers, num_generations=4, per_row=4)
        attention_inputs(model, rows)
        assert len(asked) == expected
    wide = {"hidden_size": 128, "intermediate_size": 384}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | wide))
    asked.clear()
    answers = [np.arange(10)] * 16
    for shortest in (200, 100):  # as the longest, where the mask costs a little less; else its rows are padded
        prompts = [[1] * round(length) for length in np.linspace(200, shortest, 8)]
        attention_inputs(model, pack_rankings(prompts, answers, num_generations=2, per_row=2))
        assert len(asked) == (shortest < 200)
    candidates = [[[i] for i in range(20, 30)]]
    # A mask would have it 8 rankings a row at 1,000 tokens, and fewer at 100.
    assert sharing(model, [[1] * 1000], candidates, num_generations=32) == 32
    assert sharing(model, [[1]], candidates, num_generations=8) < 8


def test_adapters_and_wrappers_pass_the_layout_on(always):
    peft = pytest.importorskip("peft")
    plain = model_of("qwen3")
    expected = loss_and_gradients(plain, TITLES)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    model = peft.get_peft_model(plain, lora).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trained = [p for p in model.parameters() if p.requires_grad]

    def of(per_row):
        rankings = np.stack([np.random.default_rng(n).permutation(4) for n in range(12)])
        sizes = {"num_generations": 4, "rankings_per_row": per_row}
        batch = make_batch(PROMPTS, TITLES, rankings, separator=(40, 41), end=(49,), **sizes)
        scores = ranking_scores(ranking_states(model, batch), batch)
        return scores.logprobs, torch.autograd.grad(scores.logprobs.square().sum(), trained)

    apart, together = of(1), of(4)
    assert plain.config._attn_implementation == "flexrec_shared_prefix_sdpa"
    torch.testing.assert_close(together[0], apart[0], **FLOAT32)
    for ours, theirs in zip(together[1], apart[1], strict=True):
        assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()
    assert not torch.equal(apart[0], expected[1].logprobs)


def test_states_are_float32_in_float32(always):
    model = model_of("llama").float()
    rows = pack_rankings(PROMPTS, [np.array([5, 6])] * 6, num_generations=2, per_row=2)
    with torch.no_grad():
        assert hidden_of_rows(model, rows).dtype == torch.float32
