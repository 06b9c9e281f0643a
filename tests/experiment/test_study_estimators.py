"""The exact study of estimators: what is known of them by theory, and what it found."""

import numpy as np
import pytest
import torch

from flexrec.experiment.studies.estimators import ALL_ACTIONS, POLICIES, Enumeration, credits
from flexrec.metrics import CREDITS
from flexrec.ops.ranking_metric import ranking_metric

UNBIASED = ["all_actions_corrected", "all_actions_corrected, race", "rank", "sequence", "sequence, mean", "rank, mean"]


def enumeration(policy, strength=1.0, seed=0, size=4):
    return Enumeration(size, policy, strength, np.random.default_rng(seed))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_true_gradient_is_that_of_the_expected_metric(policy):
    """By automatic differentiation through the probabilities."""
    one = enumeration(policy)
    value = ranking_metric(one.in_rank_order(), "ndcg@3")
    expected = torch.autograd.grad(one.logprobs.sum(1).exp() @ value, one.parameters, retain_graph=True)
    found = one.true_gradient("ndcg@3")
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_noise_is_that_of_single_rankings(policy):
    one = enumeration(policy, seed=2)
    objective = one.objective("swap", "ndcg")
    each = []
    for own in objective:
        found = torch.autograd.grad(own.sum(), one.parameters, retain_graph=True)
        each.append(torch.cat([g.flatten() for g in found]))
    each = torch.stack(each)
    mean = one.probability @ each
    variance = one.probability @ (each - mean).square().sum(1)
    found = one.measures("swap", "ndcg", one.true_gradient("ndcg"))
    assert found.snr == pytest.approx(float(mean.norm() / variance.sqrt()), rel=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_has_no_bias_has_none(policy):
    one = enumeration(policy, seed=1)
    true = one.true_gradient("ndcg@3")
    for credit in UNBIASED:
        found = one.measures(credit, "ndcg@3", true)
        assert found.cosine == pytest.approx(1.0, abs=1e-9), credit
        assert found.bias == pytest.approx(0.0, abs=1e-6), credit
        assert found.sign_errors == 0, credit
        assert found.error == pytest.approx(found.noise / 8, rel=1e-6), "of the mean of 64"


def test_all_actions_have_a_bias_where_later_choices_depend_on_the_prefix():
    found = {policy: [] for policy in ("plackett-luce", "prefixes")}
    for policy, cosines in found.items():
        for seed in range(4):
            one = enumeration(policy, 2.0, seed, size=5)
            cosines.append(one.measures("all_actions", "ndcg@3", one.true_gradient("ndcg@3")).cosine)
    assert np.mean(found["prefixes"]) < 0.98
    assert np.mean(found["plackett-luce"]) > 0.99


def test_the_correction_keeps_the_signal():
    """Of one ranking: 10 times that of sequence rewards, and above all actions where every item has its logit."""
    ratios = {policy: [] for policy in ("plackett-luce", "pairs", "prefixes")}
    for policy, of_seeds in ratios.items():
        for seed in range(4):
            one = enumeration(policy, 1.0, seed)
            true = one.true_gradient("ndcg")
            names = ("all_actions_corrected", "all_actions", "sequence")
            corrected, plain, sequence = (one.measures(name, "ndcg", true).snr for name in names)
            assert corrected > 10 * sequence
            of_seeds.append(corrected / plain)
    assert np.mean(ratios["plackett-luce"]) > 1.2
    assert np.mean(ratios["pairs"]) > 0.7
    assert np.mean(ratios["prefixes"]) > 0.7


def test_an_item_of_no_gain_that_orders_the_rest_gets_the_right_sign_from_the_correction_alone():
    one = enumeration("trigger", 5.0, size=5)

    def at_the_first_rank(objective):
        return one.moments(objective)[0].view(-1, one.size)[0, 0]

    value = ranking_metric(one.in_rank_order(), "ndcg")
    assert at_the_first_rank(one.logprobs * value[:, None]) > 0
    assert at_the_first_rank(one.objective("all_actions_corrected", "ndcg")) > 0
    for credit in ("all_actions", "swap"):
        assert at_the_first_rank(one.objective(credit, "ndcg")) < 0


def test_every_credit_is_measured():
    assert set(CREDITS) | set(ALL_ACTIONS) <= set(credits())
    one = enumeration("pairs")
    true = one.true_gradient("ndcg")
    for credit in credits():
        found = one.measures(credit, "ndcg", true)
        assert np.isfinite([found.cosine, found.bias, found.snr, found.noise, found.error]).all(), credit
    mean = one.measures("sequence, mean", "ndcg", true)
    assert mean.snr > 1.5 * one.measures("sequence", "ndcg", true).snr
    assert one.measures("swap, mean and spread", "ndcg", true).cosine < one.measures("swap", "ndcg", true).cosine
