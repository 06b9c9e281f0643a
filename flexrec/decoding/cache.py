"""A model with its cache, in which the rollouts of a prompt are decoded side by side in the prompt's row.

A prompt is encoded once. Its rollouts attend to the one copy of its keys and values, each behind a mask that hides the
others' tokens, as training packs them (:mod:`flexrec.policy.packing`).

Training attends without a mask (:mod:`flexrec.policy.shared_prefix`); decoding still takes one. What it would save is
attention between rollouts: nothing at 8 rollouts of 30 tokens, and some 4 % of a training step with 32 of them or with
answers of 150 tokens (docs/performance.md). But it needs the rollouts' keys in rows of their own, apart from the
prompt's, and a cache that turns those over for beams.

What is kept of a prompt, keys, values and its last state, is valid for as long as the weights are the same, and saves
time where the same prompt would be encoded again. Nothing here does that: samples, beams and the reasoning before them
are all decoded from one prefill, and have their log-probs from it. Elsewhere it is not valid. A training step does
encode its prompts again, but to have a gradient through them, which what is kept here has not; the next update with the
same rankings has other weights, a reference is another model, and prompts for different needs differ from their first
words on.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from flexrec.policy.lm_head import last_hidden
from flexrec.policy.lora import causal_lm
from flexrec.policy.packing import mask_for
from flexrec.policy.row_tokens import RowTokens
from flexrec.policy.shared_prefix import base_attention


class Runs(NamedTuple):
    """The next tokens of every rollout: ``tokens`` one rollout's after the other's, ``counts`` (N,) of each."""

    tokens: np.ndarray
    counts: np.ndarray

    def keep(self, which: np.ndarray) -> Runs:
        """Only the runs of rollouts ``which`` (N,) bool; the others' are empty."""
        return Runs(self.tokens[np.repeat(which, self.counts)], np.where(which, self.counts, 0))

    def after(self, first: np.ndarray, which: np.ndarray) -> Runs:
        """Each run of ``which`` (N,) bool preceded by its token of ``first``, one for each of these."""
        counts = self.counts + which
        tokens = np.empty(counts.sum(), dtype=self.tokens.dtype)
        at = (np.cumsum(counts) - counts)[which]
        rest = np.ones(len(tokens), dtype=bool)
        rest[at] = False
        tokens[at], tokens[rest] = first, self.tokens
        return Runs(tokens, counts)


