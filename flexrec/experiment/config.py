"""What an experiment is configured with: every option, its default, what it takes and what it is for."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from flexrec.checks import option
from flexrec.task.needs import DEFAULT_NEEDS
from flexrec.task.prompts import ENCODINGS
from flexrec.trainer.options import TrainerOptions

EMBEDDED = "embedded"
DATASETS = ("simulated", "movielens", "kuairec", "interactions")
MAX_SEED = 2**32 - 1  # NumPy's


@dataclass(kw_only=True)
class ExperimentConfig(TrainerOptions):
    """What ``flexrec train`` takes: the trainer's options, some with defaults of their own, and the experiment's.

    Raises:
        ValueError: an option outside of its choices or its range, or options that contradict each other.
    """

    output: str = option(MISSING, "folder for the model, the log and metrics.json", metavar="DIR")
    dataset: str = option("simulated", "the data", choices=DATASETS)
    data: str | None = option(
        None,
        "the data set's folder, as published, or that of a log of your own; default: none, as simulated needs none",
        metavar="DIR",
    )
    needs: tuple[str, ...] = option(DEFAULT_NEEDS, "what users ask for", flag="need", metavar="NAME")
    model: str = option(
        EMBEDDED,
        f"a causal language model by hub name or folder; {EMBEDDED}: a small one made from the catalogue",
        metavar="NAME_OR_DIR",
    )
    encoding: str | None = option(
        None,
        "how an answer names a candidate; default: item_token for the embedded model, else index",
        choices=ENCODINGS,
    )
    metric: str = option(
        "ndcg@10",
        "the metric to maximise; ranks beyond its cutoff are not trained. The need diverse has its own, alpha_ndcg, "
        "with this cutoff",
    )
    temperature: float = option(0.3, "of the policy, in sampling and in log-probs", above=0)
    warmup: str = option(
        "listwise",
        "start from the format stage alone, or from listwise supervision after it",
        choices=("format", "listwise"),
    )
    steps: int = option(40, "steps of reinforcement", low=1)
    warmup_steps: int = option(30, "steps of the format stage", low=1)
    listwise_steps: int = option(40, "steps of the listwise warm start", low=1)
    prompts_per_step: int = option(192, "prompts in a step", low=1)
    learning_rate: float = option(5e-4, "of reinforcement", low=0)
    warmup_learning_rate: float = option(1e-3, "of the supervised stages", low=0)
    listwise_baseline: bool = option(True, "train the listwise baseline, which takes as long as the reinforcement")
    bf16: bool = option(False, "compute in bfloat16, for GPUs; what is trained stays in float32")
    lora: int | None = option(
        None,
        "train LoRA of this rank in all stages; default: the whole model is trained",
        low=1,
        metavar="RANK",
    )
    lora_alpha: int | None = option(None, "LoRA counts alpha / RANK; default: 2 RANK", low=1)
    lora_targets: tuple[str, ...] | None = option(
        None,
        "linear layers that get LoRA, such as q_proj v_proj; default: all but the output layer",
        metavar="NAME",
    )
    lora_save: str = option(
        "merged",
        "save a whole model, or adapters and the name of the model they belong to",
        choices=("merged", "adapter"),
    )
    critic: bool | None = option(None, "fill in missing feedback by a critic; default: as the data set needs it")
    profile: bool = option(False, "show where the seconds of a step of reinforcement go; also in log.jsonl, by step")
    eval_every: int = option(0, "log test metrics every N steps; 0: never", low=0)
    save_every: int = option(0, "checkpoint every N steps; 0: never", low=0)
    resume: bool = option(False, "continue the interrupted run in --output, with its options")
    seed: int = option(0, "of data, model and sampling", low=0, high=MAX_SEED, metavar="S")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is None:
            for name in ("lora_alpha", "lora_targets", "lora_save"):
                if getattr(self, name) != getattr(ExperimentConfig, name):
                    raise ValueError(f"--{name.replace('_', '-')} is an option of --lora RANK, which is not given")

    def of_trainer(self) -> dict[str, Any]:
        """The trainer's options by name."""
        return {one.name: getattr(self, one.name) for one in fields(TrainerOptions)}
