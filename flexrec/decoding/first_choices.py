"""How probable each candidate is to be ranked first: a number that can be compared down a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flexrec.policy.batch import RankingBatch, make_batch
from flexrec.policy.packing import sharing
from flexrec.policy.row_tokens import CandidateLists, Prompts
from flexrec.policy.scores import RankingStates, output_rows, ranking_scores, ranking_states


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
        >>> from flexrec.decoding.first_choices import first_choices
        >>> from flexrec.policy.small_model import build_model, build_tokenizer
        >>> tokenizer = build_tokenizer(Catalogue(("a",), ("a",), ((),)), [])
        >>> model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
        >>> (probs,) = first_choices(model, [[5, 6, 7]], [[[10, 20], [10, 21], [11]]])  # one prompt, three candidates
        >>> probs.shape, round(float(probs.sum()), 3)
        ((3,), 1.0)
    """
    sizes = [len(lst) for lst in candidates]
    exists = np.arange(max(sizes)) < np.array(sizes)[:, None]  # (P, K)
    options: dict[str, Any] = {"separator": separator, "end": end, "pad_token_id": pad_token_id}
    options["device"] = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        batch = make_batch(prompts, candidates, np.zeros((len(sizes), 1), dtype=np.int64), **options)
        if batch.candidate_ids is not None:
            scores = _scores_of_tokens(ranking_states(model, batch), batch) / temperature
        else:  # a ranking of one item for each candidate; those of a prompt share its row
            items = np.where(exists, np.arange(exists.shape[1]), 0).reshape(-1, 1)
            share = sharing(
                model, prompts, candidates, separator=separator, num_ranked=1, num_generations=exists.shape[1]
            )
            batch = make_batch(
                prompts, candidates, items, num_generations=exists.shape[1], rankings_per_row=share, **options
            )
            scores = ranking_scores(ranking_states(model, batch), batch, temperature=temperature).logprobs
    finally:
        model.train(training)
    scores = scores.view(exists.shape).float().masked_fill(~torch.from_numpy(exists).to(scores.device), -torch.inf)
    return [row[:size] for row, size in zip(scores.softmax(dim=1).cpu().numpy(), sizes, strict=True)]


def _scores_of_tokens(states: RankingStates, batch: RankingBatch) -> torch.Tensor:
    """(P, K) logits of the first decision, where every candidate is a token or is read in its prompt."""
    assert batch.candidate_ids is not None
    if batch.places is not None:
        return states.weight.view(batch.candidate_ids.shape)
    rows = output_rows(states, batch)
    scores = torch.bmm(rows.weight[rows.candidates], states.hidden[:, 0, :, None])[:, :, 0]  # (P, K)
    return scores if rows.bias is None else scores + rows.bias[rows.candidates]
