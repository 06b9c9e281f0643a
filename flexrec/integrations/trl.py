"""FlexRec in TRL's GRPO: a reward function for any ``GRPOTrainer``, and a trainer with a reward for every ranked item.

Columns of the data set beside ``prompt``: ``gains``, a list of K numbers >= 0, what each candidate is worth;
``candidates``, the K names by which a ranking says them (without the column "[1]", "[2]", ..); ``gain_variance``, K
numbers, where the gains are uncertain. See docs/trl.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
import trl
from packaging.version import Version
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer

from flexrec.checks import check_choice
from flexrec.decoding.sample import sample_rankings
from flexrec.integrations.ranking_reward import (
    COMPLETION_CREDITS,
    RankingReward,
    at_most,
    column,
    names_of,
    ranking_statistics,
)
from flexrec.integrations.token_logprobs import (
    decision_ranks,
    decoded,
    restricted_token_logprobs,
    token_item_ids,
    without_end,
)
from flexrec.integrations.trl_vllm import per_prompt
from flexrec.metrics import parse_metric
from flexrec.ops.advantages import BASELINES, SCALES, item_advantages, uncertainty_weights
from flexrec.rankings.state import RankingState, Spelling, encode_rankings
from flexrec.rankings.text import ScoredCompletions, item_values_to_tokens, score_completions
from flexrec.trainer.options import OF_ALL_ACTIONS

__all__ = ["FlexRecGRPOConfig", "FlexRecGRPOTrainer", "RankingReward"]

# TRL returns the log-probs and entropies of tokens, and later versions the router's loss too.
_NUM_RETURNED = 3 if "compute_aux_loss" in signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters else 2


@dataclass
class FlexRecGRPOConfig(GRPOConfig):
    """Arguments of :class:`FlexRecGRPOTrainer` beyond those of TRL; names and defaults as in ``FlexRecConfig``."""

    metric: str = field(default="ndcg", metadata={"help": "The ranking metric that is maximised."})
    credit: str = field(default="swap", metadata={"help": f"One of {', '.join(COMPLETION_CREDITS)}."})
    num_ranked: int | None = field(
        default=None,
        metadata={"help": "Rank only so many candidates; if constrained, never more than the metric's cutoff."},
    )
    baseline: str = field(default="none", metadata={"help": f"One of {', '.join(BASELINES)}."})
    scale: str = field(default="batch", metadata={"help": f"One of {', '.join(SCALES)}."})
    uncertainty: str = field(default="rollout", metadata={"help": "Weight by certainty per rollout, item, or none."})
    constrained: bool = field(
        default=True,
        metadata={"help": "Sample rankings only, with log-probs over what the remaining candidates allow."},
    )
    separator: str = field(default=" > ", metadata={"help": "What stands between two items of a ranking."})
    reasoning_end: str | None = field(
        default=None, metadata={"help": "Unconstrained: what ends the reasoning before a ranking, say '</think>'."}
    )
    candidates_column: str = field(default="candidates", metadata={"help": "Column of the candidates' names."})
    gains_column: str = field(default="gains", metadata={"help": "Column of the candidates' gains."})
    variance_column: str = field(default="gain_variance", metadata={"help": "Column of the gains' variances."})

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_metric(self.metric)
        if self.credit in ("policy", *OF_ALL_ACTIONS):
            raise ValueError(
                f"credit={self.credit!r} needs the policy's probability of every candidate at every rank, which TRL's "
                f"loss does not give: use flexrec.trainer.FlexRecTrainer, or one of {', '.join(COMPLETION_CREDITS)}"
            )
        check_choice("credit", self.credit, COMPLETION_CREDITS)
        check_choice("baseline", self.baseline, BASELINES)
        check_choice("scale", self.scale, SCALES)
        check_choice("uncertainty", self.uncertainty, ("none", "rollout", "item"))
        if self.baseline == "rank" and self.num_generations_eval == 1:
            raise ValueError("baseline='rank' compares the rollouts of one prompt: it needs num_generations_eval > 1")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel=True: Liger's loss takes one advantage per completion, not per token")
        if self.constrained:
            self._check_constrained()

    def _check_constrained(self) -> None:
        """What would sample from, or score, another distribution than the one over the remaining candidates."""
        fixed = {
            "top_p": (1.0,),
            "top_k": (0, None, -1),
            "min_p": (None, 0.0),
            "repetition_penalty": (1.0,),
            "cast_lm_head_to_fp32": (False,),  # log-probs are accumulated in float32 in any case
            "use_transformers_paged": (False,),
            "use_transformers_continuous_batching": (False,),
            "vllm_structured_outputs_regex": (None,),
            "reasoning_end": (None,),
        }
        if not self.use_vllm:
            fixed["generation_kwargs"] = (None,)
        for name, allowed in fixed.items():
            value = getattr(self, name, allowed[0])  # an option that this version of TRL lacks is not in the way
            if value not in allowed:
                raise ValueError(f"constrained=True needs {name}={allowed[0]!r}, got {value!r}")
        if self.use_vllm and self.vllm_mode == "server" and Version(trl.__version__) < Version("1.11"):
            raise ValueError(
                f"constrained=True with vllm_mode='server' needs TRL 1.11 or newer, got {trl.__version__}: the server "
                f"that this version starts itself takes no logits processor"
            )


class FlexRecGRPOTrainer(GRPOTrainer):
    """``trl.GRPOTrainer`` with an advantage for every ranked item instead of one per completion.

    Constrained (the default), completions are rankings by construction, and policy, old and reference log-probs are
    those over what the remaining candidates allow, so that an unmoved policy has ratio 1; the loss counts decisions
    only, tokens that had an alternative. Unconstrained, completions are TRL's and so are log-probs; tokens that spell
    an item carry its advantage. Generation options that would sample from another distribution are refused.

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
        self._items_alone = reward_funcs is None
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
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError("constrained=True reads rows of the output layer, which FSDP and ZeRO-3 shard: use DDP")
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
        output = super()._generate_and_score_completions(inputs)
        completion_ids, completion_mask = output["completion_ids"], output["completion_mask"]
        scored, token_ranks = self._score(_rows(completion_ids, completion_mask), columns)
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
        with self.accelerator.autocast():
            rollout = sample_rankings(
                self.accelerator.unwrap_model(self.model),
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

    def _score(
        self, completions: Sequence[Sequence[int]], columns: Mapping[str, Any]
    ) -> tuple[ScoredCompletions, torch.Tensor]:
        """Rewards of the items, and (B, longest) the rank whose advantage each token carries, -1 for none."""
        args, tokenizer = self.args, self._text_tokenizer
        gains = column(columns, args.gains_column)
        options: dict[str, Any] = {"credit": args.credit}
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
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Where TRL takes log-probs of policy, old and reference from: (B, logits_to_keep) log-probs and entropies."""
        if not self.args.constrained:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        prompts = _rows(input_ids[:, :-logits_to_keep], attention_mask[:, :-logits_to_keep])
        completions = _rows(input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:])
        size = (args[0] if args else kwargs.get("batch_size")) or len(prompts)
        parts = [
            restricted_token_logprobs(
                model,
                prompts[start : start + size],
                completions[start : start + size],
                self._candidates[start : start + size],
                self._spelling,
                width=logits_to_keep,
                temperature=self.temperature,
                device=input_ids.device,
            )
            for start in range(0, len(prompts), size)
        ]
        logps, entropies = (torch.cat(values) for values in zip(*parts, strict=True))
        return (logps, entropies, None)[:_NUM_RETURNED]


def _rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The tokens of each row, without padding."""
    return [row[real].tolist() for row, real in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
