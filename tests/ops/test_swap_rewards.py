"""Swap rewards against brute force: the metric, from its textbook definition, computed anew after every swap."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.ops.ranking_metric import ranking_metric, register_metric
from flexrec.ops.swap_rewards import swap_rewards, swap_rewards_with_variance, swap_scores

CREDITS = ("swap", "noncausal", "independent", "rank", "sequence", "policy")
FAMILIES = ("dcg", "ndcg", "dcg_burges", "ndcg_burges", "recall", "precision", "rbp.8", "hit_rate", "mrr", "map", "err")


# ------------------------------------------------------------------------------------------------------ brute force


def textbook(name: str, gains: list[float], shown: int) -> float:
    """R of one list, gains in rank order, from the definition."""
    family, _, n = name.partition("@")
    cutoff = int(n) if n else len(gains)
    relevant = [g > 0 for g in gains]
    seen = range(min(cutoff, shown, len(gains)))
    if not any(relevant):
        return 0.0
    if family.startswith(("dcg", "ndcg")):
        worth = [2.0**g - 1 for g in gains] if family.endswith("burges") else gains
        dcg = sum(worth[i] / math.log2(i + 2) for i in seen)
        if family.startswith("dcg"):
            return dcg
        return dcg / sum(w / math.log2(i + 2) for i, w in enumerate(sorted(worth, reverse=True)[:cutoff]))
    if family == "recall":
        return sum(relevant[i] for i in seen) / sum(relevant)
    if family == "precision":
        return sum(relevant[i] for i in seen) / cutoff
    if family.startswith("rbp"):
        p = float("0" + family[3:])
        return (1 - p) * sum(p**i for i in seen if relevant[i])
    if family == "hit_rate":
        return float(any(relevant[i] for i in seen))
    if family == "mrr":
        return next((1 / (i + 1) for i in seen if relevant[i]), 0.0)
    if family == "map":
        return sum(sum(relevant[: i + 1]) / (i + 1) for i in seen if relevant[i]) / sum(relevant)
    assert family.startswith("err")
    top = float(family[4:]) if family[3:] else max(gains)
    value, left = 0.0, 1.0
    for i in seen:
        stop = (2.0 ** gains[i] - 1) / 2.0**top
        value += left * stop / (i + 1)
        left *= 1 - stop
    return value


def swapped(gains: list[float], k: int, j: int) -> list[float]:
    other = list(gains)
    other[k], other[j] = other[j], other[k]
    return other


def brute_scores(name: str, gains: list[float], shown: int) -> np.ndarray:
    size = len(gains)
    value = textbook(name, gains, shown)
    pairs = [value - textbook(name, swapped(gains, k, j), shown) for k in range(size) for j in range(size)]
    return np.array(pairs, dtype=np.float64).reshape(size, size)


def brute_rewards(name: str, gains: list[float], shown: int, credit: str, weights: np.ndarray) -> np.ndarray:
    size = len(gains)
    scores = brute_scores(name, gains, shown)
    # The term of rank k is what R gains by showing it: R with k ranks shown, less R with k - 1.
    prefixes = [textbook(name, gains, t) for t in range(shown + 1)]
    rewards = np.zeros(size)
    for k in range(shown):
        behind = range(k + 1, size)
        if credit == "swap" and behind:
            rewards[k] = np.mean([scores[k, j] for j in behind])
        elif credit == "noncausal" and size > 1:
            rewards[k] = np.mean([scores[k, j] for j in range(size) if j != k])
        elif credit == "policy":
            total = sum(weights[k, j] for j in behind)
            rewards[k] = sum(weights[k, j] * scores[k, j] for j in behind) / total if total else 0.0
        elif credit == "independent":
            rewards[k] = prefixes[k + 1] - prefixes[k]
        elif credit == "rank":
            rewards[k] = prefixes[-1] - prefixes[k]
        elif credit == "sequence":
            rewards[k] = prefixes[-1]
    return rewards


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gains (N, K) float64 with NaN beyond the lengths, lengths, num_ranked, policy weights: ties and zeros abound."""
    rows, size = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    gain = st.one_of(st.just(0.0), st.integers(0, 4).map(float), st.floats(1e-3, 5.0))
    gains = torch.tensor(draw(st.lists(gain, min_size=rows * size, max_size=rows * size)), dtype=torch.float64)
    gains = gains.view(rows, size)
    lengths = torch.tensor(draw(st.lists(st.integers(0, size), min_size=rows, max_size=rows)))
    num_ranked = torch.tensor(draw(st.lists(st.integers(0, size), min_size=rows, max_size=rows)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weights = torch.rand(rows, size, size, generator=generator, dtype=torch.float64)
    weights = torch.where(torch.rand(weights.shape, generator=generator) < 0.3, 0.0, weights)
    outside = torch.arange(size) >= lengths[:, None]
    return gains.masked_fill(outside, math.nan), lengths, num_ranked, weights


def rows_of(gains: torch.Tensor, lengths: torch.Tensor, num_ranked: torch.Tensor) -> list[tuple[list[float], int]]:
    return [
        (row[:n].tolist(), min(int(n), int(t)))
        for row, n, t in zip(gains, lengths.tolist(), num_ranked.tolist(), strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(batch=batches(), cutoff=st.sampled_from(["", "@1", "@2", "@3", "@5", "@20"]))
def test_all_credits_and_backends_equal_brute_force(family, batch, cutoff):
    gains, lengths, num_ranked, weights = batch
    name = family + cutoff
    ragged = {"lengths": lengths, "num_ranked": num_ranked}
    lists = rows_of(gains, lengths, num_ranked)
    values = torch.tensor([textbook(name, g, t) for g, t in lists], dtype=torch.float64)
    torch.testing.assert_close(ranking_metric(gains, name, **ragged), values, rtol=0, atol=1e-12)
    for backend in ("torch", "numba"):
        scores = swap_scores(gains, name, backend=backend, **ragged)
        for i, (g, t) in enumerate(lists):
            expected = torch.from_numpy(brute_scores(name, g, t))
            torch.testing.assert_close(scores[i, : len(g), : len(g)], expected, rtol=0, atol=1e-11)
            assert scores[i, len(g) :].eq(0).all()
            assert scores[i, :, len(g) :].eq(0).all()
        for credit in CREDITS:
            w = weights if credit == "policy" else None
            rewards = swap_rewards(gains, name, credit=credit, weights=w, backend=backend, **ragged)
            for i, (g, t) in enumerate(lists):
                expected = torch.from_numpy(brute_rewards(name, g, t, credit, weights[i].numpy()))
                torch.testing.assert_close(rewards[i, : len(g)], expected, rtol=0, atol=1e-11)
                assert rewards[i, t:].eq(0).all()


def test_err_with_a_given_largest_gain():
    gains = [1.0, 0.0, 3.0, 2.0]
    expected = torch.from_numpy(brute_rewards("err.4", gains, 4, "swap", np.empty(0)))
    for backend in ("torch", "numba"):
        rewards = swap_rewards(torch.tensor([gains], dtype=torch.float64), "err.4", backend=backend)[0]
        torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-14)


# --------------------------------------------------------------------------------------------------- hand-made lists


def test_reward_is_positive_where_the_item_beats_what_is_left():
    rewards = swap_rewards(torch.tensor([[3.0, 0.0, 1.0]]), "dcg")[0]
    d = [1 / math.log2(k + 1) for k in (1, 2, 3)]
    expected = [((d[0] - d[1]) * 3 + (d[0] - d[2]) * 2) / 2, (d[1] - d[2]) * -1, 0.0]
    assert rewards.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lists_without_positive_gain_and_single_items_get_zero(family, backend):
    nothing = torch.zeros(2, 5)
    assert ranking_metric(nothing, family).eq(0).all()
    for credit in CREDITS:
        weights = torch.ones(2, 5, 5) if credit == "policy" else None
        assert swap_rewards(nothing, family, credit=credit, weights=weights, backend=backend).eq(0).all()
    single = torch.tensor([[2.0], [0.0]])
    assert swap_rewards(single, family, backend=backend).eq(0).all()
    assert swap_rewards(single, family, credit="noncausal", backend=backend).eq(0).all()
    assert swap_scores(single, family, backend=backend).eq(0).all()
    for shape in ((0, 4), (3, 0)):
        empty = torch.empty(shape)
        assert swap_rewards(empty, family, backend=backend).shape == shape
        assert swap_scores(empty, family, backend=backend).shape == (*shape, shape[1])
        assert ranking_metric(empty, family).shape == shape[:1]


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ties_give_exactly_zero(family, backend):
    """A rounding error in place of 0 would become an advantage of size 1 where rewards are divided by their spread."""
    tied = torch.full((3, 37), 0.3)
    assert swap_rewards(tied, family, backend=backend).eq(0).all()
    assert swap_rewards(tied, family, credit="noncausal", backend=backend).eq(0).all()
    if family in ("recall", "precision"):  # all candidates shown, equal discounts: no order is better than another
        mixed = torch.rand(3, 37, generator=torch.Generator().manual_seed(0)).round()
        assert swap_rewards(mixed, family, backend=backend).eq(0).all()


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("metric", ["dcg", "ndcg", "ndcg@10", "err", "ndcg_burges"])
def test_large_common_offset(metric, backend):
    """1e4 + noise, K = 4096, float32: within 1e-5 of the reward's scale of the O(K) sums taken exactly."""
    gains = 1e4 + torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    rewards = swap_rewards(gains, metric, backend=backend)
    scores = swap_scores(gains[:, :512].double(), metric, backend="torch")
    short = swap_rewards(gains[:, :512].contiguous(), metric, backend=backend)
    n = torch.arange(511, -1, -1).clamp(min=1)
    assert (short - scores.triu().sum(-1) / n).abs().max() <= 1e-5 * short.abs().max()
    if metric in ("dcg", "ndcg"):  # by pairs, in blocks, at full length
        exact = pairwise_dcg_rewards(gains[0].double().numpy(), normalised=metric == "ndcg")
        assert np.abs(rewards[0].numpy() - exact).max() <= 1e-5 * np.abs(exact).max()


def pairwise_dcg_rewards(gains: np.ndarray, normalised: bool) -> np.ndarray:
    size = len(gains)
    d = 1 / np.log2(np.arange(size) + 2)
    means = [np.mean((d[k] - d[k + 1 :]) * (gains[k] - gains[k + 1 :])) if k + 1 < size else 0.0 for k in range(size)]
    return np.array(means) / (np.sort(gains)[::-1] @ d if normalised else 1.0)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_err_does_not_underflow_behind_certain_stops(backend):
    """The chance to get beyond rank 1000 is 0 in float64; the rewards there are exactly 0, not NaN."""
    gains = torch.full((1, 3000), 60.0, dtype=torch.float64)
    gains[0, ::2] = 30.0
    for credit in ("swap", "noncausal", "rank"):
        rewards = swap_rewards(gains, "err", credit=credit, backend=backend)
        assert rewards.isfinite().all()
        assert rewards[0, 0] != 0


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, backend):
    gains = torch.tensor([[1.5, 0.25, 3.0, 0.0, 2.0]], dtype=dtype)
    for call in (swap_rewards, swap_scores):
        result = call(gains, "ndcg@3", backend=backend)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = call(gains.double(), "ndcg@3", backend="torch")
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-7)
    assert ranking_metric(gains, "ndcg").dtype == result.dtype


def test_backends_agree_on_long_ragged_lists():
    generator = torch.Generator().manual_seed(1)
    gains = torch.rand(70, 300, generator=generator, dtype=torch.float64) * (torch.rand(70, 300) < 0.5)
    lengths = torch.randint(0, 301, (70,), generator=generator)
    num_ranked = torch.randint(0, 301, (70,), generator=generator)
    for family in FAMILIES:
        for credit in CREDITS[:5]:
            results = [
                swap_rewards(gains, family + "@150", credit=credit, lengths=lengths, num_ranked=num_ranked, backend=b)
                for b in ("torch", "numba")
            ]
            torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 31, 100])
