"""LoRA by the real PEFT: sampling, scoring, training, the reference without a second copy, saving."""

import contextlib
import copy

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from flexrec.decoding import sample as rollouts
from flexrec.decoding.sample import sample_rankings
from flexrec.policy.batch import make_batch
from flexrec.policy.lm_head import output_layer
from flexrec.policy.lora import REFERENCE, add_lora, keep_reference, load_model, reference_policy, save_adapters
from flexrec.policy.scores import ranking_scores, ranking_states
from flexrec.task.examples import Example
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer
from flexrec.trainer.supervised import SupervisedTrainer

VOCAB = 60
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
PROMPTS = [[1, 2, 3, 4, 5], [6, 7]]
SINGLE = [[[10], [11], [12], [13]], [[20], [21], [10]]]
TITLES = [[[10, 11], [10, 12, 13], [10, 12], [14]], [[20], [20, 21], [22, 23, 24]]]
ITEMS = [10, 11, 12, 13, 14]  # token ids of the trainers' candidates
GAINS = np.array([0.0, 1.0, 0.25, 0.0, 0.5], dtype=np.float32)


def make_model(kind="llama"):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        )
    if kind == "qwen2":  # with tied embeddings, as GPT-2
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))


def moved(model, seed=1):
    """The model with adapters as far from their start as training could bring them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def peft_model(kind="llama", **config):
    """Without FlexRec's choices: what a user may bring."""
    config = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return get_peft_model(make_model(kind), LoraConfig(**config))


ADAPTED = {
    "lora": {},
    "trained rows": {"trainable_token_indices": {"model.embed_tokens": ITEMS, "lm_head": ITEMS}},
    "trained copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
}


