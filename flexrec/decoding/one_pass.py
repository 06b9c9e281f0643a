"""Rankings from one pass over the prompts, nothing decoded: all candidates in the order of the first decision.

A policy's first decision is a distribution over all candidates. Ordered by it, as FIRST (arXiv 2406.15657) does, a list
costs its prompt, however long the ranking. That is exact where candidates are read in their prompts
(:mod:`flexrec.policy.places`), since what was chosen above changes nothing there, and an approximation, or a policy of
its own to be trained, where an answer names them. Rankings are drawn from the Plackett-Luce model of that distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flexrec.ops.rank_order import rank_order
from flexrec.ops.ranking_logprobs import ranking_logprobs
from flexrec.policy.batch import RankingBatch, make_batch, numbers_of, with_rankings
from flexrec.policy.packing import sharing
from flexrec.policy.places import are_places
from flexrec.policy.row_tokens import CandidateLists, Prompts
from flexrec.policy.scores import RankingStates, ranking_scores, ranking_states
from flexrec.profiling import span


@torch.no_grad()
def first_choices(
    model: Any,
    prompts: Prompts,
    candidates: CandidateLists,
    *,
    separator: Sequence[int] = (),
    end: Sequence[int] = (),
    temperature: float = 1.0,
    pad_token_id: int = 0,
) -> list[np.ndarray]:
    """How probable each candidate is to be ranked first: P arrays (K,) float32 that sum to 1.

    Unlike the probability of an item at its rank, which is one among what remains, these can be compared down the list
    and with a threshold. Arguments are those of :func:`flexrec.decoding.sample_rankings`.

    Example:
        >>> from flexrec.data import Catalogue
        >>> from flexrec.decoding.one_pass import first_choices
        >>> from flexrec.policy.small_model import build_model, build_tokenizer
        >>> tokenizer = build_tokenizer(Catalogue(("a",), ("a",), ((),)), [])
        >>> model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
        >>> (probs,) = first_choices(model, [[5, 6, 7]], [[[10, 20], [10, 21], [11]]])  # one prompt, three candidates
        >>> probs.shape, round(float(probs.sum()), 3)
        ((3,), 1.0)
    """
    scores = _scores(model, prompts, candidates, separator, separator or end, temperature, pad_token_id)
    probs = scores.softmax(dim=1).cpu().numpy()
    return [row[: len(lst)] for row, lst in zip(probs, candidates, strict=True)]


@torch.no_grad()
def rank_in_one_pass(
    model: Any,
    prompts: Prompts,
    candidates: CandidateLists,
    *,
    separator: Sequence[int],
    end: Sequence[int],
    num_generations: int,
    num_ranked: int | None,
    temperature: float,
    greedy: bool,
    generator: torch.Generator | None,
    pad_token_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Rankings (N, T) and their items' log-probs (N, T), 0 where nothing was left to choose; as ``sample_rankings``."""
    behind = end if num_ranked == 1 else separator or end
    scores = _scores(model, prompts, candidates, separator, behind, temperature, pad_token_id)  # (P, K)
    sizes = torch.tensor([len(lst) for lst in candidates], device=scores.device)
    rankings = _drawn(scores, sizes, num_generations, num_ranked, greedy, generator)
    lengths = sizes.repeat_interleave(num_generations)  # (N,)
    logprobs, *_ = ranking_logprobs(
        scores.new_ones(*rankings.shape, 1),
        scores.masked_fill(scores.isneginf(), 0.0).reshape(-1, 1),  # behind a list's own
        numbers_of(sizes),
        rank_order(rankings, lengths, scores.shape[1])[:, : rankings.shape[1]],
        lengths=lengths,
    )
    logprobs = torch.where(rankings >= 0, logprobs, 0.0)
    return rankings.cpu().numpy().astype(np.int32), logprobs.cpu().numpy().astype(np.float32)


