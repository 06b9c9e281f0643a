"""all_actions_objective against its definition: re-compute the metric after every exchange, weight by the policy."""

import pytest
import torch

import flexrec
from flexrec.ops.all_actions import all_actions_objective, all_actions_objective_with_kl
from flexrec.ops.ranking_logprobs import ranking_kl, ranking_logprobs
from flexrec.ops.ranking_metric import ranking_metric

LINEAR = ["dcg", "ndcg@3", "dcg_burges@4", "ndcg_burges", "recall@2", "precision@3", "rbp.8"]
OTHER = ["hit_rate@2", "mrr", "map@4", "err"]


def make_gains(case, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n, k = len(case.hidden), case.candidates.shape[1]
    return torch.randint(0, 4, (n, k), generator=generator).double()


def brute_force(case, gains, metric, num_ranked, tilt=None):
    """(N, T): sum over j of pi_t(j) (R(y with t and j exchanged) - R(y)); num_ranked: one int per ranking.

    With a tilt, its exponential utility instead.
    """
    objective = case.hidden.new_zeros(case.ranking.shape)
    for n, t, remaining in case.steps():
        length = case.length(n)
        probs = case.log_probs(n, t, remaining).exp()
        own = gains[n : n + 1, :length]
        options = {"num_ranked": min(num_ranked[n], length)}
        value = ranking_metric(own, metric, **options)
        changes = []
        for j in range(t, length):
            swapped = own.clone()
            swapped[0, [t, j]] = own[0, [j, t]]
            changes.append(ranking_metric(swapped, metric, **options) - value)
        change = torch.cat(changes)
        objective[n, t] = probs @ change if tilt is None else tilt * (probs @ (change / tilt).exp()).log()
    return objective


@pytest.mark.parametrize("ragged", ["", "list", "ranking"])
@pytest.mark.parametrize("metric", LINEAR + OTHER)
def test_equals_brute_force(metric, ragged, ranked_case, weighted_sum):
    for seed, (steps, size) in enumerate([(4, 4), (2, 5), (1, 1)]):
        case = ranked_case(seed, lists=2, group=2, steps=steps, size=size, ragged=ragged, channels=0)
        gains = make_gains(case, seed)
        out = all_actions_objective(*case.positional, gains, metric, **case.options)
        expected = brute_force(case, gains, metric, [steps] * len(gains))
        torch.testing.assert_close(out.objective, expected, rtol=1e-9, atol=1e-9)
        reference = ranking_logprobs(*case.positional, backend="torch", **case.options)
        torch.testing.assert_close(out.logprobs, reference.logprobs)
        torch.testing.assert_close(out.entropy, reference.entropy)
        if expected.requires_grad:
            torch.testing.assert_close(
                torch.autograd.grad(weighted_sum(*out), case.leaves),
                torch.autograd.grad(weighted_sum(expected, *reference[:2]), case.leaves),
                rtol=1e-8,
                atol=1e-9,
            )


@pytest.mark.parametrize("ragged", ["", "ranking"])
@pytest.mark.parametrize("metric", ["ndcg@3", "mrr"])
def test_tilted_utility_equals_brute_force(metric, ragged, ranked_case, weighted_sum):
    case = ranked_case(9, lists=2, group=2, steps=4, size=5, ragged=ragged, channels=0)
    gains = make_gains(case)
    for tilt in (0.05, 1.0):
        out = all_actions_objective(*case.positional, gains, metric, tilt=tilt, **case.options)
        expected = brute_force(case, gains, metric, [4] * len(gains), tilt)
        torch.testing.assert_close(out.objective, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            torch.autograd.grad(weighted_sum(out.objective), case.leaves, retain_graph=True),
            torch.autograd.grad(weighted_sum(expected), case.leaves),
            rtol=1e-8,
            atol=1e-9,
        )


def test_tilt_spans_from_the_expectation_to_the_likelihood_of_the_best(ranked_case):
    case = ranked_case(10, lists=3, steps=4, size=5, channels=0)
    gains = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]] * 3, dtype=torch.float64)  # the last candidate is best everywhere
    plain = all_actions_objective(*case.positional, gains, "ndcg", **case.options).objective
    broad = all_actions_objective(*case.positional, gains, "ndcg", tilt=1e6, **case.options).objective
    torch.testing.assert_close(broad, plain, atol=1e-5, rtol=0)
    sharp = all_actions_objective(*case.positional, gains, "ndcg@4", tilt=1e-5, **case.options).objective
    best = torch.stack([case.log_probs(n, t, remaining)[-1] for n, t, remaining in case.steps() if t == 0])
    # Only the first step: there the exchange with the best candidate is worth more than any other by far more than tau.
    gradient = torch.autograd.grad(sharp[:, 0].sum() / 1e-5, case.hidden)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(best.sum(), case.hidden)[0], atol=1e-6, rtol=1e-6)


