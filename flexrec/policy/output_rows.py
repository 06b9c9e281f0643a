"""The rows of the output layer that candidates are scored by, where several tokens describe a candidate.

A candidate that is one token has one static row, which knows nothing of the list at hand. Where marks say what is true
of it here only (how strongly it rises, how new it is to the user), its row is the sum of its own and its marks' rows,
so its logit is the sum of theirs,

    logit(c) = <h, w_c> + <h, w_mark 1> + <h, w_mark 2> + ..,

and the model need not carry through its states what the list says of thirty candidates. Everything that scores
candidates, in training, sampling, search and a reference, makes its rows here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from flexrec.rankings.state import Candidates

Marks = Sequence[Sequence[Sequence[int]]]  # P lists of K rows of token ids, any number of them


class RowTokens(NamedTuple):
    """The tokens whose rows make each of P * K candidates' row, list by list, shorter lists filled up with none."""

    ids: torch.Tensor  # (M,) int64
    offsets: torch.Tensor  # (P * K + 1,) int64, where each candidate's begin

    def summed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(P * K, D) and (P * K,) of a layer's weight (V, D) and bias (V,); differentiable in both."""
        rows = self._sum(weight)
        return rows, None if bias is None else self._sum(bias[:, None])[:, 0]

    def _sum(self, weight: torch.Tensor) -> torch.Tensor:
        return embedding_bag(self.ids, weight, self.offsets, mode="sum", include_last_offset=True)


def row_tokens(candidates: Candidates, marks: Marks, device: torch.device | str) -> RowTokens:
    """The tokens of P lists of candidates and their marks.

    Raises:
        ValueError: candidates of several tokens, or marks of other lists than the candidates'.
    """
    if [len(lst) for lst in candidates] != [len(of_list) for of_list in marks]:
        raise ValueError("marks must have a row for every candidate of every list")
    if any(len(sequence) != 1 for lst in candidates for sequence in lst):
        raise ValueError("marks describe candidates of a single token: use encoding 'item_token'")
    width = max(map(len, candidates), default=0)
    rows: list[list[int]] = []
    for lst, of_list in zip(candidates, marks, strict=True):
        rows += [[*token, *more] for token, more in zip(lst, of_list, strict=True)]
        rows += [[]] * (width - len(lst))
    ids = np.array([token for row in rows for token in row], dtype=np.int64)
    offsets = np.append(0, np.cumsum([len(row) for row in rows], dtype=np.int64))
    return RowTokens(torch.from_numpy(ids).to(device), torch.from_numpy(offsets).to(device))


def numbered(candidates: Candidates) -> tuple[list[list[list[int]]], np.ndarray]:
    """The candidates with the numbers of their rows in place of their tokens, and the token (P * K,) of each number."""
    width = max(map(len, candidates), default=0)
    numbers = [[[p * width + k] for k in range(len(lst))] for p, lst in enumerate(candidates)]
    tokens = np.zeros(len(candidates) * width, dtype=np.int64)
    for of_list, lst in zip(numbers, candidates, strict=True):
        for (number,), (token,) in zip(of_list, lst, strict=True):
            tokens[number] = token
    return numbers, tokens
