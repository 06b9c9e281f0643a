"""Tokens that are several vocabulary entries at once: their row is the sum of theirs, at the input and in the output.

An item of one token has one static row, which knows nothing of the list at hand and does not exist for an item that
nobody was trained with. Where several tokens describe it (:mod:`flexrec.task.descriptions`), its row is the sum of
theirs, so its logit is the sum of theirs,

    logit(c) = <h, w_item> + <h, w_topic> + <h, w_mark> + ..,

and the model need not carry through its states what the list says of thirty candidates.

A batch of such prompts and candidates is written in numbers: of the rows of a table that says which tokens each is the
sum of. Training, sampling, search and a reference all number their tokens by :func:`numbered`, make input rows in
:func:`flexrec.policy.lm_head.last_hidden`, and output rows by :meth:`RowTokens.summed`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from flexrec.policy.lora import has_adapters
from flexrec.task.descriptions import Token

Prompts = Sequence[Sequence[Token]]  # P rows of tokens
CandidateLists = Sequence[Sequence[Sequence[Token]]]  # P lists of K token sequences, ragged in K


class RowTokens(NamedTuple):
    """Which tokens' rows make each of R rows."""

    ids: np.ndarray  # (M,) int64
    offsets: np.ndarray  # (R + 1,) int64, where each row's begin

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def first(self) -> np.ndarray:
        """(R,) the first token of each row, which names it; 0 where there is none."""
        return np.append(self.ids, 0)[np.where(np.diff(self.offsets) > 0, self.offsets[:-1], len(self.ids))]

    def take(self, rows: np.ndarray) -> RowTokens:
        """The rows at ``rows`` (N,)."""
        counts = np.diff(self.offsets)[rows]
        offsets = np.append(0, np.cumsum(counts))
        at = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], counts)
        return RowTokens(self.ids[at], offsets)

    def and_tokens(self, tokens: np.ndarray) -> RowTokens:
        """These rows, and behind them one of each of ``tokens`` (T,) alone."""
        added = self.offsets[-1] + 1 + np.arange(len(tokens))
        return RowTokens(np.append(self.ids, tokens), np.append(self.offsets, added))

    def summed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(R, D) and (R,) of a layer's weight (V, D) and bias (V,); differentiable in both."""
        ids, offsets = (torch.from_numpy(array).to(weight.device) for array in self)

        def of(values: torch.Tensor) -> torch.Tensor:
            return embedding_bag(ids, values, offsets, mode="sum", include_last_offset=True)

        return of(weight), None if bias is None else of(bias[:, None])[:, 0]


