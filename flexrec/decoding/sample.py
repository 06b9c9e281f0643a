"""Rankings from any causal language model of transformers: sampled, the best of several samples, or found by beams.

Every one of them decodes a prompt's rollouts in the prompt's row (:mod:`flexrec.decoding.cache`). At each step a
rollout sees logits of the tokens that its remaining candidates allow and of no others; runs of tokens without an
alternative are appended unsampled. Reasoning, where it is asked for, comes first (:mod:`flexrec.rankings.reasoning`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from flexrec.decoding.cache import Decoder, Runs, SharedDecoder, WholeRows
from flexrec.decoding.one_pass import rank_in_one_pass
from flexrec.decoding.rollout import Rollout
from flexrec.policy.lm_head import capped, output_layer, soft_cap
from flexrec.policy.lora import causal_lm
from flexrec.policy.packing import only_attends, sharing
from flexrec.policy.places import are_places
from flexrec.policy.row_tokens import CandidateLists, Numbered, Prompts, RowTokens, numbered
from flexrec.policy.shared_prefix import base_attention
from flexrec.profiling import span
from flexrec.rankings.reasoning import ReasoningRule, ReasoningTokens, never_tokens, reasoning_rule
from flexrec.rankings.state import RankingState, Spelling


class _Output(NamedTuple):
    """Of the output layer: weight (V, D) and bias (V,), and what its logits are capped by."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    cap: float | None

    def of(self, batch: Numbered) -> _Output:
        """The rows that are numbered in a batch."""
        return _Output(*batch.output(self.weight, self.bias), self.cap)


@torch.no_grad()
def sample_rankings(
    model: Any,
    prompts: Prompts,
    candidates: CandidateLists,
    *,
    separator: Sequence[int] = (),
    end: Sequence[int] = (),
    num_generations: int = 1,
    num_ranked: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
    reasoning_end: Sequence[int] | None = None,
    max_reasoning_tokens: int | None = None,
    num_tokens: int | None = None,
    one_pass: bool = False,
    generator: torch.Generator | None = None,
    pad_token_id: int = 0,
) -> Rollout:
    """Sample ``num_generations`` rankings for each of P prompts.

    Args:
        model: a causal language model; it is used in evaluation mode.
        prompts: P rows of token ids, or of tuples of them, whose rows are summed (:mod:`flexrec.policy.row_tokens`).
        candidates: P lists of token-id sequences; where they are tuples, each is a single one, with no separator. Of
            :class:`flexrec.policy.places.Place` where they are read in the prompt, and nothing is decoded.
        separator, end: token ids between two items and after the last.
        num_ranked: rank the first T only, or all where a list has fewer (default: all).
        temperature: of the sampling distribution; ``greedy`` takes the most probable token instead.
        top_p: below 1, samples among the most probable allowed tokens whose probabilities reach it together. The
            log-probs stay those of the whole allowed set, so this is for inference: a trainer would take them for
            those of the distribution that was sampled from.
        reasoning_end, max_reasoning_tokens: before the ranking, tokens of the whole vocabulary until these token ids
            have come, or are forced after so many tokens without; temperature, top_p and greedy are the same there.
            Never among them are the tokens at which the model's generate stops. What begins reasoning ("<think>") is
            the prompts' last tokens.
        num_tokens: ``len(tokenizer)``. Many embeddings are padded beyond it, and reasoning must not sample what no
            tokenizer can read. None: the whole embedding has meaning.
        one_pass: draw all ranks from the distribution of the first decision (:mod:`flexrec.decoding.one_pass`).
        generator: randomness, on the model's device.

    Returns:
        N = P * num_generations rankings, those of one prompt adjacent.

    Example:
        >>> from flexrec.data import Catalogue
        >>> from flexrec.decoding import sample_rankings
        >>> from flexrec.policy.small_model import build_model, build_tokenizer
        >>> tokenizer = build_tokenizer(Catalogue(("a",), ("a",), ((),)), [])
        >>> model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
        >>> prompts, candidates = [[5, 6, 7]], [[[10, 20], [10, 21], [11]]]  # one prompt, three candidates
        >>> rollout = sample_rankings(model, prompts, candidates, num_generations=4)
        >>> np.sort(rollout.rankings, axis=1)
        array([[0, 1, 2],
               [0, 1, 2],
               [0, 1, 2],
               [0, 1, 2]], dtype=int32)
    """
    never = () if reasoning_end is None else never_tokens(causal_lm(model), num_tokens)
    rule = reasoning_rule(reasoning_end, max_reasoning_tokens, never)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if one_pass or are_places(candidates):
        if rule is not None or top_p < 1:
            raise ValueError(
                "rankings in one pass over the prompt (encoding 'score', mode 'one-pass') take no reasoning and no "
                "top_p"
            )
        return Rollout(
            *rank_in_one_pass(
                model,
                prompts,
                candidates,
                separator=separator,
                end=end,
                num_generations=num_generations,
                num_ranked=num_ranked,
                temperature=temperature,
                greedy=greedy,
                generator=generator,
                pad_token_id=pad_token_id,
            )
        )
    sampling = _Sampling(temperature, top_p, greedy, generator)
    batch = numbered(prompts, candidates, [*separator, *end])
    begun = _begun(
        model,
        batch,
        Spelling(separator, end, num_ranked),
        temperature,
        num_generations,
        pad_token_id,
        reasoning_length=0 if rule is None else rule.max_length,
    )
    with begun as (state, decoder, output, hidden):
        reasoning = reasoning_logprobs = None
        if rule is not None:
            with span("decode"):
                reasoning, reasoning_logprobs = _think(decoder, rule, hidden, output, sampling)
        logprobs = _rank(decoder, state, hidden, output.of(batch), batch.table, sampling)
        return Rollout(state.rankings(), logprobs, reasoning, reasoning_logprobs)


