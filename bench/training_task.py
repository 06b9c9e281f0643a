"""A made-up ranking task, and whole rollouts and training steps on it: ours, transformers' and TRL's.

Prompts, candidates and gains are random, and so are the weights of the model, which has the embedded default's shape
or, on a GPU, that of Qwen2.5-0.5B: speed depends on none of them. Everybody gets the same model, prompts, candidates,
number of generations and dtype.
"""

from __future__ import annotations

import contextvars
import copy
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PrinterCallback,
    Qwen2Config,
    TrainerCallback,
)

from bench import peers_rankings
from bench.inputs import SMALL
from bench.peer_trl import grpo_trainer
from flexrec.decoding.logits_processor import RankingLogitsProcessor
from flexrec.decoding.sample import sample_rankings
from flexrec.rankings import parse_rankings
from flexrec.task.examples import Example
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPECIAL = 3  # padding, separator, end of sequence
PAD, SEPARATOR, END = range(SPECIAL)
IDS = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END}


def embedded_shape(layers: int = 3, hidden_size: int = 128) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=5_000,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **IDS,
    )


def qwen_shape(
    layers: int = 24, hidden_size: int = 896, heads: int = 14, vocabulary: int = 151_936
) -> PretrainedConfig:
    """Qwen2.5-0.5B, or a smaller one."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=4864 * hidden_size // 896,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        **IDS,
    )


@dataclass(frozen=True)
class TrainingTask:
    """``encoding`` says what a candidate is: "items" (a token each, nothing between two), "labels" such as "[12]" (the
    brackets and each digit are tokens), or "titles" of 1 to 12 tokens."""

    encoding: str = "items"
    prompts: int = 24
    num_generations: int = 8
    candidates: int = 30
    prompt_length: int = 150
    model_name: str = "embedded"
    config: PretrainedConfig = field(default_factory=embedded_shape)
    dtype: torch.dtype = torch.float32

    @property
    def rankings(self) -> int:
        return self.prompts * self.num_generations

    @property
    def shape(self) -> str:
        name = "" if self.model_name == "embedded" else f", {self.model_name}"
        rows = f"{self.prompts} prompts of {self.prompt_length} tokens x {self.num_generations}"
        return f"{rows}, K={self.candidates}{name}"

    @property
    def separator(self) -> list[int]:
        return [] if self.encoding == "items" else [SEPARATOR]

    @property
    def end(self) -> list[int]:
        return [] if self.encoding == "items" else [END]

    def varied(self, **changes: Any) -> TrainingTask:
        return replace(self, **changes)

    @cached_property
    def examples(self) -> list[Example]:
        rng = np.random.default_rng(0)
        return [
            Example(
                prompt=rng.integers(SPECIAL, self.config.vocab_size, self.prompt_length).tolist(),
                candidates=self._candidates(rng),
                gains=rng.random(self.candidates).astype(np.float32),
                variance=np.zeros(self.candidates, dtype=np.float32),
                history_span=(0, self.prompt_length),
                need="interest",
                user=0,
            )
            for _ in range(self.prompts)
        ]

    @property
    def answer_length(self) -> int:
        """Tokens of the longest answer."""
        return max(
            sum(map(len, example.candidates)) + (self.candidates - 1) * len(self.separator) + len(self.end)
            for example in self.examples
        )

    def model(self) -> Any:
        torch.manual_seed(0)
        config = copy.deepcopy(self.config)  # trainers write into it: transformers' switches the cache off
        with DEVICE:  # where 3B random weights take a moment; one core would take minutes
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype)

    def _candidates(self, rng: np.random.Generator) -> list[list[int]]:
        vocabulary = self.config.vocab_size
        first = rng.choice(np.arange(SPECIAL, vocabulary), self.candidates, replace=False)
        if self.encoding == "items":
            return [[int(token)] for token in first]
        if self.encoding == "titles":  # their first tokens differ, as those of titles mostly do
            return [[int(token), *rng.integers(SPECIAL, vocabulary, rng.integers(12)).tolist()] for token in first]
        opening, closing, *digits = first[:12] if self.candidates >= 12 else range(SPECIAL, SPECIAL + 12)
        return [
            [int(opening), *(int(digits[int(c)]) for c in str(k)), int(closing)] for k in range(1, self.candidates + 1)
        ]


# --- rollouts: (N, K) rankings ----------------------------------------------------------------------------------------


def our_rollout(task: TrainingTask, model: Any) -> np.ndarray:
    return sample_rankings(
        model,
        [example.prompt for example in task.examples],
        [example.candidates for example in task.examples],
        separator=task.separator,
        end=task.end,
        num_generations=task.num_generations,
    ).rankings


def generate_with_our_processor(task: TrainingTask, model: Any) -> np.ndarray:
    candidates = [example.candidates for example in task.examples]
    processor = RankingLogitsProcessor(candidates, separator=task.separator, end=task.end, eos_token_id=END)
    tokens = _generate(task, model, processor.max_new_tokens, logits_processor=[processor])
    return processor.rankings(tokens)


def generate_with_prefix_function(task: TrainingTask, model: Any) -> np.ndarray:
    """What transformers offers: a function in Python that is asked for every row at every step."""
    candidates = [example.candidates for example in task.examples]
    allowed = peers_rankings.prefix_function(candidates, task.prompt_length, SEPARATOR, END)

    def of_row(row: int, tokens: torch.Tensor) -> list[int]:
        if (tokens[task.prompt_length :] == END).any():  # finished, while others are not
            return [PAD]
        return allowed(row // task.num_generations, tokens)

    tokens = _generate(task, model, task.answer_length, prefix_allowed_tokens_fn=of_row)[:, task.prompt_length :]
    parsed = parse_rankings(
        tokens,
        candidates,
        separator=task.separator,
        end=task.end,
        num_generations=task.num_generations,
        completion_mask=tokens != PAD,
    )
    assert parsed.valid.all()
    return parsed.ranking


def _generate(task: TrainingTask, model: Any, max_new_tokens: int, **constraint: Any) -> torch.Tensor:
    # A row per ranking, which generate would make as well (num_return_sequences): but then what a prefix function is
    # asked about is the row in some versions of transformers and the prompt in others.
    prompts = torch.tensor([example.prompt for example in task.examples], device=DEVICE)
    prompts = prompts.repeat_interleave(task.num_generations, dim=0)
    with torch.no_grad():
        return model.eval().generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=PAD,
            eos_token_id=END,
            **constraint,
        )


ROLLOUTS = {
    "ours": our_rollout,
    "generate_with_our_processor": generate_with_our_processor,
    "generate_with_prefix_function": generate_with_prefix_function,
}


# --- training steps: a trainer for one step ---------------------------------------------------------------------------


def our_trainer(task: TrainingTask, folder: str, mode: str = "decode") -> Any:
    args = FlexRecConfig(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=task.prompts,
        num_generations=task.num_generations,
        metric="ndcg",
        mode=mode,
        learning_rate=1e-4,
        report_to="none",
        save_strategy="no",
        logging_steps=10**9,
        log_level="error",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = FlexRecTrainer(task.model(), args, task.examples, separator=task.separator, end=task.end)  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl_trainer(task: TrainingTask, folder: str, constrained: bool = False) -> Any:
    """TRL's GRPOTrainer, its defaults, the ranking's NDCG as its reward; answers as long as ours."""
    trainer = grpo_trainer(
        task.model(),
        task.examples,
        separator=task.separator,
        end=task.end,
        prompts_per_step=task.prompts,
        num_generations=task.num_generations,
        answer_length=task.answer_length,
        constrained=constrained,
        steps=1,
        output_dir=folder,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


MANY = 10**6  # steps, more than anybody asks for
TRAINERS = {"ours": our_trainer, "trl_grpo": trl_trainer}
IN_ONE_PASS = {"ours_one_pass": partial(our_trainer, mode="one-pass")}  # of candidates of a token each


class _OneByOne(TrainerCallback):
    """Has a trainer's steps wait to be asked for: what comes before the first of them and after the last, a fifth of a
    second that makes optimisers and loaders, is no part of a step."""

    def __init__(self) -> None:
        self.asked, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.stopped = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.asked.acquire()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise AssertionError("a step in several parts is not measured here")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self.stopped
        self.done.release()


@contextmanager
def one_step(method: str, task: TrainingTask) -> Iterator[Callable[[], Any]]:
    """A whole training step of a method (sampling, rewards, forward, backward, optimiser), to be called repeatedly."""
    steps, failure = _OneByOne(), []
    with tempfile.TemporaryDirectory() as folder:
        trainer = {**TRAINERS, **IN_ONE_PASS}[method](task, folder)
        trainer.args.max_steps = MANY
        trainer.add_callback(steps)

        def train() -> None:
            try:
                trainer.train()
            except BaseException as error:  # for the thread that asks
                failure.append(error)
            steps.done.release()

        thread = threading.Thread(target=contextvars.copy_context().run, args=(train,))  # where a profile may be
        thread.start()

        def step() -> None:
            steps.asked.release()
            steps.done.acquire()
            if failure:
                raise failure[0]

        try:
            yield step
        finally:
            steps.stopped = True
            while thread.is_alive():  # by a last step
                steps.asked.release()
                thread.join(0.1)


if SMALL:
    DEFAULT = TrainingTask(
        prompts=2, num_generations=2, candidates=4, prompt_length=12, config=embedded_shape(layers=1, hidden_size=32)
    )
    QWEN = DEFAULT.varied(model_name="Qwen2.5", config=qwen_shape(layers=1, hidden_size=32, heads=4, vocabulary=5_000))
else:
    DEFAULT = TrainingTask()
    QWEN = DEFAULT.varied(model_name="Qwen2.5-0.5B", config=qwen_shape(), dtype=torch.bfloat16)
