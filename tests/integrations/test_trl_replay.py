"""TRL's GRPO scored under what was sampled from: its own code, transformers' generate, stand-ins for vLLM."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
import trl
from packaging.version import Version
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from flexrec.integrations.trl_replay import ReplayGRPOTrainer

sys.path.insert(0, str(Path(__file__).parent))

from tiny_trl import generate, logged, make_args, make_model, make_rows, make_tokenizer, train_and_compare

# TRL and transformers warn of each other, and TRL of what is experimental.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]
NEW_SERVER = Version(trl.__version__) >= Version("1.11")  # whose server is vLLM's own
OUTSIDE = "sampling/ratio_outside"


class Config(GRPOConfig):
    """Any config of TRL."""


def number_of_digits(completions, **columns):
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def trainer_of(folder, kind=ReplayGRPOTrainer, *, rows=None, extra=None, **options):
    options = {"top_p": 0.8, "max_completion_length": 12, "temperature": 0.9, **options}
    rows = make_rows(gains=None) if rows is None else rows
    extra = {"reward_funcs": number_of_digits, **(extra or {})}
    tokenizer = make_tokenizer()
    model = options.pop("model", None) or make_model(tokenizer)
    args = make_args(folder, Config, **options)
    return kind(model, args=args, train_dataset=rows, processing_class=tokenizer, **extra)


def score(trainer, batch, kind=None):
    trainer._supports = batch["sampling_supports"]
    return (kind or type(trainer))._get_per_token_logps_and_entropies(
        trainer,
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].shape[1],
        compute_entropy=True,
    )[:2]


def by_masked_logits(trainer, batch):
    """The definition, from logits of everything."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    keep = batch["completion_ids"].shape[1]
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1] / trainer.temperature
    allowed = torch.ones(logits.shape, dtype=torch.bool)
    for row, support in enumerate(batch["sampling_supports"]):
        for t in range(len(support)):
            if len(support[t]):
                allowed[row, t] = False
                allowed[row, t, support[t]] = True
    log_probs = logits.masked_fill(~allowed, -1e30).log_softmax(-1)
    own = batch["completion_mask"].bool()
    logps = log_probs.gather(-1, batch["completion_ids"][..., None])[..., 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return (torch.where(own, values, 0.0) for values in (logps, entropy))


OPTIONS = {
    "top-p": {},
    "top-k": {"top_p": 1.0, "top_k": 4},
    "nothing": {"top_p": 1.0},
    "cut-off rows are masked": {"mask_truncated_completions": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scores_and_gradients_are_those_of_masked_logits(tmp_path, options):
    trainer = trainer_of(tmp_path, **options)
    batch = generate(trainer)
    found = score(trainer, batch)
    expected = tuple(by_masked_logits(trainer, batch))
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    upstream = torch.randn(found[0].shape)
    ours = torch.autograd.grad((found[0] * upstream).sum(), parameters)
    plain = torch.autograd.grad((expected[0] * upstream).sum(), parameters)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_what_the_sampler_said_is_what_the_trainer_says(tmp_path):
    trainer = trainer_of(tmp_path)
    batch = generate(trainer)
    logps, _ = score(trainer, batch)
    for row, support in enumerate(batch["sampling_supports"]):
        ours = logps[row, : len(support)].detach()
        torch.testing.assert_close(ours, torch.from_numpy(support.logprobs), rtol=1e-3, atol=1e-4)
        assert any(0 < len(support[t]) < 46 for t in range(len(support)))


def test_without_truncation_it_is_trl(tmp_path):
    trainer = trainer_of(tmp_path, top_p=1.0)
    batch = generate(trainer)
    assert all(not support.offsets.any() for support in batch["sampling_supports"])
    own = batch["completion_mask"].bool()
    for ours, theirs in zip(score(trainer, batch), score(trainer, batch, GRPOTrainer), strict=True):
        torch.testing.assert_close(ours[own], theirs[own], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "beta": 0.1, "gradient_accumulation_steps": 2}])
def test_it_trains_and_shares_of_ratios_are_logged(tmp_path, options):
    make_model(make_tokenizer()).save_pretrained(tmp_path / "model")  # TRL loads the reference by its name
    options |= {"model": str(tmp_path / "model"), "learning_rate": 1e-6, "max_steps": 2}
    trainer = trainer_of(tmp_path, **options)
    train_and_compare(trainer)
    assert logged(trainer, OUTSIDE) == [0.0, 0.0]
    plain = trainer_of(tmp_path, extra={"replay": False}, **options)
    plain.train()
    assert min(logged(plain, OUTSIDE)) > 0.2


def test_adapters_are_recorded_and_scored(tmp_path):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = trainer_of(tmp_path, learning_rate=1e-6, max_steps=1, extra={"peft_config": adapters})
    trainer.train()
    assert logged(trainer, OUTSIDE) == [0.0]


def test_rows_keep_their_supports_when_trl_shuffles(tmp_path):
    trainer = trainer_of(tmp_path, steps_per_generation=3, max_steps=3, learning_rate=0.0)
    seen = []

    class Spy(ReplayGRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append([len(support) for support in inputs["sampling_supports"]])
            assert seen[-1] == inputs["completion_mask"].sum(1).tolist()
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer.__class__ = Spy
    trainer.train()
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 changes scores"),
        ({"generation_kwargs": {"sequence_bias": {(3,): 1.0}}}, "sequence_bias=.* changes scores"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams=2"),
        ({"generation_kwargs": {"temperature": 0.1}}, "set temperature in the config"),
        ({"use_vllm": True, "vllm_mode": "colocate"}, "top_k is above 0"),
        (
            {"use_vllm": True, "vllm_mode": "colocate", "top_k": 5, "vllm_tensor_parallel_size": 2},
            "vllm_tensor_parallel_size=1",
        ),
    ],
)
def test_what_supports_do_not_say_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **options)


