"""What the trainers of rankings share, on ``transformers.Trainer``: examples in, a loss and its metrics out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from flexrec.policy.batch import RankingBatch, make_batch
from flexrec.policy.distributed import whole_model
from flexrec.policy.lora import ADAPTER_FILE, has_adapters
from flexrec.profiling import active_profile, span
from flexrec.rankings.reasoning import ReasoningTokens
from flexrec.task.examples import Example, prompts_and_candidates
from flexrec.trainer.callbacks import ProfileSteps

MAX_NOT_FINITE = 3  # updates in a row

LossAndMetrics = tuple[torch.Tensor, Mapping[str, float | torch.Tensor]]


def collate_examples(examples: list[Example]) -> dict[str, list[Example]]:
    """The data collator: examples stay as they are."""
    return {"examples": examples}


class RankingTrainer(Trainer):
    """What the trainers of rankings share: examples in, ``ranking_loss`` out, its metrics in the log.

    With several processes the batch of a step is that of all together, and what a step computes does not depend on how
    it is split among them: a mean over items is taken over everybody's items (see ``share``), not as a mean of means.

    Args:
        model: a causal language model.
        train_dataset: of :class:`flexrec.task.Example`; one with a ``set_epoch`` is told when an epoch begins.
        separator, end: token ids between two items of an answer and after the last.
        one_pass: rankings are decided behind the prompt (:mod:`flexrec.decoding.one_pass`) and spell no answer.

    Example:
        >>> from transformers import TrainingArguments
        >>> from flexrec.trainer import RankingTrainer
        >>> class Regression(RankingTrainer):  # to a loss of one's own; the model and examples of FlexRecTrainer
        ...     def ranking_loss(self, model, examples):
        ...         loss = model.get_output_embeddings().weight.square().mean()
        ...         return loss, {"size": loss.detach()}
        ...
        >>> args = TrainingArguments(output_dir="out", max_steps=1, save_strategy="no", report_to="none")
        >>> Regression(model, args, examples).train().global_step
        {'...
        1
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_dataset: Dataset,
        *,
        separator: Sequence[int] = (),
        end: Sequence[int] = (),
        one_pass: bool = False,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"one process was given {args.n_gpu} GPUs, among which transformers would split tensors, and examples "
                f"are none: start a process for each (accelerate launch), or set CUDA_VISIBLE_DEVICES to one"
            )
        super().__init__(model, args, data_collator=collate_examples, train_dataset=train_dataset, **kwargs)
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise ValueError(
                "the output layer is used outside of the model's forward pass, which FSDP allows in its version 2 "
                "only: set fsdp_version: 2 in the configuration of accelerate, or fsdp_config={'version': 2}"
            )
        self.add_callback(ProfileSteps())
        self._told_epochs: list[Any] = [train_dataset] if hasattr(train_dataset, "set_epoch") else []
        self.add_callback(_TellEpochs(self._told_epochs))
        self.add_callback(_KeepFinite(self))
        self.model_accepts_loss_kwargs = False  # the loss is a mean: the base class divides it among micro-batches
        self.separator = tuple(separator)
        self.end = tuple(end)
        self.one_pass = one_pass
        self._step_metrics: dict[str, list[float]] = defaultdict(list)
        self._slot = 0
        self._loss_is_finite = True  # of every micro-batch of the update, on every process

    def ranking_loss(self, model: Any, examples: list[Example]) -> LossAndMetrics:
        """The loss of a micro-batch and numbers for the log, of which the means over the processes count."""
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
        self._slot += 1
        numbers = torch.stack(
            [torch.as_tensor(v, dtype=torch.float32, device=loss.device) for v in (loss.detach(), *metrics.values())]
        )
        mean_loss, *means = self.accelerator.reduce(numbers, "mean").tolist()
        self._loss_is_finite &= math.isfinite(mean_loss)
        for name, value in zip(metrics, means, strict=True):
            self._step_metrics[name].append(value)
        return (loss, {}) if return_outputs else loss

    def share(self, count: torch.Tensor | int) -> torch.Tensor:
        """What this process's mean over ``count`` things is to be multiplied by, so that the mean over the processes
        is the mean over everybody's things. All processes call this together."""
        own = torch.as_tensor(count, dtype=torch.float32, device=self.args.device)
        return own / self.accelerator.reduce(own, "mean").clamp(min=torch.finfo(own.dtype).tiny)

    def _randomness(self) -> np.random.SeedSequence:
        """A seed for this process and micro-batch: a resumed training draws what an uninterrupted one would have."""
        where = (self.state.global_step, self._slot, self.accelerator.process_index)
        return np.random.SeedSequence([self.args.seed, *where])

    @contextmanager
    def whole_model(self) -> Iterator[Any]:
        """Inside of it, the model with all its parameters, to sample or to evaluate (``distributed.whole_model``)."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        with whole_model(self.model_wrapped, reshard_after_forward=getattr(plugin, "reshard_after_forward", True)) as m:
            yield m

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        sampler = self._order_of(self.train_dataset if train_dataset is None else train_dataset)
        self._told_epochs.append(sampler)
        return sampler

    def _order_of(self, train_dataset: Any) -> EpochOrder:
        return EpochOrder(len(train_dataset), self.args.seed)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._slot = 0  # the micro-batches of an update begin
        self._loss_is_finite = True
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with span("backward"):  # and the loss, which has spans of its own
            return super().training_step(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        adapted = self.model if model is None else model
        spread = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if has_adapters(adapted) and not spread and (Path(resume_from_checkpoint) / ADAPTER_FILE).is_file():
            # Where a checkpoint has a second adapter, older versions of transformers leave the first as it was.
            adapted.load_adapter(resume_from_checkpoint, adapted.active_adapter, is_trainable=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        means = {name: sum(values) / len(values) for name, values in self._step_metrics.items()}
        self._step_metrics.clear()
        if profile := active_profile():
            means |= {f"seconds/{part}": round(seconds, 6) for part, seconds in profile.lap().items()}
        super().log({**logs, **means}, start_time)

    def _batch(
        self,
        examples: Sequence[Example],
        rankings: np.ndarray,
        num_generations: int = 1,
        rankings_per_row: int = 1,
        reasoning: ReasoningTokens | None = None,
    ) -> RankingBatch:
        return make_batch(
            *prompts_and_candidates(examples),
            rankings,
            separator=self.separator,
            end=self.end,
            num_generations=num_generations,
            rankings_per_row=rankings_per_row,
            reasoning=reasoning,
            device=self.args.device,
            one_pass=self.one_pass,
        )


class EpochOrder(Sampler):
    """Random orders of a data set, one for each epoch: the same in all processes, and in a training that is resumed.

    Args:
        per_update, repeats: the examples of each update, of so many, come so many times in a row.

    Example:
        >>> from flexrec.trainer import EpochOrder
        >>> order = list(EpochOrder(5, seed=0, per_update=2, repeats=2))
        >>> len(order), order[:2] == order[2:4]  # each pair comes twice, and the fifth example is left out
        (8, True)
    """

    def __init__(self, size: int, seed: int, *, per_update: int = 1, repeats: int = 1) -> None:
        if size < per_update:
            raise ValueError(f"an update takes {per_update} examples, the data set has {size}")
        self.size, self.seed, self.per_update, self.repeats = size, seed, per_update, repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.per_update * self.per_update * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist()
        for start in range(0, self.size - self.per_update + 1, self.per_update):
            for _ in range(self.repeats):
                yield from order[start : start + self.per_update]


class _KeepFinite(TrainerCallback):
    """Applies no update whose loss or gradient is not finite, saves nothing after one, and ends what goes on so."""

    def __init__(self, trainer: RankingTrainer) -> None:
        self.trainer = trainer
        self.in_a_row = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients) if gradients else []
        finite = torch.stack([_whole(norm).isfinite().float() for norm in norms]).min() if norms else torch.ones(())
        finite = self.trainer.accelerator.reduce(finite.to(args.device), "mean")
        # In float16 gradients may overflow until their scale is found: the scaler passes such updates over.
        if self.trainer._loss_is_finite and (args.fp16 or finite == 1):
            self.in_a_row = 0
            return
        model.zero_grad(set_to_none=True)  # the optimiser leaves alone what has no gradient
        self.in_a_row += 1
        if self.in_a_row == MAX_NOT_FINITE:
            raise ValueError(
                f"step {state.global_step + 1} of {getattr(self.trainer, 'stage', 'reinforcement')}: the loss or its "
                f"gradient was not finite {MAX_NOT_FINITE} times in a row; lower the learning rate "
                f"({args.learning_rate:g}), or see whether the model's weights are numbers; checkpoints are kept"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save &= self.in_a_row == 0


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """A norm that every process knows, of a gradient that may be spread over them."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class _TellEpochs(TrainerCallback):
    """Says which epoch begins. Data loaders do so too, but not in all processes nor after every interruption."""

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for listener in self.told:
            listener.set_epoch(int(state.epoch))


def pad_rows(rows: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """The rows (of any lengths) as one array, ``fill`` behind the shorter."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.asarray(rows[0]).dtype)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row
    return padded
