"""Reward variance against its definition and against sampling; uncertainty weights against theirs."""

import math

import pytest
import torch

from flexrec.ops.advantages import uncertainty_weights
from flexrec.ops.swap_rewards import WITH_VARIANCE, swap_rewards, swap_rewards_with_variance

CREDITS = ("swap", "noncausal", "independent", "rank", "sequence", "policy")
N, K = 3, 6
GENERATOR = torch.Generator().manual_seed(0)
GAINS = torch.rand(N, K, generator=GENERATOR, dtype=torch.float64) * 0.8 + 0.1
VARIANCE = torch.rand(N, K, generator=GENERATOR, dtype=torch.float64) * 0.02
POLICY = torch.rand(N, K, K, generator=GENERATOR, dtype=torch.float64)
RAGGED = {"lengths": torch.tensor([6, 5, 4]), "num_ranked": torch.tensor([6, 3, 6])}


def name_of(family: str) -> str:
    return "rbp.8" if family == "rbp" else family


def discounts(metric: str, size: int) -> torch.Tensor:
    k = torch.arange(1, size + 1, dtype=torch.float64)
    return {"rbp.8": 0.2 * 0.8 ** (k - 1), "recall": k**0, "precision": k**0}.get(metric, 1 / torch.log2(k + 1))


def effects(metric: str, credit: str, gains: torch.Tensor, shown: int, policy: torch.Tensor) -> torch.Tensor:
    """(K, K): what one unit of the term gain at rank i adds to the reward of rank k, from the rewards' definition."""
    size = len(gains)
    d = discounts(metric, size) * (torch.arange(size) < shown)
    norm = {
        "recall": gains.sum(),
        "precision": torch.tensor(float(size)),
        "ndcg": gains.sort(descending=True).values @ discounts(metric, size),
        "ndcg_burges": (2**gains - 1).sort(descending=True).values @ discounts(metric, size),
    }.get(metric, torch.tensor(1.0))
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for k in range(shown):
        pool = [j for j in range(size) if j > k or (credit == "noncausal" and j != k)]
        if credit in ("swap", "noncausal", "policy"):
            share = [policy[k, j] / policy[k, k + 1 :].sum() if credit == "policy" else 1 / len(pool) for j in pool]
            for j, s in zip(pool, share, strict=True):
                matrix[k, k] += s * (d[k] - d[j])
                matrix[k, j] -= s * (d[k] - d[j])
        elif credit == "independent":
            matrix[k, k] = d[k]
        else:
            start = k if credit == "rank" else 0
            matrix[k, start:] = d[start:]
    return matrix / norm


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("metric", ["dcg", "ndcg", "recall", "precision", "rbp.8", "dcg_burges", "ndcg_burges"])
def test_variance_of_linear_metrics_is_the_sum_over_items(metric, credit):
    weights = POLICY if credit == "policy" else None
    rewards, variance = swap_rewards_with_variance(GAINS, VARIANCE, metric, credit=credit, weights=weights, **RAGGED)
    for i in range(N):
        size = int(RAGGED["lengths"][i])
        shown = min(size, int(RAGGED["num_ranked"][i]))
        g, v = GAINS[i, :size], VARIANCE[i, :size]
        matrix = effects(metric, credit, g, shown, POLICY[i, :size, :size])
        worth, slope = g, torch.ones_like(g)
        if metric.endswith("burges"):
            worth, slope = 2**g - 1, math.log(2) * 2**g
        torch.testing.assert_close(rewards[i, :size], matrix @ worth, rtol=0, atol=1e-13)
        torch.testing.assert_close(variance[i, :size], matrix**2 @ (slope**2 * v), rtol=0, atol=1e-15)
        assert variance[i, shown:].eq(0).all()
        assert rewards[i, shown:].eq(0).all()


