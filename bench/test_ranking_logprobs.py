"""Candidate-restricted log-probs and entropy, forward and backward, against what one would use without them.

Run with ``pytest bench/test_ranking_logprobs.py``. N rankings of T = K = 30 candidates each, hidden size D = 256, a
vocabulary of V = 32,000, gradients to hidden states and output embedding. The full softmax takes seconds and 1 GB per
256 rankings, so it is run on an eighth of them; `seconds_at_256` in the extra info is its time scaled up.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flexrec.ops.ranking_logprobs import ranking_logprobs
from flexrec.ops.restricted_logprobs import restricted_logprobs

pytest.importorskip("pytest_benchmark")

N, K, D, V = 256, 30, 256, 32_000
FULL_SOFTMAX_SHARE = 8
Case = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module", params=["own lists", "8 rankings a list"])
def case(request: pytest.FixtureRequest) -> Case:
    """hidden (N, K, D), weight (V, D), candidates (P, K), ranking (N, K)."""
    lists = N if request.param == "own lists" else N // 8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, K, D, generator=generator).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / math.sqrt(D)).requires_grad_()
    candidates = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(lists)])
    ranking = torch.stack([torch.randperm(K, generator=generator) for _ in range(N)])
    return hidden, weight, candidates, ranking


def full_softmax(hidden: Tensor, weight: Tensor, candidates: Tensor, ranking: Tensor) -> tuple[Tensor, Tensor]:
    """What trainers compute: log-softmax over the vocabulary (unrestricted, so not even the right distribution)."""
    tokens = candidates.repeat_interleave(len(hidden) // len(candidates), 0).gather(1, ranking)
    log_p = (hidden @ weight.t()).log_softmax(-1)
    return log_p.gather(2, tokens[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def gather_bmm(hidden: Tensor, weight: Tensor, candidates: Tensor, ranking: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates' rows in rank order, a batched product and a triangular mask, all under autograd."""
    tokens = candidates.repeat_interleave(len(hidden) // len(candidates), 0).gather(1, ranking)
    logits = torch.bmm(hidden, weight[tokens].transpose(1, 2))
    placed = torch.ones(K, K, dtype=torch.bool).tril(-1)
    log_p = logits.masked_fill(placed, -math.inf).log_softmax(-1)
    return log_p.diagonal(dim1=1, dim2=2), -(log_p.exp() * log_p.masked_fill(placed, 0)).sum(-1)


def ours(hidden: Tensor, weight: Tensor, candidates: Tensor, ranking: Tensor) -> tuple[Tensor, Tensor]:
    out = ranking_logprobs(hidden, weight, candidates, ranking)
    return out.logprobs, out.entropy


@pytest.mark.benchmark(group="ranking log-probs and entropy, forward + backward")
@pytest.mark.parametrize("method", [full_softmax, gather_bmm, ours], ids=lambda f: f.__name__)
def test_forward_backward(benchmark, case, method):
    hidden, weight, candidates, ranking = case
    share = FULL_SOFTMAX_SHARE if method is full_softmax else 1
    if share > 1 and len(candidates) < N:
        pytest.skip("the full softmax does not depend on how lists are shared")
    n = N // share
    arguments = hidden.detach()[:n].requires_grad_(), weight, candidates[: len(candidates) // share], ranking[:n]

    def step():
        logprobs, entropy = method(*arguments)
        return torch.autograd.grad(logprobs.sum() + 0.01 * entropy.sum(), arguments[:2])

    rounds = 2 if share > 1 else 15
    grads = benchmark.pedantic(step, rounds=rounds, warmup_rounds=1)
    assert all(grad.isfinite().all() for grad in grads)
    benchmark.extra_info |= {"N": n, "P": len(arguments[2]), "K": K, "D": D, "V": V, "threads": torch.get_num_threads()}
    if benchmark.stats:
        benchmark.extra_info["seconds_at_256"] = benchmark.stats.stats.min * share


@pytest.mark.benchmark(group="log-probs over ragged allowed sets, forward + backward")
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_restricted_forward_backward(benchmark, backend):
    """6,000 rows with 17 allowed tokens each (the tokens of multi-token candidates), D = 128, V = 5,000."""
    rows, allowed, dim, vocab = 6_000, 17, 128, 5_000
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, dim, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, dim, generator=generator) / math.sqrt(dim)).requires_grad_()
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:allowed].sort().values for _ in range(rows)])
    offsets = torch.arange(0, rows * allowed + 1, allowed)

    def step():
        out = restricted_logprobs(hidden, weight, ids.flatten(), offsets, ids[:, 3], backend=backend)
        return torch.autograd.grad(out.logprobs.sum() + 0.01 * out.entropy.sum(), (hidden, weight))

    benchmark.pedantic(step, rounds=10, warmup_rounds=1)
    benchmark.extra_info |= {"rows": rows, "nnz": rows * allowed, "D": dim, "V": vocab}
