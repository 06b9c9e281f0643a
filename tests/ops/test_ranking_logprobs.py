"""ranking_logprobs, ranking_probs and the divergence against brute force, in every dtype, at every edge."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexrec.ops.ranking_logprobs import ranking_kl, ranking_logprobs, ranking_logprobs_with_kl, ranking_probs

BACKENDS = ["auto", "torch"]


@st.composite
def shapes(draw):
    size = draw(st.integers(1, 9))
    return {
        "lists": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 3)),
        "steps": draw(st.integers(1, size)),
        "size": size,
        "dim": draw(st.integers(1, 5)),
        "vocab": draw(st.sampled_from([1, 3, 20])),  # fewer tokens than candidates: tokens repeat
        "channels": draw(st.integers(0, 3)),
        "bias": draw(st.booleans()),
        "ragged": draw(st.sampled_from(["", "list", "ranking"])),
        "temperature": draw(st.sampled_from([1.0, 0.3, 5])),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=shapes(), seed=st.integers(0, 10**6))
def test_equals_brute_force(backend, ranked_case, weighted_sum, shape, seed):
    case = ranked_case(seed, **shape)
    expected = case.brute_force()
    got = ranking_logprobs(*case.positional, values=case.values, backend=backend, **case.options)
    for want, have in zip(expected, got, strict=True):
        assert (want is None) == (have is None)
        if want is not None:
            assert have.dtype == torch.float64
            torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)
    if not any(True for _ in case.steps()):
        return  # every list is empty: brute force has no graph
    wanted = torch.autograd.grad(weighted_sum(*expected), case.leaves)
    had = torch.autograd.grad(weighted_sum(*got), case.leaves)
    torch.testing.assert_close(had, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("by_logits", [False, True])
@pytest.mark.parametrize("ragged", ["", "list"])
def test_gradcheck(ragged, by_logits, ranked_case):
    """Every output, the divergence among them, in every input that has a gradient."""
    case = ranked_case(1, lists=1, group=2, steps=3, size=4, dim=2, vocab=5, ragged=ragged)
    assert not ragged or 1 < case.length(0) < 4
    other = ranked_case(2, lists=1, group=2, steps=3, size=4, dim=3, vocab=5)
    reference = {"ref_hidden": other.hidden, "ref_weight": other.weight, "ref_bias": other.bias}
    if by_logits:
        reference = {"ref_logits": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))}

    def f(hidden, weight, bias):
        return ranking_logprobs_with_kl(
            hidden,
            weight,
            case.candidates,
            case.ranking,
            values=case.values,
            bias=bias,
            temperature=0.7,
            lengths=case.lengths,
            **reference,
        )

    assert torch.autograd.gradcheck(f, (case.hidden, case.weight, case.bias))


def test_keeps_only_the_logits_for_the_backward_pass(ranked_case):
    """Inputs apart, 4 bytes per step and candidate plus 16 per step: neither gathered rows nor logits over V."""
    case = ranked_case(6, lists=4, group=2, steps=8, size=8, dim=64, vocab=500, channels=0, dtype=torch.float32)
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ranking_logprobs(*case.positional, **case.options)
    for x in (case.hidden, case.weight, case.bias, case.candidates):
        kept.pop(x.data_ptr(), None)
    steps = case.ranking.numel()
    positions = case.hidden.shape[0] * case.candidates.shape[1] * 4
    assert sum(kept.values()) <= steps * case.candidates.shape[1] * 4 + 16 * steps + positions


def naive(case, dtype):
    """Gather and bmm under autograd, everything in one dtype: what anybody would write."""
    case = case.to(dtype)
    rows = case.weight[case.candidates.gather(1, case.ranking)]
    logits = torch.bmm(case.hidden, rows.transpose(1, 2)) / case.temperature
    placed = torch.ones(logits.shape[1:], dtype=torch.bool).tril(-1)
    log_p = logits.masked_fill(placed, -math.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(placed, 0)).sum(-1)
    return case, (log_p.diagonal(dim1=1, dim2=2), entropy, log_p.exp() @ case.values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(backend, dtype, ranked_case, weighted_sum):
    case = ranked_case(7, lists=6, steps=12, size=12, dim=64, vocab=40, bias=False, dtype=dtype)
    exact_case, exact = naive(case, torch.float64)
    exact_grads = torch.autograd.grad(weighted_sum(*exact), exact_case.leaves)
    torch_case, theirs = naive(case, dtype)
    their_grads = torch.autograd.grad(weighted_sum(*theirs), torch_case.leaves)
    ours = ranking_logprobs(*case.positional, values=case.values, backend=backend, **case.options)
    our_grads = torch.autograd.grad(weighted_sum(*ours), case.leaves)
    assert all(x.dtype == torch.float32 for x in ours)
    assert all(x.dtype == dtype for x in our_grads)
    for want, have, their in zip((*exact, *exact_grads), (*ours, *our_grads), (*theirs, *their_grads), strict=True):
        allowed = 2 * (their.double() - want).abs().max() + torch.finfo(torch.float32).eps
        assert (have.double() - want).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend, ranked_case, weighted_sum):
    """Lists of their own size give the same as padded ones whose padding is poisoned, gradients included."""
    case = ranked_case(8, lists=3, group=2, steps=6, size=6, vocab=9)
    case.lengths = torch.tensor([6, 2, 4])
    for n in range(6):
        length = case.length(n)
        case.ranking[n, :length] = torch.randperm(length)
        case.ranking[n, length:] = 99
        with torch.no_grad():
            case.hidden[n, length:] = math.nan
            case.values[n, length:] = math.nan
            case.candidates[n // 2, length:] = -7
    got = ranking_logprobs(*case.positional, values=case.values, backend=backend, **case.options)
    hidden_grad, *_ = torch.autograd.grad(weighted_sum(*got), case.leaves)
    assert all(bool(x.isfinite().all()) for x in got)
    for n in range(6):
        length = case.length(n)
        alone = ranking_logprobs(
            case.hidden[n : n + 1, :length],
            case.weight,
            case.candidates[n // 2 : n // 2 + 1, :length],
            case.ranking[n : n + 1, :length],
            values=case.values[n : n + 1, :length],
            bias=case.bias,
            temperature=case.temperature,
            backend=backend,
        )
        for whole, part in zip(got, alone, strict=True):
            torch.testing.assert_close(whole[n, :length], part[0])
            assert (whole[n, length:] == 0).all()
        assert (hidden_grad[n, length:] == 0).all()
        assert hidden_grad[n, :length].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peaked_logits(backend, dtype):
    """Logits of +80 and -80: no overflow, the tiny probabilities right, the last step exactly certain."""
    hidden = torch.ones(1, 4, 1, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[80.0], [-80.0], [79.0], [-80.0]], dtype=dtype, requires_grad=True)
    candidates, ranking = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 0, 2, 3]])
    logprobs, entropy, _ = ranking_logprobs(hidden, weight, candidates, ranking, backend=backend)
    log_z = math.log1p(math.exp(-1))
    torch.testing.assert_close(logprobs[0], torch.tensor([-160 - log_z, -log_z, 0.0, 0.0], dtype=dtype))
    p = 1 / (1 + math.exp(-1))
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    torch.testing.assert_close(entropy[0], torch.tensor([h, h, 0.0, 0.0], dtype=dtype))
    assert logprobs[0, 3] == 0
    assert entropy[0, 3] == 0
    (grad,) = torch.autograd.grad(logprobs[0, 0], weight)
    torch.testing.assert_close(grad[:, 0], torch.tensor([-p, 1.0, p - 1, 0.0], dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_tokens(backend, dtype):
    """A bias of -inf: probability 0 while anything else remains, uniform among themselves after, no NaN anywhere."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, 3, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 3, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.tensor([0.0, -math.inf, 0.5, -math.inf], dtype=dtype, requires_grad=True)
    candidates, ranking = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 2, 3, 1]])
    out = ranking_logprobs(
        hidden, weight, candidates, ranking, bias=bias, values=torch.ones(1, 4, 1, dtype=dtype), backend=backend
    )
    possible = ranking_logprobs(hidden[:, :2], weight, candidates[:, ::2], torch.tensor([[0, 1]]), bias=bias)
    torch.testing.assert_close(out.logprobs[0, :2], possible.logprobs[0])
    torch.testing.assert_close(out.entropy[0, :2], possible.entropy[0])
    torch.testing.assert_close(out.logprobs[0, 2:], torch.tensor([-math.log(2), 0.0], dtype=dtype))
    torch.testing.assert_close(out.expectations[0, :, 0], torch.ones(4, dtype=dtype))
    grads = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum() * 3, (hidden, weight, bias))
    wanted = torch.autograd.grad(possible.logprobs.sum() + possible.entropy.sum() * 3, (hidden, weight, bias))
    torch.testing.assert_close(grads, wanted)
    chosen_impossible = ranking_logprobs(
        hidden, weight, candidates, torch.tensor([[1, 0, 2, 3]]), bias=bias, backend=backend
    )
    assert chosen_impossible.logprobs[0, 0] == -math.inf
    assert chosen_impossible.entropy[0, 0].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unranked_candidates_follow_in_ascending_order(backend):
    """With T < K positions T.. of `values` belong to the unranked candidates by ascending candidate index."""
    hidden, weight = torch.zeros(1, 2, 1, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64)
    bias = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    candidates, ranking = torch.tensor([[4, 3, 2, 1, 0]]), torch.tensor([[3, 1]])
    order = [3, 1, 0, 2, 4]
    by_position = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0], dtype=torch.float64)
    out = ranking_logprobs(
        hidden, weight, candidates, ranking, bias=bias, values=by_position[None, :, None], backend=backend
    )
    probs = ranking_probs(hidden, weight, candidates, ranking, bias=bias)
    for t in range(2):
        p = bias[candidates[0, order[t:]]].softmax(0)
        torch.testing.assert_close(out.expectations[0, t, 0], p @ by_position[t:])
        torch.testing.assert_close(probs[0, t], torch.cat([torch.zeros(t, dtype=torch.float64), p]))


