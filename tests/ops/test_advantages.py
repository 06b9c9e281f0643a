"""item_advantages against a Python loop that follows the definition, and its promises about zero, sign and masks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.ops.advantages import BASELINES, SCALES, item_advantages


def members(where: str, prompt: int, rank: int, prompts: int, generations: int, ranks: int) -> list[tuple[int, int]]:
    """The (row, rank) pairs that share one statistic with the items of ``prompt`` at ``rank``."""
    chosen_prompts = range(prompts) if where == "batch" else [prompt]
    chosen_ranks = [rank] if where == "rank" else range(ranks)
    return [(p * generations + g, k) for p in chosen_prompts for g in range(generations) for k in chosen_ranks]


def loop_advantages(rewards, generations, baseline, scale, mask):
    rows, ranks = len(rewards), len(rewards[0])
    prompts = rows // generations
    left = [[0.0] * ranks for _ in range(rows)]
    for row in range(rows):
        for k in range(ranks):
            if not mask[row][k]:
                continue
            mean = 0.0
            if baseline != "none":
                same = members(baseline, row // generations, k, prompts, generations, ranks)
                values = [rewards[i][j] for i, j in same if mask[i][j]]
                mean = math.fsum(values) / len(values)
            left[row][k] = rewards[row][k] - mean
    if scale == "none":
        return left
    out = [[0.0] * ranks for _ in range(rows)]
    for row in range(rows):
        for k in range(ranks):
            if mask[row][k]:
                same = members(scale, row // generations, k, prompts, generations, ranks)
                squares = [left[i][j] ** 2 for i, j in same if mask[i][j]]
                spread = math.sqrt(math.fsum(squares) / len(squares))
                out[row][k] = left[row][k] / spread if spread > 0 else 0.0
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BASELINES),
    st.sampled_from(SCALES),
    st.integers(1, 3),
    st.integers(2, 4),
    st.integers(1, 5),
    st.integers(0, 10**6),
)
def test_equals_the_definition(baseline, scale, prompts, generations, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(prompts * generations, ranks, generator=generator, dtype=torch.float64)
    mask = torch.rand(rewards.shape, generator=generator) > 0.3
    rewards = rewards.masked_fill(~mask, math.nan)  # masked rewards count nowhere, so they may be anything
    got = item_advantages(rewards, generations, baseline=baseline, scale=scale, item_mask=mask)
    expected = loop_advantages(rewards.tolist(), generations, baseline, scale, mask.tolist())
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert (got[~mask] == 0).all()


def test_default_is_rewards_over_their_root_mean_square():
    rewards = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    torch.testing.assert_close(item_advantages(rewards, 1), rewards / 2.5)


@pytest.mark.parametrize("scale", SCALES)
def test_scaling_without_a_baseline_keeps_every_sign(scale):
    rewards = torch.randn(12, 7, generator=torch.Generator().manual_seed(0)) + 5.0
    rewards[3] -= 9.0
    assert torch.equal(item_advantages(rewards, 4, scale=scale).sign(), rewards.sign())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["rank", "group"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(baseline, scale, dtype):
    # 0.1 is no sum of powers of two: a mean of seven of them rounds, and a division by that rounding would give 1.
    rewards = torch.full((7 * 2, 3), 0.1, dtype=dtype)
    rewards[7:] = 1e4 / 3
    assert (item_advantages(rewards, 7, baseline=baseline, scale=scale) == 0).all()


def test_rewards_that_differ_by_rounding_are_equal():
    rewards = torch.full((4, 3), 0.3)
    rewards[1] = torch.nextafter(rewards[1], torch.tensor(1.0))
    assert (item_advantages(rewards, 4, baseline="rank", scale="rank") == 0).all()


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_all_zero_rewards_give_exactly_zero(baseline, scale):
    assert (item_advantages(torch.zeros(4, 3), 2, baseline=baseline, scale=scale) == 0).all()


def test_tiny_rewards_do_not_vanish_in_the_square():
    rewards = torch.tensor([[1e-30, -1e-30]])
    torch.testing.assert_close(item_advantages(rewards, 1), torch.tensor([[1.0, -1.0]]))


def test_no_masked_position_moves_the_others():
    rewards = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:3, 2:] = False  # the first prompt has two candidates only
    for baseline in BASELINES:
        for scale in ("rank", "group"):
            got = item_advantages(rewards, 3, baseline=baseline, scale=scale, item_mask=mask)
            short = item_advantages(rewards[:3, :2], 3, baseline=baseline, scale=scale)
            torch.testing.assert_close(got[:3, :2], short)


def test_weights_scale_after_everything_else():
    rewards = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    plain = item_advantages(rewards, 2, baseline="rank")
    per_rollout = torch.tensor([[0.5], [2.0], [1.0], [0.0]])
    torch.testing.assert_close(item_advantages(rewards, 2, baseline="rank", weights=per_rollout), plain * per_rollout)
    per_item = torch.rand(4, 3)
    torch.testing.assert_close(item_advantages(rewards, 2, baseline="rank", weights=per_item), plain * per_item)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[0, 0] = False
    per_item[0, 0] = math.nan  # an item that is not there has no weight either
    assert item_advantages(rewards, 2, item_mask=mask, weights=per_item)[0, 0] == 0


def test_no_gradient_and_dtype_kept():
    rewards = torch.randn(2, 3, dtype=torch.float16, requires_grad=True)
    got = item_advantages(rewards, 1)
    assert not got.requires_grad
    assert got.dtype == torch.float16


def test_empty_batch_and_no_ranks():
    assert item_advantages(torch.zeros(0, 5), 4, baseline="group").shape == (0, 5)
    assert item_advantages(torch.zeros(4, 0), 4, baseline="group", scale="rank").shape == (4, 0)


def test_one_rollout_has_no_baseline_per_rank():
    with pytest.raises(ValueError, match=r"num_generations=1 .* no signal"):
        item_advantages(torch.zeros(2, 3), 1, baseline="rank")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"item_rewards": torch.zeros(3)}, ValueError, r"item_rewards must have shape \(N, K\), got \(3,\)"),
        ({"item_rewards": torch.zeros(4, 3, dtype=torch.long)}, TypeError, "item_rewards must have a floating dtype"),
        ({"item_rewards": torch.full((4, 3), math.nan)}, ValueError, r"item_rewards must be finite.*index \[0, 0\]"),
        ({"num_generations": 3}, ValueError, "must divide the 4 rows of item_rewards, got 3"),
        ({"num_generations": 0}, ValueError, "num_generations"),
        ({"num_generations": 2.0}, TypeError, "num_generations must be an int"),
        ({"baseline": "median"}, ValueError, "baseline must be one of 'none', 'rank', 'group'"),
        ({"scale": "item"}, ValueError, "scale must be one of"),
        ({"item_mask": torch.ones(4, 2, dtype=torch.bool)}, ValueError, "item_mask must have shape"),
        ({"item_mask": torch.ones(4, 3)}, TypeError, "item_mask must have a bool dtype"),
        ({"weights": torch.ones(4, 2)}, ValueError, r"weights must have shape \(4, 3\)"),
        ({"weights": torch.full((4, 1), -1.0)}, ValueError, "weights must lie in"),
        ({"weights": torch.full((4, 1), math.inf)}, ValueError, "weights must lie in"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {"item_rewards": torch.zeros(4, 3), "num_generations": 2} | change
    with pytest.raises(error, match=message):
        item_advantages(**arguments)
