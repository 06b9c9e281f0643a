"""RankingLogitProcessor in SGLang: called as its sampler calls processors, with requests that come, go and are cut.

SGLang's own classes where it is installed (``make test-sglang``), else stand-ins with their interface.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import json
import logging
import os
import pickle
import sys
import types
import weakref
from array import array
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flexrec.integrations.vllm_request import ARGUMENT, RankingRequest
from flexrec.rankings import RankingState

VOCAB, SEPARATOR, EOS, STOP = 40, 3, 2, 4
MODULE = "flexrec.integrations.sglang"
PROCESSORS = "sglang.srt.sampling.custom_logit_processor"
REAL = find_spec("sglang") is not None
if os.environ.get("FLEXREC_REQUIRE_SGLANG"):
    assert REAL, "make test-sglang puts SGLang in front of the environment"


class CustomLogitProcessor:
    @classmethod
    def from_str(cls, json_str: str) -> Any:
        return pickle.loads(bytes.fromhex(json.loads(json_str)["callable"]))()


class DisallowedTokensLogitsProcessor(CustomLogitProcessor):
    pass


@pytest.fixture(scope="module")
def adapter() -> Iterator[Any]:
    """The module as it is where SGLang is installed; the server has no overlap schedule."""
    with pytest.MonkeyPatch.context() as patch:
        schedule = SimpleNamespace(disable_overlap_schedule=True)
        delayed = SimpleNamespace(get=lambda: False)
        if not REAL:
            modules = {
                "sglang": {},
                "sglang.srt": {},
                "sglang.srt.sampling": {},
                PROCESSORS: {
                    "CustomLogitProcessor": CustomLogitProcessor,
                    "DisallowedTokensLogitsProcessor": DisallowedTokensLogitsProcessor,
                },
                "sglang.srt.environ": {"envs": SimpleNamespace(SGLANG_ENABLE_DELAY_SAMPLE=delayed)},
                "sglang.srt.runtime_context": {},
            }
            for name, names in modules.items():
                module: Any = types.ModuleType(name)
                module.__spec__ = importlib.machinery.ModuleSpec(name, None)
                module.__path__ = []
                module.__dict__.update(names)
                patch.setitem(sys.modules, name, module)
        context = importlib.import_module("sglang.srt.runtime_context")
        patch.setattr(context, "get_schedule", lambda: schedule, raising=False)
        patch.delitem(sys.modules, MODULE, raising=False)
        found = importlib.import_module(MODULE)
        found.schedule = schedule  # for the tests alone
        yield found
    sys.modules.pop(MODULE, None)


class Req:
    """What SGLang's scheduler keeps of a request, as its ``Req`` does."""

    def __init__(self, arguments: dict[str, Any] | None, **sampling: Any) -> None:
        sampling = {"max_new_tokens": 1000, "stop_token_ids": {STOP}, **sampling}
        self.output_ids = array("q")
        self.eos_token_ids, self.tokenizer = {EOS}, None
        self.custom_logit_processor = None
        self.custom_params: dict[str, Any] | None = None
        if arguments is not None:
            self.custom_logit_processor = arguments["custom_logit_processor"]
            sampling |= {"custom_params": None} | arguments["sampling_params"]
            self.custom_params = sampling.pop("custom_params") | {"__req__": weakref.proxy(self)}
            sampling["stop_token_ids"] = {STOP}
        self.sampling_params = SimpleNamespace(**sampling)

    @property
    def finished(self) -> bool:
        return len(self.output_ids) > 0 and self.output_ids[-1] in (EOS, STOP)


@cache
def sglangs_own() -> Any:
    """The function of SGLang's sampler, whose module does not import without a GPU's kernels."""
    source = (Path(next(iter(find_spec("sglang").submodule_search_locations))) / "srt/layers/sampler.py").read_text()
    (node,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == "apply_custom_logit_processor"]
    names: dict[str, Any] = {"torch": torch, "logger": logging.getLogger("sglang"), "SamplingBatchInfo": object}
    exec(compile(ast.Module([node], []), "sampler.py", "exec"), names)
    return names["apply_custom_logit_processor"]


class Batch(SimpleNamespace):
    """What SGLang's ``SamplingBatchInfo`` has for processors."""

    def __len__(self) -> int:
        return len(self.custom_params)