class SharedDecoder:
    """The model and its cache: B = N / share rows, each a prompt and ``share`` of its rollouts.

    Columns of a row belong to the prompt, to rollouts, or to nobody (padding, where another row was fed more);
    ``seen`` says which a rollout sees. A token that continues several rollouts, as beams do, is seen by them all.

    Args:
        share: how many of a prompt's ``num_generations`` rollouts share a row, a divisor.
        pad_token_id: stands where nothing is fed.
    """

    def __init__(self, model: Any, device: torch.device, num_generations: int, share: int, pad_token_id: int) -> None:
        self.model = model
        self.implementation = str(base_attention(model))
        self.dtype = next(model.parameters()).dtype
        self.device = device
        self.num_generations, self.share = num_generations, share
        self.pad_token_id = pad_token_id
        self.cache: Cache = DynamicCache(config=model.config)
        if all(type(layer) is DynamicLayer for layer in self.cache.layers) and self.cache.layers:
            self.cache = Cache(layers=[_GrowingLayer() for _ in self.cache.layers])
        # transformers 5.24 has renamed the argument, model by model.
        names = inspect.signature(causal_lm(model).forward).parameters
        self.cached = {"cache" if "cache" in names else "past_key_values": self.cache, "use_cache": True}
        windows = [layer.sliding_window for layer in self.cache.layers if getattr(layer, "is_sliding", False)]
        self.window = min(windows, default=None)  # how many columns back the model's shortest layer sees
        self.seen = torch.zeros(0, 0, 0, dtype=torch.bool)  # (B, share, columns of the cache)
        self.lengths = np.zeros(0, dtype=np.int64)  # (N,) tokens of each rollout, its prompt's included

    def prefill(self, prompts: Sequence[Sequence[int]], table: RowTokens | None = None) -> torch.Tensor:
        """Encode the P prompts, once each; returns the states (N, D) after them.

        Args:
            table: what the prompts number, where they do not hold tokens themselves.
        """
        states, of_prompt = _read_rows(self.model, prompts, self.pad_token_id, self.device, table=table, **self.cached)
        copies = self.num_generations // self.share
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
        self.seen = of_prompt.repeat_interleave(copies, dim=0)[:, None].repeat(1, self.share, 1)
        self.lengths = np.repeat([len(prompt) for prompt in prompts], self.num_generations)
        return states.repeat_interleave(self.num_generations, dim=0)

    def extend(self, runs: Runs, hidden: torch.Tensor, table: RowTokens | None = None) -> None:
        """Feed every rollout its run; ``hidden`` (N, D) takes the state after each run that is not empty.

        Args:
            table: what the runs number, where they do not hold tokens themselves.
        """
        fed = np.flatnonzero(runs.counts)
        rollout = np.repeat(np.arange(len(runs.counts)), runs.counts)  # (tokens,)
        row = rollout // self.share
        size = len(runs.counts) // self.share
        starts = np.cumsum(runs.counts) - runs.counts  # (N,) where each run begins among the tokens
        column = np.arange(len(rollout)) - starts[:: self.share][row]
        shape = (size, int(column.max()) + 1)
        tokens = np.full(shape, self.pad_token_id, dtype=np.int64)
        owner = np.full(shape, -1, dtype=np.int64)  # the rollout of the row, -1 for padding
        positions = np.zeros(shape, dtype=np.int64)
        tokens[row, column] = runs.tokens
        owner[row, column] = rollout % self.share
        positions[row, column] = self.lengths[rollout] + np.arange(len(rollout)) - starts[rollout]
        self.lengths = self.lengths + runs.counts
        if table is not None:  # of its rows, those that are fed
            table = table.take(tokens.reshape(-1))
            tokens = np.arange(tokens.size).reshape(shape[0], shape[1])

        states = last_hidden(
            self.model,
            table=table,
            input_ids=torch.from_numpy(tokens).to(self.device),
            attention_mask=self._mask(torch.from_numpy(owner).to(self.device)),
            position_ids=torch.from_numpy(positions).to(self.device),
            **self.cached,
        )
        last = (starts + runs.counts - 1)[fed]  # of the tokens
        at = torch.from_numpy(row[last] * shape[1] + column[last]).to(self.device)
        hidden[torch.from_numpy(fed).to(self.device)] = states.flatten(0, 1)[at]

    def select(self, parents: np.ndarray) -> None:
        """Rollout n goes on from what rollout ``parents[n]`` (N,) was fed, one of the same prompt.

        Where all rollouts of a prompt share its row nothing moves in the cache.
        """
        self.lengths = self.lengths[parents]
        index = torch.from_numpy(parents).to(self.device)
        if self.share == self.num_generations:
            in_row = index.view(len(self.seen), self.share) % self.share
            self.seen = self.seen[torch.arange(len(self.seen), device=self.device)[:, None], in_row]
        elif self.share == 1:
            self.cache.reorder_cache(index)
            self.seen = self.seen[index]
        else:
            raise ValueError(f"rollouts in rows of {self.share} cannot go on from one another: share all or none")

    def _mask(self, owner: torch.Tensor) -> torch.Tensor:
        """What the new columns see of all columns; ``owner`` (B, W) says which of the row's rollouts each continues."""
        before, width = self.seen.shape[2], owner.shape[1]
        rollouts = torch.arange(self.share, device=self.device)
        self.seen = torch.cat([self.seen, owner[:, None] == rollouts[:, None]], dim=2)
        if self.share == 1:
            if self.window is not None and before + width > self.window:
                self._check_no_padding(self.seen[:, 0, :before], owner >= 0)
            return self.seen[:, 0].long()
        rows = torch.arange(len(owner), device=self.device)[:, None]
        seen = self.seen[rows, owner.clamp(min=0)]  # (B, W, columns)
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        seen[:, :, before:] &= causal
        return mask_for(seen, self.implementation, self.dtype)

    def _check_no_padding(self, seen: torch.Tensor, fed: torch.Tensor) -> None:
        """Raise where a row with new tokens (``fed`` (B, W)) has padding before them: windows would count it."""
        if bool((fed.any(dim=1) & ~seen.all(dim=1)).any()):
            raise ValueError(
                f"this model has layers that see no more than {self.window} tokens back, and prompts or answers of "
                f"unequal lengths put padding among those: decode rankings one at a time, or all together by generate "
                f"with flexrec.decoding.RankingLogitsProcessor"
            )


