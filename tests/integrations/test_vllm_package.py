"""The real vLLM, where it is installed (``make test-vllm``): its loaders, its batch updates, and its server on a CPU.

Model runner V2 has Triton kernels, which run in Triton's interpreter here. vLLM starts V2 on a CPU only where Triton
has a backend for CPUs: one that does nothing is written to the server's path, since the interpreter compiles nothing.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch

from flexrec.integrations.vllm_request import RankingRequest

if find_spec("vllm") is None and os.environ.get("FLEXREC_REQUIRE_VLLM", "") in ("", "0"):
    pytest.skip("vllm is not installed", allow_module_level=True)

from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.sample import logits_processor as v1

try:
    from vllm.exceptions import VLLMValidationError
except ImportError:  # earlier versions pass the ValueError on
    VLLMValidationError = ValueError

NAME = "flexrec.integrations.vllm:RankingLogitsProcessor"
ASKED = RankingRequest([[10, 11], [12], [13]], separator=[3], end=[2])


def test_v1_validates_requests() -> None:
    v1.validate_logits_processors_parameters([NAME], SamplingParams(max_tokens=20, extra_args=ASKED.extra_args))
    for wrong, message in [
        (SamplingParams(max_tokens=20, extra_args={"flexrec": {"candidates": []}}), "flexrec: candidates is empty"),
        (SamplingParams(extra_args=RankingRequest([[7]] * 30).extra_args), r"max_tokens must be at least 31.* got 16"),
        (SamplingParams(max_tokens=20, min_tokens=3, extra_args=ASKED.extra_args), "min_tokens cannot be combined"),
    ]:
        with pytest.raises((VLLMValidationError, ValueError), match=message):
            v1.validate_logits_processors_parameters([NAME], wrong)


def test_v2_validates_requests() -> None:
    v2 = pytest.importorskip(
        "vllm.v1.worker.gpu.sample.logits_processor", reason="vLLM before 0.31 has no V2 processors"
    )
    validate = v2.build_custom_logits_processors_params_validator([NAME])
    validate(SamplingParams(max_tokens=20, extra_args=ASKED.extra_args))
    with pytest.raises(VLLMValidationError, match="flexrec: candidates is empty"):
        validate(SamplingParams(max_tokens=20, extra_args={"flexrec": {"candidates": []}}))


def test_v1_batch_updates_are_followed() -> None:
    from vllm.v1.sample.logits_processor.interface import MoveDirectionality

    (cls,) = v1._load_logitsprocs_by_fqcns([NAME])
    config: Any = type("Config", (), {"speculative_config": None})()
    config.scheduler_config = type("Scheduler", (), {"async_scheduling": False})()
    config.model_config = type("Model", (), {"get_vocab_size": lambda self: 40, "logits_processors": [NAME]})()
    processor = cls(config, torch.device("cpu"), False)
    builder = v1.BatchUpdateBuilder()
    outputs: list[list[int]] = [[], [10, 11], [10], [13, 3, 12]]
    for index, output in enumerate(outputs):
        params = SamplingParams(max_tokens=20, extra_args=ASKED.extra_args if index else None)
        builder.added.append((index, params, [1], output))
    processor.update_state(builder.get_and_reset(4))

    def allowed(rows: int) -> list[list[int]]:
        return [torch.isfinite(row).nonzero()[:, 0].tolist() for row in processor.apply(torch.zeros(rows, 40))]

    everything = list(range(40))
    assert allowed(4) == [everything, [3], [11], [3]]
    outputs[2].append(11)
    processor.update_state(builder.get_and_reset(4))
    assert allowed(4) == [everything, [3], [3], [3]]
    outputs[3] += [3, 10]
    builder.moved.append((0, 2, MoveDirectionality.SWAP))
    processor.update_state(builder.get_and_reset(4))
    assert allowed(4) == [[3], [3], everything, [11]]
    builder.removed_append(1)
    builder.moved.append((3, 1, MoveDirectionality.UNIDIRECTIONAL))
    processor.update_state(builder.get_and_reset(3))
    assert allowed(3) == [[3], [11], everything]


def test_the_plugin_package_registers_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = shutil.copytree(Path(__file__).parents[2] / "plugins" / "flexrec-vllm", tmp_path / "plugin")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(tmp_path / "installed"), str(plugin)], check=True)
    assert "RankingLogitsProcessor" not in [cls.__name__ for cls in v1._load_logitsprocs_plugins()]
    monkeypatch.syspath_prepend(tmp_path / "installed")
    assert "RankingLogitsProcessor" in [cls.__name__ for cls in v1._load_logitsprocs_plugins()]


VOCAB, EOS = 256, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "<s>", "</s>", ",", "<think>", "</think>", *(f"t{i}" for i in range(6, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, **shape, **heads, max_position_embeddings=512, bos_token_id=1, eos_token_id=EOS)
    ).save_pretrained(folder)
    return folder


COMPILER = """
from triton.backends.compiler import BaseBackend
class Nothing(BaseBackend):
    supports_target = staticmethod(lambda target: False)
    hash = parse_options = add_stages = load_dialects = get_module_map = lambda self, *args: None
"""
DRIVER = """
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
class Nothing(DriverBase):
    is_active = classmethod(lambda cls: True)
    __init__ = lambda self: None
    get_current_target = lambda self: GPUTarget("cpu", 0, 1)
    get_active_torch_device = lambda self: torch.device("cpu")
    map_python_to_cpp_type = get_benchmarker = lambda self, *args: None
