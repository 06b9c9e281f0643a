"""`flexrec train --model`: a checkpoint of bfloat16 is trained in float32, in which small steps do not round away."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from flexrec.cli import main
from flexrec.data import Catalogue, simulate
from flexrec.experiment import stages as experiment
from flexrec.policy.small_model import build_model, build_tokenizer

SMALL = ["--need", "interest", "--no-critic", "--prompts-per-step", "4", "--baselines", "none"]
SMALL += ["--warmup-steps", "1", "--listwise-steps", "1", "--steps", "2"]


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    sizes = {"num_users": 60, "num_items": 70, "num_topics": 4, "num_test_users": 8, "num_candidates": 8}
    monkeypatch.setattr(experiment, "simulate", lambda **options: simulate(**{**options, **sizes}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a model in bfloat16, as most are published."""
    folder = tmp_path_factory.mktemp("models") / "bfloat16"
    tokenizer = build_tokenizer(Catalogue(ids=("none",), titles=("Of another world",), topics=((),)), ["Rank"])
    config = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2).config
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(checkpoint, folder, *options):
    return main(["train", "--model", str(checkpoint), "--encoding", "index", "--output", str(folder), *SMALL, *options])


def test_small_steps_reach_a_bfloat16_checkpoint(tmp_path, checkpoint):
    rates = ["--learning-rate", "1e-6", "--warmup-learning-rate", "1e-6"]
    assert train(checkpoint, tmp_path / "run", *rates) == 0
    base, trained = (AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name) for name in ("base", "."))
    for name, parameter in trained.named_parameters():
        assert parameter.dtype == torch.float32
        if "embed" not in name:  # of which most rows are not read
            assert (parameter != base.get_parameter(name)).float().mean() > 0.5, name


def test_bf16_computes_in_bfloat16_and_trains_float32(tmp_path, checkpoint, monkeypatch):
    computed = set()
    linear = torch.nn.functional.linear

    def seen(*args):
        result = linear(*args)
        computed.add(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", seen)
    assert train(checkpoint, tmp_path / "run", "--bf16") == 0
    assert torch.bfloat16 in computed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.float32
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in log if line["stage"] == "reinforcement" and "grad_norm" in line]
    assert len(norms) == 2
    assert min(norms) > 0
