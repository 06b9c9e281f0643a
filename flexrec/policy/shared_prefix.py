"""Attention of rows in which the rankings of a prompt follow one copy of it, without a mask and without waste.

In such rows (:mod:`flexrec.policy.packing`) a prompt's tokens attend to one another, once; a ranking's tokens attend to
the whole prompt, for which no mask is needed, and to one another. The two parts of a ranking's attention are merged by
their log-sum-exps,

    l = log(exp l1 + exp l2),  o = exp(l1 - l) o1 + exp(l2 - l) o2,

and attention between rankings is never computed: P^2 / 2 + G A (P + A / 2) products for G rankings of A tokens behind a
prompt of P, where a mask over the row takes (P + G A)^2. In the backward pass each part is asked for its gradients with
the merged o and l in place of its own. As exp(score - l) is then the weight that the token really had, and grad o . o
the sum that the softmax takes off, the sum of the parts' gradients is that of the whole.

The parts are computed by the flash kernels of torch: on a CPU its own, on a GPU flash-attention 2, or 3 or 4 after
``torch.nn.attention.activate_flash_attention_impl("FA4")`` where their packages are installed.

The attention is registered with transformers, once for each implementation that a model may have been loaded with. A
model is switched over when its first shared rows come (:func:`attend_by_prefix`) and stays so: its checkpoints in the
backward pass attend once more as the forward pass did. Calls without a layout go to what the model was loaded with.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexrec.policy.lora import causal_lm, text_config

_NAME = "flexrec_shared_prefix_"
BASES = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward
# Whether the CPU's kernel takes fewer heads of keys than of queries.
_CPU_GROUPS = Version(torch.__version__) >= Version("2.13")
# What attention may be given that makes it more than a softmax of products: transformers' own names.
_MORE_THAN_A_SOFTMAX = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")


class _Block(NamedTuple):
    """Prompts that lie in rows next to one another, at the same columns, with as many tokens of rankings behind."""

    rows: slice
    prompt: slice  # columns
    rankings: slice


class PrefixLayout:
    """Where in (B, L) rows prompts and rankings lie: what the attention of every layer needs.

    Args:
        shape: (B, L).
        row, prompt_start, prompt_length, answer_start, answer_length: (N,) int64, of each ranking, in the order in
            which :func:`flexrec.policy.packing.pack_rankings` lays them out.
        device: of the model's inputs.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        row: np.ndarray,
        prompt_start: np.ndarray,
        prompt_length: np.ndarray,
        answer_start: np.ndarray,
        answer_length: np.ndarray,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = shape
        width = shape[1]
        order = np.lexsort((answer_start, row))
        row, prompt_start, prompt_length = row[order], prompt_start[order], prompt_length[order]
        answer_start, answer_length = answer_start[order], answer_length[order]
        self.longest = int((prompt_length + answer_length).max(initial=0))
        first = np.ones(len(row), dtype=bool)  # of its prompt
        first[1:] = (np.diff(row) != 0) | (np.diff(prompt_start) != 0)
        behind = np.add.reduceat(answer_length, np.flatnonzero(first)) if len(row) else answer_length
        units = np.stack([row[first], prompt_start[first], prompt_length[first], behind], axis=1)
        self.blocks = tuple(_blocks(units))

        starts = row * width + answer_start
        answers = _ranges(starts, answer_length)  # of the B * L columns, one ranking's after the other's
        self.answers = torch.from_numpy(answers).to(device)
        self.padded = int(prompt_length[first].sum() + len(answers)) < shape[0] * width
        # Side by side they are padded by their own last token, whose score no log-sum-exp is smaller than.
        some = answer_length > 0
        size = int(answer_length.max(initial=0))
        steps = np.minimum(np.arange(size), answer_length[some, None] - 1)
        self.side_by_side = torch.from_numpy(starts[some, None] + steps).to(device)  # (rankings, longest)
        real = np.arange(size) < answer_length[some, None]
        self.real = None if real.all() else torch.from_numpy(np.flatnonzero(real)).to(device)

        self.prompts = torch.from_numpy(_ranges(units[:, 0] * width + units[:, 1], units[:, 2])).to(device)
        self.prompt_ends, self.longest_prompt = _ends(units[:, 2], device)
        self.behind_ends, self.most_behind = _ends(units[:, 3], device)
        self.answer_ends, self.longest_answer = _ends(answer_length, device)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) + np.repeat(starts - ends + lengths, lengths)


