"""The trainer, on ``transformers.Trainer``: reinforcement with a reward for every ranked item.

It owns the order of things in a step (sample, score, reward, loss) and nothing else: devices, distribution,
checkpoints, schedules, PEFT and trackers are those of transformers, the arithmetic is in the functions of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from flexrec.checks import option
from flexrec.decoding.one_pass import draw_from_states
from flexrec.decoding.sample import Rollout, sample_rankings
from flexrec.metrics import parse_metric
from flexrec.ops.advantages import item_advantages, uncertainty_weights
from flexrec.ops.losses import policy_loss
from flexrec.ops.rank_order import rank_order
from flexrec.ops.ranking_logprobs import ranking_probs
from flexrec.policy.batch import RankingBatch
from flexrec.policy.distributed import place_reference
from flexrec.policy.lora import causal_lm, has_adapters, keep_reference, reference_policy
from flexrec.policy.packing import sharing
from flexrec.policy.places import are_places
from flexrec.policy.scores import (
    ActionScores,
    RankingStates,
    all_actions,
    all_actions_of_scores,
    completed_rankings,
    output_rows,
    ranking_scores,
    ranking_states,
    reasoning_logprobs,
)
from flexrec.profiling import span
from flexrec.rankings.reasoning import never_tokens, reasoning_rule
from flexrec.task.examples import Example, prompts_and_candidates
from flexrec.trainer.base import EpochOrder, LossAndMetrics, RankingTrainer, pad_rows
from flexrec.trainer.logged import importance_weights, logged_rankings
from flexrec.trainer.options import CORRECTED, OF_ALL_ACTIONS, TrainerOptions
from flexrec.trainer.rewards import (
    Part,
    gains_of,
    have_variance,
    parts_of,
    rewards_of,
    scores_of,
    shuffled,
    spread_of,
    values_of,
)

RANKS_TOLD = 10  # in the log; all further ones would be long lines that say little


@dataclass
class FlexRecConfig(TrainerOptions, TrainingArguments):
    """Arguments of :class:`FlexRecTrainer`: those of transformers and :class:`TrainerOptions`.

    ``per_device_train_batch_size`` counts prompts; each gives ``num_generations`` rankings.

    Example:
        >>> from flexrec.trainer import FlexRecConfig
        >>> args = FlexRecConfig(output_dir="out", metric="ndcg@10", num_generations=8, credit="swap", use_cpu=True)
        >>> args.scale, args.uncertainty
        ('batch', 'none')
    """

    max_reasoning_tokens: int | None = option(
        None, "reason before the ranking, in so many tokens at most; default: do not", low=0
    )
    logged_clip: float | None = option(
        None,
        "train on the rankings that examples were logged with, whose importance weights are at most this; default: "
        "sample rankings",
        above=0,
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Examples carry no columns to remove."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "A batch is whole, or it is not trained on."})

    def __post_init__(self) -> None:
        TrainingArguments.__post_init__(self)
        TrainerOptions.__post_init__(self)
        if self.logged_clip is None:
            return
        for name, allowed in (("num_generations", 1), ("max_reasoning_tokens", None), ("mode", "decode")):
            if getattr(self, name) != allowed:
                raise ValueError(f"logged_clip trains on one logged ranking of each example: leave out {name}")
        if self.credit in OF_ALL_ACTIONS or self.baseline != "none":
            raise ValueError(
                f"logged_clip weighs what was shown, and compares no rollouts: take credit='swap' or another of single "
                f"rankings, and baseline='none', got credit={self.credit!r}, baseline={self.baseline!r}"
            )


class _Sampled(NamedTuple):
    """A batch of rankings, kept for as many updates as are made with it."""

    batch: RankingBatch
    gains: torch.Tensor  # (N, K) in rank order
    variance: torch.Tensor | None  # (N, K); None where no gain of the batch, on any process, is uncertain
    parts: list[Part]  # which rankings are valued by which metric
    old_logprobs: torch.Tensor | None  # (N, T); None before the first update
    ref_states: RankingStates | None
    old_reasoning: torch.Tensor | None = None  # (N, R) log-probs; None before the first update
    logged: torch.Tensor | None = None  # (N, T) log-probs under the policy that had shown the rankings


class FlexRecTrainer(RankingTrainer):
    """Reinforcement of rankings with credit for every ranked item (arXiv 2603.11901, and the all-actions gradient).

    A step samples ``num_generations`` rankings of each prompt under the constraint of its candidates, values every
    placed item (``credit``), and follows the gradient of the clipped surrogate, or of the all-actions objective.

    Args:
        reference: a frozen model for the KL penalty; needed with ``beta`` > 0, except by a model of PEFT. That one is
            its own reference, as the policy that the trainer is given: :func:`flexrec.policy.lora.keep_reference`.
        reasoning_end: token ids of the marker between reasoning and ranking, where ``max_reasoning_tokens`` asks for
            reasoning. It is trained by the metric of the ranking that it leads to, against the mean of its prompt's:
            with ``num_generations`` = 1 there is nothing to compare with, and no gradient through it.
        num_tokens: the tokenizer's size, beyond which many embeddings are padded: reasoning has no token from there.
            Default: that of ``processing_class``, where it is given.

    Example:
        >>> from flexrec.data import simulate
        >>> from flexrec.policy.small_model import build_model, build_tokenizer
        >>> from flexrec.task import PromptBuilder, RankingTask, TrainingExamples, get_need
        >>> from flexrec.trainer import FlexRecConfig, FlexRecTrainer
        >>> data = simulate(num_users=8, num_items=80, num_topics=4, num_test_users=2, num_candidates=6)
        >>> need = get_need("interest")
        >>> tokenizer = build_tokenizer(data.catalogue, need.wordings)
        >>> task = RankingTask(data.catalogue, [need], PromptBuilder(tokenizer, encoding="item_token"))
        >>> examples = TrainingExamples(task, data.train)
        >>> model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
        >>> args = FlexRecConfig(output_dir="out", max_steps=1, num_generations=4, save_strategy="no", report_to="none")
        >>> FlexRecTrainer(model, args, examples).train().global_step
        {'...
        1
    """

    args: FlexRecConfig

    def __init__(
        self,
        model: Any,
        args: FlexRecConfig,
        train_dataset: Dataset,
        *,
        reference: Any | None = None,
        reasoning_end: Sequence[int] | None = None,
        num_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        if num_tokens is None and (tokenizer := kwargs.get("processing_class")) is not None:
            num_tokens = len(getattr(tokenizer, "tokenizer", tokenizer))
        self._num_tokens = num_tokens
        never = () if reasoning_end is None else never_tokens(causal_lm(model), num_tokens)
        self.reasoning = reasoning_rule(reasoning_end, args.max_reasoning_tokens, never)
        if self.reasoning is not None and args.mode == "one-pass":
            raise ValueError("mode='one-pass' decides behind the prompt: leave out max_reasoning_tokens")
        own_reference = args.beta > 0 and reference is None
        if own_reference and not has_adapters(model):
            raise ValueError(
                f"beta={args.beta} weighs the KL to a reference model: give one as reference=, or train a PEFT model"
            )
        super().__init__(model, args, train_dataset, one_pass=args.mode == "one-pass", **kwargs)
        if own_reference:
            keep_reference(model)
        needs_reference = reference is not None and args.beta > 0
        self.reference = place_reference(reference, self.accelerator) if needs_reference else None
        cutoff = parse_metric(args.metric).cutoff
        limits = [limit for limit in (args.num_ranked, cutoff) if limit is not None]
        self._num_ranked = min(limits) if limits else None
        self._kept: dict[int, _Sampled] = {}

    def ranking_loss(self, model: Any, examples: list[Example]) -> LossAndMetrics:
        args = self.args
        slot = self._slot
        states = None
        if self.state.global_step % args.num_iterations == 0 or slot not in self._kept:
            self._kept[slot], states = self._sample(model, examples)
        batch, gains, variance, parts, old_logprobs, ref_states, _, logged = self._kept[slot]

        shown = batch.shape[1]
        item_mask = torch.arange(shown, device=gains.device) < batch.lengths[:, None]  # (N, T)
        if states is None:
            states = ranking_states(model, batch)
        weights = None
        with span("rewards"):
            rewards, reward_variance = self._rewards(states, batch, gains, variance, parts)  # (N, T) both
            if args.uncertainty != "none" and reward_variance is not None:
                weighed = have_variance(parts, rewards)[:, None]  # (N, 1)
                weights = uncertainty_weights(
                    reward_variance,
                    args.num_generations,
                    level=args.uncertainty,
                    rewards=rewards,
                    item_mask=item_mask & weighed,
                    reduce=self.accelerator.reduce,
                )
                if args.shuffle_weights:
                    weights = shuffled(weights, np.random.default_rng(self._randomness().spawn(2)[1]))
                weights = torch.where(weighed, weights, 1.0)

        metrics: Mapping[str, float | torch.Tensor]
        if args.credit in OF_ALL_ACTIONS:
            options: dict[str, Any] = {"temperature": args.temperature, "tilt": args.tilt, "reference": ref_states}
            corrected = args.credit == CORRECTED
            if any(part.topics is not None for part in parts):
                if corrected:
                    raise ValueError(f"credit={CORRECTED!r} is of metrics that are sums over items, not of topics")
                with span("rewards"):
                    scores = scores_of(parts, gains, batch.lengths, shown)
                result = all_actions_of_scores(states, batch, scores, **options)
            else:
                if corrected:
                    options["foresight"] = "auto"
                result = all_actions(states, batch, gains, args.metric, num_ranked=shown, **options)
            unit = self._spread(rewards, item_mask) if args.scale == "batch" else 1.0
            loss, metrics = self._all_actions_loss(result, unit, item_mask, weights)
        else:
            logprobs, entropy, kl = ranking_scores(states, batch, temperature=args.temperature, reference=ref_states)
            if old_logprobs is None or logged is not None:  # where weights are those of the log, none is left to clip
                old_logprobs = logprobs.detach()
                self._kept[slot] = self._kept[slot]._replace(old_logprobs=old_logprobs)
            with span("rewards"):
                advantages = item_advantages(
                    rewards,
                    args.num_generations,
                    baseline=args.baseline,
                    scale="none" if args.scale == "batch" else args.scale,
                    item_mask=item_mask,
                )
                unit = self._spread(advantages, item_mask) if args.scale == "batch" else 1.0
                advantages = advantages / unit
                if weights is not None:
                    advantages = advantages * weights
                if logged is not None:
                    assert args.logged_clip is not None
                    of_log, of_logs = importance_weights(
                        logprobs, logged, item_mask, args.importance_level, args.logged_clip
                    )
                    advantages = advantages * of_log
            loss, metrics = policy_loss(
                logprobs,
                old_logprobs,
                advantages,
                item_mask,
                epsilon_low=args.epsilon_low,
                epsilon_high=args.epsilon_high,
                importance_level=args.importance_level,
                beta=args.beta,
                kl=kl,
                entropy=entropy,
                entropy_coef=args.entropy_coef,
            )
            if logged is not None:
                metrics = {**metrics, **of_logs}
        value = values_of(parts, gains, batch.lengths, shown)  # (N,)
        if batch.reasoning is not None:
            of_reasoning, more = self._reasoning_loss(slot, states, value, unit, weights)
            loss, metrics = loss + of_reasoning / item_mask.sum(), {**metrics, **more}
        share = self.share(item_mask.sum())
        told: dict[str, float | torch.Tensor] = {
            "reward": value.mean(),
            **{name: share * v for name, v in metrics.items()},
        }
        told |= self._by_rank(rewards, item_mask)
        if weights is not None:
            told |= spread_of(self._everybodys(weights.expand_as(item_mask)[item_mask]))  # a rollout has one
        return loss * share, told

    def _sample(self, model: Any, examples: list[Example]) -> tuple[_Sampled, RankingStates | None]:
        """Rankings to learn from, and their states where sampling them has found these out already."""
        args = self.args
        states = reasoning = logged = None
        if args.logged_clip is None and (self.one_pass or are_places(prompts_and_candidates(examples)[1])):
            batch, states = self._in_one_pass(model, examples)
        else:
            if args.logged_clip is None:
                rollout = self._rollout(examples)
                rankings, reasoning = rollout.rankings, rollout.reasoning
            else:
                rankings, said = logged_rankings(examples, self._num_ranked)
                logged = torch.from_numpy(said).to(args.device)
            with span("bookkeeping"):
                per_row = self._rankings_per_row(examples)
                batch = self._batch(examples, rankings, args.num_generations, per_row, reasoning)
        order = rank_order(batch.rankings, batch.lengths, max(len(example.gains) for example in examples))

        def in_rank_order(rows: list[np.ndarray]) -> torch.Tensor:
            by_candidate = torch.as_tensor(pad_rows(rows, 0.0), dtype=torch.float32, device=args.device)
            return by_candidate.repeat_interleave(args.num_generations, dim=0).gather(1, order)

        rng = np.random.default_rng(self._randomness().spawn(1)[0]) if args.sample_gains else None
        variance = in_rank_order([example.variance for example in examples])
        uncertain = self.accelerator.reduce((variance > 0).any().float()) > 0
        sampled = _Sampled(
            batch,
            in_rank_order(gains_of(examples, pessimism=args.pessimism, rng=rng)),
            variance if uncertain else None,
            parts_of(examples, args.metric, order, args.num_generations),
            None,
            self._reference_states(batch) if args.beta > 0 else None,
            logged=logged,
        )
        return sampled, states

    def _in_one_pass(self, model: Any, examples: Sequence[Example]) -> tuple[RankingBatch, RankingStates]:
        """Rankings that one pass over the prompts decides, which is that of their update as well."""
        with span("bookkeeping"):
            whole = [np.arange(len(example.gains)) for example in examples]
            batch = self._batch(examples, pad_rows(whole, -1))
        return draw_from_states(
            ranking_states(model, batch),
            batch,
            num_generations=self.args.num_generations,
            num_ranked=self._num_ranked,
            temperature=self.args.temperature,
            generator=self._noise(),
        )

    def _rollout(self, examples: Sequence[Example]) -> Rollout:
        with self.whole_model() as model:
            return sample_rankings(
                model,
                *prompts_and_candidates(examples),
                separator=self.separator,
                end=self.end,
                num_generations=self.args.num_generations,
                num_ranked=self._num_ranked,
                temperature=self.args.temperature,
                reasoning_end=None if self.reasoning is None else self.reasoning.end,
                max_reasoning_tokens=self.args.max_reasoning_tokens,
                num_tokens=self._num_tokens if self.reasoning else None,
                generator=self._noise(),
            )

    def _noise(self) -> torch.Generator:
        seed = int(self._randomness().generate_state(1)[0])
        return torch.Generator(self.args.device).manual_seed(seed)

    def _reference_states(self, batch: RankingBatch) -> RankingStates:
        if self.reference is not None:
            with torch.no_grad():
                return ranking_states(self.reference, batch)
        model = self.accelerator.unwrap_model(self.model)
        with reference_policy(model):
            return ranking_states(model, batch)

    def _rankings_per_row(self, examples: Sequence[Example]) -> int:
        """How many rankings of a prompt share its row: what costs least, if the models can attend so."""
        if not self.args.share_prompts:
            return 1

        def best_for(model: Any) -> int:
            return sharing(
                model,
                *prompts_and_candidates(examples),
                separator=self.separator,
                num_ranked=self._num_ranked,
                num_generations=self.args.num_generations,
                reasoning_length=0 if self.reasoning is None else self.reasoning.max_length,
            )

        return 1 if self.reference is not None and best_for(self.reference) == 1 else best_for(self.model)

    def _rewards(
        self,
        states: RankingStates,
        batch: RankingBatch,
        gains: torch.Tensor,
        variance: torch.Tensor | None,
        parts: list[Part],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, T) rewards of the ranked items and, where some gain is uncertain, the rewards' variance."""
        args = self.args
        # The all-actions objective is scaled and weighted by the rewards of the swaps it averages.
        credit = "swap" if args.credit in OF_ALL_ACTIONS else args.credit
        ranks, weights = batch.shape[1], None
        if credit == "policy":
            if batch.candidate_ids is None:
                raise ValueError("credit='policy' needs the probability of whole items: use encoding 'item_token'")
            with torch.no_grad():
                rows = output_rows(states, batch)
                probs = ranking_probs(  # (N, T, K)
                    states.hidden,
                    rows.weight,
                    rows.candidates,
                    completed_rankings(batch),
                    bias=rows.bias,
                    temperature=args.temperature,
                    lengths=batch.lengths,
                )
            unranked = gains.shape[1] - ranks
            weights = torch.nn.functional.pad(probs, (0, 0, 0, unranked))  # (N, K, K)
        known = None if args.uncertainty == "none" else variance
        rewards, spread = rewards_of(parts, gains, known, credit, weights, batch.lengths, ranks)
        return rewards[:, :ranks], None if spread is None else spread[:, :ranks]

    def _all_actions_loss(
        self,
        result: ActionScores,
        unit: torch.Tensor | float,
        item_mask: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> LossAndMetrics:
        """Minus the mean objective over the ranked items, in units of the batch's item rewards."""
        args = self.args
        objective = result.objective / unit
        if weights is not None:
            objective = objective * weights
        per_item = -objective - args.entropy_coef * result.entropy
        metrics = {"entropy": result.entropy.detach()[item_mask].mean().item()}
        if result.kl is not None:
            per_item = per_item + args.beta * result.kl
            metrics["kl"] = result.kl.detach()[item_mask].mean().item()
        return per_item[item_mask].mean(), metrics

    def _reasoning_loss(
        self,
        slot: int,
        states: RankingStates,
        value: torch.Tensor,
        unit: torch.Tensor | float,
        weights: torch.Tensor | None,
    ) -> LossAndMetrics:
        """Summed over the tokens of the reasoning: each has the advantage of the ranking it led to, whose metric is
        ``value`` (N,), against the mean of its prompt's, in the unit of the items' advantages."""
        args, kept = self.args, self._kept[slot]
        batch, temperature = kept.batch, self.args.temperature
        assert batch.reasoning is not None
        logprobs = reasoning_logprobs(states, batch, temperature=temperature)  # (N, R)
        old = logprobs.detach() if kept.old_reasoning is None else kept.old_reasoning
        self._kept[slot] = kept._replace(old_reasoning=old)
        reference = None
        if kept.ref_states is not None:
            with torch.no_grad():
                reference = reasoning_logprobs(kept.ref_states, batch, temperature=temperature)
        scale = "none" if args.scale == "batch" else args.scale
        advantages = item_advantages(value[:, None], args.num_generations, baseline="group", scale=scale) / unit
        if weights is not None:
            counted = (weights > 0).sum(dim=1, keepdim=True)  # a shorter list has no item at the last ranks
            advantages = advantages * weights.sum(dim=1, keepdim=True) / counted
        loss, metrics = policy_loss(
            logprobs,
            old,
            advantages[:, 0],
            batch.reasoning_mask,
            epsilon_low=args.epsilon_low,
            epsilon_high=args.epsilon_high,
            importance_level="token",
            beta=args.beta,
            ref_per_token_logps=reference,
            loss_agg="sum",
        )
        names = ("ratio_mean", "kl") if reference is not None else ("ratio_mean",)
        length = torch.from_numpy(batch.reasoning.lengths).float().mean()
        return loss, {"reasoning/length": length, **{f"reasoning/{name}": metrics[name] for name in names}}

    def _by_rank(self, rewards: torch.Tensor, item_mask: torch.Tensor) -> dict[str, float]:
        """What items at each of the first ranks earned, (N, T) both, on average over everybody's."""
        sums = rewards.new_zeros(2, RANKS_TOLD)
        shown = rewards[:, :RANKS_TOLD].masked_fill(~item_mask[:, :RANKS_TOLD], 0.0)
        sums[0, : shown.shape[1]] = shown.sum(0)
        sums[1, : shown.shape[1]] = item_mask[:, :RANKS_TOLD].sum(0)
        totals, counts = self.accelerator.reduce(sums).tolist()
        return {f"reward/rank_{k + 1}": totals[k] / counts[k] for k in range(RANKS_TOLD) if counts[k]}

    def _everybodys(self, values: torch.Tensor) -> torch.Tensor:
        """The values (M,), finite, of all processes, which may have different numbers of them."""
        values = values.detach().float()
        gathered = self.accelerator.gather(self.accelerator.pad_across_processes(values, pad_index=float("nan")))
        return gathered[~gathered.isnan()]

    def _spread(self, values: torch.Tensor, item_mask: torch.Tensor) -> torch.Tensor:
        """Root mean square of ``values`` (N, T) over the items of all processes; 1 where all are 0."""
        squares = torch.stack([values[item_mask].double().square().sum(), item_mask.sum().double()])
        total, count = self.accelerator.reduce(squares)
        return torch.where(total > 0, (total / count.clamp(min=1)).sqrt(), 1.0).to(values.dtype)

    def _order_of(self, train_dataset: Any) -> EpochOrder:
        if self.args.num_iterations == 1:
            return super()._order_of(train_dataset)
        per_process = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return EpochOrder(
            len(train_dataset),
            self.args.seed,
            per_update=per_process * self.accelerator.num_processes,
            repeats=self.args.num_iterations,
        )
