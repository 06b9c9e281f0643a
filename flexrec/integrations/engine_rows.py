"""Requests to an engine that are rankings in progress, and the logits of what may come next: adapters share them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flexrec.integrations.vllm_request import RankingRequest
from flexrec.rankings.state import step_states

Upload = Callable[[NDArray[np.int64]], torch.Tensor]

_logger = logging.getLogger(__name__)


def constrain(logits: torch.Tensor, index: NDArray[np.int64], rows: Sequence[RankingRow], upload: Upload) -> None:
    """Bring the states of ``rows`` to their last tokens, and set to -inf what may not follow.

    Args:
        logits: (B, V), changed in place.
        index: (rows,), which of the logits are theirs.
        upload: brings an array of integers to the logits' device.
    """
    tokens: list[int] = []
    offsets = [0]
    for row in rows:
        tokens += row.take_ranking_tokens()
        offsets.append(len(tokens))
    ids, bounds, done = step_states([row.state for row in rows], tokens, offsets)

    starts, counts = bounds[:-1].copy(), np.diff(bounds)
    aside = np.array([row.reasons or row.failure != "" for row in rows])
    more: list[int] = []
    for i in np.flatnonzero(aside | (counts == 0)).tolist():
        allowed = rows[i].allowed_aside(done[i])
        starts[i], counts[i] = len(ids) + len(more), len(allowed)
        more += allowed
    ids = np.append(ids, np.array(more, dtype=np.int32))

    bound = counts > 0
    if bound.any():
        last = counts[bound, None] - 1
        columns = starts[bound, None] + np.minimum(np.arange(last.max() + 1), last)
        _let_through(logits, upload(np.column_stack([index[bound], ids[columns]])))
    never = [rows[i].stops for i in np.flatnonzero(~bound).tolist()]
    if any(never):
        at = np.repeat(index[~bound], [len(stops) for stops in never])
        where = upload(np.stack([at, np.array([token for stops in never for token in stops])]))
        logits[where[0], where[1]] = -torch.inf
    for i in np.flatnonzero(~bound).tolist():
        logits[index[i], rows[i].num_tokens or logits.shape[1] :] = -torch.inf


def _let_through(logits: torch.Tensor, where: torch.Tensor) -> None:
    """Keep the logits at ``where`` (rows, 1 + A), an index and its ids, which may be repeated; no others in its row."""
    at, columns = where[:, :1], where[:, 1:]  # (rows, 1), (rows, A)
    kept = logits[at, columns]
    # Where another processor has forbidden all of them, one of them is taken all the same.
    kept = kept.masked_fill((kept == -torch.inf).all(dim=1, keepdim=True), 0.0)
    logits.index_fill_(0, at[:, 0], -torch.inf)
    logits[at, columns] = kept


def check_stops(request: RankingRequest, stops: Sequence[int]) -> None:
    """The tokens that stop a request must not stop it within its answer."""
    request.reasoning_rule(stops)
    within = set(request.separator).union(request.end[:-1], *request.candidates) & set(stops)
    if within:
        raise ValueError(
            f"token {min(within)} is one of candidates, separator or end and would stop the request before its ranking "
            f"is finished: take it out of stop_token_ids, or spell the candidates without it"
        )


class RankingRow:
    """A request in progress: what it has generated and what may come next.

    ``output`` is the list of its tokens: the engine's own, which grows, or the adapter's.
    ``stops`` are the tokens that end it.
    """

    def __init__(self, request: RankingRequest, stops: list[int], output: list[int]) -> None:
        self.stops, self.output = stops, output
        self.rule = request.reasoning_rule(stops)
        self.num_tokens = request.num_tokens
        self.state = request.state()
        # What is allowed after the ranking. Where nothing is known to end the request it repeats a token.
        self.closing = stops or list(request.end[-1:]) or [0]
        self.failure = ""
        self.num_read = 0
        self.reasons = self.rule is not None

    def take_ranking_tokens(self) -> list[int]:
        """The tokens that came since the last call, without those of reasoning."""
        if len(self.output) < self.num_read:  # engines take tokens back
            self.state.restart()
            self.num_read, self.reasons = 0, self.rule is not None
        begin, self.num_read = self.num_read, len(self.output)
        if -1 in self.output[begin:]:
            self.fail("the engine did not say which token it sampled")
        if self.reasons:
            begin = self._end_of_reasoning(begin)
        return self.output[begin:]

    def _end_of_reasoning(self, begin: int) -> int:
        """Where the ranking begins in what came from ``begin`` on; the end of the output while it does not."""
        assert self.rule is not None
        size = len(self.rule.end)
        for end in range(max(begin + 1, size), len(self.output) + 1):
            if tuple(self.output[end - size : end]) == self.rule.end:
                self.reasons = False
                return end
        return len(self.output)

    def allowed_aside(self, done: bool) -> list[int]:
        """The tokens that may come where the ranking does not say; empty where all but ``stops`` may."""
        if self.reasons and not self.failure:
            assert self.rule is not None
            if self.num_read < self.rule.max_tokens:
                return []
            tail = np.array([self.output[-len(self.rule.end) :]], dtype=np.int64)
            return [self.rule.end[int(self.rule.matched(tail)[0])]]
        if not done:
            self.fail("it generated a token that its ranking does not allow")
        return self.closing

    def fail(self, reason: str) -> None:
        """End the request; says why, once."""
        if not self.failure:
            self.failure = reason
            _logger.error("A request for a ranking is ended: %s.", reason)
