"""Rankings as token sequences: what may come next, what a completion says, and what every decision was.

A row ranks T of its K candidates, each a sequence of token ids. Its well-formed completion is::

    item separator item separator .. item end

with every item one of the candidates and none twice. `RankingState` walks batches of such completions token by token
while a model samples them, `parse_rankings` reads completions back, and `encode_rankings` spells given rankings,
with every decision on the way. All three step the same C++ cursor, so that they cannot disagree.

Common to the three:

* ``candidates`` holds P lists of K token sequences (lists of lists of ints; arrays and tensors work too), ragged in K.
  There are N = P * num_generations rows, those of one list adjacent; they share its trie, so memory is linear in the
  tokens of the candidates, plus K bits and T ints per row. `CandidateTries` in its place are built once for all uses.
* ``num_ranked`` is T: None for all K; an int for at most so many, K where the row has fewer (more than the longest list
  has is an error); or an (N,) array of counts between 1 and the row's K.
* Candidates with equal sequences cannot be told apart: the first one left, in candidate order, is the one placed.
* A candidate may be a proper prefix of another, and go on in it as the separator begins ("The Matrix" and "The Matrix
  Reloaded"): what comes then decides. Where two rankings are spelled with the same tokens these are read as the one
  whose item is the longer where they first differ, and the other cannot be spelled.
* Where not all candidates are ranked, such a prefix may leave open whether a ranking is finished. An end that begins
  with a token of its own, as the end of sequence is, settles it; without one, sampling and encoding raise a ValueError
  that names the list and both candidates. A whole completion is read in any case.
* An empty list, an empty sequence and a negative token id are errors: ValueError, saying where.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexrec import _core
from flexrec.rankings.arrays import as_integer, as_integers, offsets_of, run_offsets, to_numpy

TokenIds = Sequence[int]
Candidates = Sequence[Sequence[TokenIds]]  # P lists of K token-id sequences, ragged in K


class Spelling(NamedTuple):
    """How rankings are spelled in tokens: the arguments of the functions below that are not candidates."""

    separator: TokenIds = ()
    """Between items."""
    end: TokenIds = ()
    """After the last."""
    num_ranked: int | None = None
    """How many items at most; None: all."""

    def of(self, candidates: Candidates) -> dict[str, Any]:
        """The arguments for these lists, of which the longest may be shorter than ``num_ranked``."""
        most = None if self.num_ranked is None else min(self.num_ranked, max(map(len, candidates)))
        return {"separator": self.separator, "end": self.end, "num_ranked": most}


class CandidateTries:
    """P lists of candidates, prepared: stands wherever ``candidates`` does, so that lists used again are read once.

    Args:
        candidates: P lists of K token-id sequences, ragged in K.

    Raises:
        ValueError: a list or a sequence is empty, or a token id is negative or beyond int32; the message says where.
        TypeError: something is not a sequence of token ids.

    Example:
        >>> tries = flexrec.CandidateTries([[[10, 20], [10, 21], [11]]])  # read once ..
        >>> flexrec.RankingState(tries).allowed()[0]  # .. and used as often as one likes
        array([10, 11], dtype=int32)
    """

    def __init__(self, candidates: Candidates) -> None:
        self._core = _core.CandidateTries(candidates)

    @classmethod
    def from_arrays(cls, tokens: ArrayLike, sequence_offsets: ArrayLike, list_offsets: ArrayLike) -> CandidateTries:
        """The same from flat arrays, without a Python object per token: several times as fast.

        Args:
            tokens: (total,) integers, the sequences of all lists one after the other.
            sequence_offsets: (S + 1,) integers: sequence s is ``tokens[sequence_offsets[s]:sequence_offsets[s + 1]]``.
            list_offsets: (P + 1,) integers: list p owns the sequences from ``list_offsets[p]`` to
                ``list_offsets[p + 1] - 1``.
        """
        ids = as_integers("tokens", tokens, 1)
        if ids.max(initial=0) > np.iinfo(np.int32).max or ids.min(initial=0) < 0:
            at = int(np.argmax((ids < 0) | (ids > np.iinfo(np.int32).max)))
            raise ValueError(f"tokens must hold token ids from 0 to 2147483647, got {ids[at]} at index {at}")
        tries = cls.__new__(cls)
        tries._core = _core.CandidateTries.from_arrays(
            ids.astype(np.int32),
            as_integers("sequence_offsets", sequence_offsets, 1),
            as_integers("list_offsets", list_offsets, 1),
        )
        return tries

    def __len__(self) -> int:
        """P, the number of lists."""
        return self._core.num_lists


class ParsedRankings(NamedTuple):
    """What completions say, from `parse_rankings`; N rows, T the largest number of ranked items, L the longest row."""

    ranking: NDArray[np.int32]
    """(N, T) int32: candidate index by rank, always a full ranking; -1 beyond a row's own T."""
    valid: NDArray[np.bool_]
    """(N,) bool: the completion was exactly a well-formed ranking, separators and end included."""
    repeated: NDArray[np.int32]
    """(N,) int32: mentions, in the ranking, of a candidate that was mentioned before."""
    missing: NDArray[np.int32]
    """(N,) int32: ranks that no mention filled and that the repair filled in candidate order."""
    unknown: NDArray[np.int32]
    """(N,) int32: stretches of tokens that are no candidate, separator or end."""
    item_ids: NDArray[np.int32]
    """(N, L) int32: the rank of the item that a token belongs to; -1 for separators, end, anything else and padding."""


