"""Small calls of every launcher: their recorded launches are what is compiled ahead of time, see ``aot``.

Among them are all tiles that a launcher chooses, in the heaviest form of each kernel, and what changes a kernel's shape
(a test compares them with what many other calls launch). Nothing runs, so tensors hold whatever was in memory. Sizes
are no multiples of 16 but the width of a model: Triton makes use of those, and most real ones are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flexrec.metrics import parse_metric
from flexrec.triton_kernels import ranking_logprobs, restricted_logprobs, topic_swaps
from flexrec.triton_kernels.segment_sum import add_by_token, owners, scatter_add, segment_sum
from flexrec.triton_kernels.swap_rewards import swap_rewards
from flexrec.triton_kernels.swap_scores import swap_scores

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
SHORT, MIDDLE, LONG = 28, 100, 1020  # lists of one narrow tile, of one wider, of several of the widest
Example = tuple[str, Callable[[], object]]  # what it is an example of, and a call
DTYPES = {FP64: "fp64", FP32: "fp32", BF16: "bf16"}


def examples() -> Iterator[Example]:
    yield from _swap_rewards()
    yield from _swap_scores()
    yield from _topic_swaps()
    yield from _ranking_logprobs()
    yield from _restricted_logprobs()
    yield from _segment_sum()


def _swap_rewards() -> Iterator[Example]:
    def call(
        name: str, credit: str, size: int, dtype: torch.dtype, *, ragged: bool = True, variance: bool = False
    ) -> Example:
        def run() -> None:
            gains, counts = torch.empty(3, size, dtype=dtype), torch.empty(3, dtype=torch.int64) if ragged else None
            options = {"lengths": counts, "num_ranked": counts, "variance": gains if variance else None}
            swap_rewards(gains, parse_metric(name), credit, max_ranked=size, **options)

        return f"{name} {credit}{' ragged' * ragged}{' with variance' * variance} {DTYPES[dtype]}", run

    for size, dtype in ((SHORT, FP32), (MIDDLE, FP32), (LONG, FP32), (LONG, FP64)):
        yield call("ndcg_burges", "swap", size, dtype, variance=True)
        for name in ("mrr", "map", "err"):
            yield call(name, "noncausal", size, dtype)
    yield call("ndcg", "swap", MIDDLE, FP32, ragged=False)
    yield call("ndcg@10", "noncausal", LONG, BF16)


def _swap_scores() -> Iterator[Example]:
    def run(name: str, size: int, dtype: torch.dtype, weighted: bool) -> None:
        gains, counts = torch.empty(2, size, dtype=dtype), torch.empty(2, dtype=torch.int64)
        weights = torch.empty(2, size, size, dtype=BF16) if weighted else None
        swap_scores(gains, parse_metric(name), lengths=counts, num_ranked=counts, max_ranked=size, weights=weights)

    for name, size, dtype, weighted in (
        ("map", SHORT, FP32, False),
        ("ndcg_burges", MIDDLE, FP32, False),
        ("err", SHORT, FP32, False),
        ("map", 252, FP32, False),
        ("err", 252, FP64, False),
        ("err", 252, FP32, True),
        ("ndcg_burges", LONG, FP64, False),
        ("err", LONG, FP32, False),
    ):
        label = f"{name}{' policy' * weighted} {DTYPES[dtype]}"
        yield label, functools.partial(run, name, size, dtype, weighted)


def _topic_swaps() -> Iterator[Example]:
    few, some, many = 10, 20, 200  # topics

    def run(name: str, credit: str, size: int, columns: int, dtype: torch.dtype) -> None:
        worth, counts = torch.empty(3, size, dtype=dtype), torch.empty(3, dtype=torch.int64)
        topics, items = torch.empty(300, columns, dtype=dtype), torch.empty(3, size, dtype=torch.int64)
        lists = worth, parse_metric(name), topics, items, torch.empty(3, columns, dtype=FP64)
        options = {"lengths": counts, "num_ranked": counts}
        if credit in ("scores", "policy"):
            weights = torch.empty(3, size, size, dtype=dtype) if credit == "policy" else None
            topic_swaps.swap_scores(*lists, **options, weights=weights)
        else:
            topic_swaps.swap_rewards(*lists, credit, **options)

    for name, credit, size, columns, dtype in (
        ("alpha_ndcg@10", "noncausal", MIDDLE, few, FP64),
        ("alpha_ndcg@10", "noncausal", LONG, some, FP64),
        ("alpha_ndcg@10", "swap", MIDDLE, some, FP32),
        ("alpha_ndcg", "noncausal", MIDDLE, many, FP64),
        ("err_ia", "rank", MIDDLE, few, FP64),
        ("err_ia", "swap", MIDDLE, some, FP64),
        ("err_ia", "sequence", MIDDLE, many, FP64),
        ("alpha_ndcg@10", "policy", LONG, few, FP64),
        ("alpha_ndcg@10", "policy", MIDDLE, some, FP64),
        ("alpha_ndcg@10", "scores", MIDDLE, some, FP32),
        ("alpha_ndcg@10", "policy", LONG, many, FP64),
    ):
        label = f"{name} {credit} {columns} topics {DTYPES[dtype]}"
        yield label, functools.partial(run, name, credit, size, columns, dtype)


def _ranking_logprobs() -> Iterator[Example]:
    def run(dtype: torch.dtype, size: int, group: int, steps: int, reference: str, order: str, tf32: bool) -> None:
        n, width, vocabulary = 2 * group, 2048, 300
        hidden, weight = torch.empty(n, steps, width, dtype=dtype), torch.empty(vocabulary, width, dtype=dtype)
        bias, candidates = weight[:, 0], torch.empty(2, size, dtype=torch.int64)
        ranking, lengths = torch.empty(n, steps, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
        position = ranking_logprobs.rank_positions_(ranking, lengths, size)
        operands = hidden, weight, bias, candidates, position, torch.empty(n, size, 3), 0.7
        given = {"KL": (hidden, weight, bias), "KL given": torch.empty(n, steps, size)}.get(reference)
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
        try:
            out = ranking_logprobs.ranking_logprobs_forward(*operands, reference=given, save_logits=False, order=order)
            ranking_logprobs.ranking_logprobs_backward(
                tuple(out[:4]), out, *operands, [True] * 3, reference=given, order=order
            )
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    many, few, chosen = (9, 13), (1, 13), (1, 70)  # rankings of each list, and steps
    for label, dtype, size, (group, steps), reference in (
        ("bf16", BF16, SHORT, many, "KL"),
        ("bf16", BF16, 60, many, "KL"),
        ("bf16", BF16, 60, many, ""),
        ("bf16", BF16, MIDDLE, many, ""),
        ("bf16", BF16, 200, many, "KL given"),
        ("bf16", BF16, 200, many, "KL"),
        ("bf16", BF16, 200, many, ""),
        ("bf16 few steps", BF16, 200, few, ""),
        ("bf16 chosen", BF16, 200, chosen, ""),
        ("fp32", FP32, SHORT, many, "KL"),
        ("fp32", FP32, 200, many, ""),
        ("tf32", FP32, SHORT, many, "KL"),
    ):
        order = "chosen" if steps == chosen[1] else "canonical"
        arguments = dtype, size, group, steps, reference, order, label == "tf32"
        yield f"{label} K={size}{' ' * bool(reference)}{reference}", functools.partial(run, *arguments)


def _entries(nnz: int, *kinds: str) -> list[Tensor]:
    return [torch.empty(nnz, dtype={"i64": torch.int64, "i32": torch.int32, "fp32": FP32}[kind]) for kind in kinds]


def _restricted_logprobs() -> Iterator[Example]:
    rows, nnz = 7, 3001

    def logits(dtype: torch.dtype, width: int) -> None:
        ids, offsets, row = _entries(nnz, "i64", "i64", "i32")
        hidden, weight, bias = (torch.empty(shape, dtype=dtype) for shape in ((rows, width), (90, width), (90,)))
        restricted_logprobs.sampled_logits(hidden, weight, bias, ids, offsets[: rows + 1], row, 0.7)

    def softmax(channels: int, reference: bool) -> None:
        ids, offsets, row, z = _entries(nnz, "i64", "i64", "i32", "fp32")
        offsets, targets = offsets[: rows + 1], ids[:rows]
        values, ref_logits = torch.empty(nnz, channels), z if reference else None
        out = restricted_logprobs.set_softmax(z, ref_logits, values, ids, offsets, targets)
        restricted_logprobs.set_softmax_backward(
            out[:4], out[1:], z, ref_logits, values, ids, offsets, row, targets, 0.7
        )

    for width in (64, 128, 2048):
        for dtype in (FP32, BF16):
            yield DTYPES[dtype], functools.partial(logits, dtype, width)
    yield "plain", functools.partial(softmax, 0, False)
    yield "values and KL", functools.partial(softmax, 3, True)


def _segment_sum() -> Iterator[Example]:
    nnz, segments = 3001, 7

    def run(dtype: torch.dtype, width: int, accumulate: bool) -> None:
        coefficient, index, segment = _entries(nnz, "fp32", "i64", "i64")
        offsets, table, out = torch.zeros(segments + 1, dtype=torch.int64), *torch.empty(2, 9, width, dtype=dtype)
        segment_sum(coefficient, index, table, segment, offsets, out[:segments], accumulate=accumulate)
        scatter_add(coefficient, index.int(), table, segment, out.float())
        if dtype == BF16:
            add_by_token(segment, torch.empty(nnz, width), out)

    yield "", lambda: owners(torch.empty(segments + 1, dtype=torch.int64), nnz)
    for width in (64, 128, 256, 512, 1024):
        for dtype in (FP32, BF16):
            yield DTYPES[dtype], functools.partial(run, dtype, width, True)
