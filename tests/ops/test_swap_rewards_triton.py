"""The Triton kernels against the torch reference in float64: in the interpreter without a GPU, compiled with one."""

from __future__ import annotations

import math

import pytest
import torch

from flexrec import metrics
from flexrec.metrics import FAMILIES, OF_TOPICS, parse_metric
from flexrec.ops import library, ranking_metric
from flexrec.ops import swap_rewards as module
from flexrec.ops.ranking_metric import Lists, ingredients
from flexrec.ops.swap_reference import rewards_of
from flexrec.ops.swap_rewards import swap_rewards, swap_rewards_with_variance, swap_scores
from flexrec.triton_kernels import lists

NAMES = [{"rbp": "rbp.8"}.get(name, name) for name in FAMILIES if name not in OF_TOPICS]
LINEAR = [name for name in NAMES if parse_metric(name).definition.form == "linear"]
CREDITS = ("swap", "noncausal", "independent", "rank", "sequence")
ULP = 2.0**-23


def make_gains(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    """(rows, size) float64, exact in bfloat16, with ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    gains = torch.randint(0, 24, (rows, size), generator=generator) / 8.0
    return (gains * (torch.rand(rows, size, generator=generator) < 0.6)).double()


def make_counts(rows: int, size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Lengths and num_ranked, 0 and ``size`` among them."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, size + 1, (2, rows), generator=generator)
    counts[0, 0], counts[1, 0] = size, size
    counts[0, -1] = 0 if rows > 2 else size - 1
    if rows > 3:
        counts[1, 1] = 0
    return {"lengths": counts[0], "num_ranked": counts[1]}


def on(device: torch.device, counts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.to(device) for name, x in counts.items()}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: an entry that a kernel does not write is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def nan(*args: object, **kwargs: object) -> torch.Tensor:
        result = empty(*args, **kwargs)
        return result.fill_(math.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", nan)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty_like(x).fill_(math.nan))


def torch_in_float32(monkeypatch: pytest.MonkeyPatch, gains: torch.Tensor, metric: str, credit: str) -> torch.Tensor:
    """The reference's closed forms, computed by torch in float32 throughout."""
    table = metrics.discount_table
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "double", torch.Tensor.float)
        patch.setattr(ranking_metric, "discount_table", lambda *key: table(*key).astype("float32"))
        parts = ingredients(Lists(gains.float(), None, None, gains.shape[1]), parse_metric(metric))
        rewards = rewards_of(parts, parse_metric(metric), credit, None)
    assert rewards.dtype == torch.float32
    return rewards


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("name", NAMES)
def test_every_metric_and_credit(name, credit, device):
    """Ragged lists with NaN outside, ranks that are not shown, a last program that is not full, two tile widths."""
    number = NAMES.index(name) * len(CREDITS) + CREDITS.index(credit)
    rows, size = [(35, 30), (5, 43)][number % 2]  # a program holds 32 lists
    metric = name + ["", "@3", "@100"][number % 3]
    gains, counts = make_gains(rows, size, number), make_counts(rows, size, number)
    gains[0, :], gains[0, 1], counts["num_ranked"][0] = 0.0, 2.0, size // 2  # one relevant item, and ranks not shown
    outside = torch.arange(size) >= counts["lengths"][:, None]
    exact = swap_rewards(gains.masked_fill(outside, math.nan), metric, credit=credit, backend="torch", **counts)
    assert exact.abs().max() > 0
    dtype = (torch.float32, torch.float64, torch.bfloat16, torch.float16)[number % 4]
    ragged = gains.masked_fill(outside, math.nan).to(device, dtype)
    rewards = swap_rewards(ragged, metric, credit=credit, backend="triton", **on(device, counts)).cpu()
    assert rewards.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-14 if dtype == torch.float64 else 5 * ULP
    assert (rewards - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("credit", ["swap", "noncausal"])
@pytest.mark.parametrize(
    "metric", ["dcg", "ndcg@10", "ndcg_burges", "recall@5", "rbp.8", "hit_rate@10", "mrr", "map", "err"]
)
def test_error_is_at_most_twice_that_of_torch_in_float32(metric, credit, device, monkeypatch):
    gains = torch.rand(8, 100, generator=torch.Generator().manual_seed(1)) * 3
    gains = gains * (torch.rand(8, 100, generator=torch.Generator().manual_seed(2)) < 0.7)
    exact = swap_rewards(gains.double(), metric, credit=credit, backend="torch")
    torch_error = (torch_in_float32(monkeypatch, gains, metric, credit) - exact).abs().amax(-1)  # (8,)
    rewards = swap_rewards(gains.to(device), metric, credit=credit, backend="triton").cpu()
    floor = 4 * ULP * exact.abs().amax(-1)
    assert ((rewards - exact).abs().amax(-1) <= (2 * torch_error).clamp(min=floor)).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [1, 2, 3, 17, 100, 128, 129])
