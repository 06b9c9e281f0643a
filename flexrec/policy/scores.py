"""The policy's view of rankings: their candidate-restricted log-probs.

Supervised stages, trainer, evaluation and integrations all score rankings through this one module, so the distribution
that is trained, compared with a reference or reported is always the one that is sampled from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from flexrec.ops.all_actions import all_actions_objective, all_actions_objective_with_kl
from flexrec.ops.all_actions import all_actions_of_scores as objective_of_scores
from flexrec.ops.rank_order import rank_order
from flexrec.ops.ranking_logprobs import ranking_logprobs, ranking_logprobs_with_kl
from flexrec.ops.restricted_logprobs import Results, restricted_logprobs, restricted_logprobs_with_kl
from flexrec.ops.swap_rewards import swap_scores
from flexrec.ops.vocabulary_logprobs import vocabulary_logprobs
from flexrec.policy.batch import RankingBatch, numbers_of
from flexrec.policy.lm_head import capped, hidden_of_rows, output_layer, soft_cap, wide
from flexrec.policy.places import scores_in_place

_ENTRIES = 4096  # of capped logits whose products exist at a time


class RankingStates(NamedTuple):
    """What the restricted distributions of a batch are made of."""

    hidden: torch.Tensor  # (N, T, D) for single-token candidates, else (M, D): the state before each decision
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    reasoning: RankingStates | None = None  # (M, D) and so on, before each sampled token of the reasoning
    candidates: torch.Tensor | None = None  # (P, K) int64 rows of the weight, where they are not the batch's tokens
    cap: float | None = None  # of decisions of several tokens, and of the reasoning: logits are still to be bent


class RankingScores(NamedTuple):
    """Per rank, summed over the decisions of an item that has several; 0 at ranks beyond a row's own."""

    logprobs: torch.Tensor  # (N, T)
    entropy: torch.Tensor  # (N, T)
    kl: torch.Tensor | None  # (N, T) exact KL(policy || reference), where a reference was given


class ActionScores(NamedTuple):
    """:class:`RankingScores` and the all-actions objective (N, T) of every rank."""

    objective: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor | None


def ranking_states(model: Any, batch: RankingBatch) -> RankingStates:
    """Run the model over the batch and keep the states at decisions; differentiable."""
    return decision_states(model, batch, hidden_of_rows(model, batch.tokens))


def decision_states(model: Any, batch: RankingBatch, hidden: torch.Tensor) -> RankingStates:
    """Keep the states at decisions of ``hidden`` (B, L, D), the model's states for the batch.

    Where one pass over the prompts says all, the states are ones, and the weight (P K, 1) the candidates' scores. Where
    logits are capped, the states (N, T, K) are the capped logits of the candidates, and the weight is a unit matrix.
    """
    output, cap = output_layer(model), soft_cap(model)
    if batch.places is not None or batch.one_pass:
        if batch.places is not None:
            scores = scores_in_place(batch.places, batch.tokens, hidden, *output, cap)
        else:
            scores = _first_logits(batch, hidden, *output, cap)
        of_each = numbers_of(batch.lengths[:: batch.num_generations])
        return RankingStates(scores.new_ones(*batch.shape, 1), scores.reshape(-1, 1), None, candidates=of_each)
    of_reasoning, start = None, np.zeros(batch.shape[0], dtype=np.int64)  # (N,) where the rankings begin
    if batch.reasoning is not None:
        start = batch.reasoning.lengths
        before = _states_before(batch, hidden, *batch.reasoning_mask.cpu().numpy().nonzero())
        of_reasoning = RankingStates(before, *output, cap=cap)
    if batch.candidate_ids is not None:
        n, t = batch.shape
        rankings, steps = np.repeat(np.arange(n), t), np.tile(np.arange(t), n)
        states = _states_before(batch, hidden, rankings, start[rankings] + steps).view(n, t, -1)
        if cap is not None:
            logits = capped(_logits_of_candidates(states, _rows_of_tokens(*output, batch)), cap)
            unit = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
            numbers = torch.arange(len(unit), device=logits.device).expand_as(batch.candidate_ids)
            return RankingStates(logits, unit, None, of_reasoning, numbers)
    else:
        rows, positions = batch.encoded.decision_rows, batch.encoded.decision_positions
        states = _states_before(batch, hidden, rows, start[rows] + positions)
    return RankingStates(states, *output, of_reasoning, cap=cap)


