"""Inputs that once gave a silent wrong number, or an error that named nothing."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

import flexrec
from flexrec.numba_kernels import OutOfRange
from flexrec.ops import ranking_metric
from flexrec.ops import swap_rewards as swaps
from flexrec.ops.vocabulary_logprobs import vocabulary_logprobs

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
    monkeypatch.setattr(ranking_metric, "check_gain_values", lambda *_: None)
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
    assert flexrec.ranking_metric(gains, "dcg_burges").item() == pytest.approx(want, rel=1e-14, abs=0)
    for backend in BACKENDS:
        reward = flexrec.swap_rewards(gains, "dcg_burges", backend=backend)[0, 0].item()
        assert reward == pytest.approx(want * (1 - 1 / math.log2(3)), rel=1e-13, abs=0)


# --- log-probs --------------------------------------------------------------------------------------------------------


def ranking_case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 3, 8, generator=generator).to(dtype)
    weight = torch.randn(10, 8, generator=generator).to(dtype)
    candidates = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    ranking = torch.tensor([[0, 1, 2], [2, 1, 0], [3, 2, 1], [0, 2, 3]])
    return hidden, weight, candidates, ranking


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_no_number_in_no_number_out_of_rankings(where, bad, backend):
    hidden, weight, candidates, ranking = ranking_case()
    if where == "hidden":
        hidden[1, 1] = bad  # all of it: with weights of one sign logits of -inf are impossible candidates
        weight.abs_()
    else:
        weight[3] = bad  # which no step takes
    hidden.requires_grad_()
    weight.requires_grad_()
    values = torch.rand(4, 4, 2)
    out = flexrec.ranking_logprobs_with_kl(
        hidden,
        weight,
        candidates,
        ranking,
        values=values,
        ref_hidden=torch.ones(4, 3, 8),
        ref_weight=torch.ones(10, 8),
        backend=backend,
    )
    for result in out:
        assert result[1, 1].isnan().all()
        hidden_grad, weight_grad = torch.autograd.grad(result.sum(), (hidden, weight), retain_graph=True)
        assert hidden_grad[1, 1].isnan().any()
        assert weight_grad[candidates[0, 1]].isnan().any()
    if where == "hidden":  # others are as they were
        assert out.logprobs[2:].isfinite().all()
        assert torch.autograd.grad(out.logprobs.sum(), hidden)[0][2:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_in_no_number_out_of_sets(bad, backend):
    hidden, weight, *_ = ranking_case()
    hidden, weight = hidden[:, 0].clone(), weight.abs()
    hidden[1] = bad
    hidden.requires_grad_()
    weight.requires_grad_()
    ids, offsets, targets = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8]), torch.tensor([0, 3, 6, 8, 9]), [0, 4, 7, 8]
    out = flexrec.restricted_logprobs(
        hidden, weight, ids, offsets, torch.tensor(targets), values=torch.rand(9, 1), backend=backend
    )
    for result in out:
        assert result[1].isnan().all()
        assert result[2:].isfinite().all()
        hidden_grad, weight_grad = torch.autograd.grad(result.sum(), (hidden, weight), retain_graph=True)
        assert hidden_grad[1].isnan().any()
        assert weight_grad[3:6].isnan().any()
        assert hidden_grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reference_that_is_no_number_shows_in_the_divergence(backend):
    hidden, weight, candidates, ranking = ranking_case()
    hidden.requires_grad_()
    ref_hidden = hidden.detach().clone()
    ref_hidden[0, 0] = math.nan
    kl = flexrec.ranking_kl(hidden, weight, ref_hidden, weight, candidates, ranking, backend=backend)
    assert kl[0, 0].isnan()
    assert kl[1:].isfinite().all()
    assert torch.autograd.grad(kl.sum(), hidden)[0][0, 0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_candidate_has_no_gradient_at_all(backend):
    """p (v - E) of the only candidate is 0, not what rounding leaves of it."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 5, 8, generator=generator).requires_grad_()
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    candidates = torch.stack([torch.randperm(40, generator=generator)[:5] for _ in range(6)])
    ranking = torch.stack([torch.randperm(5, generator=generator) for _ in range(6)])
    values = torch.randn(6, 5, 3, generator=generator) * 7
    out = flexrec.ranking_logprobs_with_kl(
        hidden, weight, candidates, ranking, values=values, ref_hidden=hidden * 2, ref_weight=weight, backend=backend
    )
    assert out.logprobs[:, -1].eq(0).all()
    assert out.entropy[:, -1].eq(0).all()
    total = sum(x[:, -1].sum() for x in out)
    hidden_grad, weight_grad = torch.autograd.grad(total, (hidden, weight))
    assert hidden_grad.eq(0).all()
    assert weight_grad.eq(0).all()


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 5e-324, math.nan, 0.0])
def test_a_temperature_that_no_logit_can_be_divided_by_is_refused(temperature):
    hidden, weight, candidates, ranking = ranking_case()
    ids, offsets = torch.tensor([0, 1]), torch.tensor([0, 2])
    options = {"temperature": temperature}
    for call in (
        lambda: flexrec.ranking_logprobs(hidden, weight, candidates, ranking, **options),
        lambda: flexrec.restricted_logprobs(hidden[:1, 0], weight, ids, offsets, ids[:1], **options),
        lambda: vocabulary_logprobs(hidden[:, 0], weight, torch.zeros(4, dtype=torch.int64), **options),
    ):
        with pytest.raises(ValueError, match="temperature must be positive and finite, and at least 1e-10"):
            call()
    cold = flexrec.ranking_logprobs(hidden, weight, candidates, ranking, temperature=1e-10)
    assert cold.entropy.eq(0).all()
    assert not cold.logprobs.isnan().any()