def test_tilt_must_be_positive(ranked_case):
    case = ranked_case(11, lists=1, steps=2, size=2, channels=0)
    with pytest.raises(ValueError, match="tilt must be positive"):
        all_actions_objective(*case.positional, make_gains(case), "ndcg", tilt=0.0, **case.options)
    with pytest.raises(ValueError, match="tilt must be positive and finite, and at least 1e-10"):
        all_actions_objective(*case.positional, make_gains(case), "ndcg", tilt=1e-300, **case.options)


def test_the_sharpest_tilt_is_the_best_exchange_however_large(ranked_case):
    """Its utility is the change by that exchange, and nothing overflows on the way."""
    case = ranked_case(11, lists=2, steps=3, size=3, channels=0, dtype=torch.float32)
    gains = torch.tensor([[0.0, 5e29, 9e29], [9e29, 0.0, 5e29]])
    out = all_actions_objective(*case.positional, gains, "dcg", tilt=1e-10, **case.options)
    scores = flexrec.swap_scores(gains.double(), "dcg")
    best = torch.stack([-scores[:, t, t:].amin(-1) for t in range(3)], dim=1)
    torch.testing.assert_close(out.objective.double(), best, rtol=1e-6, atol=1e-8)  # tilt x log-prob of it


@pytest.mark.parametrize("metric", ["ndcg", "mrr"])
def test_num_ranked(metric, ranked_case):
    case = ranked_case(4, lists=4, steps=4, size=6, channels=0)
    gains = make_gains(case)
    each = torch.tensor([4, 0, 2, 3])
    out = all_actions_objective(*case.positional, gains, metric, num_ranked=each, **case.options)
    torch.testing.assert_close(out.objective, brute_force(case, gains, metric, each.tolist()))
    assert (out.objective[1] == 0).all()
    out = all_actions_objective(*case.positional, gains, metric, num_ranked=2, **case.options)
    torch.testing.assert_close(out.objective, brute_force(case, gains, metric, [2] * 4))
    assert (out.objective[:, 2:] == 0).all()


