from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Tokens = Sequence[int] | NDArray[Any]

class CandidateTries:
    def __init__(self, candidates: Sequence[Sequence[_Tokens]]) -> None: ...
    @staticmethod
    def from_arrays(
        tokens: NDArray[np.int32], sequence_offsets: NDArray[np.int64], list_offsets: NDArray[np.int64]
    ) -> CandidateTries: ...
    @property
    def num_lists(self) -> int: ...

class RankingGrammar:
    def __init__(
        self,
        tries: CandidateTries,
        separator: _Tokens,
        end: _Tokens,
        at_most: int | None,
        by_row: NDArray[np.int64] | None,
        num_generations: int,
    ) -> None: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def max_token(self) -> int: ...

class RankingState:
    def __init__(self, grammar: RankingGrammar) -> None: ...
    @property
    def num_rows(self) -> int: ...
    def allowed(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
    def forced(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
    def allowed_bitmask(
        self,
        vocab_size: int,
        words: NDArray[np.int32],
        set_ids: NDArray[np.int32],
        set_offsets: NDArray[np.int64],
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...
    def advance(self, tokens: NDArray[np.int64], offsets: NDArray[np.int64] | None, strict: bool) -> None: ...
    def restart(self, rows: NDArray[np.bool_] | None) -> None: ...
    def done(self) -> NDArray[np.bool_]: ...
    def rankings(self) -> NDArray[np.int32]: ...

def step_states(
    states: Sequence[RankingState], tokens: NDArray[np.int64], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]: ...
def parse_rankings(
    grammar: RankingGrammar, tokens: NDArray[np.int64], offsets: NDArray[np.int64]
) -> tuple[
    NDArray[np.int32],
    NDArray[np.bool_],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.int32],
]: ...
def encode_rankings(
    grammar: RankingGrammar, rankings: NDArray[np.int64], with_allowed: bool
) -> tuple[
    NDArray[np.int32],
    NDArray[np.int64],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.int64],
    NDArray[np.int32],
    NDArray[np.int64],
]: ...
def inverse_permutation(rankings: NDArray[np.int64], num_candidates: NDArray[np.int64]) -> NDArray[np.int32]: ...
