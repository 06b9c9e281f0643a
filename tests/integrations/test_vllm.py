"""RankingLogitsProcessor in vLLM's two model runners: driven as each of them drives its processors.

The base classes are vLLM's own where it is installed, and stand-ins with its documented interface where it is not. The
runners here do what vLLM's do to a processor: requests come, go, move, are preempted and resumed.
"""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import json
import logging
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flexrec.integrations.vllm_request import RankingRequest

VOCAB, SEPARATOR, EOS, STOP = 40, 3, 2, 4
MODULE = "flexrec.integrations.vllm"
RUNNERS = ["v1", "v2"]


class V1Base(ABC):
    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        return None

    @abstractmethod
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None: ...
    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor: ...
    @abstractmethod
    def is_argmax_invariant(self) -> bool: ...
    @abstractmethod
    def update_state(self, batch_update: Any) -> None: ...


class V2Base(ABC):
    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        return None

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return True

    def apply_staged_writes(self) -> None:
        return None

    @abstractmethod
    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor: ...


BASES = {
    "vllm.v1.sample.logits_processor": V1Base,
    "vllm.v1.worker.gpu.sample.logits_processor": V2Base,
}


@pytest.fixture(scope="module")
def processor_class() -> Iterator[Any]:
    """The class as it is defined where vLLM is installed."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("vllm") is None:
            vllm = types.ModuleType("vllm")
            vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
            patch.setitem(sys.modules, "vllm", vllm)
            for name, base in BASES.items():
                module: Any = types.ModuleType(name)
                module.LogitsProcessor = base
                patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, MODULE, raising=False)
        yield importlib.import_module(MODULE).RankingLogitsProcessor
    sys.modules.pop(MODULE, None)


def config(*, speculative: Any = None, asynchronous: bool = False, named: Any = None) -> Any:
    return SimpleNamespace(
        speculative_config=speculative,
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
        model_config=SimpleNamespace(logits_processors=named, get_vocab_size=lambda: VOCAB),
    )


def params(request: RankingRequest | dict[str, Any] | None, **other: Any) -> Any:
    """Sampling parameters as they come to a processor: the engine has added the end of sequence to the stops."""
    extra_args = request.extra_args if isinstance(request, RankingRequest) else request
    values = {"extra_args": extra_args, "max_tokens": 1000, "stop_token_ids": None, "all_stop_token_ids": {EOS, STOP}}
    return SimpleNamespace(**{**values, **other})


class Request:
    def __init__(self, params: Any, prompt: list[int]) -> None:
        self.params, self.prompt = params, prompt
        self.output: list[int] = []


class V1Runner:
    """A persistent batch whose requests' places are told by batch updates; see vLLM's ``BatchUpdate``."""

    class Direction(enum.Enum):
        UNIDIRECTIONAL = 0
        SWAP = 1

    def __init__(self, processor_class: Any) -> None:
        self.processor = processor_class(config(), torch.device("cpu"), False)
        self.batch: list[Request] = []

    def step(self, requests: list[Request], rng: np.random.Generator) -> tuple[list[Request], torch.Tensor]:
        """One step with these requests in the batch: their order, and their logits after the processor."""
        places: list[Request | None] = [request if request in requests else None for request in self.batch]
        removed = [i for i, request in enumerate(places) if request is None]
        added = []
        for request in requests:
            if request in places:
                continue
            index = removed.pop(0) if removed else len(places)
            places[index : index + 1] = [request]
            added.append((index, request.params, request.prompt, request.output))
        moved = []
        for index in removed:  # the last ones fill the holes
            while places and places[-1] is None:
                places.pop()
            if index < len(places):
                moved.append((len(places) - 1, index, self.Direction.UNIDIRECTIONAL))
                places[index] = places.pop()
        if len(places) > 1 and rng.random() < 0.5:
            a, b = rng.choice(len(places), size=2, replace=False).tolist()
            moved.append((a, b, self.Direction.SWAP))
            places[a], places[b] = places[b], places[a]
        self.batch = [request for request in places if request is not None]
        changed = bool(removed or added or moved)
        update = SimpleNamespace(batch_size=len(self.batch), removed=removed, added=added, moved=moved)
        self.processor.update_state(update if changed else None)
        self.before = torch.from_numpy(rng.normal(size=(len(self.batch), VOCAB)).astype(np.float32))
        return self.batch, self.processor.apply(self.before.clone())

    def take_back(self, request: Request, count: int) -> None:
        del request.output[-count:]


class V2Runner:
    """Requests in slots of tensors, in another order at each step; see vLLM's ``LogitsContext``."""

    def __init__(self, processor_class: Any) -> None:
        size, length = 12, 96
        self.states = SimpleNamespace(
            device=torch.device("cpu"),
            vocab_size=VOCAB,
            prompt_len=SimpleNamespace(np=np.zeros(size, dtype=np.int32)),
            prefill_len=SimpleNamespace(np=np.zeros(size, dtype=np.int32)),
            total_len=SimpleNamespace(gpu=torch.zeros(size, dtype=torch.int32)),
            all_token_ids=SimpleNamespace(gpu=torch.zeros(size, length, dtype=torch.int32)),
        )
        self.processor = processor_class(config(asynchronous=True), self.states)
        self.slots: dict[Request, int] = {}

    def step(self, requests: list[Request], rng: np.random.Generator) -> tuple[list[Request], torch.Tensor]:
        states = self.states
        for request, slot in list(self.slots.items()):
            if request not in requests:
                del self.slots[request]
            elif request.output:  # what was sampled since
                self._write(slot, request)
        for request in requests:
            if request in self.slots:
                continue
            free = sorted(set(range(len(states.prompt_len.np))) - set(self.slots.values()))
            slot = self.slots[request] = int(rng.choice(free))
            states.prompt_len.np[slot] = len(request.prompt)
            states.prefill_len.np[slot] = len(request.prompt) + len(request.output)
            self._write(slot, request)
            ours = bool(request.params.extra_args)
            assert self.processor.add_request(slot, request.params) is ours
        self.processor.apply_staged_writes()
        order = [requests[i] for i in rng.permutation(len(requests))]
        mapping = np.array([self.slots[request] for request in order])
        ctx = SimpleNamespace(idx_mapping_np=mapping, expanded_idx_mapping=torch.from_numpy(mapping))
        self.before = torch.from_numpy(rng.normal(size=(len(order), VOCAB)).astype(np.float32))
        return order, self.processor.apply(self.before.clone(), ctx)

    def _write(self, slot: int, request: Request) -> None:
        tokens = torch.tensor(request.prompt + request.output, dtype=torch.int32)
        self.states.all_token_ids.gpu[slot, : len(tokens)] = tokens
        self.states.total_len.gpu[slot] = len(tokens)

    def take_back(self, request: Request, count: int) -> None:
        del request.output[-count:]
        self._write(self.slots[request], request)