def _first_logits(
    batch: RankingBatch, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cap: float | None
) -> torch.Tensor:
    """(P, K) logits of the candidates behind their prompts."""
    assert batch.candidate_ids is not None
    prompts = np.arange(len(batch.candidate_ids))
    states = _states_before(batch, hidden, prompts, np.zeros_like(prompts))  # (P, D)
    return capped(_logits_of_candidates(states[:, None], _rows_of_tokens(weight, bias, batch))[:, 0], cap)


def _logits_of_candidates(states: torch.Tensor, rows: OutputRows) -> torch.Tensor:
    """(N, T, K) logits, of at least float32, at ``states`` (N, T, D) of N / P rankings of each of P lists."""
    n, t, d = states.shape
    size, k = rows.candidates.shape
    with torch.autocast(states.device.type, enabled=False):  # whose products are of bfloat16
        of_lists = wide(states).reshape(size, -1, d)  # (P, N / P T, D)
        logits = (of_lists @ wide(rows.weight[rows.candidates]).mT).view(n, t, k)
    if rows.bias is None:
        return logits
    return logits + wide(rows.bias[rows.candidates]).repeat_interleave(n // size, dim=0)[:, None]


def _states_before(
    batch: RankingBatch, hidden: torch.Tensor, rankings: np.ndarray, positions: np.ndarray
) -> torch.Tensor:
    """(M, D) states that predict the answers' tokens at ``positions`` (M,) of ``rankings`` (M,)."""
    columns = batch.tokens.predicting_columns(rankings, positions)
    # Beyond a row's own ranks there is no state; what is read there counts nowhere.
    columns = np.minimum(columns, hidden.shape[1] - 1)
    flat = torch.from_numpy(batch.tokens.row[rankings] * hidden.shape[1] + columns)
    return hidden.flatten(0, 1).index_select(0, flat.to(hidden.device))


def reasoning_logprobs(states: RankingStates, batch: RankingBatch, *, temperature: float = 1.0) -> torch.Tensor:
    """(N, R) log-probs of the batch's reasoning under the whole vocabulary, 0 where ``batch.reasoning_mask`` is False.

    Differentiable in ``states``. Memory is that of :func:`flexrec.ops.vocabulary_logprobs.vocabulary_logprobs`.
    """
    if batch.reasoning is None or states.reasoning is None:
        raise ValueError("the batch holds no reasoning: give make_batch that of the rollout")
    before = states.reasoning
    mask = batch.reasoning_mask
    sampled = [row[:count] for row, count in zip(batch.reasoning.tokens, batch.reasoning.num_sampled, strict=True)]
    targets = torch.from_numpy(np.concatenate(sampled).astype(np.int64)).to(mask.device)
    logprobs = vocabulary_logprobs(
        before.hidden,
        before.weight,
        targets,
        bias=before.bias,
        temperature=temperature,
        soft_cap=before.cap,
        never=batch.reasoning.never,
    )
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)