@torch.no_grad()
def search_rankings(
    model: Any,
    prompts: Prompts,
    candidates: CandidateLists,
    *,
    num_beams: int,
    separator: Sequence[int] = (),
    end: Sequence[int] = (),
    num_ranked: int | None = None,
    temperature: float = 1.0,
    pad_token_id: int = 0,
) -> Rollout:
    """The most probable rankings of each of P prompts, by beam search.

    At every decision the ``num_beams`` beginnings with the highest log-probs are kept; one that has ranked an item more
    waits for the others. One beam is greedy search, and as many as there are rankings find the mode.

    generate with :class:`flexrec.decoding.RankingLogitsProcessor` searches too, but encodes every prompt ``num_beams``
    times, feeds forced tokens one by one and copies the cache at every step. Here the beams of a prompt share its row,
    and nothing is copied: a ninth to a twelfth of the time for 24 lists of 30 candidates and 8 beams.
    generate is the one to search for reasoning and ranking together.

    Args:
        temperature: of the probabilities that are compared.
        the others: those of :func:`sample_rankings`.

    Returns:
        N = P * num_beams rankings, those of one prompt adjacent, the most probable first. Where a prompt has fewer
        rankings than beams, the rows behind them hold -1, with log-prob -inf.

    Example:
        >>> from flexrec.data import Catalogue
        >>> from flexrec.decoding import search_rankings
        >>> from flexrec.policy.small_model import build_model, build_tokenizer
        >>> tokenizer = build_tokenizer(Catalogue(("a",), ("a",), ((),)), [])
        >>> model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
        >>> prompts, candidates = [[5, 6, 7]], [[[10, 20], [10, 21], [11]]]  # one prompt, three candidates
        >>> beams = search_rankings(model, prompts, candidates, num_beams=6)
        >>> beams.rankings.shape, bool((np.diff(beams.logprobs.sum(axis=1)) <= 0).all())  # the likeliest first
        ((6, 3), True)
    """
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    if are_places(candidates):
        raise ValueError(
            "candidates that are read in the prompt (encoding 'score') are not searched for: the greedy ranking is the "
            "most probable of all"
        )
    spelling = Spelling(separator, end, num_ranked)
    batch = numbered(prompts, candidates, [*separator, *end])
    begun = _begun(model, batch, spelling, temperature, num_beams, pad_token_id, beams=True)
    with begun as (state, decoder, output, hidden):
        totals, logprobs = _search(decoder, state, hidden, output.of(batch), batch.table, temperature)
        rankings, missing = state.rankings(), np.isneginf(totals)
        rankings[missing], logprobs[missing] = -1, -np.inf
        return Rollout(rankings, logprobs)