def runner_of(kind: str, processor_class: Any) -> Any:
    return {"v1": V1Runner, "v2": V2Runner}[kind](processor_class)


def random_request(rng: np.random.Generator) -> RankingRequest:
    end = [[], [EOS], [5, EOS]][rng.integers(3)]
    lengths = rng.integers(1, 5, size=rng.integers(1, 7)) if end else [3] * 5  # without an end none may begin another
    candidates = [rng.integers(10, 14, size=n).tolist() for n in lengths]
    reasoning: dict[str, Any] = {}
    if rng.random() < 0.6:
        marker = [[6], [6, 7], [6, 6, 7]][rng.integers(3)]
        reasoning = {"reasoning_end": marker, "max_reasoning_tokens": int(rng.integers(0, 9))}
    return RankingRequest(
        candidates,
        separator=[SEPARATOR],
        end=end,
        num_ranked=[None, 1][rng.integers(2)],
        **reasoning,
    )


def expected(request: RankingRequest, output: list[int]) -> set[int]:
    """What may follow ``output``, from the beginning and by the rules in words."""
    begin = 0
    if request.reasoning_end is not None:
        assert request.max_reasoning_tokens is not None
        marker = list(request.reasoning_end)
        ends = [i for i in range(len(marker), len(output) + 1) if output[i - len(marker) : i] == marker]
        if not ends:
            if len(output) < request.max_reasoning_tokens:
                return set(range(VOCAB)) - {EOS, STOP}
            lacks = next(n for n in range(1, len(marker) + 1) if output[len(output) - len(marker) + n :] == marker[:-n])
            return {marker[-lacks]}
        begin = ends[0]
    state = request.state()
    state.advance(output[begin:], [0, len(output) - begin])
    return {EOS, STOP} if state.done()[0] else set(state.allowed()[0].tolist())


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("seed", range(4))
def test_every_ranking_is_right_while_requests_come_go_move_and_are_preempted(
    processor_class: Any, runner: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    engine = runner_of(runner, processor_class)
    waiting = [
        Request(params(None if rng.random() < 0.3 else random_request(rng)), rng.integers(10, 40, size=n).tolist())
        for n in rng.integers(1, 6, size=40)
    ]
    running: list[Request] = []
    finished: list[Request] = []
    while waiting or running:
        for request in [request for request in running if rng.random() < 0.05]:
            running.remove(request)
            waiting.append(request)
        while waiting and len(running) < 10:
            running.append(waiting.pop(0))
        order, logits = engine.step(running, rng)
        for i, request in enumerate(order):
            before = engine.before[i]
            if request.params.extra_args:
                asked = RankingRequest.from_extra_args(request.params.extra_args)
                assert asked is not None
                allowed = expected(asked, request.output)
                assert set(torch.isfinite(logits[i]).nonzero()[:, 0].tolist()) == allowed
                kept = torch.tensor(sorted(allowed))
                assert torch.equal(logits[i, kept], before[kept])
            else:
                assert torch.equal(logits[i], before)
            # Markers come by chance too, not only when they are forced.
            scores = logits[i].clone()
            scores[[6, 7]] += 2
            token = int(
                torch.multinomial(
                    scores.softmax(0), 1, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))
                )
            )
            request.output.append(token)
            if token in (EOS, STOP) or len(request.output) == 60:
                running.remove(request)
                finished.append(request)
    ranked = [request for request in finished if request.params.extra_args]
    assert len(ranked) > 20
    for request in ranked:
        asked = RankingRequest.from_extra_args(request.params.extra_args)
        assert asked is not None
        assert len(request.output) <= asked.max_tokens
        ranking = asked.ranking(request.output)
        assert len(set(ranking.tolist())) == len(ranking) == (asked.num_ranked or len(asked.candidates))


