"""Completions as trainers of text hold them, padded rows of tokens: which token decided on which item, and how likely.

A completion that is exactly a ranking has decisions, tokens with an alternative among those that the remaining
candidates allow, and forced tokens, whose log-prob is 0. Only the states before decisions reach the output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexrec.policy.batch import make_batch
from flexrec.policy.scores import decision_scores, ranking_states
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


def restricted_token_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    candidates: Candidates,
    spelling: Spelling,
    *,
    width: int,
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of N completions, each a ranking of its own list, under what their candidates allow.

    Args:
        model: a causal language model, wrapped or not.
        width: columns of the result, at least the longest completion's length.

    Returns:
        Two (N, width) float32, differentiable; exactly 0 at forced tokens and beyond a completion.

    Raises:
        ValueError: as :func:`read_rankings`; a model that changes its logits after the output layer, or whose adapters
            change the prompt.
    """
    rankings = read_rankings(completions, candidates, spelling)
    batch = make_batch(
        prompts, candidates, rankings, separator=spelling.separator, end=spelling.end, device=device, by_token=True
    )
    found = decision_scores(ranking_states(model, batch), batch, temperature=temperature)
    decisions = batch.encoded.decision_rows, batch.encoded.decision_positions
    rows, positions = (torch.from_numpy(array).to(device).long() for array in decisions)

    def at_tokens(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(completions), width).index_put((rows, positions), values).float()

    return at_tokens(found.logprobs), at_tokens(found.entropy)


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
