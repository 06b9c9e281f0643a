"""TRL's GRPO with FlexRec, by training a tiny model: the trainer and the log-probs that it trains on."""

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from packaging.version import Version

import flexrec
import flexrec.integrations.trl as adapter
from flexrec.integrations.ranking_reward import COMPLETION_CREDITS
from flexrec.integrations.trl import FlexRecGRPOTrainer
from flexrec.rankings import RankingState

sys.path.insert(0, str(Path(__file__).parent))

from tiny_trl import (
    GAINS,
    generate,
    logged,
    make_args,
    make_model,
    make_rows,
    make_tokenizer,
    make_trainer,
    seam,
    train_and_compare,
)

# TRL and transformers warn of each other, and TRL of what is experimental.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

FUSED_HEAD = Version(trl.__version__) >= Version("1.15")  # computes log-probs from the output layer's weight
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")


def decisions_by_hand(trainer, batch):
    """For every completion of a batch the log-probs of its decisions, differentiable, and the advantages they carry."""
    rows = []
    for row, (ids, mask) in enumerate(zip(batch["completion_ids"], batch["completion_mask"], strict=True)):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        completion, candidates = ids[mask.bool()].tolist(), batch["candidates"][row]
        model, tokenizer = trainer.model, trainer.processing_class
        logprobs, _ = brute_force(model, tokenizer, prompt, completion, candidates, trainer.temperature)
        decided = logprobs != 0
        rows.append((logprobs[decided], batch["advantages"][row, : len(completion)][decided]))
    return rows


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_trains(tmp_path, loss_type):
    """Of an unmoved policy every loss has the gradient of log-probs of decisions times advantages of their items."""
    level = "sequence" if loss_type == "luspo" else "token"
    options = {"loss_type": loss_type, "importance_sampling_level": level, "temperature": 0.6}
    trainer = make_trainer(tmp_path, max_completion_length=30, **options)
    batch = generate(trainer, trainer.train_dataset.select(range(3)))
    trainer.current_gradient_accumulation_steps = 1  # what training sets
    parameters = list(trainer.model.parameters())
    found = torch.autograd.grad(trainer.compute_loss(trainer.model, batch), parameters)

    rows = decisions_by_hand(trainer, batch)
    count = sum(len(advantages) for _, advantages in rows)
    products = [(logprobs * advantages).sum() for logprobs, advantages in rows]
    if loss_type in ("grpo", "sapo"):
        products = [product / len(row[0]) for product, row in zip(products, rows, strict=True)]
    if loss_type == "luspo":  # one ratio for a completion: the mean over its decisions
        products = [logprobs.mean() * advantages.sum() for logprobs, advantages in rows]
    whole = {"dr_grpo": len(rows) * 30, "grpo": len(rows), "sapo": len(rows), "luspo": len(rows)}
    clipped = min(1.0, trainer.epsilon_high) if loss_type == "cispo" else 1.0
    expected = torch.autograd.grad(-clipped * sum(products) / whole.get(loss_type, count), parameters)
    assert count > 12
    # Early versions of TRL weigh every token's luspo by the whole completion's length: another formula.
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    by_tokens = loss_type == "luspo" and "per_token_loss * mask.sum" in source
    for name, mine, by_hand in zip(dict(trainer.model.named_parameters()), found, expected, strict=True):
        if by_tokens:
            break
        torch.testing.assert_close(mine, by_hand, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")

    moving = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 3}
    train_and_compare(make_trainer(tmp_path, **options, **moving))


@pytest.mark.parametrize("credit", COMPLETION_CREDITS)
def test_every_credit_trains(tmp_path, credit):
    """The advantage of a decision is the credit of its item in the ranking that the text says."""
    trainer = make_trainer(tmp_path, credit=credit, metric="dcg", scale="none")
    batch = generate(trainer, trainer.train_dataset.select(range(1)))
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    ranked = torch.tensor([[GAINS[0][int(label[1]) - 1] for label in text.split(" > ")] for text in texts])
    credits = flexrec.swap_rewards(ranked, "dcg", credit=credit)
    for (_, advantages), of_items in zip(decisions_by_hand(trainer, batch), credits, strict=True):
        # Of three items the first two are decided on: at "1", "2" or "3", the only tokens with an alternative.
        torch.testing.assert_close(advantages, of_items[:2])
    train_and_compare(trainer)