class Fixed(Dataset):
    """One list again and again, the candidates' order turned by the index."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        order = np.roll(np.arange(len(GAINS)), index)
        return Example(
            prompt=[1, 2, 3, 4],
            candidates=[[ITEMS[i]] for i in order],
            gains=GAINS[order],
            variance=np.zeros_like(GAINS),
            history_span=(1, 3),
            need="interest",
            user=0,
        )


class History(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def of(self, name):
        return [log[name] for log in self.logs if name in log]


def options(folder, steps=4, **more):
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        **more,
    }


def reinforce(model, folder, *, steps=4, beta=0.1, reference=None, resume=False, **more):
    history = History()
    args = FlexRecConfig(**options(folder, steps, **more), num_generations=2, beta=beta)
    trainer = FlexRecTrainer(model, args, Fixed(), reference=reference, callbacks=[history])
    trainer.train(resume_from_checkpoint=resume)
    return history


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_lora_goes_to_the_linear_layers_and_rows_of_new_tokens_to_the_embeddings(kind):
    model = add_lora(make_model(kind), 2, token_ids=ITEMS)
    kinds = {"lora_A", "lora_B", "trainable_tokens_delta"}
    assert all(kinds & set(name.split(".")) for name in trained(model))
    rows = [name for name in trained(model) if "trainable_tokens_delta" in name]
    assert len(rows) == (2 if kind == "llama" else 1), "tied embeddings share their rows"
    layers = {name.split(".lora_A")[0].rpartition(".")[2] for name in trained(model) if "lora_A" in name}
    assert layers == (
        {"c_attn", "c_proj", "c_fc"}
        if kind == "gpt2"
        else {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    )
    few = add_lora(make_model(kind), 4, alpha=6, targets=[sorted(layers)[0]])
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained(few)} == {sorted(layers)[0]}
    config = few.active_peft_config
    assert (config.r, config.lora_alpha) == (4, 6)
    assert model.active_peft_config.lora_alpha == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank of LoRA must be at least 1, got 0"),
        ({"rank": 2, "alpha": 0}, "alpha of LoRA must be at least 1, got 0"),
        ({"rank": 2, "targets": ["query"]}, "no linear layer of the model is called 'query'.*q_proj"),
        ({"rank": 2, "targets": ["lm_head"], "token_ids": ITEMS}, "cannot go to the output layer 'lm_head'"),
    ],
)
def test_wrong_arguments_of_lora_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_lora(make_model(), **arguments)
    with pytest.raises(ValueError, match="cannot go to the output layer"):
        add_lora(make_model("qwen2"), 2, targets=["lm_head"])


@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("candidates", "separator", "end"), [(SINGLE, (), ()), (TITLES, (50, 51), (52,))])
def test_adapted_policy_samples_and_scores_as_the_merged_model(monkeypatch, kind, candidates, separator, end, share):
    monkeypatch.setattr(rollouts, "sharing", lambda *args, **kwargs: share)
    model = moved(add_lora(make_model(kind), 2, token_ids=[*ITEMS, 20, 21])).eval()
    arguments = {"separator": separator, "end": end, "num_generations": 4}
    rollout = sample_rankings(model, PROMPTS, candidates, generator=torch.Generator().manual_seed(1), **arguments)
    batch = make_batch(PROMPTS, candidates, rollout.rankings, rankings_per_row=share, **arguments)
    with torch.no_grad():
        adapted = ranking_scores(ranking_states(model, batch), batch)
        plain = ranking_scores(ranking_states(make_model(kind).eval(), batch), batch)
        merged = ranking_scores(ranking_states(copy.deepcopy(model).merge_and_unload(), batch), batch)
    torch.testing.assert_close(adapted.logprobs, merged.logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(rollout.logprobs), merged.logprobs, atol=2e-5, rtol=0)
    assert (adapted.logprobs - plain.logprobs).abs().max() > 0.05, "the adapters count"


def test_every_stage_trains_the_adapters_alone(tmp_path):
    model = add_lora(make_model(), 2, token_ids=ITEMS)
    names = trained(model)

    def stages():
        for stage in ("format", "listwise"):
            args = TrainingArguments(**options(tmp_path, remove_unused_columns=False))
            yield SupervisedTrainer(model, args, Fixed(), stage=stage).train
        for credit in ("all_actions", "swap"):
            args = FlexRecConfig(**options(tmp_path), credit=credit, num_generations=2)
            yield FlexRecTrainer(model, args, Fixed()).train

    for train in stages():
        before = values(model)
        train()
        changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
        assert changed == names


@pytest.mark.parametrize("adapted", ADAPTED)
def test_output_layer_is_that_of_the_models_logits(adapted):
    """Restricted log-probs and the gradient of every adapter, against the whole vocabulary's logits."""
    model = moved(peft_model(**ADAPTED[adapted]))
    batch = make_batch([PROMPTS[0]], [SINGLE[0]], np.array([[2, 0, 3, 1]]))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = ranking_scores(ranking_states(model, batch), batch).logprobs
    left, expected = [10, 11, 12, 13], []
    logits = model(torch.tensor([[*PROMPTS[0], 12, 10, 13]])).logits[0, -4:]
    for row, token in zip(logits, [12, 10, 13, 11], strict=True):
        expected.append(row[left].log_softmax(0)[left.index(token)])
        left.remove(token)
    torch.testing.assert_close(found[0], torch.stack(expected), atol=1e-5, rtol=0)
    of_found, of_expected = gradients(found.sum()), gradients(torch.stack(expected).sum())
    assert of_found.keys() == of_expected.keys() == trained(model)
    for name, gradient in of_expected.items():
        torch.testing.assert_close(of_found[name], gradient, atol=1e-4, rtol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(output_layer(model)[0], make_model().lm_head.weight, rtol=0, atol=0)


def test_bias_of_an_output_layer_with_trained_rows_is_kept():
    base = make_model()
    base.lm_head = torch.nn.Linear(16, VOCAB, bias=True)
    expected = base.lm_head.bias.detach().clone()
    model = add_lora(base, 2, token_ids=ITEMS)
    torch.testing.assert_close(output_layer(model)[1], expected, rtol=0, atol=0)


@pytest.mark.parametrize("state", ["as it is", "merged", "switched off"])
def test_output_layer_with_adapters_and_a_bias_is_what_the_layer_computes(state):
    base = make_model()
    base.lm_head = torch.nn.Linear(16, VOCAB, bias=True)
    model = moved(get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))).eval()
    if state == "merged":
        model.merge_adapter()
    hidden = torch.randn(5, 16)
    with model.disable_adapter() if state == "switched off" else contextlib.nullcontext():
        weight, bias = output_layer(model)
        torch.testing.assert_close(hidden @ weight.T + bias, model.get_output_embeddings()(hidden))


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_adapters_of_the_output_layer_that_are_no_weight_are_refused(more):
    model = peft_model(target_modules=["lm_head"], **more)
    with pytest.raises(ValueError, match="adapter 'default' of the output layer"):
        output_layer(model.train())
    if "lora_dropout" in more:
        assert output_layer(model.eval())[0].shape == (VOCAB, 16)


