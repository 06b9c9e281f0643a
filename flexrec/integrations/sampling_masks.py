"""Sampling masks of engines as sparse rows: which tokens top-k, top-p and min-p had left at every sampled position.

What engines return, by completion:

- vLLM (from 0.28, ``LLM(.., return_sampling_mask=True)``): ``CompletionOutput.sampling_mask``, a ``SamplingMask`` whose
  ``token_ids`` hold a list for each token of the completion; in its first form flat ``token_ids`` with ``offsets``, as
  ``SamplingMaskLists`` still do inside of the engine; ``None`` where the mask got lost.
- SGLang (``return_sampling_mask``): ``meta_info["output_token_sampling_mask"]``, a list for each of ``output_ids``;
  inside of the engine ``SamplingMaskChunk``, flat ``token_ids`` with ``lengths``.
- Others: nested lists, or flat ``ids`` with ``counts``, where a count of 0 stands for the whole vocabulary.
- ``transformers``: nothing; :class:`SupportRecorder` notes what each step of ``generate`` could draw from.

:func:`flexrec.replay_logprobs` takes what :func:`joined` makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexrec.checks import check_choice
from flexrec.ops.library import kernels

EMPTY = ("whole", "error")
_LENGTHS = ("lengths", "counts")  # what flat masks call the number of tokens of every position
_IDS = ("token_ids", "ids")


@dataclass(frozen=True)
class SamplingSupport:
    """What the tokens of one completion were sampled from.

    Attributes:
        token_ids: (nnz,) int64; position t's are ``token_ids[offsets[t] : offsets[t + 1]]``, none: all tokens.
        offsets: (T + 1,) int64, T the completion's tokens.
        logprobs: (T,) float32, the sampled tokens' log-probs under that support, as the sampler said them; or None.
    """

    token_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    logprobs: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, position: int) -> NDArray[np.int64]:
        return self.token_ids[self.offsets[position] : self.offsets[position + 1]]


def read_mask(
    mask: Any, tokens: Sequence[int], *, completion: int = 0, vocab_size: int | None = None, empty: str = "whole"
) -> SamplingSupport:
    """One completion's mask, checked against its tokens.

    Args:
        mask: an engine's object, or lists, in any of the forms above.
        tokens: T token ids, what was sampled.
        completion: the number by which messages call it.
        vocab_size: what ids must be below, if given.
        empty: what a position without tokens means: "whole", nothing was cut, or "error", where truncation was on.

    Raises:
        ValueError: no mask; another number of positions than tokens; a token twice, out of range, or a sampled token
            outside of its support; a position without tokens where ``empty`` is "error". The message names completion
            and position.
        TypeError: ids that are not integers, or an object of another form.

    Example:
        >>> from flexrec.integrations.sampling_masks import read_mask
        >>> read_mask([[5, 7], [], [2]], [7, 3, 2]).offsets
        array([0, 2, 2, 3])
    """
    check_choice("empty", empty, EMPTY)
    name = f"sampling mask of completion {completion}"
    if mask is None:
        raise ValueError(
            f"completion {completion} has no sampling mask, though one was promised: start vLLM with "
            f"return_sampling_mask=True (Model Runner V2, without batch-sharded sampling, which drops masks), ask "
            f"SGLang for return_sampling_mask, and leave out aborted requests"
        )
    ids, offsets = _flat(mask, name)
    if len(offsets) != len(tokens) + 1:
        raise ValueError(f"{name} has {len(offsets) - 1} positions, but the completion has {len(tokens)} tokens")
    support = SamplingSupport(ids, offsets)
    _check(support, np.asarray(tokens, dtype=np.int64).reshape(-1), name, vocab_size, empty)
    return support


def from_vllm(outputs: Sequence[Any], *, vocab_size: int | None = None, empty: str = "error") -> list[SamplingSupport]:
    """The supports of vLLM's ``RequestOutput`` (each with one completion or more) or ``CompletionOutput``, in order.

    Log-probs are the engine's where it was asked for them, with ``logprobs_mode="processed_logprobs"``; without it they
    are of another distribution. The other arguments and the errors are those of :func:`read_mask`.
    """
    completions = list(chain.from_iterable(getattr(output, "outputs", None) or [output] for output in outputs))
    supports = []
    for number, output in enumerate(completions):
        tokens = list(output.token_ids)
        support = read_mask(output.sampling_mask, tokens, completion=number, vocab_size=vocab_size, empty=empty)
        if output.logprobs:
            said = [entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)]
            support = SamplingSupport(support.token_ids, support.offsets, np.asarray(said, dtype=np.float32))
        supports.append(support)
    return supports


def from_sglang(
    responses: Sequence[Mapping[str, Any]], *, vocab_size: int | None = None, empty: str = "error"
) -> list[SamplingSupport]:
    """The supports of SGLang's answers to ``/generate``: ``output_ids`` and ``meta_info`` of each.

    Log-probs are ``output_token_sampling_logprobs``: of the sampled token, or one for every token of the support. The
    other arguments and the errors are those of :func:`read_mask`.
    """
    supports = []
    for number, response in enumerate(responses):
        tokens, found = list(response["output_ids"]), response["meta_info"]
        support = read_mask(
            found.get("output_token_sampling_mask"), tokens, completion=number, vocab_size=vocab_size, empty=empty
        )
        said = found.get("output_token_sampling_logprobs")
        if said is not None:
            if len(said) != len(tokens):
                raise ValueError(f"completion {number} has {len(tokens)} tokens, but {len(said)} sampling log-probs")
            own = [_of_sampled(one, support[t], tokens[t]) for t, one in enumerate(said)]
            support = SamplingSupport(support.token_ids, support.offsets, np.asarray(own, dtype=np.float32))
        supports.append(support)
    return supports


def joined(
    supports: Sequence[SamplingSupport], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """token_ids (nnz,) and offsets (M + 1,), int64, of the M positions of all completions, one after the other.

    Example:
        >>> from flexrec.integrations.sampling_masks import joined, read_mask
        >>> joined([read_mask([[5, 7]], [7]), read_mask([[1]], [1])])
        (tensor([5, 7, 1]), tensor([0, 2, 3]))
    """
    counts = [np.diff(support.offsets) for support in supports]
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *(support.token_ids for support in supports)])
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), *counts]).cumsum()
    return torch.from_numpy(ids).to(device), torch.from_numpy(offsets).to(device)


class SupportRecorder:
    """Notes which tokens each step of transformers' ``generate`` could draw from; ``with recorder.of(model): ..``.

    Scores are read behind the last processor, where what was cut is -inf, just as ``generate`` draws from them. Greedy
    decoding and beams sample nothing and are not for it.

    Example:
        >>> from flexrec.integrations.sampling_masks import SupportRecorder
        >>> recorder = SupportRecorder()
        >>> scores = torch.tensor([[0.0, 0.0, -torch.inf]])
        >>> recorder(torch.tensor([[7]]), scores) is scores  # as generate calls it, behind its own processors
        True
        >>> support = recorder.supports([[1]])[0]
        >>> support[0], support.logprobs
        (array([0, 1]), array([-0.6931472], dtype=float32))
    """

    def __init__(self) -> None:
        self._counts: list[NDArray[np.int64]] = []  # (B,) for each step; 0: nothing was cut
        self._ids: list[NDArray[np.int64]] = []  # (nnz,) for each step, row after row
        self._logprobs: list[torch.Tensor] = []  # (B,) for each step whose tokens are known
        self._last: torch.Tensor | None = None  # (B, V) log-probs of the step whose tokens are not

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._last is not None:
            self._logprobs.append(self._last.gather(1, input_ids[:, -1:])[:, 0].cpu())
        kept = torch.isfinite(scores)
        kept &= (kept.sum(1) < scores.shape[1])[:, None]
        self._counts.append(kept.sum(1).cpu().numpy())
        self._ids.append(kept.nonzero()[:, 1].cpu().numpy())
        self._last = scores.float().log_softmax(1)
        return scores

    @contextmanager
    def of(self, model: Any) -> Iterator[SupportRecorder]:
        """Inside, ``model.generate`` is recorded; ``model`` is transformers' own, without what wraps it."""
        self.__init__()  # type: ignore[misc]
        make = model._get_logits_processor

        def with_recorder(*args: Any, **kwargs: Any) -> Any:
            processors = make(*args, **kwargs)
            processors.append(self)  # a custom processor would stand before those that cut
            return processors

        model._get_logits_processor = with_recorder
        try:
            yield self
        finally:
            del model._get_logits_processor

    def supports(self, completions: Sequence[Sequence[int]]) -> list[SamplingSupport]:
        """The supports of the B completions that were generated, each cut to its own tokens.

        Raises:
            ValueError: other completions than were recorded.
        """
        steps = len(self._counts)
        longest = max(map(len, completions), default=0)
        rows = len(self._counts[0]) if steps else 0
        if rows != len(completions) or longest > steps:
            raise ValueError(
                f"{rows} completions of {steps} tokens were recorded, but {len(completions)} of up to {longest} came: "
                f"generate them in one call of the model that is recorded"
            )
        counts = np.stack(self._counts, axis=1) if steps else np.zeros((0, 0), dtype=np.int64)  # (B, steps)
        starts = np.cumsum(counts, axis=0) - counts  # (B, steps) where a row's ids begin in its step's
        found = []
        for row, tokens in enumerate(completions):
            length = len(tokens)
            parts = [self._ids[t][starts[row, t] : starts[row, t] + counts[row, t]] for t in range(length)]
            ids = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
            offsets = np.concatenate([np.zeros(1, dtype=np.int64), counts[row, :length]]).cumsum()
            logprobs = np.asarray([self._logprob(row, t, token) for t, token in enumerate(tokens)], dtype=np.float32)
            support = SamplingSupport(ids, offsets, logprobs)
            _check(support, np.asarray(tokens, dtype=np.int64), f"recorded support of completion {row}", None, "whole")
            found.append(support)
        return found

    def _logprob(self, row: int, step: int, token: int) -> float:
        if step < len(self._logprobs):
            return float(self._logprobs[step][row])
        assert self._last is not None
        return float(self._last[row, token])


