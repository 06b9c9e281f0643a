"""Sampling masks as engines return them: the objects' own layouts, and every fault named by completion and position."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexrec.integrations.sampling_masks import SupportRecorder, from_sglang, from_vllm, joined, read_mask

ROWS = [[187, 326, 512], [42], [9, 8, 7, 6]]
TOKENS = [326, 42, 7]


# The fields of the real classes, as vLLM 0.28 to 0.33 and SGLang 0.5.16 define them.


@dataclass
class SamplingMask:  # vllm/outputs.py
    token_ids: list[list[int]]


class SamplingMaskLists(NamedTuple):  # vllm/v1/outputs.py
    token_ids: np.ndarray
    offsets: np.ndarray | None = None
    cu_num_generated_tokens: list[int] | None = None


class SamplingMaskChunk(NamedTuple):  # sglang/srt/managers: a frozen msgspec.Struct
    lengths: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray


FLAT = np.concatenate(ROWS).astype(np.int32)
COUNTS = np.array([len(row) for row in ROWS], dtype=np.int32)
OFFSETS = np.array([0, 3, 4, 8])
FORMS = {
    "lists": ROWS,
    "vLLM": SamplingMask(ROWS),
    "vLLM, first form": SimpleNamespace(token_ids=FLAT.tolist(), offsets=OFFSETS.tolist()),
    "vLLM's engine": SamplingMaskLists(FLAT, OFFSETS),
    "SGLang's engine": SamplingMaskChunk(COUNTS, FLAT, np.zeros(8, np.float32)),
    "ids and counts": SimpleNamespace(ids=FLAT, counts=COUNTS),
    "arrays": [np.array(row) for row in ROWS],
    "tensors": SimpleNamespace(token_ids=torch.from_numpy(FLAT), offsets=torch.from_numpy(OFFSETS)),
}


@pytest.mark.parametrize("mask", FORMS.values(), ids=FORMS)
def test_every_form_is_read(mask):
    support = read_mask(mask, TOKENS, vocab_size=513)
    assert [support[t].tolist() for t in range(len(support))] == ROWS
    assert support.token_ids.dtype == support.offsets.dtype == np.int64


def test_a_step_of_vllms_engine_is_one_position():
    support = read_mask(SamplingMaskLists(np.array([5, 3])), [3])
    assert support.offsets.tolist() == [0, 2]
    assert len(read_mask(SamplingMask([]), [])) == 0


def test_no_tokens_stand_for_all_of_them_where_that_is_allowed():
    support = read_mask([[5, 7], [], [2]], [7, 3, 2])
    assert support.offsets.tolist() == [0, 2, 2, 3]
    with pytest.raises(ValueError, match="completion 4, position 1: no tokens, though sampling was truncated"):
        read_mask([[5, 7], [], [2]], [7, 3, 2], completion=4, empty="error")
    with pytest.raises(ValueError, match="empty"):
        read_mask([[5]], [5], empty="nothing")


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (None, ValueError, "completion 2 has no sampling mask, though one was promised"),
        ([[1, 2], None, [4]], ValueError, "completion 2, position 1: None"),
        ([[1, 2], [3, 9]], ValueError, "completion 2 has 2 positions, but the completion has 3 tokens"),
        ([[1, 2], [3, 9], [4, 5, 4]], ValueError, "completion 2, position 2: token 4 twice"),
        ([[1, 2], [3, 9], [4, 99]], ValueError, r"completion 2, position 2: token 99 is not in \[0, 9\]"),
        ([[1, 2], [3, -1], [4]], ValueError, r"completion 2, position 1: token -1 is not in \[0, 9\]"),
        ([[1, 2], [3, 8], [4]], ValueError, "completion 2, position 1: sampled token 9 is not in its support"),
        ([[], [3, 8], [4]], ValueError, "completion 2, position 1: sampled token 9 is not in its support"),
        ([1, 2, 3], TypeError, "completion 2, position 0: int is no list"),
        ([[1, 2], [3.5, 9], [4]], TypeError, "must hold integers"),
        ({"a": 1}, TypeError, "is a dict, which has no token_ids"),
        (SamplingMaskLists(np.arange(5), np.array([0, 2, 4])), ValueError, "must go from 0 to 5, got 0 to 4"),
        (SamplingMaskLists(np.arange(5), np.array([0, 3, 2, 5])), ValueError, "position 1: fewer than no tokens"),
        (SamplingMaskLists(np.arange(5), np.array([0, 3, 5]), [0, 1, 2]), ValueError, "a whole batch"),
    ],
)
def test_every_fault_names_completion_and_position(mask, error, message):
    with pytest.raises(error, match=message):
        read_mask(mask, [1, 9, 4], completion=2, vocab_size=10)


def test_a_sampled_token_beyond_the_vocabulary():
    with pytest.raises(ValueError, match=r"position 1: sampled token 12 is not in \[0, 9\]"):
        read_mask([[1], []], [1, 12], vocab_size=10)


def request(*completions):
    """What ``LLM.generate`` returns of a prompt."""
    return SimpleNamespace(outputs=list(completions))


def completion(tokens, mask, logprobs=None):
    said = logprobs and [{t: SimpleNamespace(logprob=p)} for t, p in zip(tokens, logprobs, strict=True)]
    return SimpleNamespace(token_ids=tokens, sampling_mask=mask, logprobs=said)


def test_vllms_outputs_in_order_with_their_logprobs():
    outputs = [
        request(completion([1, 2], SamplingMask([[1, 5], [2]]), [-0.5, 0.0]), completion([3], SamplingMask([[3, 4]]))),
        request(completion((7,), SamplingMask([[7, 8, 9]]), [-1.0])),
    ]
    supports = from_vllm(outputs)
    assert [len(support) for support in supports] == [2, 1, 1]
    assert supports[0].logprobs.tolist() == [-0.5, 0.0]
    assert supports[1].logprobs is None
    token_ids, offsets = joined(supports)
    assert token_ids.tolist() == [1, 5, 2, 3, 4, 7, 8, 9]
    assert offsets.tolist() == [0, 2, 3, 5, 8]
    assert [len(s) for s in from_vllm(outputs[1].outputs)] == [1]
    with pytest.raises(ValueError, match="completion 1 has no sampling mask"):
        from_vllm([outputs[1], request(completion([1], None))])
    with pytest.raises(ValueError, match="position 0: no tokens"):
        from_vllm([request(completion([1], SamplingMask([[]])))])


def test_sglangs_answers_with_either_kind_of_logprobs():
    def answer(logprobs, mask=((3, 2), (4,))):
        meta = {"output_token_sampling_mask": [list(row) for row in mask], "completion_tokens": 2}
        return {"output_ids": [2, 4], "meta_info": meta | {"output_token_sampling_logprobs": logprobs}}

    of_sampled, of_support = from_sglang([answer([-0.25, 0.0]), answer([[-0.5, -1.0], [0.0]])])
    assert of_sampled.logprobs.tolist() == [-0.25, 0.0]
    assert of_support.logprobs.tolist() == [-1.0, 0.0]
    assert of_sampled[0].tolist() == [3, 2]
    with pytest.raises(ValueError, match="completion 0 has 2 tokens, but 1 sampling log-probs"):
        from_sglang([answer([-0.25])])
    with pytest.raises(ValueError, match="completion 0 has no sampling mask"):
        from_sglang([{"output_ids": [2], "meta_info": {}}])


def test_nothing_joined_is_empty():
    token_ids, offsets = joined([])
    assert token_ids.tolist() == []
    assert offsets.tolist() == [0]


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
    return model


OPTIONS = {
    "top-p": {"top_p": 0.8, "top_k": 0},
    "top-k": {"top_k": 5},
    "both": {"top_p": 0.7, "top_k": 12, "temperature": 0.6},
    "min-p": {"min_p": 0.2, "top_k": 0},
    "nothing": {"top_k": 0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_generate_draws_from_is_recorded(model, options):
    torch.manual_seed(1)
    prompts = torch.tensor([[5, 6, 7], [0, 8, 9]])
    recorder = SupportRecorder()
    with recorder.of(model):
        out = model.generate(
            prompts,
            attention_mask=(prompts != 0).long(),
            do_sample=True,
            max_new_tokens=12,
            eos_token_id=2,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    assert "_get_logits_processor" not in vars(model)
    completions = []
    for row in out.sequences[:, 3:].tolist():
        completions.append(row[: row.index(2) + 1] if 2 in row else row)
    supports = recorder.supports(completions)
    for row, (tokens, support) in enumerate(zip(completions, supports, strict=True)):
        assert len(support) == len(tokens)
        for t, token in enumerate(tokens):
            scores = out.scores[t][row]
            kept = scores.isfinite().nonzero()[:, 0].tolist()
            assert support[t].tolist() == ([] if len(kept) == 50 else kept)
            assert support.logprobs[t] == pytest.approx(float(scores.log_softmax(0)[token]), abs=1e-6)
    with pytest.raises(ValueError, match=r"2 completions of .* were recorded, but 1"):
        recorder.supports(completions[:1])


def test_a_recorder_can_be_used_again(model):
    recorder = SupportRecorder()
    for length in (4, 2):
        with recorder.of(model):
            out = model.generate(
                torch.tensor([[5, 6, 7]]), do_sample=True, max_new_tokens=length, eos_token_id=None, top_k=3
            )
        assert [len(support) for support in recorder.supports(out[:, 3:].tolist())] == [length]


# --- vLLM's own classes -----------------------------------------------------------------------------------------------


def test_vllms_own_classes():
    if os.environ.get("FLEXREC_REQUIRE_VLLM") != "1":
        pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
    from vllm.outputs import CompletionOutput
    from vllm.outputs import SamplingMask as OfVLLM
    from vllm.v1.outputs import SamplingMaskLists as OfEngine

    batch = OfEngine(FLAT, OFFSETS)
    assert read_mask(batch, TOKENS).offsets.tolist() == OFFSETS.tolist()
    assert read_mask(batch.slice_request(2, 1), TOKENS[2:])[0].tolist() == ROWS[2]
    output = CompletionOutput(
        index=0,
        text="",
        token_ids=TOKENS,
        cumulative_logprob=None,
        logprobs=None,
        sampling_mask=OfVLLM(batch.to_nested_list()),
    )
    (support,) = from_vllm([output])
    assert [support[t].tolist() for t in range(3)] == ROWS
    output.sampling_mask = None
    with pytest.raises(ValueError, match="completion 0 has no sampling mask"):
        from_vllm([output])
