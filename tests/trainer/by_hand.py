"""Losses of FlexRecTrainer by hand, and the small world of the tests that compare with them.

By hand means: logits of whole sequences, a softmax over what is left at every rank, and loops over ranks, in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexrec.ops.advantages import item_advantages, uncertainty_weights
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.ops.swap_rewards import swap_rewards, swap_rewards_with_variance
from flexrec.task.examples import Example
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer

GENERATIONS, TEMPERATURE = 2, 0.3
MARKER, EOS = 5, 31


def example_of(prompt: list[int], candidates: list[int], gains: list[float], variance: list[float]) -> Example:
    return Example(
        prompt=prompt,
        candidates=[[token] for token in candidates],
        gains=np.array(gains, dtype=np.float32),
        variance=np.array(variance, dtype=np.float32),
        history_span=(1, 3),
        need="interest",
        user=0,
    )


# Lists and prompts of different lengths, with gains that are known more or less surely.
EXAMPLES = [
    example_of([1, 2, 3, 4], [10, 11, 12, 13, 14], [0.1, 1.0, 0.25, 0.0, 0.5], [0.02, 0.0, 0.1, 0.01, 0.3]),
    example_of([7, 8, 9], [12, 15], [0.5, 0.9], [0.0, 0.05]),
]


def model_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # far from uniform, so that a wrong distribution shows
        model.get_output_embeddings().weight.mul_(5.0)
    return model


def trainer_of(tmp_path: Any, reference: Any = None, reasoning_end: Any = None, **options: Any) -> FlexRecTrainer:
    arguments = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "use_cpu": True,
        "num_generations": GENERATIONS,
        "temperature": TEMPERATURE,
        **options,
    }
    return FlexRecTrainer(
        model_of(), FlexRecConfig(**arguments), EXAMPLES, reference=reference, reasoning_end=reasoning_end
    )


# ------------------------------------------------------------------------------------------------------------ by hand


class ByHand(NamedTuple):
    """Of N rankings, by rank; 0 behind a row's own ranks."""

    logprobs: torch.Tensor  # (N, T)
    entropy: torch.Tensor  # (N, T)
    kl: torch.Tensor  # (N, T)
    probs: torch.Tensor  # (N, T, K) by the candidates' positions in rank order
    reasoning: torch.Tensor  # (N, R) log-probs of the reasoning's sampled tokens
    ref_reasoning: torch.Tensor  # (N, R)


