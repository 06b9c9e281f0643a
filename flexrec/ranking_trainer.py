"""What the trainers of rankings share, on ``transformers.Trainer``: examples in, a loss and its metrics out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from flexrec.policy import RankingBatch, make_batch
from flexrec.profiling import ProfileSteps, active_profile, span
from flexrec.task import Example

LossAndMetrics = tuple[torch.Tensor, Mapping[str, float | torch.Tensor]]


def collate_examples(examples: list[Example]) -> dict[str, list[Example]]:
    """The data collator: examples stay as they are."""
    return {"examples": examples}


class RankingTrainer(Trainer):
    """What the trainers of rankings share: examples in, ``ranking_loss`` out, its metrics in the log.

    Args:
        model: a causal language model.
        train_dataset: of :class:`flexrec.task.Example`; one with a ``set_epoch`` is told when an epoch begins.
        separator, end: token ids between two items of an answer and after the last.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Dataset,
        *,
        separator: Sequence[int] = (),
        end: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, data_collator=collate_examples, train_dataset=train_dataset, **kwargs)
        self.add_callback(ProfileSteps())
        self.model_accepts_loss_kwargs = False  # the loss is a mean: the base class divides it among micro-batches
        self.separator = tuple(separator)
        self.end = tuple(end)
        self._step_metrics: dict[str, list[float]] = defaultdict(list)

    def ranking_loss(self, model: Any, examples: list[Example]) -> LossAndMetrics:
        """The loss of a micro-batch and numbers for the log."""
        raise TypeError("a trainer of rankings defines ranking_loss")

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        with span("log-probs and loss"):
            loss, metrics = self.ranking_loss(model, inputs["examples"])
        for name, value in metrics.items():
            self._step_metrics[name].append(float(value))
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with span("backward"):  # and the loss, which has spans of its own
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        means = {name: sum(values) / len(values) for name, values in self._step_metrics.items()}
        self._step_metrics.clear()
        if profile := active_profile():
            means |= {f"seconds/{part}": round(seconds, 6) for part, seconds in profile.lap().items()}
        super().log({**logs, **means}, start_time)

    def _batch(
        self, examples: Sequence[Example], rankings: np.ndarray, num_generations: int = 1, rankings_per_row: int = 1
    ) -> RankingBatch:
        return make_batch(
            [example.prompt for example in examples],
            [example.candidates for example in examples],
            rankings,
            separator=self.separator,
            end=self.end,
            num_generations=num_generations,
            rankings_per_row=rankings_per_row,
            device=self.args.device,
        )


def pad_rows(rows: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """The rows (of any lengths) as one array, ``fill`` behind the shorter."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.asarray(rows[0]).dtype)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row
    return padded
