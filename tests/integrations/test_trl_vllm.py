"""Constrained generation through TRL's vLLM modes: TRL's own code, with stand-ins for the engine and the server."""

import sys
import types
from pathlib import Path

import pytest
import torch
import trl
from packaging.version import Version
from transformers import LlamaForCausalLM

from flexrec.integrations import trl_vllm
from flexrec.integrations.token_logprobs import Spelling
from flexrec.integrations.vllm_request import RankingRequest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_trl import generate, logged, make_model, make_rows, make_tokenizer, make_trainer, train_and_compare

# TRL and transformers warn of each other, and TRL of what is experimental.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

NEW_SERVER = Version(trl.__version__) >= Version("1.11")  # whose server is vLLM's own


class Engine:
    """What TRL uses of ``vllm.LLM``: each prompt is sampled by its own sampling parameters."""

    def __init__(self, model, **kwargs):
        assert kwargs.get("logprobs_mode", "processed_logprobs") == "processed_logprobs"
        self.model = LlamaForCausalLM.from_pretrained(model)
        self.calls = []
        runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=self.load))
        driver = types.SimpleNamespace(model_runner=runner)
        self.llm_engine = types.SimpleNamespace(model_executor=types.SimpleNamespace(driver_worker=driver))

    def load(self, weights):
        assert not self.model.load_state_dict(dict(weights), strict=False).unexpected_keys

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls.append([RankingRequest.from_extra_args(params.extra_args) for params in sampling_params])
        return [self.sample(p["prompt_token_ids"], params) for p, params in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def sample(self, prompt, params):
        state = RankingRequest.from_extra_args(params.extra_args).state()
        tokens, logprobs = [], []
        while not state.done().all():
            logits = self.model(torch.tensor([prompt + tokens])).logits[0, -1] / params.temperature
            allowed = torch.from_numpy(state.allowed()[0]).long()
            of_allowed = logits[allowed].log_softmax(0)
            choice = int(torch.multinomial(of_allowed.exp(), 1))
            tokens.append(int(allowed[choice]))
            logprobs.append({tokens[-1]: types.SimpleNamespace(rank=1, logprob=of_allowed[choice].item())})
            state.advance([tokens[-1]])
        output = types.SimpleNamespace(token_ids=tokens, logprobs=logprobs)
        return types.SimpleNamespace(prompt_token_ids=prompt, outputs=[output])


class SamplingParams:
    def __init__(self, **options):
        self.extra_args = None
        self.__dict__.update(options)

    def clone(self):
        return SamplingParams(**self.__dict__)


class Client:
    """What TRL uses of its client of a vLLM server, with an engine in the place of the server."""

    engine: Engine

    def __init__(self, **options):
        self.calls = []

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, parameters):
        self.engine.load(list(parameters))

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, n, temperature, max_tokens, generation_kwargs, **others):
        self.calls.append(generation_kwargs)
        params = SamplingParams(temperature=temperature, extra_args=generation_kwargs["vllm_xargs"])
        outputs = [self.engine.sample(prompt, params).outputs[0] for prompt in prompts for _ in range(n)]
        logprobs = [[[item.logprob for item in at.values()] for at in output.logprobs] for output in outputs]
        return {
            "prompt_ids": prompts,
            "completion_ids": [output.token_ids for output in outputs],
            "logprobs": logprobs,
            "logprob_token_ids": None,
        }


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """An engine in the place of vLLM, under TRL's own code for it."""
    engine = types.ModuleType("vllm")
    engine.__version__ = "0.17.0"
    engine.sampling_params = types.ModuleType("vllm.sampling_params")
    engine.sampling_params.StructuredOutputsParams = None
    monkeypatch.setitem(sys.modules, "vllm", engine)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", engine.sampling_params)
    names = {"LLM": Engine, "SamplingParams": SamplingParams, "VLLMClient": Client, "is_vllm_available": lambda: True}
    for name, value in names.items():
        monkeypatch.setattr(sys.modules["trl.generation.vllm_generation"], name, value, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    installed = [types.SimpleNamespace(value="flexrec.integrations.vllm:RankingLogitsProcessor")]
    monkeypatch.setattr(trl_vllm, "entry_points", lambda group: installed if group == "vllm.logits_processors" else [])
    make_model(make_tokenizer()).save_pretrained(tmp_path / "model")
    Client.engine = Engine(tmp_path / "model")


def vllm_trainer(tmp_path, rows=None, **options):
    options = {"use_vllm": True, "vllm_mode": "colocate", "temperature": 0.8, **options}
    return make_trainer(tmp_path, rows, model=str(tmp_path / "model"), **options)


SERVER = pytest.param("server", marks=pytest.mark.skipif(not NEW_SERVER, reason="TRL starts the server itself"))


@pytest.mark.parametrize("mode", ["colocate", SERVER])
def test_vllm_is_told_the_candidates_of_every_prompt(tmp_path, vllm, mode):
    trainer = vllm_trainer(tmp_path, vllm_mode=mode, num_ranked=3, num_iterations=2, max_steps=3)
    train_and_compare(trainer)
    if mode == "colocate":
        calls = trainer.vllm_generation.llm.calls
        assert [len(call) for call in calls] == [8, 8]
        requests = [request for call in calls for request in call]
    else:
        calls = trainer.vllm_generation.vllm_client.calls
        assert len(calls) == 2 * 2  # one per prompt, for all of its rollouts
        requests = [RankingRequest.from_extra_args(call["vllm_xargs"]) for call in calls]
    assert {request.num_ranked for request in requests} == {3}
    assert {len(request.candidates) for request in requests} <= {3, 4, 5}
    for name in ("min", "mean", "max"):  # sampled and scored with the same distribution
        assert logged(trainer, f"sampling/importance_sampling_ratio/{name}") == pytest.approx([1.0, 1.0], abs=1e-4)


def test_each_prompt_is_sent_with_its_candidates_and_what_trl_asked_for():
    """To the engine all at once, to the server one by one; answers come back in the order of the prompts."""
    prompts, candidates = [[5, 6], [7]], [[[10], [11, 12], [13]], [[14], [15]]]
    own = [RankingRequest(c, separator=[3], end=[2], num_ranked=2) for c in candidates]
    calls = []

    class Recorder:
        def generate(self, prompts, *, sampling_params=None, generation_kwargs=None, **options):
            calls.append((prompts, sampling_params, generation_kwargs, options))
            return {"completion_ids": [prompt for prompt in prompts for _ in range(2)], "logprobs": None}

    llm = trl_vllm.PerPromptLLM(Recorder())
    llm.set_candidates(prompts, candidates, Spelling((3,), (2,), 2))
    asked = SamplingParams(temperature=0.3, extra_args={"other": 1})
    texts = [{"prompt_token_ids": prompt} for prompt in prompts]
    llm.generate(texts, sampling_params=asked, use_tqdm=False)
    ((sent, params, _, options),) = calls
    assert (sent, options) == (texts, {"use_tqdm": False})
    assert [p.temperature for p in params] == [0.3, 0.3]
    assert [p.extra_args for p in params] == [{"other": 1, **request.extra_args} for request in own]
    assert asked.extra_args == {"other": 1}

    calls.clear()
    client = trl_vllm.PerPromptClient(Recorder())
    client.set_candidates(prompts, candidates, Spelling((3,), (2,), 2))
    answers = client.generate(prompts, generation_kwargs={"seed": 4}, n=2, temperature=0.3)
    assert answers == {"completion_ids": [[5, 6], [5, 6], [7], [7]], "logprobs": None}
    assert sorted(calls, key=lambda call: call[0]) == [
        ([prompt], None, {"seed": 4, "vllm_xargs": request.vllm_xargs}, {"n": 2, "temperature": 0.3})
        for prompt, request in zip(prompts, own, strict=True)
    ]


def test_vllm_that_would_not_constrain_is_refused(tmp_path, vllm, monkeypatch):
    with pytest.raises(ValueError, match="same prompt but other candidates"):
        generate(vllm_trainer(tmp_path, make_rows(prompt=["rank"] * 3)))
    monkeypatch.setattr(trl_vllm, "entry_points", lambda group: [])
    with pytest.raises(ValueError, match="no installed package has flexrec"):
        vllm_trainer(tmp_path)
    if not NEW_SERVER:
        with pytest.raises(ValueError, match=r"needs TRL 1\.11 or newer"):
            vllm_trainer(tmp_path, vllm_mode="server")
