"""Every option of FlexRecTrainer at a value that is not its default: what it samples with, and its loss by hand.

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
from flexrec.trainer import flexrec as module
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


# ----------------------------------------------------------------------------------------------------------- sampling


def test_rollouts_are_asked_for_with_every_option(tmp_path, monkeypatch):
    asked = []

    def spy(*args, **kwargs):
        asked.append((args, kwargs))
        return sample(*args, **kwargs)

    sample = module.sample_rankings
    monkeypatch.setattr(module, "sample_rankings", spy)
    trainer = FlexRecTrainer(
        model_of(),
        FlexRecConfig(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            num_generations=3,
            temperature=0.3,
            num_ranked=4,
            metric="ndcg@6",
            max_reasoning_tokens=2,
            seed=9,
        ),
        EXAMPLES,
        separator=(20,),
        end=(21, 22),
        reasoning_end=[MARKER, 6],
    )
    trainer.ranking_loss(trainer.model, EXAMPLES)
    ((model, prompts, candidates), options) = asked[0]
    assert model is trainer.model
    assert prompts == [example.prompt for example in EXAMPLES]
    assert candidates == [example.candidates for example in EXAMPLES]
    generator = options.pop("generator")
    assert generator.initial_seed() == int(np.random.SeedSequence([9, 0, 0, 0]).generate_state(1)[0])
    assert options == {
        "separator": (20,),
        "end": (21, 22),
        "num_generations": 3,
        "num_ranked": 4,
        "temperature": 0.3,
        "reasoning_end": (MARKER, 6),
        "max_reasoning_tokens": 2,
    }


@pytest.mark.parametrize(
    ("num_ranked", "metric", "expected"),
    [(None, "ndcg", None), (4, "ndcg", 4), (None, "ndcg@3", 3), (4, "ndcg@3", 3), (2, "ndcg@3", 2)],
)
def test_no_more_is_ranked_than_is_asked_for_or_earns(tmp_path, num_ranked, metric, expected):
    trainer = trainer_of(tmp_path, num_ranked=num_ranked, metric=metric)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    assert trainer._kept[0].batch.shape == (4, expected or 5)


def test_the_log_probs_of_training_are_those_that_were_sampled_with(tmp_path, monkeypatch):
    rollouts = []

    def spy(*args, **kwargs):
        rollouts.append(sample(*args, **kwargs))
        return rollouts[-1]

    sample = module.sample_rankings
    monkeypatch.setattr(module, "sample_rankings", spy)
    trainer = trainer_of(tmp_path, credit="swap", num_ranked=3)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    logprobs = torch.from_numpy(rollouts[0].logprobs)
    torch.testing.assert_close(trainer._kept[0].old_logprobs, logprobs, rtol=1e-4, atol=1e-5)
    exact = by_hand(trainer.model, None, rollouts[0].rankings).logprobs
    torch.testing.assert_close(exact.float(), logprobs, rtol=1e-4, atol=1e-5)


def test_every_step_micro_batch_process_and_seed_has_noise_of_its_own(tmp_path, monkeypatch):
    examples = EXAMPLES * 4

    def draws(seed: int = 3, step: int = 5, slot: int = 2, process: int = 1) -> list[list[int]]:
        trainer = trainer_of(tmp_path, seed=seed, temperature=3.0)
        trainer.state.global_step, trainer._slot = step, slot
        monkeypatch.setattr(type(trainer.accelerator), "process_index", process)
        return trainer._rollout(examples).rankings.tolist()

    assert draws() == draws()
    found = [draws(), draws(seed=4), draws(step=6), draws(slot=3), draws(process=0), draws(step=2, slot=5)]
    for i, one in enumerate(found):
        assert one not in found[:i], "the noise of another"


def test_prompts_are_shared_by_as_many_rankings_as_costs_least(tmp_path, monkeypatch):
    """Asked with the lengths that will be there; not at all where sharing is switched off or a reference cannot."""
    asked = []

    def spy(*args, **kwargs):
        asked.append((args, kwargs))
        return 2

    monkeypatch.setattr(module, "sharing", spy)
    trainer = trainer_of(tmp_path, reasoning_end=[MARKER, 6], max_reasoning_tokens=3, num_ranked=3)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    ((model, prompts, candidates), options) = asked.pop()
    assert model is trainer.model
    assert prompts == [example.prompt for example in EXAMPLES]
    assert candidates == [example.candidates for example in EXAMPLES]
    assert options == {"separator": (), "num_ranked": 3, "num_generations": 2, "reasoning_length": 5}
    assert len(trainer._kept[0].batch.tokens.input_ids) == 2, "a row for each prompt"
    trainer = trainer_of(tmp_path, share_prompts=False)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    assert len(trainer._kept[0].batch.tokens.input_ids) == 4, "a row for each ranking"
    monkeypatch.setattr(module, "can_pack", lambda model: model is trainer.model)
    trainer = trainer_of(tmp_path, model_of(1), beta=0.1)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    assert len(trainer._kept[0].batch.tokens.input_ids) == 4
    assert asked == []


def test_metrics_without_a_variance_are_for_gains_that_are_certain(tmp_path):
    certain = [Example(**{**vars(example), "variance": 0 * example.variance}) for example in EXAMPLES]
    trainer = trainer_of(tmp_path, metric="mrr", credit="swap")
    trainer.ranking_loss(trainer.model, certain)
    assert trainer._kept[0].variance is None
    trainer = trainer_of(tmp_path, metric="mrr", credit="swap")
    with pytest.raises(ValueError, match="'mrr' has no reward variance"):
        trainer.ranking_loss(trainer.model, EXAMPLES)


# ------------------------------------------------------------------------------------------------------------- losses


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


@pytest.mark.parametrize(
    "options",
    [
        {"uncertainty": "rollout"},
        {"uncertainty": "item", "num_ranked": 3},
        {"uncertainty": "none", "num_ranked": 3, "tilt": 0.2},
        {"uncertainty": "none", "scale": "none", "metric": "dcg@4"},
    ],
    ids=str,
)
def test_the_all_actions_loss_by_hand(tmp_path, options):
    reference = model_of(1)
    entropy_coef, beta = 0.07, 0.2
    trainer = trainer_of(tmp_path, reference, entropy_coef=entropy_coef, beta=beta, **options)
    loss, metrics = trainer.ranking_loss(trainer.model, EXAMPLES)

    rankings = trainer._kept[0].batch.rankings.numpy()
    shown, metric = rankings.shape[1], options.get("metric", "ndcg")
    assert shown == options.get("num_ranked", 4 if "@4" in metric else 5)
    of, scores = valued(rankings), by_hand(trainer.model, reference, rankings)
    per_item = all_actions_by_hand(scores, of, metric, shown, options.get("tilt"))
    rewards, variance = swap_rewards_with_variance(of.gains, of.variance, metric, lengths=of.lengths, num_ranked=shown)
    if options.get("scale") != "none":
        per_item = per_item / spread(rewards[:, :shown], of.mask)
    if options["uncertainty"] != "none":
        weights = uncertainty_weights(variance[:, :shown], GENERATIONS, level=options["uncertainty"], item_mask=of.mask)
        assert weights[of.mask.any(1)].std() > 0.1
        per_item = per_item * weights
    per_item = -per_item - entropy_coef * scores.entropy + beta * scores.kl
    check_loss(loss, per_item[of.mask].mean(), trainer.model)

    value = ranking_metric(of.gains, metric, lengths=of.lengths, num_ranked=shown).mean()
    assert metrics["reward"].item() == pytest.approx(value.item(), rel=1e-5)
    assert float(metrics["entropy"]) == pytest.approx(scores.entropy[of.mask].mean().item(), rel=1e-4)
    assert float(metrics["kl"]) == pytest.approx(scores.kl[of.mask].mean().item(), rel=1e-4)


def test_all_actions_are_asked_for_with_every_option(tmp_path, monkeypatch):
    """Lists of single tokens cannot be shown beyond what is ranked; for titles it has to be said."""
    asked = []

    def spy(*args, **kwargs):
        asked.append((args, kwargs))
        return all_actions(*args, **kwargs)

    all_actions = module.all_actions
    monkeypatch.setattr(module, "all_actions", spy)
    trainer = trainer_of(tmp_path, model_of(1), beta=0.1, num_ranked=3, metric="dcg@4", tilt=0.2)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    kept = trainer._kept[0]
    (((_, batch, gains, metric), options),) = asked
    assert batch is kept.batch
    torch.testing.assert_close(gains, valued(batch.rankings.numpy()).gains)
    assert metric == "dcg@4"
    assert options.pop("reference") is kept.ref_states
    assert options == {"temperature": TEMPERATURE, "num_ranked": 3, "tilt": 0.2}


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
    weights = uncertainty_weights(variance, GENERATIONS, level=options["uncertainty"], item_mask=of.mask)
    return Advantages(advantages / unit * weights, unit, weights)


@pytest.mark.parametrize(
    "options",
    [
        {"credit": "swap", "uncertainty": "item", "num_ranked": 3},
        {"credit": "rank", "uncertainty": "rollout", "baseline": "rank", "scale": "group"},
        {"credit": "noncausal", "uncertainty": "none", "baseline": "group", "scale": "rank", "metric": "dcg"},
        {"credit": "independent", "uncertainty": "none", "scale": "none", "baseline": "group", "metric": "ndcg@3"},
        {"credit": "policy", "uncertainty": "none", "num_ranked": 3},
        {"credit": "policy", "uncertainty": "item", "scale": "none"},
        {"credit": "sequence", "uncertainty": "none", "baseline": "group", "importance_level": "sequence"},
    ],
    ids=str,
)
def test_the_policy_gradient_of_a_second_update_by_hand(tmp_path, options):
    """Ratios beyond both ends of a clip range of unequal ends, entropy, and a KL to a reference."""
    reference, low, high, entropy_coef, beta = model_of(1), 0.1, 0.25, 0.07, 0.2
    more = {"epsilon_low": low, "epsilon_high": high, "entropy_coef": entropy_coef, "beta": beta}
    trainer = trainer_of(tmp_path, reference, num_iterations=2, **more, **options)
    _, first = trainer.ranking_loss(trainer.model, EXAMPLES)
    assert float(first["ratio_mean"]) == 1
    rankings = trainer._kept[0].batch.rankings.numpy()
    old = by_hand(trainer.model, reference, rankings).logprobs.detach()
    move(trainer.model)
    trainer.state.global_step = 1
    loss, metrics = trainer.ranking_loss(trainer.model, EXAMPLES)
    np.testing.assert_array_equal(trainer._kept[0].batch.rankings, rankings)
    assert float(metrics["clip_fraction_low"]) > 0
    assert float(metrics["clip_fraction_high"]) > 0

    metric = options.get("metric", "ndcg")
    of, scores = valued(rankings), by_hand(trainer.model, reference, rankings)
    advantages = advantages_by_hand(of, scores, metric, options).of_items
    level = options.get("importance_level", "item")
    surrogate = surrogate_by_hand(scores.logprobs, old, advantages, of.mask, low, high, level)
    bonus = (beta * scores.kl - entropy_coef * scores.entropy)[of.mask]
    check_loss(loss, (bonus.sum() - surrogate) / of.mask.sum(), trainer.model)
    value = ranking_metric(of.gains, metric, lengths=of.lengths, num_ranked=rankings.shape[1]).mean()
    assert metrics["reward"].item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("uncertainty", ["none", "rollout", "item"])
@pytest.mark.parametrize("scale", ["none", "batch", "group"])
def test_reasoning_and_ranking_of_a_second_update_by_hand(tmp_path, scale, uncertainty):
    """The reasoning is trained by the metric of its ranking, against the mean of its prompt's."""
    reference, low, high, beta = model_of(1), 0.1, 0.25, 0.2
    options = {"credit": "swap", "scale": scale, "uncertainty": uncertainty}
    more = {"epsilon_low": low, "epsilon_high": high, "beta": beta, "entropy_coef": 0.0, "num_ranked": 3, "seed": 2}
    trainer = trainer_of(tmp_path, reference, [MARKER], max_reasoning_tokens=3, num_iterations=2, **more, **options)
    trainer.ranking_loss(trainer.model, EXAMPLES)
    batch = trainer._kept[0].batch
    rankings, reasoning, mask = batch.rankings.numpy(), batch.reasoning, batch.reasoning_mask
    old = by_hand(trainer.model, reference, rankings, reasoning)
    move(trainer.model)
    trainer.state.global_step = 1
    loss, metrics = trainer.ranking_loss(trainer.model, EXAMPLES)

    of, new = valued(rankings), by_hand(trainer.model, reference, rankings, reasoning)
    items = advantages_by_hand(of, new, "ndcg", options)
    value = ranking_metric(of.gains, "ndcg", lengths=of.lengths, num_ranked=3)[:, None]  # (N, 1)
    one_by_one = "none" if scale == "batch" else scale
    advantages = item_advantages(value, GENERATIONS, baseline="group", scale=one_by_one) / items.unit
    if uncertainty == "item":
        advantages = advantages * items.certainty.sum(1, keepdim=True) / of.mask.sum(1, keepdim=True)
    else:
        advantages = advantages * items.certainty
    assert (advantages.abs() > 0.01).all(), "both prompts have rankings that differ"
    of_reasoning = surrogate_by_hand(
        new.reasoning, old.reasoning.detach(), advantages.expand(mask.shape), mask, low, high, "token"
    )
    away = (new.ref_reasoning.detach() - new.reasoning)[mask]
    kl = away.exp() - away - 1  # Schulman's k3 of KL(policy || reference)
    of_items = surrogate_by_hand(new.logprobs, old.logprobs.detach(), items.of_items, of.mask, low, high, "item")
    expected = beta * (kl.sum() + new.kl[of.mask].sum()) - of_reasoning - of_items
    check_loss(loss, expected / of.mask.sum(), trainer.model)
    assert float(metrics["reasoning/kl"]) == pytest.approx(kl.mean().item(), rel=1e-4)
    assert float(metrics["reasoning/ratio_mean"]) != 1
    assert float(metrics["reasoning/length"]) == np.mean([len(row) for row in reasoning.tokens])