def ranking_scores(
    states: RankingStates, batch: RankingBatch, *, temperature: float = 1.0, reference: RankingStates | None = None
) -> RankingScores:
    """Log-probs and entropies of the batch's rankings, and in the same pass their KL from a reference.

    Differentiable in ``states``; ``reference``, another model's states for the same batch, gets no gradient. Its logits
    must be bent like the policy's (:func:`flexrec.policy.lm_head.soft_cap`): ``ValueError`` where only one's are.
    """
    _check_reference(states, reference)
    if batch.candidate_ids is None:
        return _sum_scores(decision_scores(states, batch, temperature=temperature, reference=reference), batch)
    rows = output_rows(states, batch)
    arguments = (states.hidden, rows.weight, rows.candidates, completed_rankings(batch))
    options: dict[str, Any] = {"bias": rows.bias, "temperature": temperature, "lengths": batch.lengths}
    if reference is None:
        logprobs, entropy, _ = ranking_logprobs(*arguments, **options)
        return RankingScores(_of_ranked(logprobs, batch), _of_ranked(entropy, batch), None)
    logprobs, entropy, _, kl = ranking_logprobs_with_kl(
        *arguments, **options | _reference_arguments(reference, output_rows(reference, batch))
    )
    return RankingScores(*(_of_ranked(values, batch) for values in (logprobs, entropy, kl)))


def all_actions(
    states: RankingStates,
    batch: RankingBatch,
    gains: torch.Tensor,
    metric: str,
    *,
    temperature: float = 1.0,
    num_ranked: int | None = None,
    tilt: float | None = None,
    foresight: float | str | None = None,
    reference: RankingStates | None = None,
) -> ActionScores:
    """The all-actions objective of every rank for ``gains`` (N, K) in rank order (see :func:`rank_order`).

    Candidates of several tokens are chosen branch by branch: at each decision a branch is worth the mean of what
    the items below it would be worth at this rank, and the objectives of an item's decisions add up. ``tilt`` and
    ``foresight``, which needs candidates of one token, are those of :func:`flexrec.all_actions_objective`,
    ``reference`` that of :func:`ranking_scores`.
    """
    _check_reference(states, reference)
    if batch.candidate_ids is None:
        if foresight is not None:
            raise ValueError(
                "credit='all_actions_corrected' needs the probability of whole items: use encoding 'item_token'"
            )
        scores = swap_scores(gains, metric, lengths=batch.lengths, num_ranked=num_ranked)
        return _all_actions_over_branches(states, batch, scores, temperature, tilt, reference)
    rows = output_rows(states, batch)
    arguments = (states.hidden, rows.weight, rows.candidates, completed_rankings(batch), gains, metric)
    options: dict[str, Any] = {"bias": rows.bias, "temperature": temperature, "lengths": batch.lengths}
    options |= {"num_ranked": num_ranked, "tilt": tilt, "foresight": foresight}
    if reference is None:
        found = all_actions_objective(*arguments, **options)
        objective, logprobs, entropy = (_of_ranked(values, batch) for values in found)
        return ActionScores(objective, logprobs, entropy, None)
    found_with_kl = all_actions_objective_with_kl(
        *arguments, **options | _reference_arguments(reference, output_rows(reference, batch))
    )
    return ActionScores(*(_of_ranked(values, batch) for values in found_with_kl))


def all_actions_of_scores(
    states: RankingStates,
    batch: RankingBatch,
    scores: torch.Tensor,
    *,
    temperature: float = 1.0,
    tilt: float | None = None,
    reference: RankingStates | None = None,
) -> ActionScores:
    """:func:`all_actions` from swap scores (N, K, K), where the rankings of a batch differ in their metric."""
    _check_reference(states, reference)
    if batch.candidate_ids is None:
        return _all_actions_over_branches(states, batch, scores, temperature, tilt, reference)
    rows = output_rows(states, batch)
    objective, logprobs, entropy, kl = objective_of_scores(
        *(states.hidden, rows.weight, rows.candidates, completed_rankings(batch), scores),
        **({} if reference is None else _reference_arguments(reference, output_rows(reference, batch))),
        bias=rows.bias,
        temperature=temperature,
        lengths=batch.lengths,
        tilt=tilt,
    )
    objective, logprobs, entropy = (_of_ranked(values, batch) for values in (objective, logprobs, entropy))
    return ActionScores(objective, logprobs, entropy, None if kl is None else _of_ranked(kl, batch))