@pytest.mark.parametrize("runner", RUNNERS)
def test_tokens_that_vllm_takes_back_are_forgotten(processor_class: Any, runner: str) -> None:
    rng = np.random.default_rng(0)
    asked = RankingRequest(
        [[10, 11], [12], [13]], separator=[SEPARATOR], end=[EOS], reasoning_end=[6], max_reasoning_tokens=4
    )
    engine, request = runner_of(runner, processor_class), Request(params(asked), [20])
    for token in [30, 6, 10, 11, SEPARATOR, 12]:
        engine.step([request], rng)
        request.output.append(token)
    engine.step([request], rng)
    for count in (2, 3):  # back before a separator, and before the marker
        engine.take_back(request, count)
        _, logits = engine.step([request], rng)
        assert set(torch.isfinite(logits[0]).nonzero()[:, 0].tolist()) == expected(asked, request.output)


def allowed_after(engine: Any, requests: list[Request]) -> list[set[int]]:
    order, logits = engine.step(requests, np.random.default_rng(0))
    sets = [set(torch.isfinite(row).nonzero()[:, 0].tolist()) for row in logits]
    return [sets[order.index(request)] for request in requests]


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_request_whose_ranking_cannot_go_on_ends_alone(
    processor_class: Any, runner: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = runner_of(runner, processor_class)
    asked = RankingRequest([[10], [11]], separator=[SEPARATOR], end=[EOS])
    broken, sound = Request(params(asked), [20]), Request(params(asked), [20])
    assert allowed_after(engine, [broken, sound]) == [{10, 11}, {10, 11}]
    broken.output.append(17)  # another processor's choice
    sound.output.append(11)
    with caplog.at_level(logging.ERROR):
        assert allowed_after(engine, [broken, sound]) == [{EOS, STOP}, {SEPARATOR}]
        broken.output.append(18)
        sound.output.append(SEPARATOR)
        assert allowed_after(engine, [broken, sound]) == [{EOS, STOP}, {10}]
    assert [record.message for record in caplog.records] == [
        "A request for a ranking is ended: it generated a token that its ranking does not allow."
    ]


BAD_IN_THE_ENGINE = {
    "not what was validated": ({"flexrec": {"candidates": []}}, "candidates is empty"),
    "token beyond the vocabulary": ({"flexrec": {"candidates": [[VOCAB]]}}, "token 40, but the model has 40 tokens"),
    "marker beyond the vocabulary": (
        {"flexrec": {"candidates": [[10]], "reasoning_end": [VOCAB], "max_reasoning_tokens": 3}},
        "token 40, but the model has 40 tokens",
    ),
    "candidate holds the model's end": ({"flexrec": {"candidates": [[10, EOS], [11]]}}, "token 2 is one of candidates"),
    "marker holds the model's end": (
        {"flexrec": {"candidates": [[10]], "reasoning_end": [6, EOS], "max_reasoning_tokens": 3}},
        "which ends a sequence",
    ),
}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("case", BAD_IN_THE_ENGINE)
def test_a_bad_request_that_reaches_the_engine_ends_and_the_engine_goes_on(
    processor_class: Any, runner: str, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    extra_args, message = BAD_IN_THE_ENGINE[case]
    engine = runner_of(runner, processor_class)
    bad, good = Request(params(extra_args), [20]), Request(params(RankingRequest([[10], [11]])), [20])
    assert allowed_after(engine, [bad, good]) == [{EOS, STOP}, {10, 11}]
    assert message in caplog.text


@pytest.mark.parametrize("runner", RUNNERS)
def test_without_anything_that_stops_it_a_finished_request_repeats_its_end(processor_class: Any, runner: str) -> None:
    engine = runner_of(runner, processor_class)
    request = Request(params(RankingRequest([[10]], end=[5]), all_stop_token_ids=set()), [20])
    request.output += [10, 5]
    reasoning = RankingRequest([[10]], reasoning_end=[6], max_reasoning_tokens=4)
    free = [Request(params(reasoning, all_stop_token_ids=stops), [20]) for stops in (set(), {EOS})]
    everything = set(range(VOCAB))
    assert allowed_after(engine, [request, *free]) == [{5}, everything, everything - {EOS}]


def test_what_is_not_known_to_have_been_sampled_ends_the_request(
    processor_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = V1Runner(processor_class)
    asked = RankingRequest([[10], [11]], reasoning_end=[6], max_reasoning_tokens=20)
    request = Request(params(asked), [20])
    request.output += [30, -1]  # the placeholder of asynchronous scheduling
    assert allowed_after(engine, [request]) == [{EOS, STOP}]
    assert "did not say which token it sampled" in caplog.text


def test_forbidding_all_that_a_ranking_allows_does_not_free_it(processor_class: Any) -> None:
    engine = V1Runner(processor_class)
    request = Request(params(RankingRequest([[10], [11]])), [20])
    engine.step([request], np.random.default_rng(0))
    logits = torch.zeros(1, VOCAB)
    logits[0, [10, 11]] = -torch.inf
    engine.processor.apply(logits)
    assert logits.softmax(1)[0].nonzero()[:, 0].tolist() == [10, 11]


def test_a_batch_without_rankings_is_not_touched(processor_class: Any) -> None:
    rng = np.random.default_rng(0)
    for engine in (V1Runner(processor_class), V2Runner(processor_class)):
        _, logits = engine.step([Request(params(None), [1]), Request(params(None), [1])], rng)
        assert torch.equal(logits, engine.before)


def test_rows_of_drafts_are_refused(processor_class: Any) -> None:
    engine = V2Runner(processor_class)
    engine.step([Request(params(RankingRequest([[10]])), [20])], np.random.default_rng(0))
    ctx = SimpleNamespace(idx_mapping_np=np.array(list(engine.slots.values())))
    with pytest.raises(RuntimeError, match="one row of logits for each of 1 requests, got 2"):
        engine.processor.apply(torch.zeros(2, VOCAB), ctx)


def test_configurations_that_hide_tokens_are_refused_at_the_start(processor_class: Any) -> None:
    v1 = (torch.device("cpu"), False)
    v2 = (SimpleNamespace(device=torch.device("cpu")),)
    for runner in (v1, v2):
        with pytest.raises(ValueError, match="start vLLM without speculative_config"):
            processor_class(config(speculative=object()), *runner)
    with pytest.raises(ValueError, match=f"--logits-processors {MODULE}:RankingLogitsProcessor"):
        processor_class(config(asynchronous=True), *v1)
    processor_class(config(asynchronous=True, named=[f"{MODULE}:RankingLogitsProcessor"]), *v1)
    processor_class(config(asynchronous=True), *v2)


def test_it_is_a_processor_of_every_model_runner(processor_class: Any) -> None:
    for name, stand_in in BASES.items():
        base = getattr(sys.modules.get(name), "LogitsProcessor", None)
        if base is not None:
            assert issubclass(processor_class, base)
            required = {method for method, value in vars(stand_in).items() if callable(value)}
            assert required - {"_abc_impl"} <= set(vars(processor_class)) | set(dir(base))
    assert processor_class(config(), torch.device("cpu"), False).is_argmax_invariant() is False


def test_without_vllm_the_module_imports_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    module = importlib.import_module(MODULE)
    module.RankingLogitsProcessor.validate_params(params(RankingRequest([[10]])))
    with pytest.raises(ImportError, match="pip install vllm"):
        module.RankingLogitsProcessor(config(), torch.device("cpu"), False)


GOOD = RankingRequest([[10, 11], [12]], separator=[SEPARATOR], end=[EOS])
CONFLICTS = {
    "ignore_eos": True,
    "min_tokens": 1,
    "allowed_token_ids": [1],
    "bad_words": ["no"],
    "thinking_token_budget": 9,
    "structured_outputs": object(),
}


def test_validation_refuses_what_does_not_go_with_a_ranking(processor_class: Any) -> None:
    for request in (GOOD, {"flexrec": json.dumps(GOOD.extra_args["flexrec"])}, None, {"flexrec": None}):
        processor_class.validate_params(params(request, max_tokens=5, min_tokens=0, bad_words=[]))
    for name, value in CONFLICTS.items():
        with pytest.raises(ValueError, match=f"{name} cannot be combined with flexrec"):
            processor_class.validate_params(params(GOOD, **{name: value}))
        processor_class.validate_params(params(None, **{name: value}))
    with pytest.raises(ValueError, match=r"max_tokens must be at least 5, .* got 4"):
        processor_class.validate_params(params(GOOD, max_tokens=4))
    with pytest.raises(ValueError, match="token 11 is one of candidates"):
        processor_class.validate_params(params(GOOD, stop_token_ids=[11]))
    processor_class.validate_params(params(GOOD, stop_token_ids=[EOS], max_tokens=None))
    with pytest.raises(ValueError, match="flexrec: candidates must be a sequence"):
        processor_class.validate_params(params({"flexrec": {"candidates": "12"}}))
