"""Training on rankings that another policy had shown, and by how much each counts.

A gradient of the policy's own rankings is a mean over the logged ones, each times the ratio of its probabilities under
the two policies. Ratios of a few improbable rankings would decide everything, so they are clipped: a bias for less
variance, which the log tells by the share that was clipped (Ionides 2008; Swaminathan & Joachims 2015).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flexrec.task.examples import Example
from flexrec.trainer.base import pad_rows


def logged_rankings(examples: Sequence[Example], limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Rankings (P, T) int64, -1 beyond a list's own candidates, and their log-probs (P, T) float32, 0 there.

    T is as many ranks as ``limit`` allows and all were shown: what stands below is left out, which leaves the ranks
    above as they were.

    Raises:
        ValueError: an example without a logged ranking, or one that is none of its candidates.
    """
    rankings, logprobs = [], []
    for number, example in enumerate(examples):
        if example.logged is None:
            raise ValueError(f"logged_clip trains on logged rankings, but example {number} of the batch has none")
        ranking, said = (np.asarray(array) for array in (example.logged.ranking, example.logged.logprobs))
        count = len(example.candidates)
        known = ranking.ndim == 1 and ranking.dtype.kind in "iu" and 0 < len(ranking) == len(set(ranking.tolist()))
        if not known or ranking.min() < 0 or ranking.max() >= count:
            raise ValueError(
                f"the logged ranking of example {number} must name some of its {count} candidates once each, got "
                f"{ranking.tolist()}"
            )
        if said.shape != ranking.shape or not np.isfinite(said).all() or (said > 1e-6).any():
            raise ValueError(
                f"the logged ranking of example {number} needs the log-prob that each of its {len(ranking)} ranks was "
                f"shown with, finite and at most 0, got {said.tolist()}"
            )
        rankings.append(ranking.astype(np.int64))
        logprobs.append(said)
    pairs = list(zip(rankings, examples, strict=True))
    cut = [len(ranking) for ranking, example in pairs if len(ranking) < len(example.candidates)]
    ranks = min([*cut, max(map(len, rankings)), *([] if limit is None else [limit])])
    return (
        pad_rows([ranking[:ranks] for ranking in rankings], -1),
        pad_rows([said[:ranks] for said in logprobs], 0.0).astype(np.float32),
    )


def importance_weights(
    logprobs: torch.Tensor, logged: torch.Tensor, item_mask: torch.Tensor, level: str, clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """By how much what the N logged rankings earned counts for a policy of other log-probs, at most ``clip``.

    Args:
        logprobs, logged: (N, T) of the policy and of the one that had shown them.
        item_mask: (N, T) bool, ranks that count.
        level: "sequence", the ratio of the whole ranking, which is exact; "item" or "token", that of the rank alone,
            which varies less and leaves out that other ranks would have been other.
        clip: above 0.

    Returns:
        (N, T) weights without gradient, 0 where nothing counts; and numbers for the log.
    """
    log_ratio = torch.where(item_mask, logprobs.detach() - logged, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    exact = log_ratio.clamp(max=80.0).exp()
    weights = torch.where(item_mask, exact.clamp(max=clip), 0.0)
    counted = weights[item_mask]
    told = {
        "logged/weight_mean": counted.mean(),
        "logged/clipped": (exact[item_mask] > clip).float().mean(),
        "logged/effective_share": counted.sum().square() / (counted.square().sum() * len(counted)).clamp(min=1e-30),
    }
    return weights, told