def draw_from_states(
    states: RankingStates,
    batch: RankingBatch,
    *,
    num_generations: int,
    num_ranked: int | None,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[RankingBatch, RankingStates]:
    """Rankings of a batch of prompts alone, drawn from its states, and these states as those of the new rankings.

    The policy that draws is the one that an update on the rankings begins from, and its states do not depend on what is
    drawn: with their gradient they serve for both, and a step of reinforcement takes a single pass.

    Args:
        batch: of ``make_batch`` with ``one_pass`` or places; its own rankings do not matter.
        the others: those of :func:`flexrec.decoding.sample_rankings`.
    """
    sizes = batch.lengths[:: batch.num_generations]
    scores = _of_states(states, sizes, temperature)
    rankings = _drawn(scores, sizes, num_generations, num_ranked, greedy=False, generator=generator)
    drawn = with_rankings(batch, rankings.cpu().numpy(), num_generations)
    return drawn, states._replace(hidden=states.hidden.new_ones(*drawn.shape, 1))


def _of_states(states: RankingStates, sizes: torch.Tensor, temperature: float) -> torch.Tensor:
    """(P, K) the scores that the states of a batch of prompts alone hold, without their gradient."""
    scores = states.weight.detach().view(len(sizes), -1).float() / temperature
    return scores.masked_fill(torch.arange(scores.shape[1], device=sizes.device) >= sizes[:, None], -torch.inf)


def _drawn(
    scores: torch.Tensor,
    sizes: torch.Tensor,
    num_generations: int,
    num_ranked: int | None,
    greedy: bool,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """(N, T) int64 rankings of ``scores`` (P, K) of lists of ``sizes`` (P,), -1 beyond a row's own.

    The order of (score + Gumbel noise) is a sample of the Plackett-Luce model (Yellott 1977), and that of the scores
    its mode.
    """
    ranks = sizes.clamp(max=num_ranked or scores.shape[1]).repeat_interleave(num_generations)  # (N,)
    keys = scores.repeat_interleave(num_generations, dim=0)  # (N, K)
    if not greedy:
        keys = keys - torch.empty_like(keys).exponential_(generator=generator).log()
    order = keys.argsort(dim=1, descending=True, stable=True)[:, : int(ranks.max())]
    return order.masked_fill(torch.arange(order.shape[1], device=order.device) >= ranks[:, None], -1)


def _scores(
    model: Any,
    prompts: Prompts,
    candidates: CandidateLists,
    separator: Sequence[int],
    behind: Sequence[int],
    temperature: float,
    pad_token_id: int,
) -> torch.Tensor:
    """(P, K) float32 log-probs of the first choice up to a constant of the list, -inf behind its own candidates.

    Args:
        behind: what comes after the first item. Where a candidate begins with another one's tokens, it is an
            alternative to going on: of an answer of several items that is the separator, not the end.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: use greedy=True for the mode")
    if len(prompts) != len(candidates):
        raise ValueError(f"got {len(prompts)} prompts and {len(candidates)} lists of candidates")
    sizes = torch.tensor([len(lst) for lst in candidates])  # (P,)
    exists = torch.arange(int(sizes.max())) < sizes[:, None]  # (P, K)
    everything = torch.where(exists, torch.arange(exists.shape[1]), -1).numpy()
    device = next(model.parameters()).device
    one_token = are_places(candidates) or (
        not len(separator) and all(len(sequence) == 1 for lst in candidates for sequence in lst)
    )
    training = model.training
    model.eval()
    try:
        with span("prefill"):
            if one_token:
                batch = make_batch(
                    prompts, candidates, everything, pad_token_id=pad_token_id, device=device, one_pass=True
                )
                return _of_states(ranking_states(model, batch), batch.lengths, temperature)
            # A ranking of one item for each candidate; those of a prompt share it.
            spelled: dict[str, Any] = {"separator": separator, "end": behind}
            width = exists.shape[1]
            share = sharing(model, prompts, candidates, separator=separator, num_ranked=1, num_generations=width)
            batch = make_batch(
                prompts,
                candidates,
                np.maximum(everything, 0).reshape(-1, 1),
                num_generations=width,
                rankings_per_row=share,
                pad_token_id=pad_token_id,
                device=device,
                **spelled,
            )
            scores = ranking_scores(ranking_states(model, batch), batch, temperature=temperature).logprobs
    finally:
        model.train(training)
    return scores.view(exists.shape).float().masked_fill(~exists.to(device), -torch.inf)