@pytest.mark.parametrize(
    ("metric", "num_ranked", "expected"),
    [
        ("ndcg", None, [3, 4, 5]),
        ("ndcg", 9, [3, 4, 5]),
        ("ndcg@2", None, [2, 2, 2]),
        ("ndcg@2", 4, [2, 2, 2]),
        ("mrr", 4, [3, 4, 4]),
    ],
)
def test_no_more_ranks_than_count_are_sampled(tmp_path, metric, num_ranked, expected):
    trainer = make_trainer(tmp_path, metric=metric, num_ranked=num_ranked)
    batch = generate(trainer, trainer.train_dataset.select(range(3)))
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    assert [len(text.split(" > ")) for text in texts] == np.repeat(expected, 4).tolist()


def test_rollouts_are_sampled_as_asked(tmp_path, monkeypatch):
    asked = []

    def spy(model, prompts, candidates, **options):
        asked.append((len(prompts), len(candidates), options))
        return sample(model, prompts, candidates, **options)

    sample = adapter.sample_rankings
    monkeypatch.setattr(adapter, "sample_rankings", spy)
    trainer = make_trainer(tmp_path, temperature=0.3, num_ranked=2, separator="/")
    generate(trainer, trainer.train_dataset.select(range(3)))
    slash = tuple(trainer.processing_class.encode("/"))
    spelling = {"separator": slash, "end": (2,), "num_ranked": 2}
    assert asked == [(3, 3, {"num_generations": 4, "temperature": 0.3, **spelling})]


def test_evaluation_has_a_group_size_of_its_own(tmp_path, monkeypatch):
    """Sampling, weights and advantages of an evaluation are those of groups of two, and are logged as such."""
    rows = make_rows(gain_variance=[[0.1] * len(gains) for gains in GAINS])
    trainer = make_trainer(
        tmp_path,
        rows,
        num_generations_eval=2,
        per_device_eval_batch_size=6,
        extra={"eval_dataset": rows.select(range(3))},
    )
    sizes = []

    def spy(name, size_of):
        function = getattr(adapter, name)

        def called(*args, **kwargs):
            sizes.append((name, size_of(args, kwargs)))
            return function(*args, **kwargs)

        monkeypatch.setattr(adapter, name, called)

    spy("sample_rankings", lambda args, kwargs: kwargs["num_generations"])
    spy("uncertainty_weights", lambda args, kwargs: args[1])
    spy("item_advantages", lambda args, kwargs: args[1])
    trainer.evaluate()
    assert sizes == [("sample_rankings", 2), ("uncertainty_weights", 2), ("item_advantages", 2)]
    assert logged(trainer, "eval_ndcg/valid") == [1.0]
    assert not logged(trainer, "ndcg/valid")
    sizes.clear()
    generate(trainer, rows.select(range(3)))
    assert {size for _, size in sizes} == {4}


def test_training_raises_the_metric(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=25, metric="ndcg@3", scale_rewards="none")
    trainer.train()
    curve = logged(trainer, "ndcg@3/mean")
    assert logged(trainer, "reward") == pytest.approx(curve, abs=1e-5)
    assert np.mean(curve[-5:]) > 0.9 > np.mean(curve[:5]) + 0.1
    assert set(logged(trainer, "ndcg@3/valid")) == {1.0}
    assert logged(trainer, "ndcg@3/gain@1")[-1] > logged(trainer, "ndcg@3/gain@1")[0]


@pytest.mark.parametrize("conversational", [False, True])
def test_titles_and_chats_and_evaluation(tmp_path, conversational):
    """Candidates of several tokens, one a prefix of another, under columns of other names."""
    names = [["kiwi", "fig", "fig tree"], ["a", "b", "c", "d"], ["ab", "ac", "b", "ca", "cb"]]
    prompts = ["rank", "these", "well"]
    rows = make_rows(
        prompt=[[{"role": "user", "content": prompt}] for prompt in prompts] if conversational else prompts,
        gains=None,
        names=names,
        worth=GAINS,
    )
    trainer = make_trainer(
        tmp_path,
        rows,
        candidates_column="names",
        gains_column="worth",
        num_ranked=2,
        separator="/",
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        extra={"eval_dataset": rows.select(range(4))},
    )
    train_and_compare(trainer)
    assert len(logged(trainer, "eval_reward")) == len(logged(trainer, "eval_ndcg/gain@1")) == 2
    assert set(logged(trainer, "eval_ndcg/valid")) == {1.0}
    assert set(logged(trainer, "ndcg/gain@3")) != {0.0}  # what was not ranked keeps its gain ..
    assert set(logged(trainer, "ndcg/reward@3")) == {0.0}  # .. and earns nothing


def test_lists_without_a_choice_are_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(gains=[[1.0]] * 3), max_steps=1)
    batch = generate(trainer, trainer.train_dataset.select(range(2)))
    assert batch["tool_mask"].sum() == 0
    trainer.train()
    assert logged(trainer, "loss") == [0.0]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj", "lm_head"]], ids=str)