class Numbered(NamedTuple):
    """Prompts and candidates in numbers of the rows of ``table``; None: the numbers are the tokens themselves."""

    prompts: Sequence[Sequence[int]]
    candidates: Sequence[Sequence[Sequence[int]]]
    table: RowTokens | None

    def output(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output layer's rows by number, of all candidates' at least."""
        if self.table is None:
            return weight, bias
        return self.table.take(np.arange(_size(self.candidates))).summed(weight, bias)


def numbered(prompts: Prompts, candidates: CandidateLists, between: Sequence[int] = ()) -> Numbered:
    """Number the tokens of a batch, where some are sums.

    Candidate k of list p has the number p K + k, K being the longest list's length, so that no two are taken for each
    other, whatever describes them. Other tokens of the prompts come behind, each distinct one once.

    Args:
        between: what stands between two items of an answer or after the last: nothing, where tokens are sums.

    Raises:
        ValueError: sums where candidates have several tokens each, or something stands between them.
    """
    if not any(isinstance(token, tuple) for lst in candidates for sequence in lst for token in sequence) and not any(
        isinstance(token, tuple) for prompt in prompts for token in prompt
    ):
        return Numbered(prompts, candidates, None)  # type: ignore[arg-type]
    if len(between) or any(len(sequence) != 1 for lst in candidates for sequence in lst):
        raise ValueError(
            "where tokens are sums of several (items are described), every candidate is a single token, with nothing "
            "between two of them: use encoding 'item_token'"
        )
    width = max(map(len, candidates), default=0)
    rows: list[tuple[int, ...]] = [()] * _size(candidates)
    numbers: dict[Token, int] = {}
    for p, lst in enumerate(candidates):
        for k, (token,) in enumerate(lst):
            number = p * width + k
            rows[number] = _entries(token)
            numbers.setdefault(token, number)
    in_numbers = []
    for prompt in prompts:
        for token in prompt:
            if token not in numbers:
                numbers[token] = len(rows)
                rows.append(_entries(token))
        in_numbers.append([numbers[token] for token in prompt])
    ids = np.array([token for row in rows for token in row], dtype=np.int64)
    offsets = np.append(0, np.cumsum([len(row) for row in rows], dtype=np.int64))
    of_lists = [[[p * width + k] for k in range(len(lst))] for p, lst in enumerate(candidates)]
    return Numbered(in_numbers, of_lists, RowTokens(ids, offsets))


def _size(candidates: Sequence[Sequence[Any]]) -> int:
    return len(candidates) * max(map(len, candidates), default=0)


def _entries(token: Token) -> tuple[int, ...]:
    return token if isinstance(token, tuple) else (token,)


@contextmanager
def summed_inputs(embedding: torch.nn.Module, table: RowTokens | None) -> Iterator[None]:
    """Inside of it, an input embedding that is given numbers of the table's rows returns the rows, each a sum.

    The layer itself looks up the table's tokens, in one call of its own forward pass, so that who has laid a hand on it
    (FSDP, DeepSpeed, PEFT) sees no other use of its weight.
    """
    if table is None:
        yield
        return
    asked: list[torch.Tensor] = []

    def look_up(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        numbers, *rest = args
        asked.append(numbers)
        return (torch.from_numpy(table.ids).to(numbers.device), *rest)

    def add_up(layer: Any, args: Any, rows: torch.Tensor) -> torch.Tensor:
        each, offsets = torch.arange(len(rows), device=rows.device), torch.from_numpy(table.offsets).to(rows.device)
        return embedding_bag(each, rows, offsets, mode="sum", include_last_offset=True)[asked.pop()]

    hooks = embedding.register_forward_pre_hook(look_up), embedding.register_forward_hook(add_up)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def with_summed_rows(model: Any, prompts: Prompts, candidates: CandidateLists) -> tuple[Any, Numbered]:
    """For engines that know plain tokens alone, such as transformers' generate: a copy of the model whose vocabulary
    has an entry for each row of this batch, and the batch in its tokens.

    The rows of a batch are good for this batch: marks and histories are of its lists. An engine whose weights stay as
    they were loaded (vLLM) cannot be given them. Where a model reasons before it ranks, the new entries are to be kept
    out of that (``eos_token_id`` of :class:`flexrec.decoding.RankingLogitsProcessor`).

    Raises:
        ValueError: a model with adapters, which are to be merged first.

    Example:
        >>> from flexrec.data import Catalogue
        >>> from flexrec.policy.row_tokens import with_summed_rows
        >>> from flexrec.policy.small_model import build_model, build_tokenizer
        >>> tokenizer = build_tokenizer(Catalogue(("a",), ("a",), ((),)), [])
        >>> model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
        >>> plain, batch = with_summed_rows(model, [[5, (6, 7)]], [[[(8, 9)], [10]]])
        >>> weight, rows = model.get_input_embeddings().weight, plain.get_input_embeddings().weight
        >>> bool((rows[batch.candidates[0][0][0]] == weight[8] + weight[9]).all())
        True
    """
    if has_adapters(model):
        raise ValueError("rows are added to a whole model: merge its adapters first (merge_and_unload)")
    batch = numbered(prompts, candidates)
    if batch.table is None:
        return model, batch
    plain = copy.deepcopy(model)
    size = model.get_input_embeddings().weight.shape[0]
    plain.resize_token_embeddings(size + len(batch.table), mean_resizing=False)
    with torch.no_grad():
        for new, old in (
            (plain.get_input_embeddings(), model.get_input_embeddings()),
            (plain.get_output_embeddings(), model.get_output_embeddings()),
        ):
            rows, bias = batch.table.summed(old.weight, getattr(old, "bias", None))
            new.weight[size:] = rows
            if bias is not None:
                new.bias[size:] = bias
    shifted = [[number + size for number in prompt] for prompt in batch.prompts]
    of_lists = [[[number + size for number in sequence] for sequence in lst] for lst in batch.candidates]
    return plain, Numbered(shifted, of_lists, None)
