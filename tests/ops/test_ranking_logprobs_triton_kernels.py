"""The Triton launchers of ranking_logprobs against float64 autograd: both orders, all modes, every awkward shape.

On a GPU where there is one, else in the interpreter. Buffers that a kernel must fill hold NaN before it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flexrec.ops.rank_order import rank_positions
from flexrec.triton_kernels import ranking_logprobs as kernels
from flexrec.triton_kernels import ranking_logprobs_problem as problems
from flexrec.triton_kernels.ranking_logprobs import Forward, ranking_logprobs_backward, ranking_logprobs_forward

TEMPERATURE = 0.7
pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass
class Lists:
    """Random rankings and what goes with them; the names are those of the launchers' arguments."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    candidates: Tensor
    position: Tensor
    values: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor

    @property
    def inputs(self) -> tuple:
        return self.hidden, self.weight, self.bias, self.candidates, self.position, self.values, TEMPERATURE

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """hidden, weight, bias in a dtype, as leaves of autograd."""
        return [x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)]

    def reference(self, kind: str | None) -> tuple | Tensor | None:
        if kind == "hidden":
            return self.ref_hidden, self.ref_weight, self.ref_bias
        if kind == "logits":  # any constant per row
            logits = plain_logits(self.ref_hidden.double(), self.ref_weight.double(), self.ref_bias.double(), self)
            return (logits + torch.randn(*logits.shape[:2], 1, dtype=torch.float64, device=logits.device)).float()
        return None


def make(p, g, t, k, d, v, c=2, dtype=torch.float32, ragged=False, device="cpu", seed=0) -> Lists:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    n = p * g
    ranking = torch.stack([torch.randperm(k, generator=generator)[:t] for _ in range(n)])
    lengths = None
    if ragged:
        lengths = torch.randint(0, k + 1, (n,), generator=generator)
        for i, length in enumerate(lengths.tolist()):
            ranking[i, : min(t, length)] = torch.randperm(length, generator=generator)[:t]
    return Lists(
        hidden=normal(n, t, d),
        weight=normal(v, d),
        bias=normal(v),
        candidates=torch.randint(0, v, (p, k), generator=generator).to(device),
        position=rank_positions(ranking, k, lengths).to(device),
        values=normal(n, k, c).float(),
        ref_hidden=normal(n, t, d + 3),
        ref_weight=normal(v, d + 3),
        ref_bias=normal(v),
    )


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor, x: Lists) -> Tensor:
    """Gather and bmm in the operands' dtype; (N, T, K) float32 (float64 if they are)."""
    (n, t, d), p = hidden.shape, len(x.candidates)
    logits = hidden.view(p, n // p * t, d) @ weight[x.candidates].mT + bias[x.candidates][:, None]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).view(n, t, -1) / TEMPERATURE


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, x: Lists, reference: str | None) -> list[Tensor]:
    """Log-probs, entropy, expectations and KL as anybody would write them in torch."""
    logits = plain_logits(hidden, weight, bias, x)
    steps = torch.arange(logits.shape[1], device=logits.device)[:, None]
    position = x.position[:, None]
    pool = position >= steps

    def log_softmax(z):
        return torch.where(pool, torch.where(pool, z, -1e30).log_softmax(-1), 0.0)

    log_probs = log_softmax(logits)
    probs = torch.where(pool, log_probs.exp(), 0.0)
    out = [
        torch.where(position == steps, log_probs, 0.0).sum(-1),
        -(probs * log_probs).sum(-1),
        probs @ x.values.to(probs.dtype),
    ]
    if reference is not None:
        operands = (y.to(hidden.dtype) for y in (x.ref_hidden, x.ref_weight, x.ref_bias))
        out.append((probs * (log_probs - log_softmax(plain_logits(*operands, x)))).sum(-1))
    return out


def upstream_of(outputs: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(y.shape, generator=generator).to(y.device) for y in outputs)


