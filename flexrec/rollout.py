"""Constrained sampling of rankings with any causal language model of transformers.

A prompt is encoded once and its cache expanded to all of its rollouts. At each step a row sees logits of the tokens
that its remaining candidates allow and of no others; runs of tokens without an alternative are appended unsampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from flexrec.policy import Candidates, output_layer
from flexrec.rankings import RankingState


class Rollout(NamedTuple):
    """Sampled rankings: ``rankings`` (N, T) int32 candidate indices, -1 beyond a row's own; ``logprobs`` (N, T) float32
    of the items as they were sampled (0 where nothing was left to choose)."""

    rankings: np.ndarray
    logprobs: np.ndarray


@torch.no_grad()
def sample_rankings(
    model: Any,
    prompts: Sequence[Sequence[int]],
    candidates: Candidates,
    *,
    separator: Sequence[int] = (),
    end: Sequence[int] = (),
    num_generations: int = 1,
    num_ranked: int | None = None,
    temperature: float = 1.0,
    greedy: bool = False,
    generator: torch.Generator | None = None,
    pad_token_id: int = 0,
) -> Rollout:
    """Sample ``num_generations`` rankings for each of P prompts.

    Args:
        model: a causal language model; it is used in evaluation mode.
        prompts: P rows of token ids.
        candidates: P lists of token-id sequences.
        separator, end: token ids between two items and after the last.
        num_ranked: rank the first T only, or all where a list has fewer (default: all).
        temperature: of the sampling distribution; ``greedy`` takes the most probable token instead.
        generator: randomness, on the model's device.

    Returns:
        N = P * num_generations rankings, those of one prompt adjacent.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: use greedy=True for the mode")
    if len(prompts) != len(candidates):
        raise ValueError(f"got {len(prompts)} prompts and {len(candidates)} lists of candidates")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    if num_ranked is not None:
        num_ranked = min(num_ranked, max(map(len, candidates), default=0))
    training = model.training
    model.eval()
    try:
        return _sample(
            model,
            prompts,
            RankingState(
                candidates, separator=separator, end=end, num_ranked=num_ranked, num_generations=num_generations
            ),
            num_generations,
            temperature,
            greedy,
            generator,
            pad_token_id,
        )
    finally:
        model.train(training)


def _sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    state: RankingState,
    num_generations: int,
    temperature: float,
    greedy: bool,
    generator: torch.Generator | None,
    pad_token_id: int,
) -> Rollout:
    weight, bias = output_layer(model)
    device = weight.device
    rows = len(prompts) * num_generations
    ranks = state.rankings().shape[1]
    logprobs = np.zeros((rows, ranks), dtype=np.float32)

    decoder = _Decoder(model, device, pad_token_id)
    hidden = decoder.prefill(prompts, num_generations)  # (N, D)
    runs = _jump_forward(state)
    while not (done := state.done()).all():
        # A finished row needs no further states; a row without a new token keeps the state it had.
        runs = [[] if finished else run for finished, run in zip(done, runs, strict=True)]
        if any(runs):
            fed = torch.tensor([bool(run) for run in runs], device=device)
            hidden = torch.where(fed[:, None], decoder.extend(runs), hidden)
        active = np.flatnonzero(~done)
        ids, offsets = state.allowed()
        chosen, chosen_logprobs = _choose(
            hidden[torch.as_tensor(active, device=device)],
            weight,
            bias,
            _padded(ids, offsets, active),
            temperature,
            greedy,
            generator,
        )
        rank = (state.rankings() >= 0).sum(axis=1)
        logprobs[active, rank[active]] += chosen_logprobs
        tokens = np.zeros(rows, dtype=np.int32)
        tokens[active] = chosen
        state.advance(tokens)
        runs = [[int(token), *run] for token, run in zip(tokens, _jump_forward(state), strict=True)]
    return Rollout(state.rankings(), logprobs)


def _jump_forward(state: RankingState) -> list[list[int]]:
    """Advance every row to its next real choice; returns the tokens that had no alternative, per row."""
    ids, offsets = state.forced()
    state.advance(ids, offsets)
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def _padded(ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(len(rows), A) allowed ids of the given rows, -1 where a row has fewer than the most."""
    counts = (offsets[1:] - offsets[:-1])[rows]
    columns = np.arange(counts.max())
    inside = columns[None, :] < counts[:, None]
    padded = np.full(inside.shape, -1, dtype=np.int64)
    padded[inside] = ids[(offsets[:-1][rows][:, None] + columns[None, :])[inside]]
    return padded


def _choose(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    allowed: np.ndarray,
    temperature: float,
    greedy: bool,
    generator: torch.Generator | None,
) -> tuple[np.ndarray, np.ndarray]:
    """One allowed token per row and its log-prob: hidden (R, D), allowed (R, A) padded with -1; both results (R,)."""
    ids = torch.as_tensor(allowed, device=hidden.device)  # (R, A)
    rows = ids.clamp(min=0)
    logits = torch.bmm(weight[rows], hidden[:, :, None])[:, :, 0].float()  # (R, A)
    if bias is not None:
        logits += bias[rows]
    logprobs = (logits / temperature).masked_fill(ids < 0, -torch.inf).log_softmax(dim=1)  # (R, A)
    if greedy:
        column = logprobs.argmax(dim=1, keepdim=True)
    else:
        column = torch.multinomial(logprobs.exp(), 1, generator=generator)
    return ids.gather(1, column)[:, 0].cpu().numpy(), logprobs.gather(1, column)[:, 0].cpu().numpy()


class _Decoder:
    """The model with its cache: feeds each row a run of tokens of its own length, padding in between masked out."""

    def __init__(self, model: Any, device: torch.device, pad_token_id: int) -> None:
        self.decoder = model.base_model
        self.device = device
        self.pad_token_id = pad_token_id
        self.cache = DynamicCache(config=model.config)
        self.mask = torch.zeros(0, 0)  # (N, tokens in the cache) int64
        self.lengths = torch.zeros(0)  # (N,) real tokens of each row

    def prefill(self, prompts: Sequence[Sequence[int]], num_generations: int) -> torch.Tensor:
        """Encode P prompts once, then expand the cache; returns the last states (N, D)."""
        self.mask = torch.zeros(len(prompts), 0, dtype=torch.int64, device=self.device)
        self.lengths = torch.zeros(len(prompts), dtype=torch.int64, device=self.device)
        hidden = self.extend(prompts)
        if num_generations > 1:
            self.cache.batch_repeat_interleave(num_generations)
        self.mask = self.mask.repeat_interleave(num_generations, dim=0)
        self.lengths = self.lengths.repeat_interleave(num_generations, dim=0)
        return hidden.repeat_interleave(num_generations, dim=0)

    def extend(self, runs: Sequence[Sequence[int]]) -> torch.Tensor:
        """Feed each row its run (left-padded to the longest; an empty run leaves a row's cache as it is).

        Returns the states (N, D) after each run; those of empty runs mean nothing.
        """
        width = max(map(len, runs))
        tokens = torch.full((len(runs), width), self.pad_token_id, dtype=torch.int64)
        real = torch.zeros_like(tokens)
        for n, run in enumerate(runs):
            if len(run):
                tokens[n, width - len(run) :] = torch.tensor(run)
                real[n, width - len(run) :] = 1
        tokens, real = tokens.to(self.device), real.to(self.device)
        self.mask = torch.cat([self.mask, real], dim=1)
        positions = (self.lengths[:, None] + real.cumsum(dim=1) - 1).clamp(min=0)
        self.lengths = self.lengths + real.sum(dim=1)
        output = self.decoder(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]
