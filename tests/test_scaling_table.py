"""The arithmetic of docs/scaling.md against counts that are published, a model of transformers, and a case by hand."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "scaling_table.py"
spec = importlib.util.spec_from_file_location("scaling_table", SCRIPT)
scaling = importlib.util.module_from_spec(spec)
sys.modules["scaling_table"] = scaling  # where dataclasses look for their module
spec.loader.exec_module(scaling)

PUBLISHED = {"0.5B": 494_032_768, "3B": 3_085_938_688, "7B": 7_615_616_512, "32B": 32_763_876_352}


@pytest.mark.parametrize("shape", scaling.MODELS, ids=lambda shape: shape.name)
def test_parameters_are_those_published_and_those_of_transformers(shape):
    assert shape.parameters == PUBLISHED[shape.name]
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
    assert sum(parameter.numel() for parameter in model.model.layers[0].parameters()) == shape.layer_parameters


# Width 4, 2 layers, 2 heads of 2 (1 for keys), MLP of 8, 10 tokens, untied. A layer: queries 4 x 4 + 4, output 4 x 4,
# keys and values 2 x (4 x 2 + 2), MLP 3 x 4 x 8, norms 2 x 4: 20 + 16 + 20 + 96 + 8 = 160. All: 320 + 4 + 2 x 40 = 404.
TINY = scaling.Shape("tiny", 4, 2, 2, 1, 2, 8, 10, False)
# 2 prompts of 5 tokens, 3 rankings each, of 4 tokens: rows of 17 tokens, 34 in all; 6 rankings of 2 decisions among 3.
WORK = scaling.Workload(prompts=2, generations=3, prompt_tokens=5, candidates=3, answer_tokens=4, decisions=2)


def test_memory_by_hand():
    assert (TINY.layer_parameters, TINY.parameters, TINY.output_parameters) == (160, 404, 40)
    assert (WORK.row_tokens, WORK.tokens, WORK.unshared_tokens, WORK.rankings) == (17, 34, 54, 6)
    assert TINY.kv_bytes == 2 * 2 * 2 * 2  # keys and values, bytes, layers, width
    assert scaling.state_bytes(TINY, "DDP", 1) == 16 * 404
    assert scaling.state_bytes(TINY, "DDP", 8) == 20 * 404
    assert scaling.state_bytes(TINY, "FSDP2", 8) == 2 * 404
    assert scaling.compute_copy_bytes(TINY, "DDP") == 808
    assert scaling.compute_copy_bytes(TINY, "FSDP2") == 4 * 160 + 6 * 40
    # A token: 3 states of 4 in two bytes; a layer 2 x (24 + 8 + 4 + 32) + 64; float32 states of DDP 48, which is less.
    assert scaling.activation_bytes(TINY, 1, "FSDP2") == 24 + 200
    assert scaling.activation_bytes(TINY, 34, "DDP") == 34 * 224
    assert scaling.operation_bytes(WORK) == 12 * (4 * 3 + 16 + 2 * 3)
    assert scaling.vocabulary_bytes(TINY, WORK) == 6 * 4 * 10 * 12
    assert scaling.training_bytes(TINY, WORK, "FSDP2", 8) == 808 + 880 + 34 * 224 + 408
    assert scaling.rollout_bytes(TINY, WORK, "FSDP2", 8) == 808 + 808 + 24 * 10 + 34 * 16
    assert scaling.rollout_bytes(TINY, WORK, "DDP", 1) == 16 * 404 + 34 * 16


def test_time_by_hand():
    assert scaling.flops_of_tokens(TINY, 10, 17) == 10 * 2 * (2 * 160 + 4 * 17 * 4)
    gpu = scaling.Gpu(flops=1000.0, utilisation=0.5, bandwidth=1e9, launch=3.0, link=100.0)
    spent = scaling.seconds(TINY, WORK, "FSDP2", 4, gpu)
    assert spent["prefill"] == 10 * 2 * (320 + 80) / 500
    assert spent["training"] == 4 * 34 * 2 * (320 + 272) / 500
    # A decoding step computes 12 tokens, 12 x 2 x (320 + 272) / 500 = 28.4 seconds, and launches in 6.
    assert spent["decoding"] == pytest.approx(2 * 28.416)
    assert scaling.seconds(TINY, WORK, "FSDP2", 4, replace(gpu, launch=20.0))["decoding"] == 2 * 40
    assert spent["communication"] == 8 * 404 * 0.75 / 100
    assert scaling.seconds(TINY, WORK, "DDP", 1, gpu)["communication"] == 0
    assert spent["optimiser"] == pytest.approx(28 * 404 / 4 / 1e9)


def test_engine_is_the_simplest_with_the_memory():
    def engine(gpus, memory):
        return scaling.engine_of(TINY, WORK, gpus, scaling.Gpu(memory=memory, usable=1.0))

    ddp = scaling.training_bytes(TINY, WORK, "DDP", 8)
    fsdp = scaling.training_bytes(TINY, WORK, "FSDP2", 8)  # more than its rollouts
    assert fsdp < ddp
    assert engine(8, ddp) == "DDP"
    assert engine(8, ddp - 1) == "FSDP2 or ZeRO-3"
    assert engine(8, fsdp - 1) == "verl + vLLM, optimiser on the host"
    assert engine(8, fsdp - 8 * 404 / 8 - 1) == "none"
    assert engine(1, scaling.training_bytes(TINY, WORK, "DDP", 1)) == "one process"
    assert engine(1, fsdp) == "none"


def test_page_has_the_tables():
    page = scaling.PAGE.read_text()
    for table in scaling.tables():
        assert table in page, "print them anew by examples/scaling_table.py"