def test_variance_equals_that_of_sampled_gains():
    """Normaliser held fixed: sampled with dcg, whose normaliser is 1."""
    gains, variance = torch.tensor([[3.0, 1.0, 2.0, 4.0]]).double(), torch.tensor([[0.1, 0.2, 0.05, 0.3]]).double()
    noise = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    samples = swap_rewards((gains + noise * variance.sqrt()).clamp(min=0), "dcg")
    rewards, spread = swap_rewards_with_variance(gains, variance, "dcg")
    torch.testing.assert_close(samples.mean(0), rewards[0], rtol=0, atol=3e-3)
    torch.testing.assert_close(samples.var(0), spread[0], rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("metric", ["err.2", "err.2@3"])
def test_err_variance_is_first_order(metric, credit):
    """Against central differences of the rewards in every gain; a given largest gain does not move with them."""
    weights = POLICY if credit == "policy" else None
    arguments = {"credit": credit, "weights": weights, **RAGGED}
    rewards, variance = swap_rewards_with_variance(GAINS, VARIANCE, metric, **arguments)
    torch.testing.assert_close(rewards, swap_rewards(GAINS, metric, **arguments), rtol=0, atol=1e-14)
    expected, step = torch.zeros_like(GAINS), 1e-5
    for i in range(K):
        nudge = torch.zeros_like(GAINS)
        nudge[:, i] = step
        up, down = (swap_rewards(GAINS + s * nudge, metric, **arguments) for s in (1, -1))
        inside = i < RAGGED["lengths"][:, None]
        expected += torch.where(inside, ((up - down) / (2 * step)) ** 2 * VARIANCE[:, i : i + 1], 0.0)
    torch.testing.assert_close(variance, expected, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("credit", CREDITS[:5])
@pytest.mark.parametrize("family", WITH_VARIANCE)
def test_numba_equals_torch(family, credit):
    """On ragged batches of several tiles, with ties and zeros; torch goes through err by automatic differentiation."""
    generator = torch.Generator().manual_seed(7)
    gains = torch.rand(13, 21, generator=generator, dtype=torch.float64)
    gains = torch.where(torch.rand(13, 21, generator=generator) < 0.3, gains.round(), gains)
    variance = torch.rand(13, 21, generator=generator, dtype=torch.float64)
    variance = variance * (torch.rand(13, 21, generator=generator) < 0.8)
    lengths = torch.randint(0, 22, (13,), generator=generator)
    outside = torch.arange(21) >= lengths[:, None]
    gains, variance = gains.masked_fill(outside, math.nan), variance.masked_fill(outside, math.nan)
    ragged = {"lengths": lengths, "num_ranked": torch.randint(0, 22, (13,), generator=generator)}
    for cutoff in ("", "@1", "@9"):
        name = name_of(family) + cutoff
        ours = swap_rewards_with_variance(gains, variance, name, credit=credit, backend="numba", **ragged)
        reference = swap_rewards_with_variance(gains, variance, name, credit=credit, backend="torch", **ragged)
        for got, expected in zip(ours, reference, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("metric", ["ndcg", "err"])
def test_variance_under_a_large_common_offset(metric):
    """Gains near 1e4 that differ by 1, K = 300: the differences of discounts and of stops must not cancel away."""
    generator = torch.Generator().manual_seed(2)
    gains = 1e4 + torch.randn(2, 300, generator=generator, dtype=torch.float64)
    variance = torch.rand(2, 300, generator=generator, dtype=torch.float64)
    for credit in ("swap", "noncausal"):
        _, ours = swap_rewards_with_variance(gains, variance, metric, credit=credit, backend="numba")
        _, reference = swap_rewards_with_variance(gains, variance, metric, credit=credit, backend="torch")
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-9 * float(reference.max()))


def test_variance_of_certain_stops_is_finite():
    """A user who surely stops at rank 2 (theta = 1 in float64): slopes divide by nothing, and ranks behind get 0."""
    gains = torch.tensor([[0.5, 60.0, 1.0, 60.0, 2.0]], dtype=torch.float64)
    for credit in CREDITS[:5]:
        ours = swap_rewards_with_variance(gains, torch.full_like(gains, 0.1), "err", credit=credit, backend="numba")
        reference = swap_rewards_with_variance(
            gains, torch.full_like(gains, 0.1), "err", credit=credit, backend="torch"
        )
        for got, expected in zip(ours, reference, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("family", WITH_VARIANCE)
def test_certain_gains_give_the_plain_rewards_and_no_variance(family):
    gains = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0], [0.0] * 5])
    rewards, variance = swap_rewards_with_variance(gains, torch.zeros_like(gains), name_of(family) + "@3")
    torch.testing.assert_close(rewards, swap_rewards(gains, name_of(family) + "@3"))
    assert rewards.dtype == variance.dtype == torch.float32
    assert variance.eq(0).all()


