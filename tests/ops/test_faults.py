"""Inputs that once gave a silent wrong number, or an error that named nothing."""

import itertools
import math

import pytest
import torch

import flexrec
from flexrec.numba_kernels import OutOfRange
from flexrec.ops import swap_rewards as swaps

BACKENDS = ("numba", "torch")
HALF_AND_WHOLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- swap rewards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_AND_WHOLE)
@pytest.mark.parametrize("top", [0.3, 0.8, 1.7])
def test_the_largest_gain_is_a_gain_in_every_dtype(top, dtype):
    """As float32, 0.3 is more than 0.3: a kernel refused it, and its buffer was returned unwritten."""
    gains = torch.tensor([[top, 0.0, top / 3]], dtype=torch.float64).to(dtype)
    variance = torch.full((1, 3), 0.01, dtype=dtype)
    metric = f"err.{top}"
    want = swaps.swap_rewards_with_variance(gains.double().clamp(max=top), variance.double(), metric, backend="torch")
    for backend in BACKENDS:
        got = swaps.swap_rewards_with_variance(gains, variance, metric, backend=backend)
        torch.testing.assert_close(tuple(x.double() for x in got), want, rtol=2e-2, atol=1e-6)
        torch.testing.assert_close(got[0], swaps.swap_rewards(gains, metric, backend=backend))
        assert flexrec.swap_scores(gains, metric, backend=backend).isfinite().all()
    above = (gains.double() * 1.02).to(dtype)
    for backend, function in itertools.product(BACKENDS, (swaps.swap_rewards, swaps.swap_scores)):
        with pytest.raises(ValueError, match=r"gains must lie in \[0, "):
            function(above, metric, backend=backend)


def test_the_example_of_the_variance_that_was_not_written():
    rewards, variance = swaps.swap_rewards_with_variance(
        torch.tensor([[0.3, 0.0, 0.1]]), torch.full((1, 3), 0.01), "err.0.3"
    )
    torch.testing.assert_close(variance, torch.tensor([[0.002255, 0.000125, 0.0]]), rtol=1e-2, atol=1e-6)
    assert rewards.isfinite().all()


@pytest.mark.parametrize("function", ["rewards", "policy", "scores", "variance"])
def test_what_a_kernel_refuses_is_never_returned(function, monkeypatch):
    """Not even where the search for the reason finds none."""
    monkeypatch.setattr(swaps, "_check_values", lambda *_: None)
    gains, weights = torch.tensor([[1.0, math.nan, 0.5]]), torch.ones(1, 3, 3)
    call = {
        "rewards": lambda: swaps.swap_rewards(gains, "ndcg"),
        "policy": lambda: swaps.swap_rewards(gains, "ndcg", credit="policy", weights=weights),
        "scores": lambda: swaps.swap_scores(gains, "map"),
        "variance": lambda: swaps.swap_rewards_with_variance(torch.ones(1, 3), -gains, "ndcg"),
    }[function]
    with pytest.raises(OutOfRange, match="out of its range"):
        call()


@pytest.mark.parametrize("gain", [1e-30, 1e-12, 1e-3, 0.9999, 1.0, 3.7])
def test_small_gains_keep_their_digits(gain):
    gains = torch.tensor([[gain, 0.0]], dtype=torch.float64)
    want = math.expm1(gain * math.log(2))
    assert flexrec.ranking_metric(gains, "dcg_burges").item() == pytest.approx(want, rel=1e-14)
    for backend in BACKENDS:
        reward = flexrec.swap_rewards(gains, "dcg_burges", backend=backend)[0, 0].item()
        assert reward == pytest.approx(want * (1 - 1 / math.log2(3)), rel=1e-13)
