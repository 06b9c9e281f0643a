"""How many bytes an operation must move and how many FLOPs it must do: the floor that measured times are held against.

The counts are those of the operation and not of an implementation: every input that is needed is read once from
memory, every output written once, what stays on chip is free. Two things are counted besides, as forward and backward
are separate passes: hidden states and rows of the output embedding are read again by the gradients that need them, and
logits are saved (4 bytes each, written once, read once per gradient) where that moves less than forming them again
would, which is where 4 K <= D.

Element sizes are in bytes; index tensors are int64 (8 bytes an element), rewards and log-probabilities float32.
Products count two FLOPs per multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Bytes to or from memory, and floating-point operations."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def swap_rewards(lists: int, size: int, element: int, *, variance: bool = False) -> Cost:
    """Rewards (N, K) from gains (N, K), and with ``variance`` their variance from that of the gains.

    FLOPs are those of the linear metrics' closed form, w centred (1), d w (1), three suffix sums (3) and
    [d (n w - W) - (w D - Y)] / (n Z) (8). The order for the ideal is found by comparisons, which are not counted. The
    variance's closed form has about as many again.
    """
    count = lists * size
    tensors = 2 if variance else 1
    return Cost(tensors * count * (element + 4), tensors * 13 * count)


def topic_rewards(lists: int, size: int, topics: int, ranks: int, element: int) -> Cost:
    """Rewards (N, K) from gains (N, K) and topics (N, K, C) by alpha_ndcg of so many ranks.

    FLOPs per item and topic: the worth (1), its suffix sum (2); at ranks with a discount the share of the topic that is
    left (3), the two chains (14) and what they give (10). The greedy order multiplies and adds (2) at every rank anew.
    """
    cells, shown = lists * size * topics, lists * min(size, ranks) * topics
    return Cost(cells * element + lists * size * (element + 4), 3 * cells + 27 * shown + 2 * ranks * cells)


def swap_scores(lists: int, size: int, element: int) -> Cost:
    """The matrix (N, K, K) from gains (N, K): (d_k - d_j)(w_k - w_j), three FLOPs an entry."""
    return Cost(lists * size * element + 4 * lists * size**2, 3 * lists * size**2)


def policy_rewards(lists: int, size: int, element: int) -> Cost:
    """Rewards (N, K) from gains (N, K) and float32 weights (N, K, K), of which only j > k is needed."""
    pairs = lists * size * (size - 1) // 2
    return Cost(lists * size * (element + 4) + 4 * pairs, 6 * pairs)


@dataclass(frozen=True)
class Rankings:
    """The sizes of a batch of rankings.

    Attributes:
        rankings: N, rankings in all.
        lists: P, candidate lists; N / P rankings share one.
        ranks: T, ranks per ranking.
        candidates: K, candidates per list.
        dim: D, the size of a hidden state.
        vocabulary: V, rows of the output embedding.
    """

    rankings: int
    lists: int
    ranks: int
    candidates: int
    dim: int
    vocabulary: int

    def __str__(self) -> str:
        share = "" if self.lists == self.rankings else f" P={self.lists}"
        return f"N={self.rankings}{share} T={self.ranks} K={self.candidates} D={self.dim} V={self.vocabulary}"

    @property
    def steps(self) -> int:
        """N T, the softmaxes to be taken."""
        return self.rankings * self.ranks

    @property
    def pool(self) -> int:
        """Candidates in all pools together: step t of a ranking chooses among K - t."""
        return self.rankings * (self.ranks * self.candidates - self.ranks * (self.ranks - 1) // 2)

    @property
    def rows(self) -> int:
        """Rows of the output embedding that are needed at most."""
        return min(self.lists * self.candidates, self.vocabulary)

    @property
    def saves_logits(self) -> bool:
        """Whether saving logits moves fewer bytes than hidden states do, so that they are worth keeping."""
        return 4 * self.candidates <= self.dim

    @property
    def saved_logits(self) -> int:
        """Bytes of the logits kept for the backward pass."""
        return 4 * self.steps * self.candidates if self.saves_logits else 0


def ranking_forward(size: Rankings, element: int, *, keeps: bool = False) -> Cost:
    """Log-probs and entropy; ``keeps`` when a backward pass follows and wants the logits."""
    moved = (size.steps + size.rows) * size.dim * element
    indices = 8 * (size.lists * size.candidates + size.steps)
    results = 8 * size.steps
    saved = size.saved_logits if keeps else 0
    return Cost(moved + indices + results + saved, 2 * size.pool * size.dim)


def hidden_gradient(size: Rankings, element: int) -> Cost:
    """Gradient of the hidden states: logits, rows and incoming gradients in, (N, T, D) out."""
    moved = (size.rows + size.steps) * size.dim * element
    return Cost(moved + 8 * size.steps + size.saved_logits, 2 * size.pool * size.dim)


def weight_gradient(size: Rankings, element: int, mode: str) -> Cost:
    """Gradient of the output embedding: logits and hidden states in, and out, by ``mode``:

    "dense": all V rows in the embedding's own dtype; "rows": a float32 row per candidate;
    "accumulate": the candidates' rows of an existing float32 gradient, read and written.
    """
    out = {
        "dense": size.vocabulary * size.dim * element,
        "rows": 4 * size.lists * size.candidates * size.dim,
        "accumulate": 8 * size.rows * size.dim,
    }[mode]
    moved = size.steps * size.dim * element
    return Cost(moved + size.saved_logits + out, 2 * size.pool * size.dim)


def ranking_step(size: Rankings, element: int, mode: str = "dense") -> Cost:
    """Forward and backward, to hidden states and output embedding; logits that are not saved are formed once more."""
    again = Cost(0, 0 if size.saves_logits else 2 * size.pool * size.dim)
    forward = ranking_forward(size, element, keeps=True)
    return forward + hidden_gradient(size, element) + weight_gradient(size, element, mode) + again


def ranking_memory(size: Rankings, element: int, mode: str = "dense") -> int:
    """Extra memory that forward and backward may take: saved logits, 16 bytes a step, the gradients asked for."""
    gradient = {
        "dense": size.vocabulary * size.dim * element,
        "rows": 4 * size.lists * size.candidates * size.dim,
        "accumulate": 0,
    }[mode]
    return size.saved_logits + 16 * size.steps + size.steps * size.dim * element + gradient


@dataclass(frozen=True)
class AllowedSets:
    """The sizes of a batch of ragged allowed sets.

    Attributes:
        sets: M, softmaxes to be taken.
        entries: allowed tokens in all sets together.
        dim: D, the size of a hidden state.
        vocabulary: V, rows of the output embedding.
    """

    sets: int
    entries: int
    dim: int
    vocabulary: int

    def __str__(self) -> str:
        return f"M={self.sets} nnz={self.entries} D={self.dim} V={self.vocabulary}"

    @property
    def rows(self) -> int:
        """Rows of the output embedding that are needed at most."""
        return min(self.entries, self.vocabulary)


def restricted_step(size: AllowedSets, element: int) -> Cost:
    """Forward and backward of ragged sets, with a dense gradient of the output embedding.

    forward: hidden states, rows, tokens, offsets and targets in; log-probs, entropy and a logit per entry out.
    backward: logits (twice), hidden states, rows in; both gradients out.
    """
    hidden, rows = size.sets * size.dim * element, size.rows * size.dim * element
    indices = 8 * (size.entries + 2 * size.sets + 1)
    forward = Cost(hidden + rows + indices + 8 * size.sets + 4 * size.entries, 2 * size.entries * size.dim)
    dense = size.vocabulary * size.dim * element
    backward = Cost(2 * hidden + rows + dense + 8 * size.sets + 8 * size.entries, 4 * size.entries * size.dim)
    return forward + backward
