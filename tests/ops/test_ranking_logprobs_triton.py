"""The Triton kernels of ranking_logprobs against the torch reference: interpreted, or on the GPU where there is one."""

import math

import pytest
import torch

from flexrec.ops.ranking_logprobs import ranking_logprobs

# Tiles are 16 to 64 wide: sizes just below, at and above their edges, one of everything, and more than one tile of all.
SHAPES = [
    {"lists": 1, "group": 1, "steps": 1, "size": 1, "dim": 1, "vocab": 1, "channels": 1},
    {"lists": 2, "group": 1, "steps": 16, "size": 16, "dim": 16, "vocab": 50, "channels": 0, "bias": False},
    {"lists": 3, "group": 2, "steps": 5, "size": 7, "dim": 5, "vocab": 4, "channels": 2},
    {"lists": 2, "group": 3, "steps": 11, "size": 17, "dim": 63, "vocab": 60, "channels": 3, "ragged": "list"},
    {"lists": 1, "group": 2, "steps": 20, "size": 65, "dim": 65, "vocab": 99, "channels": 1, "ragged": "ranking"},
    {"lists": 1, "group": 1, "steps": 3, "size": 130, "dim": 128, "vocab": 200, "channels": 5, "temperature": 2.0},
]


def outputs_and_grads(case, backend, weighted_sum):
    out = ranking_logprobs(*case.positional, values=case.values, backend=backend, **case.options)
    return out, torch.autograd.grad(weighted_sum(*out), case.leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"K{s['size']}D{s['dim']}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_reference(shape, dtype, ranked_case, weighted_sum, device):
    case = ranked_case(1, **shape, dtype=dtype).to(dtype, device)
    got, got_grads = outputs_and_grads(case, "triton", weighted_sum)
    want, want_grads = outputs_and_grads(case.to(torch.float64), "torch", weighted_sum)
    # Products of half-precision numbers are exact in float32: the outputs are good to its rounding in every dtype.
    for g, w in zip(got, want, strict=True):
        if g is not None:
            assert g.dtype == torch.float32
            torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=2e-5)
    # In half precision the slopes of the logits are rounded before they are multiplied, and so is the result.
    eps = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for g, w in zip(got_grads, want_grads, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), w, rtol=eps, atol=2e-5 + eps * float(w.abs().max()))


def test_error_is_at_most_twice_that_of_torch(ranked_case, weighted_sum, device):
    case = ranked_case(2, lists=2, group=2, steps=9, size=20, dim=70, dtype=torch.float32).to(torch.float32, device)
    exact = case.to(torch.float64)
    want, want_grads = outputs_and_grads(exact, "torch", weighted_sum)
    theirs, their_grads = outputs_and_grads(case.to(torch.float32), "torch", weighted_sum)
    ours, our_grads = outputs_and_grads(case, "triton", weighted_sum)
    for w, o, t in zip((*want, *want_grads), (*ours, *our_grads), (*theirs, *their_grads), strict=True):
        allowed = 2 * (t - w).abs().max() + 2 * torch.finfo(torch.float32).eps * w.abs().max()
        assert (o - w).abs().max() <= allowed


def test_padding_may_hold_anything(ranked_case, weighted_sum, device):
    case = ranked_case(3, lists=2, group=2, steps=6, size=9, ragged="list", dtype=torch.float32)
    case.lengths = torch.tensor([4, 9])
    for n in range(4):
        case.ranking[n] = torch.randperm(case.length(n))[:6] if case.length(n) >= 6 else torch.arange(6)
    case = case.to(torch.float32, device)
    want, want_grads = outputs_and_grads(case, "torch", weighted_sum)
    poisoned = case.to(torch.float32)
    with torch.no_grad():
        poisoned.hidden[:2, 4:] = math.nan
        poisoned.values[:2, 4:] = math.nan
        poisoned.candidates[0, 4:] = -1
        poisoned.ranking[:2, 4:] = -1
    got, got_grads = outputs_and_grads(poisoned, "triton", weighted_sum)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grads, want_grads)
    assert (got.logprobs[:2, 4:] == 0).all()
    assert (got_grads[0][:2, 4:] == 0).all()


def test_peaked_logits_leave_no_phantom_mass(device):
    """All logits far below 0, and fewer candidates than a tile: a padded lane with logit 0 would take all the mass."""
    hidden = torch.ones(1, 3, 1, device=device)
    weight = torch.tensor([[-80.0], [-160.0], [-81.0]], device=device)
    lists = torch.tensor([[0, 1, 2]], device=device), torch.tensor([[1, 0, 2]], device=device)
    out = ranking_logprobs(hidden, weight, *lists, backend="triton")
    log_z = math.log1p(math.exp(-1))
    torch.testing.assert_close(out.logprobs[0].cpu(), torch.tensor([-80 - log_z, -log_z, 0.0]))
    assert out.logprobs[0, 2] == 0
    assert out.entropy[0, 2] == 0