"""


def backend_for_cpus(folder: Path) -> Path:
    """A package that gives Triton a backend named cpu."""
    (folder / "no_triton_backend").mkdir()
    for name, code in {"__init__": "", "compiler": COMPILER, "driver": DRIVER}.items():
        (folder / "no_triton_backend" / f"{name}.py").write_text(code)
    metadata = folder / "no_triton_backend-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: no-triton-backend\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[triton.backends]\ncpu = no_triton_backend\n")
    return folder


class Server:
    """``vllm serve`` with so little memory for keys and values that requests are preempted, and prompts in chunks."""

    def __init__(self, model: Path, runner: str, folder: Path, more: str = f"--logits-processors {NAME}") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        path = [os.environ.get("PYTHONPATH", "")]
        if runner == "v2":
            path.append(str(backend_for_cpus(folder)))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2")),
            "VLLM_LOGGING_LEVEL": "INFO",  # which TRL, loaded by another file of tests, sets to errors alone
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # On a CPU vLLM walks all modules when a worker starts, and fails over numba's: they must not be there yet.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        options = f"--host 127.0.0.1 --port {self.url.split(':')[-1]} --served-model-name tiny --dtype float32 "
        options += "--enforce-eager --max-model-len 128 --max-num-seqs 8 --max-num-batched-tokens 24 --block-size 32 "
        options += f"--num-gpu-blocks-override 6 --no-enable-prefix-caching {more}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options.split()]
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)

    def wait(self) -> None:
        deadline = time.monotonic() + 300
        while True:
            try:
                return urlopen(f"{self.url}/health").close()
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail("the server does not start:\n" + self.log.read_text()[-5000:])
                time.sleep(0.5)

    def complete(self, prompt: list[int], **body: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "return_token_ids": True, **body}
        request = Request(f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=300) as response:
            return json.load(response)


NEW_RUNNER = "Using V2 Model Runner"


@pytest.fixture(scope="module", params=["v1", "v2"])
def server(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not current_platform.is_cpu():
        pytest.skip("this vLLM is not built for CPUs")
    running = Server(model, request.param, tmp_path_factory.mktemp("server"))
    try:
        running.wait()
        said = running.log.read_text()
        assert (NEW_RUNNER in said) is (request.param == "v2"), said[-5000:]
        yield running
    finally:
        running.process.terminate()
        running.process.wait(60)


def random_request(rng: random.Random) -> RankingRequest:
    candidates = [[rng.randint(6, VOCAB - 1) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(2, 12))]
    reasoning: dict[str, Any] = {}
    if rng.random() < 0.6:
        marker = rng.choice([[5], [4, 5, 4]])
        reasoning = {"reasoning_end": marker, "max_reasoning_tokens": rng.randint(0, 12)}
    return RankingRequest(candidates, separator=[3], end=[EOS], num_ranked=rng.choice([None, 2]), **reasoning)


def test_a_server_answers_with_rankings_whatever_else_it_does(server: Server) -> None:
    rng = random.Random(0)
    asked = [random_request(rng) if n % 4 else None for n in range(40)]
    prompts = [[1, *(rng.randint(6, VOCAB - 1) for _ in range(rng.randint(1, 30)))] for _ in asked]

    def answer(n: int) -> dict[str, Any]:
        request = asked[n]
        if request is None:
            return server.complete(prompts[n], max_tokens=20)
        return server.complete(
            prompts[n], max_tokens=request.max_tokens, vllm_xargs=request.vllm_xargs, temperature=n % 2
        )

    with ThreadPoolExecutor(16) as pool:
        answers = [answer["choices"][0] for answer in pool.map(answer, range(len(asked)))]
    for request, answer in zip(asked, answers, strict=True):
        if request is None:
            continue
        tokens = answer["token_ids"]
        assert answer["finish_reason"] == "stop"
        ranking = request.ranking(tokens)
        assert len(set(ranking.tolist())) == len(ranking) == (request.num_ranked or len(request.candidates))
        rule = request.reasoning_rule()
        begin = 0 if rule is None else int(rule.lengths(np.array([tokens]))[0])
        state = request.state()
        state.advance(tokens[begin:], [0, len(tokens) - begin])  # nothing comes before, between or after
        assert rule is None or (begin <= rule.max_length and EOS not in tokens[:begin])
    with urlopen(f"{server.url}/metrics") as response:
        preemptions = re.search(r"^vllm:num_preemptions_total{.*} ([0-9.]+)$", response.read().decode(), re.MULTILINE)
    assert preemptions is not None
    assert float(preemptions[1]) > 0


def test_a_server_refuses_a_bad_request_and_goes_on(server: Server) -> None:
    for body, message in [
        ({"vllm_xargs": {"flexrec": "{"}}, "flexrec must be JSON"),
        ({"vllm_xargs": {"flexrec": '{"candidates": [[10], [1.5]]}'}}, "candidates[1][0] must be an integer token id"),
        ({"vllm_xargs": ASKED.vllm_xargs, "max_tokens": 5}, "max_tokens must be at least 7"),
        ({"vllm_xargs": ASKED.vllm_xargs, "min_tokens": 2}, "min_tokens cannot be combined with flexrec"),
    ]:
        with pytest.raises(HTTPError) as error:
            server.complete([1, 10], **{"max_tokens": 50, **body})
        assert error.value.code == 400
        assert message in json.load(error.value)["error"]["message"]
    beyond = server.complete([1, 10], max_tokens=50, vllm_xargs=RankingRequest([[VOCAB], [7]]).vllm_xargs)
    assert beyond["choices"][0]["token_ids"] == [EOS]
    assert f"it uses token {VOCAB}, but the model has {VOCAB} tokens" in server.log.read_text()
    fine = server.complete([1, 10], max_tokens=50, vllm_xargs=ASKED.vllm_xargs)
    assert sorted(ASKED.ranking(fine["choices"][0]["token_ids"]).tolist()) == [0, 1, 2]
