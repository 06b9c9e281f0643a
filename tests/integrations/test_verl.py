"""What FlexRec registers with verl, on plain tensors: item rewards survive the trip through verl's signatures.

The same against the installed package is in test_verl_package.py.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

import flexrec
from flexrec.integrations import responses
from flexrec.integrations.responses import score_responses, score_texts
from flexrec.integrations.token_logprobs import token_item_ids
from flexrec.integrations.verl import (
    compute_score,
    item_advantage_estimator,
    item_policy_loss,
    pack_token_rewards,
    unpack_token_rewards,
)
from flexrec.rankings.text import item_values_to_tokens

EXAMPLE = Path(__file__).parents[2] / "examples" / "verl"


def make_batch(prompts=3, generations=4, items=5, seed=0, gap=True):
    """Rewards (N, K), spans (N, L) of items of 1 to 3 tokens, with tokens of no item around them, and who has how many.

    Some rewards are exactly 0 and some equal their neighbour's; some responses name fewer items.
    """
    rng = np.random.default_rng(seed)
    rows = prompts * generations
    rewards = torch.from_numpy(rng.choice([0.0, 0.25, -0.5, 1.0, 0.125], (rows, items))).float()
    counts = rng.integers(1, items + 1, rows)
    spans = []
    for count in counts:
        span = [-1, -1] if gap else []
        for item in range(count):
            span += [item] * int(rng.integers(1, 4))
            if gap and rng.random() < 0.7:
                span.append(-1)
        spans.append([*span, -1])
    width = max(map(len, spans)) + 2
    item_ids = torch.tensor([span + [-1] * (width - len(span)) for span in spans])
    response_mask = torch.tensor([[1] * len(span) + [0] * (width - len(span)) for span in spans])
    named = torch.arange(items) < torch.from_numpy(counts)[:, None]
    index = np.repeat([f"uid-{p}" for p in range(prompts)], generations).astype(object)
    return rewards * named, item_ids, response_mask, named, index


def as_verl(rewards, item_ids, response_mask, variance=None):
    """Padding of a response is 0 in verl."""
    return pack_token_rewards(rewards, item_ids, variance) * response_mask


@pytest.mark.parametrize("gap", [True, False])
def test_rewards_and_items_come_back_as_they_went(gap):
    rewards, item_ids, response_mask, named, _ = make_batch(gap=gap)
    variance = torch.rand(rewards.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    token_rewards = as_verl(rewards, item_ids, response_mask, variance)
    found = unpack_token_rewards(token_rewards, response_mask)
    torch.testing.assert_close(found.rewards, rewards, rtol=0, atol=0)
    torch.testing.assert_close(found.item_mask, named)
    torch.testing.assert_close(found.item_ids, item_ids)
    torch.testing.assert_close(found.variance, (variance * named).sum(1))
    torch.testing.assert_close(token_rewards.sum(1), rewards.sum(1))  # what verl logs as the reward


def test_rewards_stand_at_the_last_token_of_an_item():
    item_ids = torch.tensor([[-1, 0, 0, 1, -1, 2, 2, -1]])
    token_rewards = pack_token_rewards(torch.tensor([[0.5, 0.0, -0.25]]), item_ids)
    assert token_rewards[0, [2, 6]].tolist() == [0.5, -0.25]
    rest = token_rewards[0, [0, 1, 3, 4, 5, 7]]
    assert rest.abs().min() > 0
    assert rest.abs().max() < 1e-15


def test_variance_is_kept_to_the_last_bit_or_refused():
    item_ids = torch.tensor([[0, -1]])
    for value in (0.0, 1e-9, 0.3, 1e6):
        packed = pack_token_rewards(torch.ones(1, 1), item_ids, torch.tensor([[value]]))
        assert unpack_token_rewards(packed, torch.ones(1, 2)).variance.item() == torch.tensor(value).item()
    for value in (2.0**31, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"sum to at most 2\^30"):
            pack_token_rewards(torch.ones(1, 1), item_ids, torch.tensor([[value]]))
    with pytest.raises(ValueError, match="no token to carry the variance"):
        pack_token_rewards(torch.ones(1, 1), item_ids[:, :1], torch.tensor([[0.1]]))


@pytest.mark.parametrize(
    "options",
    [{}, {"baseline": "rank", "scale": "rank"}, {"baseline": "group", "scale": "group"}, {"scale": "none"}],
)
@pytest.mark.parametrize("sure", [True, False])
def test_advantages_are_those_of_item_advantages(options, sure):
    rewards, item_ids, response_mask, named, index = make_batch()
    variance = torch.rand(rewards.shape, generator=torch.Generator().manual_seed(1))
    weights = None
    if not sure:
        total = (variance * named).sum(1, keepdim=True)
        weights = flexrec.uncertainty_weights(total, 4, rewards=(rewards * named).norm(dim=1, keepdim=True))
    expected = flexrec.item_advantages(rewards, 4, item_mask=named, weights=weights, **options)
    token_rewards = as_verl(rewards, item_ids, response_mask, None if sure else variance)
    advantages, returns = item_advantage_estimator(token_rewards, response_mask, {"flexrec": options}, index)
    torch.testing.assert_close(advantages, item_values_to_tokens(expected, item_ids), rtol=3e-7, atol=1e-30)
    torch.testing.assert_close(returns, advantages)
    assert (advantages[item_ids < 0] == 0).all()


def test_a_group_without_any_reward_leaves_the_others_as_they_are():
    """One prompt's responses name nothing: advantage 0 at all of their tokens, whatever the statistics are over."""
    rewards, item_ids, response_mask, _, index = make_batch()
    empty = slice(4, 8)
    item_ids[empty] = -1
    rewards[empty] = 0
    others = np.r_[0:4, 8:12]
    token_rewards = as_verl(rewards, item_ids, response_mask)
    for options in ({}, {"baseline": "rank", "scale": "rank"}, {"baseline": "group", "scale": "group"}):
        advantages, _ = item_advantage_estimator(token_rewards, response_mask, {"flexrec": options}, index)
        alone, _ = item_advantage_estimator(
            token_rewards[others], response_mask[others], {"flexrec": options}, index[others]
        )
        assert (advantages[empty] == 0).all()
        assert torch.equal(advantages[others], alone)
        assert (alone != 0).any()