class EncodedRankings(NamedTuple):
    """Spelled rankings and their decisions, from `encode_rankings`.

    N rows with `total` tokens, M decisions (tokens that had an alternative) with `nnz` allowed tokens. Ragged arrays
    come with offsets: part i is ``values[offsets[i]:offsets[i + 1]]``. Tokens that are not among the decisions were
    forced: their log-probability is exactly 0.
    """

    tokens: NDArray[np.int32]
    """(total,) int32: the completions, one row after the other."""
    offsets: NDArray[np.int64]
    """(N + 1,) int64: of the rows in `tokens`."""
    item_ids: NDArray[np.int32]
    """(total,) int32: the rank of the item that a token belongs to, -1 for separators and end."""
    decision_rows: NDArray[np.int32]
    """(M,) int32, ascending."""
    decision_positions: NDArray[np.int32]
    """(M,) int32: index of the decided token within its row's completion."""
    decision_ranks: NDArray[np.int32]
    """(M,) int32: rank of the item being chosen, the first that is not certain yet."""
    targets: NDArray[np.int32]
    """(M,) int32: the token decided for."""
    allowed_ids: NDArray[np.int32]
    """(nnz,) int32: the tokens that were allowed, ascending within a decision; the target is among them."""
    allowed_offsets: NDArray[np.int64]
    """(M + 1,) int64: of the decisions in `allowed_ids`."""
    below_items: NDArray[np.int32]
    """For every allowed token the remaining candidates (indices into the row's list, ascending) that it keeps possible.

    For a separator or end that may close an item already spelled: that item (and its duplicates that remain).
    """
    below_offsets: NDArray[np.int64]
    """(nnz + 1,) int64: of the allowed tokens in `below_items`."""


class _Bits(NamedTuple):
    """Rows of bits, and which of them are set: token ids and offsets of the rows."""

    words: NDArray[np.int32]
    set: tuple[NDArray[np.int32], NDArray[np.int64]]

    @classmethod
    def none(cls, num_rows: int, words_per_row: int) -> _Bits:
        words = np.zeros((num_rows, words_per_row), dtype=np.int32)
        return cls(words, (np.zeros(0, dtype=np.int32), np.zeros(num_rows + 1, dtype=np.int64)))