def grads_of(outputs: list[Tensor], leaves: list[Tensor], upstream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    total = sum((y * g).sum() for y, g in zip(outputs, upstream, strict=True))
    return torch.autograd.grad(total, leaves)


def results(out: Forward) -> list[Tensor]:
    return [y for y in out[:4] if y is not None]


def assert_no_worse(ours: Tensor, theirs: Tensor, exact: Tensor, ulps: int) -> None:
    """Error at most twice that of torch in the same dtype, or a few units in the last place of the largest entry."""
    assert ours.isfinite().all()
    floor = ulps * torch.finfo(ours.dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + floor


# Lists, rankings of each, steps, candidates, width, vocabulary. Tiles are 32, 64 or 128 wide: sizes below, at and above
# their edges; one of everything; a vocabulary smaller than a list, so that tokens repeat.
TINY = (1, 1, 1, 1, 1, 1)
SMALL = (3, 2, 5, 7, 40, 4)
EDGES = (1, 2, 33, 65, 65, 99)
EXACT = (1, 1, 32, 32, 32, 64)
LONG = (1, 1, 70, 135, 40, 200)
WIDE = (2, 1, 3, 31, 140, 50)


@pytest.mark.parametrize(
    ("shape", "dtype", "order", "save", "reference"),
    [
        (TINY, torch.float32, "canonical", True, "hidden"),
        (TINY, torch.bfloat16, "chosen", False, None),
        (SMALL, torch.float32, "canonical", True, None),
        (SMALL, torch.float32, "chosen", True, "hidden"),
        (SMALL, torch.float32, "canonical", False, "logits"),
        (SMALL, torch.bfloat16, "canonical", False, "hidden"),
        (SMALL, torch.float16, "chosen", True, "logits"),
        (EDGES, torch.float32, "canonical", True, "hidden"),
        (EDGES, torch.bfloat16, "canonical", True, "logits"),
        (EDGES, torch.bfloat16, "canonical", True, None),
        (EDGES, torch.float16, "chosen", False, "hidden"),
        (EXACT, torch.float32, "chosen", False, "logits"),
        (EXACT, torch.float16, "canonical", True, "hidden"),
        (LONG, torch.float32, "chosen", True, None),
        (LONG, torch.bfloat16, "chosen", True, "hidden"),
        (LONG, torch.bfloat16, "canonical", False, None),
        (WIDE, torch.bfloat16, "canonical", True, None),
        (WIDE, torch.float16, "canonical", False, "logits"),
    ],
    ids=lambda x: str(x).replace("torch.", "").replace(" ", ""),
)
def test_outputs_and_gradients(shape, dtype, order, save, reference, device):
    x = make(*shape, dtype=dtype, device=device)
    exact_leaves, torch_leaves = x.leaves(torch.float64), x.leaves(dtype)
    exact, theirs = plain(*exact_leaves, x, reference), plain(*torch_leaves, x, reference)
    given = x.reference(reference)
    out = ranking_logprobs_forward(*x.inputs, reference=given, save_logits=save, order=order)
    assert (out.kl is None) == (reference is None)
    assert (out.logits is None) == (not save)
    for ours, torchs, want in zip(results(out), theirs, exact, strict=True):
        assert ours.dtype == torch.float32
        # Float32 sums of products of half-precision numbers: not only no worse than torch, but good to float32.
        assert_no_worse(ours, torchs, want, ulps=4)
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-4)
    upstream = upstream_of(exact)
    grads = ranking_logprobs_backward(upstream, out, *x.inputs, [True] * 3, reference=given, order=order, ragged=False)
    want_grads = grads_of(exact, exact_leaves, upstream)
    their_grads = grads_of(theirs, torch_leaves, upstream)
    for ours, torchs, want in zip(grads, their_grads, want_grads, strict=True):
        assert ours.dtype == dtype
        assert_no_worse(ours, torchs, want, ulps=4)


def test_gradients_of_hidden_states_that_follow_at_once_are_rounded_once(device):
    x = make(2, 2, 8, 30, 40, 50, dtype=torch.float16, device=device)
    out = ranking_logprobs_forward(*x.inputs)
    upstream = upstream_of(results(out))
    found = ranking_logprobs_backward(upstream, out, *x.inputs, [True, False, False])[0]
    leaves = x.leaves(torch.float64)
    (exact,) = grads_of(plain(*leaves, x, None), leaves[:1], upstream)
    assert (found == exact.half()).double().mean() > 0.97  # with rounded slopes three of five


@pytest.mark.parametrize("order", ["canonical", "chosen"])
def test_lists_of_many_lengths(order, device):
    x = make(4, 2, 9, 40, 24, 60, ragged=True, device=device)
    dead = x.position.amax(1, keepdim=True) < torch.arange(9, device=device)
    assert dead.any()
    assert not dead.all()
    leaves = x.leaves(torch.float64)
    exact = plain(*leaves, x, "hidden")
    upstream = upstream_of(exact)
    want_grads = grads_of(exact, leaves, upstream)
    x.hidden[dead], x.ref_hidden[dead] = math.nan, math.nan  # which nobody may read
    out = ranking_logprobs_forward(*x.inputs, reference=x.reference("hidden"), order=order)
    for ours, want in zip(results(out), exact, strict=True):
        torch.testing.assert_close(ours, want.float(), rtol=1e-4, atol=1e-4)
        assert (ours[dead] == 0).all()
    grads = ranking_logprobs_backward(
        upstream, out, *x.inputs, [True] * 3, reference=x.reference("hidden"), order=order
    )
    for ours, want in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(ours, want.float(), rtol=1e-4, atol=1e-4)
    assert (grads[0][dead] == 0).all()


@pytest.mark.parametrize(
    ("group", "steps", "order", "dtype"), [(4, 9, "canonical", torch.float32), (1, 20, "chosen", torch.bfloat16)]
)
def test_ways_to_have_the_weight_gradient(group, steps, order, dtype, device):
    x = make(2, group, steps, 37, 40, 30, dtype=dtype, device=device)
    out = ranking_logprobs_forward(*x.inputs, order=order)
    upstream = upstream_of(results(out))

    def backward(**options):
        return ranking_logprobs_backward(upstream, out, *x.inputs, [False, True, True], order=order, **options)

    _, dense, dense_bias = backward()
    hidden_grad, rows, bias_rows = backward(weight_mode="rows")
    assert hidden_grad is None
    assert rows.shape == (2 * 37, 40)
    assert bias_rows.shape == (2 * 37,)
    assert rows.dtype == torch.float32
    tokens = x.candidates.flatten()
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(torch.zeros(30, 40, device=device).index_add_(0, tokens, rows).to(dtype), dense, **close)
    torch.testing.assert_close(
        torch.zeros(30, device=device).index_add_(0, tokens, bias_rows).to(dtype), dense_bias, **close
    )
    for again in backward(weight_mode="rows")[1:]:
        assert torch.equal(again, rows if again.ndim == 2 else bias_rows)
    for buffer_dtype in (torch.float32, dtype):
        into = (
            torch.ones(30, 40, dtype=buffer_dtype, device=device),
            torch.ones(30, dtype=buffer_dtype, device=device),
        )
        assert backward(weight_mode="accumulate", into=into) == (None, None, None)
        loose = {"rtol": 2 * torch.finfo(buffer_dtype).eps, "atol": 1e-5}
        if buffer_dtype != torch.float32:
            loose["atol"] = 8 * torch.finfo(buffer_dtype).eps * float(dense.abs().max())  # a rounding for each row
        else:
            loose["rtol"] = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(into[0].float() - 1, dense.float(), **loose)
        torch.testing.assert_close(into[1].float() - 1, dense_bias.float(), **loose)


def test_few_lists_of_many_steps_take_a_library_product(device, monkeypatch):
    assert problems.weight_grad_by_matmul(lists=1, rows=1024, size=5, width=16)
    assert not problems.weight_grad_by_matmul(lists=1, rows=512, size=5, width=16)
    assert not problems.weight_grad_by_matmul(lists=512, rows=1024, size=100, width=4096)
    x = make(2, 3, 11, 10, 16, 12, device=device)
    monkeypatch.setattr(kernels, "weight_grad_by_matmul", lambda *shape: True)
    out = ranking_logprobs_forward(*x.inputs)
    upstream = upstream_of(results(out))
    launched = ranking_logprobs_backward(upstream, out, *x.inputs, [False, True, True], ragged=True)
    calls = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a: calls.append(a) or bmm(*a))
    for mode in ("dense", "rows"):
        found = ranking_logprobs_backward(upstream, out, *x.inputs, [False, True, True], ragged=False, weight_mode=mode)
        if mode == "rows":
            tokens = x.candidates.flatten()
            found = (
                None,
                *(torch.zeros_like(y).index_add_(0, tokens, z) for y, z in zip(launched[1:], found[1:], strict=False)),
            )
        torch.testing.assert_close(found[1:], launched[1:], rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_a_token_of_many_lists_is_added_up_before_it_is_rounded(device):
    """Each list adds less than bfloat16 can tell from 1; all of them together are seen."""
    x = make(60, 1, 1, 2, 8, 3, device=device)
    x.candidates[:], x.position[:] = torch.tensor([0, 2], device=device), torch.tensor([0, 1], device=device)
    out = ranking_logprobs_forward(*x.inputs)
    upstream = 1e-3 * torch.ones_like(out.logprobs), *(torch.zeros_like(y) for y in results(out)[1:])
    x.hidden[:] = 1.0
    arguments = upstream, out, *x.inputs, [False, True, True]
    _, rows, bias_rows = ranking_logprobs_backward(*arguments, weight_mode="rows")
    into = torch.ones(3, 8, dtype=torch.bfloat16, device=device), torch.ones(3, dtype=torch.bfloat16, device=device)
    ranking_logprobs_backward(*arguments, weight_mode="accumulate", into=into)
    for found, each in zip(into, (rows, bias_rows), strict=True):
        total = torch.zeros(found.shape, device=device).index_add_(0, x.candidates.flatten(), each)
        assert (each.abs() < 2**-9).all()
        assert total.abs().max() > 3 * 2**-7
        assert (found.float() - (1 + total)).abs().max() <= 2**-7  # one rounding, which the interpreter cuts off


@pytest.mark.parametrize("order", ["canonical", "chosen"])
@pytest.mark.parametrize("group", [1, 3])
def test_a_dense_gradient_in_half_precision_goes_through_rows(group, order, device, monkeypatch):
    """No float32 buffer of the vocabulary's size, and the same bits again; but for rows that several rankings write."""
    x = make(4, group, 3, 9, 16, 60, dtype=torch.bfloat16, device=device)
    out = ranking_logprobs_forward(*x.inputs, order=order)
    arguments = upstream_of(results(out)), out, *x.inputs, [False, True, True]
    made, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: made.append(k.get("dtype")) or zeros(*a, **k))
    _, *found = ranking_logprobs_backward(*arguments, order=order)
    shared = order == "chosen" and group > 1
    assert {dtype for dtype in made if dtype != torch.int32} == {torch.float32 if shared else torch.bfloat16}
    if shared:
        out = ranking_logprobs_forward(*x.inputs, order="canonical")
    by_rows = {"weight_mode": "rows", "order": "canonical" if shared else order}
    _, *rows = ranking_logprobs_backward(arguments[0], out, *arguments[2:], **by_rows)
    for grad, each in zip(found, rows, strict=True):
        total = zeros(grad.shape, device=device).index_add_(0, x.candidates.flatten(), each)
        assert grad.dtype == torch.bfloat16
        assert (grad.float() - total).abs().max() <= 2**-7 * total.abs().max()
    if not shared:
        again = ranking_logprobs_backward(*arguments, order=order)[1:]
        assert all(torch.equal(first, second) for first, second in zip(found, again, strict=True))


