"""Log-probs over the whole vocabulary in chunks: those of a plain log-softmax, without its memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexrec.ops.vocabulary_logprobs import vocabulary_logprobs

M, V, D = 23, 40, 6


def operands(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    tensors = [torch.randn(M, D, dtype=dtype), torch.randn(V, D, dtype=dtype)]
    tensors += [torch.randn(V, dtype=dtype)] if bias else []
    return [tensor.requires_grad_() for tensor in tensors], torch.randint(4, V, (M,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
@pytest.mark.parametrize("never", [(), (1, 3)])
def test_values_and_gradients_are_those_of_a_log_softmax(bias, chunk_size, never):
    tensors, targets = operands(bias=bias)
    hidden, weight = tensors[:2]
    of_bias = tensors[2] if bias else None
    found = vocabulary_logprobs(
        hidden, weight, targets, bias=of_bias, temperature=0.7, never=never, chunk_size=chunk_size
    )
    logits = torch.nn.functional.linear(hidden, weight, of_bias) / 0.7
    possible = [token for token in range(V) if token not in never]
    places = torch.tensor([possible.index(int(token)) for token in targets])
    expected = logits[:, possible].log_softmax(dim=1)[torch.arange(M), places]
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(M, dtype=torch.float64)
    for ours, plain in zip(
        torch.autograd.grad(found, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_half_precision_is_summed_in_float32():
    (hidden, weight), targets = operands(torch.bfloat16, bias=False)
    found = vocabulary_logprobs(hidden, weight, targets)
    assert found.dtype == torch.float32
    exact = (hidden.double() @ weight.double().T).log_softmax(dim=1)[torch.arange(M), targets]
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2)
    assert not vocabulary_logprobs(hidden[:0], weight, targets[:0]).numel()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_logits_exist_a_chunk_at_a_time():
    hidden = torch.randn(300, D, requires_grad=True)
    weight = torch.randn(1000, D, requires_grad=True)
    targets = torch.randint(0, 1000, (300,))
    with Largest() as largest:
        vocabulary_logprobs(hidden, weight, targets, chunk_size=10).sum().backward()
    assert largest.elements == 10 * 1000


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": torch.full((M,), V)}, ValueError, "none of never, got 40 at index 0"),
        ({"never": (5,), "targets": torch.full((M,), 5)}, ValueError, "none of never, got 5 at index 0"),
        ({"never": (V,)}, ValueError, r"never must hold token ids from 0 to 39, got \[40\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"targets": torch.zeros(M + 1, dtype=torch.int64)}, ValueError, "targets must have shape"),
        ({"weight": torch.zeros(V, D + 1)}, ValueError, "weight must have shape"),
        ({"targets": torch.zeros(M)}, TypeError, "integer"),
    ],
)
def test_mistakes(changes, error, message):
    (hidden, weight), targets = operands(bias=False)
    with pytest.raises(error, match=message):
        vocabulary_logprobs(**{"hidden": hidden, "weight": weight, "targets": targets, **changes})
