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

from flexrec.ops.all_actions import all_actions_objective, all_actions_objective_with_kl
from flexrec.ops.rank_order import rank_order
from flexrec.ops.ranking_logprobs import ranking_logprobs, ranking_logprobs_with_kl
from flexrec.ops.restricted_logprobs import Results, restricted_logprobs, restricted_logprobs_with_kl
from flexrec.ops.swap_rewards import swap_scores
from flexrec.ops.vocabulary_logprobs import vocabulary_logprobs
from flexrec.policy.distributed import gather_layer
from flexrec.policy.lora import causal_lm, weight_and_bias
from flexrec.policy.output_rows import Marks, RowTokens, row_tokens
from flexrec.policy.packing import TokenRows, attention_mask, pack_rankings
from flexrec.profiling import span
from flexrec.rankings import Candidates, EncodedRankings, encode_rankings
from flexrec.rankings.reasoning import ReasoningTokens


@dataclass(frozen=True)
class RankingBatch:
    """Model inputs for N rankings of P lists (N = P * num_generations, rankings of one list adjacent).

    A decision is a token with an alternative; all other tokens of an answer are forced and carry no log-prob.
    """

    tokens: TokenRows  # prompts and answers, which begin with reasoning where there is any
    rankings: torch.Tensor  # (N, T) int64, index into the row's candidates, -1 beyond a row's own
    lengths: torch.Tensor  # (N,) int64, number of candidates
    encoded: EncodedRankings  # without what was allowed where there are candidate_ids, which say it
    candidate_ids: torch.Tensor | None  # (P, K) int64 token ids, where every candidate is a single token
    num_generations: int
    reasoning: ReasoningTokens | None = None
    row_tokens: RowTokens | None = None  # what each candidate's output row is the sum of, where it has marks

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
    prompts: Sequence[Sequence[int]],
    candidates: Candidates,
    rankings: np.ndarray,
    *,
    marks: Marks | None = None,
    separator: Sequence[int] = (),
    end: Sequence[int] = (),
    num_generations: int = 1,
    rankings_per_row: int = 1,
    reasoning: ReasoningTokens | None = None,
    pad_token_id: int = 0,
    device: torch.device | str = "cpu",
    by_token: bool = False,
) -> RankingBatch:
    """Model inputs that score ``rankings`` (N, T; -1 beyond a row's own) under P prompts and candidate lists.

    With ``rankings_per_row`` > 1 the rankings of a prompt share it: see :mod:`flexrec.policy.packing`. ``reasoning``,
    that of a rollout, stands between a prompt and its ranking, and :func:`reasoning_logprobs` scores it. With
    ``by_token`` candidates of a single token are treated as those of several are. ``marks`` describe such candidates
    further (:mod:`flexrec.policy.output_rows`).
    """
    if marks is not None and (by_token or separator):
        raise ValueError("marks describe candidates of a single token each, with nothing between two of them")
    candidate_ids = None if by_token else _single_tokens(candidates, separator, device)
    encoded = encode_rankings(
        candidates,
        rankings,
        separator=separator,
        end=end,
        num_ranked=(np.asarray(rankings) >= 0).sum(axis=1),
        num_generations=num_generations,
        with_allowed=candidate_ids is None,
    )
    answers = [answer[:-1] for answer in np.split(encoded.tokens, encoded.offsets[1:-1])]  # what predicts the next
    if reasoning is not None:
        if len(reasoning.tokens) != len(answers):
            raise ValueError(f"reasoning must have one row per ranking, {len(answers)}, got {len(reasoning.tokens)}")
        answers = [np.concatenate(pair) for pair in zip(reasoning.tokens, answers, strict=True)]
    tokens = pack_rankings(
        prompts,
        answers,
        num_generations=num_generations,
        per_row=rankings_per_row,
        pad_token_id=pad_token_id,
        device=device,
    )
    sizes = torch.tensor([len(lst) for lst in candidates]).repeat_interleave(num_generations)
    return RankingBatch(
        tokens=tokens,
        rankings=torch.as_tensor(np.asarray(rankings), dtype=torch.int64).to(device),
        lengths=sizes.to(device),
        encoded=encoded,
        candidate_ids=candidate_ids,
        num_generations=num_generations,
        reasoning=reasoning,
        row_tokens=None if marks is None else row_tokens(candidates, marks, device),
    )


def _single_tokens(candidates: Candidates, separator: Sequence[int], device: torch.device | str) -> torch.Tensor | None:
    """(P, K) token ids, padded with 0, if each candidate is one token and nothing stands between two of them."""
    if separator or any(len(sequence) != 1 for lst in candidates for sequence in lst):
        return None
    ids = np.zeros((len(candidates), max(map(len, candidates))), dtype=np.int64)
    for p, lst in enumerate(candidates):
        ids[p, : len(lst)] = [sequence[0] for sequence in lst]
    return torch.from_numpy(ids).to(device)


