"""The last hidden state and the output layer: what a model's logits are made of, whoever has laid a hand on it."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from flexrec.policy.lm_head import last_hidden, output_layer
from flexrec.policy.lora import add_lora

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def make_model(kind="llama"):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).eval()
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()
    return add_lora(model, 2) if kind == "lora" else model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
def test_states_and_layer_make_the_models_logits(kind):
    model = make_model(kind)
    hidden = last_hidden(model, input_ids=TOKENS, attention_mask=MASK, use_cache=False)
    weight, bias = output_layer(model)
    logits = model(input_ids=TOKENS, attention_mask=MASK).logits
    torch.testing.assert_close(hidden @ weight.T + (0 if bias is None else bias), logits)
    assert hidden.requires_grad
    with torch.no_grad():
        assert not last_hidden(model, input_ids=TOKENS).requires_grad
    assert not [module for module in model.modules() if module._forward_hooks], "nothing is left behind"


def test_a_forward_pass_that_was_replaced_is_taken(monkeypatch):
    """Mixed precision of accelerate puts its own in the place of the model's, which its layers know nothing of."""
    model, calls = make_model(), []
    forward = model.forward

    def replaced(**inputs):
        calls.append(inputs)
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", replaced)
    last_hidden(model, input_ids=TOKENS, attention_mask=MASK)
    (inputs,) = calls
    assert inputs["logits_to_keep"].numel() == 0
    assert inputs["attention_mask"] is MASK
    assert "output_hidden_states" not in inputs, "the states of all layers"


def test_a_wrapper_sees_the_pass():
    """With the states in what it returns: DDP takes a parameter for unused that nothing there leads back to."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.seen = []

        def forward(self, **inputs):
            output = self.module(**inputs)
            self.seen.append(output.hidden_states)
            return output

    wrapped = Wrapper(make_model())
    hidden = last_hidden(wrapped, input_ids=TOKENS)
    ((state,),) = wrapped.seen
    assert state is hidden
    assert output_layer(wrapped)[0] is wrapped.module.lm_head.weight


def test_a_pass_that_fails_leaves_nothing_behind():
    model = make_model()
    with pytest.raises(IndexError):
        last_hidden(model, input_ids=torch.tensor([[1000]]))
    assert not [module for module in model.modules() if module._forward_hooks]
