"""Random inputs of the benchmarks, the same for everybody who is compared."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from bench.model import Rankings

SMALL = os.environ.get("FLEXREC_BENCH_SMALL", "0") not in ("", "0")  # small shapes, nothing compiled: a smoke test


class RankingInputs(NamedTuple):
    """Arguments of ranking_logprobs: hidden (N, T, D), weight (V, D), candidates (P, K), ranking (N, T)."""

    hidden: Tensor
    weight: Tensor
    candidates: Tensor
    ranking: Tensor

    @property
    def tokens(self) -> Tensor:
        """(N, T) token id of the item at every rank."""
        return self.ranked_tokens[:, : self.ranking.shape[1]]

    @property
    def ranked_tokens(self) -> Tensor:
        """(N, K) token ids in rank order; the unranked ones last, by ascending candidate index."""
        n, t = self.ranking.shape
        k = self.candidates.shape[1]
        unranked = torch.ones(n, k, dtype=torch.bool, device=self.ranking.device).scatter(1, self.ranking, False)
        order = self.ranking
        if t < k:
            last = unranked.long().argsort(dim=1, descending=True, stable=True)[:, : k - t]
            order = torch.cat([order, last], dim=1)
        return self.candidates.repeat_interleave(n // len(self.candidates), 0).gather(1, order)


def ranking_inputs(size: Rankings, device: torch.device, dtype: torch.dtype, count: int = 1) -> list[RankingInputs]:
    """``count`` sets of inputs that differ in all but the output embedding; hidden and weight require gradients."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    weight = normal(size.vocabulary, size.dim).div_(math.sqrt(size.dim)).requires_grad_()
    return [
        RankingInputs(
            normal(size.rankings, size.ranks, size.dim).requires_grad_(),
            weight,
            _subsets(size.lists, size.candidates, size.vocabulary, generator, device),
            _subsets(size.rankings, size.ranks, size.candidates, generator, device),
        )
        for _ in range(count)
    ]


def _subsets(rows: int, picked: int, of: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(rows, picked) int64, in every row different numbers below ``of`` in random order.

    One from each of ``picked`` equal intervals, at a random place in it, in random order: no permutation of ``of``.
    """
    width = of // picked
    place = torch.randint(width, (rows, picked), generator=generator, device=device)
    numbers = place + width * torch.arange(picked, device=device)
    order = torch.rand(rows, picked, generator=generator, device=device).argsort(dim=1)
    return numbers.gather(1, order)


class SetInputs(NamedTuple):
    """Arguments of restricted_logprobs: hidden (M, D), weight (V, D), ids (nnz,), offsets (M + 1,), targets (M,)."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    offsets: Tensor
    targets: Tensor


def set_inputs(counts: Tensor, dim: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> SetInputs:
    """Sets of ``counts`` (M,) >= 1 allowed tokens each, ascending; the target is one of them."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    counts = counts.to(device)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    row = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)  # (nnz,)
    nth = torch.arange(len(row), device=device) - offsets[row]  # (nnz,) within the set
    width = vocabulary // counts[row]  # one token from each of as many equal intervals
    place = (torch.rand(len(row), generator=generator, device=device) * width).long()
    ids = nth * width + place
    targets = ids[offsets[:-1] + (torch.rand(len(counts), generator=generator, device=device) * counts).long()]
    weight = normal(vocabulary, dim).div_(math.sqrt(dim)).requires_grad_()
    return SetInputs(normal(len(counts), dim).requires_grad_(), weight, ids, offsets, targets)