def final_hidden(model: Any, tokens: TokenRows) -> torch.Tensor:
    """(B, L, D) states that enter the output layer, which itself computes nothing.

    The call goes through ``model`` itself, so that wrappers (DDP, FSDP) see their forward pass.
    """
    config = getattr(model, "module", model).config
    dtype = next(model.parameters()).dtype
    with span("forward"):
        output = model(
            input_ids=tokens.input_ids,
            attention_mask=attention_mask(tokens, config._attn_implementation, dtype),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=torch.empty(0, dtype=torch.int64, device=tokens.input_ids.device),
            **({"position_ids": tokens.position_ids} if tokens.shared else {}),
        )
    return output.hidden_states[-1]


def output_layer(model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output embedding (V, D), its adapters included, and its bias (V,) or None.

    Where parameters are spread over processes it is gathered: all processes call this together, after their forward
    pass.

    Raises:
        ValueError: a model whose logits are not ``hidden @ weight.T + bias`` (soft-capped or scaled logits), or its
            adapters make no such weight (see :mod:`flexrec.policy.lora`).
    """
    outer, model = getattr(model, "module", model), causal_lm(model)
    config = model.config
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"this model changes its logits after the output layer ({name}={getattr(config, name)}), "
                f"which restricted log-probs do not reproduce: use a model without it"
            )
    layer = model.get_output_embeddings()
    is_spread = gather_layer(outer, layer)
    weight, bias = weight_and_bias(layer)
    if is_spread and (not torch.is_grad_enabled() or weight.device.type == "cpu"):
        # States without gradients may be kept for longer than the layer stays whole; and the memory of what NumPy has
        # read, as kernels on the CPU do, could not be given back.
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    return weight, bias


class RankingStates(NamedTuple):
    """What the restricted distributions of a batch are made of."""

    hidden: torch.Tensor  # (N, T, D) for single-token candidates, else (M, D): the state before each decision
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    reasoning: torch.Tensor | None = None  # (M', D) the state before each sampled token of the reasoning


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
    return decision_states(model, batch, final_hidden(model, batch.tokens))


def decision_states(model: Any, batch: RankingBatch, hidden: torch.Tensor) -> RankingStates:
    """Keep the states at decisions of ``hidden`` (B, L, D), the model's states for the batch."""
    of_reasoning, start = None, np.zeros(batch.shape[0], dtype=np.int64)  # (N,) where the rankings begin
    if batch.reasoning is not None:
        start = batch.reasoning.lengths
        of_reasoning = _states_before(batch, hidden, *batch.reasoning_mask.cpu().numpy().nonzero())
    if batch.candidate_ids is not None:
        n, t = batch.shape
        rankings, steps = np.repeat(np.arange(n), t), np.tile(np.arange(t), n)
        states = _states_before(batch, hidden, rankings, start[rankings] + steps).view(n, t, -1)
    else:
        rows, positions = batch.encoded.decision_rows, batch.encoded.decision_positions
        states = _states_before(batch, hidden, rows, start[rows] + positions)
    return RankingStates(states, *output_layer(model), of_reasoning)


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
    mask = batch.reasoning_mask
    sampled = [row[:count] for row, count in zip(batch.reasoning.tokens, batch.reasoning.num_sampled, strict=True)]
    targets = torch.from_numpy(np.concatenate(sampled).astype(np.int64)).to(mask.device)
    logprobs = vocabulary_logprobs(
        states.reasoning,
        states.weight,
        targets,
        bias=states.bias,
        temperature=temperature,
        never=batch.reasoning.never,
    )
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)


def ranking_scores(
    states: RankingStates, batch: RankingBatch, *, temperature: float = 1.0, reference: RankingStates | None = None
) -> RankingScores:
    """Log-probs and entropies of the batch's rankings, and in the same pass their KL from a reference.

    Differentiable in ``states``; ``reference``, another model's states for the same batch, gets no gradient.
    """
    if batch.candidate_ids is None:
        decisions = _decisions(batch)
        return _sum_scores(_at_decisions(states, decisions, temperature, reference), decisions, batch)
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
    reference: RankingStates | None = None,
) -> ActionScores:
    """The all-actions objective of every rank for ``gains`` (N, K) in rank order (see :func:`rank_order`).

    Candidates of several tokens are chosen branch by branch: at each decision a branch is worth the mean of what
    the items below it would be worth at this rank, and the objectives of an item's decisions add up. ``tilt`` is that
    of :func:`flexrec.all_actions_objective`, ``reference`` that of :func:`ranking_scores`.
    """
    if batch.candidate_ids is None:
        return _all_actions_over_branches(states, batch, gains, metric, temperature, num_ranked, tilt, reference)
    rows = output_rows(states, batch)
    arguments = (states.hidden, rows.weight, rows.candidates, completed_rankings(batch), gains, metric)
    options: dict[str, Any] = {"bias": rows.bias, "temperature": temperature, "lengths": batch.lengths}
    options |= {"num_ranked": num_ranked, "tilt": tilt}
    if reference is None:
        found = all_actions_objective(*arguments, **options)
        objective, logprobs, entropy = (_of_ranked(values, batch) for values in found)
        return ActionScores(objective, logprobs, entropy, None)
    found_with_kl = all_actions_objective_with_kl(
        *arguments, **options | _reference_arguments(reference, output_rows(reference, batch))
    )
    return ActionScores(*(_of_ranked(values, batch) for values in found_with_kl))


