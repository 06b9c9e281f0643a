"""Rankings as a model takes them: token rows, and where in them the decisions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flexrec.policy.packing import TokenRows, pack_rankings
from flexrec.policy.places import Places, are_places, places_of
from flexrec.policy.row_tokens import CandidateLists, Prompts, numbered
from flexrec.rankings.reasoning import ReasoningTokens
from flexrec.rankings.state import Candidates, EncodedRankings, encode_rankings


@dataclass(frozen=True)
class RankingBatch:
    """Model inputs for N rankings of P lists (N = P * num_generations, rankings of one list adjacent).

    A decision is a token with an alternative; all other tokens of an answer are forced and carry no log-prob.
    """

    tokens: TokenRows  # prompts and answers, which begin with reasoning where there is any
    rankings: torch.Tensor  # (N, T) int64, index into the row's candidates, -1 beyond a row's own
    lengths: torch.Tensor  # (N,) int64, number of candidates
    encoded: EncodedRankings  # without what was allowed where there are candidate_ids, which say it
    # (P, K) int64 tokens, or numbers of sums or of candidates that are read in place, where each is a single one
    candidate_ids: torch.Tensor | None
    num_generations: int
    reasoning: ReasoningTokens | None = None
    places: Places | None = None  # where candidates are read in their prompts, and the rows have no answers
    one_pass: bool = False  # the first decision's distribution is that of every rank, and the rows have no answers

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)"""
        return self.rankings.shape[0], self.rankings.shape[1]

    @property
    def reasoning_mask(self) -> torch.Tensor:
        """(N, R) bool, R the longest sampled reasoning: where a row has a token of it that was sampled."""
        if self.reasoning is None:
            return torch.zeros(self.shape[0], 0, dtype=torch.bool, device=self.rankings.device)
        counts = torch.from_numpy(self.reasoning.num_sampled).to(self.rankings.device)
        return torch.arange(int(self.reasoning.num_sampled.max()), device=counts.device) < counts[:, None]


def make_batch(
    prompts: Prompts,
    candidates: CandidateLists,
    rankings: np.ndarray,
    *,
    separator: Sequence[int] = (),
    end: Sequence[int] = (),
    num_generations: int = 1,
    rankings_per_row: int = 1,
    reasoning: ReasoningTokens | None = None,
    pad_token_id: int = 0,
    device: torch.device | str = "cpu",
    by_token: bool = False,
    one_pass: bool = False,
) -> RankingBatch:
    """Model inputs that score ``rankings`` (N, T; -1 beyond a row's own) under P prompts and candidate lists.

    With ``rankings_per_row`` > 1 the rankings of a prompt share it: see :mod:`flexrec.policy.packing`. ``reasoning``,
    that of a rollout, stands between a prompt and its ranking, and :func:`reasoning_logprobs` scores it. With
    ``by_token`` candidates of a single token are treated as those of several are. Tokens may be sums
    (:mod:`flexrec.policy.row_tokens`). Candidates that are read in the prompt (:mod:`flexrec.policy.places`) have no
    answers: a row is a prompt, whatever ``rankings_per_row`` says. So it is with ``one_pass``, where rankings are drawn
    from the Plackett-Luce model of the first decision's logits, of candidates of a single token.
    """
    if are_places(candidates) or one_pass:
        if reasoning is not None or by_token:
            raise ValueError("rankings that one pass over the prompt decides have no answers and no reasoning")
        return _of_prompts(prompts, candidates, rankings, num_generations, pad_token_id, device)
    prompts, candidates, table = numbered(prompts, candidates, [*separator, *end])
    if table is not None and by_token:
        raise ValueError("candidates that are sums of tokens are scored as wholes: leave by_token out")
    candidate_ids = None if by_token else _single_tokens(candidates, separator, device)
    spelling: dict[str, Any] = {"separator": separator, "end": end, "with_allowed": candidate_ids is None}
    ranked = _ranked(candidates, rankings, num_generations, device, **spelling)
    encoded = ranked["encoded"]
    answers = [answer[:-1] for answer in np.split(encoded.tokens, encoded.offsets[1:-1])]  # what predicts the next
    if reasoning is not None:
        if len(reasoning.tokens) != len(answers):
            raise ValueError(f"reasoning must have one row per ranking, {len(answers)}, got {len(reasoning.tokens)}")
        said: Sequence[np.ndarray] = reasoning.tokens
        if table is not None:
            tokens_said, size = np.unique(np.concatenate(said)), len(table)
            table = table.and_tokens(tokens_said)
            said = [size + np.searchsorted(tokens_said, row) for row in said]
        answers = [np.concatenate(pair) for pair in zip(said, answers, strict=True)]
    tokens = pack_rankings(
        prompts,
        answers,
        num_generations=num_generations,
        per_row=rankings_per_row,
        table=table,
        pad_token_id=pad_token_id,
        device=device,
    )
    return RankingBatch(tokens=tokens, **ranked, candidate_ids=candidate_ids, reasoning=reasoning)


