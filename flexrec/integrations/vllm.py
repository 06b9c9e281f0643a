"""Rankings from vLLM: a logits processor for both of its model runners, asked for by a request's arguments.

Start a server with ``vllm serve MODEL --logits-processors flexrec.integrations.vllm:RankingLogitsProcessor``, or give
``logits_processors=[RankingLogitsProcessor]`` to ``vllm.LLM``. Requests that carry a `RankingRequest` answer with a
ranking of their candidates and nothing else; others are not touched. See docs/vllm.md.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flexrec.integrations.engine_rows import RankingRow, check_stops, constrain
from flexrec.integrations.vllm_request import ARGUMENT, RankingRequest

__all__ = ["RankingLogitsProcessor", "RankingRequest"]

_V1 = "vllm.v1.sample.logits_processor"
_V2 = "vllm.v1.worker.gpu.sample.logits_processor"  # of model runner V2, since vLLM 0.31


def _base_classes() -> tuple[type, ...]:
    """vLLM's base classes, of which a processor must be a subclass: one for each model runner that there is."""
    if find_spec("vllm") is None:
        return ()
    bases = [import_module(_V1).LogitsProcessor]
    try:
        bases.append(import_module(_V2).LogitsProcessor)
    except ModuleNotFoundError as error:
        if error.name is None or not _V2.startswith(error.name):
            raise
    return tuple(bases)


