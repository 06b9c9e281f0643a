"""Supervised stages before reinforcement, on the same restricted log-probs that reinforcement uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flexrec.checks import check_choice
from flexrec.ops.ranking_metric import greedy_ranking
from flexrec.ops.vocabulary_logprobs import vocabulary_logprobs
from flexrec.policy.batch import RankingBatch
from flexrec.policy.lm_head import hidden_of_rows, output_layer, soft_cap
from flexrec.policy.scores import decision_states, ranking_scores
from flexrec.rankings.reasoning import ReasoningTokens
from flexrec.task.examples import Example
from flexrec.trainer.base import LossAndMetrics, RankingTrainer, pad_rows

STAGES = ("format", "listwise")


class SupervisedTrainer(RankingTrainer):
    """Supervision on the same restricted log-probs that reinforcement uses.

    Args:
        stage: "format" models the histories as language and rankings in random order: the items and the form of an
            answer are learnt, nothing of what is good. "listwise" is ListMLE (Xia et al. 2008) towards the order of
            the gains: the log-likelihood of placing the candidates with a gain best first, each among all that are
            left. Ties are broken at random; candidates without a gain have no order and are not imitated. Of a need
            that values lists as a whole it imitates the greedy order, which takes what adds most.
        num_imitated: "listwise" imitates so many ranks at most; default: all that have a gain.
        reasoning_end: token ids that stand between a prompt and its ranking, where the policy is to reason there.

    Example:
        >>> from transformers import TrainingArguments
        >>> from flexrec.trainer import SupervisedTrainer
        >>> args = TrainingArguments(output_dir="out", max_steps=1, save_strategy="no", report_to="none")
        >>> trainer = SupervisedTrainer(model, args, examples, stage="listwise")  # those of FlexRecTrainer's example
        >>> trainer.train().global_step
        {'...
        1
    """

    def __init__(
        self,
        *args: Any,
        stage: str,
        num_imitated: int | None = None,
        reasoning_end: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.stage = check_choice("stage", stage, STAGES)
        if num_imitated is not None and num_imitated < 1:
            raise ValueError(f"num_imitated must be at least 1, got {num_imitated}")
        self.num_imitated = num_imitated
        self.reasoning_end = None if reasoning_end is None else np.array(reasoning_end, dtype=np.int64)

    def ranking_loss(self, model: Any, examples: list[Example]) -> LossAndMetrics:
        listwise = self.stage == "listwise"
        rng = np.random.default_rng(self._randomness())
        # Ranks that are not imitated are not spelled either.
        best = slice(self.num_imitated)
        targets = [_best_first(e, rng)[best] if listwise else rng.permutation(len(e.gains)) for e in examples]
        nothing_said = None
        if self.reasoning_end is not None:
            count = len(examples)
            nothing_said = ReasoningTokens([self.reasoning_end] * count, np.zeros(count, dtype=np.int64))
        batch = self._batch(examples, pad_rows(targets, -1), reasoning=nothing_said)
        hidden = hidden_of_rows(model, batch.tokens)
        logprobs = ranking_scores(decision_states(model, batch, hidden), batch).logprobs
        placed = batch.rankings >= 0
        loss = -logprobs[placed].mean() * self.share(placed.sum())
        metrics = {"ranking_nll": loss.detach()}
        if not listwise:
            history = self._history_loss(model, batch, hidden, examples)
            metrics["history_nll"] = history.detach()
            loss = loss + history
        return loss, metrics

    def _history_loss(
        self, model: Any, batch: RankingBatch, hidden: torch.Tensor, examples: Sequence[Example]
    ) -> torch.Tensor:
        """Mean next-token loss over the history's tokens, over the whole vocabulary; weighted by this process's
        share of the tokens."""
        spans = [(max(1, example.history_span[0]), example.history_span[1]) for example in examples]
        rankings = np.repeat(np.arange(len(spans)), [max(0, b - a) for a, b in spans])
        share = self.share(len(rankings))
        if len(rankings) == 0:
            return hidden.new_zeros(())
        positions = np.concatenate([np.arange(a, b) for a, b in spans])
        rows = torch.from_numpy(batch.tokens.row[rankings]).to(hidden.device)
        columns = torch.from_numpy(batch.tokens.prompt_columns(rankings, positions)).to(hidden.device)
        predicting = hidden[rows, columns - 1]
        targets = batch.tokens.tokens(rows, columns)
        weight, bias = output_layer(model)
        logprobs = vocabulary_logprobs(predicting, weight, targets, bias=bias, soft_cap=soft_cap(model))
        return -logprobs.sum() * share / len(targets)


def _best_first(example: Example, rng: np.random.Generator) -> np.ndarray:
    """The candidates with a gain by falling gain, ties in random order; one at random where none has any."""
    order = rng.permutation(len(example.gains))
    if example.metric is None or example.topics is None:
        order = order[np.argsort(-example.gains[order], kind="stable")]
    else:
        gains, topics = (torch.from_numpy(of_items[order]) for of_items in (example.gains, example.topics))
        order = order[greedy_ranking(gains[None], example.metric, topics=topics[None])[0].numpy()]
    return order[: max(1, int((example.gains > 0).sum()))]
