"""One call of ranking_logprobs as its kernels see it: what is chosen by shape (order, tiles, precision), arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexrec.triton_kernels.launch import INTERPRETED, ceil_div, launch
from flexrec.triton_kernels.ranking_logprobs_forward import (
    NO_REFERENCE,
    REFERENCE_HIDDEN,
    REFERENCE_LOGITS,
    order_kernel,
    rank_positions_kernel,
)
from flexrec.triton_kernels.ranking_logprobs_tiles import RUNTIME_RANGES

ORDERS = ("canonical", "chosen")
RANK_BLOCK = 1024  # candidates that a program ranks at a time

Reference = tuple[Tensor, Tensor, Tensor | None] | Tensor
"""(ref_hidden (N, T, D'), ref_weight (V, D'), ref_bias (V,) or None), or ref_logits (N, T, K) in candidate order."""


class Tiles(NamedTuple):
    """Steps, candidates and columns of a tile, and the warps of a program."""

    t: int
    k: int
    d: int
    warps: int


def padded(size: int) -> int:
    """Entries in a row of a (.., K) buffer of ours: a multiple of 8, so that rows load as vectors at every K."""
    return (size + 7) // 8 * 8


def keeps_logits(size: int, width: int) -> bool:
    """Whether the backward pass should find the logits in memory or compute them again: 4 K <= D.

    Kept, they cost 8 K bytes of traffic a step (written, read). Computed again, 2 K D flops and D e bytes of hidden,
    which is more as soon as 8 K < D e, but no memory. At 4 K <= D they add at most D bytes a step to what hidden and
    its gradient (2 D e) take anyway.
    """
    return 4 * size <= width


def choose_order(steps: int, size: int, group: int) -> str:
    """The order of columns: "chosen" for single long rankings (G = 1, T and K >= 128), else "canonical".

    As ranked ("chosen") a pool is a triangle, and tiles below it are skipped: half of all products where T = K. But
    each ranking is then a problem of its own: rankings that share a list read its weight rows, and add to their
    gradient, G times instead of once, which costs more than half of the products saves. Below two tiles there is
    nothing to skip.
    """
    return "chosen" if group == 1 and steps >= 128 and size >= 128 else "canonical"


def weight_grad_by_matmul(lists: int, rows: int, size: int, width: int) -> bool:
    """Whether dz^T h of each list is left to torch.bmm: few lists of many steps.

    Our kernel has one program per list, tile of candidates and tile of columns, which walks over the list's G T steps.
    With fewer than 256 programs a GPU is not filled; a library splits the walk among several. Then rows (P, K, D) are
    few too, and adding them to the weight gradient costs little.
    """
    tiles = product_tiles(rows, size, "half")
    return rows >= 1024 and lists * ceil_div(size, tiles.k) * ceil_div(width, tiles.d) < 256


def softmax_tiles(rows: int, size: int, arithmetic: str, reference: bool) -> Tiles:
    """Tiles of the kernels with a softmax in them: (steps, candidates) of the logits, and the width of one product.

    Half precision takes 64 rows, what a Hopper tensor core takes at once, and up to 128 candidates, so that hidden is
    read once up to there; two sets of logits (a reference) leave registers for 64. Less where the problem is smaller:
    idle lanes hold registers that another program could use. float32 operands take twice the registers, and all of
    them without tensor cores ("ieee"): 32 by 32, in steps of what that leaves room for.

    Args:
        arithmetic: "half" if every product is of half-precision operands, else "tf32" or "ieee", see :func:`precision`.
    """
    if arithmetic != "half":
        return Tiles(32, 32, 64 if arithmetic == "tf32" else 16, 4)
    if rows <= 32 or size <= 32:
        return Tiles(32, 32, 64, 4)
    return Tiles(64, 64 if reference or size <= 64 else 128, 64, 8)


def slopes_tiles(rows: int, size: int, arithmetic: str, reference: bool) -> Tiles:
    """Tiles of the kernel that gives dz, and dh where all candidates are in one tile."""
    tiles = softmax_tiles(rows, size, arithmetic, reference)
    # 48 us, and 99 with 8 warps, which exchange dz through shared memory: N=512, P=64, T=32, K=128, D=2048, an H200.
    return tiles._replace(warps=4) if 64 < size <= tiles.k else tiles


def weight_grad_tiles(rows: int, size: int, arithmetic: str) -> Tiles:
    """Tiles of dz^T h: candidates by columns, over steps.

    128 at once where that pads no more than 64, so that hidden is read once for them: 49 us, and 57 with 64, at N=512,
    P=64, T=32, K=128, D=2048 on an H200.
    """
    if arithmetic == "half" and rows > 32 and (size - 1) % 128 >= 64:
        return Tiles(64, 128, 128, 8)
    return product_tiles(rows, size, arithmetic)


def product_tiles(rows: int, size: int, arithmetic: str) -> Tiles:
    """Tiles of the products with dz: steps by columns, over candidates."""
    if arithmetic != "half":
        return Tiles(32, 32, 32, 4)
    return Tiles(32, 32, 64, 4) if rows <= 32 or size <= 32 else Tiles(64, 64, 128, 8)


def precision(a: Tensor, b: Tensor) -> str:
    """How tl.dot multiplies: "native" half precision on tensor cores, else float32, "ieee" or "tf32".

    float32 is "ieee", exact products summed in float32, unless ``torch.backends.cuda.matmul`` allows TF32: that keeps
    10 bits of each operand, an error of 1e-3 in logits that callers who pay for float32 did not ask for. Operands of
    two dtypes are both made float32. (The interpreter multiplies bfloat16 wrongly, so there nothing is "native".)
    """
    if _is_half(a, b):
        return "ieee" if INTERPRETED else "native"
    both_float32 = a.dtype == b.dtype
    return "tf32" if both_float32 and torch.version.hip is None and _tf32_is_allowed() else "ieee"


def _is_half(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype != torch.float32


def _tf32_is_allowed() -> bool:
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # since PyTorch 2.9; asking the older way may then raise
        return settings.fp32_precision == "tf32"
    return settings.allow_tf32


class Problem(NamedTuple):
    """One call as the kernels see it: which order, how many problems of how many steps, and the arguments all share.

    Attributes:
        problems, rows, width: P problems of G * T steps in the canonical order, N of T in the chosen; D.
        chosen: whether the columns are in the chosen order.
        arithmetic: as of :func:`softmax_tiles`.
        dtype: of dz.
        tiles: of the kernels with a softmax in them.
        pointers, sizes: arguments of those kernels by name.
        ref_logits: (N, T, K') by column, of a reference that is given as logits.
        constants: their constexprs.
    """

    problems: int
    rows: int
    width: int
    chosen: bool
    arithmetic: str
    dtype: torch.dtype
    tiles: Tiles
    ref_logits: Tensor | None
    pointers: dict[str, Tensor | None]
    sizes: dict[str, int]
    constants: dict[str, object]

    def product(self, *names: str) -> dict[str, Any]:
        """Arguments of the kernels that only multiply: pointers (those named, and the candidates), sizes, constants."""
        chosen = ("candidates_ptr", "order_ptr", *names)
        arguments: dict[str, Any] = {name: self.pointers[name] for name in chosen}
        arguments |= {name: self.sizes[name] for name in ("K", "V", "rows_per_problem", "sharing")}
        return arguments | {name: self.constants[name] for name in ("D", "CHOSEN", "PRECISION")}


def describe(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    position: Tensor,
    values: Tensor,
    reference: Reference | None,
    order: str | None,
) -> Problem:
    n, t, d = hidden.shape
    p, k = candidates.shape
    c = values.shape[2]
    order = choose_order(t, k, n // p) if order is None else order
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    chosen = order == "chosen"
    count = n if chosen else p
    rows = n * t // count
    ref_hidden, ref_weight, ref_bias = reference if isinstance(reference, tuple) else (None, None, None)
    halves, own_precision = [_is_half(hidden, weight)], precision(hidden, weight)
    ref_precision, ref_width = "ieee", 1
    if ref_hidden is not None and ref_weight is not None:
        halves.append(_is_half(ref_hidden, ref_weight))
        ref_precision, ref_width = precision(ref_hidden, ref_weight), ref_hidden.shape[2]
    arithmetic = "half" if all(halves) else "tf32" if "tf32" in (own_precision, ref_precision) else "ieee"
    tiles = softmax_tiles(rows, k, arithmetic, reference is not None)
    position = _in_padded_rows(position)
    by_rank = _order_of(position) if chosen else None
    return Problem(
        problems=count,
        rows=rows,
        width=d,
        chosen=chosen,
        arithmetic=arithmetic,
        dtype=hidden.dtype if hidden.dtype == weight.dtype else torch.float32,
        tiles=tiles,
        ref_logits=_by_column(reference, by_rank) if isinstance(reference, Tensor) else None,
        pointers={
            "hidden_ptr": hidden.contiguous(),
            "weight_ptr": weight.contiguous(),
            "bias_ptr": None if bias is None else bias.contiguous(),
            "ref_hidden_ptr": None if ref_hidden is None else ref_hidden.contiguous(),
            "ref_weight_ptr": None if ref_weight is None else ref_weight.contiguous(),
            "ref_bias_ptr": None if ref_bias is None else ref_bias.contiguous(),
            "candidates_ptr": candidates.contiguous(),
            "position_ptr": None if chosen else position,
            "order_ptr": by_rank,
            "values_ptr": _by_column(values.transpose(1, 2), by_rank),
        },
        sizes={"T": t, "K": k, "V": len(weight), "rows_per_problem": rows, "sharing": count // p},
        constants={
            "C": c,
            "D": d,
            "D_REF": ref_width,
            "REFERENCE": _reference_kind(reference),
            "CHOSEN": chosen,
            "PRECISION": own_precision,
            "REF_PRECISION": ref_precision,
            **blocks(tiles),
        },
    )


def trip_count(size: int, tile: int) -> int:
    """K_TILES or ROW_TILES: 1, without a loop, else 0: a kernel counts itself and is not compiled for each number."""
    return 0 if RUNTIME_RANGES and size > tile else ceil_div(size, tile)


def _reference_kind(reference: Reference | None) -> int:
    if reference is None:
        return NO_REFERENCE.value
    return REFERENCE_LOGITS.value if isinstance(reference, Tensor) else REFERENCE_HIDDEN.value


def blocks(tiles: Tiles) -> dict[str, int]:
    return {"BLOCK_T": tiles.t, "BLOCK_K": tiles.k, "BLOCK_D": tiles.d}


def rank_positions_(ranking: Tensor, lengths: Tensor | None, num_candidates: int) -> Tensor:
    """The position in rank order of every candidate: ranked ones first, then the unranked by ascending index.

    Args:
        ranking: (N, T) int64, index of the candidate at rank t; ignored at ranks t >= length, or if out of range.
        lengths: (N,) int64, or None where every list has K candidates.
        num_candidates: K.

    Returns:
        (N, K) int32, 0 .. length - 1 and -1 for candidates beyond; rows are padded(K) apart, as kernels want.
    """
    n, t = ranking.shape
    position = _new_padded(n, num_candidates, ranking.device)
    if position.numel():
        tiles = {"T_TILES": ceil_div(t, RANK_BLOCK), "K_TILES": ceil_div(num_candidates, RANK_BLOCK)}
        counts = None if lengths is None else lengths.contiguous()
        arguments = (ranking.contiguous(), counts, position, t, num_candidates)
        launch(rank_positions_kernel, (n,), *arguments, BLOCK=RANK_BLOCK, **tiles)
    return position


def _in_padded_rows(matrix: Tensor) -> Tensor:
    """(N, K) int32 with rows padded(K) apart; a copy if it is not so already. What stands between rows is not used."""
    n, k = matrix.shape
    stride = padded(k)
    enough = matrix.untyped_storage().nbytes() >= 4 * (matrix.storage_offset() + n * stride)
    if matrix.dtype == torch.int32 and matrix.stride() == (stride, 1) and enough:
        return matrix
    return _new_padded(n, k, matrix.device).copy_(matrix)


def _new_padded(n: int, k: int, device: torch.device) -> Tensor:
    return torch.empty((n, padded(k)), dtype=torch.int32, device=device)[:, :k]


def _order_of(position: Tensor) -> Tensor:
    """(N, K) int32: the candidate at each rank, as the kernels want it."""
    n, k = position.shape
    order = torch.zeros((n, k), dtype=torch.int32, device=position.device)  # an order even where nothing is launched
    launch(order_kernel, (n, ceil_div(k, RANK_BLOCK)), position, order, k, BLOCK=RANK_BLOCK)
    return order


def _by_column(by_candidate: Tensor, order: Tensor | None) -> Tensor:
    """(N, M, K) by candidate to (N, M, K') by column; 0 between rows. Itself if nothing is to be moved."""
    k = by_candidate.shape[2]
    if order is not None:
        index = torch.where(order < 0, -1 - order, order).long()
        by_candidate = by_candidate.gather(2, index[:, None].expand(by_candidate.shape))
    return torch.nn.functional.pad(by_candidate, (0, padded(k) - k)).contiguous()
