"""The masks of a real vLLM server on a CPU, where it is installed (``make test-vllm``), replayed by its own model.

Min-p cuts: vLLM's kernel of top-k and top-p does not run in Triton's interpreter, those of min-p and of masks do.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch

if find_spec("vllm") is None and os.environ.get("FLEXREC_REQUIRE_VLLM", "") in ("", "0"):
    pytest.skip("vllm is not installed", allow_module_level=True)
pytest.importorskip("trl")

sys.path.insert(0, str(Path(__file__).parent))

from test_vllm_package import VOCAB, Server, current_platform, model  # noqa: F401  (a fixture)
from transformers import LlamaForCausalLM

from flexrec import replay_logprobs
from flexrec.integrations.sampling_masks import joined
from flexrec.integrations.trl_replay import _RecordedClient
from flexrec.policy.lm_head import last_hidden, output_layer

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]
PROMPTS = [[7, 8, 9], [10, 11], [12, 13, 14, 15]]
TEMPERATURE, MIN_P = 0.6, 0.9


class Client:
    """What is used of TRL's client."""

    model = "tiny"

    def __init__(self, url: str) -> None:
        self.base_url = url

    def _post(self, url: str, json: dict[str, Any]) -> dict[str, Any]:
        return post(url, json)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: F811
    if not current_platform.is_cpu():
        pytest.skip("this vLLM is not built for CPUs")
    masks = "--enable-scale-out --return-sampling-mask --logprobs-mode processed_logprobs"
    running = Server(model, "v2", tmp_path_factory.mktemp("server"), masks)
    try:
        running.wait()
        yield running
    finally:
        running.process.terminate()
        running.process.wait(60)


def test_masks_of_a_real_server_are_replayed(server: Server, model: Path) -> None:  # noqa: F811
    client = _RecordedClient(Client(server.url))
    asked = {"n": 2, "temperature": TEMPERATURE, "min_p": MIN_P, "top_k": VOCAB, "max_tokens": 12, "logprobs": 0}
    answer = client.generate(PROMPTS, generation_kwargs={"ignore_eos": True}, seed=5, **asked)
    completions, supports = answer["completion_ids"], client.supports
    assert [len(tokens) for tokens in completions] == [12] * 6
    assert [len(support) for support in supports] == [12] * 6
    local = LlamaForCausalLM.from_pretrained(model).eval()
    states, logits = [], []
    with torch.no_grad():
        for row, tokens in enumerate(completions):
            prompt = PROMPTS[row // 2]
            ids = torch.tensor([prompt + tokens])
            states.append(last_hidden(local, input_ids=ids, use_cache=False)[0, len(prompt) - 1 : -1])
            logits.append(local(ids).logits[0, len(prompt) - 1 : -1])
        weight, bias = output_layer(local)
        targets = torch.tensor(completions).flatten()
        found = replay_logprobs(
            torch.cat(states), weight, *joined(supports), targets, bias=bias, temperature=TEMPERATURE
        )
    said = torch.cat([torch.from_numpy(support.logprobs) for support in supports])
    torch.testing.assert_close(found.logprobs, said, rtol=1e-3, atol=1e-3)
    whole = (torch.cat(logits) / TEMPERATURE).log_softmax(1)
    assert (whole.gather(1, targets[:, None])[:, 0] - said).exp().mean() < 0.95  # the bias without
    for probs, support in zip(whole.exp(), (s[t] for s in supports for t in range(12)), strict=True):
        surely = probs > (MIN_P + 1e-3) * probs.max()
        perhaps = probs > (MIN_P - 1e-3) * probs.max()
        kept = torch.zeros_like(surely)
        kept[torch.from_numpy(support)] = True
        assert (surely <= kept).all()
        assert (kept <= perhaps).all()
        assert kept.sum() < VOCAB
