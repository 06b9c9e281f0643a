"""Constrained sampling of rankings with any causal language model of transformers.

A prompt is encoded once, and its rollouts attend to the one copy of its cache: they are decoded side by side in the
prompt's row, as training packs them (:mod:`flexrec.packing`). At each step a rollout sees logits of the tokens that
its remaining candidates allow and of no others; runs of tokens without an alternative are appended unsampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from flexrec.packing import mask_for, sharing
from flexrec.policy import Candidates, output_layer
from flexrec.profiling import span
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
    top_p: float = 1.0,
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
        top_p: below 1, samples among the most probable allowed tokens whose probabilities reach it together. The
            log-probs stay those of the whole allowed set, so this is for inference: a trainer would take them for
            those of the distribution that was sampled from.
        generator: randomness, on the model's device.

    Returns:
        N = P * num_generations rankings, those of one prompt adjacent.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: use greedy=True for the mode")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if len(prompts) != len(candidates):
        raise ValueError(f"got {len(prompts)} prompts and {len(candidates)} lists of candidates")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    if num_ranked is not None:
        num_ranked = min(num_ranked, max(map(len, candidates), default=0))
    share = 1
    if model.config._attn_implementation != "flex_attention":  # which would compile a mask for every step
        share = sharing(
            model,
            prompts,
            candidates,
            separator=separator,
            num_ranked=num_ranked,
            num_generations=num_generations,
        )
    training = model.training
    model.eval()
    try:
        with span("bookkeeping"):
            state = RankingState(
                candidates, separator=separator, end=end, num_ranked=num_ranked, num_generations=num_generations
            )
            return _sample(
                model, prompts, state, num_generations, share, temperature, top_p, greedy, generator, pad_token_id
            )
    finally:
        model.train(training)


def _sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    state: RankingState,
    num_generations: int,
    share: int,
    temperature: float,
    top_p: float,
    greedy: bool,
    generator: torch.Generator | None,
    pad_token_id: int,
) -> Rollout:
    weight, bias = output_layer(model)
    device = weight.device
    rows = len(prompts) * num_generations
    ranks = state.rankings().shape[1]
    logprobs = np.zeros((rows, ranks), dtype=np.float32)

    decoder = _Decoder(model, device, num_generations, share, pad_token_id)
    with span("prefill"):
        hidden = decoder.prefill(prompts)  # (N, D)
    ids, offsets = state.forced()
    state.advance(ids, offsets)
    runs = _Runs(ids, np.diff(offsets))
    while not (done := state.done()).all():
        # A finished rollout needs no further states; one without a new token keeps the state it had.
        runs = runs.keep(~done)
        if len(runs.tokens):
            with span("decode"):
                decoder.extend(runs, hidden)
        active = np.flatnonzero(~done)
        allowed = _padded(*state.allowed(), active)
        with span("decode"):
            states = hidden[torch.as_tensor(active, device=device)]
            chosen, chosen_logprobs = _choose(states, weight, bias, allowed, temperature, top_p, greedy, generator)
        rank = (state.rankings() >= 0).sum(axis=1)
        logprobs[active, rank[active]] += chosen_logprobs
        tokens = np.zeros(rows, dtype=np.int32)
        tokens[active] = chosen
        state.advance(tokens)
        ids, offsets = state.forced()
        state.advance(ids, offsets)
        runs = _Runs(ids, np.diff(offsets)).after(chosen, ~done)
    return Rollout(state.rankings(), logprobs)


class _Runs(NamedTuple):
    """The next tokens of every rollout: ``tokens`` one rollout's after the other's, ``counts`` (N,) of each."""

    tokens: np.ndarray
    counts: np.ndarray

    def keep(self, which: np.ndarray) -> _Runs:
        """Only the runs of rollouts ``which`` (N,) bool; the others' are empty."""
        return _Runs(self.tokens[np.repeat(which, self.counts)], np.where(which, self.counts, 0))

    def after(self, first: np.ndarray, which: np.ndarray) -> _Runs:
        """Each run of ``which`` (N,) bool preceded by its token of ``first``, one for each of these."""
        counts = self.counts + which
        tokens = np.empty(counts.sum(), dtype=self.tokens.dtype)
        at = (np.cumsum(counts) - counts)[which]
        rest = np.ones(len(tokens), dtype=bool)
        rest[at] = False
        tokens[at], tokens[rest] = first, self.tokens
        return _Runs(tokens, counts)


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
    top_p: float,
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
        column = torch.multinomial(_nucleus(logprobs.exp(), top_p), 1, generator=generator)
    return ids.gather(1, column)[:, 0].cpu().numpy(), logprobs.gather(1, column)[:, 0].cpu().numpy()


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """``probs`` (R, A) without what lies beyond the most probable tokens that reach ``top_p`` together."""
    if top_p == 1.0:
        return probs
    ordered, index = probs.sort(dim=1, descending=True)
    before = ordered.cumsum(dim=1) - ordered
    return torch.zeros_like(probs).scatter(1, index, ordered.masked_fill(before >= top_p, 0.0))


