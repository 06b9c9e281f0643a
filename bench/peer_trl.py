"""TRL's GRPOTrainer on ranking examples: the same prompts as token ids, and a scalar reward from the same parser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexrec.decoding.logits_processor import RankingLogitsProcessor
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.rankings import parse_rankings
from flexrec.task.examples import Example


def as_text(tokens: Sequence[int]) -> str:
    """Words that :func:`ids_tokenizer` reads as the same tokens: TRL takes text, and this text loses nothing."""
    return " ".join(f"<{token}>" for token in tokens)


def ids_tokenizer(vocab_size: int, eos_token_id: int, pad_token_id: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are "<0>", "<1>", ..; in brackets, as special tokens are cut out of longer words."""
    vocabulary = {as_text([i]): i for i in range(vocab_size)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=as_text([pad_token_id])))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=as_text([eos_token_id]), pad_token=as_text([pad_token_id]), padding_side="left"
    )


class RankingMetricReward:
    """The metric of the ranking that a completion holds, repaired as the parser does."""

    __name__ = "ranking_metric"

    def __init__(self, metric: str, separator: Sequence[int], end: Sequence[int]) -> None:
        self.metric, self.separator, self.end = metric, list(separator), list(end)

    def __call__(
        self,
        *,
        completion_ids: list[list[int]],
        candidates: list[list[list[int]]],
        gains: list[list[float]],
        **_: Any,
    ) -> list[float]:
        parsed = parse_rankings(completion_ids, candidates, separator=self.separator, end=self.end)
        ranked = np.stack(
            [np.asarray(row)[np.asarray(order)] for row, order in zip(gains, parsed.ranking, strict=True)]
        )
        return ranking_metric(torch.as_tensor(ranked, dtype=torch.float32), self.metric).tolist()


def grpo_trainer(
    model: Any,
    examples: Sequence[Example],
    *,
    separator: Sequence[int] = (),
    end: Sequence[int] = (),
    metric: str = "ndcg",
    prompts_per_step: int,
    num_generations: int,
    answer_length: int,
    constrained: bool = False,
    steps: int,
    learning_rate: float = 1e-4,
    temperature: float = 1.0,
    seed: int = 0,
    callbacks: Sequence[Any] = (),
    output_dir: str,
) -> Any:
    """A GRPOTrainer that samples ``answer_length`` tokens for each of the examples' prompts; lists of equal length.

    TRL samples free text. ``constrained`` gives it what it has no option for: a model that generates rankings only.
    """
    import pyarrow
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    if any(isinstance(token, tuple) for example in examples for token in example.prompt):
        raise ValueError("TRL reads a token at each place: items that are described are sums of several")
    rows = [
        {
            "prompt": as_text(example.prompt),
            "candidates": [list(sequence) for sequence in example.candidates],
            "gains": [float(gain) for gain in example.gains],
        }
        for example in examples
    ]
    args = GRPOConfig(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=prompts_per_step * num_generations,
        num_generations=num_generations,
        max_completion_length=answer_length,
        # Free text gets the length of a constrained answer.
        generation_kwargs=None if constrained else {"min_new_tokens": answer_length},
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, steps // 4),
        temperature=temperature,
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        logging_steps=10**9,
        save_strategy="no",
        disable_tqdm=True,
        log_completions=False,
        seed=seed,
    )
    config = model.config
    if constrained:
        _generate_rankings_only(model, examples, separator, end)
    tokenizer = ids_tokenizer(config.vocab_size, config.eos_token_id, config.pad_token_id)
    return GRPOTrainer(
        model=model,
        reward_funcs=RankingMetricReward(metric, separator, end),
        args=args,
        # With a fingerprint of its own datasets need not pickle the table, which some versions of pyarrow refuse.
        train_dataset=Dataset(pyarrow.Table.from_pylist(rows), fingerprint="rankings"),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def _generate_rankings_only(
    model: Any, examples: Sequence[Example], separator: Sequence[int], end: Sequence[int]
) -> None:
    """Give ``model.generate`` the candidates of each prompt, which it is called with."""
    candidates = {tuple(example.prompt): example.candidates for example in examples}
    for example in examples:
        if sorted(candidates[tuple(example.prompt)]) != sorted(example.candidates):
            raise ValueError("two lists have the same prompt and other candidates: which are meant cannot be told")
    generate = model.generate

    def constrained(input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True)]
        processor = RankingLogitsProcessor(
            [candidates[prompt] for prompt in prompts],
            separator=separator,
            end=end,
            prompt_length=input_ids.shape[1],
            eos_token_id=model.config.eos_token_id,
            reuse_scores=True,
        )
        return generate(input_ids=input_ids, attention_mask=attention_mask, logits_processor=[processor], **options)

    model.generate = constrained