def _all_actions_over_branches(
    states: RankingStates,
    batch: RankingBatch,
    scores: torch.Tensor,
    temperature: float,
    tilt: float | None,
    reference: RankingStates | None,
) -> ActionScores:
    change = _branch_values(batch, scores)  # (nnz,)
    values = change
    best = change.new_full((len(batch.encoded.targets),), -torch.inf)  # (M,)
    if tilt is not None:  # exp of what a branch lacks to its decision's best, so that nothing overflows
        per_decision = _on_device(np.diff(batch.encoded.allowed_offsets), batch)
        rows = torch.arange(len(best), device=change.device).repeat_interleave(per_decision)
        best = best.scatter_reduce(0, rows, change, "amax")
        values = ((change - best[rows]) / tilt).exp()
    found = decision_scores(states, batch, temperature=temperature, reference=reference, values=values[:, None])
    assert found.expectations is not None
    objective = found.expectations[:, 0]  # (M,)
    if tilt is not None:
        objective = best + tilt * objective.clamp(min=torch.finfo(objective.dtype).tiny).log()
    return ActionScores(_sum_per_rank(objective, batch), *_sum_scores(found, batch))


def decision_scores(
    states: RankingStates,
    batch: RankingBatch,
    *,
    temperature: float = 1.0,
    reference: RankingStates | None = None,
    values: torch.Tensor | None = None,
) -> Results:
    """Log-probs (M,), entropies (M,), expectations of ``values`` (nnz, C) and KL of the batch's decisions one by one.

    Decisions are those of ``batch.encoded``, in its order; the batch says what was allowed at each (see
    :func:`make_batch`, ``by_token``). Differentiable as :func:`ranking_scores`.
    """
    _check_reference(states, reference)
    encoded = batch.encoded
    arrays = (encoded.allowed_ids, encoded.allowed_offsets, encoded.targets)
    ids, offsets, targets = (_on_device(array, batch) for array in arrays)
    if states.cap is not None:  # an entry for each logit, once it is bent
        rows = torch.arange(len(targets), device=ids.device).repeat_interleave(offsets.diff())
        chosen = (ids == targets[rows]).nonzero()[:, 0]
        states = _capped_decisions(states, ids, rows)
        if reference is not None:
            with torch.no_grad():
                reference = _capped_decisions(reference, ids, rows)
        ids, targets = torch.arange(len(ids), device=ids.device), chosen
    arguments = (states.hidden, states.weight, ids, offsets, targets)
    options: dict[str, Any] = {"values": values, "bias": states.bias, "temperature": temperature}
    if reference is None:
        return Results(*restricted_logprobs(*arguments, **options), None)
    return Results(*restricted_logprobs_with_kl(*arguments, **options | _reference_arguments(reference, reference)))