@contextmanager
def _begun(
    model: Any,
    batch: Numbered,
    spelling: Spelling,
    temperature: float,
    num_generations: int,
    pad_token_id: int,
    *,
    reasoning_length: int = 0,
    beams: bool = False,
) -> Iterator[tuple[RankingState, Decoder, _Output, torch.Tensor]]:
    """What every way of decoding begins with: rankings before their first token, the cache of encoded prompts, the
    output layer and the states (N, D) after the prompts. Inside, the model is in evaluation mode.

    ``beams`` go on from one another, for which all of a prompt's share a row, or none.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: use greedy=True for the mode")
    prompts, candidates, table = batch
    if len(prompts) != len(candidates):
        raise ValueError(f"got {len(prompts)} prompts and {len(candidates)} lists of candidates")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    options = spelling.of(candidates)
    share = 1
    if base_attention(model) != "flex_attention":  # which would compile a mask for every step
        share = sharing(
            model,
            prompts,
            candidates,
            separator=spelling.separator,
            num_ranked=options["num_ranked"],
            num_generations=num_generations,
            reasoning_length=reasoning_length,
            decoding=True,
        )
    if beams and share > 1:
        share = num_generations
    training = model.training
    model.eval()
    try:
        with span("bookkeeping"):
            state = RankingState(candidates, **options, num_generations=num_generations)
            output = _Output(*output_layer(model), soft_cap(model))
            decoder: Decoder
            if only_attends(model):
                decoder = SharedDecoder(model, output.weight.device, num_generations, share, pad_token_id)
            else:
                decoder = WholeRows(model, output.weight.device, num_generations, pad_token_id)
            with span("prefill"):
                hidden = decoder.prefill(prompts, table)
            yield state, decoder, output, hidden
    finally:
        model.train(training)


class _Sampling(NamedTuple):
    temperature: float
    top_p: float
    greedy: bool
    generator: torch.Generator | None

    def draw(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A column of every row of ``logits`` (R, A) and its log-prob, (R, 1) both."""
        logprobs = (logits / self.temperature).log_softmax(dim=1)  # (R, A)
        if self.greedy:
            column = logprobs.argmax(dim=1, keepdim=True)
        else:
            probs = _nucleus(logprobs.exp(), self.top_p).nan_to_num(0.0)
            probs[:, 0] += probs.sum(dim=1) == 0  # where all is NaN, whichever: its log-prob tells of it
            column = torch.multinomial(probs, 1, generator=self.generator)
        return column, logprobs.gather(1, column)


