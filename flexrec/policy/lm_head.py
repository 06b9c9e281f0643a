"""The last hidden state of a language model and its output layer: all that restricted distributions are made of.

Logits of the whole vocabulary are never computed: a distribution over a few tokens needs a few rows of the layer.

Some models change their logits behind the layer, or the states before it. A factor (Cohere, Granite, Falcon-H1) is put
on the states that :func:`last_hidden` returns. A soft cap c (Gemma 2 and 4), c tanh(logit / c), bends each logit by
itself, so that whoever makes logits asks for it by :func:`soft_cap`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from flexrec.policy.distributed import gather_layer
from flexrec.policy.lora import causal_lm, text_config
from flexrec.policy.packing import TokenRows, attention_inputs
from flexrec.policy.row_tokens import RowTokens, summed_inputs
from flexrec.profiling import span

# What models multiply their logits by, and what they divide them by, as their configurations call it.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_MULTIPLIED_BY_DIVISORS = ("hyperclovax",)  # kinds that multiply by what Granite, under the same name, divides by
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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
        if isinstance(found := getattr(output, "last_hidden_state", None), Tensor):
            states.append(found)

    def put_out(inner: Any, args: Any, output: Any) -> None:
        output["hidden_states"] = (states.pop(),)

    # The first hook of the whole: wrappers look for what they must follow back in what the pass returns.
    hooks = [layers.register_forward_hook(keep) for layers in _under_the_head(inner)]
    hooks.append(inner.register_forward_hook(put_out, prepend=True))
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
        ValueError: the layer's adapters make no such weight (LoRA with dropout, say), or it is the last of a head that
            has others (BERT's, ModernBERT's).
    """
    outer, model = getattr(model, "module", model), causal_lm(model)
    layer = model.get_output_embeddings()
    _check_head(model, layer)
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
    config = text_config(model)
    found = [cap for cap in (getattr(config, name, None) for name in _CAPS) if cap is not None]
    return float(found[0]) if found else None


def wide(x: Tensor) -> Tensor:
    """What logits are computed from: float32, or float64 where that is given."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """The logits as the model has them."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _under_the_head(model: Any) -> list[torch.nn.Module]:
    """Whose output the layer is given: that of the last of them to be called."""
    base = model.base_model if model.base_model is not model else model.model  # Llama 4 calls its own another name
    decoder = getattr(base, "decoder", None)  # which OPT calls itself, past the model that holds it
    return [base, decoder] if isinstance(decoder, torch.nn.Module) else [base]


def _check_head(model: Any, layer: Any) -> None:
    """Raise where the output layer does not read what is under the head, but what more of the head has made of it."""
    own, embedding = set(layer.modules()), model.get_input_embeddings()
    for name, head in model.named_children():
        parts = list(head.modules())
        if embedding in parts or (name != "lm_head" and layer not in parts):
            continue
        others = [part for part in parts if part not in own and layer not in part.modules()]
        if any(next(part.parameters(), None) is not None for part in others):
            raise ValueError(
                f"the output layer of {type(model).__name__} is not all of its head, a {type(head).__name__}, and what "
                f"comes before it restricted log-probs cannot read: use a model whose head is a single layer"
            )


def _logit_factor(model: Any) -> float:
    config, factor = model.config.get_text_config(), 1.0
    multiplied = config.model_type in _MULTIPLIED_BY_DIVISORS
    for name in (*_FACTORS, *(_DIVISORS if multiplied else ())):
        factor *= getattr(config, name, None) or 1.0
    for name in () if multiplied else _DIVISORS:
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
