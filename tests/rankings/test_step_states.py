"""step_states: many states at once do what each does alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flexrec.rankings import RankingState, step_states

SEPARATOR, END = 3, 2


def states_of(rng: np.random.Generator, num_states: int) -> tuple[list[RankingState], list[RankingState]]:
    """The same states twice; some of several rows."""
    twice: tuple[list[RankingState], list[RankingState]] = ([], [])
    for _ in range(num_states):
        lists = [
            [rng.integers(10, 13, size=rng.integers(1, 4)).tolist() for _ in range(rng.integers(1, 6))]
            for _ in range(rng.integers(1, 3))
        ]
        for states in twice:
            states.append(RankingState(lists, separator=[SEPARATOR], end=[END], num_generations=2))
    return twice


def test_together_they_do_what_each_does_alone() -> None:
    rng = np.random.default_rng(0)
    together, alone = states_of(rng, 20)
    num_rows = sum(map(len, together))
    runs: list[list[int]] = [[]] * num_rows
    lost = 0
    while True:
        tokens = [token for run in runs for token in run]
        offsets = np.cumsum([0, *map(len, runs)])
        ids, bounds, done = step_states(together, tokens, offsets)

        rows = iter(runs)
        sets, finished = [], []
        for state in alone:
            mine = [next(rows) for _ in range(len(state))]
            state.advance([token for run in mine for token in run], np.cumsum([0, *map(len, mine)]), strict=False)
            own_ids, own_bounds = state.allowed()
            sets += np.split(own_ids, own_bounds[1:-1])
            finished += state.done().tolist()
        assert [part.tolist() for part in np.split(ids, bounds[1:-1])] == [part.tolist() for part in sets]
        assert done.tolist() == finished
        assert ids.dtype == np.int32
        assert done.dtype == np.bool_

        if all(len(part) == 0 for part in sets):
            lost = num_rows - sum(finished)
            break
        # Nothing, a token, or one that is not allowed.
        runs = [
            [] if len(part) == 0 or rng.random() < 0.2 else [99 if rng.random() < 0.01 else int(rng.choice(part))]
            for part in sets
        ]
    assert 0 < lost < num_rows
    for state, twin in zip(together, alone, strict=True):
        assert (state.rankings() == twin.rankings()).all()


def test_no_states_no_rows() -> None:
    ids, bounds, done = step_states([], [], [0])
    assert (ids.tolist(), bounds.tolist(), done.tolist()) == ([], [0], [])


@pytest.mark.parametrize(
    ("tokens", "offsets", "message"),
    [
        ([10], [0, 1], r"offsets must have shape \(3,\), got \(2,\)"),
        ([10], [0, 1, 2], "offsets must rise from 0 to the number of tokens, 1"),
        ([10, 10], [0, 2, 1], "offsets must rise"),
        ([[10]], [0, 1, 1], r"tokens must have 1 dimension\(s\)"),
    ],
)
def test_wrong_runs_change_nothing(tokens: list[int], offsets: list[int], message: str) -> None:
    states = [RankingState([[[10], [11]]]) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        step_states(states, tokens, offsets)
    assert [state.allowed()[0].tolist() for state in states] == [[10, 11], [10, 11]]


def test_threads_may_share_states_in_any_order() -> None:
    states = [RankingState([[[10 + k] for k in range(200)]]) for _ in range(8)]

    def take(first: int, reverse: bool) -> None:
        mine = states[::-1] if reverse else states
        for k in range(first, first + 100):
            step_states(mine, [10 + k] * 8, np.arange(9))

    with ThreadPoolExecutor() as pool:
        list(pool.map(take, [0, 100], [False, True]))
    assert all(state.done().all() for state in states)