@pytest.mark.parametrize("credit", ["all_actions", "swap"])
def test_the_unit_of_a_batch_is_that_of_all_processes(tmp_path, monkeypatch, credit):
    """With a second process that has the same items, all worth nothing, the unit is smaller by the root of 2."""
    losses = []
    for processes in (1, 2):
        trainer = trainer_of(tmp_path, credit=credit, uncertainty="none", entropy_coef=0.0)

        def reduce(tensor: torch.Tensor, reduction: str = "sum", count: int = processes) -> torch.Tensor:
            if tensor.dim() == 1 and len(tensor) == 2:  # sum of squares, and of items
                return torch.stack([tensor[0], count * tensor[1]])
            return tensor

        monkeypatch.setattr(trainer.accelerator, "reduce", reduce)
        losses.append(gradient(trainer.ranking_loss(trainer.model, EXAMPLES)[0], trainer.model))
    torch.testing.assert_close(losses[1], 2**0.5 * losses[0], rtol=1e-4, atol=1e-6)


def test_what_the_configuration_is_by_default(tmp_path):
    """The paper's numbers where there are any; see the fields."""
    args = FlexRecConfig(output_dir=str(tmp_path), use_cpu=True)
    expected = {
        "num_generations": 1,
        "num_iterations": 1,
        "temperature": 1.0,
        "metric": "ndcg",
        "num_ranked": None,
        "max_reasoning_tokens": None,
        "credit": "all_actions",
        "tilt": None,
        "baseline": "none",
        "scale": "batch",
        "uncertainty": "rollout",
        "epsilon_low": 0.2,
        "epsilon_high": None,
        "importance_level": "item",
        "beta": 0.0,
        "share_prompts": True,
        "entropy_coef": 0.005,
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
    }
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("credit", ["all_actions", "swap"])
def test_the_loss_is_this_process_s_share_of_everybodys(tmp_path, monkeypatch, credit):
    """A mean over items is taken over everybody's: with half as many items as the mean, the loss counts half."""
    found = []
    for share in (1.0, 0.5):
        trainer = trainer_of(tmp_path, credit=credit)
        asked = []
        monkeypatch.setattr(trainer, "share", lambda count, s=share, seen=asked: seen.append(int(count)) or s)
        loss, metrics = trainer.ranking_loss(trainer.model, EXAMPLES)
        assert asked == [GENERATIONS * (5 + 2)]
        found.append([loss.item(), *(float(metrics[name]) for name in ("reward", "entropy"))])
    (loss, reward, entropy), half = found
    assert half == pytest.approx([loss / 2, reward, entropy / 2])