# --- tensors of other kinds -------------------------------------------------------------------------------------------


def calls():
    """Every function of tensors by name, as a function of its first tensor; and that tensor."""
    hidden, weight, candidates, ranking = ranking_case()
    gains, ids, offsets = torch.rand(4, 4), torch.arange(8), torch.arange(0, 9, 2)
    rows, mask = hidden[:, 0], torch.ones(4, 4, dtype=torch.bool)
    targets = ids[::2]
    return {
        "swap_rewards": (lambda x: flexrec.swap_rewards(x, "ndcg"), gains),
        "swap_scores": (lambda x: flexrec.swap_scores(x, "ndcg"), gains),
        "swap_rewards_with_variance": (lambda x: flexrec.swap_rewards_with_variance(x, gains, "ndcg"), gains),
        "ranking_metric": (lambda x: flexrec.ranking_metric(x, "ndcg"), gains),
        "item_advantages": (lambda x: flexrec.item_advantages(x, 2), gains),
        "uncertainty_weights": (lambda x: flexrec.uncertainty_weights(x, 2), gains),
        "policy_loss": (lambda x: flexrec.policy_loss(x, None, gains, mask)[0], -gains),
        "ranking_logprobs": (lambda x: flexrec.ranking_logprobs(x, weight, candidates, ranking).entropy, hidden),
        "ranking_probs": (lambda x: flexrec.ranking_probs(x, weight, candidates, ranking), hidden),
        "restricted": (lambda x: flexrec.restricted_logprobs(x, weight, ids, offsets, targets).entropy, rows),
        "all_actions": (
            lambda x: flexrec.all_actions_objective(x, weight, candidates, ranking, gains, "ndcg").objective,
            hidden,
        ),
        "vocabulary": (lambda x: vocabulary_logprobs(x, weight, targets), rows),
    }


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda x: x.to_sparse(), "layout torch.sparse_coo; use to_dense"),
        (lambda x: x.to("meta"), "a meta tensor"),
        (lambda x: torch._neg_view(-x), "a lazily negated view; use resolve_neg"),
    ],
    ids=["sparse", "meta", "negated"],
)
def test_tensors_without_plain_values_are_named(convert, message, name):
    function, tensor = calls()[name]
    with pytest.raises(TypeError, match=f"must be a dense tensor with values of its own, got {message}"):
        function(convert(tensor))


@pytest.mark.parametrize("metric", ["ndcg@3", "mrr"])
def test_a_metric_of_constants_within_a_transform(metric):
    gains = torch.rand(3, 5)
    value = flexrec.ranking_metric(gains, metric)
    found = torch.func.grad(lambda x: (flexrec.ranking_metric(gains, metric) * x).sum())(torch.ones(3))
    torch.testing.assert_close(found, value)
    many = torch.func.vmap(lambda x: flexrec.ranking_metric(gains, metric) * x)(torch.ones(2, 3))
    torch.testing.assert_close(many, value.expand(2, 3))