def test_adapters_are_trained_against_their_base(tmp_path, targets):
    from peft import LoraConfig

    extra = {"peft_config": LoraConfig(target_modules=targets)}
    options = {"beta": 0.1, "max_steps": 3, "num_iterations": 2}
    if "lm_head" in targets and FUSED_HEAD:
        with pytest.raises(ValueError, match="`lm_head` is not supported"):
            make_trainer(tmp_path, extra=extra, **options)
        return
    trainer = make_trainer(tmp_path, extra=extra, **options)
    batch = generate(trainer)
    torch.testing.assert_close(batch["old_per_token_logps"], batch["ref_per_token_logps"], atol=1e-6, rtol=0)
    train_and_compare(trainer)
    assert logged(trainer, "kl")[-1] > 0
    check_against_brute_force(trainer, generate(trainer, trainer.train_dataset.select(range(3))))


def brute_force(model, tokenizer, prompt, completion, candidates, temperature, separator=" > "):
    """Log-probs and entropies of a completion's tokens, from logits of the whole sequence and a state stepped along."""
    state = RankingState([candidates], separator=tokenizer.encode(separator), end=[tokenizer.eos_token_id])
    logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    logprobs: list[torch.Tensor] = []
    entropies: list[torch.Tensor] = []
    for position, token in enumerate(completion):
        allowed, _ = state.allowed()
        of_allowed = logits[len(prompt) + position - 1, torch.from_numpy(allowed).long()].log_softmax(0)
        logprobs.append(of_allowed[list(allowed).index(token)])
        entropies.append(-(of_allowed.exp() * of_allowed).sum())
        state.advance([token])
    assert state.done().all()
    return torch.stack(logprobs), torch.stack(entropies)


def check_against_brute_force(trainer, batch):
    with torch.no_grad():
        logps, entropies = seam(trainer, batch)[:2]
        for row, ids in enumerate(batch["completion_ids"]):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            completion = ids[batch["completion_mask"][row].bool()].tolist()
            candidates, temperature = batch["candidates"][row], trainer.temperature
            model, tokenizer = trainer.model, trainer.processing_class
            expected = brute_force(model, tokenizer, prompt, completion, candidates, temperature)
            for found, wanted in zip((logps, entropies), expected, strict=True):
                np.testing.assert_allclose(found[row, : len(completion)], wanted, atol=1e-5)
                assert (found[row, len(completion) :] == 0).all()
    assert (logps[batch["tool_mask"] == 0] == 0).all()
    assert (logps[batch["tool_mask"] == 1] < 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_logprobs_are_those_over_what_the_candidates_allow(tmp_path, bias):
    model = make_model(make_tokenizer())
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    trainer = make_trainer(tmp_path, model=model, temperature=0.7, pad_to_multiple_of=8)
    check_against_brute_force(trainer, generate(trainer, trainer.train_dataset.select(range(3))))


def test_seam_has_the_shape_of_trls_own(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = generate(trainer)
    ours, theirs = seam(trainer, batch), seam(trainer, batch, trl.GRPOTrainer)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype
    assert (ours[0] - theirs[0]).abs().max() > 0.1  # the trap: their log-probs are not of what was sampled from


def test_sampler_and_trainer_share_a_distribution(tmp_path, monkeypatch):
    rollouts = []

    def spy(*args, **kwargs):
        rollouts.append(sample(*args, **kwargs))
        return rollouts[-1]

    sample = adapter.sample_rankings
    monkeypatch.setattr(adapter, "sample_rankings", spy)
    trainer = make_trainer(tmp_path, num_iterations=2, temperature=1.3)
    batch = generate(trainer)
    of_rankings = torch.from_numpy(rollouts[0].logprobs).sum(1)
    torch.testing.assert_close(batch["old_per_token_logps"].sum(1), of_rankings, atol=1e-5, rtol=0)


def test_ratios_of_an_unmoved_policy_are_1(tmp_path):
    """Old and reference log-probs and those of the loss, whose micro-batches are shuffled and padded otherwise."""
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    off_by = []

    class Spy(FlexRecGRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            logps = seam(self, inputs)[0]
            for name in ("old_per_token_logps", "ref_per_token_logps"):
                off_by.append(((logps - inputs[name]).exp() - 1).abs().max().item())
            return loss

    options = {"num_iterations": 2, "gradient_accumulation_steps": 3, "learning_rate": 0.0, "beta": 0.1}
    model = str(tmp_path / "model")
    trainer = make_trainer(tmp_path, model=model, tokenizer=tokenizer, kind=Spy, max_steps=4, **options)
    trainer.train()
    assert len(off_by) == 2 * 3 * 4
    assert max(off_by) < 1e-5
    assert max(map(abs, logged(trainer, "kl"))) < 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "ndgc"}, "ndgc"),
        ({"credit": "policy", "constrained": False}, "which free text does not have: use constrained=True"),
        ({"credit": "all_actions", "constrained": False}, "use constrained=True, or one of swap"),
        ({"credit": "all_actions", "baseline": "rank"}, "its own baseline: it takes baseline='none'"),
        ({"credit": "all_actions", "scale": "rank"}, "scale='batch' or 'none', got baseline='none', scale='rank'"),
        ({"credit": "all_actions", "top_entropy_quantile": 0.5}, "top_entropy_quantile=1.0, got 0.5"),
        ({"credit": "all_actions", "tilt": 0.0}, "tilt must be finite and at least"),
        ({"tilt": 0.1}, "tilt is of credit='all_actions', got credit='swap'"),
        ({"credit": "all_actions_corrected", "tilt": 0.1}, "it takes no tilt"),
        ({"credit": "all_actions_corrected", "num_iterations": 2}, "one update of each generation"),
        ({"credit": "all_actions_corrected", "steps_per_generation": 2}, "steps_per_generation=2 with 1 to an update"),
        ({"credit": "all_actions_corrected", "metric": "err"}, "needs a metric that is a sum over items"),
        ({"credit": "rewards"}, "credit must be one of"),
        ({"baseline": "mean"}, "baseline must be one of"),
        ({"scale": "std"}, "scale must be one of"),
        ({"uncertainty": "all"}, "uncertainty must be one of"),
        ({"baseline": "rank", "num_generations_eval": 1}, "num_generations_eval > 1"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"top_p": 0.9}, "constrained=True needs top_p=1.0, got 0.9"),
        ({"top_k": 20}, "needs top_k=0, got 20"),
        ({"min_p": 0.1}, "needs min_p=None"),
        ({"repetition_penalty": 1.1}, "needs repetition_penalty=1.0"),
        ({"generation_kwargs": {"typical_p": 0.5}}, "needs generation_kwargs=None"),
        ({"cast_lm_head_to_fp32": True}, "needs cast_lm_head_to_fp32=False"),
        ({"reasoning_end": "</think>"}, "needs reasoning_end=None"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **options)