class WholeRows:
    """:class:`SharedDecoder` of models that do more than attend: each row is computed whole at every step, as training
    does, right-padded.

    What such a model keeps of a row is the state of a recurrence, into which padding would get, before rankings and
    between them, and which cannot be shared. It takes as long as it sounds.
    """

    share = 1

    def __init__(self, model: Any, device: torch.device, num_generations: int, pad_token_id: int) -> None:
        self.model, self.device = model, device
        self.num_generations, self.pad_token_id = num_generations, pad_token_id
        self.rows: list[np.ndarray] = []  # N, the tokens of each
        self.table: RowTokens | None = None  # what they number

    def prefill(self, prompts: Sequence[Sequence[int]], table: RowTokens | None = None) -> torch.Tensor:
        """As of :class:`SharedDecoder`."""
        self.table = table
        rows = [np.array(prompt, dtype=np.int64) for prompt in prompts]
        states = self._last_states(rows)
        self.rows = [row for row in rows for _ in range(self.num_generations)]
        return states.repeat_interleave(self.num_generations, dim=0)

    def extend(self, runs: Runs, hidden: torch.Tensor, table: RowTokens | None = None) -> None:
        """As of :class:`SharedDecoder`."""
        tokens = runs.tokens.astype(np.int64)
        if table is None and self.table is not None:  # reasoning, of plain tokens, behind a prompt of sums
            said = np.unique(tokens)
            tokens = len(self.table) + np.searchsorted(said, tokens)
            self.table = self.table.and_tokens(said)
        fed = np.flatnonzero(runs.counts)
        for n, run in zip(fed, np.split(tokens, np.cumsum(runs.counts[fed])[:-1]), strict=True):
            self.rows[n] = np.concatenate([self.rows[n], run])
        hidden[torch.from_numpy(fed).to(self.device)] = self._last_states([self.rows[n] for n in fed])

    def select(self, parents: np.ndarray) -> None:
        """As of :class:`SharedDecoder`."""
        self.rows = [self.rows[n] for n in parents]

    def _last_states(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        """(R, D) states after the last token of each row."""
        return _read_rows(self.model, rows, self.pad_token_id, self.device, table=self.table, use_cache=False)[0]


Decoder = SharedDecoder | WholeRows


def _read_rows(
    model: Any, rows: Sequence[Sequence[int] | np.ndarray], pad_token_id: int, device: torch.device, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (R, D) after the last token of each row, right-padded, and (R, L) bool where a row has a token."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.full(real.shape, pad_token_id, dtype=np.int64)
    tokens[real] = np.concatenate(rows)
    exist = torch.from_numpy(real).to(device)
    states = last_hidden(model, input_ids=torch.from_numpy(tokens).to(device), attention_mask=exist.long(), **options)
    return states[torch.arange(len(rows), device=device), torch.from_numpy(lengths - 1).to(device)], exist


class _GrowingLayer(DynamicLayer):
    """A cache layer that doubles when it is full, where the base class copies all it holds for every new token."""

    keys: Any  # None, then (B, H, columns so far, head size); its own lazy_initialization differs between versions
    values: Any

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, H, W, head size) states; returns all states so far."""
        if self.keys is None:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
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

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Put row ``beam_idx[b]`` in the place of row b."""
        super().reorder_cache(beam_idx)
        self._room = None  # holds the rows as they were


def _enlarged(states: torch.Tensor, size: int) -> torch.Tensor:
    room = states.new_empty((*states.shape[:2], size, states.shape[3]))
    room[:, :, : states.shape[2]] = states
    return room