@pytest.mark.parametrize("order", ["canonical", "chosen"])
@pytest.mark.parametrize("mode", ["dense", "accumulate", "rows"])
def test_tokens_out_of_range_are_neither_read_nor_written(mode, order, device):
    """Where value checks are off: NaN for steps that may choose them, and what lies beside the buffers stays."""
    x = make(2, 1, 3, 5, 8, 20, device=device)
    whole = torch.zeros(24, 8, device=device), torch.zeros(24, device=device)  # two rows too many on either side
    x.candidates[0, 0], x.candidates[0, 4] = -1, 20
    x.position[0] = torch.tensor([0, 2, 3, 4, 1])
    out = ranking_logprobs_forward(*x.inputs, order=order)
    assert out.logprobs.isnan().tolist() == [[True, True, False], [False] * 3]
    grads = ranking_logprobs_backward(
        upstream_of(results(out)),
        out,
        *x.inputs,
        [True] * 3,
        weight_mode=mode,
        into=tuple(y[2:22] for y in whole) if mode == "accumulate" else (None, None),
        order=order,
    )
    assert grads[0].isnan().all(-1).tolist() == out.logprobs.isnan().tolist()
    for y in whole:
        assert (y[[0, 1, 22, 23]] == 0).all()
        assert (mode == "accumulate") == bool(y.any())


