"""Replayed supports: log-probs of what a sampler had left, restricted and whole rows in one call."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexrec.ops.vocabulary_logprobs import replay_logprobs

V, D = 29, 5


def problem(counts, dtype=torch.float64, bias=True, seed=0):
    """Operands, a support of ``counts[m]`` tokens for row m (0: all), and a target in each."""
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.randperm(V, generator=generator)[:count] for count in counts]
    shapes = [(len(counts), D), (V, D), *([(V,)] if bias else [])]
    tensors = [torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]
    pools = [ids if len(ids) else torch.arange(V) for ids in kept]
    targets = torch.stack([ids[torch.randint(len(ids), (), generator=generator)] for ids in pools])
    ids = torch.cat(kept) if len(kept) else torch.empty(0, dtype=torch.int64)
    return tensors, ids, torch.tensor([0, *counts]).cumsum(0), targets, pools


def by_masked_logits(tensors, targets, pools, temperature):
    """The definition: logits of every token, those that were cut at -inf."""
    hidden, weight, *bias = tensors
    logits = (torch.nn.functional.linear(hidden, weight, *bias) / temperature).double()
    keep = torch.zeros(logits.shape, dtype=torch.bool)
    for row, pool in zip(keep, pools, strict=True):
        row[pool] = True
    log_probs = logits.masked_fill(~keep, -torch.inf).log_softmax(1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs.masked_fill(~keep, 0.0)).sum(1)
    return log_probs.gather(1, targets[:, None])[:, 0], entropy


MIXES = {
    "mixed": [3, 0, 1, 7, 0, 0, 29, 2],
    "restricted": [3, 1, 7, 29],
    "whole": [0, 0, 0],
    "whole first and last": [0, 4, 0],
    "one row": [2],
}


@pytest.mark.parametrize("counts", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("backend", ["auto", "numba", "torch"])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_masked_logits(counts, backend, bias):
    tensors, ids, offsets, targets, pools = problem(counts, bias=bias)
    hidden, weight, *of_bias = tensors
    found = replay_logprobs(
        *(hidden, weight, ids, offsets, targets),
        bias=of_bias[0] if bias else None,
        temperature=0.7,
        chunk_size=2,
        backend=backend,
    )
    expected = by_masked_logits(tensors, targets, pools, 0.7)
    torch.testing.assert_close(tuple(found), expected)
    upstream = [torch.randn(len(counts), dtype=torch.float64) for _ in range(2)]
    for ours, plain in zip(
        torch.autograd.grad(found, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_triton_agrees_in_float32(device):
    tensors, *lists, pools = problem(MIXES["mixed"], torch.float32)
    expected = by_masked_logits(tensors, lists[-1], pools, 1.3)
    plain = torch.autograd.grad(expected[0].sum(), tensors)
    tensors = [x.detach().to(device).requires_grad_() for x in tensors]
    hidden, weight, bias = tensors
    lists = [x.to(device) for x in lists]
    found = replay_logprobs(hidden, weight, *lists, bias=bias, temperature=1.3, backend="triton")
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), other.float(), rtol=1e-4, atol=1e-5)
    ours = [x.cpu() for x in torch.autograd.grad(found.logprobs.sum(), tensors)]
    torch.testing.assert_close(ours, list(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weight_grad", ["rows", "accumulate"])
@pytest.mark.parametrize("counts", [MIXES["mixed"], MIXES["restricted"]])
def test_the_weight_gets_its_gradient_in_every_way(weight_grad, counts):
    tensors, ids, offsets, targets, pools = problem(counts, bias=False)
    hidden, weight = tensors
    replay_logprobs(hidden, weight, ids, offsets, targets, weight_grad=weight_grad).logprobs.sum().backward()
    (expected,) = torch.autograd.grad(by_masked_logits(tensors, targets, pools, 1.0)[0].sum(), weight)
    torch.testing.assert_close(weight.grad.to_dense() if weight.grad.is_sparse else weight.grad, expected)


def test_no_rows_and_half_precision():
    (hidden, weight, _), ids, offsets, targets, pools = problem(MIXES["mixed"], torch.bfloat16)
    found = replay_logprobs(hidden, weight, ids, offsets, targets)
    exact, entropy = by_masked_logits([hidden.double(), weight.double()], targets, pools, 1.0)
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.logprobs.double(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=2e-2, atol=2e-2)
    none = replay_logprobs(hidden[:0], weight, ids[:0], offsets[:1], targets[:0])
    assert none.logprobs.shape == none.entropy.shape == (0,)


def test_impossible_tokens_do_not_make_nan():
    (hidden, weight, bias), ids, offsets, targets, _ = problem([0, 3, 0])
    with torch.no_grad():
        bias[torch.arange(V)[~torch.isin(torch.arange(V), torch.cat([ids, targets]))]] = -torch.inf
    found = replay_logprobs(hidden, weight, ids, offsets, targets, bias=bias)
    assert all(torch.isfinite(values).all() for values in found)
    bias.data[targets[0]] = -torch.inf
    found = replay_logprobs(hidden, weight, ids, offsets, targets, bias=bias)
    assert found.logprobs[0] == -torch.inf
    assert found.entropy.isfinite().all()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_logits_of_the_vocabulary_exist_for_a_chunk_of_whole_rows_only():
    counts = [3] * 60 + [0] * 6
    (hidden, weight, _), ids, offsets, targets, _ = problem(counts)
    with Largest() as largest:
        replay_logprobs(hidden, weight, ids, offsets, targets, chunk_size=2)[0].sum().backward()
    assert largest.elements <= max(66 * D, V * D, 2 * V, 180) < 66 * V


def test_autocast_has_no_say():
    tensors, ids, offsets, targets, _ = problem(MIXES["mixed"], torch.float32)
    expected = replay_logprobs(*tensors[:2], ids, offsets, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = replay_logprobs(*tensors[:2], ids, offsets, targets)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": [0, 2, 2, 4]}, r"offsets must go from 0 to len\(token_ids\) = 5, got 0 to 4"),
        ({"offsets": [0, 0, 0, 0]}, r"got 0 everywhere"),
        ({"offsets": [1, 2, 2, 5]}, r"got 1 to 5"),
        ({"offsets": [0, 4, 3, 5]}, r"offsets must not descend, but do after entry 1"),
        ({"offsets": [0, 2, 5]}, r"offsets must .*4"),
        ({"token_ids": [3, 4, 5, 6, 29]}, r"token_ids must lie in \[0, 28\], got 29 at index \[4\]"),
        ({"token_ids": [3, 4, 5, 7, 5]}, r"token_ids must name a token once per row; row 2 has 5 twice"),
        ({"targets": [3, 9, 4]}, r"row 2 has target 4 and 3 allowed: \[5, 6, 7\]"),
        ({"targets": [3, 29, 5]}, r"targets must hold token ids from 0 to 28, got 29 at index 1"),
        ({"targets": [3, -1, 5]}, r"got -1 at index 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    given = {"token_ids": [3, 4, 5, 6, 7], "offsets": [0, 2, 2, 5], "targets": [3, 9, 5]} | changes
    tensors = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        replay_logprobs(torch.zeros(3, D), torch.zeros(V, D), **tensors)
