"""The SIMD building blocks of the numba kernels: eight lists side by side, sorting them, their term gains."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from flexrec.numba_kernels.lane_sort import padded_rows, sort_columns_descending
from flexrec.numba_kernels.lanes import LANES, load, store, widen
from flexrec.numba_kernels.tiles import BURGES, SCALED, read_lists, scaled_one, term_gain, write_lists


@njit
def term_gains(gains: np.ndarray, kind: int, tops: np.ndarray, out: np.ndarray) -> None:
    for k in range(len(gains)):
        store(out, k, term_gain(widen(load(gains, k)), kind, load(tops, k)))


@njit
def scaled_ones(tops: np.ndarray, out: np.ndarray) -> None:
    for k in range(len(tops)):
        store(out, k, scaled_one(load(tops, k)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sort_puts_the_largest_first(dtype):
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 100, 128, 129, 300, 1030):
        for keep in (1, 2, 8, 9, 16, 33, 100, 5000):
            tile = np.zeros((padded_rows(n), LANES), dtype=dtype)
            tile[:n] = rng.integers(0, 20, (n, LANES)) * rng.random((n, LANES))  # ties and zeros
            expected = -np.sort(-tile[:n], axis=0)
            sort_columns_descending(tile, n, keep)
            np.testing.assert_array_equal(tile[: min(n, keep)], expected[:keep])
            assert not tile[n:].any()


@pytest.mark.parametrize("n", range(1, 18))
def test_sort_puts_zeros_and_ones_in_order(n):
    """A network that sorts all lists of zeros and ones sorts all lists: every one to n = 12, a sample beyond."""
    lists = np.arange(2**n) if n <= 12 else np.random.default_rng(n).integers(0, 2**n, 2**12)
    lists = np.resize(lists, -(-len(lists) // LANES) * LANES).reshape(-1, LANES)
    for eight in lists:
        tile = np.zeros((padded_rows(n), LANES), dtype=np.float32)
        tile[:n] = (eight >> np.arange(n)[:, None]) & 1
        ones = tile.sum(axis=0)
        sort_columns_descending(tile, n, n)
        np.testing.assert_array_equal(tile[:n], np.arange(n)[:, None] < ones)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 8), (9, 9), (13, 16), (21, 37)])
def test_lists_go_into_tiles_and_back(shape, dtype):
    lists = np.random.default_rng(1).random(shape).astype(dtype)
    rows, size = shape
    written = np.full_like(lists, np.nan)
    for first in range(0, rows, LANES):
        tile = np.full((size, LANES), np.nan, dtype=dtype)
        read_lists(lists, first, tile)
        several = np.minimum(np.arange(first, first + LANES), rows - 1)
        np.testing.assert_array_equal(tile, lists[several].T)
        write_lists(tile, first, written)
    np.testing.assert_array_equal(written, lists)


@settings(max_examples=200, deadline=None)
@given(gains=st.lists(st.floats(0.0, 100.0), min_size=LANES, max_size=LANES))
def test_exponential_gains_to_the_last_digits(gains):
    """2^g - 1 within 3 units in the last place of expm1, whatever the gain; exact where g is an integer."""
    g, out = np.array([gains]), np.empty((1, LANES))
    term_gains(g, BURGES, np.zeros((1, LANES)), out)
    expected = np.expm1(g.astype(np.longdouble) * np.log(np.longdouble(2)))
    assert (np.abs(out - expected) <= 3 * np.finfo(float).eps * expected + 5e-324).all()
    whole = np.floor(g)
    term_gains(whole, BURGES, np.zeros((1, LANES)), out)
    np.testing.assert_array_equal(out, 2.0**whole - 1.0)


@settings(max_examples=200, deadline=None)
@given(
    top=st.one_of(st.floats(0.0, 50.0), st.floats(0.0, 1e30)),
    below=st.lists(st.floats(0.0, 1.0), min_size=LANES, max_size=LANES),
)
def test_scaled_gains_do_not_overflow(top, below):
    """(2^g - 1) / 2^top for g <= top, up to gains of 1e30."""
    g, tops, out = np.array([below]) * top, np.full((1, LANES), top), np.empty((1, LANES))
    term_gains(g, SCALED, tops, out)
    expected = np.exp2(g - top) - np.exp2(-top)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-15)
    assert (out >= 0).all()
    assert (out <= 1).all()
    scaled_ones(tops, out)
    np.testing.assert_allclose(out, np.exp2(-top), rtol=1e-14, atol=1e-307)
