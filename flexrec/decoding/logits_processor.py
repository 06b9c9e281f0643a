"""Rankings from ``model.generate``: a logits processor of transformers that lets through what the candidates allow.

::

    processor = RankingLogitsProcessor(candidates, separator=separator, end=[tokenizer.eos_token_id])
    sequences = model.generate(
        **inputs,  # P prompts, left-padded
        logits_processor=[processor],
        max_new_tokens=processor.max_new_tokens,
        do_sample=True,
        num_return_sequences=8,
    )
    rankings = processor.rankings(sequences)  # (P * 8, T)

Sampling, greedy search, beams and several sequences per prompt all work. generate runs its warpers (temperature, top-k,
top-p and the like) after the processors it is given: they see the allowed tokens only, so top-p keeps the most probable
*allowed* tokens whose probabilities, renormalised, reach p.

With ``reasoning_end`` and ``max_reasoning_tokens`` a row reasons before it ranks (:mod:`flexrec.rankings.reasoning`);
beams are then compared by the log-prob of both together, and ``processor.reasoning(sequences)`` is what was said.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers import LogitsProcessor

from flexrec.checks import check_number
from flexrec.rankings.reasoning import ReasoningTokens, reasoning_rule
from flexrec.rankings.state import Candidates, CandidateTries, RankingState, TokenIds


class RankingLogitsProcessor(LogitsProcessor):
    """Turns scores into the log-probs of the distribution restricted to what completes a ranking, -inf elsewhere.

    Log-probs rather than masked logits, so that beams are compared by the probabilities that are sampled from; softmax
    makes the same of both. A token without an alternative has log-prob exactly 0. A finished ranking is followed by
    ``eos_token_id`` only.

    What a row has generated is read from ``input_ids`` at every call, so that rows may be reordered, replaced or
    shortened between calls, as beam search does; rows that merely grew cost nothing but their new tokens.

    Args:
        candidates: P lists of K token-id sequences, one list per prompt, or one for all, or
            `flexrec.rankings.CandidateTries`. generate may expand each prompt to several adjacent rows.
        separator: token ids between items.
        end: token ids after the last item, usually the end-of-sequence token.
        num_ranked: how many items to rank: None (all), an int (at most), or (P,) ints.
        prompt_length: width of the prompts that ``input_ids`` begin with, padding included. None takes the width at the
            first call, so that such a processor serves one call of generate, or several with prompts of equal width.
        eos_token_id: what stops generate, one token or several: none is allowed in reasoning, and after a finished
            ranking the first only. By default the last token of ``end``.
        reasoning_end, max_reasoning_tokens: before the ranking any token may come until these token ids have, which
            are forced after so many tokens without them. None: no reasoning.
        num_tokens: ``len(tokenizer)``: what an embedding is padded with beyond it never comes. None: it is not padded.
        num_beams: as given to generate. With more than one a beam of probability 0 (there are some when few beams are
            open) may hold a token that was not allowed; otherwise such a token is an error.
        reuse_scores: return the same tensor at every call, overwritten by the next, whoever holds it or has written to
            it. Not together with ``output_scores=True`` of generate, nor with processors that write to scores in place.
            It saves memory, not time: by default the memory of scores that nobody holds any more is written again,
            and there, too, only what changes.

    Raises:
        ValueError, TypeError: as `flexrec.rankings.RankingState`; no token to go on with after a finished ranking.

    Example:
        >>> from flexrec.data import Catalogue
        >>> from flexrec.decoding import RankingLogitsProcessor
        >>> from flexrec.policy.small_model import build_model, build_tokenizer
        >>> tokenizer = build_tokenizer(Catalogue(("a",), ("a",), ((),)), [])
        >>> model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
        >>> prompts, candidates = [[5, 6, 7]], [[[10, 20], [10, 21], [11]]]  # one prompt, three candidates
        >>> processor = RankingLogitsProcessor(candidates, end=[tokenizer.eos_token_id])
        >>> sequences = model.generate(
        ...     torch.tensor(prompts), logits_processor=[processor], max_new_tokens=processor.max_new_tokens
        ... )
        >>> sorted(processor.rankings(sequences)[0].tolist())
        [0, 1, 2]
    """

    def __init__(
        self,
        candidates: Candidates | CandidateTries,
        *,
        separator: TokenIds = (),
        end: TokenIds = (),
        num_ranked: int | ArrayLike | None = None,
        prompt_length: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        reasoning_end: TokenIds | None = None,
        max_reasoning_tokens: int | None = None,
        num_tokens: int | None = None,
        num_beams: int = 1,
        reuse_scores: bool = False,
    ) -> None:
        eos_token_ids = np.atleast_1d(end[-1:] if eos_token_id is None else eos_token_id).tolist()
        if not eos_token_ids:
            raise ValueError("eos_token_id must be given where end is empty: it is what follows a finished ranking")
        check_number("num_beams", num_beams, whole=True)
        if num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {num_beams}")
        self.tries = candidates if isinstance(candidates, CandidateTries) else CandidateTries(candidates)
        self.separator, self.end, self.num_ranked = separator, end, num_ranked
        self.eos_token_id = eos_token_ids[0]
        self.prompt_length = prompt_length
        self.num_beams = num_beams
        if num_tokens is not None and num_tokens < 1:
            raise ValueError(f"num_tokens must be the tokenizer's size, got {num_tokens}")
        self.num_tokens = num_tokens
        self.reuse_scores = reuse_scores
        self._rule = reasoning_rule(reasoning_end, max_reasoning_tokens, eos_token_ids)
        self._largest_token = max(*eos_token_ids, *(() if self._rule is None else self._rule.end), 0)
        self._sheets: list[_Sheet] = []  # two at most
        self._follow(self._new_state(len(self.tries) * num_beams))

    @property
    def max_new_tokens(self) -> int:
        """Enough for the reasoning, every ranking and the end of sequence after it."""
        reasoning = 0 if self._rule is None else self._rule.max_length
        return reasoning + self._state.max_length + (len(self.end) == 0 or int(self.end[-1]) != self.eos_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Args: input_ids (N, L), scores (N, V), N = P times anything. Returns (N, V) of the dtype of scores.

        Raises:
            ValueError: a row's tokens begin no ranking, or none of its allowed tokens has a finite score; the message
                names row and step.
        """
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        if input_ids.shape[1] < self.prompt_length:
            raise ValueError(f"input_ids are {input_ids.shape[1]} wide, less than prompt_length={self.prompt_length}")
        largest = max(self._state.max_token, self._largest_token)
        if scores.shape[1] <= largest:
            raise ValueError(
                f"scores are those of {scores.shape[1]} tokens, but candidates, separator, end, reasoning_end or "
                f"eos_token_id hold token {largest}: do they come from this model's tokenizer?"
            )
        self._read(input_ids)
        padded_ids, num_allowed, any_token = self._allowed()
        ids = torch.as_tensor(padded_ids, device=scores.device)  # (N, A)
        counts = torch.as_tensor(num_allowed, device=scores.device)  # (N,)
        allowed = scores.gather(1, ids).float()  # (N, A)
        repeats = torch.arange(ids.shape[1], device=scores.device) >= counts[:, None]  # (N, A)
        normaliser = allowed.masked_fill(repeats, -torch.inf).logsumexp(dim=1, keepdim=True)  # (N, 1)
        free = None
        if self._rule is not None and any_token.any():
            free = torch.as_tensor(any_token, device=scores.device)  # (N,)
            whole = scores[free].float()  # (rows that are free, V)
            whole[:, list(self._rule.never)] = -torch.inf
            whole[:, self.num_tokens or whole.shape[1] :] = -torch.inf
            normaliser[free] = whole.logsumexp(dim=1, keepdim=True)
        if not normaliser.isfinite().all():
            row = int(normaliser[:, 0].isfinite().logical_not().nonzero()[0, 0])
            found = f"the allowed tokens {padded_ids[row, : num_allowed[row]]} have scores "
            found += f"{allowed[row, : num_allowed[row]].tolist()}"
            if any_token[row]:
                found = f"the tokens of the vocabulary have scores up to {scores[row].max().item()}"
            raise ValueError(
                f"row {row}, step {self._tokens.shape[1]}: {found}, of which no distribution can be made: "
                f"another logits processor forbids them, or the model returns NaN or infinity"
            )
        of_whole = None if free is None else (whole - normaliser[free]).to(scores.dtype)
        return self._write(scores, ids, (allowed - normaliser).to(scores.dtype), free, of_whole)

    def rankings(self, sequences: torch.Tensor) -> NDArray[np.int32]:
        """(N, T) candidate index by rank of what generate returned, -1 where a row was stopped before and beyond T.

        Args:
            sequences: (N, L) prompts, reasoning if there is any, and rankings; N = P times anything.

        Raises:
            ValueError: a row holds something else than a ranking or the beginning of one.
        """
        state = self._new_state(len(sequences))
        tokens = self._generated(sequences)
        of_ranking = np.arange(tokens.shape[1]) >= self._starts(tokens)[:, None]  # (N, steps)
        state.advance(tokens[of_ranking], np.append(0, of_ranking.sum(axis=1).cumsum()))
        return state.rankings()

    def reasoning(self, sequences: torch.Tensor) -> ReasoningTokens:
        """What the rows (N, L) that generate returned said before their rankings; empty rows were stopped before."""
        if self._rule is None:
            raise ValueError("reasoning_end was not given: there is no reasoning to read")
        return self._rule.read(self._generated(sequences))

    def _generated(self, sequences: torch.Tensor) -> NDArray[np.int64]:
        """(N, steps) what follows the prompts."""
        if self.prompt_length is None:
            raise ValueError("prompt_length is known after the first call: give it to the constructor")
        return sequences[:, self.prompt_length :].cpu().numpy()

    def _starts(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) the step at which each row (N, steps) begins to rank; the number of steps where it has not."""
        if self._rule is None:
            return np.zeros(len(tokens), dtype=np.int64)
        lengths = self._rule.lengths(tokens)
        return np.where(lengths < 0, tokens.shape[1], lengths)

    def _new_state(self, num_rows: int) -> RankingState:
        num_lists = len(self.tries)
        if num_lists == 0 or num_rows % num_lists:
            raise ValueError(f"rows must be a multiple of the {num_lists} lists of candidates, got {num_rows}")
        num_generations = num_rows // num_lists
        num_ranked = self.num_ranked
        if num_ranked is not None and np.ndim(num_ranked) > 0:
            num_ranked = np.repeat(np.asarray(num_ranked), num_generations)
        return RankingState(
            self.tries,
            separator=self.separator,
            end=self.end,
            num_ranked=num_ranked,
            num_generations=num_generations,
        )

    def _follow(self, state: RankingState) -> None:
        self._state = state
        self._tokens = np.zeros((len(state), 0), dtype=np.int64)  # (N, steps) that have been read

    def _read(self, input_ids: torch.Tensor) -> None:
        """Bring the state to what the rows have generated."""
        assert self.prompt_length is not None
        tokens = input_ids[:, self.prompt_length :].cpu().numpy()  # (N, steps)
        if len(tokens) != len(self._state):
            self._follow(self._new_state(len(tokens)))
        before = self._tokens.shape[1]
        grew = np.zeros(len(tokens), dtype=bool)  # (N,)
        if tokens.shape[1] >= before:
            grew = (tokens[:, :before] == self._tokens).all(axis=1)
        first = np.maximum(np.where(grew, before, 0), self._starts(tokens))  # (N,)
        new = np.arange(tokens.shape[1]) >= first[:, None]  # (N, steps)
        try:
            self._state.restart(~grew)
            self._state.advance(tokens[new], np.append(0, new.sum(axis=1).cumsum()), strict=self.num_beams == 1)
        except ValueError as error:
            self._follow(self._new_state(len(tokens)))
            raise ValueError(
                f"{error} (in what follows the first {self.prompt_length} tokens, the prompt: if prompts changed their "
                f"width, make a processor for each call of generate or give prompt_length)"
            ) from None
        self._tokens = tokens

    def _allowed(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Token ids (N, A) that may come next, the last repeated up to A, how many they are (N,), and for which rows
        (N,) they mean nothing, since any token may come."""
        ids, offsets = self._state.allowed()
        counts = np.diff(offsets)
        last = np.maximum(counts, 1) - 1
        index = offsets[:-1, None] + np.minimum(np.arange(last.max() + 1), last[:, None])  # (N, A)
        # Rows that allow nothing are finished, or beams of probability 0.
        index[counts == 0] = len(ids)
        allowed = np.append(ids, self.eos_token_id).astype(np.int64)[index]
        thinking = np.zeros(len(allowed), dtype=bool)
        if self._rule is not None:
            thinking = self._rule.lengths(self._tokens) < 0
            if self._tokens.shape[1] >= self._rule.max_tokens:
                marker = np.array(self._rule.end)
                allowed[thinking] = marker[self._rule.matched(self._tokens[thinking])][:, None]
                last[thinking] = 0
                thinking[:] = False
        return allowed, last + 1, thinking

    def _write(
        self,
        scores: torch.Tensor,
        ids: torch.Tensor,
        values: torch.Tensor,
        free: torch.Tensor | None,
        whole: torch.Tensor | None,
    ) -> torch.Tensor:
        """(N, V) like ``scores``: ``values`` (N, A) at ``ids`` (N, A), rows ``free`` (N,) ``whole``, -inf elsewhere."""
        mine = (one for one in self._sheets if _alike(one.scores, scores) and (self.reuse_scores or one.is_free()))
        sheet = next(mine, None)
        if sheet is None:  # two, since generate holds what it got last until it has got the next
            sheet = _Sheet(scores)
            self._sheets = [*self._sheets[-1:], sheet]
        sheet.write(ids, values, free, whole)
        return sheet.scores if self.reuse_scores else sheet.scores.detach()


