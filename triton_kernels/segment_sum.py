"""Weighted sums of gathered rows over ragged segments: a sparse matrix times a dense one, both ways.

    out[s] (+)= sum over the entries e of segment s of coefficient[e] * table[index[e]]                 segment_sum
    out[place[e]] += coefficient[e] * table[index[e]]                                                   scatter_add
    out[token] += sum over the entries e of a token of table[e]                                         add_by_token

Segment s has the entries offsets[s] .. offsets[s + 1] of nnz. Both take equal shares of the entries to a program,
however long the segments are: ``segment_sum`` cuts long ones into pieces of PIECE entries, whose sums are added up in
order by a second kernel. It never adds from two programs to one number, and so is bitwise repeatable; ``scatter_add``
does, in any order, and needs no sorted entries. An entry whose coefficient is 0 reads no row.

Bytes, with e bytes an element of the table, n entries that are not 0 and S segments that have any:
    owners        8 log2(S) an entry read from the caches, 4 written
    segment_sum   n D e (gathered) + S D e (out); 16 D for each PIECE of a segment that has more than one
    scatter_add   n D e (gathered; neighbours with one index from L1) + 8 n D (additions in the L2 cache)
Each gathered element is used once, in one multiplication: nothing here is for tensor cores.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexrec.triton_kernels.launch import ceil_div, kernel, launch

PIECE = 1024  # entries that one program of segment_sum adds up
JOIN = 16, 256  # pieces and columns that are added up at once
# Columns of a sum at most. Most segments have few entries: at 256 columns sixteen would be gone over for the sake of
# one, by four times as many programs, each of which first finds out what is its own.
SUM_WIDTH = 1024
FLAT = 256  # entries of one program of owners


@kernel
def owners_kernel(
    offsets_ptr,  # (S + 1,) int64, ascending from 0
    owner_ptr,  # (entries,) int32
    entries,
    segments,  # S
    BLOCK: tl.constexpr,
):
    """The segment of every entry, the last that begins at or before it. One program: BLOCK entries."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    ok = entry < entries
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.zeros((BLOCK,), tl.int32) + (segments - 1)
    for _ in range(31):  # enough for every int32; once low and high meet, they stay
        middle = low + (high - low + 1) // 2
        begins = tl.load(offsets_ptr + middle, mask=ok, other=0) <= entry
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    tl.store(owner_ptr + entry, low, mask=ok)


