"""Lists that are longer than what a model can rank at once: which windows of candidates to show it, and what follows.

A strategy is a generator. It yields windows (arrays of candidates' numbers), is sent an order of each, best first, and
returns the order of all. So it knows nothing of models, and the windows of many lists can be ranked together
(:func:`rank_by_windows`). Every candidate is in a window at least once.

Model calls for K candidates, windows of W and steps of S (where K > W; else one):

    sliding     ceil((K - W) / S) + 1, one after the other     from the bottom up, W - S items carried (RankGPT)
    tournament  ceil(K / W) in the first round, S of each window go on to the next, until one window is left
    prerank     the same, the first round in one pass each, and so many of each as fit one window

Sun et al. 2023 (arXiv 2304.09542) slide; Zhuang et al. 2024 (arXiv 2310.09497) compare sets; Reddy et al. 2024 (arXiv
2406.15657) read the first decision alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np

from flexrec.decoding.options import STRATEGIES

Windows = list[np.ndarray]  # of candidates' numbers
Strategy = Generator[Windows, Sequence[np.ndarray], np.ndarray]


class Plan(NamedTuple):
    """How long lists are ranked.

    Raises:
        ValueError: an unknown strategy, a window of fewer than two, or a step that is not below the window.

    Example:
        >>> from flexrec.decoding.windows import Plan
        >>> Plan("sliding", window=20, step=10).calls(100)
        9
    """

    strategy: str
    window: int
    step: int

    def check(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if self.window < 2:
            raise ValueError(f"window must be at least 2 candidates, got {self.window}")
        if not 1 <= self.step < self.window:
            raise ValueError(f"step must lie between 1 and window - 1 = {self.window - 1}, got {self.step}")

    def calls(self, size: int) -> int:
        """How many windows are ranked for a list of ``size`` candidates."""
        self.check()
        if size <= self.window:
            return 1
        if self.strategy == "sliding":
            return -(-(size - self.window) // self.step) + 1
        groups = _groups(size, self.window)
        return len(groups) + self.calls(sum(min(len(group), self.kept(len(group), len(groups))) for group in groups))

    def kept(self, size: int, groups: int) -> int:
        """How many of a window of ``size``, one of so many, go on to the next round: of a full one ``step``, or, where
        the next is to be the last, what fits it."""
        return max(1, self.window // groups if self.strategy == "prerank" else size * self.step // self.window)


def strategy_of(plan: Plan, size: int) -> Strategy:
    """The strategy of a plan for a list of ``size`` candidates, to be sent orders; one window, the last round, where it
    fits."""
    plan.check()
    slides = plan.strategy == "sliding" and size > plan.window
    return sliding(size, plan) if slides else rounds(size, plan)


def sliding(size: int, plan: Plan) -> Strategy:
    """From the bottom up: each window is put in order, and the next begins ``step`` further up.

    The best W - S of all candidates come to the top, whoever they are and wherever they stood.
    """
    order = np.arange(size)
    start = size - plan.window
    while True:
        (found,) = yield [order[start : start + plan.window]]
        order[start : start + plan.window] = found
        if start == 0:
            return order
        start = max(0, start - plan.step)


def rounds(size: int, plan: Plan) -> Strategy:
    """The best of each window go on; who is out stands behind those that went further, by the places in the windows."""
    standing, behind = np.arange(size), np.zeros(0, dtype=np.int64)
    while len(standing) > plan.window:
        groups = _groups(len(standing), plan.window)
        orders = yield [standing[group] for group in groups]
        kept = [plan.kept(len(order), len(groups)) for order in orders]
        behind = np.concatenate([_in_turn([order[n:] for order, n in zip(orders, kept, strict=True)]), behind])
        standing = _in_turn([order[:n] for order, n in zip(orders, kept, strict=True)])
    (order,) = yield [standing]
    return np.concatenate([order, behind])


class Window(NamedTuple):
    """Candidates that are shown together."""

    list: int  # whose they are
    candidates: np.ndarray
    alone: bool  # and not one of several of its list that are ranked at the same time


def rank_by_windows(
    sizes: Sequence[int], plan: Plan, rank: Callable[[list[Window]], Sequence[np.ndarray]]
) -> tuple[list[np.ndarray], list[int]]:
    """Orders of lists of these sizes, and how many windows each took. Windows of all lists are ranked together.

    Args:
        rank: is given windows, and returns the places of each one's best, second best .. in it.

    Example:
        >>> from flexrec.decoding.windows import Plan, rank_by_windows
        >>> worth = np.array([3, 9, 1, 7, 5, 8, 2])
        >>> def by_worth(windows):
        ...     return [np.argsort(-worth[window.candidates]) for window in windows]
        ...
        >>> orders, calls = rank_by_windows([7], Plan("sliding", window=4, step=2), by_worth)
        >>> orders[0][:2].tolist(), calls
        ([1, 5], [3])
    """
    strategies = [strategy_of(plan, size) for size in sizes]
    asked = {n: next(strategy) for n, strategy in enumerate(strategies)}
    orders, calls = [np.zeros(0, dtype=np.int64)] * len(sizes), [0] * len(sizes)
    while asked:
        windows = [Window(n, shown, len(of_list) == 1) for n, of_list in asked.items() for shown in of_list]
        answers = iter(rank(windows))
        found = {n: [window[next(answers)] for window in of_list] for n, of_list in asked.items()}
        asked = {}
        for n, ordered in found.items():
            calls[n] += len(ordered)
            try:
                asked[n] = strategies[n].send(ordered)
            except StopIteration as done:
                orders[n] = done.value
    return orders, calls


def _groups(size: int, window: int) -> list[np.ndarray]:
    """Places 0 .. size - 1 in as few groups of at most ``window`` as there can be, alike in size."""
    return np.array_split(np.arange(size), -(-size // window))


def _in_turn(orders: Sequence[np.ndarray]) -> np.ndarray:
    """The first of each, then the second of each, and so on."""
    longest = max(map(len, orders), default=0)
    return np.array([order[k] for k in range(longest) for order in orders if k < len(order)], dtype=np.int64)