def test_wrong_arguments():
    for metric in ("mrr", "map", "hit_rate"):
        with pytest.raises(ValueError, match=f"'{metric}' has no reward variance; those that have: dcg, ndcg, .*, err"):
            swap_rewards_with_variance(GAINS, VARIANCE, metric)
    with pytest.raises(ValueError, match=r"probabilities of relevance for recall, must lie in \[0.0, 1.0\], got 1.5"):
        swap_rewards_with_variance(torch.full((1, 2), 1.5), torch.zeros(1, 2), "recall")
    with pytest.raises(ValueError, match=r"variance must lie in \[0.0, inf\], got -"):
        swap_rewards_with_variance(GAINS, -VARIANCE, "ndcg")
    with pytest.raises(ValueError, match="variance must be finite, got nan"):
        swap_rewards_with_variance(GAINS, VARIANCE * math.nan, "ndcg")
    with pytest.raises(ValueError, match=r"variance must have shape \(3, 6\), got \(3, 5\)"):
        swap_rewards_with_variance(GAINS, VARIANCE[:, :5], "ndcg")
    with pytest.raises(ValueError, match="weights are needed with credit='policy'"):
        swap_rewards_with_variance(GAINS, VARIANCE, "ndcg", credit="policy")
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'numba', 'torch'; got 'nope'"):
        swap_rewards_with_variance(GAINS, VARIANCE, "ndcg", backend="nope")
    with pytest.raises(ValueError, match="any credit but 'policy'"):
        swap_rewards_with_variance(GAINS, VARIANCE, "ndcg", credit="policy", weights=POLICY, backend="numba")


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_bad_value_anywhere_is_named(backend):
    for name, value, message in (("variance", math.nan, "finite"), ("variance", -1.0, "lie"), ("gains", -1.0, "lie")):
        values = {"gains": torch.rand(30, 17), "variance": torch.rand(30, 17)}
        values[name][21, 16] = value
        with pytest.raises(ValueError, match=rf"{name} must .*{message}.* at index \[21, 16\]"):
            swap_rewards_with_variance(values["gains"], values["variance"], "ndcg", backend=backend)
    for shape in ((0, 4), (3, 0)):
        rewards, variance = swap_rewards_with_variance(torch.empty(shape), torch.empty(shape), "err", backend=backend)
        assert rewards.shape == variance.shape == shape


# ----------------------------------------------------------------------------------------------- uncertainty weights


