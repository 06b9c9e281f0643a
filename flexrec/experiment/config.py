"""What an experiment is configured with."""

from __future__ import annotations

from dataclasses import dataclass

from flexrec.checks import check_choice
from flexrec.policy.lora import require_peft
from flexrec.task.needs import NEEDS

EMBEDDED = "embedded"


@dataclass(frozen=True)
class ExperimentConfig:
    """What ``flexrec train`` takes; the defaults are those of the command line."""

    output: str
    dataset: str = "simulated"
    data: str | None = None
    model: str = EMBEDDED
    encoding: str | None = None  # default: item_token for the embedded model, index for any other
    needs: tuple[str, ...] = tuple(NEEDS)
    credit: str = "all_actions"
    tilt: float | None = None
    metric: str = "ndcg@10"
    warmup: str = "listwise"
    steps: int = 40
    warmup_steps: int = 30
    listwise_steps: int = 40
    prompts_per_step: int = 192
    num_generations: int = 1
    num_iterations: int = 1
    baseline: str = "none"
    scale: str = "batch"
    uncertainty: str = "rollout"
    learning_rate: float = 5e-4  # of reinforcement
    warmup_learning_rate: float = 1e-3  # of the supervised stages
    entropy_coef: float = 0.005
    beta: float = 0.0  # weight of the KL to the policy that reinforcement starts from
    temperature: float = 0.3
    num_ranked: int | None = None
    listwise_baseline: bool = True
    bf16: bool = False  # compute in bfloat16, keep what is trained in float32
    lora: int | None = None  # rank of the adapters that are trained in all stages; default: the whole model is trained
    lora_alpha: int | None = None
    lora_targets: tuple[str, ...] | None = None
    lora_save: str = "merged"
    profile: bool = False
    critic: bool | None = None  # default: where the data set says that feedback is missing
    eval_every: int = 0
    save_every: int = 0
    resume: bool = False
    seed: int = 0


def check_lora(config: ExperimentConfig) -> None:
    """Raise a ValueError for options of LoRA without --lora, an ImportError for --lora without PEFT."""
    check_choice("--lora-save", config.lora_save, ("merged", "adapter"))
    if config.lora is not None:
        require_peft()
        return
    for option in ("lora_alpha", "lora_targets", "lora_save"):
        if getattr(config, option) != getattr(ExperimentConfig, option):
            raise ValueError(f"--{option.replace('_', '-')} is an option of --lora RANK, which is not given")
