"""Completions as trainers of text hold them, padded rows of tokens: which token decided on which item, and how likely.

A completion that is exactly a ranking has decisions, tokens with an alternative among those that the remaining
candidates allow, and forced tokens, whose log-prob is 0. Only the states before decisions reach the output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flexrec.ops.ranking_logprobs import ranking_probs
from flexrec.policy.batch import RankingBatch, make_batch
from flexrec.policy.scores import (
    all_actions,
    completed_rankings,
    decision_scores,
    output_rows,
    ranking_states,
)
from flexrec.rankings.state import Candidates, Spelling, encode_rankings, parse_rankings


def read_rankings(
    completions: Sequence[Sequence[int]], candidates: Candidates, spelling: Spelling
) -> NDArray[np.int32]:
    """(N, T) candidate index by rank, -1 beyond a row's own, of completions that are exactly rankings.

    Raises:
        ValueError: a completion is something else.
    """
    parsed = parse_rankings(completions, candidates, **spelling.of(candidates))
    if not parsed.valid.all():
        row = int(parsed.valid.argmin())
        raise ValueError(
            f"completion {row} is not a whole ranking of its {len(candidates[row])} candidates, so restricted "
            f"log-probs of it do not exist: token ids {list(completions[row])}"
        )
    return parsed.ranking


def decision_ranks(completions: Sequence[Sequence[int]], candidates: Candidates, spelling: Spelling) -> torch.Tensor:
    """(N, longest completion) int64: at a decision the rank of the item that is chosen, -1 at every other token.

    Raises:
        ValueError: as :func:`read_rankings`.
    """
    rankings = read_rankings(completions, candidates, spelling)
    encoded = encode_rankings(candidates, rankings, **spelling.of(candidates), with_allowed=False)
    ranks = torch.full((len(completions), max(map(len, completions))), -1, dtype=torch.int64)
    ranks[encoded.decision_rows, encoded.decision_positions] = torch.from_numpy(encoded.decision_ranks).long()
    return ranks


@dataclass(frozen=True)
class Answers:
    """N completions, each a ranking of its own list, that are scored together.

    Attributes:
        width: columns of what is said of them, at least the longest completion's length, or the longest list's.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    candidates: Candidates
    spelling: Spelling
    width: int
    temperature: float
    device: torch.device | str

    def batch(self, *, by_token: bool = False) -> RankingBatch:
        return make_batch(
            self.prompts,
            self.candidates,
            read_rankings(self.completions, self.candidates, self.spelling),
            separator=self.spelling.separator,
            end=self.spelling.end,
            device=self.device,
            by_token=by_token,
        )