def _think(
    decoder: Decoder, rule: ReasoningRule, hidden: torch.Tensor, output: _Output, sampling: _Sampling
) -> tuple[ReasoningTokens, np.ndarray]:
    """Reasoning of every rollout and its log-probs (N, R); ``hidden`` (N, D) takes the states after it."""
    rows = len(hidden)
    tokens = np.zeros((rows, rule.max_length), dtype=np.int64)
    logprobs = np.zeros((rows, rule.max_tokens), dtype=np.float32)
    lengths = np.zeros(rows, dtype=np.int64)
    matched = np.zeros(rows, dtype=np.int64)
    thinking = np.ones(rows, dtype=bool)
    for step in range(rule.max_tokens):
        logits = _logits(hidden[torch.from_numpy(thinking).to(hidden.device)], output)  # (R, V)
        logits[:, list(rule.never)] = -torch.inf
        chosen, chosen_logprobs = sampling.draw(logits)
        tokens[thinking, step] = chosen[:, 0].cpu().numpy()
        logprobs[thinking, step] = chosen_logprobs[:, 0].cpu().numpy()
        lengths[thinking] += 1
        decoder.extend(Runs(tokens[thinking, step], thinking.astype(np.int64)), hidden)
        matched = np.where(thinking, rule.matched(tokens[:, : step + 1]), matched)
        thinking = matched < len(rule.end)
        if not thinking.any():
            break
    num_sampled = lengths.copy()
    if thinking.any():  # the budget is spent: what is missing of the marker
        missing = np.arange(len(rule.end)) >= np.where(thinking, matched, len(rule.end))[:, None]  # (N, marker)
        row, of_marker = missing.nonzero()
        forced = np.array(rule.end, dtype=np.int64)[of_marker]
        tokens[row, (lengths - matched)[row] + of_marker] = forced
        lengths += missing.sum(axis=1)
        decoder.extend(Runs(forced, missing.sum(axis=1)), hidden)
    reasoning = ReasoningTokens(
        [row[:size] for row, size in zip(tokens, lengths, strict=True)], num_sampled, rule.never
    )
    return reasoning, logprobs[:, : num_sampled.max(initial=0)]


def _forced(state: RankingState) -> Runs:
    """What comes next in every ranking without an alternative, which ``state`` has read."""
    ids, offsets = state.forced()
    state.advance(ids, offsets)
    return Runs(ids, np.diff(offsets))


def _rank(
    decoder: Decoder,
    state: RankingState,
    hidden: torch.Tensor,
    output: _Output,
    table: RowTokens | None,
    sampling: _Sampling,
) -> np.ndarray:
    """Sample the rankings into ``state``; returns their items' log-probs (N, T)."""
    logprobs = np.zeros(state.rankings().shape, dtype=np.float32)
    runs = _forced(state)
    while not (done := state.done()).all():
        # A finished rollout needs no further states; one without a new token keeps the state it had.
        runs = runs.keep(~done)
        if len(runs.tokens):
            with span("decode"):
                decoder.extend(runs, hidden, table)
        active = np.flatnonzero(~done)
        allowed = _padded(*state.allowed(), active)
        with span("decode"):
            token_ids, logits = _allowed_logits(hidden, output, allowed, active)
            column, drawn = sampling.draw(logits)
            chosen, chosen_logprobs = token_ids.gather(1, column)[:, 0].cpu().numpy(), drawn[:, 0].cpu().numpy()
        rank = (state.rankings() >= 0).sum(axis=1)
        logprobs[active, rank[active]] += chosen_logprobs
        tokens = np.zeros(len(hidden), dtype=np.int32)
        tokens[active] = chosen
        state.advance(tokens)
        runs = _forced(state).after(chosen, ~done)
    return logprobs