def test_impossible_tokens(ranked_case, weighted_sum, device):
    case = ranked_case(4, lists=1, group=2, steps=5, size=5, vocab=5, dtype=torch.float32)
    case.candidates = torch.tensor([[0, 1, 2, 3, 4]])
    case.ranking = torch.tensor([[0, 2, 4, 1, 3], [4, 2, 0, 3, 1]])
    with torch.no_grad():
        case.bias[[1, 3]] = -math.inf
    case = case.to(torch.float32, device)
    got, got_grads = outputs_and_grads(case, "triton", weighted_sum)
    want, want_grads = outputs_and_grads(case, "torch", weighted_sum)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grads, want_grads)
    torch.testing.assert_close(got.logprobs[:, 3].cpu(), torch.full((2,), -math.log(2)))
    assert all(g.isfinite().all() for g in got_grads)
    case.ranking[0] = torch.tensor([1, 0, 2, 3, 4])
    assert ranking_logprobs(*case.positional, backend="triton", **case.options).logprobs[0, 0] == -math.inf


def test_a_nan_shows(ranked_case, device):
    case = ranked_case(5, dtype=torch.float32).to(torch.float32, device)
    with torch.no_grad():
        case.hidden[0, 1] = math.nan
    out = ranking_logprobs(*case.positional, backend="triton", **case.options)
    assert out.logprobs.isnan().nonzero().tolist() == [[0, 1]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in the interpreter
@pytest.mark.parametrize(("where", "bad"), [("hidden", math.nan), ("hidden", math.inf), ("weight", math.nan)])
@pytest.mark.parametrize("size", [5, 70])
def test_what_is_no_number_shows_in_every_gradient(size, where, bad, ranked_case, weighted_sum, device):
    """A guard on the norm of gradients must see it: where the log-prob of a step is NaN, so is all that it gives."""
    case = ranked_case(5, lists=2, group=2, steps=4, size=size, vocab=90, dtype=torch.float32).to(torch.float32, device)
    with torch.no_grad():
        getattr(case, where)[(1, 2, 0) if where == "hidden" else (case.candidates[0, 3], 0)] = bad
    got, (of_hidden, of_weight, of_bias) = outputs_and_grads(case, "triton", weighted_sum)
    wrong = got.logprobs.isnan()
    assert wrong[1, 2]
    assert not wrong.all()
    assert of_hidden[wrong].isnan().all()
    for n, t, remaining in case.steps():
        if wrong[n, t]:  # (an infinite hidden state makes some of them impossible, which get no gradient)
            tokens = case.candidates[n // 2, remaining]
            found = of_weight[tokens].isnan().all(1), of_bias[tokens].isnan()
            assert all(x.any() if math.isinf(bad) else x.all() for x in found)
    if where == "hidden":  # nobody else has read it
        assert of_hidden[~wrong].isfinite().all()


def test_operands_need_not_be_contiguous_nor_of_one_dtype(ranked_case, weighted_sum, device):
    case = ranked_case(6, dtype=torch.float32).to(torch.float32, device)
    want, want_grads = outputs_and_grads(case, "torch", weighted_sum)
    strided = case.to(torch.float32)
    strided.hidden = torch.stack([case.hidden.detach()] * 2, -1)[..., 0].requires_grad_()
    strided.weight = case.weight.detach().t().contiguous().t().requires_grad_()
    got, got_grads = outputs_and_grads(strided, "triton", weighted_sum)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grads, want_grads)
    mixed = case.to(torch.float32)
    mixed.hidden = case.hidden.detach().bfloat16().requires_grad_()
    rounded = case.to(torch.float32)
    rounded.hidden = mixed.hidden.detach().float().requires_grad_()
    torch.testing.assert_close(
        outputs_and_grads(mixed, "triton", weighted_sum)[0], outputs_and_grads(rounded, "torch", weighted_sum)[0]
    )


def test_only_requested_gradients_are_computed(ranked_case, device):
    for wanted in range(3):
        case = ranked_case(7, dtype=torch.float32).to(torch.float32, device)
        for i, leaf in enumerate(case.leaves):
            leaf.requires_grad_(i == wanted)
        out = ranking_logprobs(*case.positional, backend="triton", **case.options)
        (grad,) = torch.autograd.grad(out.logprobs.sum(), case.leaves[wanted])
        reference = ranking_logprobs(*case.positional, backend="torch", **case.options)
        torch.testing.assert_close(grad, torch.autograd.grad(reference.logprobs.sum(), case.leaves[wanted])[0])


def test_what_it_cannot_do_is_said(ranked_case, monkeypatch):
    case = ranked_case(8)
    with pytest.raises(TypeError, match="float64"):
        ranking_logprobs(*case.positional, backend="triton", **case.options)
    monkeypatch.setattr("flexrec.ops.library.triton_interprets", lambda: False)
    case = case.to(torch.float32)
    with pytest.raises(ValueError, match="needs a GPU, or TRITON_INTERPRET=1"):
        ranking_logprobs(*case.positional, backend="triton", **case.options)
