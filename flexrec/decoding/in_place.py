"""Rankings of candidates that are read in their prompts (:mod:`flexrec.policy.places`): one pass, nothing decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flexrec.ops.ranking_logprobs import ranking_logprobs
from flexrec.policy.batch import make_batch
from flexrec.policy.row_tokens import CandidateLists, Prompts
from flexrec.policy.scores import ranking_states
from flexrec.profiling import span


@torch.no_grad()
def rank_in_place(
    model: Any,
    prompts: Prompts,
    candidates: CandidateLists,
    *,
    num_generations: int,
    num_ranked: int | None,
    temperature: float,
    greedy: bool,
    generator: torch.Generator | None,
    pad_token_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Rankings (N, T) and their items' log-probs (N, T), 0 where nothing was left to choose; as ``sample_rankings``.

    The order of (score / temperature + Gumbel noise) is a sample of the Plackett-Luce model (Yellott 1977), and that of
    the scores its mode.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: use greedy=True for the mode")
    sizes = np.array([len(lst) for lst in candidates])
    lengths = np.repeat(sizes, num_generations)  # (N,)
    ranks = np.minimum(lengths, num_ranked or lengths)
    unknown = np.where(np.arange(sizes.max()) < sizes[:, None], np.arange(sizes.max()), -1)
    training = model.training
    model.eval()
    try:
        batch = make_batch(prompts, candidates, unknown, pad_token_id=pad_token_id, device=_device(model))
        with span("prefill"):
            scores = ranking_states(model, batch).weight.view(len(sizes), -1)  # (P, K)
    finally:
        model.train(training)
    assert batch.candidate_ids is not None
    keys = scores.repeat_interleave(num_generations, dim=0) / temperature  # (N, K)
    if not greedy:
        keys = keys - torch.empty_like(keys).exponential_(generator=generator).log()
    exists = torch.arange(keys.shape[1], device=keys.device) < torch.from_numpy(lengths).to(keys.device)[:, None]
    order = keys.masked_fill(~exists, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order[:, : int(ranks.max())]
    logprobs, *_ = ranking_logprobs(
        scores.new_ones(*order.shape, 1),
        scores.reshape(-1, 1),
        batch.candidate_ids,
        order,
        lengths=torch.from_numpy(lengths).to(order.device),
        temperature=temperature,
    )
    beyond = np.arange(order.shape[1]) >= ranks[:, None]
    return (
        np.where(beyond, -1, order.cpu().numpy()).astype(np.int32),
        np.where(beyond, 0.0, logprobs.cpu().numpy()).astype(np.float32),
    )


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