def test_rewards_of_a_list_do_not_depend_on_its_neighbours(size):
    """Lists are computed eight at a time; the last ones of a batch, and ragged ones, are computed alike to the bit."""
    generator = torch.Generator().manual_seed(size)
    gains = torch.rand(19, size, generator=generator) * (torch.rand(19, size, generator=generator) < 0.7)
    lengths = torch.randint(0, size + 1, (19,), generator=generator)
    for metric in ("ndcg", "ndcg@3", "ndcg_burges@9", "recall@2", "mrr", "map", "err@5"):
        together = swap_rewards(gains, metric, backend="numba")
        alone = torch.cat([swap_rewards(gains[i : i + 1], metric, backend="numba") for i in range(19)])
        torch.testing.assert_close(together, alone, rtol=0, atol=0)
        ragged = swap_rewards(gains, metric, lengths=lengths, backend="numba")
        for i, n in enumerate(lengths.tolist()):
            cut = swap_rewards(gains[i : i + 1, :n], metric, backend="numba")
            torch.testing.assert_close(ragged[i : i + 1, :n], cut, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("metric", ["ndcg", "ndcg@10", "ndcg@100", "ndcg_burges@1000", "dcg", "map", "err"])
def test_long_lists(metric):
    gains = torch.rand(3, 16384, generator=torch.Generator().manual_seed(5)) * 3
    exact = swap_rewards(gains.double(), metric, backend="torch")
    for backend, limit in (("numba", 1e-7), ("torch", 1e-7)):
        rewards = swap_rewards(gains, metric, backend=backend)
        assert (rewards - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-30, 2e30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_bad_gain_anywhere_is_named(value, dtype):
    value = torch.tensor(value, dtype=dtype).item()
    for rows, size, row, rank in ((1, 1, 0, 0), (9, 5, 8, 4), (20, 33, 11, 32), (300, 100, 299, 17)):
        gains = torch.rand(rows, size).to(dtype)
        gains[row, rank] = value
        if value == 0.0:  # of -1e-30 in half precision, which is fine
            assert swap_rewards(gains, "ndcg").isfinite().all()
            continue
        for call in (swap_rewards, swap_scores):
            with pytest.raises(ValueError, match=rf"gains must .* at index \[{row}, {rank}\]"):
                call(gains, "ndcg")
        lengths = torch.full((rows,), size)
        lengths[row] = rank  # where it does not count
        assert swap_rewards(gains, "ndcg", lengths=lengths).isfinite().all()


def test_negative_zeros_are_zeros():
    gains = torch.tensor([[2.0, -0.0, 1.0, 0.0, -0.0, 3.0]])
    for metric in ("ndcg", "ndcg_burges", "map", "err"):
        torch.testing.assert_close(swap_rewards(gains, metric), swap_rewards(gains.abs(), metric), rtol=0, atol=0)


def test_int_lengths_and_num_ranked_mean_the_same_for_all_lists():
    gains = torch.rand(3, 6)
    both = swap_rewards(gains, "map", lengths=5, num_ranked=2)
    tensors = swap_rewards(gains, "map", lengths=torch.full((3,), 5), num_ranked=torch.full((3,), 2, dtype=torch.int32))
    assert both.equal(tensors)


def test_strided_gains_and_no_gradient():
    gains = torch.rand(6, 4, requires_grad=True)
    rewards = swap_rewards(gains.T, "ndcg")
    assert not rewards.requires_grad
    torch.testing.assert_close(rewards, swap_rewards(gains.T.contiguous(), "ndcg"))
    assert not swap_scores(gains, "ndcg").requires_grad


# ----------------------------------------------------------------------------------------------------- custom metrics


def dcg_of_squares(gains, num_ranked):
    total = 0.0
    for k in range(num_ranked):
        total += gains[k] ** 2 / np.log2(k + 2)
    return total


def largest_drop(gains, num_ranked):  # not additive, not symmetric
    drop = 0.0
    for k in range(1, num_ranked):
        drop = max(drop, gains[k - 1] - gains[k])
    return drop / gains.max()


def test_custom_metrics_equal_brute_force():
    register_metric("dcg_of_squares", dcg_of_squares)
    register_metric("largest_drop", largest_drop)
    generator = torch.Generator().manual_seed(3)
    gains = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    gains[3] = 0.0
    lengths, num_ranked = torch.tensor([5, 4, 5, 5]), torch.tensor([5, 5, 2, 5])
    weights = torch.rand(4, 5, 5, generator=generator, dtype=torch.float64)
    for name, f in (("dcg_of_squares", dcg_of_squares), ("largest_drop@4", largest_drop)):
        for i, (g, t) in enumerate(rows_of(gains, lengths, num_ranked)):
            shown = min(t, 4) if "@" in name else t

            def value(gains, shown=shown, f=f):
                return f(np.array(gains), shown) if max(gains) > 0 else 0.0

            scores = np.array([[value(g) - value(swapped(g, k, j)) for j in range(len(g))] for k in range(len(g))])
            one = {"lengths": lengths[i : i + 1], "num_ranked": num_ranked[i : i + 1]}
            row = gains[i : i + 1]
            assert ranking_metric(row, name, **one).item() == pytest.approx(value(g))
            means = [scores[k, k + 1 :].mean() if k < min(t, len(g) - 1) else 0.0 for k in range(len(g))]
            torch.testing.assert_close(swap_rewards(row, name, **one)[0, : len(g)], torch.tensor(means).double())
            torch.testing.assert_close(swap_scores(row, name, **one)[0, : len(g), : len(g)], torch.from_numpy(scores))
            w = weights[i : i + 1]
            policy = swap_rewards(row, name, credit="policy", weights=w, **one)[0]
            first = (w[0, 0, 1 : len(g)].numpy() * scores[0, 1:]).sum() / w[0, 0, 1 : len(g)].sum()
            assert policy[0].item() == pytest.approx(float(first))
            assert swap_rewards(row, name, credit="sequence", **one)[0, 0].item() == pytest.approx(value(g))
            tail = swap_rewards(row, name, credit="rank", **one)[0]
            terms = swap_rewards(row, name, credit="independent", **one)[0]
            torch.testing.assert_close(terms.flip(0).cumsum(0).flip(0)[:t], tail[:t])


def test_custom_metric_that_returns_nan_is_an_error():
    register_metric("half_known", lambda gains, num_ranked: np.nan if gains[0] > 1 else 1.0)
    assert swap_rewards(torch.tensor([[0.5, 1.0]]), "half_known").eq(0).all()
    with pytest.raises(ValueError, match="half_known"):
        swap_rewards(torch.tensor([[0.5, 2.0]]), "half_known")
    with pytest.raises(ValueError, match="half_known"):
        ranking_metric(torch.tensor([[2.0, 0.5]]), "half_known")
    with pytest.raises(ValueError, match="numba"):
        swap_rewards(torch.tensor([[0.5, 1.0]]), "half_known", backend="torch")


# ---------------------------------------------------------------------------------------------- custom ops and errors


SWAP_REWARDS, SWAP_SCORES = torch.ops.flexrec.swap_rewards.default, torch.ops.flexrec.swap_scores.default


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_opcheck(backend):
    gains, counts = torch.rand(3, 5), torch.tensor([5, 3, 1])
    weights = torch.rand(3, 5, 5)
    torch.library.opcheck(SWAP_REWARDS, (gains, "ndcg@3", "swap", counts, None, 5, None, backend))
    torch.library.opcheck(SWAP_REWARDS, (gains.half(), "map", "policy", None, counts, 4, weights, backend))
    variance = (gains, "ndcg@3", "swap", counts, None, 5, None, backend, gains)
    torch.library.opcheck(SWAP_REWARDS, variance)
    torch.library.opcheck(SWAP_SCORES, (gains.double(), "err", counts, counts, 5, backend))


def test_fullgraph_compile_uses_the_registered_op():
    gains = torch.rand(4, 6)
    compiled = torch.compile(lambda g: swap_rewards(g, "ndcg@5", num_ranked=4) * 2, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(gains), swap_rewards(gains, "ndcg@5", num_ranked=4) * 2)


@pytest.mark.parametrize("metric", ["ndcg@5", "err", "recall"])
def test_fullgraph_compile_of_rewards_with_variance(metric):
    torch._dynamo.reset()
    gains, variance = torch.rand(4, 6), torch.rand(4, 6)
    compiled = torch.compile(swap_rewards_with_variance, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(gains, variance, metric), swap_rewards_with_variance(gains, variance, metric))
    for backend in ("numba", "torch"):
        got = compiled(gains, variance, metric, backend=backend)
        torch.testing.assert_close(got, swap_rewards_with_variance(gains, variance, metric))


GAINS = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gains": GAINS[0]}, ValueError, r"gains must have shape \(N, K\), got \(3,\)"),
        ({"gains": GAINS.long()}, TypeError, "gains must have a floating dtype"),
        ({"gains": GAINS.tolist()}, TypeError, "gains must be a torch.Tensor, got list"),
        ({"gains": GAINS * math.nan}, ValueError, r"gains must be finite, got nan at index \[0, 0\]"),
        ({"gains": GAINS - 1}, ValueError, r"gains must lie in \[0, 1e\+30\], got -1.0 at index \[0, 1\]"),
        ({"metric": "dcg_burges", "gains": GAINS * 200}, ValueError, r"gains must lie in \[0, 100.0\], got 200.0"),
        ({"metric": "err.1"}, ValueError, r"gains must lie in \[0, 1.0\], got 2.0"),
        ({"metric": "nope@3"}, ValueError, "metric must be one of dcg, ndcg, .* got 'nope@3'"),
        ({"credit": "swaps"}, ValueError, "credit must be one of 'swap', .* got 'swaps'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', .* got 'cuda'"),
        ({"lengths": torch.tensor([3, 4])}, ValueError, r"lengths must lie in \[0, 3\], got 4 at index \[1\]"),
        ({"lengths": torch.tensor([3])}, ValueError, r"lengths must have shape \(2,\), got \(1,\)"),
        ({"lengths": torch.tensor([3.0, 3.0])}, TypeError, "lengths must have an integer dtype"),
        ({"num_ranked": 4}, ValueError, r"num_ranked must lie in \[0, 3\], got 4"),
        ({"num_ranked": 1.5}, TypeError, "num_ranked must be an int or an integer tensor"),
        ({"num_ranked": torch.tensor([0, -1])}, ValueError, r"num_ranked must lie in \[0, 3\], got -1"),
        ({"credit": "policy"}, ValueError, "weights are needed with credit='policy'"),
        ({"weights": torch.ones(2, 3, 3)}, ValueError, "weights are needed with credit='policy' and only then"),
        ({"credit": "policy", "weights": torch.ones(2, 3)}, ValueError, r"weights must have shape \(2, 3, 3\)"),
        ({"credit": "policy", "weights": -torch.ones(2, 3, 3)}, ValueError, "weights must lie in"),
        ({"backend": "triton", "gains": torch.ones(1, 16385)}, ValueError, "K <= 16384 candidates, got K=16385"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"gains": GAINS, "metric": "ndcg", **change}
    with pytest.raises(error, match=message):
        swap_rewards(arguments.pop("gains"), arguments.pop("metric"), **arguments)


def test_values_that_do_not_count_are_not_read():
    gains = torch.tensor([[1.0, 2.0, math.nan, -5.0]])
    weights = torch.full((1, 4, 4), math.nan)
    weights[0, 0, 1] = 1.0
    for backend in ("torch", "numba"):
        policy = swap_rewards(gains, "dcg", credit="policy", weights=weights, lengths=2, backend=backend)
        torch.testing.assert_close(policy, swap_rewards(gains, "dcg", lengths=2, backend=backend))
        assert policy[0, 0] < 0


def test_numba_leaves_torch_its_number_of_threads():
    """Starting numba's threads once reset torch's, so that two processes of one thread each ran as four."""
    program = (
        "import torch; torch.set_num_threads(1); torch.get_num_threads()\n"
        "from flexrec import swap_rewards\n"
        "swap_rewards(torch.rand(4096, 30), 'ndcg'); print(torch.get_num_threads())"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1"]