def orders_of(rankings: np.ndarray, examples: list[Example] = EXAMPLES) -> list[list[int]]:
    """Candidates by position: those that were ranked, then the others in their order."""
    orders = []
    for n, ranking in enumerate(rankings):
        placed = [int(item) for item in ranking if item >= 0]
        size = len(examples[n // GENERATIONS].candidates)
        orders.append(placed + [item for item in range(size) if item not in placed])
    return orders


def by_hand(model: Any, reference: Any, rankings: np.ndarray, reasoning: Any = None) -> ByHand:
    num_rows, ranks = rankings.shape
    width = max(len(example.candidates) for example in EXAMPLES)
    of_items = [[[torch.zeros((), dtype=torch.float64)] * ranks for _ in range(num_rows)] for _ in range(3)]
    probs = torch.zeros(num_rows, ranks, width, dtype=torch.float64)
    longest = 0 if reasoning is None else int(reasoning.num_sampled.max())
    of_reasoning = [[[torch.zeros((), dtype=torch.float64)] * longest for _ in range(num_rows)] for _ in range(2)]
    for n, order in enumerate(orders_of(rankings)):
        example = EXAMPLES[n // GENERATIONS]
        said = [] if reasoning is None else reasoning.tokens[n].tolist()
        placed = order[: min(ranks, len(order))]
        tokens = example.prompt + said + [example.candidates[item][0] for item in placed]
        logits, ref_logits = (
            m(torch.tensor([tokens])).logits[0].double() / TEMPERATURE for m in (model, reference or model)
        )
        for r in range(0 if reasoning is None else int(reasoning.num_sampled[n])):
            for found, own in zip(of_reasoning, (logits, ref_logits), strict=True):
                row = own[len(example.prompt) - 1 + r].clone()
                row[EOS] = -torch.inf
                found[n][r] = row.log_softmax(0)[said[r]]
        for rank in range(len(placed)):
            left = [example.candidates[item][0] for item in order[rank:]]
            at = len(example.prompt) + len(said) - 1 + rank
            logp, ref = logits[at, left].log_softmax(0), ref_logits[at, left].log_softmax(0)
            of_items[0][n][rank] = logp[0]
            of_items[1][n][rank] = -(logp.exp() * logp).sum()
            of_items[2][n][rank] = (logp.exp() * (logp - ref)).sum()
            probs[n, rank, rank : len(order)] = logp.exp()
    stacked = [torch.stack([torch.stack(row) for row in rows]) for rows in of_items]
    more = [
        torch.stack([torch.stack(row) for row in rows]) if longest else torch.zeros(num_rows, 0)
        for rows in of_reasoning
    ]
    return ByHand(*stacked, probs, *more)


class Valued(NamedTuple):
    gains: torch.Tensor  # (N, K) float32 in rank order
    variance: torch.Tensor  # (N, K)
    lengths: torch.Tensor  # (N,)
    mask: torch.Tensor  # (N, T)


def valued(rankings: np.ndarray, examples: list[Example] = EXAMPLES) -> Valued:
    width = max(len(example.candidates) for example in examples)
    gains, variance = torch.zeros(2, len(rankings), width)
    orders = orders_of(rankings, examples)
    for n, order in enumerate(orders):
        example = examples[n // GENERATIONS]
        gains[n, : len(order)] = torch.tensor(example.gains[order])
        variance[n, : len(order)] = torch.tensor(example.variance[order])
    lengths = torch.tensor([len(order) for order in orders])
    return Valued(gains, variance, lengths, torch.arange(rankings.shape[1]) < lengths[:, None])


def spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values[mask].double().square().mean().sqrt()


def gradient(loss: torch.Tensor, model: Any) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def check_loss(loss: torch.Tensor, expected: torch.Tensor, model: Any) -> None:
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    found, wanted = gradient(loss, model), gradient(expected, model)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def all_actions_by_hand(scores: ByHand, of: Valued, metric: str, shown: int, tilt: float | None) -> torch.Tensor:
    """(N, T): what exchanging the item at a rank with one that is left would change, in the policy's expectation."""
    rows = []
    for n, size in enumerate(of.lengths.tolist()):
        row = []
        for rank in range(shown):
            if rank >= size:
                row.append(scores.logprobs.new_zeros(()))
                continue
            changes = []
            for other in range(rank, size):
                gains = of.gains[n, :size].clone()
                before = ranking_metric(gains[None].double(), metric, num_ranked=min(shown, size))
                gains[[rank, other]] = gains[[other, rank]]
                changes.append(ranking_metric(gains[None].double(), metric, num_ranked=min(shown, size)) - before)
            change = torch.cat(changes)
            probs = scores.probs[n, rank, rank:size]
            row.append((probs * change).sum() if tilt is None else tilt * (probs * (change / tilt).exp()).sum().log())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def surrogate_by_hand(
    new: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
    level: str,
) -> torch.Tensor:
    """PPO's clipped surrogate summed over the tokens that count. A sequence counts once, at its mean advantage."""
    log_ratio = (new - old).where(mask, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True)
        advantages = advantages.where(mask, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        mask = mask.any(1, keepdim=True)
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)[mask].sum()


def move(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


class Advantages(NamedTuple):
    of_items: torch.Tensor  # (N, T)
    unit: torch.Tensor | float
    certainty: torch.Tensor | float  # (N, 1) or (N, T)


def advantages_by_hand(of: Valued, scores: ByHand, metric: str, options: dict[str, Any]) -> Advantages:
    shown = of.mask.shape[1]
    common = {"credit": options["credit"], "lengths": of.lengths, "num_ranked": shown}
    if options["credit"] == "policy":
        unranked = of.gains.shape[1] - shown
        common["weights"] = torch.nn.functional.pad(scores.probs.detach(), (0, 0, 0, unranked)).float()
    rewards = swap_rewards(of.gains, metric, **common)[:, :shown]
    scale, baseline = options.get("scale", "batch"), options.get("baseline", "none")
    one_by_one = "none" if scale == "batch" else scale
    advantages = item_advantages(rewards, GENERATIONS, baseline=baseline, scale=one_by_one, item_mask=of.mask)
    unit = spread(advantages, of.mask) if scale == "batch" else 1.0
    if options["uncertainty"] == "none":
        return Advantages(advantages / unit, unit, 1.0)
    variance = swap_rewards_with_variance(of.gains, of.variance, metric, **common)[1][:, :shown]
    known = {"level": options["uncertainty"], "rewards": rewards, "item_mask": of.mask}
    weights = uncertainty_weights(variance, GENERATIONS, **known)
    return Advantages(advantages / unit * weights, unit, weights)
