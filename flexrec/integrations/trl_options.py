"""What TRL's GRPO with FlexRec is configured with, and which options do not go together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import trl
from packaging.version import Version
from trl import GRPOConfig

from flexrec.checks import MIN_TILT, check_choice
from flexrec.integrations.ranking_reward import COMPLETION_CREDITS
from flexrec.metrics import parse_metric
from flexrec.ops.advantages import BASELINES, SCALES
from flexrec.trainer.options import CORRECTED, OF_ALL_ACTIONS, TRAINER_CREDITS, check_sum_over_items


@dataclass
class FlexRecGRPOConfig(GRPOConfig):
    """Arguments of :class:`FlexRecGRPOTrainer` beyond those of TRL; names and defaults as in ``FlexRecConfig``."""

    metric: str = field(default="ndcg", metadata={"help": "The ranking metric that is maximised."})
    credit: str = field(default="swap", metadata={"help": f"One of {', '.join(TRAINER_CREDITS)}."})
    tilt: float | None = field(
        default=None,
        metadata={
            "help": "Of all_actions: exponential utility with this temperature, in metric units; None: the mean."
        },
    )
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
        check_choice("credit", self.credit, TRAINER_CREDITS)
        check_choice("baseline", self.baseline, BASELINES)
        check_choice("scale", self.scale, SCALES)
        check_choice("uncertainty", self.uncertainty, ("none", "rollout", "item"))
        if self.baseline == "rank" and self.num_generations_eval == 1:
            raise ValueError("baseline='rank' compares the rollouts of one prompt: it needs num_generations_eval > 1")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel=True: Liger's loss takes one advantage per completion, not per token")
        if self.credit not in COMPLETION_CREDITS and not self.constrained:
            raise ValueError(
                f"credit={self.credit!r} needs the probability of every candidate at every rank, which free text does "
                f"not have: use constrained=True, or one of {', '.join(COMPLETION_CREDITS)}"
            )
        if self.credit in OF_ALL_ACTIONS:
            self._check_all_actions()
        elif self.tilt is not None:
            raise ValueError(f"tilt is of credit='all_actions', got credit={self.credit!r}")
        if self.constrained:
            self._check_constrained()

    def _check_all_actions(self) -> None:
        if self.baseline != "none" or self.scale not in ("batch", "none"):
            raise ValueError(
                f"credit={self.credit!r} is its own baseline: it takes baseline='none' and scale='batch' or 'none', "
                f"got baseline={self.baseline!r}, scale={self.scale!r}"
            )
        if self.top_entropy_quantile < 1.0:
            raise ValueError(
                f"credit={self.credit!r} learns from all candidates, not from sampled tokens: it takes "
                f"top_entropy_quantile=1.0, got {self.top_entropy_quantile}"
            )
        if self.tilt is not None and not MIN_TILT <= self.tilt < math.inf:
            raise ValueError(f"tilt must be finite and at least {MIN_TILT:g}, or None for the mean, got {self.tilt}")
        if self.credit != CORRECTED:
            return
        if (
            self.tilt is not None
            or self.num_iterations > 1
            or self.steps_per_generation > self.gradient_accumulation_steps
        ):
            raise ValueError(
                f"credit={CORRECTED!r} is the gradient of the expected value where rankings were sampled: it takes no "
                f"tilt and one update of each generation, got tilt={self.tilt}, num_iterations={self.num_iterations}, "
                f"steps_per_generation={self.steps_per_generation} with {self.gradient_accumulation_steps} to an update"
            )
        check_sum_over_items(self.metric)

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