class RankingLogitsProcessor(*_base_classes()):  # type: ignore[misc]
    """Lets through what completes a ranking of the request's candidates, for requests that carry a `RankingRequest`.

    The same class serves the V1 model runner, which tells of requests by ``update_state``, and model runner V2, which
    calls ``add_request`` and ``apply_staged_writes``. A request whose ranking cannot go on (something else changed its
    tokens, say) is ended, with an error in the log: it never continues unconstrained.

    Args:
        vllm_config: vLLM's configuration.
        device: of the logits (V1), or the state that the runner shares with its processors (V2).
        is_pin_memory: given by V1 alone.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: vLLM is configured so that rankings cannot be constrained; the message says what to change.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool | None = None) -> None:
        if RankingLogitsProcessor.__base__ is object:
            raise ImportError("RankingLogitsProcessor is a part of vLLM, which is not installed: pip install vllm")
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "rankings cannot be constrained with speculative decoding: start vLLM without speculative_config, "
                "or without flexrec.integrations.vllm:RankingLogitsProcessor"
            )
        self._vocab_size: int = vllm_config.model_config.get_vocab_size()
        self._rows: dict[int, RankingRow] = {}  # by index in the batch (V1) or slot (V2)
        self._fetched: _Fetched | None = None
        if is_pin_memory is None:
            self._states, self._device = device, device.device
            self._pin = self._device.type == "cuda"
        else:
            self._states, self._device, self._pin = None, device, is_pin_memory
            _check_tokens_are_known(vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check a request before it enters the engine.

        Raises:
            ValueError: its arguments are wrong, or do not go with other sampling parameters; names which.
        """
        request = RankingRequest.from_extra_args(sampling_params.extra_args)
        if request is None:
            return
        for name in _CONFLICTING:
            if getattr(sampling_params, name, None):
                raise ValueError(
                    f"{name} cannot be combined with {ARGUMENT}, which says what may come and when it ends"
                )
        if sampling_params.max_tokens is not None and sampling_params.max_tokens < request.max_tokens:
            raise ValueError(
                f"max_tokens must be at least {request.max_tokens}, which the longest answer to {ARGUMENT} takes; "
                f"got {sampling_params.max_tokens}"
            )
        check_stops(request, sampling_params.stop_token_ids or [])

    def is_argmax_invariant(self) -> bool:
        """False: the most probable token may not be allowed."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: follow the requests that leave, enter and move within the batch, in this order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, output in batch_update.added:
            self._place(index, self._row_of(params, output))
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            self._place(target, moved)
            if direction.name == "SWAP":
                self._place(source, replaced)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request takes a slot; returns whether it is one of ours."""
        self._place(req_idx, self._row_of(sampling_params, []))
        return req_idx in self._rows

    def apply_staged_writes(self) -> None:
        """V2, before the forward pass: have the new tokens copied to the host while it runs, for `apply`."""
        self._fetched = None
        if not self._rows:
            return
        slots = np.array(list(self._rows))
        first = self._states.prompt_len.np[slots] + np.array([len(row.output) for row in self._rows.values()])
        # One token a step, but all that a request had generated before it was preempted.
        width = max(1, int((self._states.prefill_len.np[slots] - first).max()))
        all_tokens = self._states.all_token_ids.gpu  # (slots, max_model_len)
        columns = np.minimum(first[:, None] + np.arange(width), all_tokens.shape[1] - 1)
        where = self._upload(np.column_stack([slots, columns]))
        totals = self._states.total_len.gpu[where[:, :1]]
        values = torch.cat([totals, all_tokens[where[:, :1], where[:, 1:]]], dim=1).to("cpu", non_blocking=True)
        event = None
        if self._device.type != "cpu":
            event = torch.Event(self._device)
            event.record()
        self._fetched = _Fetched(slots, first, values, event)

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Args: logits (rows, V), changed in place and returned; ctx, by V2 alone, says which slot a row belongs to."""
        if not self._rows:
            return logits
        if ctx is None:
            constrain(logits, np.array(list(self._rows)), list(self._rows.values()), self._upload)
            return logits
        slots = ctx.idx_mapping_np
        if len(logits) != len(slots):
            raise RuntimeError(f"expected one row of logits for each of {len(slots)} requests, got {len(logits)}")
        index = np.array([i for i, slot in enumerate(slots.tolist()) if slot in self._rows], dtype=np.int64)
        if len(index) > 0:
            rows = [self._rows[slot] for slot in slots[index].tolist()]
            self._take_fetched()
            constrain(logits, index, rows, self._upload)
        return logits

    def _row_of(self, params: Any, output: list[int]) -> RankingRow | None:
        """A request that enters the batch with what it has generated before; None where it asks for no ranking."""
        if not params.extra_args or params.extra_args.get(ARGUMENT) is None:
            return None
        stops = sorted(token for token in params.all_stop_token_ids if token < self._vocab_size)
        try:
            request = RankingRequest.from_extra_args(params.extra_args)
            assert request is not None
            if request.max_token >= self._vocab_size:
                raise ValueError(f"it uses token {request.max_token}, but the model has {self._vocab_size} tokens")
            check_stops(request, stops)
            return RankingRow(request, stops, output)
        except ValueError as error:
            # Most of these were refused by `validate_params`, which does not know the model. Here an error would stop
            # the engine and everybody's requests.
            row = RankingRow(RankingRequest([[0]]), stops, output)
            row.fail(str(error))
            return row

    def _place(self, index: int, row: RankingRow | None) -> None:
        if row is None:
            self._rows.pop(index, None)
        else:
            self._rows[index] = row

    def _take_fetched(self) -> None:
        """Append the tokens that `apply_staged_writes` asked for to the rows' outputs."""
        fetched, self._fetched = self._fetched, None
        if fetched is None:
            return
        if fetched.event is not None:
            fetched.event.synchronize()
        for slot, first, (total, *tokens) in zip(
            fetched.slots.tolist(), fetched.first.tolist(), fetched.values.tolist(), strict=True
        ):
            row = self._rows[slot]
            if total < first:  # tokens were taken back
                del row.output[total - first :]
            elif total - first <= len(tokens):
                row.output += tokens[: total - first]
            else:
                row.fail(f"{total - first} tokens came at once, where {len(tokens)} were expected")

    def _upload(self, values: NDArray[np.int64]) -> torch.Tensor:
        host = torch.from_numpy(values)
        return (host.pin_memory() if self._pin else host).to(self._device, non_blocking=True)


_CONFLICTING = (
    *("ignore_eos", "min_tokens", "allowed_token_ids", "bad_words", "thinking_token_budget"),
    *("structured_outputs", "guided_decoding"),  # the same, by the names of later and earlier versions
)
"""Sampling parameters that say what may come or when it ends, as a ranking does."""


def _check_tokens_are_known(vllm_config: Any) -> None:
    """Under V1's asynchronous scheduling only processors that were named to vLLM are told which tokens were sampled."""
    if vllm_config.scheduler_config.async_scheduling and not vllm_config.model_config.logits_processors:
        raise ValueError(
            "vLLM's V1 model runner schedules asynchronously and then does not tell processors of an entry point what "
            "was sampled: name the processor (--logits-processors flexrec.integrations.vllm:RankingLogitsProcessor), "
            "or start vLLM with --no-async-scheduling"
        )


class _Fetched(NamedTuple):
    """Tokens on their way from the device."""

    slots: NDArray[np.int64]  # (R,)
    first: NDArray[np.int64]  # (R,) tokens known before, those of the prompt included
    values: torch.Tensor  # (R, 1 + width) how many tokens there are, and those from `first` on
    event: Any  # after which `values` are there; None where they are already
