"""The last hidden state of a language model and its output layer: all that restricted distributions are made of.

Logits of the whole vocabulary are never computed: a distribution over a few tokens needs a few rows of the layer.

Some models change their logits behind the layer. A factor (Cohere, Granite, Falcon-H1) is put on the states that
:func:`last_hidden` returns. A soft cap c (Gemma 2 and 4), c tanh(logit / c), bends each logit by itself, so that
whoever makes logits asks for it by :func:`soft_cap`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from flexrec.policy.distributed import gather_layer
from flexrec.policy.lora import causal_lm
from flexrec.policy.packing import TokenRows, attention_inputs
from flexrec.policy.row_tokens import RowTokens, summed_inputs
from flexrec.profiling import span

# What models multiply their logits by, and what they divide them by, as their configurations call it.
_FACTORS, _DIVISORS = ("logit_scale", "lm_head_multiplier", "output_multiplier"), ("logits_scaling",)


def last_hidden(model: Any, *, table: RowTokens | None = None, **inputs: Any) -> Tensor:
    """(B, L, D) states that enter the output layer, times what the model multiplies its logits by; the layer itself
    computes nothing.

    The call goes through ``model`` as a whole, so that who has laid a hand on it sees its forward pass: DDP, FSDP,
    DeepSpeed, the mixed precision of accelerate. Of its layers the last one's states alone are kept.

    Args:
        table: what the "input_ids" number, where they are not tokens themselves.
        inputs: of the model's forward pass, "input_ids" (B, L) among them.
    """
    inner = causal_lm(model)
    states: list[Tensor] = []

    def keep(layers: Any, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    def put_out(inner: Any, args: Any, output: Any) -> None:
        output["hidden_states"] = (states.pop(),)

    # The first hook of the whole: wrappers look for what they must follow back in what the pass returns.
    hooks = inner.base_model.register_forward_hook(keep), inner.register_forward_hook(put_out, prepend=True)
    try:
        none = torch.empty(0, dtype=torch.int64, device=inputs["input_ids"].device)
        with summed_inputs(inner.get_input_embeddings(), table):
            hidden = model(**inputs, logits_to_keep=none).hidden_states[-1]
    finally:
        for hook in hooks:
            hook.remove()
    factor = _logit_factor(inner)
    return hidden if factor == 1 else hidden * factor


def hidden_of_rows(model: Any, rows: TokenRows) -> Tensor:
    """(B, L, D) states of ``rows``, which may hold several rankings each; differentiable."""
    inputs = attention_inputs(model, rows)
    with span("forward"):
        return last_hidden(model, table=rows.table, input_ids=rows.input_ids, use_cache=False, **inputs)


def output_layer(model: Any) -> tuple[Tensor, Tensor | None]:
    """The output embedding (V, D), its adapters included, and its bias (V,) or None; differentiable.

    Where parameters are spread over processes it is gathered: all processes call this together, after their forward
    pass.

    Raises:
        ValueError: the layer's adapters make no such weight (LoRA with dropout, say).
    """
    outer, model = getattr(model, "module", model), causal_lm(model)
    layer = model.get_output_embeddings()
    is_spread = gather_layer(outer, layer)
    weight, bias = _weight_and_bias(layer)
    if is_spread and (not torch.is_grad_enabled() or weight.device.type == "cpu"):
        # States without gradients may be kept for longer than the layer stays whole; and the memory of what NumPy has
        # read, as kernels on the CPU do, could not be given back.
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    factor = _logit_factor(model)
    return weight, bias if bias is None or factor == 1 else bias * factor


def soft_cap(model: Any) -> float | None:
    """What the model's logits stay below in size, c in c tanh(logit / c); None where they are not bent."""
    cap = getattr(causal_lm(model).config.get_text_config(), "final_logit_softcapping", None)
    return None if cap is None else float(cap)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """The logits as the model has them."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _logit_factor(model: Any) -> float:
    config, factor = model.config.get_text_config(), 1.0
    for name in _FACTORS:
        factor *= getattr(config, name, None) or 1.0
    for name in _DIVISORS:
        factor /= getattr(config, name, None) or 1.0
    return factor


def _weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """(V, D) and (V,) or None: what an output layer multiplies by and adds, its adapters included; differentiable.

    LoRA of the output layer makes the whole W + B A alpha / r anew by every call: (V, D) numbers, and as many of their
    gradient.

    Raises:
        ValueError: adapters with which the layer is no such product, or not always the same.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
        bias = getattr(layer, "bias", None)
        if bias is None:  # PEFT's layers of which some rows are trained give the weight, but not the bias
            bias = getattr(getattr(layer, "original_module", None), "bias", None)
        return layer.weight, bias
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its forward pass does
    base = layer.get_base_layer()
    if layer.disable_adapters or layer.merged:
        return base.weight, getattr(base, "bias", None)
    if not isinstance(layer, peft.tuners.lora.Linear):
        raise ValueError(
            f"the output layer is adapted by {type(layer).__module__}.{type(layer).__name__}, whose weight restricted "
            f"log-probs cannot read: adapt other layers, or this one by LoRA"
        )
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in active:
        dropout = layer.lora_dropout[name]
        if layer.lora_variant.get(name) or layer.lora_bias.get(name) or (layer.training and getattr(dropout, "p", 0)):
            raise ValueError(
                f"the adapter {name!r} of the output layer has dropout, a bias, or is a variant of LoRA (DoRA ..): "
                f"restricted log-probs need plain LoRA there, or none"
            )
    weight = base.weight
    for name in active:
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight, getattr(base, "bias", None)
