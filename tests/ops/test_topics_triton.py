"""The Triton kernels of lists with topics against torch: in the interpreter without a GPU, compiled with one."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from flexrec.ops import swap_rewards as module
from flexrec.ops.ranking_metric import Topics
from flexrec.ops.swap_rewards import swap_rewards, swap_scores
from flexrec.triton_kernels import topic_swaps

CREDITS = ("swap", "noncausal", "independent", "rank", "sequence", "policy")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def case(
    rows: int, size: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, Topics, dict[str, torch.Tensor]]:
    """Gains (N, K), topics of a catalogue with weights, and counts, full lists and empty ones among them."""
    generator = torch.Generator().manual_seed(size)
    gains = torch.rand(rows, size, generator=generator, dtype=dtype)
    gains *= torch.rand(rows, size, generator=generator) < 0.7
    matrix = torch.rand(13, columns, generator=generator) * (torch.rand(13, columns, generator=generator) < 0.5)
    items = torch.randint(0, 13, (rows, size), generator=generator)  # many alike: ties
    counts = torch.randint(0, size + 1, (2, rows), generator=generator)
    counts[:, 0], counts[0, -1] = size, 0
    weights = torch.rand(rows, columns, generator=generator)
    topics = Topics(matrix.to(device), items.to(device), weights.to(device))
    return gains.to(device), topics, {"lengths": counts[0].to(device), "num_ranked": counts[1].to(device)}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: an entry that a kernel does not write is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def nan(*args: object, **kwargs: object) -> torch.Tensor:
        result = empty(*args, **kwargs)
        return result.fill_(math.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", nan)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty_like(x).fill_(math.nan))


@pytest.mark.parametrize(
    ("rows", "size", "columns", "dtype"),
    [
        (4, 5, 3, torch.float64),
        (18, 3, 16, torch.float32),  # more lists than a program takes
        (5, 6, 17, torch.float32),  # more topics than the narrowest program takes, more ranks than one does
        (1, 1, 1, torch.float32),
    ],
)
def test_all_credits_equal_torch(rows, size, columns, dtype, device, poisoned):
    gains, topics, counts = case(rows, size, columns, dtype, device)
    shares = torch.rand(rows, size, size, device=device)
    for metric, ragged in (("alpha_ndcg@3", counts), ("err_ia.2", {})):
        options = {"topics": topics, **ragged}
        scores, expected = (swap_scores(gains, metric, backend=b, **options) for b in ("triton", "torch"))
        torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE[dtype])
        for credit in CREDITS:
            weights = shares if credit == "policy" else None
            found, expected = (
                swap_rewards(gains, metric, credit=credit, weights=weights, backend=b, **options)
                for b in ("triton", "torch")
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])


def test_topics_given_list_by_list_are_read_as_they_lie(device):
    gains, topics, counts = case(3, 5, 4, torch.float32, device)
    by_list = Topics(topics.matrix[topics.items].flatten(0, 1), None, topics.weights)
    one, other = (
        swap_rewards(gains, "alpha_ndcg@3", topics=about, backend="triton", **counts) for about in (topics, by_list)
    )
    assert torch.equal(one, other)


def test_what_is_too_large_is_refused_by_name(device):
    for size, columns in ((topic_swaps.MAX_SIZE + 1, 2), (3, topic_swaps.WIDTHS[-1] + 1)):
        gains, topics = torch.ones(1, size, device=device), torch.ones(1, size, columns, device=device)
        with pytest.raises(ValueError, match="K <= 1024 candidates and C <= 256 topics"):
            swap_rewards(gains, "err_ia", topics=topics, backend="triton")
    assert module.MAX_TRITON_SIZE_OF_TOPICS == topic_swaps.MAX_SIZE
    assert topic_swaps.WIDTHS[-1] == module.MAX_TRITON_TOPICS