class RankingState:
    """N rankings in progress, each over its own candidates.

    Sampling loop::

        state = RankingState(candidates, separator=separator, end=end)
        while not state.done().all():
            state.advance(sample(*state.allowed()))  # one token per row, whatever for finished rows
        rankings = state.rankings()

    Dead ends cannot happen: every allowed token leads to a full ranking. See the module for the arguments. A state may
    be handed from thread to thread; its methods release the GIL and take turns.

    Args:
        candidates: P lists of K token-id sequences, ragged in K, or `CandidateTries`.
        separator: token ids between items.
        end: token ids after the last item.
        num_ranked: how many items a row ranks: None (all), an int or (N,) ints.
        num_generations: rows per list of candidates, adjacent; N = P * num_generations.

    Raises:
        ValueError: a list or sequence is empty, a token id is negative, it cannot be told whether a ranking is
            finished, or counts are out of range; the message says where.
        TypeError: something is not a sequence of token ids.

    Example:
        >>> state = flexrec.RankingState([[[10, 20], [10, 21], [11]]], separator=[30], end=[31])
        >>> state.advance([10])
        >>> state.allowed()[0]
        array([20, 21], dtype=int32)
        >>> state.advance([21])
        >>> state.forced()[0]  # the separator: nothing else may follow
        array([30], dtype=int32)
    """

    def __init__(
        self,
        candidates: Candidates | CandidateTries,
        *,
        separator: TokenIds = (),
        end: TokenIds = (),
        num_ranked: int | ArrayLike | None = None,
        num_generations: int = 1,
    ) -> None:
        grammar = _grammar(candidates, separator, end, num_ranked, num_generations)
        self.max_length = grammar.max_length
        """The most tokens that a ranking of any row is spelled with, separators and end included."""
        self.max_token = grammar.max_token
        """The largest token id in use, -1 without any."""
        self._core = _core.RankingState(grammar)
        self._shown = _Bits.none(0, 0)  # what `allowed_bitmask` returned last with reuse

    def __len__(self) -> int:
        """N, the number of rows."""
        return self._core.num_rows

    def allowed(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The tokens that may come next: ids (nnz,) int32 and offsets (N + 1,) int64.

        Row i may be continued by ``ids[offsets[i]:offsets[i + 1]]``, ascending; finished rows by none.
        """
        return self._core.allowed()

    def allowed_bitmask(self, vocab_size: int, *, reuse: bool = False) -> NDArray[np.int32]:
        """The same as bits: (N, ceil(vocab_size / 32)) int32, 32 tokens a word, low bit first; finished rows are 0.

        Args:
            reuse: return the same read-only array at every call, which the next call overwrites. Only words that
                change are written then, and the time does not grow with the vocabulary.

        Raises:
            ValueError: ``vocab_size`` does not exceed every token id in use.
        """
        shape = (len(self), max(0, -(-as_integer("vocab_size", vocab_size) // 32)))
        bits = self._shown if reuse and self._shown.words.shape == shape else _Bits.none(*shape)
        bits = bits._replace(set=self._core.allowed_bitmask(vocab_size, bits.words, *bits.set))
        if not reuse:
            return bits.words
        self._shown = bits
        view = bits.words.view()
        view.flags.writeable = False
        return view

    def advance(self, tokens: ArrayLike, offsets: ArrayLike | None = None, *, strict: bool = True) -> None:
        """Append one token to every row, or with ``offsets`` the run ``tokens[offsets[i]:offsets[i + 1]]`` to row i.

        ``state.advance(*state.forced())`` jumps to the next real choices. Tokens of finished rows are ignored.

        Args:
            tokens: (N,) integers, or (total,) with ``offsets``.
            offsets: (N + 1,) integers, from 0 to total, not decreasing.
            strict: a token that is not allowed is an error. Otherwise its row is lost: it allows nothing, ignores
                every token and is never done, until `restart`.

        Raises:
            ValueError: a token is not allowed (the message names row, step and token), or a shape is wrong. The state
                is then as it was before the call.
        """
        token_array = as_integers("tokens", tokens, 1)
        if offsets is None:
            if len(token_array) != len(self):
                raise ValueError(f"tokens must have shape ({len(self)},), one per row, got {token_array.shape}")
            self._core.advance(token_array, None, strict)
            return
        self._core.advance(token_array, run_offsets(offsets, len(self), len(token_array)), strict)

    def restart(self, rows: ArrayLike | None = None) -> None:
        """Put rows back to their beginning: those where ``rows`` (N,) is true, or all."""
        if rows is None:
            self._core.restart(None)
            return
        chosen = np.ascontiguousarray(to_numpy(rows))
        if chosen.dtype != np.bool_ or chosen.shape != (len(self),):
            raise ValueError(f"rows must be ({len(self)},) booleans, got {chosen.dtype} of shape {chosen.shape}")
        self._core.restart(chosen)

    def forced(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The run of tokens without an alternative that comes next in every row: ids int32 and offsets (N + 1,) int64.

        A run may be empty, and is for finished rows. After it the row is at its next real choice, or done.
        """
        return self._core.forced()

    def done(self) -> NDArray[np.bool_]:
        """(N,) bool: all items ranked and the end spelled."""
        return self._core.done()

    def rankings(self) -> NDArray[np.int32]:
        """(N, T) int32, T the largest of all rows: candidate index by rank; -1 where open and beyond a row's own T.

        An item counts once nothing that may come can make it another.
        """
        return self._core.rankings()


def step_states(
    states: Sequence[RankingState], tokens: ArrayLike, offsets: ArrayLike
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
    """Advance many states and ask them what may come next, in one call.

    For rankings that come and go one by one, as the requests of a server do: a state for each of them, and a step of
    all that costs little more than a step of one batch.

    Args:
        states: their rows are counted one after the other, N in all.
        tokens: (total,) integers: row i reads ``tokens[offsets[i]:offsets[i + 1]]``, maybe none. A token that is not
            allowed loses its row, as in `RankingState.advance` with ``strict=False``.
        offsets: (N + 1,) integers, from 0 to total, not decreasing.

    Returns:
        ids (nnz,) int32 and offsets (N + 1,) int64 as from `RankingState.allowed`, and done (N,) bool. A row that
        allows nothing and is not done is lost.

    Example:
        >>> from flexrec.rankings import RankingState, step_states
        >>> states = [RankingState([[[10], [11]]]), RankingState([[[12], [13]]])]
        >>> step_states(states, [10], [0, 1, 1])[:2]  # the first read 10, the second nothing
        (array([11, 12, 13], dtype=int32), array([0, 1, 3]))
    """
    token_array = as_integers("tokens", tokens, 1)
    offset_array = run_offsets(offsets, sum(len(state) for state in states), len(token_array))
    return _core.step_states([state._core for state in states], token_array, offset_array)


def parse_rankings(
    completions: ArrayLike | Sequence[ArrayLike],
    candidates: Candidates | CandidateTries,
    *,
    separator: TokenIds = (),
    end: TokenIds = (),
    num_ranked: int | ArrayLike | None = None,
    num_generations: int = 1,
    completion_mask: ArrayLike | None = None,
) -> ParsedRankings:
    """Read completions back into rankings, whatever they are.

    A completion that is exactly a well-formed ranking is read as such (``valid``). Any other is searched for mentions
    from left to right, at each place the longest candidate that matches (just after a mention, a separator or end comes
    first). What matches neither is an unknown stretch and is skipped. Where separators join mentions, the longest run
    so joined is the ranking, the last of equally long ones, and other mentions are not: they are prose. An unknown item
    between two separators ends no run. Then one rule of repair: the first mentions, in order, then the candidates not
    among them, in candidate order, cut to T.

    Padding that is not masked counts as tokens. Mentions beyond the T-th are ignored. A completion may be invalid with
    all counts 0: when only a separator or the end is missing.

    Args:
        completions: N rows of token ids, ragged lists or a padded (N, L) integer array.
        candidates: P lists of K token-id sequences; see the module for this and the other arguments.
        completion_mask: (N, L), nonzero where a token of a padded array counts.

    Raises:
        ValueError, TypeError: as `RankingState`, and for shapes that do not fit; never for what the tokens say.

    Example:
        >>> completions, candidates = [[11, 30, 10, 20, 30, 10, 21, 31]], [[[10, 20], [10, 21], [11]]]
        >>> flexrec.parse_rankings(completions, candidates, separator=[30], end=[31]).ranking
        array([[2, 0, 1]], dtype=int32)
    """
    grammar = _grammar(candidates, separator, end, num_ranked, num_generations)
    if hasattr(completions, "shape"):
        padded = as_integers("completions", completions, 2)
        mask = np.ones(padded.shape, dtype=bool)
        if completion_mask is not None:
            mask = to_numpy(completion_mask).astype(bool)
            if mask.shape != padded.shape:
                raise ValueError(
                    f"completion_mask must have the shape of completions, {padded.shape}, got {mask.shape}"
                )
        tokens, lengths = padded[mask], mask.sum(axis=1)
    else:
        if completion_mask is not None:
            raise ValueError("completion_mask needs completions as a padded (N, L) array, got a sequence of rows")
        rows = [as_integers(f"completions[{i}]", row, 1) for i, row in enumerate(completions)]  # type: ignore[arg-type]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        tokens = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    if len(lengths) != grammar.num_rows:
        raise ValueError(f"completions must have one row per ranking, {grammar.num_rows}, got {len(lengths)}")

    parsed = ParsedRankings(
        *_core.parse_rankings(grammar, tokens, offsets_of(lengths))
    )  # item_ids still without padding
    item_ids = np.full(mask.shape, -1, dtype=np.int32)
    item_ids[mask] = parsed.item_ids
    return parsed._replace(item_ids=item_ids)


def encode_rankings(
    candidates: Candidates | CandidateTries,
    rankings: ArrayLike,
    *,
    separator: TokenIds = (),
    end: TokenIds = (),
    num_ranked: int | ArrayLike | None = None,
    num_generations: int = 1,
    with_allowed: bool = True,
) -> EncodedRankings:
    """Spell rankings as tokens, with every decision on the way: what was allowed, and the items below each branch.

    `RankingState` stepped through these tokens sees exactly these allowed sets, and the other tokens are the forced.

    Args:
        candidates: P lists of K token-id sequences; see the module for this and the other arguments.
        rankings: (N, T) integers, candidate index by rank: T items in each row (num_ranked says how many), then -1.
        with_allowed: False leaves ``allowed_ids`` and ``below_items`` empty and their offsets at 0 alone, for who needs
            the tokens and where the decisions are: most of the time and memory goes into these sets.

    Raises:
        ValueError: as `RankingState`, or for a ranking that repeats a candidate, is out of range, has not T items, or
            is spelled as another one is.

    Example:
        >>> candidates = [[[10, 20], [10, 21], [11]]]
        >>> flexrec.encode_rankings(candidates, [[2, 0, 1]], separator=[30], end=[31]).tokens
        array([11, 30, 10, 20, 30, 10, 21, 31], dtype=int32)
    """
    grammar = _grammar(candidates, separator, end, num_ranked, num_generations)
    ranking_array = as_integers("rankings", rankings, 2)
    if len(ranking_array) != grammar.num_rows:
        raise ValueError(f"rankings must have one row per ranking, {grammar.num_rows}, got {len(ranking_array)}")
    return EncodedRankings(*_core.encode_rankings(grammar, ranking_array, with_allowed))


def inverse_permutation(rankings: ArrayLike, num_candidates: int | ArrayLike) -> NDArray[np.int32]:
    """The rank of every candidate.

    Args:
        rankings: (N, T) integers, candidate index by rank, -1 beyond a row's own T.
        num_candidates: K, an int or (N,) ints.

    Returns:
        (N, largest K) int32: rank by candidate, -1 for candidates that are not ranked.

    Raises:
        ValueError: a candidate out of range, ranked twice, or after a -1; the message names row and rank.

    Example:
        >>> flexrec.inverse_permutation([[2, 0, 1]], 3)  # candidate 0 is at rank 1, ..
        array([[1, 2, 0]], dtype=int32)
    """
    ranking_array = as_integers("rankings", rankings, 2)
    if np.ndim(num_candidates) == 0:
        counts = np.full(len(ranking_array), as_integer("num_candidates", num_candidates), dtype=np.int64)
    else:
        counts = as_integers("num_candidates", num_candidates, 1)
        if len(counts) != len(ranking_array):
            raise ValueError(f"num_candidates must be an int or have shape ({len(ranking_array)},), got {counts.shape}")
    if counts.min(initial=0) < 0:
        raise ValueError(f"num_candidates must not be negative, got {counts.min()} in row {counts.argmin()}")
    return _core.inverse_permutation(ranking_array, counts)


def validate_rankings(rankings: ArrayLike, num_candidates: int | ArrayLike) -> None:
    """Raise what `inverse_permutation` raises.

    Example:
        >>> flexrec.validate_rankings([[2, 0, 1]], 3)  # nothing to complain of
    """
    inverse_permutation(rankings, num_candidates)


def _grammar(
    candidates: Candidates | CandidateTries,
    separator: TokenIds,
    end: TokenIds,
    num_ranked: int | ArrayLike | None,
    num_generations: int,
) -> _core.RankingGrammar:
    at_most: int | None = None
    by_row: NDArray[np.int64] | None = None
    if num_ranked is not None:
        if np.ndim(num_ranked) == 0:
            at_most = as_integer("num_ranked", num_ranked)
        else:
            by_row = as_integers("num_ranked", num_ranked, 1)
    tries = candidates if isinstance(candidates, CandidateTries) else CandidateTries(candidates)
    return _core.RankingGrammar(
        tries._core, separator, end, at_most, by_row, as_integer("num_generations", num_generations)
    )