@pytest.mark.parametrize("size", [20, 70])
def test_only_what_is_asked_for_is_computed(size, device, monkeypatch):
    x = make(1, 2, 6, size, 24, 30, device=device)
    out = ranking_logprobs_forward(*x.inputs)
    upstream = upstream_of(results(out))
    whole = ranking_logprobs_backward(upstream, out, *x.inputs, [True] * 3)
    launched = []
    launch = kernels.launch

    def counted(kernel, *arguments, **named):
        launched.append(kernel.__name__.removeprefix("ranking_logprobs_").removesuffix("_kernel"))
        launch(kernel, *arguments, **named)

    monkeypatch.setattr(kernels, "launch", counted)
    apart = ["hidden_grad"] if size > 64 else []  # up to a tile of candidates it comes with dlogits
    for wanted, expected in (
        ([False] * 3, []),
        ([True, False, False], ["dlogits", *apart]),
        ([False, True, False], ["dlogits", "weight_grad"]),
        ([False, False, True], ["dlogits", "weight_grad"]),
    ):
        launched.clear()
        found = ranking_logprobs_backward(upstream, out, *x.inputs, wanted)
        assert launched == expected
        for have, want, asked in zip(found, whole, wanted, strict=True):
            assert (have is not None) == asked
            if asked:
                torch.testing.assert_close(have, want)


