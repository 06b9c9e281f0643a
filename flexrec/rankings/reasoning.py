"""Free-form reasoning before a ranking: one rule for everything that samples it or scores it.

A completion is [reasoning][marker][ranking]. Until the marker ``reasoning_end`` (say the tokens of "</think>") stands,
any token may come but those that end a sequence, and those that no tokenizer can read. A row with
``max_reasoning_tokens`` tokens and no marker gets what its last tokens lack of one, token by token; then the ranking
begins. Reasoning and marker belong to no item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ReasoningTokens:
    """The reasoning of N completions.

    Attributes:
        tokens: N rows of token ids, each up to and with the marker.
        num_sampled: (N,) int64, how many of a row's tokens were sampled; those behind were forced, with log-prob 0.
        never: token ids that could not be sampled.
    """

    tokens: Sequence[NDArray[np.int64]]
    num_sampled: NDArray[np.int64]
    never: tuple[int, ...] = ()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens in each row."""
        return np.array([len(row) for row in self.tokens], dtype=np.int64)

    def of_rows(self, rows: NDArray[np.int64]) -> ReasoningTokens:
        """The reasoning of these rows."""
        return ReasoningTokens([self.tokens[n] for n in rows], self.num_sampled[rows], self.never)


@dataclass(frozen=True)
class ReasoningRule:
    """When reasoning ends; see the module. Tokens ``never`` end a sequence or mean nothing, and do not come in it."""

    end: tuple[int, ...]
    max_tokens: int
    never: tuple[int, ...]

    @property
    def max_length(self) -> int:
        """The most tokens that a row's reasoning takes, the marker included."""
        return self.max_tokens + len(self.end)

    def matched(self, tokens: NDArray[Any]) -> NDArray[np.int64]:
        """(N,) how many tokens of the marker the rows (N, L) end with: all of them where the reasoning has ended."""
        width = tokens.shape[1]
        sizes = np.zeros(len(tokens), dtype=np.int64)
        for size in range(1, min(len(self.end), width) + 1):
            sizes[(tokens[:, width - size :] == self.end[:size]).all(axis=1)] = size
        return sizes

    def lengths(self, tokens: NDArray[Any]) -> NDArray[np.int64]:
        """(N,) where in the rows (N, L) the ranking begins, just behind the first marker; -1 where there is none."""
        places = max(tokens.shape[1] - len(self.end) + 1, 0)
        found = np.ones((len(tokens), places), dtype=bool)
        for i, token in enumerate(self.end):
            found &= tokens[:, i : places + i] == token
        if places == 0:
            return np.full(len(tokens), -1, dtype=np.int64)
        return np.where(found.any(axis=1), found.argmax(axis=1) + len(self.end), -1)

    def read(self, tokens: NDArray[Any]) -> ReasoningTokens:
        """The reasoning that the rows (N, L) of completions begin with; nothing where the marker is missing."""
        lengths = self.lengths(tokens).clip(min=0)
        rows = [row[:size].astype(np.int64) for row, size in zip(tokens, lengths, strict=True)]
        return ReasoningTokens(rows, np.minimum(lengths, self.max_tokens), self.never)


def reasoning_rule(
    reasoning_end: Sequence[int] | None, max_reasoning_tokens: int | None, never: Sequence[int]
) -> ReasoningRule | None:
    """The rule that these arguments ask for; None where both are None. ``never`` are tokens that it must not hold.

    Raises:
        ValueError: one without the other, an empty marker, a negative budget, or a marker of tokens that never come.
        TypeError: a budget that is no int.
    """
    if reasoning_end is None and max_reasoning_tokens is None:
        return None
    if reasoning_end is None or max_reasoning_tokens is None:
        missing, given = "reasoning_end", f"max_reasoning_tokens={max_reasoning_tokens}"
        if max_reasoning_tokens is None:
            missing, given = "max_reasoning_tokens", f"reasoning_end={list(reasoning_end or ())}"
        raise ValueError(f"{given} needs {missing}: reasoning has a marker that ends it and a budget of tokens")
    if isinstance(max_reasoning_tokens, bool) or not isinstance(max_reasoning_tokens, int):
        raise TypeError(f"max_reasoning_tokens must be an int, got {type(max_reasoning_tokens).__name__}")
    if max_reasoning_tokens < 0:
        raise ValueError(f"max_reasoning_tokens must be at least 0, got {max_reasoning_tokens}")
    end = tuple(int(token) for token in reasoning_end)
    if not end or min(end) < 0:
        raise ValueError(f"reasoning_end must hold at least one token id, none negative, got {list(end)}")
    ends_both = set(end) & set(never)
    if ends_both:
        raise ValueError(
            f"reasoning_end {list(end)} holds token {min(ends_both)}, which ends a sequence or is not of the "
            f"tokenizer: choose a marker that the ranking can follow"
        )
    return ReasoningRule(end, max_reasoning_tokens, tuple(never))


def never_tokens(model: Any, num_tokens: int | None = None) -> tuple[int, ...]:
    """What reasoning never holds, ascending: the tokens at which the model's generate stops, and those of its
    embedding that lie beyond the tokenizer's ``num_tokens``, with which many are padded; none without an entry.

    Raises:
        ValueError: a tokenizer with more tokens than the model.
    """
    size = model.config.get_text_config().vocab_size
    if num_tokens is not None and not 0 < num_tokens <= size:
        raise ValueError(f"num_tokens must be the tokenizer's size, from 1 to the model's {size}, got {num_tokens}")
    ids: set[int] = set(range(size if num_tokens is None else num_tokens, size))
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            ids |= {found} if isinstance(found, int) else set(found)
    return tuple(sorted(token for token in ids if token < size))
