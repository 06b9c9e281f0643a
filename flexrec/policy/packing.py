"""Rows of tokens in which the rankings of one prompt share the prompt.

A row is [prompt][ranking 1]..[ranking g], and may go on with another prompt where the batch has room. Every ranking's
positions continue its prompt's, and a token sees what came before it of its own prompt and its own ranking, so the
states are those of one row per ranking: only the prompt is not computed g times.

What a layer of width D costs, in products of a query with a key and a weight with a value, 4 D FLOPs: a token's linear
maps are 24 D^2 FLOPs, twice the parameters of a transformer's layer, which are 6 D products. With answers of A tokens,
prompts of P, and L = P + g A, the G rankings of a prompt take

    by a mask        G / g L (6 D + L), as attention is computed for the whole row;
    without one      (P + G A) 6 D + 1.3 (P^2 / 2 + G A (P + A / 2)) + 2,500,000 / D.

Without a mask (:mod:`flexrec.policy.shared_prefix`) the best g is always G: P (6 D + 1.3 P / 2) is paid once a row, and
a ranking's own A (6 D + 1.3 (P + A / 2)) does not depend on g. By a mask it may be less, as L^2 grows: that is
:func:`rankings_per_row`. Two numbers are measured (bench/shared_prefix.py). A product without a mask takes
1.6 (prompts of 500 tokens) to 1.0 times (4,000) as long as one of a long row under a mask, whose blocks are larger; the
calls of a row take, at D = 128, as long as up to 20,000 products, which are fewer of wider ones, and less where prompts
of one length share them. :func:`sharing` takes what costs less by the longest prompt and answer, and
:func:`attention_inputs` what does in the rows as they are, in which a mask costs L^2 however short a prompt is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexrec.policy.lora import causal_lm, text_config
from flexrec.policy.row_tokens import CandidateLists, Prompts, RowTokens
from flexrec.policy.shared_prefix import PrefixLayout, attend_by_prefix, base_attention, can_attend_by_prefix

PACKING_ATTENTION = ("sdpa", "eager", "flex_attention")  # implementations that take a mask of one's own
# Of attention without a mask: what a product costs, in products under a mask, and the calls of a row of width 1.
_PER_PRODUCT, _PER_ROW = 1.3, 2_500_000


@dataclass(frozen=True)
class TokenRows:
    """B rows of L tokens that hold N rankings; rows are right-padded.

    Attributes:
        input_ids, position_ids: (B, L) int64.
        table: what the input_ids number; None where they are tokens.
        part_of: (B, L) int64, which part of the row a token belongs to, one prompt and its rankings; -1 at padding.
        ranking_of: (B, L) int64, which ranking; -1 in prompts and at padding.
        row, prompt_start, prompt_length, answer_start, answer_length: (N,) int64, where each ranking lies.
        shared: whether any row holds more than one ranking.
    """

    input_ids: Tensor
    position_ids: Tensor
    part_of: Tensor
    ranking_of: Tensor
    row: np.ndarray
    prompt_start: np.ndarray
    prompt_length: np.ndarray
    answer_start: np.ndarray
    answer_length: np.ndarray
    shared: bool
    table: RowTokens | None = None

    def tokens(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(M,) the tokens at ``rows`` and ``columns`` (M,), of those that are sums the first."""
        ids = self.input_ids[rows, columns]
        return ids if self.table is None else torch.from_numpy(self.table.first).to(ids.device)[ids]

    def prompt_columns(self, rankings: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Columns of the prompt's tokens at ``positions``, in the rows of ``rankings``."""
        return self.prompt_start[rankings] + positions

    def layout(self) -> PrefixLayout:
        """Where prompts and rankings lie, for attention without a mask."""
        where = self.row, self.prompt_start, self.prompt_length, self.answer_start, self.answer_length
        size, width = self.input_ids.shape
        return PrefixLayout((size, width), *where, device=self.input_ids.device)

    def predicting_columns(self, rankings: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Columns of the states that predict the answers' tokens at ``positions``, in the rows of ``rankings``."""
        last_of_prompt = self.prompt_start[rankings] + self.prompt_length[rankings] - 1
        return np.where(positions == 0, last_of_prompt, self.answer_start[rankings] + positions - 1)


def rankings_per_row(prompt_length: int, answer_length: int, num_generations: int, hidden_size: int) -> int:
    """How many of a prompt's rankings one row should hold, by the cost at the top of this file; a divisor of all.

    This is for attention by a mask. Without one it is all of them, or none: see :func:`sharing`.
    """
    sizes = prompt_length, answer_length
    divisors = (g for g in range(1, num_generations + 1) if num_generations % g == 0)
    return min(divisors, key=lambda g: num_generations // g * _cost_by_mask(*sizes, g, hidden_size))


def _cost_by_mask(prompt_length: int, answer_length: int, rankings: int, hidden_size: int) -> float:
    """Of a row's layer, in products of a query and a key."""
    length = prompt_length + rankings * answer_length
    return length * (6 * hidden_size + length)


def _cost_by_prefix(prompt_length: int, answer_length: int, rankings: int, hidden_size: int) -> float:
    """The same without a mask."""
    answers = rankings * answer_length
    products = prompt_length**2 / 2 + answers * (prompt_length + answer_length / 2)
    return (prompt_length + answers) * 6 * hidden_size + _PER_PRODUCT * products + _PER_ROW / hidden_size


def sharing(
    model: Any,
    prompts: Prompts,
    candidates: CandidateLists,
    *,
    separator: Sequence[int] = (),
    num_ranked: int | None = None,
    num_generations: int = 1,
    reasoning_length: int = 0,
    decoding: bool = False,
) -> int:
    """How many rankings of a prompt should share a row, by the batch's longest prompt and answer; 1 where the model
    cannot pack.

    Args:
        decoding: of rows that grow token by token, which attend by a mask.
    """
    if num_generations == 1:
        return 1
    ranks = num_ranked or max(len(lst) for lst in candidates)
    longest = max(len(sequence) for lst in candidates for sequence in lst)
    answer = reasoning_length + ranks * (longest + len(separator))
    prompt = max(map(len, prompts))
    if not can_pack(model, None if decoding else prompt + answer):
        return 1
    sizes = prompt, answer
    width = text_config(model).hidden_size
    masked = rankings_per_row(*sizes, num_generations, width) if can_mask(model) else 1
    if decoding or not can_attend_by_prefix(model):
        return masked
    by_mask = num_generations // masked * _cost_by_mask(*sizes, masked, width)
    return num_generations if _cost_by_prefix(*sizes, num_generations, width) < by_mask else masked


def can_mask(model: Any) -> bool:
    """Whether the model's attention takes a mask of one's own."""
    return base_attention(model) in PACKING_ATTENTION


def can_pack(model: Any, longest: int | None = None) -> bool:
    """Whether rankings can share a row of the model: its layers attend, by a mask that may be given or as
    :mod:`flexrec.policy.shared_prefix` does, and see all of a prompt and its ranking.

    Args:
        longest: tokens of a prompt and its ranking, for which a sliding window is wide enough or not. Where it is None
            no window is.
    """
    config = text_config(model)
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in layers or (window and getattr(config, "layer_types", None) is None)
    sees_all = not slides or (window and longest is not None and longest <= window)
    attends = can_mask(model) or (longest is not None and can_attend_by_prefix(model))
    return bool(only_attends(model) and sees_all and attends)


def only_attends(model: Any) -> bool:
    """Whether a token of the model knows of others by attention to all, or to the last so many, alone.

    Of others a mask is not the whole word: the state of a recurrence, or a convolution, takes in whatever lies between,
    padding and other rankings too (Mamba, RWKV, Qwen 3.5, LFM 2).
    """
    layers = set(getattr(text_config(model), "layer_types", None) or ["full_attention"])
    stateful = bool(getattr(causal_lm(model), "_is_stateful", False))
    return layers <= {"full_attention", "sliding_attention"} and not stateful


def pack_rankings(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[np.ndarray],
    *,
    num_generations: int = 1,
    per_row: int = 1,
    table: RowTokens | None = None,
    pad_token_id: int = 0,
    device: torch.device | str = "cpu",
) -> TokenRows:
    """Lay out N = P * num_generations answers (token ids, any length) behind their P prompts.

    Where ``table`` is given, prompts and answers hold numbers of its rows.

    With ``per_row`` = 1 every ranking has a row of its own. With more, up to ``per_row`` rankings of a prompt share a
    row, and short rows are put behind one another where they fit the longest, so that little is padding.
    """
    if per_row < 1:
        raise ValueError(f"per_row must be at least 1, got {per_row}")
    units = [
        (p, range(p * num_generations + first, p * num_generations + min(first + per_row, num_generations)))
        for p in range(len(prompts))
        for first in range(0, num_generations, per_row)
    ]
    sizes = [len(prompts[p]) + sum(len(answers[n]) for n in rankings) for p, rankings in units]
    width = max(sizes, default=0)
    rows = _fit(sizes, width) if per_row > 1 else [[u] for u in range(len(units))]

    shape = (len(rows), width)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    part_of, ranking_of = np.full(shape, -1, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    where = np.zeros((4, len(answers)), dtype=np.int64)
    for b, row in enumerate(rows):
        column = 0
        for part, (p, rankings) in enumerate(units[u] for u in row):
            start, length = column, len(prompts[p])
            column += length
            input_ids[b, start:column] = prompts[p]
            position_ids[b, start:column] = np.arange(length)
            for n in rankings:
                where[:, n] = b, start, length, column
                end = column + len(answers[n])
                input_ids[b, column:end] = answers[n]
                position_ids[b, column:end] = length + np.arange(len(answers[n]))
                ranking_of[b, column:end] = n
                column = end
            part_of[b, start:column] = part
    row_of, prompt_start, prompt_length, answer_start = where

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return TokenRows(
        input_ids=on_device(input_ids),
        position_ids=on_device(position_ids),
        part_of=on_device(part_of),
        ranking_of=on_device(ranking_of),
        row=row_of,
        prompt_start=prompt_start,
        prompt_length=prompt_length,
        answer_start=answer_start,
        answer_length=np.array([len(answer) for answer in answers], dtype=np.int64),
        shared=len(rows) < len(answers),
        table=table,
    )


def _fit(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Units into rows of ``width``: each, longest first, into the first row that has room."""
    rows: list[list[int]] = []
    room = np.zeros(0, dtype=np.int64)
    for u in sorted(range(len(sizes)), key=lambda u: -sizes[u]):
        fits = np.flatnonzero(room >= sizes[u])
        if len(fits):
            rows[fits[0]].append(u)
            room[fits[0]] -= sizes[u]
        else:
            rows.append([u])
            room = np.append(room, width - sizes[u])
    return rows


def attention_inputs(model: Any, rows: TokenRows) -> dict[str, Any]:
    """What the forward pass of a model of transformers needs beside the tokens of ``rows``: mask, positions, layout.

    Rows that share a prompt attend without a mask where that is possible, and costs less.

    Raises:
        ValueError: shared rows for a model whose layers cannot attend to all of a prompt and its ranking.
    """
    if not rows.shared:
        return {"attention_mask": attention_mask(rows, "", torch.float32)}
    longest = int((rows.prompt_length + rows.answer_length).max())
    base = str(base_attention(model))
    if (can_mask(model) or can_attend_by_prefix(model)) and not can_pack(model, longest):
        config = text_config(model)
        window = getattr(config, "sliding_window", None)
        unnamed = "sliding_attention" if window else "a recurrence"
        layers = ", ".join(sorted(set(getattr(config, "layer_types", None) or [unnamed])))
        raise ValueError(
            f"{type(config).__name__} has layers of {layers} with a window of {window} "
            f"tokens, and a prompt with its ranking up to {longest}, so that rankings cannot share a row: give every "
            f"ranking its row"
        )
    inputs = {"position_ids": rows.position_ids}
    if can_attend_by_prefix(model) and not (can_mask(model) and _mask_costs_less(rows, text_config(model).hidden_size)):
        return inputs | attend_by_prefix(model, rows.layout())
    return inputs | {"attention_mask": attention_mask(rows, base, next(model.parameters()).dtype)}


def _mask_costs_less(rows: TokenRows, hidden_size: int) -> bool:
    """By attention alone, of each prompt and ranking as long as it is: all else of the rows costs the same."""
    size, width = rows.input_ids.shape
    prompts = np.unique(rows.row * width + rows.prompt_start, return_index=True)[1]
    prompt, answer = rows.prompt_length, rows.answer_length
    products = (prompt[prompts] ** 2).sum() / 2 + (answer * (prompt + answer / 2)).sum()
    return bool(size * width**2 < _PER_PRODUCT * products + len(prompts) * _PER_ROW / hidden_size)


def attention_mask(rows: TokenRows, implementation: str, dtype: torch.dtype) -> Any:
    """The mask to give to a model of transformers: what each token sees.

    Rows that hold one ranking need none but the padding's, (B, L). Shared rows take (B, 1, L, L): bool for "sdpa",
    added to the scores for "eager"; "flex_attention" a block mask, of which empty blocks are never computed.
    """
    if not rows.shared:
        return (rows.part_of >= 0).long()
    if implementation == "flex_attention":
        return _block_mask(rows)
    index = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
    part, ranking = rows.part_of, rows.ranking_of
    seen = (part[:, :, None] == part[:, None, :]) & (index[:, None] >= index)  # (B, L, L)
    seen &= (ranking[:, None, :] < 0) | (ranking[:, :, None] == ranking[:, None, :])
    return mask_for(seen, implementation, dtype)


def mask_for(seen: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """``seen`` (B, queries, keys) bool as an attention implementation takes it, with a dimension for the heads."""
    if implementation == "sdpa":
        return seen[:, None]
    if implementation == "eager":
        added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return added.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
    raise ValueError(
        f"attention {implementation!r} takes no mask of one's own, so rankings cannot share a row: load the model "
        f"with attn_implementation= one of {', '.join(PACKING_ATTENTION)}, or give every ranking its row"
    )


def _block_mask(rows: TokenRows) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    part, ranking = rows.part_of, rows.ranking_of

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (part[b, query] == part[b, key]) & (query >= key)
        return same & ((ranking[b, key] < 0) | (ranking[b, query] == ranking[b, key]))

    size, width = rows.input_ids.shape
    return create_block_mask(seen, size, None, width, width, device=str(rows.input_ids.device))
