"""What a request asks of vLLM's `flexrec.integrations.vllm`, and what its answer says; needs no vLLM itself.

::

    request = RankingRequest(candidates, separator=separator, end=[tokenizer.eos_token_id])
    params = SamplingParams(max_tokens=request.max_tokens, extra_args=request.extra_args)
    completion = llm.generate(prompt, params)[0].outputs[0]
    ranking = request.ranking(completion.token_ids)  # (T,)
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexrec.rankings.reasoning import ReasoningRule, reasoning_rule
from flexrec.rankings.state import RankingState, TokenIds

ARGUMENT = "flexrec"
"""The name under which a request carries its `RankingRequest`."""


@dataclass(eq=False)
class RankingRequest:
    """One ranking, as tokens: the arguments of `flexrec.rankings.RankingState` for one row, and of its reasoning.

    Args:
        candidates: K sequences of token ids.
        separator: token ids between items.
        end: token ids after the last item, usually the end-of-sequence token.
        num_ranked: rank at most so many; None for all.
        reasoning_end: token ids of the marker that ends free-form reasoning before the ranking; None for none.
        max_reasoning_tokens: after so many tokens without the marker it is forced.
        num_tokens: the tokenizer's size, beyond which many embeddings are padded: reasoning has no token from there.

    Raises:
        ValueError, TypeError: as `flexrec.rankings.RankingState` and `flexrec.rankings.reasoning.reasoning_rule`.
    """

    candidates: Sequence[TokenIds]
    separator: TokenIds = ()
    end: TokenIds = ()
    num_ranked: int | None = None
    reasoning_end: TokenIds | None = None
    max_reasoning_tokens: int | None = None
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.num_ranked, bool):
            raise TypeError("num_ranked must be an int, got bool")
        state = self.state()
        # Lists of ints travel to a server whatever they came as.
        self.candidates = [_integers("candidates", sequence) for sequence in self.candidates]
        self.separator, self.end = _integers("separator", self.separator), _integers("end", self.end)
        self.num_ranked = None if self.num_ranked is None else operator.index(self.num_ranked)
        if self.num_tokens is not None:
            (self.num_tokens,) = _integers("num_tokens", [self.num_tokens])
            if self.num_tokens < 1:
                raise ValueError(f"num_tokens must be the tokenizer's size, got {self.num_tokens}")
        if self.reasoning_end is not None:
            self.reasoning_end = _integers("reasoning_end", self.reasoning_end)
        rule = self.reasoning_rule()
        self.max_token = max([state.max_token, *(rule.end if rule else ())])
        """The largest token id in use."""
        # Where nothing is spelled at the end the token that stops the request comes on top.
        self.max_tokens = state.max_length + (not self.end) + (rule.max_length if rule else 0)
        """Enough tokens for every answer: what ``SamplingParams(max_tokens=..)`` must allow."""

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> RankingRequest | None:
        """The request in ``SamplingParams.extra_args``, as an object or as JSON; None where there is none.

        Raises:
            ValueError: anything wrong with it; the message names the field.
        """
        value = (extra_args or {}).get(ARGUMENT)
        if value is None:
            return None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{ARGUMENT} must be JSON where it is a string: {error}") from None
        known = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping):
            raise ValueError(f"{ARGUMENT} must be an object of {', '.join(known)}; got {type(value).__name__}")
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ValueError(f"{ARGUMENT} has the unknown field {unknown[0]!r}; known are {', '.join(known)}")
        if "candidates" not in value:
            raise ValueError(f"{ARGUMENT} needs the field candidates: the token ids of each")
        try:
            return cls(**value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{ARGUMENT}: {error}") from None

    @property
    def extra_args(self) -> dict[str, Any]:
        """For ``SamplingParams(extra_args=..)``."""
        return {ARGUMENT: {name: value for name, value in asdict(self).items() if value not in (None, ())}}

    @property
    def vllm_xargs(self) -> dict[str, str]:
        """For ``"vllm_xargs"`` of the OpenAI-compatible server, which takes no objects: the same as JSON."""
        return {ARGUMENT: json.dumps(self.extra_args[ARGUMENT], separators=(",", ":"))}

    def state(self) -> RankingState:
        """A ranking that has not begun."""
        try:
            return RankingState([self.candidates], separator=self.separator, end=self.end, num_ranked=self.num_ranked)
        except (TypeError, ValueError) as error:
            # The one list of this request is what its caller knows as candidates.
            raise type(error)(str(error).replace("candidates[0]", "candidates")) from None

    def reasoning_rule(self, eos_token_ids: Sequence[int] = ()) -> ReasoningRule | None:
        """When the reasoning ends, in which ``eos_token_ids`` must not come; None where there is none."""
        return reasoning_rule(self.reasoning_end, self.max_reasoning_tokens, eos_token_ids)

    def ranking(self, token_ids: ArrayLike) -> NDArray[np.int32]:
        """(T,) int32 candidate index by rank of the completion ``token_ids`` (L,); tokens after its end are ignored.

        Raises:
            ValueError: the completion is no ranking of the candidates, or was cut short.
        """
        tokens = np.asarray(token_ids, dtype=np.int64)
        if tokens.ndim != 1:
            raise ValueError(f"token_ids must be those of one completion, (L,), got shape {tokens.shape}")
        rule = self.reasoning_rule()
        begin = 0 if rule is None else int(rule.lengths(tokens[None])[0])
        state = self.state()
        if begin >= 0:
            state.advance(tokens[begin:], [0, len(tokens) - begin], strict=False)
        if not state.done()[0]:
            raise ValueError(
                f"the completion of {len(tokens)} tokens is no full ranking of the {len(self.candidates)} candidates: "
                f"it was cut short, or the server does not run flexrec.integrations.vllm (see docs/vllm.md)"
            )
        return state.rankings()[0]


def _integers(name: str, values: TokenIds) -> list[int]:
    if isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of token ids, got str")
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{name} must be a sequence of token ids, got {values!r:.80}") from None
