"""Off-policy values of rankings: unbiased by full enumeration, those of Open Bandit Pipeline, intervals over users."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from flexrec import relative_change
from flexrec.data import simulate
from flexrec.evaluation import off_policy_value, score_rankings
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.task import PromptBuilder, RankingTask, TrainingExamples, get_need

sys.path.insert(0, str(Path(__file__).parent))

import obp_reference


def plackett_luce(scores, rankings):
    """(N, T) log-probs of each rank given those before it."""
    found = np.zeros(rankings.shape)
    for n, ranking in enumerate(rankings):
        left = np.ones(len(scores), dtype=bool)
        for t, item in enumerate(ranking):
            found[n, t] = scores[item] - np.log(np.exp(scores[left]).sum())
            left[item] = False
    return found


def every_ranking(k, ranks, seed=0):
    """All rankings of k items with both policies' log-probs, an item's worth, and a guess for each prefix."""
    rng = np.random.default_rng(seed)
    rankings = np.array(list(itertools.permutations(range(k), ranks)))
    ours, theirs = (plackett_luce(rng.normal(size=k), rankings) for _ in range(2))
    return rankings, ours, theirs, rng


@pytest.mark.parametrize("weights", ["cascade", "ranking"])
@pytest.mark.parametrize(("k", "ranks"), [(2, 1), (3, 3), (4, 2), (4, 4)])
def test_ips_and_dr_are_unbiased_by_full_enumeration(k, ranks, weights):
    rankings, ours, theirs, rng = every_ranking(k, ranks)
    rewards = rng.random(rankings.shape)
    if weights == "cascade":  # of what was shown down to the rank, not of what stands below
        worth = rng.random((k, k, k))
        rewards = np.stack([worth[rankings[:, 0], rankings[:, t], t] for t in range(ranks)], axis=1)
    guess = rng.random((k, ranks))
    predicted = guess[rankings, np.arange(ranks)]
    expected = np.zeros(rankings.shape)  # of one's own choice at the rank, given the ranks before
    for n, ranking in enumerate(rankings):
        for t in range(ranks):
            prefix = (rankings[:, :t] == ranking[:t]).all(1)
            steps = {r[t]: np.exp(o[t]) for r, o in zip(rankings[prefix], ours[prefix], strict=True)}
            expected[n, t] = sum(p * guess[item, t] for item, p in steps.items())
    truth = (np.exp(ours.sum(1)) * rewards.sum(1)).sum()
    for estimator, more in (("ips", {}), ("dr", {"predicted": predicted, "expected": expected})):
        found = off_policy_value(ours, theirs, rewards, estimator=estimator, weights=weights, **more)
        mean = (np.exp(theirs.sum(1)) * found.per_list).sum()  # over what the logging policy shows
        assert mean == pytest.approx(truth, rel=1e-12)


def test_a_good_guess_takes_the_variance_away():
    rankings, ours, theirs, _ = every_ranking(4, 4)
    worth = np.array([0.1, 0.9, 0.4, 0.2])
    rewards = worth[rankings]
    probs = np.exp(ours)
    expected = np.zeros(rankings.shape)
    for n, ranking in enumerate(rankings):
        for t in range(4):
            prefix = (rankings[:, :t] == ranking[:t]).all(1)
            expected[n, t] = sum(
                {r[t]: p[t] * worth[r[t]] for r, p in zip(rankings[prefix], probs[prefix], strict=True)}.values()
            )
    ips = off_policy_value(ours, theirs, rewards, estimator="ips")
    dr = off_policy_value(ours, theirs, rewards, estimator="dr", predicted=rewards, expected=expected)
    assert np.ptp(dr.per_list) < np.ptp(ips.per_list)


def test_the_log_of_the_policy_itself_is_its_mean():
    _, ours, _, rng = every_ranking(3, 3)
    rewards = rng.random(ours.shape)
    for estimator in ("ips", "snips"):
        found = off_policy_value(ours, ours, rewards, estimator=estimator)
        assert found.value == pytest.approx(rewards.sum(1).mean())
        assert found.effective_size == pytest.approx(len(ours))
        assert (found.mean_weight, found.largest_weight, found.clipped) == pytest.approx((1.0, 1.0, 0.0))


# --- Open Bandit Pipeline ---------------------------------------------------------------------------------------------


def ours_of(given):
    """Our estimates of obp's problem, by the names of its own."""
    given = {name: np.asarray(values) for name, values in given.items()}
    ours, theirs = (np.log(given[name]) for name in ("ours", "theirs"))  # probabilities down to each rank
    ours, theirs = (np.diff(x, axis=1, prepend=0.0) for x in (ours, theirs))
    predicted = np.take_along_axis(given["guess"], given["action"][..., None].astype(int), axis=2)[..., 0]
    robust = {"predicted": predicted, "expected": (given["dist"] * given["guess"]).sum(2)}
    found = {}
    for name in ("ips, ranking", "snips, ranking", "ips, cascade", "snips, cascade", "dr, cascade"):
        estimator, weights = name.split(", ")
        more = robust if estimator == "dr" else {}
        found[name] = off_policy_value(
            ours, theirs, given["reward"], estimator=estimator, weights=weights, **more
        ).value
    return found