def test_capped_logits_are_refused(tmp_path):
    model = make_model(make_tokenizer())
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="caps its logits at 30"):
        trainer_of(tmp_path, model=model)


@pytest.mark.skipif(NEW_SERVER, reason="TRL's server is vLLM's own")
def test_a_server_that_returns_no_masks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"needs TRL 1\.11 or newer"):
        trainer_of(tmp_path, use_vllm=True, vllm_mode="server", top_k=5)


def test_tools_and_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="leave out rollout_func="):
        trainer_of(tmp_path, extra={"rollout_func": lambda prompts, trainer: {}})
    trainer = trainer_of(tmp_path)
    with pytest.raises(ValueError, match=r"text models .* pixel_values"):
        trainer._get_per_token_logps_and_entropies(None, torch.zeros(1, 2), None, 1, pixel_values=torch.zeros(1))


# --- vLLM -------------------------------------------------------------------------------------------------------------


class Engine:
    """What TRL uses of ``vllm.LLM``: samples with top-k, and returns what was left of every position."""

    def __init__(self, model, **kwargs):
        self.model = LlamaForCausalLM.from_pretrained(model)
        self.returns_masks = kwargs.get("return_sampling_mask", False)
        runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=self.load))
        driver = types.SimpleNamespace(model_runner=runner)
        self.llm_engine = types.SimpleNamespace(model_executor=types.SimpleNamespace(driver_worker=driver))

    def load(self, weights):
        assert not self.model.load_state_dict(dict(weights), strict=False).unexpected_keys

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, use_tqdm):
        return [self.sample(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    @torch.no_grad()
    def sample(self, prompt, params):
        tokens, logprobs, supports = [], [], []
        while len(tokens) < params.max_tokens and tokens[-1:] != [2]:
            logits = self.model(torch.tensor([prompt + tokens])).logits[0, -1] / params.temperature
            kept = logits.topk(params.top_k).indices
            log_probs = logits[kept].log_softmax(0)
            choice = int(torch.multinomial(log_probs.exp(), 1))
            tokens.append(int(kept[choice]))
            logprobs.append({tokens[-1]: types.SimpleNamespace(rank=1, logprob=log_probs[choice].item())})
            supports.append(sorted(kept.tolist()))
        mask = types.SimpleNamespace(token_ids=supports) if self.returns_masks else None
        output = types.SimpleNamespace(token_ids=tokens, logprobs=logprobs, sampling_mask=mask)
        return types.SimpleNamespace(prompt_token_ids=prompt, outputs=[output])


class SamplingParams:
    def __init__(self, **options):
        self.__dict__.update(options)


class Client:
    """What TRL uses of its client of a vLLM server, with an engine behind ``/inference/v1/generate``."""

    base_url, model = "http://server", "model"
    engine: Engine

    def __init__(self, **options):
        self.requests = []

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, parameters):
        self.engine.load(list(parameters))

    def reset_prefix_cache(self):
        pass

    def _post(self, url, json):
        assert url == "http://server/inference/v1/generate"
        self.requests.append(json)
        params = SamplingParams(**json["sampling_params"])
        outputs = [self.engine.sample(json["token_ids"], params).outputs[0] for _ in range(params.n)]
        return {
            "choices": [
                {
                    "token_ids": output.token_ids,
                    "logprobs": {
                        "content": [
                            {"token_id": token, "logprob": item.logprob, "top_logprobs": []}
                            for at in output.logprobs
                            for token, item in at.items()
                        ]
                    },
                    "sampling_mask": output.sampling_mask and output.sampling_mask.token_ids,
                }
                for output in outputs
            ]
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
    make_model(make_tokenizer()).save_pretrained(tmp_path / "model")
    Client.engine = Engine(tmp_path / "model", return_sampling_mask=True)


SERVER = pytest.param("server", marks=pytest.mark.skipif(not NEW_SERVER, reason="TRL starts the server itself"))


@pytest.mark.parametrize("mode", ["colocate", SERVER])
def test_vllms_masks_reach_the_loss(tmp_path, vllm, mode):
    options = {"use_vllm": True, "vllm_mode": mode, "top_k": 3, "top_p": 1.0, "model": str(tmp_path / "model")}
    trainer = trainer_of(tmp_path, learning_rate=1e-3, **options)
    train_and_compare(trainer)
    for name in ("min", "mean", "max"):  # sampled and scored with the same distribution
        assert logged(trainer, f"sampling/importance_sampling_ratio/{name}") == pytest.approx([1.0, 1.0], abs=1e-3)
    assert logged(trainer, OUTSIDE) == [0.0, 0.0]
    plain = trainer_of(tmp_path, learning_rate=1e-3, extra={"replay": False}, **options)
    plain.train()
    assert max(logged(plain, "sampling/importance_sampling_ratio/mean")) < 0.9
    if mode == "server":
        sent = trainer.vllm_generation.vllm_client.requests[0]["sampling_params"]
        assert (sent["n"], sent["top_k"], sent["temperature"], sent["output_kind"]) == (4, 3, 0.9, 2)


def test_a_mask_that_got_lost_stops_the_training(tmp_path, vllm):
    options = {"use_vllm": True, "vllm_mode": "colocate", "top_k": 3, "model": str(tmp_path / "model")}
    trainer = trainer_of(tmp_path, **options)
    trainer.vllm_generation.llm._engine.returns_masks = False
    with pytest.raises(ValueError, match="completion 0 has no sampling mask, though one was promised"):
        trainer.train()
