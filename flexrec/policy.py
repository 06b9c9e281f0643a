"""The policy's view of rankings: model inputs for given rankings, and their candidate-restricted log-probs.

Rollout, supervised stages, trainer and evaluation all score rankings through this one module, so the distribution
that is trained, compared with a reference or reported is always the one that is sampled from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from flexrec.ops.all_actions import AllActions, all_actions_objective
from flexrec.ops.ranking_logprobs import ranking_logprobs
from flexrec.ops.restricted_kl import ranking_kl, restricted_kl
from flexrec.ops.restricted_logprobs import restricted_logprobs
from flexrec.ops.swap_rewards import swap_scores
from flexrec.rankings import EncodedRankings, encode_rankings

Candidates = Sequence[Sequence[Sequence[int]]]  # P lists of K candidates of token ids


@dataclass(frozen=True)
class RankingBatch:
    """Model inputs for N rankings of P lists (N = P * num_generations, rankings of one list adjacent).

    A decision is a token with an alternative; all other tokens of an answer are forced and carry no log-prob.
    """

    input_ids: torch.Tensor  # (N, L) int64, prompt and answer, right-padded
    attention_mask: torch.Tensor  # (N, L) int64
    rankings: torch.Tensor  # (N, T) int64, index into the row's candidates, -1 beyond a row's own
    lengths: torch.Tensor  # (N,) int64, number of candidates
    encoded: EncodedRankings
    prompt_lengths: np.ndarray  # (N,) int64
    candidate_ids: torch.Tensor | None  # (P, K) int64 token ids, where every candidate is a single token
    num_generations: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)"""
        return self.rankings.shape[0], self.rankings.shape[1]


