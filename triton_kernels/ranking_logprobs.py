"""Log-probs, entropy, expectations and KL of rankings, each step over the candidates that remain: forward, backward.

Of N = P * G rankings, G share the K candidates of one list. The entries of step t are its pool {j : position[j] >= t},
with the logits z_j = (h . w_j + b_j) / temperature; what follows from these, and the slopes dz_j, is derived in
softmax.py. Then

    dh = sum_j dz_j w_j / temperature,    dw_j = sum over the list's G T steps of dz_j h / temperature,

and db_j is the same sum of the dz_j. These are rounded to the operands' dtype before the products, as torch does, which
in bfloat16 alone is an error of 1.6e-3 of the gradient's norm, as much as rounding the result. (float16 ends at 6e-8:
scale the loss, as with torch.) Where dh follows at once, from dz in registers, what the rounding leaves is multiplied
too, and only the result is rounded: one product more for as many warps. Products of dz from memory would read twice
the bytes and take up to three times the registers (sm_90: hidden grad 70 to 230, weight grad 72 to 135), with spills
on sm_80.

Orders (`choose_order`). Canonical: candidates as given, the G T steps of a list are the rows of one problem, so that a
weight row is read once per tile of steps of a list, and its gradient added to memory once per list; the pool comes from
`position` (N, K) int32, never from a stored mask. Chosen: candidates as ranked, T steps of one ranking are the rows;
the pool is the triangle j >= t, tiles below it are skipped, and nothing is kept there.

Kernels, with bytes and flops for e bytes an element, R = N T steps, J = ceil(rows of a problem / 64) and L2 serving
what is read again (canonical; in the chosen order products, logits and dz are halved, P is N):
    forward       R D e (hidden) + J P K D e (rows; from L2 after the first tile) + 4 R K (logits, if kept)
                  + 4 R K (positions: G of them, T times each from L1) + 4 R (C + 4);         2 R K D flops.
                  Hidden is read again for every 128 candidates (64 with a reference, which doubles the rest too).
    dlogits       4 R K (logits; or the forward's reads and flops) + e R K (dz out, if needed beyond)
                  + up to 128 candidates: J P K D e (rows) + R D e (dh out);    2 R K D flops, 4 in half precision
    hidden grad   beyond 128 candidates: e R K D/128 (dz) + J P K D e + R D e (dh out);       2 R K D flops
    weight grad   e R K D/128 (dz, from L2) + R D e ceil(K/64) (hidden) + 8 P K D (atomic adds; rows: 4 P K D written;
                  dense besides: 4 V D zeroed);                                               2 R K D flops
Extra memory: logits 4 R K if kept, 16 R, and while the backward pass runs dz, e R K (not if only dh of up to 128
candidates is asked for). No (N, K, D), no (N, T, V), no gathered copy of hidden exists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from flexrec.triton_kernels.launch import INTERPRETED, ceil_div, launch
from flexrec.triton_kernels.ranking_logprobs_backward import (
    ranking_logprobs_dlogits_kernel,
    ranking_logprobs_hidden_grad_kernel,
    ranking_logprobs_weight_grad_kernel,
)
from flexrec.triton_kernels.ranking_logprobs_forward import ranking_logprobs_forward_kernel
from flexrec.triton_kernels.ranking_logprobs_problem import (
    Problem,
    Reference,
    blocks,
    describe,
    keeps_logits,
    padded,
    product_tiles,
    rank_positions_,
    slopes_tiles,
    trip_count,
    weight_grad_by_matmul,
    weight_grad_tiles,
)
from flexrec.triton_kernels.segment_sum import add_by_token

__all__ = [
    "INTERPRETED",
    "Forward",
    "keeps_logits",
    "padded",
    "rank_positions_",
    "ranking_logprobs_backward",
    "ranking_logprobs_forward",
]

WEIGHT_MODES = ("dense", "rows", "accumulate")
WeightAndBias = tuple[Tensor | None, Tensor | None]


class Forward(NamedTuple):
    """What the forward launcher returns and the backward launcher needs, all float32. K' is K rounded up to a multiple
    of 8, see :func:`padded`.

    Attributes:
        logprobs, entropy: (N, T).
        expectations: (N, T, C).
        kl: (N, T), or None without a reference.
        logits: (N, T, K') after temperature, in the columns of the order used; None if not kept.
        norm: (N, T, 2), what to subtract from the logits, one after the other, to have log-probs.
        ref_logits: the same of the reference, None if it was given as logits, is not kept, or there is none.
        ref_norm: (N, T, 2), or None without a reference.
    """

    logprobs: Tensor | None  # which the backward pass does without
    entropy: Tensor
    expectations: Tensor
    kl: Tensor | None
    logits: Tensor | None
    norm: Tensor
    ref_logits: Tensor | None
    ref_norm: Tensor | None

    def present(self) -> Forward:
        """Itself with None for tensors without entries, by which a registered operation stands for None."""
        kl, logits, ref_logits, ref_norm = (
            None if x is None or x.numel() == 0 else x for x in (self.kl, self.logits, self.ref_logits, self.ref_norm)
        )
        return self._replace(kl=kl, logits=logits, ref_logits=ref_logits, ref_norm=ref_norm)

    def pointers(self, problem: Problem) -> dict[str, Tensor | None]:
        """What both passes take of it, by name; a reference that was given as logits has these."""
        found = {f"{name}_ptr": value for name, value in self._asdict().items() if name != "logprobs"}
        return found if problem.ref_logits is None else {**found, "ref_logits_ptr": problem.ref_logits}


def ranking_logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    position: Tensor,
    values: Tensor,
    temperature: float,
    *,
    reference: Reference | None = None,
    save_logits: bool = True,
    order: str | None = None,
) -> Forward:
    """Launch the forward kernel.

    Args:
        hidden: (N, T, D), weight: (V, D), bias: (V,) or None; float32, bfloat16 or float16.
        candidates: (P, K) int64 token ids, position: (N, K) integer as :func:`rank_positions_` gives it (any strides),
            values: (N, K, C) in candidate order, finite (0 beyond a list's length).
        temperature: what the logits are divided by, those of a reference's hidden states too.
        reference: for KL(policy || reference) of every step, see ``Reference``; ``ref_logits`` are after temperature,
            any constant per row.
        save_logits: keep them for the backward pass; :func:`keeps_logits` says when that pays.
        order: one of ORDERS; :func:`choose_order` decides if not given. The backward pass must be told the same.
    """
    n, t = hidden.shape[:2]
    k, c = values.shape[1:]

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    with_hidden = isinstance(reference, tuple)
    out = Forward(
        logprobs=new(n, t),
        entropy=new(n, t),
        expectations=new(n, t, c),
        kl=None if reference is None else new(n, t),
        logits=new(n, t, padded(k)) if save_logits else None,
        norm=new(n, t, 2),
        ref_logits=new(n, t, padded(k)) if save_logits and with_hidden else None,
        ref_norm=None if reference is None else new(n, t, 2),
    )
    if n * t * k == 0:
        for result in (out.logprobs, out.entropy, out.expectations, out.kl):
            if result is not None:
                result.zero_()
        return out
    problem = describe(hidden, weight, bias, candidates, position, values, reference, order)
    tiles = problem.tiles
    launch(
        ranking_logprobs_forward_kernel,
        (problem.problems, ceil_div(problem.rows, tiles.t)),
        logprobs_ptr=out.logprobs,
        temperature=temperature,
        BLOCK_C=triton.next_power_of_2(max(c, 1)),
        K_TILES=trip_count(k, tiles.k),
        num_warps=tiles.warps,
        **out.pointers(problem),
        **problem.pointers,
        **problem.sizes,
        **problem.constants,
    )
    return out


def ranking_logprobs_backward(
    upstream: tuple[Tensor, ...],
    saved: Forward,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Tensor,
    position: Tensor,
    values: Tensor,
    temperature: float,
    needs_grad: list[bool],
    *,
    weight_mode: str = "dense",
    into: WeightAndBias = (None, None),
    reference: Reference | None = None,
    ragged: bool = True,
    order: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward kernels that ``needs_grad`` (hidden, weight, bias) asks for; None for the others.

    Args:
        upstream: gradients of log-probs (N, T), entropy (N, T), expectations (N, T, C); of KL (N, T) with a reference.
        saved: of the forward pass; a tensor without entries counts as None.
        weight_mode: "dense": weight (V, D) and bias (V,) in the dtype of what they belong to, summed in float32: by
            atomics, in no fixed order, or through rows where these are fewer bytes (:func:`_new_like`). "rows": weight
            (P K, D) and bias (P K,) float32, entry p K + k for token candidates[p, k]; no atomics, nothing zeroed
            first, bitwise repeatable. "accumulate": added to ``into``, and None is returned.
        into: for "accumulate", the (V, D) and (V,) tensors to add to; by atomics if float32, else through rows, which
            are added up by token in float32 first.
        reference, order: as given to the forward launcher.
        ragged: whether some list may be shorter than K. What ``hidden`` holds beyond is then never read, not even to be
            multiplied by 0, which rules torch.bmm out (:func:`weight_grad_by_matmul`).

    Returns:
        Gradients of hidden (its dtype), weight and bias.

    Raises:
        ValueError: an unknown mode or order, ``into`` does not fit, or rows in the chosen order of lists that rankings
            share, which several of them would write.
    """
    if weight_mode not in WEIGHT_MODES:
        raise ValueError(f"weight_mode must be one of {', '.join(WEIGHT_MODES)}, got {weight_mode!r}")
    wanted = weight if needs_grad[1] else None, bias if needs_grad[2] else None
    by_rows = weight_mode == "rows" or any(x is not None and x.dtype != torch.float32 for x in into)
    shared = order == "chosen" and len(hidden) > len(candidates)  # a list's rows have several writers
    if by_rows and shared:
        raise ValueError(
            f"weight_mode={weight_mode!r} needs order='canonical' where rankings share a list, got 'chosen'"
        )
    empty = hidden.shape[0] * hidden.shape[1] == 0
    if weight_mode == "accumulate":
        targets = _checked_into(into, wanted)
    else:
        rows = weight.shape[0] if weight_mode == "dense" else candidates.numel()
        rounded = weight_mode == "dense" and not shared and candidates.numel() <= rows
        targets = _new_like(wanted, rows, zeros=weight_mode == "dense" or empty, rounded=rounded)
    hidden_grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_grad[0] else None

    if empty and hidden_grad is not None:
        hidden_grad.zero_()
    elif not empty and (hidden_grad is not None or _any_of(wanted)):
        saved = saved.present()
        problem = describe(hidden, weight, bias, candidates, position, values, reference, order)
        dlogits = _slopes(problem, upstream, saved, temperature, hidden_grad, _any_of(wanted))
        if dlogits is not None:
            _weight_grads(problem, dlogits, saved.norm, targets, weight_mode == "rows", ragged)
    if weight_mode == "accumulate":
        return hidden_grad, None, None
    if weight_mode == "dense":
        targets = _in_dtype_of(wanted, targets)
    return hidden_grad, *targets


def _slopes(
    problem: Problem,
    upstream: tuple[Tensor, ...],
    saved: Forward,
    temperature: float,
    hidden_grad: Tensor | None,
    with_weights: bool,
) -> Tensor | None:
    """Fill ``hidden_grad`` (None: not wanted); return dz (N, T, K') for the weight gradient (None: not wanted)."""
    size, width = problem.sizes["K"], problem.width
    tiles = slopes_tiles(problem.rows, size, problem.arithmetic, saved.kl is not None)
    at_once = hidden_grad is not None and size <= tiles.k  # all candidates in one tile: dh follows from dz at once
    dlogits = None
    if with_weights or (hidden_grad is not None and not at_once):
        shape = (problem.problems, problem.rows, padded(size))
        dlogits = torch.empty(shape, dtype=problem.dtype, device=saved.norm.device)
    launch(
        ranking_logprobs_dlogits_kernel,
        (problem.problems, ceil_div(problem.rows, tiles.t), ceil_div(size, tiles.k)),
        grad_logprobs_ptr=upstream[0].contiguous(),
        grad_entropy_ptr=upstream[1].contiguous(),
        grad_expectations_ptr=upstream[2].contiguous(),
        grad_kl_ptr=None if saved.kl is None else upstream[3].contiguous(),
        dlogits_ptr=dlogits,
        hidden_grad_ptr=hidden_grad if at_once else None,
        temperature=temperature,
        num_warps=tiles.warps,
        **saved.pointers(problem),
        **problem.pointers,
        **problem.sizes,
        **problem.constants | blocks(tiles),
    )
    if hidden_grad is not None and not at_once:
        tiles = product_tiles(problem.rows, size, problem.arithmetic)
        grid = (problem.problems, ceil_div(problem.rows, tiles.t), ceil_div(width, tiles.d))
        launch(
            ranking_logprobs_hidden_grad_kernel,
            grid,
            dlogits_ptr=dlogits,
            hidden_grad_ptr=hidden_grad,
            K_TILES=trip_count(size, tiles.k),
            num_warps=tiles.warps,
            **problem.product("weight_ptr"),
            **blocks(tiles),
        )
    return dlogits if with_weights else None


def _weight_grads(
    problem: Problem, dlogits: Tensor, norm: Tensor, targets: WeightAndBias, as_rows: bool, ragged: bool
) -> None:
    """Fill the rows (P K, D) and (P K,), or add to (V, D) and (V,), that ``targets`` are; None: not wanted."""
    hidden, candidates = problem.pointers["hidden_ptr"], problem.pointers["candidates_ptr"]
    count, width = candidates.numel(), problem.width
    by_matmul = not (ragged or problem.chosen) and targets[0] is not None and hidden.dtype == problem.dtype
    by_matmul = by_matmul and weight_grad_by_matmul(problem.problems, problem.rows, problem.sizes["K"], width)
    if not as_rows and (by_matmul or any(x is not None and x.dtype != torch.float32 for x in targets)):
        rows = _new_like(targets, count, zeros=False)
        _weight_grads(problem, dlogits, norm, rows, True, ragged)
        for target, row in zip(targets, rows, strict=True):
            if target is not None and row is not None:  # a token's rows are added up before they are rounded
                add_by_token(candidates.flatten(), row.view(count, -1), target.view(len(target), -1))
    elif by_matmul and targets[0] is not None:
        slopes = dlogits[..., : problem.sizes["K"]]  # (P, G T, K)
        grad = torch.bmm(slopes.transpose(1, 2), hidden.view(*slopes.shape[:2], width))  # (P, K, D)
        targets[0].copy_(grad.view(count, width))
        if targets[1] is not None:
            targets[1].copy_(slopes.sum(1, dtype=torch.float32).flatten())
    else:
        tiles = weight_grad_tiles(problem.rows, problem.sizes["K"], problem.arithmetic)
        columns = 1 if targets[0] is None else max(1, ceil_div(width, tiles.d))
        grid = (problem.problems, ceil_div(problem.sizes["K"], tiles.k), columns)
        launch(
            ranking_logprobs_weight_grad_kernel,
            grid,
            dlogits_ptr=dlogits,
            norm_ptr=norm,
            weight_grad_ptr=targets[0],
            bias_grad_ptr=targets[1],
            ROWS=as_rows,
            ROW_TILES=trip_count(problem.rows, tiles.t),
            num_warps=tiles.warps,
            **problem.product("hidden_ptr"),
            **blocks(tiles),
        )


def _new_like(wanted: WeightAndBias, rows: int, *, zeros: bool, rounded: bool = False) -> WeightAndBias:
    """(rows, D) and (rows,) for those that are wanted: float32, or ``rounded`` in their own dtype.

    A gradient (V, D) in half precision of M = P K rows takes, in bytes per column,
        4 V zeroed + 8 M added by atomics + 4 V read and 2 V written to round it,         in float32 first;
        2 V zeroed + 8 M rows written and read + 4 M read and written where they belong,  by rows, each rounded once,
    and 6 V or 2 V + 4 M of memory: less by rows up to M = V, and the same to the last bit every time.
    """
    new = torch.zeros if zeros else torch.empty
    weight, bias = (
        None if x is None else new((rows, *x.shape[1:]), dtype=x.dtype if rounded else torch.float32, device=x.device)
        for x in wanted
    )
    return weight, bias


def _any_of(pair: WeightAndBias) -> bool:
    return pair[0] is not None or pair[1] is not None


def _in_dtype_of(like: WeightAndBias, found: WeightAndBias) -> WeightAndBias:
    weight, bias = (None if x is None or y is None else x.to(y.dtype) for x, y in zip(found, like, strict=True))
    return weight, bias


def _checked_into(into: WeightAndBias, wanted: WeightAndBias) -> WeightAndBias:
    """The buffers of those that are wanted; ValueError where one does not fit."""
    for name, buffer, operand in zip(("weight", "bias"), into, wanted, strict=True):
        if operand is None:
            continue
        if buffer is None or buffer.shape != operand.shape or buffer.device != operand.device:
            got = "None" if buffer is None else f"{tuple(buffer.shape)} on {buffer.device}"
            raise ValueError(
                f"weight_mode='accumulate' needs into[{name}] {tuple(operand.shape)} on {operand.device}, got {got}"
            )
        if not buffer.is_contiguous() or not buffer.is_floating_point():
            raise ValueError(
                f"into[{name}] must be a contiguous floating tensor, got {buffer.dtype}, {buffer.stride()}"
            )
    return into[0] if wanted[0] is not None else None, into[1] if wanted[1] is not None else None
