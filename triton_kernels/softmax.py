"""One softmax over the entries of each row, and its slopes: for rankings and for sets of allowed tokens alike.

In rank order a ranking step is a set of allowed tokens, the candidates that remain, whose target is the first. With z_j
the logits of a row's entries, one pass over tiles of them keeps, relative to the running maximum m,

    s = sum e^(z_j - m),    u = sum e^(z_j - m) (z_j - m),    x_c = sum e^(z_j - m) v_jc;

when m grows to m', with a = e^(m - m'):  u <- a (u + s (m - m')),  s <- a s,  x <- a x.  At the end

    log p_y = (z_y - m) - log s,    H = log s - u / s  (two positive terms: nothing cancels),    E_c = x_c / s.

A reference q with logits r, maximum n and sum s' over the same entries adds
w = sum e^(z_j - m) [(z_j - m) - (r_j - n)], w <- a (w + s [(m - m') - (n - n')]), and KL(p || q) = w / s + log s' -
log s: exactly 0 where r = z, infinite where q makes impossible what p allows.

Slopes, with log p_j = (z_j - m) - log s from m and log s, kept apart because their sum would round, g from above:

    dz_j = g_lp (y_j - p_j) - g_H p_j (log p_j + H) + p_j sum_c g_c (v_jc - E_c)
           + g_KL p_j (log p_j - log q_j - KL)        (an infinite KL has no gradient)

A logit of -inf is replaced by the finite FLOOR: probability exactly 0, no NaN from 0 * inf, uniform where nothing else
remains; such logits pass no gradient. NaN shows in whatever depends on it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e20)  # stands for a logit of -inf; equals FLOOR of the reference
IMPOSSIBLE = tl.constexpr(-5e19)  # a logit below this stands for -inf
START = tl.constexpr(-2e20)  # below every logit: the maximum over nothing


@triton.jit
def possible(logits):
    """Whether logits (or their maximum) stand for more than -inf; NaN does, so that it shows in all that follows."""
    return (logits <= IMPOSSIBLE) == 0


class Softmax(NamedTuple):
    """What is kept of the entries read so far, as derived above.

    Attributes:
        largest, total, weighted: (R,) m, s, u.
        expected: (R, BLOCK_C) x.
        chosen: (R,) z_y, START until it is read.
        ref_largest, ref_total, apart: (R,) n, s', w.
        lost: (R,) the part of s that the reference makes impossible.
    """

    largest: Any
    total: Any
    weighted: Any
    expected: Any
    chosen: Any
    ref_largest: Any
    ref_total: Any
    apart: Any
    lost: Any


class Entries(NamedTuple):
    """A tile of entries, (R, W), for slopes (W,) too.

    Attributes:
        logits, ref_logits: not below FLOOR; the reference's are of no matter where there is none.
        inside, chosen, exist: bool: which are entries of the row, which is y, and which have a place in memory.
        values_ptrs, values_step: pointers to v of channel 0, and from one channel to the next.
    """

    logits: Any
    ref_logits: Any
    inside: Any
    chosen: Any
    exist: Any
    values_ptrs: Any
    values_step: Any


@triton.jit
def nothing_read(R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The ``Softmax`` of R rows before the first entry."""
    zero, start = tl.zeros((R,), tl.float32), tl.full((R,), START, tl.float32)
    return Softmax(start, zero, zero, tl.zeros((R, BLOCK_C), tl.float32), start, start, zero, zero, zero)


@triton.jit
def _finite_or_zero(largest):
    """What to subtract from logits: their maximum, and 0 where there is none."""
    return tl.where(largest == START, 0.0, largest)


@triton.jit
def read_entries(sums, entries, C: tl.constexpr, REFERENCE: tl.constexpr):
    """The ``Softmax`` with a tile of W further entries of each row."""
    picked = tl.max(tl.where(entries.chosen, entries.logits, START), axis=1)  # (R,)
    # From here START marks what is outside: its exponential is exactly 0, and finite times 0 is 0.
    logits = tl.where(entries.inside, entries.logits, START)
    largest = tl.maximum(sums.largest, tl.max(logits, axis=1))  # (R,) m'
    growth = sums.largest - largest  # (R,) m - m'
    decay = tl.exp(growth)  # (R,) a
    shifted = logits - _finite_or_zero(largest)[:, None]
    exps = tl.exp(shifted)
    weighted = decay * (sums.weighted + sums.total * growth) + tl.sum(exps * shifted, axis=1)
    expected = sums.expected
    channel = tl.arange(0, expected.shape[1])[None, :]  # (1, BLOCK_C)
    for c in range(C):
        values = tl.load(entries.values_ptrs + c * entries.values_step, mask=entries.exist, other=0.0)
        summed = tl.sum(exps * values.to(tl.float32), axis=1)  # (R,)
        expected = tl.where(channel == c, expected * decay[:, None] + summed[:, None], expected)
    ref_largest, ref_total, apart, lost = sums.ref_largest, sums.ref_total, sums.apart, sums.lost
    if REFERENCE:
        lost = decay * lost + tl.sum(tl.where(entries.ref_logits < IMPOSSIBLE, exps, 0.0), axis=1)
        ref_logits = tl.where(entries.inside, entries.ref_logits, START)
        ref_largest = tl.maximum(ref_largest, tl.max(ref_logits, axis=1))
        ref_growth = sums.ref_largest - ref_largest
        ref_shifted = ref_logits - _finite_or_zero(ref_largest)[:, None]
        ref_total = ref_total * tl.exp(ref_growth) + tl.sum(tl.exp(ref_shifted), axis=1)
        gap = tl.sum(exps * (shifted - ref_shifted), axis=1)
        apart = decay * (apart + sums.total * (growth - ref_growth)) + gap
    total = decay * sums.total + tl.sum(exps, axis=1)
    picked = tl.maximum(sums.chosen, picked)
    return Softmax(largest, total, weighted, expected, picked, ref_largest, ref_total, apart, lost)