@pytest.mark.parametrize("say", ["I cannot rank these.", "[1] > [2] > [3]", ""])
@pytest.mark.parametrize("gains", [[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]], ids=str)
def test_equal_rewards_leave_the_gradient_to_the_divergence(say, gains):
    """All of a batch earns the same: with a KL term the gradient is the KL's to the last bit, and never NaN."""
    tokenizer = byte_tokenizer()
    responses = [tokenizer.encode(say + "!")] * 4
    scored = score_responses(tokenizer, responses, [{"gains": gains}] * 4)
    assert torch.isfinite(scored.completions.metric).all()
    token_rewards = pack_token_rewards(scored.completions.item_rewards, scored.item_ids)
    mask = torch.ones_like(scored.item_ids)
    index = np.array(["a", "a", "b", "b"], dtype=object)
    for options in ({}, {"baseline": "rank", "scale": "rank"}, {"baseline": "group", "scale": "group"}):
        advantages, _ = item_advantage_estimator(token_rewards, mask, {"flexrec": options}, index)
        assert advantages.abs().max() < 1e-30  # marks of items, no more
        generator = torch.Generator().manual_seed(0)
        old, reference = (-torch.rand(mask.shape, generator=generator) for _ in range(2))
        grads = []
        for with_policy in (True, False):
            log_prob = (old + 0.1).requires_grad_()
            loss = 0.01 * ((reference - log_prob).exp() - (reference - log_prob) - 1).mean()
            if with_policy:
                loss = loss + item_policy_loss(old, log_prob, advantages, mask)[0]
            loss.backward()
            grads.append(log_prob.grad)
        assert torch.equal(*grads)
        assert (grads[0] != 0).all()


def test_uncertainty_can_be_switched_off():
    rewards, item_ids, response_mask, named, index = make_batch()
    unsure = as_verl(rewards, item_ids, response_mask, torch.rand(rewards.shape))
    off = {"flexrec": {"uncertainty": "none"}}
    expected = flexrec.item_advantages(rewards, 4, item_mask=named)
    advantages, _ = item_advantage_estimator(unsure, response_mask, off, index)
    torch.testing.assert_close(advantages, item_values_to_tokens(expected, item_ids), rtol=3e-7, atol=1e-30)


