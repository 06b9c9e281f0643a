"""Strategies for long lists: everybody is seen, the best come to the top, and the calls are those that were said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.decoding.options import STRATEGIES
from flexrec.decoding.windows import Plan, rank_by_windows


class ByWorth:
    """Ranks windows by worth, and notes what it was shown."""

    def __init__(self, worths):
        self.worths, self.windows, self.rounds = worths, [], 0

    def __call__(self, windows):
        self.rounds += 1
        self.windows += windows
        return [np.argsort(-self.worths[w.list][w.candidates], kind="stable") for w in windows]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_candidate_is_seen_and_the_best_come_first(data):
    strategy = data.draw(st.sampled_from(STRATEGIES))
    window = data.draw(st.integers(2, 12))
    plan = Plan(strategy, window, data.draw(st.integers(1, window - 1)))
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    rank = ByWorth([rng.permutation(size) for size in sizes])
    orders, calls = rank_by_windows(sizes, plan, rank)
    for n, (size, order) in enumerate(zip(sizes, orders, strict=True)):
        assert sorted(order.tolist()) == list(range(size)), "an order of all"
        shown = [w for w in rank.windows if w.list == n]
        assert set(np.concatenate([w.candidates for w in shown]).tolist()) == set(range(size))
        assert max(len(w.candidates) for w in shown) <= window
        assert calls[n] == len(shown) == plan.calls(size)
        best = np.argsort(-rank.worths[n])
        # How many places at the top a ranker that never errs is sure to fill.
        sure = {"sliding": window - plan.step, "tournament": 1, "prerank": 1}[strategy]
        sure = size if size <= window else sure
        assert order[:sure].tolist() == best[:sure].tolist()
    assert rank.rounds <= max(calls)


def test_lists_share_their_rounds():
    """Ten lists take as many rounds as one."""
    worths = [np.random.default_rng(n).permutation(100) for n in range(10)]
    for strategy, rounds in (("sliding", 9), ("tournament", 4), ("prerank", 2)):
        rank = ByWorth(worths)
        _, calls = rank_by_windows([100] * 10, Plan(strategy, 20, 10), rank)
        assert rank.rounds == rounds
        assert len(rank.windows) == sum(calls) == 10 * Plan(strategy, 20, 10).calls(100)


def test_the_calls_of_the_papers_setting():
    assert [Plan(strategy, 20, 10).calls(100) for strategy in STRATEGIES] == [9, 11, 6]
    assert [Plan(strategy, 20, 10).calls(20) for strategy in STRATEGIES] == [1, 1, 1]


def test_several_windows_of_a_list_at_once_are_told_from_one_alone():
    rank = ByWorth([np.arange(30), np.arange(5)])
    rank_by_windows([30, 5], Plan("prerank", 10, 5), rank)
    assert [(w.list, w.alone) for w in rank.windows] == [(0, False), (0, False), (0, False), (1, True), (0, True)]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (("sideways", 20, 10), "strategy must be one of sliding, tournament, prerank, got 'sideways'"),
        (("sliding", 1, 1), "window must be at least 2 candidates, got 1"),
        (("sliding", 20, 0), "step must lie between 1 and window - 1 = 19, got 0"),
        (("sliding", 20, 20), "step must lie between 1 and window - 1 = 19, got 20"),
    ],
)
def test_plans_that_would_not_end_or_leave_somebody_out_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        Plan(*plan).calls(100)
    with pytest.raises(ValueError, match=message):
        rank_by_windows([100], Plan(*plan), ByWorth([np.arange(100)]))