def apply_processors(adapter: Any, requests: list[Req], logits: torch.Tensor) -> None:
    """As SGLang's sampler: requests that sent the same string share a processor, which sees their rows alone."""
    rows_of: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        if request.custom_logit_processor is not None:
            rows_of.setdefault(request.custom_logit_processor, []).append(i)
    processors = importlib.import_module(PROCESSORS)
    made = {sent: processors.CustomLogitProcessor.from_str(sent) for sent in rows_of}
    if REAL:
        entries = {
            hash(sent): SimpleNamespace(processor=made[sent], rows=rows, indices=torch.tensor(rows))
            for sent, rows in rows_of.items()
        }
        params = [request.custom_params for request in requests]
        sglangs_own()(logits, Batch(custom_logit_processor=entries, custom_params=params, device="cpu"))
        return
    for sent, rows in rows_of.items():
        logits[rows] = made[sent](logits[rows], [requests[i].custom_params for i in rows])


def random_request(rng: np.random.Generator, **more: Any) -> RankingRequest:
    tokens = rng.permutation(np.arange(5, VOCAB)).tolist()
    starts = range(0, 2 * int(rng.integers(1, 7)), 2)
    candidates = [tokens[k : k + 1 + int(rng.integers(2))] for k in starts]
    limit = None if rng.random() < 0.5 else int(rng.integers(1, len(candidates) + 1))
    separator = [SEPARATOR] if rng.random() < 0.5 else []
    return RankingRequest(candidates, separator=separator, end=[EOS], num_ranked=limit, **more)


def test_every_ranking_is_right_while_requests_come_go_and_are_cut_back(adapter: Any) -> None:
    rng = np.random.default_rng(0)
    waiting: list[tuple[Req, RankingRequest | None]] = []
    for n in range(60):
        reasoning = {"reasoning_end": [6, 7], "max_reasoning_tokens": 4} if n % 4 == 1 else {}
        request = None if n % 5 == 4 else random_request(rng, **reasoning)
        arguments = None if request is None else adapter.ranking_arguments(request, temperature=0.7)
        waiting.append((Req(arguments), request))
    running: list[tuple[Req, RankingRequest | None]] = []
    finished = []
    while waiting or running:
        while waiting and len(running) < 8:
            running.append(waiting.pop())
        rng.shuffle(running)  # type: ignore[arg-type]
        logits = torch.from_numpy(rng.normal(size=(len(running), VOCAB)).astype(np.float32))
        before = logits.clone()
        apply_processors(adapter, [req for req, _ in running], logits)
        for (req, request), row, old in zip(running, logits, before, strict=True):
            kept = row > -torch.inf
            assert torch.equal(row[kept], old[kept])  # what is left keeps its relative probabilities
            if request is None:
                assert kept.all()
            elif request.reasoning_end is None:
                state = RankingState(
                    [request.candidates],
                    separator=request.separator,
                    end=request.end,
                    num_ranked=request.num_ranked,
                )
                state.advance(np.array(req.output_ids), [0, len(req.output_ids)])
                assert kept.nonzero()[:, 0].tolist() == state.allowed()[0].tolist()
            req.output_ids.append(int(torch.multinomial(row.softmax(0), 1)))
        if running and rng.random() < 0.1:  # retracted: SGLang may drop what it had generated
            req = running[0][0]
            del req.output_ids[int(rng.integers(len(req.output_ids))) :]
        finished += [pair for pair in running if pair[0].finished or len(pair[0].output_ids) > 100]
        running = [pair for pair in running if not pair[0].finished and len(pair[0].output_ids) <= 100]
    assert len(finished) == 60
    for req, request in finished:
        if request is not None:
            ranking = request.ranking(list(req.output_ids))
            assert len(set(ranking.tolist())) == (request.num_ranked or len(request.candidates))


def test_what_is_sent_names_the_class_and_the_candidates(adapter: Any) -> None:
    """As JSON, which a request to the server is; SGLang takes lists and objects of scalars as parameters."""
    request = RankingRequest([[11, 12], [13]], separator=[10], end=[EOS], num_ranked=1)
    arguments = adapter.ranking_arguments(request, temperature=0.5, custom_params={"other": 1})
    sent = json.loads(json.dumps(arguments))
    assert sent["sampling_params"]["temperature"] == 0.5
    assert sent["sampling_params"]["max_new_tokens"] == request.max_tokens
    custom = sent["sampling_params"]["custom_params"]
    assert custom["other"] == 1
    assert isinstance(custom[ARGUMENT], str)
    assert RankingRequest.from_extra_args(custom).candidates == [[11, 12], [13]]
    processor = importlib.import_module(PROCESSORS).CustomLogitProcessor.from_str(sent["custom_logit_processor"])
    assert type(processor) is adapter.RankingLogitProcessor