def test_rollout_weights_by_hand():
    variance = torch.tensor([[0.1, 0.3], [0.2, 0.0], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    c = [1 / (0.4 + 0.1), 1 / (0.2 + 0.1)]
    expected = torch.tensor([[2 * c[0] / sum(c)], [2 * c[1] / sum(c)], [1.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(uncertainty_weights(variance, 2, eps=0.1, normalise="group"), expected)


def test_item_weights_by_hand_with_a_mask():
    variance = torch.tensor([[0.1, 0.3], [0.4, math.nan]])
    mask = torch.tensor([[True, True], [True, False]])
    c = torch.tensor([[1 / 0.2, 1 / 0.4], [1 / 0.5, 0.0]])
    weights = uncertainty_weights(variance, 2, level="item", eps=0.1, normalise="group", item_mask=mask)
    torch.testing.assert_close(weights, c / (c.sum() / 3))


def test_weights_are_clamped_after_their_mean_is_one():
    variance = torch.zeros(4, 3)
    variance[1:] = 1e6
    weights = uncertainty_weights(variance, 4, eps=1e-3, max_ratio=3.0)
    torch.testing.assert_close(weights, torch.tensor([[3.0], [1 / 3], [1 / 3], [1 / 3]]))


def test_a_certain_and_an_uncertain_prompt_differ_with_one_rollout_each():
    variance = torch.tensor([[0.0, 0.0], [0.3, 0.1]], dtype=torch.float64)
    weights = uncertainty_weights(variance, 1)  # eps is the mean variance, 0.2
    c = torch.tensor([[1 / 0.2], [1 / 0.6]], dtype=torch.float64)
    torch.testing.assert_close(weights, c / c.mean())
    assert uncertainty_weights(variance, 1, normalise="group").eq(1).all()
    torch.testing.assert_close(uncertainty_weights(variance, 1, normalise="none"), c)


@pytest.mark.parametrize("level", ["rollout", "item"])
def test_automatic_eps_is_what_noise_leaves_of_the_rewards_second_moment(level):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 4, generator=generator) < 0.8
    variance = torch.where(mask, torch.rand(6, 4, generator=generator, dtype=torch.float64) * 0.02, math.nan)
    for size in (1.0, 0.01):  # in the second case noise is larger than what is seen, and 1 % of that is taken
        rewards = torch.where(mask, size * torch.randn(6, 4, generator=generator, dtype=torch.float64), math.nan)
        if level == "rollout":
            u, square = variance.nansum(-1, keepdim=True), (rewards**2).nansum(-1, keepdim=True)
        else:
            u, square = variance, rewards**2
        eps = max(float(square.nanmean() - u.nanmean()), float(square.nanmean()) / 100)
        assert (eps == float(square.nanmean()) / 100) == (size == 0.01)
        c = 1 / (u + eps)
        got = uncertainty_weights(variance, 2, level=level, rewards=rewards, item_mask=mask, max_ratio=1e9)
        torch.testing.assert_close(got, (c / c.nanmean()).nan_to_num(0.0))
        torch.testing.assert_close(
            got, uncertainty_weights(variance, 2, level=level, eps=eps, item_mask=mask, max_ratio=1e9)
        )


def test_two_processes_that_share_their_sums_are_one_batch():
    generator = torch.Generator().manual_seed(1)
    variance, rewards = torch.rand(8, 3, generator=generator).double(), torch.randn(8, 3, generator=generator).double()
    whole = uncertainty_weights(variance, 2, rewards=rewards)
    given: list[list[torch.Tensor]] = [[], []]
    halves = (slice(0, 4), slice(4, 8))
    for _ in range(3):  # the sums of one exchange depend on the result of the one before
        found = []
        for own, half in enumerate(halves):
            calls = iter(range(2))
            seen: list[torch.Tensor] = []

            def reduce(sums, own=own, calls=calls, seen=seen):
                seen.append(sums)
                step = next(calls)
                other = given[1 - own]
                return sums + other[step] if step < len(other) else sums

            found.append(uncertainty_weights(variance[half], 2, rewards=rewards[half], reduce=reduce))
            given[own] = seen
    torch.testing.assert_close(torch.cat(found), whole)


def test_weights_of_any_layout_and_of_nothing():
    variance = torch.rand(3, 4).t()
    torch.testing.assert_close(
        uncertainty_weights(variance, 2, level="item", normalise="group"),
        uncertainty_weights(variance.contiguous(), 2, level="item", normalise="group"),
    )
    for normalise in ("batch", "group", "none"):
        for shape in ((4, 0), (0, 3), (0, 0)):
            for level, columns in (("rollout", 1), ("item", shape[1])):
                empty = uncertainty_weights(torch.zeros(shape), 2, level=level, normalise=normalise)
                assert empty.shape == (shape[0], columns)
                assert empty.eq(0).all()
        nothing = torch.zeros(4, 2)
        assert uncertainty_weights(nothing, 2, normalise=normalise, rewards=nothing).eq(1).all()


def test_equal_variances_single_rollouts_and_empty_ones():
    assert uncertainty_weights(torch.full((6, 4), 0.7), 3).eq(1).all()
    assert uncertainty_weights(torch.zeros(6, 4), 3, level="item").eq(1).all()
    assert uncertainty_weights(torch.rand(5, 4), 1, normalise="group").eq(1).all()
    mask = torch.tensor([[True, True], [False, False]])
    assert uncertainty_weights(torch.rand(2, 2), 2, item_mask=mask).tolist() == [[1.0], [0.0]]
    assert uncertainty_weights(torch.rand(2, 2), 2, item_mask=mask & False).eq(0).all()
    assert uncertainty_weights(torch.rand(2, 2).half(), 2).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_generations": 4}, ValueError, "num_generations must be an integer >= 1 that divides the 6 rows"),
        ({"num_generations": 0}, ValueError, "num_generations"),
        ({"level": "token"}, ValueError, "level must be one of 'rollout', 'item'"),
        ({"eps": 0.0}, ValueError, "eps must be > 0"),
        ({"eps": math.nan}, ValueError, "eps must be > 0"),
        ({"eps": "own"}, ValueError, "or 'auto'; got 'own'"),
        ({"normalise": "prompt"}, ValueError, "normalise must be one of 'batch', 'group', 'none'"),
        ({"rewards": torch.ones(6, 3)}, ValueError, r"rewards must have shape \(6, 2\)"),
        ({"rewards": torch.full((6, 2), math.inf)}, ValueError, "rewards must be finite"),
        ({"max_ratio": 0.5}, ValueError, "max_ratio must be >= 1"),
        ({"variance": -torch.ones(6, 2)}, ValueError, "variance must lie in"),
        ({"variance": torch.ones(6)}, ValueError, "variance must have shape"),
        ({"item_mask": torch.ones(6, 2)}, TypeError, "item_mask must have a bool dtype"),
        ({"item_mask": torch.ones(6, 3, dtype=torch.bool)}, ValueError, "item_mask must have shape"),
    ],
)
def test_wrong_weight_arguments(change, error, message):
    arguments = {"variance": torch.ones(6, 2), "num_generations": 3, **change}
    with pytest.raises(error, match=message):
        uncertainty_weights(arguments.pop("variance"), arguments.pop("num_generations"), **arguments)
