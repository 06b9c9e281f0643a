"""SASRec: a small causal model over items, which predicts from a history what comes next."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from flexrec.data.lists import RankingDataset, RankingList
from flexrec.evaluation.tuning import unknown_last, with_ties
from flexrec.policy.distributed import process_index
from flexrec.profiling import progress

_IGNORED = -100


class SASRec:
    """Self-attentive sequential recommendation (Kang and McAuley 2018), with the loss over all items (Klenitskiy and
    Vasilev 2023), which is what makes it a match for BERT4Rec.

    Two causal blocks with learned positions and tied item embeddings are trained by next-item cross entropy on what
    training users had, in its order, in windows of ``max_length``. A tenth of these users is validated on: training
    ends when their loss has not improved for ``patience`` epochs, and the best epoch is kept.

    The score of a candidate is its logit behind the history. Items of no training sequence are left out of histories
    and come last among candidates; without a history the order is that of popularity.
    """

    name = "sasrec"
    scores_interest = True

    def __init__(
        self,
        dataset: RankingDataset,
        *,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        dropout: float = 0.2,
        max_length: int = 50,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        max_epochs: int = 200,
        patience: int = 5,
        seed: int = 0,
    ) -> None:
        num_items = len(dataset.catalogue)
        by_user = training_sequences(dataset)
        self._known = np.zeros(num_items, dtype=bool)
        for sequences in by_user:
            for sequence in sequences:
                self._known[sequence] = True
        self._max_length = max_length
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = GPT2Config(
                vocab_size=num_items + 1,  # the last stands where a window is over
                n_positions=max_length,
                n_embd=hidden_size,
                n_layer=num_layers,
                n_head=num_heads,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=None,
                eos_token_id=None,
                use_cache=False,
            )
            self._model = GPT2LMHeadModel(config).to(self._device)
            self._fit(by_user, batch_size, learning_rate, max_epochs, patience, np.random.default_rng(seed))
        self._model.eval()

    @torch.no_grad()
    def scores(self, lst: RankingList) -> np.ndarray:
        known, popularity = self._known[lst.candidates], lst.popularity
        history = lst.history[self._known[lst.history]][-self._max_length :]
        if not len(history):
            return with_ties(np.zeros(len(known)), popularity)
        logits = self._model(torch.from_numpy(history).to(self._device)[None]).logits[0, -1]  # (items + 1,)
        return unknown_last(logits[lst.candidates].double().cpu().numpy(), known, popularity)

    def _fit(
        self,
        by_user: list[list[np.ndarray]],
        batch_size: int,
        learning_rate: float,
        max_epochs: int,
        patience: int,
        rng: np.random.Generator,
    ) -> None:
        order = rng.permutation(len(by_user))
        held_out, kept = np.split(order, [math.ceil(0.1 * len(order))])
        validation = self._windows([by_user[u] for u in held_out], np.random.default_rng(0))
        if not len(kept) or not validation:
            return
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=learning_rate, weight_decay=0.01)
        best, best_state, since = math.inf, copy.deepcopy(self._model.state_dict()), 0
        for _ in progress("SASRec", range(max_epochs), unit="epoch", shown=process_index() == 0):
            self._model.train()
            windows = self._windows([by_user[u] for u in kept], rng)
            for batch in _batches([windows[i] for i in rng.permutation(len(windows))], batch_size):
                loss, _ = self._loss(batch)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
                optimizer.step()
            error = self._validate(validation, batch_size)
            since += 1
            if error < best:
                best, best_state, since = error, copy.deepcopy(self._model.state_dict()), 0
            if since == patience:
                break
        self._model.load_state_dict(best_state)

    @torch.no_grad()
    def _validate(self, windows: list[np.ndarray], batch_size: int) -> float:
        """Mean loss of the next item."""
        self._model.eval()
        total, count = 0.0, 0
        for batch in _batches(windows, batch_size):
            loss, size = self._loss(batch)
            total, count = total + loss.item() * size, count + size
        return total / count

    def _loss(self, windows: Sequence[np.ndarray]) -> tuple[torch.Tensor, int]:
        """Mean cross entropy of each item after those before it, and the number of these."""
        width = max(map(len, windows))
        items = np.full((len(windows), width), self._model.config.vocab_size - 1)
        for row, window in zip(items, windows, strict=True):
            row[: len(window)] = window
        inputs = torch.from_numpy(items).to(self._device)
        targets = inputs[:, 1:].masked_fill(inputs[:, 1:] == self._model.config.vocab_size - 1, _IGNORED)
        hidden = self._model.transformer(inputs[:, :-1]).last_hidden_state
        logits = self._model.lm_head(hidden[targets != _IGNORED])
        targets = targets[targets != _IGNORED]
        return torch.nn.functional.cross_entropy(logits, targets), len(targets)

    def _windows(self, by_user: list[list[np.ndarray]], rng: np.random.Generator) -> list[np.ndarray]:
        """All sequences in pieces of at most ``max_length`` + 1, cut at another place each time."""
        size, windows = self._max_length + 1, []
        for sequences in by_user:
            for sequence in sequences:
                first = rng.integers(2, size + 1) if len(sequence) > size else size
                starts = [0, *range(first - 1, len(sequence) - 1, size - 1)]
                ends = [first, *(start + size for start in starts[1:])]
                windows += [sequence[a:b] for a, b in zip(starts, ends, strict=True) if len(sequence[a:b]) > 1]
        return windows


def training_sequences(dataset: RankingDataset) -> list[list[np.ndarray]]:
    """Of each training user what they had, oldest first: the log's items, and histories that hold more than the log,
    as where feedback is missing. Never a list's candidates, unless the log has them."""
    log = dataset.log
    cuts = np.flatnonzero(np.diff(log.users[order := np.argsort(log.users, kind="stable")])) + 1
    found: dict[int, list[np.ndarray]] = {}
    for rows in np.split(order, cuts):
        if len(rows) > 1:
            found[int(log.users[rows[0]])] = [log.items[rows]]
    for lst in dataset.train:
        sequences = found.setdefault(lst.user, [])
        if len(lst.history) > 1 and (not sequences or not np.isin(lst.history, sequences[0]).all()):
            sequences.append(lst.history)
    return [sequences for sequences in found.values() if sequences]


def _batches(windows: list[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]
