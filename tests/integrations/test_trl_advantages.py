"""Advantages of items in TRL: those of FlexRecTrainer, in two processes as in one, at the right tokens of free text."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import flexrec
import flexrec.integrations.trl as adapter
import flexrec.trainer.flexrec
from flexrec.integrations.ranking_reward import COMPLETION_CREDITS
from flexrec.integrations.token_logprobs import decoded, token_item_ids
from flexrec.rankings import encode_rankings
from flexrec.rankings.text import index_labels, parse_ranking_texts
from flexrec.task.examples import Example
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer

sys.path.insert(0, str(Path(__file__).parent))

from tiny_trl import (
    GAINS,
    generate,
    logged,
    make_model,
    make_rows,
    make_tokenizer,
    make_trainer,
    process_options,
    seam,
    train_and_compare,
)

# TRL and transformers warn of each other, and TRL of what is experimental.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]


def flexrec_trainers_view(tmp_path, monkeypatch, trainer, rollout, **options):
    """FlexRecTrainer on the same model and rollouts: the advantages it gives and the gradient of its loss."""
    rows, tokenizer = trainer.train_dataset, trainer.processing_class
    examples = [
        Example(
            prompt=tokenizer(row["prompt"])["input_ids"],
            candidates=[tokenizer.encode(name) for name in row.get("candidates") or index_labels(len(row["gains"]))],
            gains=np.array(row["gains"], dtype=np.float32),
            variance=np.array(row.get("gain_variance") or np.zeros(len(row["gains"])), dtype=np.float32),
            history_span=(0, 1),
            need="interest",
            user=0,
        )
        for row in rows
    ]
    seen = []

    def spy(logprobs, old, advantages, *args, **kwargs):
        seen.append(advantages)
        return flexrec.policy_loss(logprobs, old, advantages, *args, **kwargs)

    monkeypatch.setattr(flexrec.trainer.flexrec, "policy_loss", spy)
    monkeypatch.setattr(flexrec.trainer.flexrec, "sample_rankings", lambda *args, **kwargs: rollout)
    config = FlexRecConfig(
        output_dir=str(tmp_path / "own"), num_generations=4, entropy_coef=0.0, use_cpu=True, report_to="none", **options
    )
    own = FlexRecTrainer(trainer.model, config, examples, separator=tokenizer.encode(trainer.args.separator), end=[2])
    trainer.model.zero_grad()
    own.ranking_loss(trainer.model, examples)[0].backward()
    return seen[0], gradient(trainer.model)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        *({"credit": credit} for credit in COMPLETION_CREDITS),
        {"baseline": "rank", "scale": "rank"},
        {"baseline": "group", "scale": "group", "metric": "dcg@3"},
        {"uncertainty": "item"},
        {"uncertainty": "none", "scale": "none"},
        {"metric": "err", "num_ranked": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("spelling", ["labels", "items"])
def test_advantages_and_gradient_are_those_of_flexrec_trainer(tmp_path, monkeypatch, options, spelling):
    names = [[f"<item:{i + 4 * p}>" for i in range(len(gains))] for p, gains in enumerate(GAINS)]
    rows = make_rows(
        size=3,
        candidates=names if spelling == "items" else None,
        gain_variance=[[0.1 * i / (p + 1) for i in range(len(gains))] for p, gains in enumerate(GAINS)],
    )
    rollouts = []

    def spy(*args, **kwargs):
        rollouts.append(sample(*args, **kwargs))
        return rollouts[-1]

    sample = adapter.sample_rankings
    monkeypatch.setattr(adapter, "sample_rankings", spy)
    separator = "" if spelling == "items" else " > "
    tokenizer = make_tokenizer(items=16)
    trainer = make_trainer(
        tmp_path,
        rows,
        tokenizer=tokenizer,
        model=make_model(tokenizer, tied=spelling == "items"),
        separator=separator,
        per_device_train_batch_size=12,
        loss_type="dapo",
        **options,
    )
    batch = generate(trainer)
    trainer.current_gradient_accumulation_steps = 1  # what training sets
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    found = gradient(trainer.model)

    advantages, expected = flexrec_trainers_view(
        tmp_path, monkeypatch, trainer, rollouts[0], **{"credit": "swap", "uncertainty": "rollout", **options}
    )
    encoded = encode_rankings(
        batch["candidates"],
        rollouts[0].rankings,
        separator=trainer.processing_class.encode(separator),
        end=[2],
        num_ranked=(rollouts[0].rankings >= 0).sum(axis=1),
    )
    by_token = torch.zeros_like(batch["advantages"])
    rows_, positions, ranks = encoded.decision_rows, encoded.decision_positions, encoded.decision_ranks
    by_token[rows_, positions] = advantages[rows_, ranks]
    torch.testing.assert_close(batch["advantages"], by_token, atol=1e-6, rtol=1e-6)
    assert (by_token != 0).any()
    assert batch["num_items_in_batch"] == batch["tool_mask"].sum() == len(encoded.targets)
    # TRL's mean is over decisions, FlexRecTrainer's over items.
    num_items = (rollouts[0].rankings >= 0).sum()
    torch.testing.assert_close(found * len(encoded.targets), expected * num_items, atol=2e-5, rtol=1e-4)


def test_other_reward_functions_are_added(tmp_path):
    def first_label(completions, **kwargs):
        return [float(text[1]) for text in completions]

    batches = []
    for reward_funcs in (None, [first_label]):
        trainer = make_trainer(tmp_path, extra={"reward_funcs": reward_funcs})
        torch.manual_seed(1)
        batches.append(generate(trainer, trainer.train_dataset.select(range(3))))
    alone, both = batches
    assert torch.equal(alone["completion_ids"], both["completion_ids"])
    texts = trainer.processing_class.batch_decode(both["completion_ids"], skip_special_tokens=True)
    labels = torch.tensor(first_label(texts)).view(3, 4)
    of_sequences = (labels - labels.mean(1, keepdim=True)) / (labels.std(1, keepdim=True) + 1e-4)
    added = both["advantages"] - alone["advantages"]
    torch.testing.assert_close(added, of_sequences.view(12, 1).expand_as(added), atol=1e-5, rtol=0)
    assert (added != 0).any()


def unconstrained(tmp_path, texts, **options):
    """A trainer whose completions are these texts, in this order, and the batch that it makes of them."""
    tokenizer = make_tokenizer()

    def rollout_func(prompts, trainer):
        ids = [tokenizer.encode(text) for text in texts]
        return {"prompt_ids": [[5, 6]] * len(texts), "completion_ids": ids, "logprobs": None}

    options = {"constrained": False, "extra": {"rollout_func": rollout_func}, **options}
    trainer = make_trainer(tmp_path, tokenizer=tokenizer, per_device_train_batch_size=len(texts), **options)
    return trainer, generate(trainer, trainer.train_dataset.select(range(len(texts) // 4)))


def test_unconstrained_completions_are_rewarded_where_they_name_items(tmp_path):
    spans = {  # the rank that each character's item has
        "<think>[1]</think>[3] > [1] > [2]</s>": "..................000...111...222.",
        "<think></think>so [2] and [2]": "..................000........",  # what it left out has no tokens
        "<think>[1] > [2] > [3]</s>": "",  # no end of the reasoning
        "<think></think>[1] > [3] > [2]</s>": "...............000...111...222.",
    }
    trainer, batch = unconstrained(
        tmp_path, list(spans), reasoning_end="</think>", scale="none", shuffle_dataset=False, max_steps=1
    )
    gains = torch.tensor([[0.5, 1.0, 0.0], [0.0, 1.0, 0.5], [1.0, 0.0, 0.5], [1.0, 0.5, 0.0]])
    rewards = flexrec.swap_rewards(gains, "ndcg", num_ranked=torch.tensor([3, 1, 0, 3]))
    expected = torch.zeros_like(batch["advantages"])
    for row, span in enumerate(spans.values()):
        for column, rank in enumerate(span):
            if rank != ".":
                expected[row, column] = rewards[row, int(rank)]
    torch.testing.assert_close(batch["advantages"], expected)
    assert "tool_mask" not in batch
    assert "candidates" not in batch
    assert torch.equal(seam(trainer, batch)[0], seam(trainer, batch, trl.GRPOTrainer)[0])
    train_and_compare(trainer)
    assert logged(trainer, "ndcg/valid") == [0.5]


def test_free_text_is_read_as_asked(tmp_path):
    """Another separator, two ranks, and no statistic of an item that a text left out."""
    texts = {"[3]/[1]</s>": "000.111.", "[2]</s>": "000.", "[1]/[2]</s>": "000.111.", "[2] > [1]</s>": "000...111."}
    options = {"separator": "/", "num_ranked": 2, "baseline": "group", "shuffle_dataset": False, "max_steps": 1}
    trainer, batch = unconstrained(tmp_path, list(texts), **options)
    ranked = torch.tensor([[0.5, 1.0, 0.0], [0.0, 1.0, 0.5], [1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    named = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]]).bool()
    rewards = flexrec.swap_rewards(ranked, "ndcg", num_ranked=named.sum(1))
    advantages = flexrec.item_advantages(rewards, 4, baseline="group", item_mask=named)
    for found, expected, ranks in zip(batch["advantages"], advantages, texts.values(), strict=True):
        of_tokens = torch.tensor([0.0 if rank == "." else expected[int(rank)] for rank in ranks])
        torch.testing.assert_close(found[: len(ranks)], of_tokens)
    trainer.train()
    assert logged(trainer, "ndcg/valid") == [0.5]


def test_masked_completions_have_no_items(tmp_path):
    texts = ["[3] > [1] > [2]</s>", "[3] > [1] > [2]", "[2] > [1] > [3]</s>", ""]
    _, batch = unconstrained(tmp_path, [text or "</s>" for text in texts], mask_truncated_completions=True)
    assert (batch["advantages"] != 0).any(dim=1).tolist() == [True, False, True, False]


def test_tokens_of_free_text_find_their_items():
    """Tokens that join an item to the space before it, and characters that are several tokens."""
    merges = [("\u0120", ">"), ("\u0120", "[")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    names = ["\u00e9\U0001f352", "[1]", "[2]"]
    tokens = {  # of two bytes, then of four
        "[2] > [1]": (["[", "2", "]", " >", " [", "1", "]"], [0, 0, 0, -1, 1, 1, 1]),
        "[1] > \u00e9\U0001f352": (["[", "1", "]", " >", " ", *["\ufffd"] * 6], [0, 0, 0, -1, -1, *[1] * 6]),
        "": ([], []),
    }
    for text, (pieces, ranks) in tokens.items():
        ids = fast.encode(text)
        assert [decoded(fast, [i]) for i in ids] == pieces
        parsed = parse_ranking_texts([text], [names], separator=" > ")
        assert token_item_ids(fast, [ids], parsed.item_ids)[0].tolist() == ranks


def test_a_group_that_spans_processes_has_the_advantages_of_one(tmp_path, monkeypatch):
    """Two processes of six rollouts train on groups of four, their longest lists of different lengths."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).with_name("tiny_trl.py")), str(tmp_path)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (first, learnt, log), (second, also_learnt, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(learnt, also_learnt)
    assert max(map(len, first[0][1])) < max(map(len, second[0][1]))

    rows, options = process_options()
    trainer = make_trainer(tmp_path, rows, per_device_train_batch_size=12, **options)
    by_prompt = {row["prompt"]: row for row in rows}
    for step, ((prompts, completions, advantages, count), other) in enumerate(zip(first, second, strict=True)):
        prompts, completions, advantages = prompts + other[0], completions + other[1], advantages + other[2]
        assert [prompts.index(prompt) for prompt in prompts] == [0] * 4 + [4] * 4 + [8] * 4
        monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, ids=completions, **kwargs: (ids, None))
        trainer.model.train()
        batch = trainer._generate_and_score_completions([by_prompt[prompt] for prompt in prompts])
        for mine, theirs in zip(batch["advantages"], advantages, strict=True):
            np.testing.assert_allclose(mine[: len(theirs)], theirs, atol=1e-6)
        assert batch["num_items_in_batch"] == count == other[3]
        metrics = trainer._metrics["train"]
        assert metrics["ndcg/mean"][-1] == pytest.approx(log[step]["ndcg/mean"], rel=1e-5)
