"""Responses of text as verl and OpenRLHF hold them, with what their lists are worth in one field of the data row.

The *ground truth* of a row is a mapping, or JSON of one, so that it passes through parquet and JSON lines alike::

    {"gains": [0.0, 1.0, 0.5], "candidates": ["Alien", "Brazil", "Contact"], "gain_variance": [0.0, 0.1, 0.0]}

``candidates`` are the names that an answer uses, "[1]", "[2]", .. where there are none; ``gain_variance`` says how
unsure the gains are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch

from flexrec.integrations.ranking_reward import at_most, names_of
from flexrec.integrations.token_logprobs import decoded, token_item_ids
from flexrec.rankings.text import ScoredCompletions, score_completions

KEYS = ("gains", "candidates", "gain_variance")

GroundTruth = str | Mapping[str, Any]


class ScoredResponses(NamedTuple):
    """Of N responses."""

    completions: ScoredCompletions
    item_ids: torch.Tensor
    """(N, L) int64, L the longest response: the rank of the item that a token belongs to, -1 for none. The tokens of
    an item are adjacent, and every item that a response names has some."""


def read_ground_truth(ground_truth: GroundTruth) -> Mapping[str, Any]:
    """The ground truth of a data row as a mapping, its keys checked.

    Raises:
        ValueError, TypeError: no JSON, no mapping, no gains, an unknown key.
    """
    if isinstance(ground_truth, str):
        try:
            ground_truth = json.loads(ground_truth)
        except json.JSONDecodeError as error:
            raise ValueError(f"ground_truth must be JSON, got {str(ground_truth)[:80]!r}: {error}") from error
    if not isinstance(ground_truth, Mapping):
        raise TypeError(f"ground_truth must be a mapping or JSON of one, got {type(ground_truth).__name__}")
    if ground_truth.get("gains") is None or not set(ground_truth) <= set(KEYS):
        raise ValueError(f"ground_truth must have 'gains' and no keys but {KEYS}, got {sorted(ground_truth)}")
    return ground_truth


def score_texts(
    texts: Sequence[str],
    ground_truths: Sequence[GroundTruth],
    *,
    metric: str = "ndcg",
    credit: str = "swap",
    separator: str = " > ",
    num_ranked: int | None = None,
    reasoning_end: str | None = None,
    invalid: str = "partial",
) -> ScoredCompletions:
    """:func:`flexrec.rankings.text.score_completions` of N texts, each with a ground truth of its own.

    Args:
        metric, credit, num_ranked: of :func:`flexrec.swap_rewards`; credit "policy" is none of these.
        separator: what stands between two items of a well-formed ranking.
        reasoning_end: what ends the reasoning before a ranking, say "</think>"; only what follows is read.
        invalid: "partial", only what a text names counts; or "repair", of ``score_completions``.

    Raises:
        ValueError, TypeError: as :func:`read_ground_truth` and ``score_completions``.
    """
    if len(texts) != len(ground_truths):
        raise ValueError(f"there must be one ground truth per text, {len(texts)}, got {len(ground_truths)}")
    lists = [read_ground_truth(ground_truth) for ground_truth in ground_truths]
    gains = [lst["gains"] for lst in lists]
    variance = [lst.get("gain_variance") for lst in lists]
    unsure = any(row is not None for row in variance)
    return score_completions(
        texts,
        names_of([lst.get("candidates") for lst in lists], gains),
        gains,
        metric,
        credit=credit,
        variance=[[0.0] * len(g) if v is None else v for v, g in zip(variance, gains, strict=True)] if unsure else None,
        separator=separator,
        num_ranked=at_most(num_ranked, gains),
        after=reasoning_end,
        invalid=invalid,
    )


OPTIONS = tuple(name for name, one in signature(score_texts).parameters.items() if one.kind is one.KEYWORD_ONLY)


def score_of(scored: ScoredCompletions, row: int) -> dict[str, float]:
    """One response's numbers by the names that trainers log: "score" and "acc", both the metric, and the parser's
    "valid", "repeated", "missing" and "unknown"."""
    value, parsed = float(scored.metric[row]), scored.parsed
    counts = {name: float(getattr(parsed, name)[row]) for name in ("valid", "repeated", "missing", "unknown")}
    return {"score": value, "acc": value, **counts}


def score_responses(
    tokenizer: Any,
    responses: Sequence[Sequence[int]],
    ground_truths: Sequence[GroundTruth],
    **options: Any,
) -> ScoredResponses:
    """:func:`score_texts` of N responses of token ids, and which item each token belongs to.

    The tokens are read as text, so any tokenisation of a name will do. A trailing end-of-sequence or padding token is
    no part of it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        options: of :func:`score_texts`.

    Raises:
        ValueError, TypeError: as :func:`score_texts`; an item that has no token of its own.
    """
    endings = [token for token in (tokenizer.eos_token_id, tokenizer.pad_token_id) if token is not None]
    rows = []
    for response in responses:
        ids = np.asarray(response, dtype=np.int64)
        says = np.flatnonzero(~np.isin(ids, endings))
        rows.append(ids[: says[-1] + 1 if len(says) else 0].tolist())
    completions = score_texts([decoded(tokenizer, row) for row in rows], ground_truths, **options)
    of_characters = completions.parsed.item_ids
    found = token_item_ids(tokenizer, rows, of_characters)
    item_ids = torch.full((len(responses), max(map(len, responses), default=0)), -1)
    item_ids[:, : found.shape[1]] = found

    steps = (item_ids.diff(dim=1, prepend=item_ids.new_full((len(item_ids), 1), -1)) != 0) & (item_ids >= 0)
    named = torch.from_numpy(of_characters.max(axis=1, initial=-1)) + 1
    if bool((steps.sum(1) != named).any()):
        row = int((steps.sum(1) != named).nonzero()[0])
        raise ValueError(
            f"responses[{row}] names {int(named[row])} items in {int(steps[row].sum())} runs of tokens, as one token "
            f"holds parts of two: put a separator between items"
        )
    return ScoredResponses(completions, item_ids)