def _search(
    decoder: Decoder,
    state: RankingState,
    hidden: torch.Tensor,
    output: _Output,
    table: RowTokens | None,
    temperature: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Search into ``state``; returns log-probs (N,) of rankings, best first in each prompt, and (N, T) of items.

    A beam of log-prob -inf, of which there are some while few beginnings exist, is a copy of its prompt's best.
    """
    rows, beams = len(hidden), decoder.num_generations
    logprobs = np.zeros(state.rankings().shape, dtype=np.float32)
    totals = np.where(np.arange(rows) % beams == 0, 0.0, -np.inf)  # (N,)
    written = np.zeros((rows, state.max_length), dtype=np.int32)
    lengths = np.zeros(rows, dtype=np.int64)

    def append(runs: Runs) -> Runs:
        row = np.repeat(np.arange(rows), runs.counts)
        starts = np.cumsum(runs.counts) - runs.counts
        written[row, lengths[row] + np.arange(len(row)) - starts[row]] = runs.tokens
        lengths[:] += runs.counts
        return runs

    runs = append(_forced(state))
    while not (done := state.done()).all():
        runs = runs.keep(~done)
        if len(runs.tokens):
            with span("decode"):
                decoder.extend(runs, hidden, table)
        # A beam that is an item ahead waits: two beams are compared when they have ranked as many.
        ranked = np.where(done, np.iinfo(np.int64).max, (state.rankings() >= 0).sum(axis=1)).reshape(-1, beams)
        choosing = ~done & (ranked == ranked.min(axis=1, keepdims=True)).reshape(-1)
        active = np.flatnonzero(choosing)
        allowed = _padded(*state.allowed(), active)  # (R, A)
        width = allowed.shape[1]
        token_ids, gained = np.zeros((rows, width), dtype=np.int32), np.full((rows, width), -np.inf)
        with span("decode"):
            logits = _allowed_logits(hidden, output, allowed, active)[1]
            gained[active] = (logits / temperature).log_softmax(dim=1).cpu().numpy()
        token_ids[active] = allowed
        gained[~choosing, 0] = 0.0  # goes on as it is

        continued = (totals[:, None] + gained).reshape(-1, beams * width)  # (P, beams * A)
        best = np.argsort(-continued, axis=1, kind="stable")[:, :beams]
        totals = np.take_along_axis(continued, best, axis=1)
        best = np.where(np.isneginf(totals), best[:, :1], best)
        parents = (np.arange(0, rows, beams)[:, None] + best // width).reshape(-1)
        column, totals = (best % width).reshape(-1), totals.reshape(-1)

        moved = parents != np.arange(rows)
        written[:], lengths[:], logprobs[:] = written[parents], lengths[parents], logprobs[parents]
        replayed = (np.arange(written.shape[1]) < lengths[:, None]) & moved[:, None]
        state.restart(moved)
        state.advance(written[replayed], np.append(0, replayed.sum(axis=1).cumsum()))
        decoder.select(parents)
        hidden = hidden[torch.from_numpy(parents).to(hidden.device)]

        growing = choosing[parents]
        rank = (state.rankings() >= 0).sum(axis=1)
        logprobs[growing, rank[growing]] += gained[parents, column][growing]
        chosen = token_ids[parents, column][growing]
        state.advance(chosen, np.append(0, growing.cumsum()))
        runs = append(_forced(state).after(chosen, growing))
    return totals, logprobs


def _padded(ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(len(rows), A) allowed ids of the given rows, -1 where a row has fewer than the most."""
    counts = (offsets[1:] - offsets[:-1])[rows]
    if len(rows) == len(offsets) - 1 and (counts == counts[0]).all():  # as with items of one token
        return ids.reshape(len(rows), -1).astype(np.int64)
    columns = np.arange(counts.max())
    inside = columns[None, :] < counts[:, None]
    padded = np.full(inside.shape, -1, dtype=np.int64)
    padded[inside] = ids[(offsets[:-1][rows][:, None] + columns[None, :])[inside]]
    return padded


def _logits(hidden: torch.Tensor, output: _Output) -> torch.Tensor:
    """(R, V) float32 logits of the whole vocabulary after states ``hidden`` (R, D)."""
    return capped(torch.nn.functional.linear(hidden, output.weight, output.bias).float(), output.cap)


def _allowed_logits(
    hidden: torch.Tensor, output: _Output, allowed: np.ndarray, rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids ``allowed`` (R, A) to ``rows`` (R,) of ``hidden`` (N, D), and their logits; id -1 has the logit -inf."""
    weight, bias, cap = output
    ids = torch.as_tensor(allowed, device=hidden.device)  # (R, A)
    states = hidden[torch.as_tensor(rows, device=hidden.device)]  # (R, D)
    tokens = ids.clamp(min=0)
    logits = torch.bmm(weight[tokens], states[:, :, None])[:, :, 0].float()  # (R, A)
    if bias is not None:
        logits += bias[tokens]
    return ids, capped(logits, cap).masked_fill(ids < 0, -torch.inf)


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """``probs`` (R, A) without what lies beyond the most probable tokens that reach ``top_p`` together."""
    if top_p == 1.0:
        return probs
    ordered, index = probs.sort(dim=1, descending=True)
    before = ordered.cumsum(dim=1) - ordered
    return torch.zeros_like(probs).scatter(1, index, ordered.masked_fill(before >= top_p, 0.0))