@pytest.mark.parametrize("ragged", ["", "list", "ranking"])
def test_probs_are_the_distribution_in_rank_order(ragged, ranked_case, weighted_sum):
    case = ranked_case(9, lists=3, group=2, steps=4, size=6, ragged=ragged)
    probs = ranking_probs(*case.positional, **case.options)
    expected = torch.zeros_like(probs)
    for n, t, remaining in case.steps():
        expected[n, t, t : t + len(remaining)] = case.log_probs(n, t, remaining).exp()
    torch.testing.assert_close(probs, expected)
    got = torch.autograd.grad(weighted_sum(probs), case.leaves)
    torch.testing.assert_close(got, torch.autograd.grad(weighted_sum(expected), case.leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_logits", [False, True])
@pytest.mark.parametrize("ragged", ["", "list", "ranking"])
def test_kl_equals_brute_force(ragged, by_logits, backend, ranked_case, weighted_sum):
    case = ranked_case(10, lists=3, group=2, steps=4, size=6, ragged=ragged)
    other = ranked_case(11, lists=3, group=2, steps=4, size=6, dim=3, temperature=case.temperature)
    other.candidates, other.ranking, other.lengths = case.candidates, case.ranking, case.lengths
    reference = {"ref_hidden": other.hidden, "ref_weight": other.weight, "ref_bias": other.bias}
    if by_logits:  # plus a constant per step, which changes nothing
        rows = other.weight[case.candidates].repeat_interleave(2, 0)
        logits = other.hidden @ rows.transpose(1, 2) + other.bias[case.candidates].repeat_interleave(2, 0)[:, None]
        reference = {"ref_logits": logits + torch.arange(24.0).view(6, 4, 1)}
    out = ranking_logprobs_with_kl(*case.positional, values=case.values, backend=backend, **reference, **case.options)
    expected = torch.zeros_like(out.kl)
    for n, t, remaining in case.steps():
        log_p, log_q = case.log_probs(n, t, remaining), other.log_probs(n, t, remaining).detach()
        expected[n, t] = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(out.kl, expected)
    want = case.brute_force()
    torch.testing.assert_close(out[:3], want)
    got = torch.autograd.grad(weighted_sum(*out), [*case.leaves, *other.leaves], allow_unused=True)
    torch.testing.assert_close(got[:3], torch.autograd.grad(weighted_sum(*want, expected), case.leaves))
    assert got[3:] == (None, None, None)
    if not by_logits:
        kl = ranking_kl(
            case.hidden,
            case.weight,
            other.hidden,
            other.weight,
            case.candidates,
            case.ranking,
            ref_bias=other.bias,
            backend=backend,
            **case.options,
        )
        torch.testing.assert_close(kl, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_of_an_unchanged_policy_is_zero_and_of_an_unreachable_choice_infinite(backend, dtype, ranked_case):
    case = ranked_case(12, size=4, steps=4, lists=1, vocab=4, dtype=dtype)
    case.candidates = torch.arange(4)[None]
    policy, reference = (case.hidden, case.weight), (case.hidden.detach(), case.weight.detach())

    def kl_of(bias, ref_bias):
        return ranking_kl(
            *policy, *reference, case.candidates, case.ranking, bias=bias, ref_bias=ref_bias, backend=backend
        )

    assert (kl_of(case.bias, case.bias) == 0).all()
    blocked = case.bias.detach().clone()
    blocked[case.candidates[0, case.ranking[0, 1]]] = -math.inf
    kl = kl_of(case.bias, blocked)
    assert kl.isinf().tolist() == [[True, True, False, False]]
    (grad,) = torch.autograd.grad(kl.sum(), case.hidden)
    assert (grad[0, :2] == 0).all()
    assert grad[0, 2].abs().max() < 1e-6  # p = q
    kl = kl_of(blocked, case.bias)
    assert kl.isfinite().all()
    (grad,) = torch.autograd.grad(kl.sum(), case.hidden)
    assert grad.isfinite().all()
    assert (kl_of(blocked, blocked) == 0).all()


def test_no_rankings_at_all():
    out = ranking_logprobs(torch.zeros(0, 3, 4), torch.zeros(5, 4), torch.zeros(0, 3).long(), torch.zeros(0, 3).long())
    assert out.logprobs.shape == out.entropy.shape == (0, 3)


WRONG = {
    "twice": ({"ranking": [[0, 1, 0], [0, 1, 2]]}, ValueError, "ranking.*at most once; row 0 names candidate 0 twice"),
    "index": ({"ranking": [[0, 1, 2], [0, 1, 3]]}, ValueError, r"ranking.*0 to 2; got 3 at row 1, rank 2"),
    "negative index": ({"ranking": [[0, 1, 2], [-1, 1, 2]]}, ValueError, r"ranking.*got -1 at row 1, rank 0"),
    "beyond the length": ({"lengths": [3, 2], "ranking": [[0, 1, 2], [0, 2, 0]]}, ValueError, "0 to 1; got 2 at row 1"),
    "token": ({"candidates": [[0, 1, 5], [0, 1, 2]]}, ValueError, r"candidates must lie in \[0, 4\], got 5"),
    "longer than the list": ({"candidates": [[0, 1], [1, 2]]}, ValueError, "T=3 ranks of K=2"),
    "no candidates": (
        {"candidates": torch.zeros(2, 0).long(), "ranking": torch.zeros(2, 0).long(), "hidden": torch.zeros(2, 0, 4)},
        ValueError,
        "at least one candidate",
    ),
    "groups": ({"candidates": [[0, 1, 2]] * 3}, ValueError, "N=2 and P=3"),
    "lengths": ({"lengths": [3, 4]}, ValueError, r"lengths must lie in \[0, 3\], got 4"),
    "lengths' shape": ({"lengths": [3, 3, 3]}, ValueError, "lengths must have shape"),
    "ranking's dtype": ({"ranking": torch.zeros(2, 3)}, TypeError, "ranking must have an integer dtype"),
    "weight's shape": ({"weight": torch.zeros(5, 3)}, ValueError, r"weight must have shape \(V, 4\), got \(5, 3\)"),
    "bias's shape": ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\)"),
    "bias NaN": ({"bias": torch.full((5,), math.nan)}, ValueError, "bias must lie in"),
    "values' shape": ({"values": torch.zeros(2, 4, 1)}, ValueError, r"values must have shape \(2, 3, C\)"),
    "values NaN": ({"values": torch.full((2, 3, 1), math.nan)}, ValueError, "values must be finite"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    "temperature's type": ({"temperature": "1"}, TypeError, "temperature must be a number"),
    "no reference": ({"ref_logits": None}, ValueError, "ref_hidden and ref_weight, or ref_logits; got none"),
    "two references": (
        {"ref_logits": torch.zeros(2, 3, 3), "ref_hidden": torch.zeros(2, 3, 4), "ref_weight": torch.zeros(5, 4)},
        ValueError,
        "got ref_hidden and ref_weight and ref_logits",
    ),
    "half a reference": ({"ref_hidden": torch.zeros(2, 3, 4)}, ValueError, "got ref_hidden"),
    "ref_logits' shape": ({"ref_logits": torch.zeros(2, 3, 4)}, ValueError, r"ref_logits must have shape \(2, 3, 3\)"),
    "ref_weight's shape": (
        {"ref_hidden": torch.zeros(2, 3, 2), "ref_weight": torch.zeros(5, 4)},
        ValueError,
        r"ref_weight must have shape \(V, 2\)",
    ),
    "small reference": (
        {"ref_hidden": torch.zeros(2, 3, 2), "ref_weight": torch.zeros(4, 2)},
        ValueError,
        r"ref_weight.* must lie in \[0, 3\], got 4",
    ),
    "weight_grad": ({"weight_grad": "sparse"}, ValueError, "weight_grad must be one of 'dense', 'rows', 'accumulate'"),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of 'auto', 'triton', 'numba', 'torch'; got 'cuda'",
    ),
    "hidden's type": ({"hidden": [[1.0]]}, TypeError, "hidden must be a torch.Tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
    change, error, message = WRONG[name]
    arguments = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(5, 4),
        "candidates": torch.tensor([[0, 1, 2], [2, 3, 4]]),
        "ranking": torch.tensor([[0, 1, 2], [2, 1, 0]]),
    }
    integer = ("ranking", "candidates", "lengths")
    arguments |= {k: torch.tensor(v) if k in integer and isinstance(v, list) else v for k, v in change.items()}
    function = ranking_logprobs_with_kl if any(k.startswith("ref_") for k in change) else ranking_logprobs
    with pytest.raises(error, match=message):
        function(**arguments)
