"""The cache that grows with what is decoded."""

import warnings

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from flexrec.decoding.cache import _GrowingLayer
from flexrec.decoding.sample import sample_rankings


@pytest.mark.parametrize("seed", range(3))
def test_a_growing_cache_holds_what_a_copied_one_does(seed):
    """After tokens have been appended, rows repeated and rows reordered, in any order."""
    rng, ours, plain = np.random.default_rng(seed), _GrowingLayer(), DynamicLayer()
    rows = 2
    for _ in range(20):
        action = rng.choice(["append", "append", "append", "repeat", "reorder"])
        if action == "append":
            states = torch.randn(rows, 3, int(rng.integers(1, 4)), 5)
            for held, expected in zip(ours.update(states, -states), plain.update(states, -states), strict=True):
                assert torch.equal(held, expected)
        elif ours.keys is not None and action == "reorder":
            index = torch.from_numpy(rng.integers(0, rows, size=rows))
            ours.reorder_cache(index)
            plain.reorder_cache(index)
        elif ours.keys is not None and rows < 8:
            ours.batch_repeat_interleave(2)
            plain.batch_repeat_interleave(2)
            rows *= 2


LLAMA = LlamaConfig(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


class _Former(LlamaForCausalLM):
    def forward(self, input_ids, past_key_values=None, **options):
        self.given.append(past_key_values)
        return super().forward(input_ids, past_key_values=past_key_values, **options)


class _Renamed(LlamaForCausalLM):
    def forward(self, input_ids, cache=None, **options):
        self.given.append(cache)
        return super().forward(input_ids, past_key_values=cache, **options)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # at what these classes hand on
@pytest.mark.parametrize("kind", [_Former, _Renamed])
def test_the_cache_goes_by_the_name_that_the_model_has_for_it(kind):
    torch.manual_seed(0)
    model, expected = kind(LLAMA).eval(), LlamaForCausalLM(LLAMA).eval()
    expected.load_state_dict(model.state_dict())
    model.given = []
    found = sample_rankings(model, [[1, 2], [3]], [[[10], [11], [12]]] * 2, greedy=True)
    assert all(cache is not None for cache in model.given)
    assert len(model.given) > 1
    same = sample_rankings(expected, [[1, 2], [3]], [[[10], [11], [12]]] * 2, greedy=True)
    np.testing.assert_array_equal(found.rankings, same.rankings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaForCausalLM(LLAMA),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2)),
    ],
)
def test_nothing_that_is_passed_is_deprecated(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        sample_rankings(make().eval(), [[1, 2], [3]], [[[10], [11], [12]]] * 2, num_generations=2)