@pytest.mark.parametrize("name", ["swap_rewards", "swap_scores", "ranking_logprobs", "restricted", "all_actions"])
def test_transforms_of_kernels_are_refused_by_name(name):
    function, tensor = calls()[name]
    transforms = (torch.func.vmap(function), tensor[None]), (torch.func.grad(lambda x: function(x).sum()), tensor)
    for transformed, given in transforms:
        with pytest.raises(TypeError, match=r"torch.func \(vmap, grad, jvp\): use backend='torch'"):
            transformed(given)


def test_plain_torch_can_be_transformed():
    hidden, weight, candidates, ranking = ranking_case()

    def entropy(x):
        return flexrec.ranking_logprobs(x, weight, candidates, ranking, backend="torch").entropy.sum()

    got = torch.func.grad(entropy)(hidden)
    (want,) = torch.autograd.grad(entropy(hidden.requires_grad_()), hidden)
    torch.testing.assert_close(got, want)


# --- the loss, groups without signal ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_AND_WHOLE)
@pytest.mark.parametrize("distance", [-199.0, -30.0, 11.0, 30.0, 199.0])
def test_distant_policies_have_finite_losses_and_gradients(distance, dtype):
    logps = torch.full((1, 3), -200.0, dtype=dtype).requires_grad_()
    far = (logps.detach().double() + distance).to(dtype)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for arguments in (
        {"old_per_token_logps": far, "advantages": -torch.ones(1, 3)},
        {"old_per_token_logps": None, "advantages": torch.ones(1, 3), "beta": 0.1, "ref_per_token_logps": far},
    ):
        loss, metrics = flexrec.policy_loss(logps, completion_mask=mask, **arguments)
        (grad,) = torch.autograd.grad(loss, logps)
        assert loss.isfinite()
        assert grad.isfinite().all()
        assert all(x.isfinite() for x in metrics.values())
        if "beta" in arguments:  # towards the reference
            pull = grad.double() + 1 / 3  # without the surrogate's part
            assert (pull < 0).all() if distance > 0 else (pull > 0).all()


def test_a_reference_that_is_no_number_is_named():
    logps, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="ref_per_token_logps must be finite, got nan"):
        flexrec.policy_loss(logps, None, logps, mask, beta=0.1, ref_per_token_logps=torch.tensor([[0.0, math.nan]]))


@pytest.mark.parametrize("baseline", ["none", "rank", "group"])
@pytest.mark.parametrize("scale", ["rank", "group", "batch", "none"])
def test_groups_without_rewards_or_without_differences_are_silent(scale, baseline):
    """All rewards missing, all equal: advantage 0 with a baseline, no NaN, the third group as without them."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(6, 3, generator=generator)
    rewards[:2], rewards[2:4] = math.nan, 0.7
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[:2] = False
    found = flexrec.item_advantages(rewards, 2, baseline=baseline, scale=scale, item_mask=mask)
    assert found.isfinite().all()
    assert found[:2].eq(0).all()
    if baseline != "none":
        assert found[2:4].eq(0).all()
    alone = flexrec.item_advantages(rewards[4:], 2, baseline=baseline, scale=scale)
    ratio = found[4:] / alone  # one number where the batch sets the scale
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio) if scale == "batch" else torch.ones_like(ratio))


def test_without_advantages_the_gradient_is_the_divergences():
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(4, 3, generator=generator)
    ref = -torch.rand(4, 3, generator=generator)
    mask = torch.ones(4, 3, dtype=torch.bool)
    rewards = torch.full((4, 3), math.nan)
    advantages = flexrec.item_advantages(rewards, 2, baseline="rank", scale="rank", item_mask=~mask)
    x = logps.clone().requires_grad_()
    loss, _ = flexrec.policy_loss(x, logps, advantages, mask, beta=0.1, ref_per_token_logps=ref)
    (got,) = torch.autograd.grad(loss, x)
    y = logps.clone().requires_grad_()
    want = 0.1 * (torch.expm1(ref - y) - (ref - y)).sum() / 12
    torch.testing.assert_close(got, torch.autograd.grad(want, y)[0])
    torch.testing.assert_close(loss.detach(), want.detach())


def test_what_is_compiled_first_changes_no_value(tmp_path):
    """Kernels whose sums may be reordered call others that must see what is no number; here they are the first to."""
    script = """
import torch, flexrec
hidden = torch.full((1, 4), -torch.inf)
sets = torch.tensor([0, 1, 2]), torch.tensor([0, 3]), torch.tensor([0])
print(flexrec.restricted_logprobs(hidden, torch.ones(3, 4), *sets, backend="numba").logprobs.item())
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "nan\n", done.stderr