def _of_prompts(
    prompts: Prompts,
    candidates: CandidateLists,
    rankings: np.ndarray,
    num_generations: int,
    pad_token_id: int,
    device: torch.device | str,
) -> RankingBatch:
    """Rows that are prompts alone, as one pass over them says all."""
    places, table = None, None
    sizes = torch.tensor([len(lst) for lst in candidates])
    if are_places(candidates):
        places = places_of(prompts, candidates)  # type: ignore[arg-type]
        ids = numbers_of(sizes)
    else:
        prompts, candidates, table = numbered(prompts, candidates, ())
        found = _single_tokens(candidates, (), "cpu")
        if found is None:
            raise ValueError(
                "one pass over the prompt decides among candidates of one token each: use encoding 'label', "
                "'item_token' or 'score'"
            )
        ids = found
    nothing = [np.zeros(0, dtype=np.int64)] * len(prompts)
    return RankingBatch(
        tokens=pack_rankings(prompts, nothing, table=table, pad_token_id=pad_token_id, device=device),  # type: ignore[arg-type]
        **_ranked(_indices(sizes), rankings, num_generations, device, with_allowed=False),
        candidate_ids=ids.to(device),
        places=places,
        one_pass=places is None,
    )


def with_rankings(batch: RankingBatch, rankings: np.ndarray, num_generations: int = 1) -> RankingBatch:
    """A batch whose rows are prompts alone, with other ``rankings`` (P * num_generations, T) of the same lists."""
    if batch.places is None and not batch.one_pass:
        raise ValueError("the rows of this batch spell its rankings, others need rows of their own: use make_batch")
    lists = _indices(batch.lengths[:: batch.num_generations])
    return replace(batch, **_ranked(lists, rankings, num_generations, batch.rankings.device, with_allowed=False))


def _indices(sizes: torch.Tensor) -> Candidates:
    """Lists of ``sizes`` (P,) whose candidates are spelled by their index, where no answer spells them."""
    return [[[k] for k in range(size)] for size in sizes.tolist()]


def _ranked(
    candidates: Candidates, rankings: np.ndarray, num_generations: int, device: torch.device | str, **spelling: Any
) -> dict[str, Any]:
    """What a batch says of its rankings."""
    places = np.asarray(rankings)
    lengths = torch.tensor([len(lst) for lst in candidates]).repeat_interleave(num_generations)
    return {
        "rankings": torch.as_tensor(places, dtype=torch.int64).to(device),
        "lengths": lengths.to(device),
        "encoded": encode_rankings(
            candidates,
            rankings,
            num_ranked=(places >= 0).sum(axis=1),
            num_generations=num_generations,
            **spelling,
        ),
        "num_generations": num_generations,
    }


def numbers_of(sizes: torch.Tensor) -> torch.Tensor:
    """(P, K) int64 a number for each candidate of lists of ``sizes`` (P,); behind a list's own its first."""
    width = int(sizes.max())
    ids = torch.arange(len(sizes) * width, device=sizes.device).view(-1, width)
    return torch.where(torch.arange(width, device=sizes.device) < sizes[:, None], ids, ids[:, :1])


def _single_tokens(candidates: Candidates, separator: Sequence[int], device: torch.device | str) -> torch.Tensor | None:
    """(P, K) token ids, padded with 0, if each candidate is one token and nothing stands between two of them."""
    if separator or any(len(sequence) != 1 for lst in candidates for sequence in lst):
        return None
    ids = np.zeros((len(candidates), max(map(len, candidates))), dtype=np.int64)
    for p, lst in enumerate(candidates):
        ids[p, : len(lst)] = [sequence[0] for sequence in lst]
    return torch.from_numpy(ids).to(device)