@triton.jit
def store_results(
    sums,
    row,  # (R,)
    row_ok,  # (R,)
    logprobs_ptr,  # by row, as all; None if there are no targets
    entropy_ptr,
    expectations_ptr,  # C to a row
    kl_ptr,  # None without a reference
    norm_ptr,  # m and log s, NORM_STRIDE to a row
    ref_norm_ptr,  # the same of the reference
    C: tl.constexpr,
    NORM_STRIDE: tl.constexpr,
    MISSING_IS_NAN: tl.constexpr,  # the log-prob of a target that is not there: NaN, or 0
):
    """Write what follows from all entries of a row; entropy, expectations and KL are 0 where there are none."""
    live = sums.total != 0.0  # (R,); a NaN is live, and shows
    total = tl.where(live, sums.total, 1.0)
    log_total = tl.log(total)
    if logprobs_ptr is not None:
        logprobs = sums.chosen - sums.largest - log_total
        logprobs = tl.where(logprobs < IMPOSSIBLE, float("-inf"), logprobs)
        found = (sums.chosen != START) | (total != total)
        tl.store(logprobs_ptr + row, tl.where(found, logprobs, float("nan") if MISSING_IS_NAN else 0.0), mask=row_ok)
    tl.store(entropy_ptr + row, tl.where(live, log_total - sums.weighted / total, 0.0), mask=row_ok)
    largest = tl.where(total != total, float("nan"), sums.largest)  # a maximum passes NaN over, slopes must not
    tl.store(norm_ptr + NORM_STRIDE * row, largest, mask=row_ok)
    tl.store(norm_ptr + NORM_STRIDE * row + 1, log_total, mask=row_ok)
    channel = tl.arange(0, sums.expected.shape[1])[None, :]  # (1, BLOCK_C)
    tl.store(
        expectations_ptr + (row[:, None] * C + channel),
        sums.expected / total[:, None],
        mask=row_ok[:, None] & (channel < C),
    )
    if kl_ptr is not None:
        ref_log_total = tl.log(tl.where(live, sums.ref_total, 1.0))
        kl = sums.apart / total + (ref_log_total - log_total)
        kl = tl.where((sums.lost > 0) & (sums.ref_largest > IMPOSSIBLE), float("inf"), kl)
        tl.store(kl_ptr + row, tl.where(live, kl, 0.0), mask=row_ok)
        tl.store(ref_norm_ptr + NORM_STRIDE * row, sums.ref_largest, mask=row_ok)
        tl.store(ref_norm_ptr + NORM_STRIDE * row + 1, ref_log_total, mask=row_ok)


@triton.jit
def logit_slopes(
    entries,
    row,  # of each entry, broadcast to their shape, as row_ok
    row_ok,
    entropy_ptr,  # by row: what ``store_results`` has written
    expectations_ptr,
    kl_ptr,
    norm_ptr,
    ref_norm_ptr,
    grad_logprobs_ptr,  # None if there are no targets
    grad_entropy_ptr,
    grad_expectations_ptr,
    grad_kl_ptr,
    C: tl.constexpr,
    NORM_STRIDE: tl.constexpr,
    REFERENCE: tl.constexpr,
):
    """dz; exactly 0 outside, and for logits that stand for -inf."""
    largest = tl.load(norm_ptr + NORM_STRIDE * row, mask=row_ok, other=START)
    log_total = tl.load(norm_ptr + NORM_STRIDE * row + 1, mask=row_ok, other=0.0)
    pool = entries.inside & possible(largest) & possible(entries.logits)
    log_probs = tl.where(pool, (entries.logits - largest) - log_total, 0.0)
    entropy = tl.load(entropy_ptr + row, mask=row_ok, other=0.0)
    slope = -tl.load(grad_entropy_ptr + row, mask=row_ok, other=0.0) * (log_probs + entropy)
    for c in tl.static_range(C):
        values = tl.load(entries.values_ptrs + c * entries.values_step, mask=entries.exist, other=0.0).to(tl.float32)
        expectation = tl.load(expectations_ptr + (row * C + c), mask=row_ok, other=0.0)
        slope += tl.load(grad_expectations_ptr + (row * C + c), mask=row_ok, other=0.0) * (values - expectation)
    if REFERENCE:
        ref_largest = tl.load(ref_norm_ptr + NORM_STRIDE * row, mask=row_ok, other=0.0)
        ref_log_total = tl.load(ref_norm_ptr + NORM_STRIDE * row + 1, mask=row_ok, other=0.0)
        kl = tl.load(kl_ptr + row, mask=row_ok, other=0.0)
        apart = log_probs - ((entries.ref_logits - ref_largest) - ref_log_total) - kl
        slope += tl.load(grad_kl_ptr + row, mask=row_ok, other=0.0) * tl.where(kl != float("inf"), apart, 0.0)
    if grad_logprobs_ptr is not None:
        grad_logprobs = tl.load(grad_logprobs_ptr + row, mask=row_ok, other=0.0)
        dlogits = tl.exp(log_probs) * (slope - grad_logprobs) + tl.where(entries.chosen, grad_logprobs, 0.0)
    else:
        dlogits = tl.exp(log_probs) * slope
    return tl.where(pool, dlogits, 0.0)