def test_list_lengths(size, device):
    gains = make_gains(2, size, size)
    for metric in ("ndcg", "map"):
        exact = swap_rewards(gains, metric, backend="torch")
        rewards = swap_rewards(gains.float().to(device), metric, backend="triton").cpu()
        assert (rewards - exact).abs().max() <= 5 * ULP * exact.abs().max()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("metric", "credit"),
    [
        ("ndcg", "swap"),  # tiles sorted and merged through memory
        ("ndcg@30", "noncausal"),  # the largest of each tile kept
        ("mrr", "swap"),
        ("map", "swap"),
        ("map", "noncausal"),
        ("err", "swap"),
        ("err", "noncausal"),
        ("err", "rank"),
        ("dcg", "rank"),
    ],
)
def test_lists_of_several_tiles(metric, credit, device, monkeypatch, request):
    """Tiles of 64 ranks in place of 256: four of them, two levels of merges."""
    monkeypatch.setattr(lists, "WIDTHS", (32, 64, 64))
    lists.tiles_of.cache_clear()
    request.addfinalizer(lists.tiles_of.cache_clear)
    size = 150
    gains, counts = make_gains(3, size, 3), make_counts(3, size)
    gains[:, :100] *= torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.02  # matters behind, too
    exact = swap_rewards(gains, metric, credit=credit, backend="torch", **counts)
    for dtype, tolerance in ((torch.float32, 10 * ULP), (torch.float64, 1e-13)):
        if dtype == torch.float64 and credit != "swap":
            continue
        rewards = swap_rewards(gains.to(device, dtype), metric, credit=credit, backend="triton", **on(device, counts))
        assert (rewards.cpu() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("metric", "size"), [("ndcg", 300), ("ndcg@10", 1025), ("dcg", 2049)])
def test_long_lists(metric, size, device):
    gains = make_gains(1, size)
    exact = swap_rewards(gains, metric, backend="torch")
    rewards = swap_rewards(gains.float().to(device), metric, backend="triton").cpu()
    assert (rewards - exact).abs().max() <= 10 * ULP * exact.abs().max()