def make_batch(
    prompts: Sequence[Sequence[int]],
    candidates: Candidates,
    rankings: np.ndarray,
    *,
    separator: Sequence[int] = (),
    end: Sequence[int] = (),
    num_generations: int = 1,
    pad_token_id: int = 0,
    device: torch.device | str = "cpu",
) -> RankingBatch:
    """Model inputs that score ``rankings`` (N, T; -1 beyond a row's own) under P prompts and candidate lists."""
    encoded = encode_rankings(
        candidates,
        rankings,
        separator=separator,
        end=end,
        num_ranked=(np.asarray(rankings) >= 0).sum(axis=1),
        num_generations=num_generations,
    )
    answers = np.split(encoded.tokens, encoded.offsets[1:-1])
    # The last token of an answer predicts nothing that is scored.
    rows = [[*prompts[n // num_generations], *answer[:-1].tolist()] for n, answer in enumerate(answers)]
    input_ids = torch.full((len(rows), max(map(len, rows))), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for n, row in enumerate(rows):
        input_ids[n, : len(row)] = torch.tensor(row)
        attention_mask[n, : len(row)] = 1
    sizes = torch.tensor([len(lst) for lst in candidates]).repeat_interleave(num_generations)
    return RankingBatch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        rankings=torch.as_tensor(np.asarray(rankings), dtype=torch.int64).to(device),
        lengths=sizes.to(device),
        encoded=encoded,
        prompt_lengths=np.repeat([len(prompt) for prompt in prompts], num_generations),
        candidate_ids=_single_tokens(candidates, separator, device),
        num_generations=num_generations,
    )


def _single_tokens(candidates: Candidates, separator: Sequence[int], device: torch.device | str) -> torch.Tensor | None:
    """(P, K) token ids, padded with 0, if each candidate is one token and nothing stands between two of them."""
    if separator or any(len(sequence) != 1 for lst in candidates for sequence in lst):
        return None
    ids = torch.zeros(len(candidates), max(map(len, candidates)), dtype=torch.int64)
    for p, lst in enumerate(candidates):
        ids[p, : len(lst)] = torch.tensor([sequence[0] for sequence in lst])
    return ids.to(device)


def final_hidden(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(N, L, D) states that enter the output layer, which itself computes nothing.

    The call goes through ``model`` itself, so that wrappers (DDP, FSDP) see their forward pass.
    """
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        output_hidden_states=True,
        use_cache=False,
        logits_to_keep=torch.empty(0, dtype=torch.int64, device=input_ids.device),
    )
    return output.hidden_states[-1]


def output_layer(model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output embedding (V, D) and its bias (V,) or None.

    Raises:
        ValueError: a model whose logits are not ``hidden @ weight.T + bias`` (soft-capped or scaled logits).
    """
    model = getattr(model, "module", model)
    config = model.config
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"this model changes its logits after the output layer ({name}={getattr(config, name)}), "
                f"which restricted log-probs do not reproduce: use a model without it"
            )
    layer = model.get_output_embeddings()
    return layer.weight, getattr(layer, "bias", None)


class RankingStates(NamedTuple):
    """What the restricted distributions of a batch are made of."""

    hidden: torch.Tensor  # (N, T, D) for single-token candidates, else (M, D): the state before each decision
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)


class RankingScores(NamedTuple):
    """Per rank, summed over the decisions of an item that has several; 0 at ranks beyond a row's own."""

    logprobs: torch.Tensor  # (N, T)
    entropy: torch.Tensor  # (N, T)


def ranking_states(model: Any, batch: RankingBatch) -> RankingStates:
    """Run the model over the batch and keep the states at decisions; differentiable."""
    return decision_states(model, batch, final_hidden(model, batch.input_ids, batch.attention_mask))


def decision_states(model: Any, batch: RankingBatch, hidden: torch.Tensor) -> RankingStates:
    """Keep the states at decisions of ``hidden`` (N, L, D), the model's states for the batch."""
    if batch.candidate_ids is not None:
        index = _steps(batch)[:, :, None].expand(-1, -1, hidden.shape[-1])
        return RankingStates(hidden.gather(1, index), *output_layer(model))
    decisions = _decisions(batch)
    return RankingStates(hidden[decisions.rows, decisions.positions], *output_layer(model))


def ranking_scores(states: RankingStates, batch: RankingBatch, *, temperature: float = 1.0) -> RankingScores:
    """Log-probs and entropies of the batch's rankings; differentiable."""
    hidden, weight, bias = states
    if batch.candidate_ids is not None:
        result = ranking_logprobs(
            hidden,
            weight,
            batch.candidate_ids,
            completed_rankings(batch),
            bias=bias,
            temperature=temperature,
            lengths=batch.lengths,
        )
        return RankingScores(*(_of_ranked(values, batch) for values in (result.logprobs, result.entropy)))
    decisions = _decisions(batch)
    result = restricted_logprobs(
        hidden, weight, decisions.ids, decisions.offsets, decisions.targets, bias=bias, temperature=temperature
    )
    return RankingScores(
        _sum_per_rank(result.logprobs, decisions, batch), _sum_per_rank(result.entropy, decisions, batch)
    )


def all_actions(
    states: RankingStates,
    batch: RankingBatch,
    gains: torch.Tensor,
    metric: str,
    *,
    temperature: float = 1.0,
    num_ranked: int | None = None,
    tilt: float | None = None,
) -> AllActions:
    """The all-actions objective of every rank for ``gains`` (N, K) in rank order (see :func:`rank_order`).

    Candidates of several tokens are chosen branch by branch: at each decision a branch is worth the mean of what
    the items below it would be worth at this rank, and the objectives of an item's decisions add up. ``tilt`` is that
    of :func:`flexrec.all_actions_objective`.
    """
    hidden, weight, bias = states
    if batch.candidate_ids is not None:
        chosen = all_actions_objective(
            hidden,
            weight,
            batch.candidate_ids,
            completed_rankings(batch),
            gains,
            metric,
            bias=bias,
            temperature=temperature,
            lengths=batch.lengths,
            num_ranked=num_ranked,
            tilt=tilt,
        )
        return AllActions(*(_of_ranked(values, batch) for values in chosen))
    decisions = _decisions(batch)
    change = _branch_values(batch, gains, metric, num_ranked)  # (nnz,)
    values = change
    best = change.new_full((len(decisions.targets),), -torch.inf)  # (M,)
    if tilt is not None:  # exp of what a branch lacks to its decision's best, so that nothing overflows
        rows = torch.arange(len(best), device=change.device).repeat_interleave(decisions.offsets.diff())
        best = best.scatter_reduce(0, rows, change, "amax")
        values = ((change - best[rows]) / tilt).exp()
    result = restricted_logprobs(
        hidden,
        weight,
        decisions.ids,
        decisions.offsets,
        decisions.targets,
        values=values[:, None],
        bias=bias,
        temperature=temperature,
    )
    assert result.expectations is not None
    objective = result.expectations[:, 0]  # (M,)
    if tilt is not None:
        objective = best + tilt * objective.clamp(min=torch.finfo(objective.dtype).tiny).log()
    return AllActions(
        _sum_per_rank(objective, decisions, batch),
        _sum_per_rank(result.logprobs, decisions, batch),
        _sum_per_rank(result.entropy, decisions, batch),
    )


def reference_kl(
    states: RankingStates, reference: RankingStates, batch: RankingBatch, *, temperature: float = 1.0
) -> torch.Tensor:
    """(N, T) exact KL(policy || reference) over the restricted support; differentiable in the policy."""
    hidden, weight, bias = states
    ref_hidden, ref_weight, ref_bias = reference
    if batch.candidate_ids is not None:
        kl = ranking_kl(
            hidden,
            weight,
            ref_hidden,
            ref_weight,
            batch.candidate_ids,
            completed_rankings(batch),
            bias=bias,
            ref_bias=ref_bias,
            temperature=temperature,
            lengths=batch.lengths,
        )
        return _of_ranked(kl, batch)
    decisions = _decisions(batch)
    kl = restricted_kl(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        decisions.ids,
        decisions.offsets,
        bias=bias,
        ref_bias=ref_bias,
        temperature=temperature,
    )
    return _sum_per_rank(kl, decisions, batch)


def rank_order(rankings: torch.Tensor, lengths: torch.Tensor, num_candidates: int) -> torch.Tensor:
    """(N, K) candidate index at each position: the ranking first, then what it left out in candidate order.

    This is the order of ``gains`` and ``values`` in the functions of tensors. Positions beyond a row's length hold
    the padding candidates.
    """
    n, t = rankings.shape
    columns = torch.arange(num_candidates, device=rankings.device)
    # Sort key: the rank where there is one, else T + candidate index; padding candidates come last.
    key = (t + columns).expand(n, -1).clone()
    placed = rankings >= 0
    rows = torch.arange(n, device=rankings.device)[:, None].expand_as(rankings)
    key[rows[placed], rankings[placed]] = torch.arange(t, device=rankings.device).expand_as(rankings)[placed]
    key[columns[None, :] >= lengths[:, None]] += num_candidates + t
    return key.argsort(dim=1)


def completed_rankings(batch: RankingBatch) -> torch.Tensor:
    """(N, T) the rankings, where a row ranks fewer than T followed by candidates it left out."""
    assert batch.candidate_ids is not None
    return rank_order(batch.rankings, batch.lengths, batch.candidate_ids.shape[1])[:, : batch.shape[1]]


def _of_ranked(values: torch.Tensor, batch: RankingBatch) -> torch.Tensor:
    """``values`` (N, T) at ranks that the row has, 0 elsewhere."""
    return torch.where(batch.rankings >= 0, values, 0.0)


def _branch_values(batch: RankingBatch, gains: torch.Tensor, metric: str, num_ranked: int | None) -> torch.Tensor:
    """(nnz,) change of the metric if the item at the rank were swapped with one below the branch, their mean."""
    encoded = batch.encoded
    scores = swap_scores(gains, metric, lengths=batch.lengths, num_ranked=num_ranked)  # (N, K, K)
    position = rank_order(batch.rankings, batch.lengths, gains.shape[1]).argsort(dim=1)  # (N, K) of each candidate
    per_branch = np.diff(encoded.allowed_offsets)
    rows = torch.as_tensor(np.repeat(encoded.decision_rows, per_branch), dtype=torch.int64, device=gains.device)
    ranks = torch.as_tensor(np.repeat(encoded.decision_ranks, per_branch), dtype=torch.int64, device=gains.device)
    counts = torch.as_tensor(np.diff(encoded.below_offsets), dtype=torch.int64, device=gains.device)
    items = torch.as_tensor(encoded.below_items, dtype=torch.int64, device=gains.device)
    branch = torch.arange(len(counts), device=gains.device).repeat_interleave(counts)
    change = -scores[rows[branch], ranks[branch], position[rows[branch], items]]
    return change.new_zeros(len(counts)).index_add(0, branch, change) / counts


class _Decisions(NamedTuple):
    rows: torch.Tensor  # (M,)
    positions: torch.Tensor  # (M,) of the state that decides, in input_ids
    ranks: torch.Tensor  # (M,)
    targets: torch.Tensor  # (M,)
    ids: torch.Tensor  # (nnz,)
    offsets: torch.Tensor  # (M + 1,)


def _decisions(batch: RankingBatch) -> _Decisions:
    encoded = batch.encoded
    arrays = (
        encoded.decision_rows,
        batch.prompt_lengths[encoded.decision_rows] - 1 + encoded.decision_positions,
        encoded.decision_ranks,
        encoded.targets,
        encoded.allowed_ids,
        encoded.allowed_offsets,
    )
    return _Decisions(*(torch.as_tensor(a, dtype=torch.int64).to(batch.input_ids.device) for a in arrays))


def _sum_per_rank(per_decision: torch.Tensor, decisions: _Decisions, batch: RankingBatch) -> torch.Tensor:
    n, t = batch.shape
    sums = per_decision.new_zeros(n * t)
    return sums.index_add(0, decisions.rows * t + decisions.ranks, per_decision).view(n, t)


def _steps(batch: RankingBatch) -> torch.Tensor:
    """(N, T) position of the state that predicts each rank of single-token candidates."""
    first = torch.as_tensor(batch.prompt_lengths - 1, device=batch.rankings.device)
    steps = first[:, None] + torch.arange(batch.shape[1], device=batch.rankings.device)
    return steps.clamp(max=batch.input_ids.shape[1] - 1)