def _capped_decisions(states: RankingStates, ids: torch.Tensor, rows: torch.Tensor) -> RankingStates:
    """States of ones (M, 1); the capped logits of the allowed ``ids`` (nnz,) of ``rows`` (nnz,) as a weight (nnz, 1).

    The products exist for some thousand entries at a time, and are formed once more in the backward pass.
    """

    def of_some(hidden: torch.Tensor, weight: torch.Tensor, some: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return (wide(hidden[of]) * wide(weight[some])).sum(dim=1)

    with torch.autocast(states.hidden.device.type, enabled=False):
        parts = zip(ids.split(_ENTRIES), rows.split(_ENTRIES), strict=True)
        logits = [checkpoint(of_some, states.hidden, states.weight, *part, use_reentrant=False) for part in parts]
    bias = 0.0 if states.bias is None else wide(states.bias[ids])
    bent = capped(torch.cat(logits) + bias, states.cap)
    return RankingStates(bent.new_ones(len(states.hidden), 1), bent[:, None], None)


class OutputRows(NamedTuple):
    """What candidates of a single token are scored by: rows of ``weight`` (R, D) and ``bias`` (R,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    candidates: torch.Tensor  # (P, K) int64, each candidate's row


def output_rows(states: RankingStates, batch: RankingBatch) -> OutputRows:
    """The vocabulary's rows, or, where candidates are sums or their scores are known, rows of their own."""
    if states.candidates is not None:
        return OutputRows(states.weight, states.bias, states.candidates)
    return _rows_of_tokens(states.weight, states.bias, batch)


def _rows_of_tokens(weight: torch.Tensor, bias: torch.Tensor | None, batch: RankingBatch) -> OutputRows:
    assert batch.candidate_ids is not None
    table = batch.tokens.table
    if table is None:
        return OutputRows(weight, bias, batch.candidate_ids)
    of_candidates = table.take(np.arange(batch.candidate_ids.numel()))
    return OutputRows(*of_candidates.summed(weight, bias), batch.candidate_ids)


def _check_reference(states: RankingStates, reference: RankingStates | None) -> None:
    """Capped logits are no states that a head makes logits of: one reader cannot take both."""
    if reference is None:
        return
    bent, of_reference = ((one.cap is not None, one.candidates is not None) for one in (states, reference))
    if bent != of_reference:
        raise ValueError(
            "reference: its logits have a soft cap and the policy's have none, or the other way round: use a reference "
            "of the policy's architecture"
        )


def _reference_arguments(reference: RankingStates, rows: OutputRows | RankingStates) -> dict[str, Any]:
    return {"ref_hidden": reference.hidden, "ref_weight": rows.weight, "ref_bias": rows.bias}


def completed_rankings(batch: RankingBatch) -> torch.Tensor:
    """(N, T) the rankings, where a row ranks fewer than T followed by candidates it left out."""
    assert batch.candidate_ids is not None
    return rank_order(batch.rankings, batch.lengths, batch.candidate_ids.shape[1])[:, : batch.shape[1]]


def _of_ranked(values: torch.Tensor, batch: RankingBatch) -> torch.Tensor:
    """``values`` (N, T) at ranks that the row has, 0 elsewhere."""
    return torch.where(batch.rankings >= 0, values, 0.0)


def _branch_values(batch: RankingBatch, scores: torch.Tensor) -> torch.Tensor:
    """(nnz,) change of the metric if the item at the rank were swapped with one below the branch, their mean.

    ``scores`` (N, K, K) are the swap scores.
    """
    encoded = batch.encoded
    position = rank_order(batch.rankings, batch.lengths, scores.shape[1]).argsort(dim=1)  # (N, K) of each candidate
    per_branch = np.diff(encoded.allowed_offsets)
    rows = _on_device(np.repeat(encoded.decision_rows, per_branch), batch)
    ranks = _on_device(np.repeat(encoded.decision_ranks, per_branch), batch)
    counts, items = _on_device(np.diff(encoded.below_offsets), batch), _on_device(encoded.below_items, batch)
    branch = torch.arange(len(counts), device=scores.device).repeat_interleave(counts)
    change = -scores[rows[branch], ranks[branch], position[rows[branch], items]]
    return change.new_zeros(len(counts)).index_add(0, branch, change) / counts


def _sum_per_rank(per_decision: torch.Tensor, batch: RankingBatch) -> torch.Tensor:
    """(N, T) sums of (M,) over the decisions of each item."""
    n, t = batch.shape
    rows, ranks = (_on_device(a, batch) for a in (batch.encoded.decision_rows, batch.encoded.decision_ranks))
    return per_decision.new_zeros(n * t).index_add(0, rows * t + ranks, per_decision).view(n, t)


def _sum_scores(found: Results, batch: RankingBatch) -> RankingScores:
    return RankingScores(
        _sum_per_rank(found.logprobs, batch),
        _sum_per_rank(found.entropy, batch),
        None if found.kl is None else _sum_per_rank(found.kl, batch),
    )


def _on_device(array: np.ndarray, batch: RankingBatch) -> torch.Tensor:
    return torch.as_tensor(array, dtype=torch.int64).to(batch.rankings.device)
