"""Random ranked lists, and the restricted distribution by brute force: one step, one candidate at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from front_end import front_end
from torch import Tensor


@dataclass
class RankedCase:
    """Arguments of ranking_logprobs; names and shapes are its own."""

    hidden: Tensor
    weight: Tensor
    candidates: Tensor
    ranking: Tensor
    values: Tensor | None
    bias: Tensor | None
    lengths: Tensor | None
    temperature: float

    @property
    def positional(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.candidates, self.ranking

    @property
    def options(self) -> dict:
        return {"bias": self.bias, "lengths": self.lengths, "temperature": self.temperature}

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> RankedCase:
        """Copies whose floating tensors are fresh leaves that require gradients (but for the values)."""

        def leaf(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to(device=device, dtype=dtype, copy=True).requires_grad_()

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return replace(
            self,
            hidden=leaf(self.hidden),
            weight=leaf(self.weight),
            bias=leaf(self.bias),
            candidates=move(self.candidates),
            ranking=move(self.ranking),
            lengths=move(self.lengths),
            values=None if self.values is None else self.values.to(device=device, dtype=dtype),
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def length(self, n: int) -> int:
        """The real number of candidates of ranking n."""
        if self.lengths is None:
            return self.candidates.shape[1]
        return int(self.lengths[n * len(self.lengths) // len(self.hidden)])

    def steps(self) -> Iterator[tuple[int, int, list[int]]]:
        """(n, t, candidate indices that remain, the chosen one first and the order of `values` kept)."""
        for n, ranking in enumerate(self.ranking.tolist()):
            length = self.length(n)
            ranked = ranking[:length]
            order = ranked + [j for j in range(length) if j not in ranked]
            for t in range(len(ranked)):
                yield n, t, order[t:]

    def log_probs(self, n: int, t: int, remaining: list[int]) -> Tensor:
        """(len(remaining),) log-probabilities of one step."""
        per_list = len(self.hidden) // len(self.candidates)
        logits = []
        for j in remaining:
            token = int(self.candidates[n // per_list, j])
            logit = (self.hidden[n, t] * self.weight[token]).sum()
            if self.bias is not None:
                logit = logit + self.bias[token]
            logits.append(logit / self.temperature)
        return torch.log_softmax(torch.stack(logits), 0)

    def brute_force(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs, entropy and expectations; needs finite logits."""
        shape = self.ranking.shape
        logprobs, entropy = self.hidden.new_zeros(shape), self.hidden.new_zeros(shape)
        channels = 0 if self.values is None else self.values.shape[2]
        expectations = self.hidden.new_zeros((*shape, channels))
        for n, t, remaining in self.steps():
            log_p = self.log_probs(n, t, remaining)
            logprobs[n, t] = log_p[0]
            entropy[n, t] = -(log_p.exp() * log_p).sum()
            if self.values is not None:
                expectations[n, t] = log_p.exp() @ self.values[n, t : t + len(remaining)]
        return logprobs, entropy, None if self.values is None else expectations


def make_case(
    seed: int,
    *,
    lists: int = 2,
    group: int = 1,
    steps: int = 4,
    size: int = 5,
    dim: int = 6,
    vocab: int = 11,
    channels: int = 2,
    bias: bool = True,
    ragged: str = "",
    temperature: float = 0.7,
    dtype: torch.dtype = torch.float64,
) -> RankedCase:
    """Random lists; ragged: "" (none), "list" (lengths (P,)) or "ranking" (lengths (N,)). Tokens may repeat."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    n = lists * group
    case = RankedCase(
        hidden=normal(n, steps, dim),
        weight=normal(vocab, dim),
        candidates=integers(0, vocab, lists, size),
        ranking=torch.zeros(n, steps, dtype=torch.int64),
        values=normal(n, size, channels) if channels else None,
        bias=normal(vocab) if bias else None,
        lengths={"": None, "list": integers(0, size + 1, lists), "ranking": integers(0, size + 1, n)}[ragged],
        temperature=temperature,
    )
    for i in range(n):
        ranked = torch.randperm(case.length(i), generator=generator)[:steps]
        case.ranking[i, : len(ranked)] = ranked
    return case.to(dtype)


@pytest.fixture(scope="session")
def ranked_case() -> Callable[..., RankedCase]:
    """The function that makes random ranked lists."""
    return make_case


@pytest.fixture(scope="session")
def weighted_sum() -> Callable[..., Tensor]:
    """A scalar that depends on every entry of some outputs, each with its own random weight."""

    def total(*outputs: Tensor | None, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        terms = []
        for x in outputs:
            if x is not None:
                weights = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
                terms.append((x * weights).sum())
        return torch.stack(terms).sum()

    return total


@pytest.fixture(autouse=True)
def launches_compile(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every form of a kernel that a test runs in the interpreter can be compiled, too: where the whole folder is run.

    The compiler takes some seconds to start, which is too long for a test alone.
    """
    whole = any(item.path.name == "test_triton_launches.py" for item in request.session.items)
    launch = sys.modules["flexrec.triton_kernels.launch"] if whole else None
    if launch is None or not launch.INTERPRETED:
        yield
        return
    with launch.recorded(runs=True) as launches:
        yield
    complaints = front_end().complaints(launches) if launches else []
    assert not complaints, "\n\n".join(complaints)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not written is NaN, or the most negative integer."""

    def poison(new):
        def allocate(*args, **kwargs):
            x = new(*args, **kwargs)
            return x.fill_(math.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)

        return allocate

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