@pytest.mark.parametrize("seed", range(4))
def test_groups_may_be_shuffled_and_of_different_sizes(seed):
    """As after a filter, or with verl's padding rows: every group gets what it gets alone."""
    rewards, item_ids, response_mask, named, _ = make_batch(prompts=1, generations=7)
    sizes = {"a": 4, "b": 2, "c": 1}
    index = np.array([uid for uid, size in sizes.items() for _ in range(size)], dtype=object)
    options = {"baseline": "group", "scale": "group"}
    expected, start = [], 0
    for size in sizes.values():
        rows = slice(start, start + size)
        expected.append(flexrec.item_advantages(rewards[rows], size, item_mask=named[rows], **options))
        start += size
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    token_rewards = as_verl(rewards, item_ids, response_mask)
    advantages, _ = item_advantage_estimator(
        token_rewards[order], response_mask[order], {"flexrec": options}, index[order.numpy()]
    )
    per_token = item_values_to_tokens(torch.cat(expected), item_ids)
    torch.testing.assert_close(advantages, per_token[order], rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_count_change_nothing():
    """verl fills a batch up with rows whose rewards and mask are 0."""
    rewards, item_ids, response_mask, _, index = make_batch()
    token_rewards = as_verl(rewards, item_ids, response_mask)
    alone, _ = item_advantage_estimator(token_rewards, response_mask, None, index)
    filled, _ = item_advantage_estimator(
        torch.cat([token_rewards, torch.zeros(6, token_rewards.shape[1])]),
        torch.cat([response_mask, torch.zeros(6, response_mask.shape[1], dtype=torch.long)]),
        None,
        np.append(index, ["pad"] * 6),
    )
    torch.testing.assert_close(filled[:12], alone, rtol=0, atol=0)
    assert (filled[12:] == 0).all()


def test_items_that_were_masked_out_enter_no_statistic():
    """verl's rejection of off-policy responses sets their mask to 0 before advantages are computed."""
    rewards, item_ids, response_mask, named, index = make_batch(prompts=1)
    token_rewards = as_verl(rewards, item_ids, response_mask)
    left = response_mask.clone()
    left[1] = 0
    advantages, _ = item_advantage_estimator(token_rewards, left, None, index)
    kept = named & (torch.arange(4) != 1)[:, None]
    expected = item_values_to_tokens(flexrec.item_advantages(rewards, 4, item_mask=kept), item_ids)
    torch.testing.assert_close(advantages, expected, rtol=3e-7, atol=1e-30)
    assert (advantages[left == 0] == 0).all()


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"use_kl_in_reward": True}, {}, "use_kl_in_reward must be False"),
        ({"flexrec": {"base": "rank"}}, {}, r"no keys but .*, got \['base'\]"),
        ({"flexrec": {"uncertainty": "item"}}, {}, "'rollout' or 'none', got 'item'"),
        ({"flexrec": {"baseline": "mean"}}, {}, "baseline must be one of"),
        (None, {"index": None}, "index must be the uid"),
    ],
)
def test_mistakes_in_the_configuration_are_named(config, change, message):
    rewards, item_ids, response_mask, _, index = make_batch()
    arguments = {"token_level_rewards": as_verl(rewards, item_ids, response_mask), "index": index, **change}
    with pytest.raises(ValueError, match=message):
        item_advantage_estimator(response_mask=response_mask, config=config, **arguments)


def test_rewards_of_another_agent_loop_are_refused():
    """verl's own put one number at the last token: reading it as an item would be wrong and look right."""
    _, _, response_mask, _, index = make_batch()
    rewards = torch.zeros(response_mask.shape)
    rewards[torch.arange(12), response_mask.sum(1) - 1] = 1.0
    with pytest.raises(ValueError, match="default_agent_loop=flexrec"):
        item_advantage_estimator(rewards, response_mask, None, index)


def loss_inputs(seed=0):
    rewards, item_ids, response_mask, _, index = make_batch(gap=False)
    advantages, _ = item_advantage_estimator(as_verl(rewards, item_ids, response_mask), response_mask, None, index)
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(item_ids.shape, generator=generator)
    new = (old + 0.3 * torch.randn(item_ids.shape, generator=generator)).requires_grad_()
    return rewards, item_ids, response_mask, advantages, old, new


def test_loss_is_that_of_the_true_items():
    """Items follow each other without a gap, with equal and with zero advantages: none is merged with another."""
    _, item_ids, response_mask, advantages, old, new = loss_inputs()
    options = {"epsilon_low": 0.1, "epsilon_high": 0.3, "loss_agg": "sum", "advantage_level": "token"}
    expected, metrics = flexrec.policy_loss(new, old, advantages, response_mask, item_ids=item_ids, **options)
    (gradient,) = torch.autograd.grad(expected, new)
    loss, logged = item_policy_loss(old, new, advantages, response_mask, clip_ratio_low=0.1, clip_ratio_high=0.3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], gradient)
    clipped = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    assert logged["actor/pg_clipfrac"] == pytest.approx(clipped.item())
    assert logged["actor/ppo_kl"] == pytest.approx(metrics["approx_kl"].item())
    assert clipped > 0