class _Sheet:
    """Scores (N, V) that are written again once nobody has the last ones: there only what changes is written.

    A pass over the vocabulary, N V numbers, takes longer than all else that a step's constraint needs.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.scores = torch.full_like(like, -torch.inf)
        self._ids: torch.Tensor | None = None  # (N, A) where they are not -inf
        self._free: torch.Tensor | None = None  # (N,) rows that are not -inf anywhere
        self._holders, self._version = _holders(self.scores), 0

    def is_free(self) -> bool:
        """Whether nobody else holds these scores, or a view of them, and nobody has written to them."""
        if self._holders is None or self.scores.is_inference():  # which do not count what is written
            return False
        return _holders(self.scores) == self._holders and self.scores._version == self._version

    def write(
        self, ids: torch.Tensor, values: torch.Tensor, free: torch.Tensor | None, whole: torch.Tensor | None
    ) -> None:
        if self._ids is not None:
            self.scores.scatter_(1, self._ids, -torch.inf)
        if self._free is not None:
            self.scores[self._free] = -torch.inf
        self.scores.scatter_(1, ids, values)
        if free is not None and whole is not None:
            self.scores[free] = whole
        self._ids, self._free = ids, free
        if not self.scores.is_inference():
            self._version = self.scores._version


def _holders(tensor: torch.Tensor) -> int | None:
    """How many tensors and others hold this one's memory; None where this torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return None if count is None else int(count(tensor.untyped_storage()._cdata))


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
