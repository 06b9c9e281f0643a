"""Completions that other trainers sampled, as text or token ids: read as rankings, with a reward for every item.

What the adapters in :mod:`flexrec.integrations` share, and what a loop of one's own needs where rankings come as text,
such as RankGPT's and RankLLM's "[3] > [1] > [2]"::

    scored = score_completions(["[3] > [1] > [2]"], None, [[0.0, 0.0, 1.0]], "ndcg", separator=" > ")
    scored.item_rewards  # (1, 3) in rank order
    scored.parsed.ranking  # [[2, 0, 1]]: candidate index by rank
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flexrec.checks import check_choice, check_range, check_tensor
from flexrec.ops.rank_order import rank_order
from flexrec.ops.ranking_metric import ranking_metric
from flexrec.ops.swap_rewards import swap_rewards, swap_rewards_with_variance
from flexrec.rankings.state import ParsedRankings, TokenIds, parse_rankings

INVALID = ("partial", "repair")


class ScoredCompletions(NamedTuple):
    """Of N completions; tensors on the CPU, positions in rank order: first the ranking, then what it left out."""

    parsed: ParsedRankings
    gains: torch.Tensor
    """(N, K) float32, K the longest list; 0 beyond a row's own candidates."""
    lengths: torch.Tensor
    """(N,) int64: number of candidates."""
    num_ranked: torch.Tensor
    """(N,) int64: how many ranks count: those that the completion fills, or with a repair all that were asked for."""
    metric: torch.Tensor
    """(N,) float32: the metric of the ranks that count."""
    item_rewards: torch.Tensor
    """(N, K) float32: the reward of the item at every rank; 0 beyond the ranks that count."""
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
    stand: a title that is part of a longer word is found in it, so labels such as "[12]" are the safer names. The lines
    of a numbered list are items as if they were joined by separators. Of names that are all labels a text that is no
    well-formed ranking is read as a person would: "2 > 1", "[2]>[1]", "[2, 1]", "[02] > [01]", and the same in
    full-width characters. Bare numbers count only where separators join them, and no label stands in the text.

    Args:
        texts: N completions.
        candidates: P lists of K names; N = P * num_generations.
        separator, end: text between items and after the last.
        num_ranked: how many items a row ranks, as of :func:`flexrec.parse_rankings`.
        after: what ends a text's reasoning, say "</think>": only what follows its last occurrence is read, and nothing
            where it does not occur.

    Returns:
        ``item_ids`` is (N, longest text): the rank of the item that each character belongs to, or -1. ``valid`` is
        whether the text is spelled exactly, whatever else can be read.

    Raises:
        ValueError, TypeError: as :func:`flexrec.parse_rankings`; something is not a string.
    """
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must hold strings, got {type(text).__name__} at index {i}")
    for name, value in (("separator", separator), ("end", end), ("after", after)):
        if not isinstance(value, str) and not (value is None and name == "after"):
            raise TypeError(f"{name} must be a string, as the texts are, got {type(value).__name__}")
    for i, names in enumerate(candidates):
        for k, title in enumerate(names):
            if not isinstance(title, str):
                raise TypeError(f"candidates must hold strings, got {type(title).__name__} at index [{i}][{k}]")
    starts = [_start(text, after) for text in texts]
    read = [text[start:].rstrip() for text, start in zip(texts, starts, strict=True)]
    starts = [start + len(text) - len(text.lstrip()) for start, text in zip(starts, read, strict=True)]
    read = [text.lstrip() for text in read]
    lists = [[_characters(name) for name in names] for names in candidates]
    tails = {"separator": _characters(separator), "end": _characters(end)}
    parsed = parse_rankings(
        [_characters(text) for text in read], lists, num_ranked=num_ranked, num_generations=num_generations, **tails
    )
    item_ids = _shifted(parsed.item_ids, starts, max(map(len, texts), default=0))

    plain = {
        row: _plainly(read[row], candidates[row // num_generations], separator) for row in np.flatnonzero(~parsed.valid)
    }
    plain = {row: spelled for row, spelled in plain.items() if spelled.text != read[row]}
    if plain:
        rows = np.array(list(plain))
        again = parse_rankings(
            [_characters(spelled.text) for spelled in plain.values()],
            [lists[row // num_generations] for row in rows],
            num_ranked=(parsed.ranking[rows] >= 0).sum(axis=1),
            **tails,
        )
        parsed.ranking[rows, : again.ranking.shape[1]] = again.ranking
        for name in ("repeated", "missing", "unknown"):
            getattr(parsed, name)[rows] = getattr(again, name)
        for row, ids, spelled in zip(rows, again.item_ids, plain.values(), strict=True):
            item_ids[row, starts[row] : starts[row] + len(spelled.origin)] = ids[spelled.origin]
    return parsed._replace(item_ids=item_ids)


class _Plain(NamedTuple):
    """A text with its rankings spelled as they should be."""

    text: str
    origin: NDArray[np.int64]
    """By character of the original text: the character of ``text`` that stands for it."""


# One character for one, so that places in a text stay: full-width forms, the ideographic space, lenticular brackets.
_NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {0x3000: 0x20, 0x3010: 0x5B, 0x3011: 0x5D}
_LABEL = r"\[\s*[0-9]+\s*\]"
_NUMBER = r"(?<![\w.,])[0-9]+(?![\w\]]|[.,][0-9])"
_LINE = r"[ \t]*\n\s*(?P<line>[0-9]+)[.)][ \t]+"  # how an item of a numbered list begins


def _plainly(text: str, names: Sequence[str], separator: str) -> _Plain:
    """``text`` spelled so that the parser reads what :func:`parse_ranking_texts` says that it reads."""
    labels = {name[1:-1].lstrip("0"): name for name in names if re.fullmatch(r"\[[0-9]+\]", name)}
    patterns = []
    if len(labels) == len(names):
        text = text.translate(_NARROW)
        joint = re.escape(separator.strip())
        patterns.append(rf"\[\s*[0-9]+(?:\s*(?:[,;]{'|' + joint if joint else ''})\s*[0-9]+)+\s*\]")
        if joint:
            item = _LABEL if re.search(_LABEL, text) else _NUMBER
            patterns.append(rf"{item}(?:\s*{joint}\s*{item})+")
        patterns.append(_LABEL)
    if separator and not any(re.match(r"[0-9]+[.)]\s", name) for name in names):
        patterns.append(_LINE)

    parts, origin = [""], np.zeros(len(text), dtype=np.int64)
    length = at = 0  # of what has been spelled, and read

    def spell(part: str, end: int) -> None:
        """``part`` for what the text says up to ``end``; character by character where that is the same."""
        nonlocal length, at
        origin[at:end] = length + np.arange(end - at) if part == text[at:end] else length
        parts.append(part)
        length, at = length + len(part), end

    for match in re.finditer("|".join(patterns), text) if patterns else ():
        spell(text[at : match.start()], match.start())
        line = match.groupdict().get("line")
        if line == "1":  # a list begins: nothing joins it to what stands before
            continue
        if line is not None:
            spell(separator, match.end())
            continue
        for label in re.finditer(r"(?:\[\s*)?([0-9]+)(?:\s*\])?", match[0]):
            if at > match.start():
                spell(separator, match.start() + label.start())
            spell(labels.get(label[1].lstrip("0"), label[0]), match.start() + label.end())
    spell(text[at:], len(text))
    return _Plain("".join(parts), origin)


def score_completions(
    completions: Sequence[str | TokenIds],
    candidates: Sequence[Sequence[str | TokenIds]] | None,
    gains: Sequence[Sequence[float]],
    metric: str,
    *,
    credit: str = "swap",
    variance: Sequence[Sequence[float]] | None = None,
    weights: torch.Tensor | None = None,
    separator: str | TokenIds = (),
    end: str | TokenIds = (),
    num_ranked: int | None = None,
    num_generations: int = 1,
    after: str | TokenIds | None = None,
    invalid: str = "partial",
) -> ScoredCompletions:
    """Read N completions as rankings and reward every ranked item.

    Args:
        completions: N texts, or N rows of token ids.
        candidates: P lists of K names, texts or token ids as the completions are; N = P * num_generations. None: the
            labels "[1]", "[2]", .. of texts.
        gains: P lists of K numbers >= 0, what each candidate is worth, in the order of ``candidates``.
        metric, credit: of :func:`flexrec.swap_rewards`.
        variance: P lists of K numbers >= 0, the variance of the gains.
        weights: (N, K, K) the policy's probabilities in rank order, K the longest list; with credit "policy" only.
        separator, end: between items and after the last, texts or token ids as the completions are.
        num_ranked: only so many ranks count, and are expected in a completion; None: all.
        after: what ends the reasoning before a ranking, as of :func:`parse_ranking_texts`.
        invalid: what counts of a completion that does not name all it should. "partial": what it names; the rest is
            unranked, and where nothing is named all is 0. "repair": the candidates that it left out follow in their
            order. That is for inference: as a reward it pays for no answer what the candidates' order is worth.

    Raises:
        ValueError, TypeError: lists of different lengths, an unknown choice, or what the functions named raise.
    """
    check_choice("invalid", invalid, INVALID)
    as_text = any(isinstance(completion, str) for completion in completions)
    if candidates is None:
        if not as_text:
            raise ValueError("candidates may be left out for texts only, which name them [1], [2], ..")
        candidates = [index_labels(len(row)) for row in gains]
    if credit == "policy" and weights is None:
        raise ValueError(
            "credit='policy' weighs swaps by the policy's probabilities, which completions do not carry: give weights="
        )
    lengths = _check_lists(candidates, "gains", gains)
    if variance is not None:
        _check_lists(candidates, "variance", variance)
    options: dict[str, Any] = {"num_ranked": num_ranked, "num_generations": num_generations}
    if as_text:
        spelling = {"separator": separator, "end": end}
        options |= {name: "" if isinstance(value, tuple) and not value else value for name, value in spelling.items()}
        parsed = parse_ranking_texts(completions, candidates, **options, after=after)  # type: ignore[arg-type]
    else:
        starts = [_start(list(row), None if after is None else list(after)) for row in completions]
        rows = [row[start:] for row, start in zip(completions, starts, strict=True)]
        parsed = parse_rankings(rows, candidates, **options, separator=separator, end=end)  # type: ignore[arg-type]
        parsed = parsed._replace(item_ids=_shifted(parsed.item_ids, starts, max(map(len, completions), default=0)))

    counts = torch.from_numpy(lengths).repeat_interleave(num_generations)
    ranked = torch.from_numpy((parsed.ranking >= 0).sum(axis=1))
    if invalid == "partial":
        ranked -= torch.from_numpy(parsed.missing)
    width = int(lengths.max(initial=1))
    order = rank_order(torch.from_numpy(parsed.ranking.astype(np.int64)), counts, width)

    def in_rank_order(rows: Sequence[Sequence[float]]) -> torch.Tensor:
        by_candidate = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            by_candidate[i, : len(row)] = torch.as_tensor(row, dtype=torch.float32)
        return by_candidate.repeat_interleave(num_generations, dim=0).gather(1, order)

    ranked_gains = in_rank_order(gains)
    shown: dict[str, Any] = {"lengths": counts, "num_ranked": ranked}
    if variance is None:
        rewards, spread = swap_rewards(ranked_gains, metric, credit=credit, weights=weights, **shown), None
    else:
        rewards, spread = swap_rewards_with_variance(
            ranked_gains, in_rank_order(variance), metric, credit=credit, weights=weights, **shown
        )
    value = ranking_metric(ranked_gains, metric, **shown)
    return ScoredCompletions(parsed, ranked_gains, counts, ranked, value, rewards, spread)


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
    check_choice("at", at, ("all", "end"))
    check_tensor("values", values, ("N", "K"))
    check_tensor("item_ids", item_ids, (len(values), "L"), "integer")
    check_range("item_ids", item_ids, -1, values.shape[1] - 1)
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