@pytest.mark.parametrize("order", ["canonical", "chosen"])
def test_peaked_logits_and_a_vocabulary_of_no_tile(order, device):
    """One logit at +80 and the rest at -80, where a padded lane with logit 0 would outweigh all candidates but one."""
    hidden = torch.ones(1, 3, 1, device=device)
    weight = torch.tensor([[-80.0], [80.0], [-80.0], [-79.0], [-80.0]], device=device)
    candidates = torch.tensor([[4, 1, 3]], device=device)
    position = torch.tensor([[1, 0, 2]], device=device)
    values = torch.ones(1, 3, 1, device=device)
    out = ranking_logprobs_forward(hidden, weight, None, candidates, position, values, 1.0, order=order)
    log_z = math.log1p(math.e)
    torch.testing.assert_close(out.logprobs[0].cpu(), torch.tensor([0.0, -log_z, 0.0]))
    assert (out.logprobs <= 0).all()
    assert out.entropy[0, 0] == 0
    assert out.entropy[0, 2] == 0
    torch.testing.assert_close(out.expectations, torch.ones(1, 3, 1, device=device))


def test_kl_is_zero_where_the_reference_is_the_policy(device):
    x = make(2, 2, 6, 40, 24, 50, dtype=torch.bfloat16, device=device)
    out = ranking_logprobs_forward(*x.inputs, reference=(x.hidden, x.weight, x.bias))
    assert (out.kl == 0).all()


@pytest.mark.parametrize("order", ["canonical", "chosen"])
def test_impossible_tokens(order, device):
    x = make(1, 2, 4, 4, 8, 4, device=device)
    x.candidates[0] = torch.arange(4)
    x.position = torch.tensor([[0, 2, 1, 3], [3, 1, 0, 2]], device=device)
    x.bias[[1, 3]] = -math.inf  # the last two ranks of ranking 0 have nothing else left
    x.ref_bias[0] = -math.inf
    reference = x.reference("hidden")
    out = ranking_logprobs_forward(*x.inputs, reference=reference, order=order)
    torch.testing.assert_close(out.logprobs[0, 2:].cpu(), torch.tensor([-math.log(2), 0.0]))
    assert out.logprobs[1, 1] == -math.inf  # token 1 while token 0 remains
    assert out.logprobs.isfinite().sum() == 7 - int((out.logprobs[1, 2:] == -math.inf).sum())
    # The policy allows token 0, the reference does not: infinite while it remains and something else is allowed there.
    assert out.kl[0, 0] == math.inf
    assert out.kl[0, 1:].isfinite().all()
    upstream = tuple(torch.ones_like(y) for y in results(out))
    grads = ranking_logprobs_backward(upstream, out, *x.inputs, [True] * 3, reference=reference, order=order)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[2][[1, 3]] == 0).all()
    assert (grads[0][0, 2:] == 0).all()


