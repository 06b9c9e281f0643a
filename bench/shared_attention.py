"""Attention alone behind a shared prompt, by every exact way that torch has on a CPU: for training, and for decoding.

Part of bench/shared_prefix.py. One row, or a few of them, 4 heads of 32 in float32, one thread; ways take turns, and of
each the least time of the processor is kept. All are checked against a mask over the row before they are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from flexrec.policy.packing import attention_mask, pack_rankings
from flexrec.policy.shared_prefix import merged, shared_prefix_attention

HEADS, SIZE = 4, 32
# prompt, rankings, tokens each
TRAINING = ((100, 8, 30), (500, 8, 30), (500, 32, 30), (500, 8, 150), (2000, 8, 30), (4000, 8, 30))
# rows, prompt, rankings in a row, tokens of each so far
DECODING = tuple(
    (rows, prompt, rankings, step)
    for rows, prompt, rankings, steps in (
        (8, 150, 8, 30),
        (8, 500, 8, 30),
        (8, 500, 32, 30),
        (8, 500, 8, 150),
        (3, 2000, 8, 30),
    )
    for step in (steps // 2, steps - 1)
)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def training(prompt: int, rankings: int, tokens: int) -> dict[str, float]:
    """Seconds of a forward and backward pass over a row."""
    answers = [np.full(tokens, 1)] * rankings
    rows = pack_rankings([[1] * prompt], answers, num_generations=rankings, per_row=rankings)
    seen, layout = attention_mask(rows, "sdpa", torch.float32), rows.layout()
    own = torch.ones(tokens, prompt + tokens, dtype=torch.bool).tril(prompt)
    qkv = _states(1, rows.input_ids.shape[1])
    apart = _states(rankings, prompt + tokens)
    grad = _states(1, rows.input_ids.shape[1])[0].detach()
    grad_apart = _states(rankings, prompt + tokens)[0].detach()

    def aside(x: Tensor) -> Tensor:
        return x[0, :, prompt:].unflatten(1, (rankings, tokens)).transpose(0, 1)

    def behind(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :prompt].expand(rankings, -1, -1, -1), aside(x)], 2)

    def of_prompt() -> Tensor:
        return sdpa(*(x[:, :, :prompt] for x in qkv), is_causal=True)

    def copied() -> Tensor:
        q, k, v = qkv
        out = sdpa(aside(q), behind(k), behind(v), attn_mask=own)
        return torch.cat([of_prompt(), out.transpose(0, 1).flatten(1, 2)[None]], 2)

    def rankings_by_mask() -> Tensor:
        q, k, v = qkv
        return torch.cat([of_prompt(), sdpa(q[:, :, prompt:], k, v, attn_mask=seen[:, :, prompt:])], 2)

    def in_parts() -> Tensor:
        q, k, v = qkv
        return shared_prefix_attention(q, k, v, layout, SIZE**-0.5).transpose(1, 2)

    def by_mask() -> Tensor:
        return sdpa(*qkv, attn_mask=seen)

    ways = {"mask": by_mask, "parts": in_parts, "copied": copied, "rankings_by_mask": rankings_by_mask}
    expected = by_mask()
    for way in ways.values():
        torch.testing.assert_close(way(), expected, rtol=1e-4, atol=1e-5)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda way=way: torch.autograd.grad(way(), qkv, grad) for name, way in ways.items()
    }
    calls["row_each"] = lambda: torch.autograd.grad(sdpa(*apart, is_causal=True), apart, grad_apart)
    return _least(calls, 3 if prompt >= 2000 else 9)


@torch.no_grad()
def decoding(rows: int, prompt: int, rankings: int, step: int) -> dict[str, float]:
    """Seconds of a step, in which every ranking of each row is fed a token behind ``step`` of its own."""
    q = _states(rows, rankings)[0]
    _, k, v = _states(rows, prompt + rankings * step)
    of_ranking = torch.arange(rankings).repeat_interleave(step) == torch.arange(rankings)[:, None]
    seen = torch.cat([torch.ones(rankings, prompt, dtype=torch.bool), of_ranking], 1).expand(rows, 1, -1, -1)
    own = [x[:, :, prompt:].unflatten(2, (rankings, step)).transpose(1, 2).flatten(0, 1).contiguous() for x in (k, v)]

    def parts() -> Tensor:
        o1, l1 = _flash(q, k[:, :, :prompt], v[:, :, :prompt])
        o2, l2 = _flash(q.transpose(1, 2).reshape(rows * rankings, HEADS, 1, SIZE), *own)
        o2, l2 = (x.reshape(rows, rankings, HEADS, -1).transpose(1, 2) for x in (o2, l2))
        return merged(o1, l1, o2, l2[..., 0])[0]

    def by_mask() -> Tensor:
        return sdpa(q, k, v, attn_mask=seen)

    torch.testing.assert_close(parts(), by_mask(), rtol=1e-4, atol=1e-5)
    return _least({"mask": by_mask, "parts": parts}, 9, repeats=20)


def _states(rows: int, columns: int) -> list[Tensor]:
    return [torch.randn(rows, HEADS, columns, SIZE, requires_grad=True) for _ in range(3)]


def _least(calls: dict[str, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(repeats):
                call()
            best[name] = min(best[name], (time.process_time() - start) / repeats)
    return best