def test_loss_weighs_tokens_by_the_rollout_correction():
    _, _, response_mask, advantages, old, new = loss_inputs()
    plain, _ = item_policy_loss(old, new, advantages, response_mask)
    half, _ = item_policy_loss(old, new, advantages, response_mask, rollout_is_weights=torch.full(old.shape, 0.5))
    torch.testing.assert_close(half, plain / 2)


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_nothing_loops_over_responses():
    """As many tensor operations for 12 responses as for 300."""
    counts = []
    for prompts in (3, 75):
        rewards, item_ids, response_mask, _, index = make_batch(prompts=prompts)
        token_rewards = as_verl(rewards, item_ids, response_mask, torch.rand(rewards.shape))
        with CountOperations() as operations:
            advantages, _ = item_advantage_estimator(token_rewards, response_mask, None, index)
            item_policy_loss(-advantages.abs(), -advantages.abs(), advantages, response_mask)
        counts.append(operations.count)
    assert counts[0] == counts[1]


def byte_tokenizer(merges=(), extra=()):
    """Tokens are bytes and a few joined ones, as in Qwen's tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges), *extra])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return wrapped


def test_every_token_of_a_name_is_its_items():
    """Also bytes that are parts of a character, and a token that joins the end of a name with what follows."""
    tokenizer = byte_tokenizer(merges=[("e", "Ċ")])  # "e\n" is one token
    truth = {"gains": [1.0, 0.0], "candidates": ["Amélie", "Alien"]}
    ids = [*tokenizer.encode("Amélie\nAlien"), tokenizer.eos_token_id, tokenizer.pad_token_id]
    scored = score_responses(tokenizer, [ids, ids[:3]], [truth, json.dumps(truth)], separator="\n")
    assert scored.completions.parsed.valid.tolist() == [True, False]
    assert scored.item_ids.tolist() == [[0] * 7 + [1] * 5 + [-1] * 2, [-1] * 14]
    assert scored.completions.parsed.missing.tolist() == [0, 2]


def test_two_items_in_one_token_are_an_error():
    tokenizer = byte_tokenizer(merges=[("a", "b")])
    truth = {"gains": [1.0, 0.0], "candidates": ["a", "b"]}
    with pytest.raises(ValueError, match=r"responses\[0\] names 2 items in 1 runs of tokens"):
        score_responses(tokenizer, [tokenizer.encode("ab")], [truth], separator="")


def test_a_token_that_joins_two_items_is_the_firsts():
    tokenizer = byte_tokenizer(merges=[("a", "b")])
    of_characters = np.array([[0, 1, 1]], dtype=np.int32)
    assert token_item_ids(tokenizer, [tokenizer.encode("abc")], of_characters).tolist() == [[0, 1]]


def test_empty_responses_name_nothing():
    tokenizer = byte_tokenizer()
    for ids in ([], [tokenizer.eos_token_id]):
        scored = score_responses(tokenizer, [ids], [{"gains": [1.0, 0.0]}])
        assert scored.item_ids.tolist() == [[-1] * len(ids)]


def test_compute_score_is_the_metric_of_the_text():
    gains = [0.0, 0.25, 1.0]
    for ground_truth in ({"gains": gains}, json.dumps({"gains": gains, "candidates": None})):
        score = compute_score("flexrec", "[3] > [1] > [2]", ground_truth, {"index": 0}, metric="ndcg@2")
        value = flexrec.ranking_metric(torch.tensor([[1.0, 0.0, 0.25]]), "ndcg@2").item()
        counts = {"valid": 1.0, "repeated": 0.0, "missing": 0.0, "unknown": 0.0}
        assert score == {"score": pytest.approx(value), "acc": pytest.approx(value), **counts}
    score = compute_score("flexrec", "<think>[1]</think>[3] > [3]", {"gains": gains}, reasoning_end="</think>")
    assert (score["valid"], score["repeated"], score["missing"]) == (0.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("ground_truth", "error", "message"),
    [
        ("gains", ValueError, "must be JSON, got 'gains'"),
        ("[1.0]", TypeError, "got list"),
        ({"candidates": ["a"]}, ValueError, "must have 'gains'"),
        ({"gains": [1.0], "titles": ["a"]}, ValueError, r"got \['gains', 'titles'\]"),
        ({"gains": [1.0], "candidates": ["a", "b"]}, ValueError, r"gains\[0\] must have one number per candidate, 2"),
    ],
)
def test_mistakes_in_the_ground_truth_are_named(ground_truth, error, message):
    with pytest.raises(error, match=message):
        compute_score("flexrec", "[1]", ground_truth)


def test_unknown_options_are_an_error():
    with pytest.raises(TypeError, match="metrics"):
        compute_score("flexrec", "[1]", {"gains": [1.0]}, metrics="ndcg")
    with pytest.raises(ValueError, match="one ground truth per text, 2, got 1"):
        score_texts(["[1]", "[1]"], [{"gains": [1.0]}])


def test_every_option_of_a_score_arrives(monkeypatch):
    asked = []
    monkeypatch.setattr(responses, "score_completions", lambda *args, **kwargs: asked.append((args, kwargs)))
    truths = [{"gains": [1.0, 0.0, 0.5], "candidates": ["a", "b", "c"]}, json.dumps({"gains": [0.0, 1.0]})]
    options = {"metric": "dcg@2", "credit": "independent", "separator": "|"}
    score_texts(["a|b", "[1]"], truths, **options, num_ranked=2, reasoning_end="</think>", invalid="repair")
    names, gains = [["a", "b", "c"], ["[1]", "[2]"]], [[1.0, 0.0, 0.5], [0.0, 1.0]]
    passed = {"credit": "independent", "variance": None, "separator": "|", "num_ranked": 2}
    passed |= {"after": "</think>", "invalid": "repair"}
    assert asked == [((["a|b", "[1]"], names, gains, "dcg@2"), passed)]


def test_no_more_is_ranked_than_there_is():
    assert score_texts(["[1] > [2]"], [{"gains": [1.0, 0.0]}], num_ranked=5).parsed.valid.tolist() == [True]


def test_variance_may_be_known_for_some_lists_only():
    sure, unsure = {"gains": [1.0, 0.0]}, {"gains": [1.0, 0.0], "gain_variance": [0.5, 0.5]}
    scored = score_texts(["[1] > [2]"] * 2, [sure, unsure])
    assert scored.variance[0].tolist() == [0.0, 0.0]
    assert scored.variance[1, 0] > 0
    assert score_texts(["[1] > [2]"], [sure]).variance is None


def test_cluster_script_says_what_ray_and_verl_are_to_do(tmp_path):
    """With stand-ins for both that print how they were called."""
    (tmp_path / "train.parquet").touch()
    for name in ("ray", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" RAY_ADDRESS=$RAY_ADDRESS\n')
        (tmp_path / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHON", "PORT")}
    environment |= {"PATH": f"{tmp_path}:{environment['PATH']}", "LISTS": str(tmp_path), "NODES": "2", "GPUS": "8"}

    def called(*arguments, code=0):
        command = [EXAMPLE / "ray_cluster.sh", *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert ran.returncode == code, ran.stderr
        return ran.stdout + ran.stderr

    assert called("head") == "ray start --head --port 6379 RAY_ADDRESS=\n"
    assert called("worker", "10.0.0.1") == "ray start --address 10.0.0.1:6379 RAY_ADDRESS=\n"
    assert called("stop") == "ray stop RAY_ADDRESS=\n"
    assert "the address of the first machine" in called("worker", code=1)
    assert "ray_cluster.sh head" in called(code=2)
    train = called("train", "data.train_batch_size=64")
    assert train.startswith(f"python -m verl.trainer.main_ppo --config-path {EXAMPLE} --config-name qwen2_5_3b ")
    assert train.endswith(
        "trainer.nnodes=2 trainer.n_gpus_per_node=8 data.train_batch_size=64 RAY_ADDRESS=127.0.0.1:6379\n"
    )


def test_the_agent_loop_keeps_what_scores_and_leaves_the_rest_to_verl(monkeypatch):
    """With classes in place of verl's, which tests/integrations/test_verl_package.py has."""

    class Loop:
        def __init__(self, *args, **kwargs):
            self.given, self.tokenizer = (args, kwargs), kwargs["tokenizer"]

    package = "verl.experimental.agent_loop"
    for name in ("verl", "verl.experimental", package):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, of in (("agent_loop.AgentLoopOutput", object), ("single_turn_agent_loop.SingleTurnAgentLoop", Loop)):
        module, _, made = name.partition(".")
        monkeypatch.setitem(sys.modules, f"{package}.{module}", ModuleType(module))
        setattr(sys.modules[f"{package}.{module}"], made, of)
    file = Path(flexrec.integrations.__file__).with_name("verl_agent_loop.py")
    loop_class = runpy.run_path(str(file))["RankingAgentLoop"]  # no module that other tests would find
    options = {"metric": "ndcg@5", "credit": "swap", "separator": ",", "num_ranked": 2, "reasoning_end": "#"}
    loop = loop_class("first", tokenizer="a tokenizer", processor=None, **options, invalid="repair")
    assert loop.given == (("first",), {"tokenizer": "a tokenizer", "processor": None})
    assert loop.score.args == ("a tokenizer",)
    assert loop.score.keywords == {**options, "invalid": "repair"}