@kernel
def segment_sum_kernel(
    coefficient_ptr,  # (nnz,) float32
    index_ptr,  # (nnz,) integer
    table_ptr,  # (.., D)
    offsets_ptr,  # (S + 1,) int64: entries of every segment
    pieces_ptr,  # (S + 1,) int64: pieces of every segment
    owner_ptr,  # (pieces,) int32: segment of every piece
    out_ptr,  # (S, D)
    partial_ptr,  # (2 * number of PIECEs in nnz, D) float32, or None where nnz <= PIECE
    table_rows,
    segments,  # S
    D,
    ACCUMULATE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_D columns of one piece's sum of coefficient * table[index]. Zero coefficients read no row.

    A segment of one piece is complete and goes to ``out``; of several, each goes to a row of its own in ``partial``.
    Two rows per PIECE entries suffice: such segments have more than PIECE entries, so that among pieces that begin
    between two multiples of PIECE at most one is the first of its segment, and at most one is not.
    """
    piece = tl.program_id(0).to(tl.int64)
    if piece < tl.load(pieces_ptr + segments):
        segment = tl.load(owner_ptr + piece).to(tl.int64)
        first_piece = tl.load(pieces_ptr + segment)
        start = tl.load(offsets_ptr + segment) + (piece - first_piece) * PIECE
        end = tl.minimum(start + PIECE, tl.load(offsets_ptr + segment + 1))
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
        d_ok = d < D
        products = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        at = start
        while at < end:
            entry = at + tl.arange(0, BLOCK_E)  # (BLOCK_E,)
            coefficient = tl.load(coefficient_ptr + entry, mask=entry < end, other=0.0)
            index = tl.load(index_ptr + entry, mask=entry < end, other=-1).to(tl.int64)  # without waiting for the other
            live = (coefficient != 0.0) & (index >= 0) & (index < table_rows)
            rows = tl.load(table_ptr + index[:, None] * D + d[None, :], mask=live[:, None] & d_ok[None, :], other=0.0)
            products += coefficient[:, None] * rows.to(tl.float32)
            at += BLOCK_E
        total = tl.sum(products, axis=0)  # (BLOCK_D,)
        if tl.load(pieces_ptr + segment + 1) - first_piece == 1:
            place = out_ptr + segment * D + d
            if ACCUMULATE:
                total += tl.load(place, mask=d_ok, other=0.0).to(tl.float32)
            tl.store(place, total.to(out_ptr.dtype.element_ty), mask=d_ok)
        elif partial_ptr is not None:  # without it, no segment has several pieces
            slot = 2 * (start // PIECE) + (piece == first_piece).to(tl.int64)
            tl.store(partial_ptr + slot * D + d, total, mask=d_ok)


@kernel
def segment_join_kernel(
    segment_ptr,  # (nnz,) integer: segment of every entry
    offsets_ptr,  # (S + 1,) int64
    out_ptr,  # (S, D)
    partial_ptr,  # (2 * number of PIECEs in nnz, D) float32
    segments,  # S
    D,
    ACCUMULATE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_D columns of the segment of several pieces that begins between two multiples of PIECE, if any.

    It has more than PIECE entries, so it is the one that owns the entry at the second of the two.
    """
    boundary = (tl.program_id(0).to(tl.int64) + 1) * PIECE
    segment = tl.load(segment_ptr + boundary).to(tl.int64)
    exists = (segment >= 0) & (segment < segments)
    begin = tl.load(offsets_ptr + segment, mask=exists, other=0)
    end = tl.load(offsets_ptr + segment + 1, mask=exists, other=0)
    if (begin >= boundary - PIECE) & (begin < boundary) & (end - begin > PIECE):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
        d_ok = d < D
        num_pieces = (end - begin + PIECE - 1) // PIECE
        sums = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        at = num_pieces * 0
        while at < num_pieces:
            piece = at + tl.arange(0, BLOCK_E)  # (BLOCK_E,)
            slot = 2 * ((begin + piece * PIECE) // PIECE) + (piece == 0).to(tl.int64)
            sums += tl.load(
                partial_ptr + slot[:, None] * D + d[None, :],
                mask=(piece < num_pieces)[:, None] & d_ok[None, :],
                other=0.0,
            )
            at += BLOCK_E
        total = tl.sum(sums, axis=0)  # (BLOCK_D,)
        place = out_ptr + segment * D + d
        if ACCUMULATE:
            total += tl.load(place, mask=d_ok, other=0.0).to(tl.float32)
        tl.store(place, total.to(out_ptr.dtype.element_ty), mask=d_ok)


@kernel
def runs_kernel(
    token_ptr,  # (entries,) integer, ascending
    order_ptr,  # (entries,) integer: which row each entry has
    rows_ptr,  # (entries, D)
    out_ptr,  # (V, D) added to at a token's place if TABLE, else (entries, D) written
    entries,
    V,
    D,
    TABLE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_D columns of the sum of a token's rows, by its first entry; the others have 0, if anything.

    Nothing but the order is needed, no segments and no waiting. A token has a row for each list, and thus few.
    """
    first = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ptr + first).to(tl.int64)
    before = tl.load(token_ptr + first - 1, mask=first > 0, other=0).to(tl.int64)
    is_first = (first == 0) | (token != before)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    d_ok = d < D
    sums = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    at = tl.where(is_first, first, entries)
    while at < entries:
        entry = at + tl.arange(0, BLOCK_E)  # (BLOCK_E,)
        ok = entry < entries
        ok = ok & (tl.load(token_ptr + entry, mask=ok, other=-1).to(tl.int64) == token)
        row = tl.load(order_ptr + entry, mask=ok, other=0).to(tl.int64)
        rows = tl.load(rows_ptr + row[:, None] * D + d[None, :], mask=ok[:, None] & d_ok[None, :], other=0.0)
        sums += rows.to(tl.float32)
        at = tl.where(tl.sum(ok.to(tl.int32)) == BLOCK_E, at + BLOCK_E, entries)
    total = tl.sum(sums, axis=0)  # (BLOCK_D,)
    if TABLE:
        ok = d < tl.where(is_first & (token >= 0) & (token < V), D, 0)
        place = out_ptr + token * D + d
        total += tl.load(place, mask=ok, other=0.0).to(tl.float32)
    else:
        ok = d_ok
        place = out_ptr + first * D + d
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=ok)


@kernel
def scatter_kernel(
    coefficient_ptr,  # (nnz,) float32
    index_ptr,  # (nnz,) int32
    table_ptr,  # (.., D)
    place_ptr,  # (nnz,) int64
    out_ptr,  # (V, D) float32
    entries,  # nnz
    V,
    D,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[place] += coefficient * table[index]. One program: BLOCK_D columns of BLOCK_E entries."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)  # (BLOCK_E,)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    coefficient = tl.load(coefficient_ptr + entry, mask=entry < entries, other=0.0)
    live = coefficient != 0.0
    place = tl.load(place_ptr + entry, mask=live, other=-1)
    live = (place >= 0) & (place < V)
    tile_ok = live[:, None] & (d < D)[None, :]
    index = tl.load(index_ptr + entry, mask=live, other=0).to(tl.int64)
    rows = tl.load(table_ptr + index[:, None] * D + d[None, :], mask=tile_ok, other=0.0)
    products = coefficient[:, None] * rows.to(tl.float32)
    tl.atomic_add(out_ptr + place[:, None] * D + d[None, :], products, mask=tile_ok, sem="relaxed")


def owners(offsets: Tensor, entries: int) -> Tensor:
    """The segment of every entry: (entries,) int32, from offsets (S + 1,) int64 ascending from 0; the last segment's
    number for entries beyond the last offset."""
    owner = torch.empty(entries, dtype=torch.int32, device=offsets.device)
    if entries:
        launch(owners_kernel, (ceil_div(entries, FLAT),), offsets, owner, entries, len(offsets) - 1, BLOCK=FLAT)
    return owner


def segment_sum(
    coefficient: Tensor,
    index: Tensor,
    table: Tensor,
    segment: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    accumulate: bool = False,
    min_entries: int = 1,
) -> None:
    """Write, or with ``accumulate`` add, to ``out`` the sum of every segment of at least ``min_entries`` entries.

    Args:
        coefficient: (nnz,) float32.
        index: (nnz,) integer, the row of ``table`` (any, D) that each entry takes.
        segment: (nnz,) integer, ascending, the segment of every entry.
        offsets: (S + 1,) int64, the entries of every segment; others belong to none.
        out: (S, D) floating, contiguous; rows of other segments stay what they are. Sums are float32 inside.
    """
    nnz, d, num_segments = len(coefficient), table.shape[1], len(offsets) - 1
    if nnz == 0 or d == 0:
        return
    counts = offsets.diff()
    pieces = torch.where(counts >= min_entries, (counts + PIECE - 1) // PIECE, 0)
    first_piece = offsets.new_zeros(num_segments + 1)
    torch.cumsum(pieces, 0, out=first_piece[1:])
    # No more than one piece for each segment and one for each PIECE entries: a bound that needs no word from the GPU.
    most = min(nnz, num_segments) + nnz // PIECE
    block_e, block_d = tile(d, SUM_WIDTH)
    boundaries = (nnz - 1) // PIECE
    partial = torch.empty((2 * (boundaries + 1), d), dtype=torch.float32, device=out.device) if boundaries else None
    blocks = {"ACCUMULATE": accumulate, "PIECE": PIECE, "BLOCK_E": block_e, "BLOCK_D": block_d}
    sources = (coefficient, index, table, offsets, first_piece, owners(first_piece, most))
    launch(
        segment_sum_kernel, (most, ceil_div(d, block_d)), *sources, out, partial, len(table), num_segments, d, **blocks
    )
    if boundaries:
        blocks |= {"BLOCK_E": JOIN[0], "BLOCK_D": JOIN[1]}
        grid = boundaries, ceil_div(d, JOIN[1])
        launch(segment_join_kernel, grid, segment, offsets, out, partial, num_segments, d, **blocks)


def sum_by_place(
    coefficient: Tensor, index: Tensor, table: Tensor, place: Tensor, out: Tensor, *, accumulate: bool = False
) -> None:
    """Write, or with ``accumulate`` add, to each row of ``out`` that some entry has for its place the entries' sum.

    Shapes as of :func:`segment_sum`; place (nnz,) integer in any order. Places that ``out`` does not have are skipped.
    """
    place, order = sorted_tokens(place)
    offsets = torch.searchsorted(place, torch.arange(len(out) + 1, device=place.device, dtype=place.dtype))
    segment_sum(coefficient[order], index[order], table, place, offsets, out, accumulate=accumulate)


def sum_by_token(tokens: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each token with the sum of its rows, without waiting for the GPU, and thus in as many rows as there were.

    Args:
        tokens: (M,) integer, rows: (M, D) floating, contiguous.
        dtype: of the sums, which are float32 inside and rounded once.

    Returns:
        (M,) ascending tokens and (M, D) their sums, with rows of 0 where a token comes again.
    """
    tokens, order = sorted_tokens(tokens)
    sums = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    _sum_runs(tokens, order, rows, sums, table=False)
    return tokens.long(), sums


def add_by_token(tokens: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[token] += the sum of the token's rows, each entry of ``out`` (V, D) rounded once; bitwise repeatable.

    Arguments as of :func:`sum_by_token`; tokens that ``out`` does not have are skipped.
    """
    _sum_runs(*sorted_tokens(tokens), rows, out, table=True)


def sorted_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (M,) as int32, ascending, and where each stood; what no int32 holds becomes one that no table has.

    A radix sort takes a pass for every byte of a number: half as many as of int64.
    """
    tokens, order = tokens.long().clamp(-1, 2**31 - 1).to(torch.int32).sort(stable=True)
    return tokens, order


def _sum_runs(tokens: Tensor, order: Tensor, rows: Tensor, out: Tensor, *, table: bool) -> None:
    entries, d = rows.shape
    if entries and d:
        block_e, block_d = tile(d, SUM_WIDTH)
        grid = entries, ceil_div(d, block_d)
        blocks = {"TABLE": table, "BLOCK_E": block_e, "BLOCK_D": block_d}
        launch(runs_kernel, grid, tokens, order, rows, out, entries, len(out), d, **blocks)


def scatter_add(coefficient: Tensor, index: Tensor, table: Tensor, place: Tensor, out: Tensor) -> None:
    """Add coefficient[e] * table[index[e]] to row place[e] of ``out`` (any, D) float32, in no particular order.

    Shapes as of :func:`segment_sum`; index int32, place int64 (nnz,).
    """
    nnz, d = len(coefficient), table.shape[1]
    if nnz == 0 or d == 0:
        return
    block_e, block_d = tile(d)
    grid = ceil_div(nnz, block_e), ceil_div(d, block_d)
    arguments = (coefficient, index, table, place, out, nnz, len(out), d)
    launch(scatter_kernel, grid, *arguments, BLOCK_E=block_e, BLOCK_D=block_d)


@lru_cache
def tile(d: int, widest: int = 256) -> tuple[int, int]:
    """Entries and columns that a program gathers at once: 4,096 elements, 32 a thread, of which rows take what they can
    fill, up to ``widest`` columns (256: a row's 512 bytes in half precision, one transaction of a warp)."""
    block_d = min(max(triton.next_power_of_2(d), 64), widest)
    return 4096 // block_d, block_d