def test_the_values_that_obp_recorded():
    recorded = json.loads(obp_reference.FILE.read_text(encoding="utf-8"))
    assert ours_of(recorded["problem"]) == pytest.approx(recorded["obp"], rel=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [1, 2])
def test_the_values_of_obp_itself(seed):
    if importlib.util.find_spec("obp") is None:
        pytest.skip("needs obp 0.5.7: see tests/evaluation/obp_reference.py")
    problem = obp_reference.problem(seed)
    assert ours_of(problem) == pytest.approx(obp_reference.by_obp(problem), rel=1e-9)


# --- intervals, clipping, faults --------------------------------------------------------------------------------------


def drawn(size, seed, lists_per_user=1):
    """A log of random rankings of four items, and what another policy says of them."""
    rng = np.random.default_rng(seed)
    rankings, ours, theirs, _ = every_ranking(4, 2)
    probs = np.exp(theirs.sum(1))
    rows = rng.choice(len(rankings), size=size, p=probs / probs.sum())
    taste = np.repeat(rng.random((size // lists_per_user, 4)), lists_per_user, axis=0)
    rewards = np.take_along_axis(taste, rankings[rows], axis=1) * np.array([1.0, 0.6])
    return ours[rows], theirs[rows], rewards, np.arange(size) // lists_per_user


@pytest.mark.parametrize("estimator", ["ips", "snips"])
def test_intervals_hold_the_true_value_as_often_as_they_say(estimator):
    ours = every_ranking(4, 2)[1]
    probs = np.exp(ours.sum(1))
    truth = (probs * 0.5 * (1.0 + 0.6)).sum() / probs.sum()  # tastes have mean a half
    held = []
    for seed in range(60):
        policy, logging, rewards, users = drawn(240, seed, lists_per_user=3)
        found = off_policy_value(
            policy, logging, rewards, estimator=estimator, users=users, level=0.9, num_samples=200, seed=seed
        )
        held.append(found.low < truth < found.high)
    assert 0.8 <= np.mean(held) <= 0.99


@pytest.mark.parametrize("estimator", ["ips", "snips"])
def test_intervals_are_over_users(estimator):
    policy, logging, rewards, _ = drawn(50, 0)
    repeated = [np.repeat(x, 8, axis=0) for x in (policy, logging, rewards)]
    users = np.repeat(np.arange(50), 8)
    alone = off_policy_value(policy, logging, rewards, estimator=estimator)
    together = off_policy_value(*repeated, estimator=estimator, users=users)
    apart = off_policy_value(*repeated, estimator=estimator)
    assert together.value == pytest.approx(alone.value)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert apart.high - apart.low < 0.6 * (together.high - together.low)
    one = off_policy_value(policy, logging, rewards, estimator=estimator, users=np.zeros(50))
    assert np.isnan([one.low, one.high]).all()


def test_two_policies_are_compared_on_one_log():
    policy, logging, rewards, users = drawn(400, 1)
    new = off_policy_value(policy, logging, rewards, estimator="ips").per_list
    base = off_policy_value(logging, logging, rewards, estimator="ips").per_list
    change = relative_change(new, base, clusters=users)
    assert change.mean_base == pytest.approx(rewards.sum(1).mean())


def test_clipping_bounds_weights_and_values():
    policy, logging, rewards, _ = drawn(100, 2)
    free = off_policy_value(policy, logging, rewards, estimator="ips")
    held = off_policy_value(policy, logging, rewards, estimator="ips", clip=1.5)
    assert held.largest_weight == 1.5 < free.largest_weight
    assert held.value < free.value
    assert 0 < held.clipped < 1
    assert held.effective_size > free.effective_size


def test_whole_rankings_and_a_policy_that_never_would():
    policy, logging, rewards, _ = drawn(30, 3)
    by_rank = off_policy_value(policy, logging, rewards, estimator="ips", weights="ranking")
    whole = off_policy_value(policy.sum(1), logging.sum(1), rewards.sum(1), estimator="ips", weights="ranking")
    assert whole.value == pytest.approx(by_rank.value)
    policy[:5, 1] = -np.inf
    found = off_policy_value(policy, logging, rewards, estimator="ips", weights="ranking")
    assert (found.per_list[:5] == 0).all()


ONE = np.full((2, 2), -0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "dm"}, "estimator"),
        ({"weights": "item"}, "weights"),
        ({"logprobs": ONE[:1]}, r"logprobs \(1, 2\) and logging_logprobs \(2, 2\)"),
        ({"logprobs": -ONE}, "logprobs must be log-probs, at most 0, got 0.5"),
        ({"logprobs": np.full((2, 2), np.nan)}, "at most 0, got nan"),
        ({"logging_logprobs": np.full((2, 2), -np.inf)}, "logging_logprobs must be finite"),
        ({"rewards": np.ones((2, 3))}, r"rewards must have shape \(2, 2\)"),
        ({"rewards": np.full((2, 2), np.inf)}, "rewards must be finite"),
        ({"rewards": np.ones(2)}, "take weights='ranking'"),
        ({"estimator": "dr"}, "needs predicted and expected"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"users": np.ones(3)}, "users must have shape"),
        ({"logprobs": np.full((2, 2), -np.inf)}, "all weights are 0"),
        ({"logprobs": 0 * ONE, "logging_logprobs": 900 * ONE}, "give clip="),
        ({"logprobs": ONE[:0], "logging_logprobs": ONE[:0], "rewards": ONE[:0]}, "N and T of at least 1"),
        ({"level": 1.0}, "level"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    given = {"logprobs": ONE, "logging_logprobs": ONE, "rewards": np.ones((2, 2)), "estimator": "ips"} | changes
    with pytest.raises(ValueError, match=message):
        off_policy_value(**given)


# --- what a model says of a log ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    data = simulate(num_users=20, num_items=80, num_topics=4, num_test_users=2, num_candidates=4)
    need = get_need("interest")
    tokenizer = build_tokenizer(data.catalogue, need.wordings)
    task = RankingTask(data.catalogue, [need], PromptBuilder(tokenizer, encoding="item_token"))
    examples = TrainingExamples(task, data.train)
    torch.manual_seed(0)
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model, examples, task.builder


def test_a_models_log_probs_and_expectations_add_up_over_every_ranking(world):
    model, examples, builder = world
    rankings = np.array(list(itertools.permutations(range(4), 2)))
    some = [examples[0]] * len(rankings)
    scores = score_rankings(
        model, some, rankings, separator=builder.separator, end=builder.end, batch_size=5, temperature=0.7
    )
    assert np.exp(scores.logprobs.sum(1)).sum() == pytest.approx(1.0, abs=1e-5)
    gains = examples[0].gains
    np.testing.assert_allclose(scores.predicted, gains[rankings])
    first = {r[0]: np.exp(p[0]) for r, p in zip(rankings, scores.logprobs, strict=True)}
    np.testing.assert_allclose(scores.expected[:, 0], sum(p * gains[i] for i, p in first.items()), rtol=1e-4)
    for i in range(4):
        rows = rankings[:, 0] == i
        second = sum(np.exp(p) * gains[j] for j, p in zip(rankings[rows, 1], scores.logprobs[rows, 1], strict=True))
        np.testing.assert_allclose(scores.expected[rows, 1], second, rtol=1e-4)


def test_shorter_rankings_and_lists_of_other_sizes(world):
    model, examples, builder = world
    rankings = np.array([[2, 0, 1], [3, -1, -1]])
    ends = {"separator": builder.separator, "end": builder.end}
    both = score_rankings(model, [examples[0], examples[1]], rankings, **ends)
    alone = score_rankings(model, [examples[1]], rankings[1:, :1], **ends)
    assert (both.logprobs[1, 1:] == 0).all()
    np.testing.assert_allclose(both.logprobs[1, 0], alone.logprobs[0, 0], rtol=1e-4)
    np.testing.assert_allclose(both.expected[1, 0], alone.expected[0, 0], rtol=1e-4)
    with pytest.raises(ValueError, match="one for each example"):
        score_rankings(model, [examples[0]], rankings)


def test_a_model_in_training_is_scored_without_its_dropout(world):
    _, examples, builder = world
    config = GPT2Config(vocab_size=len(builder.tokenizer), n_embd=16, n_layer=1, n_head=2, embd_pdrop=0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    rankings, ends = np.array([[2, 0, 1]] * 4), {"separator": builder.separator, "end": builder.end}
    scores = score_rankings(model, [examples[0]] * 4, rankings, **ends)
    assert model.training
    np.testing.assert_allclose(scores.logprobs, scores.logprobs[[0] * 4], atol=1e-5)
    expected = score_rankings(model.eval(), [examples[0]] * 4, rankings, **ends)
    np.testing.assert_allclose(scores.logprobs, expected.logprobs, atol=1e-5)


def test_dr_says_where_a_weight_on_the_way_is_no_number():
    """Those of whole rankings are finite, but the guess of each rank is weighted by the ranks before it."""
    ours, theirs = np.array([[0.0, -800.0]]), np.array([[-800.0, 0.0]])
    half = np.full((1, 2), 0.5)
    options = {"weights": "ranking", "predicted": half, "expected": half}
    with pytest.raises(ValueError, match="too large for a number"):
        off_policy_value(ours, theirs, half, estimator="dr", **options)
    assert np.isfinite(off_policy_value(ours, theirs, half, estimator="dr", clip=10.0, **options).value)
    assert off_policy_value(ours, theirs, half, estimator="ips", weights="ranking").value == 1.0