def test_saved_logits_may_be_in_a_tensor_without_entries(device):
    x = make(1, 2, 5, 7, 8, 9, device=device)
    out = ranking_logprobs_forward(*x.inputs, save_logits=False)
    upstream = upstream_of(results(out))
    nothing = torch.zeros(0, device=device)
    saved = kernels.Forward(*(nothing if y is None else y for y in out))
    want = ranking_logprobs_backward(upstream, out, *x.inputs, [True] * 3)
    torch.testing.assert_close(ranking_logprobs_backward(upstream, saved, *x.inputs, [True] * 3), want)


@pytest.mark.parametrize(("n", "t"), [(0, 3), (2, 0)])
def test_nothing_to_rank(n, t, device):
    x = make(2, 1, 3, 5, 4, 6, device=device)
    x.hidden, x.position, x.values = x.hidden[:n, :t], x.position[:n], x.values[:n]
    x.candidates = x.candidates[:n]
    out = ranking_logprobs_forward(*x.inputs, reference=(x.hidden, x.weight, None))
    assert [y.shape for y in results(out)] == [(n, t), (n, t), (n, t, 2), (n, t)]
    for mode, rows in (("dense", 6), ("rows", n * 5)):
        grads = ranking_logprobs_backward(
            tuple(results(out)),
            out,
            *x.inputs,
            [True] * 3,
            weight_mode=mode,
            reference=(x.hidden, x.weight, None),
        )
        assert [g.shape for g in grads] == [(n, t, 4), (rows, 4), (rows,)]
        assert all((g == 0).all() for g in grads)


def test_a_weight_of_more_than_2_to_the_31_entries(tmp_path, device):
    """Token times width needs 64 bits. The file is sparse: only what is touched takes room."""
    if device.type != "cpu":
        pytest.skip("on a GPU it would take 4 GB")
    vocabulary, width = 2**27 + 8, 16
    name = str(tmp_path / "weight")
    weight = torch.from_file(name, shared=True, size=vocabulary * width, dtype=torch.bfloat16).view(vocabulary, width)
    near = make(1, 1, 3, 5, width, 9, dtype=torch.bfloat16)
    near.bias = None
    weight[-9:] = near.weight
    far = replace(near, weight=weight, candidates=near.candidates + vocabulary - 9)
    found = []
    for x in (near, far):
        out = ranking_logprobs_forward(*x.inputs)
        upstream = upstream_of(results(out))
        grads = ranking_logprobs_backward(upstream, out, *x.inputs, [True, True, False], weight_mode="rows")
        found.append((out.logprobs, *grads[:2]))
    for close, distant in zip(*found, strict=True):
        assert torch.equal(close, distant)


def test_wrong_modes_are_said(device):
    x = make(1, 2, 3, 4, 5, 6, device=device)
    out = ranking_logprobs_forward(*x.inputs)
    arguments = upstream_of(results(out)), out, *x.inputs, [True] * 3
    with pytest.raises(ValueError, match="weight_mode must be one of dense, rows, accumulate, got 'sparse'"):
        ranking_logprobs_backward(*arguments, weight_mode="sparse")
    with pytest.raises(ValueError, match=r"needs into\[weight\] \(6, 5\) on .*, got None"):
        ranking_logprobs_backward(*arguments, weight_mode="accumulate")
    into = torch.zeros(6, 5, device=device), torch.zeros(5, device=device)
    with pytest.raises(ValueError, match=r"needs into\[bias\] \(6,\) on .*, got \(5,\)"):
        ranking_logprobs_backward(*arguments, weight_mode="accumulate", into=into)
    into = torch.zeros(5, 6, device=device).t(), torch.zeros(6, device=device)
    with pytest.raises(ValueError, match="must be a contiguous floating tensor"):
        ranking_logprobs_backward(*arguments, weight_mode="accumulate", into=into)
    with pytest.raises(ValueError, match="needs order='canonical' where rankings share a list"):
        ranking_logprobs_backward(*arguments, weight_mode="rows", order="chosen")
    with pytest.raises(ValueError, match="order must be one of canonical, chosen, got 'random'"):
        ranking_logprobs_forward(*x.inputs, order="random")
