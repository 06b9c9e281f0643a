"""Candidates that are read where they stand in the prompt, all in one pass, instead of being named in an answer.

A prompt of encoding "score" names the need, then the candidates, each followed by a question. A causal model's state at
the question has read the need and the candidate, and the candidate's score is how much rather it would go on with "yes"
than with "no" there,

    s_k = logit_yes(h_k) - logit_no(h_k) = <h_k, w_yes - w_no> + b_yes - b_no.

A ranking is drawn from the Plackett-Luce model of these scores: at every rank, a softmax over those of what remains. So
to all that scores rankings the states are ones of width 1, and the output rows the scores themselves, and every
credit, objective and exact probability of single tokens is that of these rankings, too. There is nothing to decode: a
list costs one pass over its prompt, however many rankings are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from flexrec.policy.lm_head import capped, wide
from flexrec.policy.packing import TokenRows
from flexrec.task.labels import Place


class Places(NamedTuple):
    """The places of a batch."""

    before_end: np.ndarray  # (P, K) int64, 1 behind a list's own candidates
    yes: int
    no: int


def are_places(candidates: Sequence[Sequence[Sequence[Any]]]) -> bool:
    """Whether the candidates of a batch are read in the prompt.

    Raises:
        ValueError: some are, and others are named in an answer.
    """
    found = {isinstance(token, Place) for lst in candidates for sequence in lst for token in sequence}
    if len(found) > 1 or (True in found and any(len(sequence) != 1 for lst in candidates for sequence in lst)):
        raise ValueError("either every candidate of a batch is one Place in its prompt, or none is")
    return found == {True}


def places_of(prompts: Sequence[Sequence[Any]], candidates: Sequence[Sequence[Sequence[Place]]]) -> Places:
    """The places of P lists.

    Raises:
        ValueError: a place outside of its prompt, or questions that are answered by different words.
    """
    words = {(place.yes, place.no) for lst in candidates for (place,) in lst}
    if len(words) != 1:
        raise ValueError(f"the candidates of a batch are to be answered by the same two tokens, got {sorted(words)}")
    before_end = np.ones((len(candidates), max(map(len, candidates))), dtype=np.int64)
    for p, (prompt, lst) in enumerate(zip(prompts, candidates, strict=True)):
        before_end[p, : len(lst)] = [place.before_end for (place,) in lst]
        if before_end[p].min() < 1 or before_end[p].max() > len(prompt):
            raise ValueError(f"list {p}: a candidate is read outside of its prompt, which has {len(prompt)} tokens")
    return Places(before_end, *words.pop())


def scores_in_place(
    places: Places,
    rows: TokenRows,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cap: float | None = None,
) -> torch.Tensor:
    """(P, K) scores, of at least float32, from the states ``hidden`` (B, L, D) of the prompts; differentiable.

    Args:
        rows: the prompts, without answers.
        weight, bias: of the output layer, (V, D) and (V,) or None.
        cap: what the model's logits are bent by (:func:`flexrec.policy.lm_head.soft_cap`).
    """
    ends = (rows.prompt_start + rows.prompt_length)[:, None]  # (P, 1)
    flat = torch.from_numpy(rows.row[:, None] * hidden.shape[1] + ends - places.before_end)  # (P, K)
    states = wide(hidden.flatten(0, 1)[flat.to(hidden.device)])  # (P, K, D)
    words = [places.yes, places.no]
    with torch.autocast(states.device.type, enabled=False):  # whose products are of bfloat16, too coarse to tell scores
        if cap is None:
            scores = states @ (wide(weight[places.yes]) - wide(weight[places.no]))
            return scores if bias is None else scores + wide(bias[places.yes] - bias[places.no])
        both = states @ wide(weight[words]).mT  # (P, K, 2)
        both = capped(both if bias is None else both + wide(bias[words]), cap)
        return both[..., 0] - both[..., 1]