def amplification(metric, credit, gains, variance, counts):
    """(N, K) the sum of the magnitudes that a variance is added up from, over the variance: 1 where all are positive.

    With discounts d less that of the last shown rank, as e, and sums over the pool and the item itself, a variance is
    proportional to (m e - sum e)^2 v + e^2 sum v - 2 e sum e v + sum e^2 v (``flexrec.triton_kernels.swap_linear``).
    """
    if credit not in ("swap", "noncausal"):
        return torch.ones_like(gains)
    parsed, (rows, size) = parse_metric(metric), gains.shape
    length, shown = counts["lengths"][:, None], torch.minimum(counts["lengths"], counts["num_ranked"])[:, None]
    k = torch.arange(size).expand(rows, size)
    inside = k < length
    d = torch.from_numpy(metrics.discount_table(parsed, size)).expand(rows, size)
    d = d.masked_fill((k >= shown) | (k >= (parsed.cutoff or size)), 0.0)
    e = (d - d.gather(1, (shown - 1).clamp(min=0))).masked_fill(~inside, 0.0)
    slope = 2.0**gains if "burges" in metric else torch.ones_like(gains)
    v = (variance * slope.square()).masked_fill(~inside, 0.0)

    def pool(x):
        return x.flip(1).cumsum(1).flip(1) if credit == "swap" else x.sum(1, keepdim=True).expand_as(x)

    m, sum_e, sum_v, sum_ev, sum_eev = (pool(x) for x in (inside.double(), e, v, e * v, e * e * v))
    own = m * e - sum_e
    exact = own.square() * v + e.square() * sum_v - 2 * e * sum_ev + sum_eev
    added = own.abs() * (m * e).abs() + own.abs() * pool(e.abs())
    added = added * v + e.square() * sum_v + 2 * e.abs() * pool((e * v).abs()) + sum_eev
    return torch.where((k < shown) & (exact > 0), added / exact, 1.0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("metric", ["ndcg@7", "recall", "ndcg_burges", "dcg_burges"])
def test_variance(metric, credit, device):
    """In the same launch; exact for linear term gains, first order for 2^g - 1, as the reference.

    The bound of a list's variances: each of the numbers they are added up from has gone through some 60 roundings of
    half an ULP (the slope of 2^g and its square 13, e and e^2 v 7, sums of 32 numbers 5, products and sums of sums 8,
    the square of 1 / (m - 1) Z 28), which add up as their root, 4 ULP, of the largest of them and not of what is left.
    """
    generator = torch.Generator().manual_seed(0)
    rows, size = 3, 30
    gains, variance = make_gains(rows, size) / 3, torch.rand(rows, size, generator=generator, dtype=torch.float64)
    counts = make_counts(rows, size)
    outside = torch.arange(size) >= counts["lengths"][:, None]
    exact = swap_rewards_with_variance(gains, variance, metric, credit=credit, backend="torch", **counts)
    for dtype, tolerance in ((torch.float32, 5 * ULP), (torch.float64, 1e-14)):
        inputs = [x.masked_fill(outside, math.nan).to(device, dtype) for x in (gains, variance)]
        found = swap_rewards_with_variance(*inputs, metric, credit=credit, backend="triton", **on(device, counts))
        rewards, spread = (x.cpu().double() for x in found)
        assert (rewards - exact[0]).abs().max() <= tolerance * exact[0].abs().max()
        added = amplification(metric, credit, gains, variance, counts) * exact[1]
        assert ((spread - exact[1]).abs().amax(1) <= tolerance * added.amax(1)).all()


@pytest.mark.parametrize("credit", ["swap", "noncausal"])
def test_variance_of_what_differs_from_few(credit, device):
    """All shown ranks weigh the same and an item of them is certain: what is left are the few that are not shown.

    No number is a difference of sums over the whole list, so each is good to its own last places: a reward has gone
    through some 20 roundings of half an ULP (sums of 128 numbers 7 each, of which the normaliser is one), a variance
    through 35, which add up as their root, 2 and 3 ULP.
    """
    variance = torch.ones(1, 100)
    variance[0, 3], variance[0, 98:] = 0.0, 1e-6
    options = {"metric": "recall", "credit": credit, "num_ranked": 98}
    exact = swap_rewards_with_variance(variance.double(), variance.double(), backend="torch", **options)
    inputs = variance.to(device), variance.to(device)
    found = swap_rewards_with_variance(*inputs, backend="triton", **options)
    assert exact[1][0, 3] < 1e-6 * exact[1].max()
    for x, expected in zip(found, exact, strict=True):
        assert ((x.cpu() - expected).abs() <= 5 * ULP * expected.abs()).all()


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("metric", ["ndcg", "dcg@20", "ndcg_burges", "dcg_burges"])
@pytest.mark.parametrize(
    ("gain", "variance"), [(1e-20, 1e-42), (1e30, 1e38), (1e-40, 1e-44), (3e-45, 0.0), (30.0, 1.0)]
)
def test_extremes_of_float32(gain, variance, metric, credit, device):
    """What float32 can hold comes out right: squares of small gains are no 0, those of large ones no infinity."""
    if metric == "dcg_burges":
        gain = min(gain, 90.0)  # whose power of two is 1e27
    elif metric == "ndcg_burges":
        variance = min(variance, 1e30)  # of term gains of at most 1, whose sums are still numbers
    generator = torch.Generator().manual_seed(0)
    gains = (gain * torch.rand(3, 30, generator=generator, dtype=torch.float64)).float()
    variances = (variance * torch.rand(3, 30, generator=generator, dtype=torch.float64)).float()
    inputs = gains.to(device), variances.to(device)
    found = swap_rewards_with_variance(*inputs, metric, credit=credit, backend="triton")
    plain = swap_rewards(inputs[0], metric, credit=credit, backend="triton").cpu()
    # The reference subtracts 1 from 2^g and so loses the digits of small gains.
    backend = "numba" if gain < 1e-3 else "torch"
    exact = swap_rewards_with_variance(gains.double(), variances.double(), metric, credit=credit, backend=backend)
    tiny = torch.finfo(torch.float32).smallest_normal * ULP
    for x, expected in zip((*found, plain), (*exact, exact[0]), strict=True):
        representable = expected.abs().max() < torch.finfo(torch.float32).max
        assert not representable or (x.cpu() - expected).abs().max() <= 10 * ULP * expected.abs().max() + tiny


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("metric", ["ndcg", "ndcg@300", "dcg_burges", "recall@280"])
def test_variance_of_lists_of_several_tiles(metric, credit, variance, device, monkeypatch):
    """K > 256: what is carried from tile to tile, variances included."""
    generator = torch.Generator().manual_seed(0)
    rows, size = 2, 301
    gains, variances = make_gains(rows, size) / 3, torch.rand(rows, size, generator=generator, dtype=torch.float64)
    counts = make_counts(rows, size)
    counts["lengths"][1], counts["num_ranked"] = 299, torch.tensor([301, 270])
    if not variance:
        exact = (swap_rewards(gains, metric, credit=credit, backend="torch", **counts),)
        found = (swap_rewards(gains.float().to(device), metric, credit=credit, backend="triton", **on(device, counts)),)
    else:
        exact = swap_rewards_with_variance(gains, variances, metric, credit=credit, backend="torch", **counts)
        inputs = gains.float().to(device), variances.float().to(device)
        found = swap_rewards_with_variance(*inputs, metric, credit=credit, backend="triton", **on(device, counts))
    for x, expected in zip(found, exact, strict=True):
        assert (x.cpu() - expected).abs().max() <= 20 * ULP * expected.abs().max()


def test_variances_without_a_kernel_are_refused(device):
    gains = torch.rand(2, 3, device=device)
    for metric, credit in (("err", "swap"), ("ndcg", "policy")):
        weights = torch.ones(2, 3, 3, device=device) if credit == "policy" else None
        with pytest.raises(ValueError, match=r"linear metrics .* backend='torch' computes all"):
            swap_rewards_with_variance(gains, gains, metric, credit=credit, weights=weights, backend="triton")


@pytest.mark.parametrize("metric", ["dcg", "ndcg", "ndcg_burges"])
def test_large_common_offset(metric, device):
    gains = 1e4 + torch.randn(2, 250, generator=torch.Generator().manual_seed(0))
    exact = swap_rewards(gains.double(), metric, backend="torch")
    rewards = swap_rewards(gains.to(device), metric, backend="triton").cpu()
    assert (rewards - exact).abs().max() <= 20 * ULP * exact.abs().max()


def test_ranks_at_the_end_keep_their_digits(device):
    """Their rewards are a thousand times smaller than the first ones, and so must their error be."""
    gains = torch.rand(3, 100, generator=torch.Generator().manual_seed(0))
    exact = swap_rewards(gains.double(), "ndcg", backend="torch")
    rewards = swap_rewards(gains.to(device), "ndcg", backend="triton").cpu()
    scale = exact.abs().flip(-1).cummax(-1).values.flip(-1)[:, :-1]  # (3, 99), the largest reward from here on
    assert scale[:, -1].max() < 2e-3 * scale[:, 0].max()
    assert ((rewards - exact).abs()[:, :-1] <= 200 * ULP * scale).all()


@pytest.mark.parametrize("metric", NAMES)
def test_ties_give_exactly_zero(metric, device):
    """A rounding error in place of 0 would become an advantage of size 1 where rewards are divided by their spread."""
    for gain in (0.3, 0.0):
        tied = torch.full((3, 37), gain, device=device)
        assert swap_rewards(tied, metric, backend="triton").eq(0).all()
    if metric in ("recall", "precision"):  # all candidates shown, equal discounts: no order is better than another
        mixed = torch.rand(3, 37, generator=torch.Generator().manual_seed(0)).round().to(device)
        assert swap_rewards(mixed, metric, backend="triton").eq(0).all()


def test_strides(device):
    gains = make_gains(6, 40).float().to(device)
    for view in (gains[:, ::2], gains[:, :13], gains[:, 1:], gains[::2, :12]):
        for metric in ("ndcg", "err"):
            exact = swap_rewards(view.double().cpu(), metric, backend="torch")
            rewards = swap_rewards(view, metric, backend="triton").cpu()
            assert (rewards - exact).abs().max() <= 5 * ULP * exact.abs().max()


def test_small_gains_keep_their_digits(device):
    gains = torch.rand(4, 60, generator=torch.Generator().manual_seed(0)) * 1e-3
    # The reference subtracts 1 from 2^g and so loses some of float64's digits itself.
    for metric, dtype, tolerance in (("ndcg_burges", torch.float32, 5 * ULP), ("dcg_burges", torch.float64, 1e-12)):
        exact = swap_rewards(gains.double(), metric, backend="torch")
        rewards = swap_rewards(gains.to(device, dtype), metric, backend="triton").cpu()
        assert (rewards - exact).abs().max() <= tolerance * exact.abs().max()


def test_err_with_a_given_largest_gain(device):
    gains = make_gains(3, 20)
    exact = swap_rewards(gains, "err.4@7", backend="torch")
    rewards = swap_rewards(gains.float().to(device), "err.4@7", backend="triton").cpu()
    assert (rewards - exact).abs().max() <= 5 * ULP * exact.abs().max()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize("metric", ["ndcg", "recall@5", "mrr@3", "map@20", "err"])
def test_swap_scores_and_policy_rewards(metric, size, device):
    rows = 3 if size < 40 else 2
    gains, counts = make_gains(rows, size, size), make_counts(rows, size, size)
    outside = torch.arange(size) >= counts["lengths"][:, None]
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(rows, size, size, generator=generator, dtype=torch.float64).bfloat16()
    weights[:, :, ::3] = 0.0
    ragged, on_device = gains.masked_fill(outside, math.nan), on(device, counts)
    scores = swap_scores(ragged, metric, backend="torch", **counts)
    means = swap_rewards(ragged, metric, credit="policy", weights=weights, backend="torch", **counts)
    dtype, tolerance = (torch.float64, 1e-14) if metric == "recall@5" else (torch.float32, 5 * ULP)
    found = swap_scores(ragged.to(device, dtype), metric, backend="triton", **on_device).cpu()
    assert (found - scores).abs().max() <= tolerance * scores.abs().max()
    assert found.diagonal(dim1=1, dim2=2).eq(0).all()
    unused = torch.ones(size, size, dtype=torch.bool).tril()
    policy = swap_rewards(
        ragged.to(device, dtype),
        metric,
        credit="policy",
        weights=weights.masked_fill(unused, 7.0).to(device),
        backend="triton",
        **on_device,
    ).cpu()
    assert (policy - means).abs().max() <= tolerance * means.abs().max()


def test_swap_scores_of_several_tiles_of_columns(device):
    gains = make_gains(1, 131)
    scores = swap_scores(gains, "err", backend="torch")
    found = swap_scores(gains.float().to(device), "err", backend="triton").cpu()
    assert (found - scores).abs().max() <= 5 * ULP * scores.abs().max()


def test_tables_are_not_copied_while_a_graph_is_captured(monkeypatch):
    """CUDA would refuse the copy with an error that names nothing, and end the capture."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    metric = parse_metric("ndcg@7")
    arguments = torch.device("cuda", 0), torch.float32
    for table in (
        lambda: lists.discounts_on(metric, 31, *arguments),
        lambda: lists.swap_table_on(metric, 31, 9, *arguments),
        lambda: lists.sorted_discounts_on(metric, 31, 32, 16, *arguments),
    ):
        with pytest.raises(RuntimeError, match=r"call them once with the same metric, K .* before the capture"):
            table()


def test_empty_batches(device):
    for shape in ((0, 5), (5, 0)):
        gains = torch.empty(shape, device=device)
        assert swap_rewards(gains, "ndcg", backend="triton").shape == shape
        assert swap_scores(gains, "ndcg", backend="triton").shape == (*shape, shape[1])


def test_opcheck(device):
    gains, counts = torch.rand(3, 5, device=device), torch.tensor([5, 3, 1], device=device)
    torch.library.opcheck(
        torch.ops.flexrec.swap_rewards.default, (gains, "ndcg@3", "swap", counts, None, 5, None, "triton")
    )


def test_too_long_lists_are_refused(device):
    with pytest.raises(ValueError, match=f"K <= {module.MAX_TRITON_SIZE}.* K={module.MAX_TRITON_SIZE + 1}"):
        swap_rewards(torch.zeros(1, module.MAX_TRITON_SIZE + 1, device=device), "dcg", backend="triton")


def test_without_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(library, "triton_interprets", lambda: False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        swap_rewards(torch.zeros(1, 3), "dcg", backend="triton")


@pytest.mark.gpu
def test_auto_chooses_the_kernel_on_a_gpu():
    gains = torch.rand(8, 30, device="cuda")
    for metric in NAMES:
        assert module._choose_backend("auto", parse_metric(metric), gains) == "triton"
