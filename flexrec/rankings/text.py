"""Completions that other trainers sampled, as text or token ids: read as rankings, with a reward for every item.

What the adapters in :mod:`flexrec.integrations` share, and what a loop of one's own needs where rankings come as text,
such as RankGPT's and RankLLM's "[3] > [1] > [2]"::

    scored = score_completions(["[3] > [1] > [2]"], None, [[0.0, 0.0, 1.0]], "ndcg", separator=" > ")
    scored.item_rewards  # (1, 3) in rank order
    scored.parsed.ranking  # [[2, 0, 1]]: candidate index by rank
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flexrec.ops.rank_order import rank_order
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.ops.swap_rewards import swap_rewards, swap_rewards_with_variance
from flexrec.rankings.state import ParsedRankings, TokenIds, parse_rankings


class ScoredCompletions(NamedTuple):
    """Of N completions; tensors on the CPU, positions in rank order: first the ranking, then what it left out."""

    parsed: ParsedRankings
    gains: torch.Tensor
    """(N, K) float32, K the longest list; 0 beyond a row's own candidates."""
    lengths: torch.Tensor
    """(N,) int64: number of candidates."""
    metric: torch.Tensor
    """(N,) float32: the metric of the ranking, after repair."""
    item_rewards: torch.Tensor
    """(N, K) float32: the reward of the item at every rank; 0 beyond the ranked ones."""
    variance: torch.Tensor | None
    """(N, K) float32: variance of the item rewards, where the gains' variance was given."""


def index_labels(num_candidates: int) -> list[str]:
    """["[1]", "[2]", ..]: how RankGPT and RankLLM name the candidates of a list."""
    return [f"[{i}]" for i in range(1, num_candidates + 1)]


def parse_ranking_texts(
    texts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    separator: str = "",
    end: str = "",
    num_ranked: int | Sequence[int] | None = None,
    num_generations: int = 1,
    after: str | None = None,
) -> ParsedRankings:
    """:func:`flexrec.parse_rankings` of text: the same parser and the same rule of repair, on characters.

    White space around a text does not count. Names are matched as they are written, case included, wherever they
    stand: a title that is part of a longer word is found in it, so labels such as "[12]" are the safer names.

    Args:
        texts: N completions.
        candidates: P lists of K names; N = P * num_generations.
        separator, end: text between items and after the last.
        num_ranked: how many items a row ranks, as of :func:`flexrec.parse_rankings`.
        after: what ends a text's reasoning, say "</think>": only what follows its last occurrence is read, and nothing
            where it does not occur.

    Returns:
        ``item_ids`` is (N, longest text): the rank of the item that each character belongs to, or -1.

    Raises:
        ValueError, TypeError: as :func:`flexrec.parse_rankings`; something is not a string.
    """
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must hold strings, got {type(text).__name__} at index {i}")
    starts = [_start(text, after) for text in texts]
    read = [text[start:].rstrip() for text, start in zip(texts, starts, strict=True)]
    starts = [start + len(text) - len(text.lstrip()) for start, text in zip(starts, read, strict=True)]
    parsed = parse_rankings(
        [_characters(text.lstrip()) for text in read],
        [[_characters(name) for name in names] for names in candidates],
        separator=_characters(separator),
        end=_characters(end),
        num_ranked=num_ranked,
        num_generations=num_generations,
    )
    return parsed._replace(item_ids=_shifted(parsed.item_ids, starts, max(map(len, texts), default=0)))