def _ends(lengths: np.ndarray, device: torch.device | str) -> tuple[Tensor, int]:
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return torch.from_numpy(ends).to(device), int(lengths.max(initial=0))


def _blocks(units: np.ndarray) -> Iterator[_Block]:
    """``units`` (prompts, 4): row, column, length, tokens of rankings behind."""
    new = np.ones(len(units), dtype=bool)
    new[1:] = (np.diff(units[:, 0]) != 1) | (np.diff(units[:, 1:], axis=0) != 0).any(axis=1)
    for i, j in pairwise([*np.flatnonzero(new), len(units)]):
        row, start, length, behind = units[i].tolist()
        middle = start + length
        yield _Block(slice(row, row + int(j - i)), slice(start, middle), slice(middle, middle + behind))


# --- the attention ----------------------------------------------------------------------------------------------------


def shared_prefix_attention(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
    """(B, L, H, D) what each token of a row sees of its own prompt and its own ranking; 0 at padding.

    Args:
        query: (B, H, L, D); on a GPU float16 or bfloat16.
        key, value: (B, H', L, D), H' a divisor of H.
        scale: of the scores.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    states = [x.transpose(1, 2) for x in (query, key, value)]  # as they lie in memory: (B, L, H, D)
    if not _CPU_GROUPS and query.device.type == "cpu" and key.shape[1] < query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        states[1:] = [x.repeat_interleave(groups, dim=2) for x in states[1:]]
    parts = _OnCpu if query.device.type == "cpu" else _OnGpu
    return parts.apply(*states, layout, scale)


def merged(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of one attention (.., D) and their log-sum-exps (..) as the whole, and its own."""
    share = torch.sigmoid(l2 - l1).unsqueeze(-1)
    return torch.lerp(o1.to(share.dtype), o2.to(share.dtype), share).to(o1.dtype), torch.logaddexp(l1, l2)


class _OnCpu(torch.autograd.Function):
    """The parts one after another: prompts and what is behind them by blocks, rankings side by side."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
        out = q.new_zeros(q.shape) if layout.padded else q.new_empty(q.shape)
        sums, first = [], []
        for rows, prompt, rankings in layout.blocks:
            keys = _heads_first(k[rows, prompt]), _heads_first(v[rows, prompt])
            o, lse = _flash_on_cpu(_heads_first(q[rows, prompt]), *keys, 0.0, True, scale=scale)
            out[rows, prompt] = o.transpose(1, 2)
            sums.append(lse)
            if rankings.stop > rankings.start:
                o, lse = _flash_on_cpu(_heads_first(q[rows, rankings]), *keys, 0.0, False, scale=scale)
                first.append((o.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)))
        lse = None
        if first:
            aside = [_heads_first(_taken(x, layout.side_by_side)) for x in (q, k, v)]
            second = [x.transpose(1, 2).flatten(0, 1) for x in _flash_on_cpu(*aside, 0.0, True, scale=scale)]
            if layout.real is not None:
                second = [x.index_select(0, layout.real) for x in second]
            o, lse = merged(*(torch.cat(x) for x in zip(*first, strict=True)), *second)
            out.view(-1, *out.shape[2:]).index_copy_(0, layout.answers, o)
        ctx.save_for_backward(q, k, v, out, lse, *sums)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *sums = ctx.saved_tensors
        layout, scale, grad = ctx.layout, ctx.scale, grads[0].contiguous()
        new = torch.zeros if layout.padded else torch.empty
        dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))

        def part(g: Tensor, q: Tensor, kv: list[Tensor], o: Tensor, lse: Tensor, causal: bool) -> list[Tensor]:
            first = (_heads_first(x) for x in (g, q, *kv, o))
            return [x.transpose(1, 2) for x in _flash_on_cpu_backward(*first, lse, 0.0, causal, scale=scale)]

        if lse is not None:
            aside = [_taken(x, layout.side_by_side) for x in (grad, q, k, v, out)]
            of_aside = lse
            if layout.real is not None:  # at padding: no gradient, and any log-sum-exp that is not too small
                size = layout.side_by_side.numel()
                gradient = torch.zeros_like(aside[0]).flatten(0, 1)
                gradient[layout.real] = aside[0].flatten(0, 1)[layout.real]
                aside[0] = gradient.view(aside[0].shape)
                of_aside = lse.new_full((size, lse.shape[1]), torch.inf).index_copy_(0, layout.real, lse)
            of_aside = of_aside.view(*layout.side_by_side.shape, -1).transpose(1, 2).contiguous()
            g, qa, ka, va, oa = aside
            for whole, some in zip((dq, dk, dv), part(g, qa, [ka, va], oa, of_aside, True), strict=True):
                some = some.flatten(0, 1)
                some = some if layout.real is None else some.index_select(0, layout.real)
                whole.view(-1, *whole.shape[2:]).index_copy_(0, layout.answers, some)
        at = 0
        for (rows, prompt, rankings), of_prompt in zip(layout.blocks, sums, strict=True):
            kv = [k[rows, prompt], v[rows, prompt]]
            dqp, dkp, dvp = part(grad[rows, prompt], q[rows, prompt], kv, out[rows, prompt], of_prompt, True)
            dq[rows, prompt] = dqp
            behind = rankings.stop - rankings.start
            if behind:
                size = (rows.stop - rows.start) * behind
                of_behind = lse[at : at + size].unflatten(0, (-1, behind)).transpose(1, 2).contiguous()
                at += size
                where = rows, rankings
                dqr, dkr, dvr = part(grad[where], q[where], kv, out[where], of_behind, False)
                dq[where] += dqr
                dkp, dvp = dkp + dkr, dvp + dvr
            dk[rows, prompt], dv[rows, prompt] = dkp, dvp
        return dq, dk, dv, None, None


class _OnGpu(torch.autograd.Function):
    """The parts of all rows in one call each, by kernels that take sequences of any lengths behind one another."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
        out = q.new_zeros(q.shape) if layout.padded else q.new_empty(q.shape)
        flat = out.view(-1, *out.shape[2:])
        (qp, kp, vp), (qa, ka, va) = ([_taken(x, at) for x in (q, k, v)] for at in (layout.prompts, layout.answers))
        states: list[Tensor] = []
        for part, causal in _sequences(layout):
            query = qp if part == 0 else qa
            keys = (ka, va) if part == 2 else (kp, vp)
            o, lse, rng, unused, _ = _flash(query, *keys, *causal[:-1], 0.0, causal[-1], False, scale=scale)
            states += [o, lse, rng, unused]
        flat.index_copy_(0, layout.prompts, states[0])
        lse = states[1]
        if len(states) > 4:
            o, lse = merged(states[4], states[5].T, states[8], states[9].T)
            flat.index_copy_(0, layout.answers, o)
            lse = lse.T.contiguous()
        noise = [x for i, x in enumerate(states) if i % 4 > 1]
        ctx.save_for_backward(q, k, v, out, states[1], lse, *noise)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, of_prompts, of_answers, *noise = ctx.saved_tensors
        layout = ctx.layout
        whole = grads[0].contiguous(), q, k, v, out
        at_prompts, at_answers = ([_taken(x, at) for x in whole] for at in (layout.prompts, layout.answers))
        parts: list[tuple[Tensor, ...]] = []
        for part, causal in _sequences(layout):
            g, query, _, _, o = at_prompts if part == 0 else at_answers
            _, _, *keys, _ = at_answers if part == 2 else at_prompts
            lse = of_prompts if part == 0 else of_answers
            arguments = g, query, *keys, o, lse, *causal[:-1], 0.0, causal[-1], *noise[2 * part : 2 * part + 2]
            parts.append(_flash_backward(*arguments, scale=ctx.scale))
        gradients = []
        for i, x in enumerate((q, k, v)):
            gradient = x.new_zeros(x.shape) if layout.padded else x.new_empty(x.shape)
            flat = gradient.view(-1, *gradient.shape[2:])
            if len(parts) == 1:
                flat.index_copy_(0, layout.prompts, parts[0][i])
            else:
                behind = parts[1][i]  # of the answers' queries, and of the prompts' keys and values
                flat.index_copy_(0, layout.prompts, parts[0][i] if i == 0 else parts[0][i] + behind)
                flat.index_copy_(0, layout.answers, parts[2][i] + behind if i == 0 else parts[2][i])
            gradients.append(gradient)
        return (*gradients, None, None)


def _sequences(layout: PrefixLayout) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Each part's number, and the kernel's ends of queries and keys, the longest of both, and whether it is causal."""
    prompt, behind = (layout.prompt_ends, layout.longest_prompt), (layout.behind_ends, layout.most_behind)
    yield 0, (prompt[0], prompt[0], prompt[1], prompt[1], True)
    if layout.most_behind:
        yield 1, (behind[0], prompt[0], behind[1], prompt[1], False)
        answer = layout.answer_ends, layout.longest_answer
        yield 2, (answer[0], answer[0], answer[1], answer[1], True)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _taken(x: Tensor, columns: Tensor) -> Tensor:
    """``x`` (B, L, H, D) at ``columns`` (..) of its B * L: (.., H, D)"""
    return x.flatten(0, 1).index_select(0, columns.flatten()).view(*columns.shape, *x.shape[2:])


# --- what transformers calls ------------------------------------------------------------------------------------------


def base_attention(model: Any) -> str | None:
    """The attention that a model was loaded with."""
    name = getattr(text_config(model), "_attn_implementation", None)
    return name.removeprefix(_NAME) if isinstance(name, str) else name


def can_attend_by_prefix(model: Any) -> bool:
    """Whether a model's attention can be computed here: none that bends, drops or adds to its scores, and kernels."""
    config, parameter = text_config(model), next(model.parameters())
    return (
        base_attention(model) in BASES
        # passes on what its attention is given
        and bool(getattr(causal_lm(model), "_supports_attention_backend", False))
        and not _dropout(config)
        and getattr(config, "attn_logit_softcapping", None) is None
        and getattr(config, "is_causal", True)
        and not getattr(config, "use_bidirectional_attention", False)
        and not getattr(config, "alibi", False)
        and getattr(config, "v_head_dim", None) is None  # values narrower than keys
        and not any(name.endswith("sinks") for name, _ in causal_lm(model).named_parameters())
        and (parameter.device.type == "cpu" or _gpu_attends(parameter, config))
    )


def _gpu_attends(parameter: Tensor, config: Any) -> bool:
    if parameter.device.type != "cuda":
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else parameter.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return kernels_agree(parameter.device, dtype, getattr(config, "num_key_value_heads", None) or heads, size)


@functools.cache
@torch.inference_mode(False)
def kernels_agree(device: torch.device, dtype: torch.dtype, key_heads: int, size: int) -> bool:
    """Whether a GPU's kernels are there, and give for some small rows what attention by a mask gives."""
    lengths = np.array([3, 1, 2, 4])
    starts = np.array([5, 8, 2, 4])
    layout = PrefixLayout(
        (2, 9), np.array([0, 0, 1, 1]), np.zeros(4, np.int64), np.array([5, 5, 2, 2]), starts, lengths, device
    )
    seen = torch.ones(9, 9, dtype=torch.bool, device=device).tril().repeat(2, 1, 1)
    seen[0, 8:, 5:8] = seen[1, 4:, 2:4] = seen[1, :, 8:] = False
    seen[1, 8] = seen[1, 7]  # padding, which would see nothing
    real = torch.ones(2, 9, 1, 1, device=device)
    real[1, 8] = 0
    noise = torch.Generator().manual_seed(0)
    shapes = (2, 2 * key_heads, 9, size), *[(2, key_heads, 9, size)] * 2
    qkv = [torch.randn(shape, generator=noise).to(device, dtype).requires_grad_() for shape in shapes]
    grad = torch.randn(2, 9, 2 * key_heads, size, generator=noise).to(device)
    whole = [x.detach().float().requires_grad_() for x in qkv]
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            found = shared_prefix_attention(qkv[0], qkv[1], qkv[2], layout, size**-0.5)
            k, v = (x.repeat_interleave(2, dim=1) for x in whole[1:])
            expected = scaled_dot_product_attention(whole[0], k, v, attn_mask=seen[:, None]).transpose(1, 2) * real
            ours = found, *torch.autograd.grad(found, qkv, grad.to(dtype))
            theirs = expected, *torch.autograd.grad(expected, whole, grad)
        off = [(a - b).detach().abs().max() / b.detach().abs().max() for a, b in zip(ours, theirs, strict=True)]
        worst = float(torch.stack(off).max())
        problem = f"is off by {worst:.0%} of the largest value" if not worst < 0.05 else None  # also where it is NaN
    except (RuntimeError, TypeError, ValueError) as error:
        problem = f"fails ({str(error).splitlines()[0]})"
    if problem is not None:
        warnings.warn(
            f"torch's flash attention {problem} on {device} in {dtype} with heads of {size}: rankings that share a "
            f"prompt attend by a mask",
            stacklevel=2,
        )
    return problem is None


def _dropout(config: Any) -> bool:
    """Of attention, whatever the model calls it: attention_dropout, attn_pdrop, attention_probs_dropout_prob .."""
    return any(
        value for name, value in vars(config).items() if name.startswith(("attn", "attention")) and "drop" in name
    )


def attend_by_prefix(model: Any, layout: PrefixLayout) -> dict[str, Any]:
    """What to give to the forward pass of a model beside its tokens and their positions, for rows of ``layout``.

    From then on the model's attention is the one registered here, which does for all other inputs what it did before.
    """
    config, base = text_config(model), base_attention(model)
    if config._attn_implementation != f"{_NAME}{base}":
        config._attn_implementation = f"{_NAME}{base}"
    parameter = next(model.parameters())
    # A mask of four dimensions is passed on as it is. Of this one nobody could make a row's by mistake.
    none = torch.empty(layout.shape[0], 1, 0, 0, dtype=parameter.dtype, device=parameter.device)
    return {"attention_mask": none, "prefix_layout": layout}


def _attention_for(base: str) -> Callable[..., Any]:
    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        prefix_layout: PrefixLayout | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if prefix_layout is None:
            if attention_mask is not None and attention_mask.ndim == 4 and attention_mask.shape[-1] == 0:
                raise ValueError(
                    f"{type(module).__name__} does not get what the forward pass was given, so that rankings cannot "
                    f"share a row: set share_prompts=False, or rankings_per_row=1"
                )
            return _base_attention(base, module)(module, query, key, value, attention_mask, **options)
        _check_options(module, options, prefix_layout)
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        return shared_prefix_attention(query, key, value, prefix_layout, scale), None

    return attention


def _check_options(module: Any, options: dict[str, Any], layout: PrefixLayout) -> None:
    window = options.get("sliding_window")
    unknown = [name for name in _MORE_THAN_A_SOFTMAX if options.get(name) is not None]
    unknown += ["dropout"] if options.get("dropout") else []
    unknown += [f"sliding_window={window}"] if window is not None and window < layout.longest else []
    if unknown:
        raise ValueError(
            f"{type(module).__name__} attends with {', '.join(unknown)}, which rankings that share a prompt of rows "
            f"of {layout.longest} tokens cannot: set share_prompts=False, or rankings_per_row=1"
        )


def _base_attention(base: str, module: Any) -> Callable[..., Any]:
    """What transformers would have called."""
    if base == "eager":
        return inspect.getattr_static(sys.modules[type(module).__module__], "eager_attention_forward")
    function = ALL_ATTENTION_FUNCTIONS[base]
    if not base.startswith("flash"):
        return function

    def flash(module: Any, *args: Any, **options: Any) -> Any:
        return function(_LoadedWith(module, base), *args, **options)

    return flash


class _LoadedWith:
    """A module, for a function that reads the name of the attention from its configuration."""

    def __init__(self, module: Any, base: str) -> None:
        self._module, self.config = module, _ConfigWith(module.config, base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _ConfigWith:
    def __init__(self, config: Any, base: str) -> None:
        self._config, self._attn_implementation = config, base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


for _base in BASES:
    AttentionInterface.register(f"{_NAME}{_base}", _attention_for(_base))
    if _base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(f"{_NAME}{_base}", ALL_MASK_ATTENTION_FUNCTIONS[_base])
