"""The Triton kernels of restricted_logprobs against the torch reference: interpreted, or on a GPU if there is one."""

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from flexrec.ops.restricted_logprobs import restricted_kl, restricted_logprobs, restricted_logprobs_with_kl

pytest.importorskip("triton")
from flexrec.triton_kernels import restricted_logprobs as kernels
from flexrec.triton_kernels import restricted_softmax, segment_sum


@dataclass
class Case:
    """Arguments of restricted_logprobs_with_kl."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    offsets: Tensor
    targets: Tensor
    values: Tensor | None
    ref_logits: Tensor | None
    temperature: float = 0.7

    def to(self, dtype, device=None):
        """Copies whose floating operands are fresh leaves; the reference's logits keep their dtype."""
        moved = {}
        for field in fields(self):
            x = getattr(self, field.name)
            if isinstance(x, Tensor):
                x = x.detach().to(device, copy=True)
                if field.name in ("hidden", "weight", "bias", "values"):
                    x = x.to(dtype)
                if field.name in ("hidden", "weight", "bias"):
                    x.requires_grad_()
            moved[field.name] = x
        return Case(**moved)

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def run(self, backend, **options):
        positional = self.hidden, self.weight, self.ids, self.offsets, self.targets
        options |= {"values": self.values, "bias": self.bias, "temperature": self.temperature, "backend": backend}
        if self.ref_logits is None:
            return restricted_logprobs(*positional, **options)
        return restricted_logprobs_with_kl(*positional, ref_logits=self.ref_logits, **options)


