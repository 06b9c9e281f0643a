"""FlexRec in TRL's GRPO: a reward function for any ``GRPOTrainer``, and a trainer with a reward for every ranked item.

Columns of the data set beside ``prompt``: ``gains``, a list of K numbers >= 0, what each candidate is worth;
``candidates``, the K names by which a ranking says them (without the column "[1]", "[2]", ..); ``gain_variance``, K
numbers, where the gains are uncertain. See docs/trl.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from flexrec.decoding.sample import sample_rankings
from flexrec.integrations.ranking_reward import (
    RankingReward,
    at_most,
    column,
    names_of,
    ranking_statistics,
)
from flexrec.integrations.token_logprobs import (
    ActionTokens,
    Answers,
    all_action_tokens,
    check_single_tokens,
    decision_ranks,
    decoded,
    item_probabilities,
    restricted_token_logprobs,
    token_item_ids,
    without_end,
)
from flexrec.integrations.trl_options import FlexRecGRPOConfig
from flexrec.integrations.trl_vllm import per_prompt
from flexrec.metrics import parse_metric
from flexrec.ops.advantages import item_advantages, uncertainty_weights
from flexrec.policy.distributed import whole_model
from flexrec.rankings.state import RankingState, Spelling, encode_rankings
from flexrec.rankings.text import ScoredCompletions, item_values_to_tokens, score_completions
from flexrec.trainer.options import CORRECTED, OF_ALL_ACTIONS

__all__ = ["FlexRecGRPOConfig", "FlexRecGRPOTrainer", "RankingReward"]

# TRL returns the log-probs and entropies of tokens, and later versions the router's loss too.
_NUM_RETURNED = 3 if "compute_aux_loss" in signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters else 2


class FlexRecGRPOTrainer(GRPOTrainer):
    """``trl.GRPOTrainer`` with an advantage for every ranked item instead of one per completion.

    Constrained (the default), completions are rankings by construction, and policy, old and reference log-probs are
    those over what the remaining candidates allow, so that an unmoved policy has ratio 1; the loss counts decisions
    only, tokens that had an alternative. Unconstrained, completions are TRL's and so are log-probs; tokens that spell
    an item carry its advantage. Generation options that would sample from another distribution are refused.

    With the credits "all_actions" and "all_actions_corrected" the gradient is that of the objective of all candidates
    that remained, in place of the log-prob of the sampled one; advantages are then its weights, and nothing is clipped.

    Args:
        reward_funcs: further reward functions of whole completions. Their advantage, TRL's, is added at every token.
            None: the items' alone count, and the log's "reward" is the metric.
        args: a :class:`FlexRecGRPOConfig`.
        the others: those of ``trl.GRPOTrainer``.

    Raises:
        ValueError, TypeError: options that do not go together; when training, a data set without gains, lists that do
            not fit, a ranking longer than ``max_completion_length``.
    """

    args: FlexRecGRPOConfig

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, **kwargs: Any) -> None:
        if not isinstance(args, FlexRecGRPOConfig):
            raise TypeError(f"args must be a FlexRecGRPOConfig, got {type(args).__name__}")
        for name in ("tools", "rollout_func", "environment_factory"):
            if args.constrained and kwargs.get(name):
                raise ValueError(f"constrained=True generates nothing but rankings: leave out {name}=")
        if args.credit in OF_ALL_ACTIONS and reward_funcs is not None:
            raise ValueError(
                f"credit={args.credit!r} compares no completions, as rewards of whole completions are: leave out "
                f"reward_funcs, or use credit='policy' or 'swap'"
            )
        self._items_alone = reward_funcs is None
        self._valued: torch.Tensor | None = None  # (B, K) gains in rank order, while the loss is of all actions
        self._found: list[ActionTokens] = []
        self._candidates: list[list[list[int]]] = []  # token ids, of the rows that are generated, scored or trained on
        self._encoded: dict[str, list[int]] = {}
        super().__init__(model, self.ranking_metric if reward_funcs is None else reward_funcs, args, **kwargs)
        self._text_tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        if args.constrained:
            self._prepare_constrained()

    def _prepare_constrained(self) -> None:
        args, tokenizer = self.args, self._text_tokenizer
        if tokenizer is not self.processing_class:
            raise ValueError("constrained=True is for text models: processing_class must be a tokenizer")
        if tokenizer.eos_token_id is None:
            raise ValueError("processing_class has no eos token, which ends a ranking")
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if (self.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2) or is_deepspeed_zero3_enabled():
            raise ValueError(
                "constrained=True uses the output layer outside of the model's forward pass, which FSDP does not "
                "allow in its first version, and which was not tried with ZeRO-3: use DDP or FSDP2 (accelerate's "
                "fsdp_version: 2)"
            )
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError("constrained=True computes no router loss: set router_aux_loss_coef=0.0")
        if self.use_vllm:
            self._engine = per_prompt(self.vllm_generation)
        limits = [limit for limit in (args.num_ranked, parse_metric(args.metric).cutoff) if limit is not None]
        self._spelling = Spelling(
            tuple(self._encode(args.separator)), (tokenizer.eos_token_id,), min(limits, default=None)
        )

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def ranking_metric(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """The metric of each completion: the reward function where no other is given."""
        return self._score(completion_ids, columns)[0].metric.tolist()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        columns = {name: [row[name] for row in inputs] for name in inputs[0]}
        if self.args.constrained:
            gains = column(columns, self.args.gains_column)
            names = names_of(columns.get(self.args.candidates_column), gains)
            self._candidates = [[self._encode(name) for name in row] for row in names]
            self._check_lengths()
            if self.args.credit in ("policy", CORRECTED):
                check_single_tokens(self._candidates, self._spelling)
        output = super()._generate_and_score_completions(inputs)
        completion_ids, completion_mask = output["completion_ids"], output["completion_mask"]
        completions = _rows(completion_ids, completion_mask)
        weights = None
        if self.args.credit == "policy":
            weights = self._probabilities(_rows(output["prompt_ids"], output["prompt_mask"]), completions)
        scored, token_ranks = self._score(completions, columns, weights)
        padding = completion_ids.shape[1] - token_ranks.shape[1]
        token_ranks = torch.nn.functional.pad(token_ranks, (0, padding), value=-1).to(completion_ids.device)  # (B, T)
        advantages = item_values_to_tokens(self._item_advantages(scored), token_ranks)  # (B, T)
        if not self._items_alone:
            advantages = advantages + output["advantages"][:, None]
        output["advantages"] = advantages
        if self.args.constrained:
            # TRL's mask of the policy's own tokens: forced tokens are no more its own than a tool's answer is.
            output["tool_mask"] = (token_ranks >= 0).to(completion_mask.dtype)
            output["num_items_in_batch"] = self.accelerator.gather(output["tool_mask"].sum()).sum()
            output["candidates"] = self._candidates
        if self.args.credit in OF_ALL_ACTIONS:
            output["item_gains"] = scored.gains.to(completion_ids.device)
        self._log_rankings(scored)
        return output

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if not self.args.constrained:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.use_vllm:
            self._engine.set_candidates(prompt_ids, self._candidates, self._spelling)
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        lists = list(zip(prompt_ids, self._candidates, strict=True))
        group = self._group_size
        if len(lists) % group or any(lists[n] != lists[n - n % group] for n in range(len(lists))):
            group = 1  # a group spans processes: no prompt is encoded for all of its rollouts at once
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        back = getattr(plugin, "reshard_after_forward", True)
        with self.accelerator.autocast(), whole_model(self.model_wrapped, reshard_after_forward=back) as model:
            rollout = sample_rankings(
                model,
                prompt_ids[::group],
                self._candidates[::group],
                separator=self._spelling.separator,
                end=self._spelling.end,
                num_generations=group,
                num_ranked=self._spelling.num_ranked,
                temperature=self.temperature,
            )
        encoded = encode_rankings(
            self._candidates, rollout.rankings, **self._spelling.of(self._candidates), with_allowed=False
        )
        return [tokens.tolist() for tokens in np.split(encoded.tokens, encoded.offsets[1:-1])], None

    def _probabilities(self, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
        """(B, K, K) of every candidate at every rank, in rank order, under the policy as it is."""
        size, width = self.args.per_device_train_batch_size, max(map(len, self._candidates))
        parts = self._answers(prompts, completions, size, width, self.accelerator.device)
        return torch.cat([item_probabilities(self.model, answers) for _, answers in parts]).float().cpu()

    def _answers(
        self, prompts: list[list[int]], completions: list[list[int]], size: int, width: int, device: torch.device
    ) -> Iterator[tuple[slice, Answers]]:
        """Which rows, and these, ``size`` at a time, as they are scored under a policy."""
        for start in range(0, len(prompts), size):
            rows = slice(start, start + size)
            given = (prompts[rows], completions[rows], self._candidates[rows], self._spelling)
            yield rows, Answers(*given, width, self.temperature, device)

    def _score(
        self,
        completions: Sequence[Sequence[int]],
        columns: Mapping[str, Any],
        weights: torch.Tensor | None = None,
    ) -> tuple[ScoredCompletions, torch.Tensor]:
        """Rewards of the items, and (B, longest) the rank whose advantage each token carries, -1 for none."""
        args, tokenizer = self.args, self._text_tokenizer
        gains = column(columns, args.gains_column)
        # All actions are scaled and weighted by the rewards of the swaps they average.
        plain = args.credit in OF_ALL_ACTIONS or (args.credit == "policy" and weights is None)
        options: dict[str, Any] = {"credit": "swap" if plain else args.credit, "weights": weights}
        if args.uncertainty != "none":
            options["variance"] = columns.get(args.variance_column)
        if args.constrained:
            options |= self._spelling.of(self._candidates)
            scored = score_completions(completions, self._candidates, gains, args.metric, **options)
            return scored, decision_ranks(completions, self._candidates, self._spelling)
        # Sampled tokens may cut a name otherwise than the tokenizer would: names are looked for in the text.
        completions = [without_end(tokenizer, row) for row in completions]
        scored = score_completions(
            [decoded(tokenizer, row) for row in completions],
            names_of(columns.get(args.candidates_column), gains),
            gains,
            args.metric,
            separator=args.separator,
            num_ranked=at_most(args.num_ranked, gains),
            after=args.reasoning_end,
            **options,
        )
        return scored, token_item_ids(tokenizer, completions, scored.parsed.item_ids)

    def _item_advantages(self, scored: ScoredCompletions) -> torch.Tensor:
        """(B, K) of this process; statistics are over the whole batch, since a group may span processes."""
        args = self.args
        mask = torch.arange(scored.gains.shape[1]) < scored.num_ranked[:, None]  # (B, K)
        item_mask = self._gathered(mask.float()) > 0
        rewards, weights = self._gathered(scored.item_rewards), None
        if scored.variance is not None:
            weights = uncertainty_weights(
                self._gathered(scored.variance),
                self._group_size,
                level=args.uncertainty,
                rewards=rewards,
                item_mask=item_mask,
            )
        if args.credit in OF_ALL_ACTIONS:
            advantages = _weights_of_all_actions(rewards, item_mask, args.scale, weights)
        else:
            advantages = item_advantages(
                rewards,
                self._group_size,
                baseline=args.baseline,
                scale=args.scale,
                item_mask=item_mask,
                weights=weights,
            )
        return advantages.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def _gathered(self, values: torch.Tensor) -> torch.Tensor:
        """(processes * B, K) from (B, K) of every process, 0 where another process has longer lists."""
        padded = self.accelerator.pad_across_processes(values.to(self.accelerator.device), dim=1)
        return self.accelerator.gather(padded)

    def _log_rankings(self, scored: ScoredCompletions) -> None:
        log = self._metrics["train" if self.model.training else "eval"]
        statistics = {"mean": scored.metric, **ranking_statistics(scored)}
        means = torch.stack([values.mean() for values in statistics.values()])
        for name, mean in zip(statistics, self._gathered(means[None]).mean(0).tolist(), strict=True):
            log[f"{self.args.metric}/{name}"].append(mean)

    def _check_lengths(self) -> None:
        longest = RankingState(self._candidates, **self._spelling.of(self._candidates)).max_length
        if longest > self.max_completion_length:
            raise ValueError(
                f"max_completion_length={self.max_completion_length} is too short: the longest ranking of this batch "
                f"has {longest} tokens"
            )

    def _encode(self, text: str) -> list[int]:
        """Token ids of a name or separator; each text is tokenised once."""
        ids = self._encoded.get(text)
        if ids is None:
            ids = self._text_tokenizer.encode(text, add_special_tokens=False)
            if self._text_tokenizer.eos_token_id in ids:
                raise ValueError(f"{text!r} holds the end-of-sequence token, which ends a ranking")
            self._encoded[text] = ids
        return ids

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self._candidates = inputs.get("candidates", [])
        if self.args.credit not in OF_ALL_ACTIONS:
            return super().compute_loss(model, inputs, *args, **kwargs)
        # Where "log-probs" move by the objective's gradient, TRL's ratio to older ones and its KL have no meaning.
        beta: float = self.args.beta
        self.beta = 0.0
        self._valued, self._found = inputs["item_gains"], []
        try:
            loss = super().compute_loss(model, {**inputs, "old_per_token_logps": None}, *args, **kwargs)
        finally:
            self.beta, self._valued = beta, None
        mode = "train" if self.model.training else "eval"
        objective, logps = (torch.cat(values) for values in list(zip(*self._found, strict=True))[:2])
        told = self.accelerator.gather(objective.detach().sum(1)).mean().item()
        self._metrics[mode][f"{self.args.metric}/objective"].append(told)
        if beta == 0.0:
            return loss
        kl, mask = self._kl(logps, inputs), inputs["tool_mask"]
        total = self.accelerator.reduce(torch.stack([(kl.detach() * mask).sum(), mask.sum().float()]), reduction="sum")
        self._metrics[mode]["kl"].append((total[0] / total[1].clamp(min=1.0)).item())
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        return loss + beta * (kl * mask).sum() / mask.sum().clamp(min=1) / steps

    def _kl(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """(B, T) as TRL estimates it at sampled tokens."""
        left = inputs["ref_per_token_logps"] - logps
        kl = left.exp() - left - 1
        if not getattr(self.args, "use_bias_correction_kl", False):
            return kl
        old = inputs.get("old_per_token_logps")
        return kl * (logps - (logps.detach() if old is None else old)).exp()

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Where TRL takes log-probs of policy, old and reference from: (B, logits_to_keep) log-probs and entropies.

        In a loss of all actions the log-probs have the objective's gradient.
        """
        if not self.args.constrained:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        prompts = _rows(input_ids[:, :-logits_to_keep], attention_mask[:, :-logits_to_keep])
        completions = _rows(input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:])
        size = (args[0] if args else kwargs.get("batch_size")) or len(prompts)
        parts = []
        for rows, answers in self._answers(prompts, completions, size, logits_to_keep, input_ids.device):
            if self._valued is None:
                parts.append(restricted_token_logprobs(model, answers))
                continue
            foresight = "auto" if self.args.credit == CORRECTED else None
            found = all_action_tokens(
                model, answers, self._valued[rows], self.args.metric, tilt=self.args.tilt, foresight=foresight
            )
            self._found.append(found)
            parts.append((found.logprobs.detach() + found.objective - found.objective.detach(), found.entropy))
        logps, entropies = (torch.cat(values) for values in zip(*parts, strict=True))
        return (logps, entropies, None)[:_NUM_RETURNED]


def _weights_of_all_actions(
    rewards: torch.Tensor, item_mask: torch.Tensor, scale: str, weights: torch.Tensor | None
) -> torch.Tensor:
    """(N, K) what the objective of each rank is multiplied by, from the rewards (N, K) of swaps."""
    unit = rewards[item_mask].double().square().mean().sqrt() if scale == "batch" and bool(item_mask.any()) else 1.0
    found = item_mask.to(rewards.dtype) if weights is None else item_mask * weights.to(rewards.dtype)
    return found / unit if unit > 0 else found


def _rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The tokens of each row, without padding."""
    return [row[real].tolist() for row, real in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
