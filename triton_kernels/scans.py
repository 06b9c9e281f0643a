"""Sums, products and chains of maps over what lies behind or before each column of a tile, by pairs, fours, eights ..

Everything here costs log2(C) steps, most of them on registers of one thread (see ``lists.load_tile``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Maps(NamedTuple):
    """Maps t -> m t + a and t -> m t + b: (R, C) for one at every column, or (R, 1)."""

    m: Any
    a: Any
    b: Any


@triton.constexpr_function
def log2(power_of_two: int) -> int:
    """The exponent, at compile time."""
    return power_of_two.bit_length() - 1


@triton.jit
def partner(x, BIT: tl.constexpr):
    """(R, C) the element whose column differs in one bit: a register or a shuffle, once the compiler is through."""
    BITS: tl.constexpr = tl.int64 if x.dtype.primitive_bitwidth == 64 else tl.int32
    pairs = x.to(BITS, bitcast=True).reshape(x.shape[0], x.shape[1] >> (BIT + 1), 2, 1 << BIT)
    pairs = tl.sum(pairs, axis=2, keep_dims=True) - pairs  # integers wrap: exact
    return pairs.reshape(x.shape[0], x.shape[1]).to(x.dtype, bitcast=True)


@triton.jit
def sum_of_rows(x):
    """(R, 1) the sum of each row (R, C), a bit of the column at a time.

    For what has been halved often: its layout can keep a row in lanes of a warp that are not neighbours, with copies in
    those between, and Triton 3.6 reduces over neighbours all the same. Over one bit it finds the right lane.
    """
    for _ in tl.static_range(log2(x.shape[1])):
        x = tl.sum(x.reshape(x.shape[0], x.shape[1] // 2, 2), axis=2)
    return x


@triton.jit
def _sums_beyond(x, LATER: tl.constexpr):
    """``sums_beyond`` by pairs, fours, eights .. : log2(C) additions per element."""
    column = tl.arange(0, x.shape[1])[None, :]  # (1, C)
    beyond, group = tl.zeros_like(x), x
    for bit in tl.static_range(log2(x.shape[1])):
        other = partner(group, bit)
        is_second = (column >> bit) & 1 == 1
        beyond += tl.where(is_second != LATER, other, 0.0)
        group += other
    return beyond


@triton.jit
def sums_beyond(x, LATER: tl.constexpr):
    """(R, C) the sum of what lies behind each column (or before it, unless LATER).

    Within quarters of registers first, then over the sums of these. Not ``tl.cumsum(reverse=True)``, which turns rows
    round by shuffles, nor total minus prefix, which would carry the rounding of the whole list into ranks with few
    candidates behind them.
    """
    fours = x.reshape(x.shape[0], x.shape[1] // 4, 4)  # (R, C / 4, 4)
    far = _sums_beyond(tl.sum(fours, axis=2), LATER)  # (R, C / 4)
    near = _sums_beyond(x.reshape(x.shape[0] * x.shape[1] // 4, 4), LATER).reshape(x.shape[0], x.shape[1] // 4, 4)
    return (near + far[:, :, None]).reshape(x.shape[0], x.shape[1])  # (R, C)


@triton.jit
def sums_behind(x):
    """(R, C) the sum of what lies behind each column."""
    return sums_beyond(x, True)


@triton.jit
def two_sums_behind(a, b):
    """``sums_behind`` of two tensors as one of twice the rows: half the operations to compile."""
    both = tl.join(a, b).permute(2, 0, 1).reshape(2 * a.shape[0], a.shape[1])  # (2 R, C)
    return sums_behind(both).reshape(2, a.shape[0], a.shape[1]).permute(1, 2, 0).split()  # (R, C) twice


@triton.jit
def products_before(x):
    """(R, C) the product of what lies before each column, and (R, 1) that of the row."""
    column = tl.arange(0, x.shape[1])[None, :]  # (1, C)
    before, group = tl.full(x.shape, 1.0, x.dtype), x
    for bit in tl.static_range(log2(x.shape[1])):
        other = partner(group, bit)
        before *= tl.where((column >> bit) & 1 == 1, other, 1.0)
        group *= other
    return before, tl.max(group, axis=1, keep_dims=True)  # all columns have the row's product


@triton.jit
def compose(maps, LATER: tl.constexpr):
    """Chains of the maps behind each column (or before it, unless LATER), and of the whole row: ``Maps`` twice.

    The column next to the one in question is the last to be applied. Nothing is ever divided by a product of ``m``.
    """
    m, a, b = maps.m, maps.a, maps.b
    column = tl.arange(0, m.shape[1])[None, :]  # (1, C)
    chain_m, chain_a, chain_b = tl.full(m.shape, 1.0, m.dtype), tl.zeros_like(a), tl.zeros_like(b)  # (R, C)
    for bit in tl.static_range(log2(m.shape[1])):
        other_m, other_a, other_b = partner(m, bit), partner(a, bit), partner(b, bit)
        is_outer = ((column >> bit) & 1 == 1) != LATER  # applied after the partner's
        chain_a = tl.where(is_outer, chain_m * other_a + chain_a, chain_a)
        chain_b = tl.where(is_outer, chain_m * other_b + chain_b, chain_b)
        chain_m = tl.where(is_outer, chain_m * other_m, chain_m)
        a = tl.where(is_outer, m * other_a + a, other_m * a + other_a)
        b = tl.where(is_outer, m * other_b + b, other_m * b + other_b)
        m = m * other_m
    # All columns now have the row's chain.
    row_m, row_a, row_b = tl.max(m, 1, keep_dims=True), tl.max(a, 1, keep_dims=True), tl.max(b, 1, keep_dims=True)
    return Maps(chain_m, chain_a, chain_b), Maps(row_m, row_a, row_b)  # (R, C), (R, 1)
