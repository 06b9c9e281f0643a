"""Rankings from SGLang: a custom logit processor, sent along with a request that names its candidates.

Start a server with ``--enable-custom-logit-processor --disable-overlap-schedule``, FlexRec installed beside it, and
send what `ranking_arguments` returns: a ranking of the candidates comes back and nothing else. See docs/sglang.md.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexrec.integrations.engine_rows import RankingRow, check_stops, constrain
from flexrec.integrations.vllm_request import ARGUMENT, RankingRequest

__all__ = ["RankingLogitProcessor", "RankingRequest", "ranking_arguments"]

_ROW = "__flexrec_row__"  # where a request keeps its ranking, beside SGLang's "__req__"
_CONFLICTING = ("ignore_eos", "min_new_tokens", "json_schema", "regex", "ebnf", "structural_tag", "beam_width")
"""Sampling parameters that say what may come or when it ends, as a ranking does."""


def _base_class() -> type:
    """SGLang's class for processors that only forbid tokens: of these alone it returns sampling masks, too."""
    if find_spec("sglang") is None:
        return object
    module = import_module("sglang.srt.sampling.custom_logit_processor")
    return getattr(module, "DisallowedTokensLogitsProcessor", module.CustomLogitProcessor)


class RankingLogitProcessor(_base_class()):  # type: ignore[misc]
    """Lets through what completes a ranking of the request's candidates, for requests that carry a `RankingRequest`.

    SGLang makes one of the string that comes with a request, and calls it with the logits of all requests that sent the
    same one. A request whose ranking cannot go on is ended, with an error in the log: it never continues unconstrained.
    """

    def __call__(
        self, logits: torch.Tensor, custom_param_list: Sequence[dict[str, Any] | None] | None = None
    ) -> torch.Tensor:
        """Args: logits (rows, V), changed in place and returned; custom_param_list, the parameters of each row."""
        rankings = enumerate(custom_param_list or [])
        found = [(i, params) for i, params in rankings if params and params.get(ARGUMENT) is not None]
        if not found:
            return logits
        several = len({id(params) for _, params in found}) < len(found)  # rows of drafts
        rows = [_row_of(params, logits.shape[1], several) for _, params in found]

        def upload(values: NDArray[np.int64]) -> torch.Tensor:
            return torch.from_numpy(values).to(logits.device)

        constrain(logits, np.array([i for i, _ in found]), rows, upload)
        return logits

    @classmethod
    def to_str(cls) -> str:
        """What a request sends: the name of this class, which needs neither SGLang nor dill to be said."""
        return json.dumps({"callable": pickle.dumps(cls).hex()})


def ranking_arguments(request: RankingRequest, **sampling_params: Any) -> dict[str, Any]:
    """The fields of a request to ``/generate``, or keyword arguments of ``sglang.Engine.generate``, beside its prompt.

    Args:
        request: the candidates; ``request.ranking(answer["output_ids"])`` reads the answer.
        sampling_params: SGLang's, such as temperature and n.

    Returns:
        ``sampling_params`` with the candidates and room for the longest answer, and ``custom_logit_processor``.

    Raises:
        ValueError: a parameter that does not go with a ranking.

    Example:
        >>> from flexrec.integrations.sglang import RankingRequest, ranking_arguments
        >>> request = RankingRequest([[11, 12], [13]], separator=[10], end=[2])
        >>> arguments = ranking_arguments(request, temperature=0.7)
        >>> arguments["sampling_params"]["max_new_tokens"], sorted(arguments)
        (5, ['custom_logit_processor', 'sampling_params'])
    """
    _check_parameters(request, {"max_new_tokens": request.max_tokens, **sampling_params})
    check_stops(request, list(sampling_params.get("stop_token_ids") or []))
    custom = {**(sampling_params.get("custom_params") or {}), **request.vllm_xargs}
    found = {"max_new_tokens": request.max_tokens, **sampling_params, "custom_params": custom}
    return {"sampling_params": found, "custom_logit_processor": RankingLogitProcessor.to_str()}


def _check_parameters(request: RankingRequest, values: dict[str, Any]) -> None:
    for name in _CONFLICTING:
        if values.get(name):
            raise ValueError(f"{name} cannot be combined with {ARGUMENT}, which says what may come and when it ends")
    most = values.get("max_new_tokens")
    if most is not None and most < request.max_tokens:
        raise ValueError(
            f"max_new_tokens must be at least {request.max_tokens}, which the longest answer to {ARGUMENT} takes; got "
            f"{most}"
        )


def _row_of(params: dict[str, Any], vocab_size: int, several: bool) -> RankingRow:
    """The ranking of a request, brought to what it has generated."""
    req = params["__req__"]
    row = params.get(_ROW)
    if row is None:
        row = params[_ROW] = _new_row(params, req, vocab_size)
    if several:
        row.fail("rankings cannot be constrained with speculative decoding, which asks for several tokens at once")
    known = len(row.output)
    if len(req.output_ids) < known:  # taken back, and generated anew
        del row.output[len(req.output_ids) :]
    row.output += list(req.output_ids[known:])
    return row


def _new_row(params: dict[str, Any], req: Any, vocab_size: int) -> RankingRow:
    stops = sorted(token for token in _stops_of(req) if token < vocab_size)
    try:
        request = RankingRequest.from_extra_args(params)
        assert request is not None
        names = (*_CONFLICTING, "max_new_tokens")
        _check_parameters(request, {name: getattr(req.sampling_params, name, None) for name in names})
        if request.max_token >= vocab_size:
            raise ValueError(f"it uses token {request.max_token}, but the model has {vocab_size} tokens")
        check_stops(request, stops)
        _check_schedule()
        return RankingRow(request, stops, [])
    except ValueError as error:
        # An error here would stop the engine and everybody's requests.
        row = RankingRow(RankingRequest([[0]]), stops, [])
        row.fail(str(error))
        return row


def _stops_of(req: Any) -> set[int]:
    """The tokens that end a request, as SGLang finds them."""
    stops = {*(req.sampling_params.stop_token_ids or ()), *(getattr(req, "eos_token_ids", None) or ())}
    tokenizer = getattr(req, "tokenizer", None)
    if tokenizer is not None:
        stops |= {tokenizer.eos_token_id, *(getattr(tokenizer, "additional_stop_token_ids", None) or ())} - {None}
    return stops


def _check_schedule() -> None:
    """With overlapping schedules SGLang calls processors before it has told requests their last tokens.

    Raises:
        ValueError: so it does here.
    """
    environment = getattr(import_module("sglang.srt.environ").envs, "SGLANG_ENABLE_DELAY_SAMPLE", None)
    if environment is not None and environment.get():
        return
    if find_spec("sglang.srt.runtime_context") is not None:
        disabled = import_module("sglang.srt.runtime_context").get_schedule().disable_overlap_schedule
    else:
        disabled = import_module("sglang.srt.server_args").get_global_server_args().disable_overlap_schedule
    if not disabled:
        raise ValueError(
            "SGLang's overlap scheduler calls logit processors before a request knows its last token: start the server "
            "with --disable-overlap-schedule, or with SGLANG_ENABLE_DELAY_SAMPLE=1 in its environment"
        )