def test_virtual_tokens_are_refused():
    """A prefix is no part of the layers: sampling would leave it out, and the ratio would silently not be 1."""
    model = get_peft_model(make_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PREFIX_TUNING change the prompt"):
        sample_rankings(model, PROMPTS, SINGLE)


@pytest.mark.parametrize("adapted", ADAPTED)
def test_reference_is_the_policy_that_training_began_with(tmp_path, adapted):
    """Exactly so at first, and then as an explicit copy of it, for adapters that had been trained before."""
    model = moved(peft_model(**ADAPTED[adapted]))
    explicit, reference = copy.deepcopy(model), copy.deepcopy(model)
    own = reinforce(model, tmp_path)
    copied = reinforce(explicit, tmp_path, reference=reference)
    assert own.of("kl")[0] == 0.0
    assert own.of("kl")[-1] > 1e-3
    np.testing.assert_allclose(own.of("kl"), copied.of("kl"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(own.of("loss"), copied.of("loss"), rtol=0, atol=1e-6)
    after = values(model)
    for name, value in values(explicit).items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


def test_untrained_lora_needs_no_reference_adapter(tmp_path):
    """The model with adapters switched off is the policy that training began with."""
    model = add_lora(make_model(), 2)
    reference = make_model()
    explicit = copy.deepcopy(model)
    own = reinforce(model, tmp_path)
    assert list(model.peft_config) == ["default"]
    assert own.of("kl")[0] == 0.0
    assert own.of("kl")[-1] > 1e-3
    copied = reinforce(explicit, tmp_path, reference=reference)
    np.testing.assert_allclose(own.of("kl"), copied.of("kl"), rtol=0, atol=1e-6)


def test_reference_copies_the_adapters_and_nothing_else():
    model = moved(add_lora(make_model(), 2, token_ids=ITEMS))
    weights = {id(p): p.numel() for p in model.parameters()}
    adapters, names = sum(p.numel() for p in model.parameters() if p.requires_grad), trained(model)
    state = torch.random.get_rng_state()
    keep_reference(model)
    assert torch.equal(state, torch.random.get_rng_state()), "sampling goes on as without a reference"
    added = [p for p in model.parameters() if id(p) not in weights]
    assert sum(p.numel() for p in added) == adapters
    assert not any(p.requires_grad for p in added)
    assert trained(model) == names
    keep_reference(moved(model))
    kept = [p for name, p in model.named_parameters() if REFERENCE in name]
    assert {id(p) for p in kept} == {id(p) for p in added}, "a reference that is there stays"


def test_reference_policy_leaves_the_model_as_it_was():
    model = moved(peft_model(lora_dropout=0.5))
    batch = make_batch(PROMPTS, SINGLE, np.array([[0, 1, 2, 3], [2, 1, 0, -1]]))
    keep_reference(model)
    with torch.no_grad():
        expected = ranking_states(model.eval(), batch).hidden
    frozen = next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)  # a user's choice
    names = trained(moved(model).train())
    with reference_policy(model):
        states = ranking_states(model, batch)
    torch.testing.assert_close(states.hidden, expected, rtol=0, atol=0)
    assert not states.hidden.requires_grad
    with pytest.raises(KeyboardInterrupt), reference_policy(model):
        raise KeyboardInterrupt
    assert model.active_adapter == "default"
    assert model.training
    assert trained(model) == names
    assert not frozen.requires_grad


def test_a_whole_model_needs_a_reference(tmp_path):
    with pytest.raises(ValueError, match="give one as reference=, or train a PEFT model"):
        reinforce(make_model(), tmp_path)


def test_resumed_training_has_the_same_reference(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole, first, second = (moved(add_lora(make_model(), 2, token_ids=ITEMS)) for _ in range(3))
    history = reinforce(whole, tmp_path / "whole", steps=6, **saving)
    reinforce(first, tmp_path / "parts", steps=3, **saving)
    resumed = reinforce(moved(second), tmp_path / "parts", steps=6, resume=True, **saving)
    np.testing.assert_allclose(resumed.of("kl"), history.of("kl")[3:], rtol=0, atol=1e-6)
    for name, value in values(whole).items():
        torch.testing.assert_close(values(second)[name], value, rtol=0, atol=1e-6)


def test_saved_adapters_load_on_their_model(tmp_path):
    base = make_model()
    base.save_pretrained(tmp_path / "model")
    tokenizer = list(range(VOCAB))
    model = moved(add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), 2, token_ids=ITEMS))
    keep_reference(model)
    save_adapters(model, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert REFERENCE not in names
    loaded = load_model(tmp_path / "run", tokenizer)
    tokens = torch.tensor([[1, 10, 11]])
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    assert not trained(loaded)
    assert trained(load_model(tmp_path / "run", tokenizer, trainable=True)) == trained(model)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"run holds adapters of the model .*model', which cannot be loaded"):
        load_model(tmp_path / "run", tokenizer)
    moved_model = load_model(tmp_path / "run", tokenizer, backbone=tmp_path / "elsewhere")
    torch.testing.assert_close(moved_model(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_old_peft_is_told_apart(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    with pytest.raises(ImportError, match=r"needs peft 0\.19\.0 or newer, got 0\.18\.1"):
        add_lora(make_model(), 2)