class _GrowingLayer(DynamicLayer):
    """A cache layer that doubles when it is full, where the base class copies all it holds for every new token."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, H, W, head size) states; returns all states so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self._room: tuple[torch.Tensor, torch.Tensor] | None = None
        used = self.keys.shape[2]
        end = used + key_states.shape[2]
        if self._room is None or len(self._room[0]) != len(key_states) or self._room[0].shape[2] < end:
            size = max(end, 2 * used)
            self._room = _enlarged(self.keys, size), _enlarged(self.values, size)
        keys, values = self._room
        keys[:, :, used:end], values[:, :, used:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values


def _enlarged(states: torch.Tensor, size: int) -> torch.Tensor:
    room = states.new_empty((*states.shape[:2], size, states.shape[3]))
    room[:, :, : states.shape[2]] = states
    return room


_PROMPT, _PADDING = -1, -2


class _Decoder:
    """The model with its cache: B = N / share rows, each a prompt and ``share`` of its rollouts.

    In a row, columns of the cache belong to the prompt, to a rollout (0 .. share - 1) or to nobody (padding, where
    another row was fed more); a rollout sees the prompt and itself.
    """

    def __init__(self, model: Any, device: torch.device, num_generations: int, share: int, pad_token_id: int) -> None:
        self.decoder = model.base_model
        self.implementation = model.config._attn_implementation
        self.dtype = next(model.parameters()).dtype
        self.device = device
        self.num_generations, self.share = num_generations, share
        self.pad_token_id = pad_token_id
        self.cache: Cache = DynamicCache(config=model.config)
        if all(type(layer) is DynamicLayer for layer in self.cache.layers) and self.cache.layers:
            self.cache = Cache(layers=[_GrowingLayer() for _ in self.cache.layers])
        self.owner = torch.zeros(0, 0)  # (B, columns of the cache) int64
        self.lengths = np.zeros(0, dtype=np.int64)  # (N,) tokens of each rollout, its prompt's included

    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Encode the P prompts, once each; returns the states (N, D) after them."""
        size, width = len(prompts), max(map(len, prompts))
        tokens = np.full((size, width), self.pad_token_id, dtype=np.int64)
        owner = np.full((size, width), _PADDING, dtype=np.int64)
        for p, prompt in enumerate(prompts):
            tokens[p, : len(prompt)] = prompt
            owner[p, : len(prompt)] = _PROMPT
        self.lengths = np.repeat([len(prompt) for prompt in prompts], self.num_generations)
        self.owner = torch.from_numpy(owner).to(self.device)
        output = self.decoder(
            input_ids=torch.from_numpy(tokens).to(self.device),
            attention_mask=(self.owner == _PROMPT).long(),
            past_key_values=self.cache,
            use_cache=True,
        )
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        states = output.last_hidden_state[torch.arange(size, device=self.device), last]
        copies = self.num_generations // self.share
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
            self.owner = self.owner.repeat_interleave(copies, dim=0)
        return states.repeat_interleave(self.num_generations, dim=0)

    def extend(self, runs: _Runs, hidden: torch.Tensor) -> None:
        """Feed every rollout its run; ``hidden`` (N, D) takes the state after each run that is not empty."""
        fed = np.flatnonzero(runs.counts)
        rollout = np.repeat(np.arange(len(runs.counts)), runs.counts)  # (tokens,)
        row = rollout // self.share
        size = len(runs.counts) // self.share
        starts = np.cumsum(runs.counts) - runs.counts  # (N,) where each run begins among the tokens
        column = np.arange(len(rollout)) - starts[:: self.share][row]
        shape = (size, int(column.max()) + 1)
        tokens = np.full(shape, self.pad_token_id, dtype=np.int64)
        owner = np.full(shape, _PADDING, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        tokens[row, column] = runs.tokens
        owner[row, column] = rollout % self.share
        positions[row, column] = self.lengths[rollout] + np.arange(len(rollout)) - starts[rollout]
        self.lengths = self.lengths + runs.counts

        added = torch.from_numpy(owner).to(self.device)
        self.owner = torch.cat([self.owner, added], dim=1)
        output = self.decoder(
            input_ids=torch.from_numpy(tokens).to(self.device),
            attention_mask=self._mask(added),
            position_ids=torch.from_numpy(positions).to(self.device),
            past_key_values=self.cache,
            use_cache=True,
        )
        last = (starts + runs.counts - 1)[fed]  # of the tokens
        at = torch.from_numpy(row[last] * shape[1] + column[last]).to(self.device)
        hidden[torch.from_numpy(fed).to(self.device)] = output.last_hidden_state.flatten(0, 1)[at]

    def _mask(self, added: torch.Tensor) -> torch.Tensor:
        """What the new columns (B, W) see of all columns."""
        if self.share == 1:
            return (self.owner != _PADDING).long()
        columns = torch.arange(self.owner.shape[1], device=self.device)
        seen = (self.owner == _PROMPT)[:, None] | (self.owner[:, None] == added[:, :, None])  # (B, W, columns)
        return mask_for(seen & (columns <= columns[-added.shape[1] :, None]), self.implementation, self.dtype)