def _all_actions_over_branches(
    states: RankingStates,
    batch: RankingBatch,
    gains: torch.Tensor,
    metric: str,
    temperature: float,
    num_ranked: int | None,
    tilt: float | None,
    reference: RankingStates | None,
) -> ActionScores:
    decisions = _decisions(batch)
    change = _branch_values(batch, gains, metric, num_ranked)  # (nnz,)
    values = change
    best = change.new_full((len(decisions.targets),), -torch.inf)  # (M,)
    if tilt is not None:  # exp of what a branch lacks to its decision's best, so that nothing overflows
        rows = torch.arange(len(best), device=change.device).repeat_interleave(decisions.offsets.diff())
        best = best.scatter_reduce(0, rows, change, "amax")
        values = ((change - best[rows]) / tilt).exp()
    found = _at_decisions(states, decisions, temperature, reference, values[:, None])
    assert found.expectations is not None
    objective = found.expectations[:, 0]  # (M,)
    if tilt is not None:
        objective = best + tilt * objective.clamp(min=torch.finfo(objective.dtype).tiny).log()
    return ActionScores(_sum_per_rank(objective, decisions, batch), *_sum_scores(found, decisions, batch))


class OutputRows(NamedTuple):
    """What candidates of a single token are scored by: rows of ``weight`` (R, D) and ``bias`` (R,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    candidates: torch.Tensor  # (P, K) int64, each candidate's row


def output_rows(states: RankingStates, batch: RankingBatch) -> OutputRows:
    """The vocabulary's rows, or, where the batch has marks, a row for each candidate of each list."""
    assert batch.candidate_ids is not None
    if batch.row_tokens is None:
        return OutputRows(states.weight, states.bias, batch.candidate_ids)
    numbers = torch.arange(batch.candidate_ids.numel(), device=batch.candidate_ids.device)
    return OutputRows(*batch.row_tokens.summed(states.weight, states.bias), numbers.view_as(batch.candidate_ids))


def _reference_arguments(reference: RankingStates, rows: OutputRows | RankingStates) -> dict[str, Any]:
    return {"ref_hidden": reference.hidden, "ref_weight": rows.weight, "ref_bias": rows.bias}


def _at_decisions(
    states: RankingStates,
    decisions: _Decisions,
    temperature: float,
    reference: RankingStates | None,
    values: torch.Tensor | None = None,
) -> Results:
    """Per decision, (M,) or (M, C)."""
    arguments = (states.hidden, states.weight, decisions.ids, decisions.offsets, decisions.targets)
    options: dict[str, Any] = {"values": values, "bias": states.bias, "temperature": temperature}
    if reference is None:
        return Results(*restricted_logprobs(*arguments, **options), None)
    return Results(*restricted_logprobs_with_kl(*arguments, **options | _reference_arguments(reference, reference)))


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
    ranks: torch.Tensor  # (M,)
    targets: torch.Tensor  # (M,)
    ids: torch.Tensor  # (nnz,)
    offsets: torch.Tensor  # (M + 1,)


def _decisions(batch: RankingBatch) -> _Decisions:
    encoded = batch.encoded
    arrays = (
        encoded.decision_rows,
        encoded.decision_ranks,
        encoded.targets,
        encoded.allowed_ids,
        encoded.allowed_offsets,
    )
    return _Decisions(*(torch.as_tensor(a, dtype=torch.int64).to(batch.rankings.device) for a in arrays))


def _sum_per_rank(per_decision: torch.Tensor, decisions: _Decisions, batch: RankingBatch) -> torch.Tensor:
    n, t = batch.shape
    sums = per_decision.new_zeros(n * t)
    return sums.index_add(0, decisions.rows * t + decisions.ranks, per_decision).view(n, t)


def _sum_scores(found: Results, decisions: _Decisions, batch: RankingBatch) -> RankingScores:
    return RankingScores(
        _sum_per_rank(found.logprobs, decisions, batch),
        _sum_per_rank(found.entropy, decisions, batch),
        None if found.kl is None else _sum_per_rank(found.kl, decisions, batch),
    )