@pytest.mark.skipif(not REAL, reason="needs SGLang: make test-sglang")
def test_sglang_itself_takes_it() -> None:
    """Its own reading of requests, and its list of the processors with which it returns sampling masks."""
    module = importlib.import_module(PROCESSORS)
    adapter = importlib.import_module(MODULE)
    assert issubclass(adapter.RankingLogitProcessor, module.CustomLogitProcessor)
    assert module.supports_sampling_mask(adapter.RankingLogitProcessor.to_str())
    import dill

    by_sglang = json.dumps({"callable": dill.dumps(adapter.RankingLogitProcessor).hex()})
    assert type(module.CustomLogitProcessor.from_str(by_sglang)) is adapter.RankingLogitProcessor
    sampling = importlib.import_module("sglang.srt.sampling.sampling_params").SamplingParams
    request = RankingRequest([[11, 12], [13]], end=[EOS])
    arguments = adapter.ranking_arguments(request, temperature=0.5, stop_token_ids=[STOP])
    params = sampling(**arguments["sampling_params"])
    params.normalize(None)
    params.verify(VOCAB)
    import msgspec

    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=sampling)  # as it goes to the scheduler
    assert RankingRequest.from_extra_args(decoded.custom_params).candidates == [[11, 12], [13]]


def logits_of(adapter: Any, *requests: Req) -> torch.Tensor:
    logits = torch.zeros(len(requests), VOCAB)
    apply_processors(adapter, list(requests), logits)
    return logits


def allowed(row: torch.Tensor) -> list[int]:
    return (row > -torch.inf).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ignore_eos": True}, "ignore_eos cannot be combined with flexrec"),
        ({"regex": "a+"}, "regex cannot be combined with flexrec"),
        ({"max_new_tokens": 3}, "max_new_tokens must be at least 4, which the longest answer to flexrec takes; got 3"),
        ({"min_new_tokens": 2}, "min_new_tokens cannot be combined"),
        ({"stop_token_ids": [13]}, "token 13 is one of candidates, separator or end"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_parameters_that_do_not_go_with_a_ranking_are_refused(
    adapter: Any, change: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where they are written; and where somebody has written them otherwise, the request ends alone."""
    request = RankingRequest([[11, 12], [13]], end=[EOS])
    with pytest.raises(ValueError, match=message):
        adapter.ranking_arguments(request, **change)
    if "stop_token_ids" in change:
        return
    bad, good = (Req(adapter.ranking_arguments(request)) for _ in range(2))
    for name, value in change.items():
        setattr(bad.sampling_params, name, value)
    with caplog.at_level(logging.ERROR):
        rows = logits_of(adapter, bad, good)
    assert allowed(rows[0]) == [EOS, STOP]
    assert allowed(rows[1]) == [11, 13]
    assert message in caplog.text


def test_a_schedule_that_hides_the_last_token_is_refused(
    adapter: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = RankingRequest([[11, 12], [13]], end=[EOS])
    monkeypatch.setattr(adapter.schedule, "disable_overlap_schedule", False)
    with caplog.at_level(logging.ERROR):
        assert allowed(logits_of(adapter, Req(adapter.ranking_arguments(request)))[0]) == [EOS, STOP]
    assert "start the server with --disable-overlap-schedule" in caplog.text
    environment = importlib.import_module("sglang.srt.environ").envs
    monkeypatch.setattr(environment.SGLANG_ENABLE_DELAY_SAMPLE, "get", lambda: True)
    assert allowed(logits_of(adapter, Req(adapter.ranking_arguments(request)))[0]) == [11, 13]


def test_drafts_of_several_tokens_end_the_request(adapter: Any, caplog: pytest.LogCaptureFixture) -> None:
    req = Req(adapter.ranking_arguments(RankingRequest([[11], [13]], end=[EOS])))
    with caplog.at_level(logging.ERROR):
        rows = adapter.RankingLogitProcessor()(torch.zeros(3, VOCAB), [req.custom_params] * 3)
    assert [allowed(row) for row in rows] == [[EOS, STOP]] * 3
    assert "speculative decoding" in caplog.text


def test_wrong_tokens_and_requests_end_alone(adapter: Any, caplog: pytest.LogCaptureFixture) -> None:
    arguments = adapter.ranking_arguments(RankingRequest([[11, 12], [13]], end=[EOS]))
    wrong, other, beyond = Req(arguments), Req(arguments), Req(arguments)
    wrong.output_ids.append(30)
    beyond.custom_params[ARGUMENT] = json.dumps({"candidates": [[VOCAB]]})
    with caplog.at_level(logging.ERROR):
        rows = logits_of(adapter, wrong, other, beyond)
    assert [allowed(row) for row in rows] == [[EOS, STOP], [11, 13], [EOS, STOP]]
    assert "it generated a token that its ranking does not allow" in caplog.text
    assert f"it uses token {VOCAB}, but the model has {VOCAB} tokens" in caplog.text