def test_unconstrained_generation_takes_trls_options(tmp_path):
    options = {"top_p": 0.9, "top_k": 20, "generation_kwargs": {"typical_p": 0.5}, "reasoning_end": "</think>"}
    trainer = make_trainer(tmp_path, constrained=False, max_completion_length=8, **options)
    trainer.train()
    assert logged(trainer, "ndcg/missing")


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        (make_rows(gains=None), {}, ValueError, "needs a column 'gains'"),
        (make_rows(candidates=[["a", "b"]] * 3), {}, ValueError, "one number per candidate, 2, got 3"),
        (make_rows(candidates=[["a", "b", "b</s>"]] * 3), {}, ValueError, "holds the end-of-sequence token"),
        (make_rows(candidates=[["a", "b", ""]] * 3), {}, ValueError, "empty"),
        (make_rows(), {"max_completion_length": 8}, ValueError, "too short: the longest ranking of this batch has"),
        (make_rows(gain_variance=[[0.1] * len(g) for g in GAINS]), {"metric": "mrr"}, ValueError, "no reward variance"),
        (make_rows(), {"credit": "policy"}, ValueError, "name each candidate by one token, and rank with separator=''"),
        (
            make_rows(),
            {"credit": "all_actions_corrected"},
            ValueError,
            "up to 3 tokens and a separator of 3",
        ),
        (make_rows(), {"credit": "all_actions", "extra": {"reward_funcs": len}}, ValueError, "leave out reward_funcs"),
        (make_rows(), {"extra": {"tools": [len]}}, ValueError, "leave out tools="),
        (make_rows(), {"extra": {"rollout_func": len}}, ValueError, "leave out rollout_func="),
    ],
    ids=range(3, 14),
)
def test_mistakes_of_the_trainer_are_named(tmp_path, rows, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, rows, **options).train()


def test_arguments_must_be_those_of_the_trainer(tmp_path):
    with pytest.raises(TypeError, match="args must be a FlexRecGRPOConfig, got GRPOConfig"):
        FlexRecGRPOTrainer(make_model(make_tokenizer()), args=make_args(tmp_path, trl.GRPOConfig))


def test_a_completion_that_is_no_ranking_has_no_restricted_logprobs(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda prompts, *args, **kwargs: ([[3, 4]] * 48, None))
    with pytest.raises(ValueError, match=r"completion 0 is not a whole ranking of its 3 candidates.*\[3, 4\]"):
        generate(trainer)