def _flat(mask: Any, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """token_ids (nnz,) and offsets (T + 1,) of any form."""
    if not _is_list(mask):
        ids = next((getattr(mask, field) for field in _IDS if hasattr(mask, field)), None)
        if ids is None:
            raise TypeError(f"{name} is a {type(mask).__name__}, which has no token_ids: {_FORMS}")
        if getattr(mask, "cu_num_generated_tokens", None) is not None:
            raise ValueError(f"{name} is that of a whole batch: take slice_request(row, positions) of it")
        lengths = next((getattr(mask, field) for field in _LENGTHS if hasattr(mask, field)), None)
        offsets = getattr(mask, "offsets", None)
        if lengths is not None:
            counts = _integers(lengths, name)
            offsets = np.concatenate([np.zeros(1, dtype=np.int64), counts]).cumsum()
        if offsets is not None:
            return _integers(ids, name), _checked_offsets(_integers(offsets, name), len(ids), name)
        mask = ids if len(ids) == 0 or _is_list(ids[0]) or ids[0] is None else [ids]  # flat: of a single position
    counts = np.zeros(len(mask) + 1, dtype=np.int64)
    for position, row in enumerate(mask):
        if row is None:
            raise ValueError(f"{name}, position {position}: None, though its support was promised")
        if not _is_list(row):
            raise TypeError(f"{name}, position {position}: {type(row).__name__} is no list of token ids; {_FORMS}")
        counts[position + 1] = len(row)
    return _integers(list(chain.from_iterable(mask)), name), counts.cumsum()


_FORMS = "give lists of token ids, or an object of vLLM or SGLang"


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, np.ndarray, torch.Tensor)) or (isinstance(value, tuple) and type(value) is tuple)


