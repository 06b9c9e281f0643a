"""Greedy rankings of examples by a model, and the metrics of all that were ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flexrec.decoding.sample import Rollout, sample_rankings
from flexrec.evaluation.statistics import METRICS, rank_metrics
from flexrec.policy.distributed import map_over_processes, process_index
from flexrec.profiling import progress
from flexrec.task.examples import Example, prompts_and_candidates
from flexrec.task.prompts import PromptBuilder

MAX_TOKENS = 2**14  # of the prompts of a batch


def rank_examples(
    model: Any,
    examples: Sequence[Example],
    builder: PromptBuilder,
    *,
    num_ranked: int | None = None,
    batch_size: int = 128,
    description: str | None = None,
) -> list[np.ndarray]:
    """The most probable item at every rank, greedily: one array of candidate indices per example.

    Args:
        batch_size: so many together at most; of long prompts fewer.
        description: of what is done, where it is said how far that is; None says nothing.

    Example:
        >>> from flexrec.evaluation import rank_examples
        >>> some = [examples[0], examples[1]]  # as in FlexRecTrainer's example
        >>> rankings = rank_examples(model, some, examples.task.builder)
        >>> sorted(rankings[0].tolist())
        [0, 1, 2, 3, 4, 5]
    """
    rankings: list[np.ndarray] = [np.zeros(0, dtype=np.int32)] * len(examples)
    parts = _alike(examples, batch_size)
    for part in progress(description or "", parts, unit="part", shown=description is not None, kept=False):
        rollout = sample_rankings(
            model,
            *prompts_and_candidates([examples[i] for i in part]),
            separator=builder.separator,
            end=builder.end,
            num_ranked=num_ranked,
            greedy=True,
            one_pass=builder.one_pass,
            **builder.reasoning,
        )
        check_outputs(rollout)
        for i, row in zip(part, rollout.rankings, strict=True):
            rankings[i] = row[row >= 0]
    return rankings


def _alike(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """The examples' numbers in parts whose prompts are of about one length, so that little of a batch is padding."""
    parts: list[list[int]] = []
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i].prompt)):
        longest = len(examples[i].prompt)  # of the part, if it is one of it
        if not parts or len(parts[-1]) == batch_size or longest * (len(parts[-1]) + 1) > MAX_TOKENS:
            parts.append([])
        parts[-1].append(i)
    return parts


def check_outputs(rollout: Rollout) -> None:
    """Refuse rankings of a model whose log-probs are not finite: there is no order in them."""
    if not np.isfinite(rollout.logprobs[rollout.rankings >= 0]).all():
        raise ValueError("the model's outputs are not finite, so that it ranks nothing: are its weights numbers?")


def metrics_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """What the examples of a need are evaluated by, first what it is about: the metrics of items, and its own."""
    own = examples[0].metric
    return METRICS if own is None else (f"{own}@5", *METRICS)


class Evaluation:
    """Greedy rankings of the test examples of every need, shared out among the processes, and their metrics.

    Example:
        >>> from flexrec.evaluation import Evaluation
        >>> tests = {"interest": [examples[0], examples[1]]}  # as in FlexRecTrainer's example
        >>> values = Evaluation(tests, examples.task.builder, num_ranked=None)(model, "the model")
        >>> values["interest"]["ndcg@5"].shape
        (2,)
    """

    def __init__(
        self, tests: dict[str, list[Example]], builder: PromptBuilder, num_ranked: int | None, *, bf16: bool = False
    ) -> None:
        self.tests = tests
        self.builder = builder
        self.num_ranked = num_ranked
        self.bf16 = bf16

    def __call__(self, model: Any, name: str) -> dict[str, dict[str, np.ndarray]]:
        def rank(examples: Sequence[Example]) -> list[np.ndarray]:
            shown = examples and process_index() == 0
            return self.rank(model, examples, f"Evaluating {name}, {examples[0].need}" if shown else None)

        return self.of_rankings({need: map_over_processes(rank, examples) for need, examples in self.tests.items()})

    def rank(self, model: Any, examples: Sequence[Example], description: str | None = None) -> list[np.ndarray]:
        """:func:`rank_examples` of this process alone, in the evaluation's precision."""
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=self.bf16):
            return rank_examples(model, examples, self.builder, num_ranked=self.num_ranked, description=description)

    def telling(self, need: str, metric: str) -> bool:
        """Whether a metric depends on the order of any list: where everybody likes everything, recall does not."""
        worst = [np.argsort(example.gains, kind="stable") for example in self.tests[need]]
        best = [order[::-1] for order in worst]
        return not np.array_equal(self._of_need(need, worst)[metric], self._of_need(need, best)[metric])

    def of_rankings(self, rankings: Mapping[str, Sequence[np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
        """need -> metric -> (L,) values of rankings given as candidate indices, best first."""
        return {need: self._of_need(need, rankings[need]) for need in self.tests}

    def _of_need(self, need: str, rankings: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """metric -> (L,) values of the rankings of a need's lists."""
        examples = self.tests[need]
        lengths = np.array([len(example.gains) for example in examples])
        gains = np.zeros((len(examples), lengths.max()), dtype=np.float64)
        ranked = np.array([len(ranking) for ranking in rankings])
        metrics, topics = metrics_of(examples), None
        if examples[0].topics is not None:
            topics = np.zeros((*gains.shape, examples[0].topics.shape[1]), dtype=np.float32)
        for n, (example, ranking) in enumerate(zip(examples, rankings, strict=True)):
            order = np.concatenate([ranking, np.setdiff1d(np.arange(lengths[n]), ranking)])
            gains[n, : lengths[n]] = example.gains[order]
            if topics is not None and example.topics is not None:
                topics[n, : lengths[n]] = example.topics[order]
        return rank_metrics(gains, metrics, lengths=lengths, num_ranked=ranked, topics=topics)