@pytest.mark.parametrize("metric", ["ndcg@3", "map"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backends_agree(metric, backend, ranked_case, weighted_sum, device):
    case = ranked_case(5, lists=2, group=2, steps=4, size=6, ragged="list", channels=0, dtype=torch.float32)
    case = case.to(torch.float32, device)
    gains = make_gains(case).float().to(device)
    got = all_actions_objective(*case.positional, gains, metric, backend=backend, **case.options)
    exact = case.to(torch.float64)
    want = all_actions_objective(*exact.positional, gains, metric, **exact.options)
    assert got.objective.dtype == torch.float32
    torch.testing.assert_close(got, want, check_dtype=False, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(weighted_sum(*got), case.leaves),
        torch.autograd.grad(weighted_sum(*want), exact.leaves),
        check_dtype=False,
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_common_offset_of_the_gains_costs_no_precision(ranked_case):
    """DCG's swap differences do not change when a constant is added to all gains, nor may their rounding."""
    case = ranked_case(6, lists=4, steps=30, size=30, channels=0, dtype=torch.float32)
    gains = torch.randint(0, 4, (4, 30), generator=torch.Generator().manual_seed(0)).float()
    small = all_actions_objective(*case.positional, gains, "dcg", **case.options).objective
    large = all_actions_objective(*case.positional, gains + 1e4, "dcg", **case.options).objective
    torch.testing.assert_close(large, small, rtol=1e-5, atol=1e-5)


def test_padding_may_hold_anything(ranked_case):
    case = ranked_case(7, lists=2, steps=5, size=5, channels=0)
    case.lengths = torch.tensor([5, 2])
    case.ranking = torch.tensor([[4, 2, 0, 1, 3], [1, 0, 9, 9, 9]])
    gains = make_gains(case) + 1
    want = all_actions_objective(*case.positional, gains, "ndcg", **case.options)
    gains[1, 2:] = torch.nan
    with torch.no_grad():
        case.hidden[1, 2:] = torch.nan
    for metric in ("ndcg", "mrr"):
        out = all_actions_objective(*case.positional, gains, metric, **case.options)
        assert all(bool(x.isfinite().all()) for x in out)
        assert all((x[1, 2:] == 0).all() for x in out)
        assert torch.autograd.grad(sum(x.sum() for x in out), case.hidden)[0].isfinite().all()
        if metric == "ndcg":
            torch.testing.assert_close(out, want)


def test_lists_without_gain_and_a_last_step_without_choice_are_exactly_zero(ranked_case):
    case = ranked_case(8, lists=2, steps=5, size=5, channels=0, dtype=torch.float32)
    gains = torch.tensor([[0.0] * 5, [3.0, 1.0, 0.0, 2.0, 1.0]])
    out = all_actions_objective(*case.positional, gains, "ndcg", **case.options)
    assert (out.objective[0] == 0).all()
    assert out.objective[1, 4] == 0
    assert out.objective[1, 0] != 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metric": "ndgc"}, ValueError, "metric must be one of"),
        ({"gains": torch.zeros(2, 4)}, ValueError, r"gains must have shape \(2, 3\), got \(2, 4\)"),
        ({"gains": -torch.ones(2, 3)}, ValueError, "gains must"),
        ({"num_ranked": 4}, ValueError, r"num_ranked must lie in \[0, T\] = \[0, 3\], got 4"),
        ({"num_ranked": torch.tensor([1, 4])}, ValueError, r"num_ranked must lie in \[0, 3\]"),
        ({"num_ranked": 1.5}, TypeError, "num_ranked must be an int"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'numba', 'torch'"),
        ({"ranking": torch.tensor([[0, 0, 1], [0, 1, 2]])}, ValueError, "at most once"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(5, 4),
        "candidates": torch.tensor([[0, 1, 2], [2, 3, 4]]),
        "ranking": torch.tensor([[0, 1, 2], [2, 1, 0]]),
        "gains": torch.ones(2, 3),
        "metric": "ndcg",
    } | change
    with pytest.raises(error, match=message):
        all_actions_objective(**arguments)


@pytest.mark.parametrize(("metric", "tilt"), [("ndcg", None), ("ndcg", 0.1), ("mrr", None)])
def test_divergence_comes_along(metric, tilt, ranked_case, weighted_sum):
    case = ranked_case(12, lists=2, group=2, steps=4, size=5, ragged="list", channels=0)
    other = ranked_case(13, lists=2, group=2, steps=4, size=5, dim=3)
    gains = make_gains(case)
    reference = {"ref_hidden": other.hidden, "ref_weight": other.weight, "ref_bias": other.bias}
    out = all_actions_objective_with_kl(*case.positional, gains, metric, tilt=tilt, **reference, **case.options)
    alone = all_actions_objective(*case.positional, gains, metric, tilt=tilt, **case.options)
    kl = ranking_kl(
        case.hidden,
        case.weight,
        other.hidden,
        other.weight,
        case.candidates,
        case.ranking,
        ref_bias=other.bias,
        **case.options,
    )
    torch.testing.assert_close(tuple(out), (*alone, kl))
    got = torch.autograd.grad(weighted_sum(*out), case.leaves)
    torch.testing.assert_close(got, torch.autograd.grad(weighted_sum(*alone, kl), case.leaves))


def test_ranks_beyond_the_cutoff_may_be_left_out():
    """What is chosen there changes nothing that the ranks before earn: without it the same objective and gradients."""
    torch.manual_seed(0)
    n, k, cutoff = 6, 7, 3
    hidden, weight = torch.randn(n, k, 5, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    candidates, ranking = torch.rand(n, 20).argsort(1)[:, :k], torch.rand(n, k).argsort(1)
    by_candidate = torch.rand(n, k)
    rest = ranking[:, cutoff:].sort(dim=1).values  # unranked candidates follow by ascending index
    found = []
    for steps, order in ((k, ranking), (cutoff, torch.cat([ranking[:, :cutoff], rest], dim=1))):
        h, w = hidden[:, :steps].clone().requires_grad_(), weight.clone().requires_grad_()
        gains = by_candidate.gather(1, order)
        objective = all_actions_objective(h, w, candidates, ranking[:, :steps], gains, f"ndcg@{cutoff}").objective
        objective.sum().backward()
        found.append((objective, h.grad, w.grad))
    (objective, of_hidden, of_weight), (short, short_hidden, short_weight) = found
    torch.testing.assert_close(objective[:, :cutoff], short)
    torch.testing.assert_close(of_hidden[:, :cutoff], short_hidden)
    torch.testing.assert_close(of_weight, short_weight)
    assert (objective[:, cutoff:] == 0).all()
    assert (of_hidden[:, cutoff:] == 0).all()