def make_case(seed, counts, *, dim=24, vocab=90, channels=2, bias=True, reference=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    sets = [torch.randperm(vocab, generator=generator)[:count] for count in counts]
    ids, nnz = torch.cat(sets), sum(counts)
    return Case(
        hidden=normal(len(counts), dim),
        weight=normal(vocab, dim),
        bias=normal(vocab) if bias else None,
        ids=ids,
        offsets=torch.tensor([0, *counts]).cumsum(0),
        targets=torch.stack([s[torch.randint(len(s), (), generator=generator)] for s in sets]),
        values=normal(nnz, channels) if channels else None,
        ref_logits=normal(nnz).float() if reference else None,
    )


def results(case, backend, weighted_sum, **options):
    """Outputs and gradients, all of them."""
    out = case.run(backend, **options)
    return *(x for x in out if x is not None), *torch.autograd.grad(weighted_sum(*out), case.leaves)


@pytest.fixture
def small_tiles(monkeypatch):
    """Pieces and long rows at sizes that a test can afford: what takes 1,024 entries, from 16 on."""
    monkeypatch.setattr(segment_sum, "PIECE", 16)
    monkeypatch.setattr(segment_sum, "JOIN", (4, 16))
    monkeypatch.setattr(restricted_softmax, "TILE", (4, 16))
    monkeypatch.setattr(restricted_softmax, "LONG", 20)
    monkeypatch.setattr(restricted_softmax, "LONG_TILE", (1, 32))


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is not initialised holds NaN: whatever is read before it is written shows."""
    fill = {"empty": torch.empty, "empty_like": torch.empty_like}

    def poison(create):
        def created(*args, **kwargs):
            x = create(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return created

    for name, create in fill.items():
        monkeypatch.setattr(torch, name, poison(create))


# Rows below, at and above the width of a tile and of a piece; a vocabulary and a D that no tile divides; one of all.
SHAPES = {
    "one": {"counts": [1], "dim": 1, "vocab": 1, "channels": 1},
    "forced": {"counts": [1, 1, 1, 2], "dim": 5, "vocab": 3, "channels": 0},
    "ragged": {"counts": [1, 3, 16, 40, 1, 17, 15, 64, 7, 33], "dim": 72, "channels": 2},
    "plain": {"counts": [5, 32, 1, 80], "dim": 40, "channels": 0, "bias": False, "reference": False},
    "all": {"counts": [50, 50], "dim": 300, "vocab": 50, "channels": 1},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(name, dtype, weighted_sum, device, small_tiles, poisoned):
    case = make_case(1, **SHAPES[name], dtype=dtype).to(dtype, device)
    exact = results(case.to(torch.float64), "torch", weighted_sum)
    theirs = results(case.to(dtype), "torch", weighted_sum)
    ours = results(case, "triton", weighted_sum)
    for want, our, their in zip(exact, ours, theirs, strict=True):
        assert our.dtype == their.dtype
        allowed = 2 * (their - want).abs().max() + torch.finfo(torch.float32).eps * (4 + 4 * want.abs().max())
        if kernels.INTERPRETED and our.dtype == torch.bfloat16:  # the interpreter cuts off what a GPU rounds
            allowed = allowed + torch.finfo(torch.bfloat16).eps * want.abs()
        assert ((our - want).abs() <= allowed).all()


@pytest.mark.parametrize("into", [None, torch.float32, torch.bfloat16], ids=str)
def test_ways_to_sum_up_the_weights_gradient(into, weighted_sum, device, small_tiles, monkeypatch):
    """Atomic additions and sorted sums, dense, as rows, and added to what is there."""
    case = make_case(2, [3, 40, 1, 17, 34], vocab=40).to(torch.float32, device)
    want = torch.autograd.grad(weighted_sum(*case.run("torch")), case.weight)[0]
    for scatters in (True, False):
        monkeypatch.setattr(kernels, "_scatters", lambda nnz, hidden, out, fresh, scatters=scatters: scatters)
        if into is None:
            torch.testing.assert_close(torch.autograd.grad(weighted_sum(*case.run("triton")), case.weight)[0], want)
            (rows,) = torch.autograd.grad(weighted_sum(*case.run("triton", weight_grad="rows")), case.weight)
            assert rows.is_sparse
            assert rows._nnz() == len(case.ids.unique())
            torch.testing.assert_close(rows.to_dense(), want)
        elif into == torch.float32 or not scatters:
            accumulating = case.to(torch.float32)
            accumulating.weight.main_grad = torch.ones_like(case.weight, dtype=into)
            weighted_sum(*accumulating.run("triton", weight_grad="accumulate")).backward()
            assert accumulating.weight.grad is None
            tolerance = 2 * torch.finfo(into).eps
            torch.testing.assert_close(accumulating.weight.main_grad.float(), 1 + want, rtol=tolerance, atol=1e-5)


def test_gradients_repeat_bit_by_bit_where_that_is_asked_for(weighted_sum, device, small_tiles, monkeypatch):
    case = make_case(3, [3, 1, 17, 33], vocab=33).to(torch.float32, device)
    torch.use_deterministic_algorithms(True)
    try:
        monkeypatch.setattr(kernels, "scatter_add", lambda *_: pytest.fail("order of atomic additions is not fixed"))
        first, second = (results(case, "triton", weighted_sum) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_choice_between_additions_and_sums():
    """By bytes: a few entries are not worth a sort; many are, and so is a half-precision gradient of a vocabulary."""
    few, many, d = 1_000, 1_000_000, 2_048
    hidden = torch.empty(1, d, device="meta", dtype=torch.bfloat16)
    small, large = (torch.empty(v, d, device="meta", dtype=torch.bfloat16) for v in (5_000, 151_936))
    assert kernels._scatters(few, hidden, small.float(), fresh=True)
    assert not kernels._scatters(many, hidden, small.float(), fresh=True)
    assert not kernels._scatters(few, hidden, large, fresh=True)
    assert kernels._scatters(few, hidden, large.float(), fresh=False)
    assert not kernels._scatters(few, hidden, large, fresh=False)  # there are no additions in bfloat16 everywhere


def test_peaked_logits_leave_no_phantom_mass(device):
    """All logits far below 0 and fewer entries than a tile: a padded lane with logit 0 would take all the mass."""
    hidden = torch.ones(4, 1, device=device)
    weight = torch.tensor([[-80.0], [-160.0], [-81.0], [80.0]], device=device)
    ids, offsets = torch.tensor([0, 1, 2, 1, 2, 1, 3, 1, 2]), torch.tensor([0, 3, 5, 6, 9])
    out = restricted_logprobs(
        hidden, weight, ids.to(device), offsets.to(device), torch.tensor([0, 1, 1, 3], device=device), backend="triton"
    )
    log_z = math.log1p(math.exp(-1))
    torch.testing.assert_close(out.logprobs.cpu(), torch.tensor([-log_z, -79.0, 0.0, 0.0]))
    assert (out.logprobs <= 0).all()
    assert out.entropy[2] == 0
    assert (out.entropy >= 0).all()


def test_impossible_tokens(weighted_sum, device):
    case = make_case(4, [4, 5, 3, 2, 1], vocab=5)
    case.bias[[1, 3]] = -math.inf
    case.ids[-3:] = torch.tensor([1, 3, 3])  # the last rows have nothing else
    case.targets[-2:] = torch.tensor([3, 3])
    case = case.to(torch.float32, device)
    got, want = results(case, "triton", weighted_sum), results(case, "torch", weighted_sum)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got[0][3:].cpu(), torch.tensor([-math.log(2), 0.0]))
    assert (got[-3][3:] == 0).all()  # the gradient of their hidden states


def test_kl_of_equal_and_of_unreachable_policies(device):
    case = make_case(5, [4, 30, 1, 6]).to(torch.float32, device)
    sets = case.ids, case.offsets
    same = restricted_kl(case.hidden, case.weight, case.hidden, case.weight, *sets, backend="triton")
    assert (same == 0).all()
    blocked = torch.zeros(len(case.weight), device=device)
    blocked[case.ids[0]] = -math.inf
    kl = restricted_kl(case.hidden, case.weight, case.hidden, case.weight, *sets, ref_bias=blocked, backend="triton")
    holds = [bool((case.ids[a:b] == case.ids[0]).any()) and b - a > 1 for a, b in case.offsets.unfold(0, 2, 1).tolist()]
    assert kl.isinf().tolist() == holds
    grad = torch.autograd.grad(kl.sum(), case.hidden)[0]
    assert (grad[kl.isinf()] == 0).all()
    assert grad.isfinite().all()


def test_rows_without_a_choice_are_not_read(weighted_sum, device):
    case = make_case(6, [1, 4, 1, 3], vocab=9)
    case.ids = torch.tensor([8, 0, 1, 2, 3, 7, 4, 5, 6])
    case.targets = torch.tensor([8, 2, 7, 4])
    case.hidden[[0, 2]] = math.nan
    case.weight[[7, 8]] = math.nan
    case.bias[[7, 8]] = math.nan
    case = case.to(torch.float32, device)
    options = {"temperature": 0.7, "backend": "triton"}
    out = restricted_logprobs(case.hidden, case.weight, case.ids, case.offsets, case.targets, **options)
    assert (out.logprobs[[0, 2]] == 0).all()
    assert (out.entropy[[0, 2]] == 0).all()
    grads = torch.autograd.grad(weighted_sum(*out), (case.hidden, case.weight))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][[0, 2]] == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in the interpreter
@pytest.mark.parametrize(("where", "bad"), [("hidden", math.nan), ("hidden", math.inf), ("weight", math.nan)])
def test_what_is_no_number_shows_in_every_gradient(where, bad, weighted_sum, device, small_tiles):
    """A guard on the norm of gradients must see it: where the log-prob of a row is NaN, so is all that it gives."""
    case = make_case(10, [4, 1, 30, 3]).to(torch.float32, device)
    with torch.no_grad():
        getattr(case, where)[2 if where == "hidden" else case.ids[7], 0] = bad
    logprobs, *_, of_hidden, of_weight, of_bias = results(case, "triton", weighted_sum)
    wrong = logprobs.isnan()
    assert wrong[2]
    assert of_hidden[wrong].isnan().all()
    for row in wrong.nonzero().flatten().tolist():  # (an infinite hidden state makes some tokens impossible)
        tokens = case.ids[case.offsets[row] : case.offsets[row + 1]]
        found = of_weight[tokens].isnan().all(1), of_bias[tokens].isnan()
        assert all(x.any() if math.isinf(bad) else x.all() for x in found)
    assert of_hidden[~wrong].isfinite().all()


def test_long_rows_do_not_wait_for_each_other(device, small_tiles, monkeypatch):
    """Each has a program of its own, found by the host's bound alone: one for every LONG entries."""
    programs = []
    launch = restricted_softmax.launch

    def counted(kernel, grid, *arguments, **named):
        programs.append((grid[0], named.get("TAKES_LONG")))
        launch(kernel, grid, *arguments, **named)

    monkeypatch.setattr(restricted_softmax, "launch", counted)
    counts = [25, 21, 3, 80, 1, 20, 41, 22, 64, 1, 21]
    case = make_case(11, counts, reference=False).to(torch.float32, device)
    got, want = case.run("triton"), case.run("torch")
    torch.testing.assert_close(got, want)
    assert programs == [(3, False), ((sum(counts) - 1) // 20, True)]
    programs.clear()
    case = make_case(12, [7, 9], reference=False).to(torch.float32, device)
    case.run("triton")
    assert programs == [(1, False)]  # no row can be long


def test_rows_without_tokens_and_no_rows(device):
    hidden, weight = torch.zeros(2, 3, device=device, requires_grad=True), torch.zeros(5, 3, device=device)
    ids, offsets = torch.tensor([4, 2], device=device), torch.tensor([0, 0, 2], device=device)
    kl = restricted_kl(hidden, weight, hidden, weight, ids, offsets, backend="triton")
    assert kl.tolist() == [0, 0]
    assert torch.autograd.grad(kl.sum(), hidden)[0].tolist() == [[0] * 3] * 2
    out = restricted_logprobs(hidden[:0], weight, ids[:0], offsets[:1], ids[:0], backend="triton")
    assert out.logprobs.shape == out.entropy.shape == (0,)
    assert torch.autograd.grad(out.logprobs.sum(), hidden)[0].tolist() == [[0] * 3] * 2


def test_operands_need_not_be_contiguous_nor_of_one_dtype(weighted_sum, device):
    case = make_case(7, [3, 20, 1, 5]).to(torch.float32, device)
    want = results(case, "torch", weighted_sum)
    strided = replace(
        case,
        hidden=torch.stack([case.hidden.detach()] * 2, -1)[..., 0].requires_grad_(),
        weight=case.weight.detach().t().contiguous().t().requires_grad_(),
        offsets=case.offsets.int(),
        ids=torch.stack([case.ids] * 2, -1)[:, 0],
    )
    torch.testing.assert_close(results(strided, "triton", weighted_sum), want)
    mixed = replace(case, hidden=case.hidden.detach().bfloat16().requires_grad_())
    rounded = replace(case, hidden=mixed.hidden.detach().float().requires_grad_())
    torch.testing.assert_close(mixed.run("triton"), rounded.run("torch"))


def test_a_missing_target_is_no_number_where_nobody_checks(device, monkeypatch):
    monkeypatch.setattr("flexrec.ops.restricted_logprobs.values_are_checked", lambda tensor: False)
    case = make_case(8, [2, 3], vocab=6).to(torch.float32, device)
    case.targets[1] = next(token for token in range(6) if token not in case.ids[2:])
    assert case.run("triton").logprobs.isnan().tolist() == [False, True]


def test_tokens_out_of_range_are_neither_read_nor_written(weighted_sum, device, small_tiles, monkeypatch):
    """Where value checks are off: NaN for their rows, and what lies beside the buffers stays as it was."""
    monkeypatch.setattr("flexrec.ops.restricted_logprobs.values_are_checked", lambda tensor: False)
    case = make_case(13, [4, 20, 3], vocab=30).to(torch.float32, device)
    whole = torch.zeros(34, case.weight.shape[1], device=device)  # two rows too many on either side
    case.ids[1], case.ids[25] = -1, 30
    for scatters in (True, False):
        monkeypatch.setattr(kernels, "_scatters", lambda nnz, hidden, out, fresh, scatters=scatters: scatters)
        accumulating = case.to(torch.float32)
        whole.zero_()
        accumulating.weight.main_grad = whole[2:32]
        out = accumulating.run("triton", weight_grad="accumulate")
        assert out.logprobs.isnan().tolist() == [True, False, True]
        kernels.weight_gradient(
            torch.ones(len(case.ids), device=device),
            case.hidden.detach(),
            case.weight.detach(),
            case.ids,
            kernels.owners(case.offsets, len(case.ids)),
            whole[2:32],
        )
        assert (whole[[0, 1, 32, 33]] == 0).all()
        assert whole[2:32].any()
        assert whole.isfinite().all()


def test_what_it_cannot_do_is_said(monkeypatch):
    case = make_case(9, [2, 3])
    with pytest.raises(TypeError, match="float64"):
        case.to(torch.float64).run("triton")
    monkeypatch.setattr("flexrec.ops.library.triton_interprets", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU, or TRITON_INTERPRET=1"):
        case.run("triton")