def _integers(values: Any, name: str) -> NDArray[np.int64]:
    array = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if array.size and (array.dtype.kind not in "iu" or array.ndim != 1):
        raise TypeError(f"{name} must hold integers in one row, got {array.dtype} of shape {array.shape}")
    return array.reshape(-1).astype(np.int64)


def _checked_offsets(offsets: NDArray[np.int64], size: int, name: str) -> NDArray[np.int64]:
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != size:
        ends = f"{offsets[0]} to {offsets[-1]}" if len(offsets) else "none"
        raise ValueError(f"{name} has {size} token ids, so its offsets must go from 0 to {size}, got {ends}")
    if (np.diff(offsets) < 0).any():
        raise ValueError(f"{name}, position {int((np.diff(offsets) < 0).argmax())}: fewer than no tokens")
    return offsets


def _check(support: SamplingSupport, tokens: NDArray[np.int64], name: str, vocab_size: int | None, empty: str) -> None:
    """Raise ValueError at the first fault."""
    ids, counts = support.token_ids, np.diff(support.offsets)
    size = vocab_size if vocab_size is not None else 1 + max(int(x.max(initial=-1)) for x in (ids, tokens))
    if empty == "error" and not counts.all():
        raise ValueError(f"{name}, position {int((counts == 0).argmax())}: no tokens, though sampling was truncated")
    outside = (tokens < 0) | (tokens >= size)
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(f"{name}, position {at}: sampled token {tokens[at]} is not in [0, {size - 1}]")
    restricted = counts.nonzero()[0]
    if not len(restricted):
        return
    numba = kernels("numba", "restricted_logprobs")
    ends = np.concatenate([support.offsets[:1], support.offsets[1:][restricted]])
    fault, a, b = numba.check_entries(ids, ends, tokens[restricted], size)
    if fault == numba.OUTSIDE:
        at = int(np.searchsorted(support.offsets, a, side="right")) - 1
        raise ValueError(f"{name}, position {at}: token {b} is not in [0, {size - 1}]")
    if fault == numba.REPEATED:
        raise ValueError(f"{name}, position {restricted[a]}: token {b} twice")
    if fault == numba.MISSING_TARGET:
        raise ValueError(f"{name}, position {restricted[a]}: sampled token {b} is not in its support")


def _of_sampled(said: Any, support: NDArray[np.int64], token: int) -> float:
    """One position's log-prob, of which SGLang says one, or one for every token of the support."""
    return float(said[int((support == token).argmax())] if _is_list(said) else said)
