"""A reward for text that is a ranking: what :mod:`flexrec.integrations.trl` makes of a batch of a data set.

Columns: ``gains``, a list of K numbers >= 0, what each candidate is worth; ``candidates``, the K names by which a
ranking says them (without the column "[1]", "[2]", ..).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flexrec.checks import check_choice
from flexrec.integrations.token_logprobs import decoded, without_end
from flexrec.metrics import CREDITS, parse_metric
from flexrec.rankings.text import INVALID, ScoredCompletions, index_labels, score_completions

COMPLETION_CREDITS = tuple(credit for credit in CREDITS if credit != "policy")
LOGGED_RANKS = 5


class RankingReward:
    """A reward function for ``trl.GRPOTrainer``: one number for a completion that is read as a ranking.

    Completions may be strings or lists of messages, of which the last is read. Everything is picklable.

    Args:
        metric: of :func:`flexrec.swap_rewards`.
        credit: the reward is the mean over the ranks asked for of this credit, 0 at those that a completion does not
            fill; with "sequence" it is the metric itself.
        num_ranked: only so many ranks count, and are expected; None: all.
        separator: what stands between two items of a well-formed ranking.
        tokenizer: reads a completion's token ids in place of its text, from which TRL has dropped special tokens:
            needed where these name the candidates.
        reasoning_end: what ends the reasoning before a ranking, say "</think>"; only what follows is read.
        invalid: what a completion gets that is not exactly a ranking: "partial", the reward of what it names, 0 where
            that is nothing; "repair", that of its first mentions followed by the candidates it left out, which pays for
            no answer too; "none", None, by which TRL leaves it out of the statistics (before 1.6 it counted as 0).
        candidates_column, gains_column: names of the columns in the data set.

    Raises:
        ValueError: an unknown metric or choice; when called, a missing column and what
            :func:`flexrec.rankings.text.score_completions` raises.
    """

    def __init__(
        self,
        metric: str = "ndcg",
        credit: str = "sequence",
        *,
        num_ranked: int | None = None,
        separator: str = " > ",
        tokenizer: Any = None,
        reasoning_end: str | None = None,
        invalid: str = "partial",
        candidates_column: str = "candidates",
        gains_column: str = "gains",
    ) -> None:
        parse_metric(metric)
        check_choice("credit", credit, COMPLETION_CREDITS)
        check_choice("invalid", invalid, (*INVALID, "none"))
        self.metric, self.credit = metric, credit
        self.num_ranked, self.separator, self.reasoning_end = num_ranked, separator, reasoning_end
        self.tokenizer, self.invalid = tokenizer, invalid
        self.candidates_column, self.gains_column = candidates_column, gains_column
        self.__name__ = metric if credit == "sequence" else f"{metric}/{credit}"  # in TRL's log

    def __call__(
        self, *, completions: Sequence[Any], completion_ids: Any = None, log_metric: Any = None, **columns: Any
    ) -> list[float | None]:
        """Called by TRL with the N completions and every column of the data set, N long; returns N rewards."""
        gains = column(columns, self.gains_column)
        if self.tokenizer is None:
            texts = [_text(completion) for completion in completions]
        else:
            texts = [decoded(self.tokenizer, without_end(self.tokenizer, ids)) for ids in completion_ids]
        scored = score_completions(
            texts,
            names_of(columns.get(self.candidates_column), gains),
            gains,
            self.metric,
            credit=self.credit,
            separator=self.separator,
            num_ranked=at_most(self.num_ranked, gains),
            after=self.reasoning_end,
            invalid="partial" if self.invalid == "none" else self.invalid,
        )
        if log_metric is not None:
            for name, values in ranking_statistics(scored).items():
                log_metric(f"{self.__name__}/{name}", values.mean().item())
        asked = torch.from_numpy((scored.parsed.ranking >= 0).sum(axis=1))  # (N,)
        of_ranks = scored.metric if self.credit == "sequence" else scored.item_rewards.sum(1) / asked
        rewards = of_ranks.tolist()
        if self.invalid != "none":
            return rewards
        return [reward if valid else None for reward, valid in zip(rewards, scored.parsed.valid, strict=True)]


def _text(completion: Any) -> str:
    """The text of a completion: a string, or messages, of which the last one's content, a string or parts."""
    content = completion if isinstance(completion, str) else completion[-1].get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part.get("text", "") for part in content)


def column(columns: Mapping[str, Any], name: str) -> list[Any]:
    if name not in columns:
        raise ValueError(
            f"the data set needs a column {name!r} with a number per candidate, got {', '.join(sorted(columns))} "
            f"(remove_unused_columns=True would take it away)"
        )
    return columns[name]


def names_of(names: Sequence[Sequence[str] | None] | None, gains: Sequence[Sequence[float]]) -> list[list[str]]:
    """The candidates' names of every row, [1], [2], .. where the data set has none."""
    rows = [None] * len(gains) if names is None else names
    lists = [index_labels(len(g)) if row is None else list(row) for row, g in zip(rows, gains, strict=True)]
    for i, row in enumerate(lists):
        for name in row:
            if not isinstance(name, str):
                raise TypeError(f"candidates must be strings, got {type(name).__name__} in row {i}")
    return lists


def at_most(num_ranked: int | None, gains: Sequence[Sequence[float]]) -> int | None:
    return None if num_ranked is None else min(num_ranked, max(map(len, gains)))


def ranking_statistics(scored: ScoredCompletions) -> dict[str, torch.Tensor]:
    """What is logged, (N,) each; a rank that a list does not have counts as 0, so that all processes log the same."""
    parsed = scored.parsed
    found = {"valid": parsed.valid, "repeated": parsed.repeated, "missing": parsed.missing, "unknown": parsed.unknown}
    statistics = {name: torch.from_numpy(values).float() for name, values in found.items()}
    for name, values in (("gain", scored.gains), ("reward", scored.item_rewards)):
        padded = torch.nn.functional.pad(values, (0, LOGGED_RANKS))
        statistics |= {f"{name}@{k + 1}": padded[:, k] for k in range(LOGGED_RANKS)}
    return statistics