def score_completions(
    completions: Sequence[str | TokenIds],
    candidates: Sequence[Sequence[str | TokenIds]] | None,
    gains: Sequence[Sequence[float]],
    metric: str,
    *,
    credit: str = "swap",
    variance: Sequence[Sequence[float]] | None = None,
    separator: str | TokenIds = (),
    end: str | TokenIds = (),
    num_ranked: int | None = None,
    num_generations: int = 1,
    after: str | TokenIds | None = None,
) -> ScoredCompletions:
    """Read N completions as rankings and reward every ranked item.

    Args:
        completions: N texts, or N rows of token ids.
        candidates: P lists of K names, texts or token ids as the completions are; N = P * num_generations. None: the
            labels "[1]", "[2]", .. of texts.
        gains: P lists of K numbers >= 0, what each candidate is worth, in the order of ``candidates``.
        metric, credit: of :func:`flexrec.swap_rewards`; credit "policy" needs the policy's probabilities and is none
            of these.
        variance: P lists of K numbers >= 0, the variance of the gains.
        separator, end: between items and after the last, texts or token ids as the completions are.
        num_ranked: only so many ranks count, and are expected in a completion; None: all.
        after: what ends the reasoning before a ranking, as of :func:`parse_ranking_texts`.

    Raises:
        ValueError, TypeError: lists of different lengths, or what the functions named raise.
    """
    as_text = any(isinstance(completion, str) for completion in completions)
    if candidates is None:
        if not as_text:
            raise ValueError("candidates may be left out for texts only, which name them [1], [2], ..")
        candidates = [index_labels(len(row)) for row in gains]
    if credit == "policy":
        raise ValueError("credit='policy' weighs swaps by the policy's probabilities, which completions do not carry")
    lengths = _check_lists(candidates, "gains", gains)
    if variance is not None:
        _check_lists(candidates, "variance", variance)
    if as_text:
        options: dict[str, Any] = {"separator": separator or "", "end": end or ""}
        parsed = parse_ranking_texts(
            completions,  # type: ignore[arg-type]
            candidates,  # type: ignore[arg-type]
            **options,
            num_ranked=num_ranked,
            num_generations=num_generations,
            after=after,  # type: ignore[arg-type]
        )
    else:
        parsed = _parse_ids(completions, candidates, separator, end, num_ranked, num_generations, after)

    counts = torch.from_numpy(lengths).repeat_interleave(num_generations)
    width = int(lengths.max(initial=1))
    order = rank_order(torch.from_numpy(parsed.ranking.astype(np.int64)), counts, width)

    def in_rank_order(rows: Sequence[Sequence[float]]) -> torch.Tensor:
        by_candidate = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            by_candidate[i, : len(row)] = torch.as_tensor(row, dtype=torch.float32)
        return by_candidate.repeat_interleave(num_generations, dim=0).gather(1, order)

    ranked_gains = in_rank_order(gains)
    shown: dict[str, Any] = {"lengths": counts, "num_ranked": num_ranked}
    if variance is None:
        rewards, spread = swap_rewards(ranked_gains, metric, credit=credit, **shown), None
    else:
        rewards, spread = swap_rewards_with_variance(
            ranked_gains, in_rank_order(variance), metric, credit=credit, **shown
        )
    value = ranking_metric(ranked_gains, metric, **shown)
    return ScoredCompletions(parsed, ranked_gains, counts, value, rewards, spread)


def item_values_to_tokens(values: torch.Tensor, item_ids: torch.Tensor, *, at: str = "all") -> torch.Tensor:
    """What each token carries of its item's value.

    Args:
        values: (N, K) per item, in rank order.
        item_ids: (N, L) integer, the rank of the item that a token belongs to, -1 for none.
        at: "all" gives every token of an item its value, "end" only the item's last token, as trainers expect that
            sum rewards over tokens.

    Returns:
        (N, L) of the dtype of ``values``; 0 at tokens of no item.
    """
    if at not in ("all", "end"):
        raise ValueError(f"at must be 'all' or 'end', got {at!r}")
    carries = item_ids >= 0
    if at == "end":
        following = torch.nn.functional.pad(item_ids[:, 1:], (0, 1), value=-1)
        carries = carries & (following != item_ids)
    at_tokens = values.gather(1, item_ids.clamp(min=0).long())
    return torch.where(carries, at_tokens, at_tokens.new_zeros(()))


def _check_lists(candidates: Sequence[Any], name: str, rows: Sequence[Any]) -> NDArray[np.int64]:
    """(P,) lengths of the lists, which ``rows`` must share."""
    if len(rows) != len(candidates):
        raise ValueError(f"{name} must have one row per list of candidates, {len(candidates)}, got {len(rows)}")
    for i, (names, row) in enumerate(zip(candidates, rows, strict=True)):
        if len(names) != len(row):
            raise ValueError(f"{name}[{i}] must have one number per candidate, {len(names)}, got {len(row)}")
    return np.array([len(names) for names in candidates], dtype=np.int64)


def _parse_ids(
    completions: Sequence[Any],
    candidates: Sequence[Any],
    separator: Any,
    end: Any,
    num_ranked: int | None,
    num_generations: int,
    after: Any,
) -> ParsedRankings:
    starts = [_start(list(row), None if after is None else list(after)) for row in completions]
    parsed = parse_rankings(
        [row[start:] for row, start in zip(completions, starts, strict=True)],
        candidates,
        separator=separator,
        end=end,
        num_ranked=num_ranked,
        num_generations=num_generations,
    )
    return parsed._replace(item_ids=_shifted(parsed.item_ids, starts, max(map(len, completions), default=0)))


def _start(completion: Any, after: Any) -> int:
    """Where the ranking begins: behind the last ``after``, or at the completion's end if there is none."""
    if after is None:
        return 0
    size = len(after)
    if size == 0:
        raise ValueError("after must not be empty: leave it None where nothing comes before a ranking")
    for start in range(len(completion) - size, -1, -1):
        if completion[start : start + size] == after:
            return start + size
    return len(completion)


def _characters(text: str) -> Any:  # an array is taken for a sequence of token ids
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.int32)


def _shifted(item_ids: NDArray[np.int32], starts: Sequence[int], width: int) -> NDArray[np.int32]:
    """Rows of ``item_ids`` moved right by ``starts``, -1 before and after."""
    moved = np.full((len(starts), width), -1, dtype=np.int32)
    for row, ids, start in zip(moved, item_ids, starts, strict=True):
        row[start : start + len(ids)] = ids[: width - start]
    return moved