def restricted_token_logprobs(model: Any, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of completions under what their candidates allow.

    Args:
        model: a causal language model, wrapped or not.

    Returns:
        Two (N, width) float32, differentiable; exactly 0 at forced tokens and beyond a completion.

    Raises:
        ValueError: as :func:`read_rankings`; a model that changes its logits after the output layer, or whose adapters
            change the prompt.
    """
    batch = answers.batch(by_token=True)
    found = decision_scores(ranking_states(model, batch), batch, temperature=answers.temperature)
    rows, positions, _ = _decisions(batch)

    def at_tokens(values: torch.Tensor) -> torch.Tensor:
        shape = len(answers.completions), answers.width
        return values.new_zeros(shape).index_put((rows, positions), values).float()

    return at_tokens(found.logprobs), at_tokens(found.entropy)


class ActionTokens(NamedTuple):
    """Of N completions, (N, width) float32 each: at decisions, and exactly 0 at every other token."""

    objective: torch.Tensor
    """That of all actions of an item, at the last of its decisions."""
    logprobs: torch.Tensor
    entropy: torch.Tensor


def all_action_tokens(
    model: Any,
    answers: Answers,
    gains: torch.Tensor,
    metric: str,
    *,
    tilt: float | None = None,
    foresight: float | str | None = None,
) -> ActionTokens:
    """:func:`restricted_token_logprobs`, and in the same pass what all candidates that remained were worth.

    Args:
        gains: (N, K) in rank order, K at least the longest list; beyond a list's length they are not read.
        metric, tilt, foresight: of :func:`flexrec.policy.scores.all_actions`.

    Raises:
        ValueError: as :func:`restricted_token_logprobs`; ``foresight`` for candidates of several tokens.
    """
    batch = answers.batch()
    states = ranking_states(model, batch)
    found = all_actions(
        states,
        batch,
        gains[:, : int(batch.lengths.max())],
        metric,
        temperature=answers.temperature,
        num_ranked=batch.shape[1],
        tilt=tilt,
        foresight=foresight,
    )
    rows, positions, ranks = _decisions(batch)
    last = torch.ones_like(rows, dtype=torch.bool)  # decisions are in the order of a completion's tokens
    last[:-1] = (rows[1:] != rows[:-1]) | (ranks[1:] != ranks[:-1])
    if batch.candidate_ids is None:
        scored = decision_scores(states, batch, temperature=answers.temperature)
        logprobs, entropy = scored.logprobs, scored.entropy
    else:
        logprobs, entropy = found.logprobs[rows, ranks], found.entropy[rows, ranks]

    def at_tokens(values: torch.Tensor, chosen: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        shape = len(answers.completions), answers.width
        return values.new_zeros(shape).index_put((rows[chosen], positions[chosen]), values).float()

    return ActionTokens(
        at_tokens(found.objective[rows[last], ranks[last]], last), at_tokens(logprobs), at_tokens(entropy)
    )


@torch.no_grad()
def item_probabilities(model: Any, answers: Answers) -> torch.Tensor:
    """(N, width, width) the policy's probability, at each rank, of every candidate in rank order; 0 beyond a list, or
    beyond its ranks.

    Raises:
        ValueError: as :func:`restricted_token_logprobs`; what :func:`check_single_tokens` says.
    """
    check_single_tokens(answers.candidates, answers.spelling)
    batch = answers.batch()
    states = ranking_states(model, batch)
    rows = output_rows(states, batch)
    probs = ranking_probs(
        states.hidden,
        rows.weight,
        rows.candidates,
        completed_rankings(batch),
        bias=rows.bias,
        temperature=answers.temperature,
        lengths=batch.lengths,
    )
    missing = [answers.width - size for size in probs.shape[1:]]
    return torch.nn.functional.pad(probs, (0, missing[1], 0, missing[0]))


def check_single_tokens(candidates: Candidates, spelling: Spelling) -> None:
    """Whether the distribution of a token is that of whole items.

    Raises:
        ValueError: a candidate of several tokens, or a separator.
    """
    longest = max((len(name) for names in candidates for name in names), default=1)
    if longest > 1 or spelling.separator:
        raise ValueError(
            f"credits 'policy' and 'all_actions_corrected' need the probability of whole items: name each candidate by "
            f"one token, and rank with separator=''; got candidates of up to {longest} tokens and a separator of "
            f"{len(spelling.separator)}"
        )


def _decisions(batch: RankingBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(M,) int64 each, of every decision: its completion, its token's column, the rank it decides on."""
    encoded, device = batch.encoded, batch.lengths.device
    arrays = (encoded.decision_rows, encoded.decision_positions, encoded.decision_ranks)
    rows, positions, ranks = (torch.from_numpy(array).to(device).long() for array in arrays)
    return rows, positions, ranks


def token_item_ids(tokenizer: Any, completions: Sequence[Sequence[int]], item_ids: NDArray[np.int32]) -> torch.Tensor:
    """The rank of the item that each token of free text belongs to.

    Args:
        tokenizer: a Hugging Face tokenizer.
        completions: N rows of token ids.
        item_ids: (N, characters) the rank by character of ``decoded(tokenizer, row)``, -1 for none, as
            :func:`flexrec.rankings.text.parse_ranking_texts` returns it; missing columns count as -1.

    Returns:
        (N, longest completion) int64: the first item that a token has a character of, -1 for none.
    """
    ranks = torch.full((len(completions), max(map(len, completions), default=0)), -1, dtype=torch.int64)
    for row, (tokens, of_characters) in enumerate(zip(completions, item_ids, strict=True)):
        start = 0
        for column, end in enumerate(_character_ends(tokenizer, tokens)):
            of_token = of_characters[min(start, end - 1) : end]  # one that adds no character goes on with the last
            of_token = of_token[of_token >= 0]
            if len(of_token):
                ranks[row, column] = int(of_token[0])
            start = end
    return ranks


def without_end(tokenizer: Any, tokens: Sequence[int]) -> Sequence[int]:
    """A completion without the end-of-sequence token that it may end with."""
    return tokens[:-1] if len(tokens) and tokens[-1] == tokenizer.eos_token_id else tokens


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of a completion, special tokens included, since these may name items."""
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _character_ends(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """How many characters of the text are complete after each token."""
    pieces = [decoded(tokenizer, [token]) for token in tokens]
    if "".join(pieces) == decoded(tokenizer, tokens):
        return np.cumsum([len(piece) for piece in pieces], dtype=np.int64).tolist()
    # Tokens that are parts of a character, or that lose a space when they stand first, are read in their context.
    return [len(decoded(tokenizer, tokens[: end + 1])) for end in range(len(tokens))]
