"""What a run will take, said before it begins: tokens, arithmetic, memory, minutes at the pace of a measured step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flexrec.experiment.config import ExperimentConfig
from flexrec.metrics import parse_metric
from flexrec.policy.batch import make_batch
from flexrec.policy.places import are_places
from flexrec.policy.scores import ranking_scores, ranking_states
from flexrec.task.examples import Example, TrainingExamples, prompts_and_candidates
from flexrec.task.prompts import PromptBuilder

SHOWN = 64  # training examples whose lengths are taken for those of all
AT_ONCE = 8  # prompts of the measured step


@dataclass(frozen=True)
class StagePlan:
    """A stage's tokens through the model, forwards and, where it learns, backwards."""

    name: str
    tokens: float
    learns: bool

    def flops(self, parameters: int) -> float:
        """2 per parameter and token forwards and 4 backwards (Kaplan et al. 2020), attention apart."""
        return (6.0 if self.learns else 2.0) * parameters * self.tokens


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        parameters: those that every token goes through: not the input embeddings.
        bytes_at_least: weights, gradients and what the optimiser keeps; activations come on top.
        peak_bytes: of the process after the measured step, activations included; None where it is not known.
        forward, step: tokens a second forwards, and forwards and backwards.
    """

    stages: tuple[StagePlan, ...]
    prompt_tokens: float
    parameters: int
    bytes_at_least: int
    peak_bytes: int | None
    forward: float
    step: float

    def minutes(self, stage: StagePlan) -> float:
        return stage.tokens / (self.step if stage.learns else self.forward) / 60

    def text(self) -> str:
        """A line per stage, and what all take together."""
        lines = [
            f"{stage.name}: {_short(stage.tokens)} tokens, {_short(stage.flops(self.parameters))}FLOP, about "
            f"{_minutes(self.minutes(stage))}"
            for stage in self.stages
        ]
        whole = sum(map(self.minutes, self.stages))
        memory = f"weights, gradients and optimiser {self.bytes_at_least / 2**30:.2f} GiB"
        if self.peak_bytes is not None:
            memory += f", the process {self.peak_bytes / 2**30:.2f} GiB after a step of {AT_ONCE} prompts or fewer"
        return "\n".join(
            [
                f"Estimated by a measured step ({self.step:,.0f} tokens a second forwards and backwards, prompts of "
                f"{self.prompt_tokens:.0f} tokens):",
                *(f"  {line}" for line in lines),
                f"  in all about {_minutes(whole)}, baselines apart; {memory}",
            ]
        )


def estimate(
    config: ExperimentConfig, model: Any, examples: TrainingExamples, tests: Sequence[Example], builder: PromptBuilder
) -> Estimate:
    """Look at some examples and time a step on them, which leaves the model as it was.

    Args:
        tests: all that are evaluated on, of all needs.
    """
    some = [examples[i] for i in np.linspace(0, len(examples) - 1, SHOWN, dtype=int)]
    prompt, answer = _lengths(some, config, builder)
    test_prompt, test_answer = _lengths(tests[:: max(1, len(tests) // SHOWN)], config, builder)
    supervised = config.supervised_lists * (prompt + answer)
    # The prompts of a group are encoded once, and only once where they decide the rankings.
    rollouts = config.prompts_per_step * (prompt + config.num_generations * answer)
    sampling = 0 if config.ranks_in_one_pass else config.steps * rollouts
    once = len(tests) * (test_prompt + test_answer)
    listwise = config.warmup == "listwise"
    stages = [
        StagePlan("format", config.warmup_steps * supervised, learns=True),
        StagePlan("listwise warm start", config.listwise_steps * supervised * listwise, learns=True),
        StagePlan("rollouts", sampling, learns=False),
        StagePlan("reinforcement", config.steps * rollouts, learns=True),
        StagePlan(f"evaluation of {2 + listwise} models", (2 + listwise) * once, learns=False),
    ]
    forward, step = _pace(config, model, some[:AT_ONCE], builder)
    embeddings = model.get_input_embeddings().weight
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return Estimate(
        stages=tuple(stage for stage in stages if stage.tokens),
        prompt_tokens=prompt,
        parameters=sum(p.numel() for p in model.parameters()) - embeddings.numel(),
        bytes_at_least=whole + 12 * trained,  # a gradient and Adam's two moments, of four bytes each
        peak_bytes=_peak(),
        forward=forward,
        step=step,
    )


def _lengths(examples: Sequence[Example], config: ExperimentConfig, builder: PromptBuilder) -> tuple[float, float]:
    """Mean tokens of the prompts, and of the answers as far as ranks are trained."""
    prompts, candidates = prompts_and_candidates(examples)
    prompt = float(np.mean([len(tokens) for tokens in prompts]))
    if are_places(candidates) or builder.one_pass:
        return prompt, 0.0
    limits = [limit for limit in (config.num_ranked, parse_metric(config.metric).cutoff) if limit]
    answers = []
    for lst in candidates:
        ranks = min([len(lst), *limits])
        answers.append(ranks * (np.mean([len(sequence) for sequence in lst]) + len(builder.separator)))
    return prompt, float(np.mean(answers)) + builder.reasoning.get("max_reasoning_tokens", 0)


def _pace(
    config: ExperimentConfig, model: Any, examples: Sequence[Example], builder: PromptBuilder
) -> tuple[float, float]:
    """Tokens a second forwards alone, and forwards and backwards; of the second of two steps, the first warms up."""
    prompts, candidates = prompts_and_candidates(examples[: config.micro_batch or AT_ONCE])
    width = max(map(len, candidates))
    first = np.where(np.arange(width) < np.array([[len(lst)] for lst in candidates]), np.arange(width), -1)
    batch = make_batch(
        prompts,
        candidates,
        first,
        separator=builder.separator,
        end=builder.end,
        device=next(model.parameters()).device,
        one_pass=builder.one_pass,
    )
    tokens, seconds = int((batch.tokens.part_of >= 0).sum()), [0.0, 0.0]
    device, was_training = next(model.parameters()).device.type, model.training
    model.train()
    if config.gradient_checkpointing:
        # By its name of transformers 5.20 and later, or the one before.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for _ in range(2):
        begun = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=config.bf16):
            loss = -ranking_scores(ranking_states(model, batch), batch).logprobs.mean()
        seconds[0] = _now(device) - begun
        loss.backward()
        seconds[1] = _now(device) - begun
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return tokens / seconds[0], tokens / seconds[1]


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak() -> int | None:
    """Bytes that were taken at most: of the GPU, or of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
        import sys
    except ImportError:  # on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _short(number: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "


def _minutes(minutes: float) -> str:
    return f"{minutes * 60:.0f} seconds" if minutes < 2 else f"{minutes:.0f} minutes"
