"""Sorting the columns of a tile: eight lists at once, descending, without a branch that depends on the data.

A bitonic network: two sorted runs, the second read backwards, are compared entry by entry; then entries half a run
apart, a quarter apart, and so on. Every comparison is one minimum and one maximum over all lanes. Storing is what
limits it, so eight rows at a time are taken into registers and go through three rounds of comparisons there.

Work for n rows: n / 8 blocks of 19 comparisons, then log2(n / 8) merges, the one into runs of 2p in
ceil(log2(2p) / 3) passes over the tile; each pass reads and writes every row once.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from flexrec.numba_kernels.lanes import LANES, larger_and_smaller, load, store


@njit(cache=True, fastmath=False)
def padded_rows(n: int) -> int:
    """Rows that a tile needs so that n of them can be sorted: a power of two, at least 8."""
    rows = LANES
    while rows < n:
        rows *= 2
    return rows


@njit(cache=True, fastmath=False)
def _sort_eight(tile: np.ndarray, row: int) -> None:
    """Eight rows in 19 comparisons, the fewest possible."""
    a, b, c, d = load(tile, row), load(tile, row + 1), load(tile, row + 2), load(tile, row + 3)
    e, f, g, h = load(tile, row + 4), load(tile, row + 5), load(tile, row + 6), load(tile, row + 7)
    (a, c), (b, d) = larger_and_smaller(a, c), larger_and_smaller(b, d)
    (e, g), (f, h) = larger_and_smaller(e, g), larger_and_smaller(f, h)
    (a, e), (b, f) = larger_and_smaller(a, e), larger_and_smaller(b, f)
    (c, g), (d, h) = larger_and_smaller(c, g), larger_and_smaller(d, h)
    (a, b), (c, d) = larger_and_smaller(a, b), larger_and_smaller(c, d)
    (e, f), (g, h) = larger_and_smaller(e, f), larger_and_smaller(g, h)
    (c, e), (d, f) = larger_and_smaller(c, e), larger_and_smaller(d, f)
    (b, e), (d, g) = larger_and_smaller(b, e), larger_and_smaller(d, g)
    (b, c), (d, e), (f, g) = larger_and_smaller(b, c), larger_and_smaller(d, e), larger_and_smaller(f, g)
    for i, value in enumerate((a, b, c, d, e, f, g, h)):
        store(tile, row + i, value)


@njit(cache=True, fastmath=False)
def _three_rounds(tile: np.ndarray, first: int, step: int, second: int, second_step: int, target: int) -> None:
    """Compare rows first, first + step, .. (four) with second, second + second_step, .. (four), then each four two
    apart, then one apart. The second four are written to rows target, target + step, .."""
    a, b, c, d = load(tile, first), load(tile, first + step), load(tile, first + 2 * step), load(tile, first + 3 * step)
    e, f = load(tile, second), load(tile, second + second_step)
    g, h = load(tile, second + 2 * second_step), load(tile, second + 3 * second_step)
    (a, e), (b, f) = larger_and_smaller(a, e), larger_and_smaller(b, f)
    (c, g), (d, h) = larger_and_smaller(c, g), larger_and_smaller(d, h)
    (a, c), (b, d) = larger_and_smaller(a, c), larger_and_smaller(b, d)
    (e, g), (f, h) = larger_and_smaller(e, g), larger_and_smaller(f, h)
    (a, b), (c, d) = larger_and_smaller(a, b), larger_and_smaller(c, d)
    (e, f), (g, h) = larger_and_smaller(e, f), larger_and_smaller(g, h)
    for i, value in enumerate((a, b, c, d)):
        store(tile, first + i * step, value)
    for i, value in enumerate((e, f, g, h)):
        store(tile, target + i * step, value)


@njit(cache=True, fastmath=False)
def _best_of_two(tile: np.ndarray, first: int, step: int, mirrored: int) -> None:
    """Of rows first, first + step, .. (four) and mirrored, mirrored - step, .. the larger ones; these are compared two
    apart, then one apart."""
    a, _ = larger_and_smaller(load(tile, first), load(tile, mirrored))
    b, _ = larger_and_smaller(load(tile, first + step), load(tile, mirrored - step))
    c, _ = larger_and_smaller(load(tile, first + 2 * step), load(tile, mirrored - 2 * step))
    d, _ = larger_and_smaller(load(tile, first + 3 * step), load(tile, mirrored - 3 * step))
    (a, c), (b, d) = larger_and_smaller(a, c), larger_and_smaller(b, d)
    (a, b), (c, d) = larger_and_smaller(a, b), larger_and_smaller(c, d)
    for i, value in enumerate((a, b, c, d)):
        store(tile, first + i * step, value)


@njit(cache=True, fastmath=False)
def _halve(tile: np.ndarray, begin: int, end: int, half: int) -> None:
    """Sort runs of 2 x half rows, each of which rises and then falls or the other way about."""
    while half > 0:
        half = max(half, 4)  # the last three rounds are 4, 2, 1; one that has been done before changes nothing
        step = half // 4
        for run in range(begin, end, 2 * half):
            for row in range(run, run + step):
                _three_rounds(tile, row, step, row + half, step, row + half)
        half //= 8


@njit(cache=True, fastmath=False)
def sort_columns_descending(tile: np.ndarray, n: int, keep: int) -> None:
    """Sort the first n rows of the tile (padded_rows(n), 8), numbers >= 0, so that its first ``keep`` are right.

    Rows from n on must be 0.
    """
    kept = padded_rows(keep)
    for row in range(0, n, LANES):
        _sort_eight(tile, row)
    run = LANES  # rows of a sorted run
    while run < min(n, kept):
        step = run // 4
        for begin in range(0, n, 2 * run):
            for row in range(begin, begin + step):
                mirrored = 2 * begin + 2 * run - 1 - row
                _three_rounds(tile, row, step, mirrored, -step, mirrored - 3 * step)
        _halve(tile, 0, n, step // 2)
        run *= 2
    while run < n:  # runs are `kept` long and stay so: of two, the largest go into the first
        for begin in range(0, n - run, 2 * run):
            for row in range(begin, begin + kept // 4):
                _best_of_two(tile, row, kept // 4, 2 * begin + run + kept - 1 - row)
            _halve(tile, begin, begin + kept, kept // 8)
        run *= 2
