"""restricted_logprobs and restricted_kl over ragged sets of allowed tokens, against a loop over the rows."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from flexrec.ops.library import kernels
from flexrec.ops.ranking_logprobs import ranking_logprobs
from flexrec.ops.restricted_logprobs import restricted_kl, restricted_logprobs, restricted_logprobs_with_kl

BACKENDS = ["auto", "torch"]
TEMPERATURE = 0.7


def make_sets(seed, counts, dim=4, vocab=12, channels=2, dtype=torch.float64):
    """hidden, weight, ids, offsets, targets, values and bias; one row per entry of `counts`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    sets = [torch.randperm(vocab, generator=generator)[:count] for count in counts]
    ids = torch.cat(sets) if sets else torch.zeros(0, dtype=torch.int64)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    targets = torch.tensor([int(s[torch.randint(len(s), (), generator=generator)]) for s in sets], dtype=torch.int64)
    hidden, weight, bias = (normal(*s).requires_grad_() for s in ((len(counts), dim), (vocab, dim), (vocab,)))
    return hidden, weight, ids, offsets, targets, normal(len(ids), channels), bias


def row_log_probs(hidden, weight, ids, offsets, bias):
    """The log-probabilities of every row's allowed tokens, row by row."""
    for m, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        tokens = ids[start:end]
        yield m, slice(start, end), torch.log_softmax((weight[tokens] @ hidden[m] + bias[tokens]) / TEMPERATURE, 0)


def brute_force(hidden, weight, ids, offsets, targets, values, bias):
    logprobs, entropy, expectations = [], [], []
    for m, entries, log_p in row_log_probs(hidden, weight, ids, offsets, bias):
        logprobs.append(log_p[ids[entries] == targets[m]].sum())
        entropy.append(-(log_p.exp() * log_p).sum())
        expectations.append(log_p.exp() @ values[entries])
    return torch.stack(logprobs), torch.stack(entropy), torch.stack(expectations)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=6), dim=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_equals_brute_force(backend, weighted_sum, counts, dim, seed):
    *arguments, values, bias = make_sets(seed, counts, dim)
    got = restricted_logprobs(*arguments, values=values, bias=bias, temperature=TEMPERATURE, backend=backend)
    want = brute_force(*arguments, values, bias)
    torch.testing.assert_close(tuple(got), want, rtol=1e-10, atol=1e-10)
    leaves = (*arguments[:2], bias)
    torch.testing.assert_close(
        torch.autograd.grad(weighted_sum(*got), leaves),
        torch.autograd.grad(weighted_sum(*want), leaves),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_every_result(backend):
    hidden, weight, ids, offsets, targets, values, bias = make_sets(1, [3, 1, 4], dim=2, vocab=5)
    ref_logits = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def f(hidden, weight, bias):
        return restricted_logprobs_with_kl(
            hidden,
            weight,
            ids,
            offsets,
            targets,
            values=values,
            bias=bias,
            ref_logits=ref_logits,
            temperature=TEMPERATURE,
            backend=backend,
        )

    assert torch.autograd.gradcheck(f, (hidden, weight, bias))


def test_opcheck():
    hidden, weight, ids, offsets, targets, values, bias = make_sets(1, [3, 1, 4], dim=2, vocab=5)
    ref_logits = torch.zeros(8, dtype=torch.float64)
    reference = hidden.detach() + 1, weight.detach(), None, None
    for rest in (
        (targets, values, None, None, None, ref_logits),
        (None, values[:, :0], None, None, None, None),
        (targets, None, *reference),
    ):
        arguments = hidden, weight, bias, ids, offsets, *rest, 1.0, "numba"
        torch.library.opcheck(torch.ops.flexrec.restricted_logprobs.default, arguments)


def test_compiles_to_one_graph_that_serves_every_size(weighted_sum):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(hidden, weight, ids, offsets, targets, values, bias):
        return restricted_logprobs_with_kl(
            hidden, weight, ids, offsets, targets, values=values, bias=bias, ref_hidden=hidden, ref_weight=weight
        )

    for seed, counts in enumerate(([3, 1, 4], [2, 5, 1, 7], [1, 6, 2, 2, 9])):
        arguments = make_sets(seed, counts)
        leaves = arguments[0], arguments[1], arguments[-1]
        hidden, weight, ids, offsets, targets, values, bias = arguments
        want = restricted_logprobs_with_kl(
            hidden, weight, ids, offsets, targets, values=values, bias=bias, ref_hidden=hidden, ref_weight=weight
        )
        got = compiled(*arguments)
        torch.testing.assert_close(tuple(got), tuple(want))
        torch.testing.assert_close(
            torch.autograd.grad(weighted_sum(*got), leaves), torch.autograd.grad(weighted_sum(*want), leaves)
        )
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(dtype, weighted_sum):
    *arguments, values, bias = make_sets(2, [17] * 40, dim=64, vocab=50, dtype=dtype)
    hidden, weight, ids, _, targets = arguments

    def naive(dtype):
        h, w, b = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias))
        rows = ids.view(40, 17)
        logits = (torch.bmm(w[rows], h[:, :, None])[..., 0] + b[rows]) / TEMPERATURE
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        expected = torch.einsum("mk,mkc->mc", log_p.exp(), values.to(dtype).view(40, 17, -1))
        out = log_p[rows == targets[:, None]], entropy, expected
        return *out, *torch.autograd.grad(weighted_sum(*out), (h, w, b))

    out = restricted_logprobs(*arguments, values=values, bias=bias, temperature=TEMPERATURE)
    ours = *out, *torch.autograd.grad(weighted_sum(*out), (hidden, weight, bias))
    assert all(x.dtype == torch.float32 for x in out)
    for want, have, their in zip(naive(torch.float64), ours, naive(dtype), strict=True):
        allowed = 2 * (their.double() - want).abs().max() + torch.finfo(torch.float32).eps * (1 + want.abs().max())
        assert (have.double() - want).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_single_allowed_token_is_certain(backend, dtype):
    *arguments, values, bias = make_sets(3, [1, 4, 1], dtype=dtype)
    out = restricted_logprobs(*arguments, values=values, bias=bias, backend=backend)
    hidden_grad, weight_grad, _ = torch.autograd.grad(
        out.logprobs[[0, 2]].sum() + out.entropy[[0, 2]].sum() + out.expectations[[0, 2]].sum(),
        (*arguments[:2], bias),
    )
    assert out.logprobs[[0, 2]].tolist() == [0, 0]
    assert out.entropy[[0, 2]].tolist() == [0, 0]
    assert (hidden_grad == 0).all()
    assert (weight_grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_peaked_and_impossible_tokens(backend):
    hidden = torch.ones(3, 1, requires_grad=True)
    weight = torch.tensor([[80.0], [-80.0], [79.0], [0.0], [0.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, -math.inf, -math.inf], requires_grad=True)
    ids, offsets = torch.tensor([0, 1, 2, 3, 0, 2, 3, 4]), torch.tensor([0, 3, 6, 8])
    out = restricted_logprobs(hidden, weight, ids, offsets, torch.tensor([1, 3, 4]), bias=bias, backend=backend)
    log_z = math.log1p(math.exp(-1))
    torch.testing.assert_close(out.logprobs, torch.tensor([-160 - log_z, -math.inf, -math.log(2)]))
    p = 1 / (1 + math.exp(-1))
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    torch.testing.assert_close(out.entropy, torch.tensor([h, h, math.log(2)]))
    grads = torch.autograd.grad(out.logprobs[[0, 2]].sum() + out.entropy.sum(), (hidden, weight, bias))
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][2] == 0
    assert grads[2][3:].tolist() == [0, 0]


def test_equals_ranking_logprobs_on_rankings(ranked_case):
    """A ranking of single-token candidates is a batch of allowed sets: the tokens that remain at every step."""
    case = ranked_case(4, lists=3, size=5, steps=5, vocab=30, channels=0)
    case.candidates = torch.stack([torch.randperm(30)[:5] for _ in range(3)])
    ids, offsets, targets = [], [0], []
    for n, _, remaining in case.steps():
        tokens = case.candidates[n, remaining]
        ids.append(tokens)
        offsets.append(offsets[-1] + len(tokens))
        targets.append(int(tokens[0]))
    out = restricted_logprobs(
        case.hidden.flatten(0, 1),
        case.weight,
        torch.cat(ids).int(),
        torch.tensor(offsets),
        torch.tensor(targets),
        bias=case.bias,
        temperature=case.temperature,
    )
    want = ranking_logprobs(*case.positional, **case.options)
    torch.testing.assert_close(out.logprobs, want.logprobs.flatten())
    torch.testing.assert_close(out.entropy, want.entropy.flatten())


def test_only_requested_gradients_are_computed(monkeypatch):
    """What is not asked for is not computed: its function is not even there."""
    for wanted, others in (
        (0, ["weight_gradient"]),
        (1, ["hidden_gradient"]),
        (2, ["weight_gradient", "hidden_gradient"]),
    ):
        arguments = make_sets(5, [3, 2])
        leaves = arguments[0], arguments[1], arguments[-1]
        want = torch.autograd.grad(restricted_logprobs(*arguments[:5], bias=leaves[2]).entropy.sum(), leaves[wanted])
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i == wanted)
        with monkeypatch.context() as patch:
            for name in others:
                patch.delattr(kernels("numba", "restricted_logprobs"), name)
            out = restricted_logprobs(*arguments[:5], bias=leaves[2])
            torch.testing.assert_close(torch.autograd.grad(out.entropy.sum(), leaves[wanted]), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ways_to_deliver_the_weights_gradient(dtype):
    hidden, weight, *arguments, values, bias = make_sets(5, [3, 1, 2, 7], dtype=dtype)

    def total(weight_grad):
        out = restricted_logprobs(hidden, weight, *arguments, values=values, bias=bias, weight_grad=weight_grad)
        return out.logprobs.sum() + out.entropy.sum() + out.expectations.sum()

    (dense,) = torch.autograd.grad(total("dense"), weight)
    (rows,) = torch.autograd.grad(total("rows"), weight)
    assert rows.is_sparse
    assert rows.dtype == dtype
    assert rows._nnz() <= len(set(arguments[0].tolist()))
    torch.testing.assert_close(rows.to_dense(), dense)
    exactness = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps * float(dense.abs().max())}
    for _ in range(2):
        total("accumulate").backward()
    torch.testing.assert_close(weight.grad, 2 * dense, **exactness)
    weight.grad = None
    weight.main_grad = torch.ones(weight.shape, dtype=torch.float32)
    total("accumulate").backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad - 1, dense.float(), rtol=exactness["rtol"], atol=1e-5)
    with pytest.raises(ValueError, match="weight to be a leaf"):
        restricted_logprobs(hidden, weight * 2, *arguments, weight_grad="accumulate")
    with pytest.raises(ValueError, match="weight_grad='rows' is not possible with backend='torch'"):
        restricted_logprobs(hidden, weight, *arguments, weight_grad="rows", backend="torch")


def test_what_is_forced_is_not_read():
    hidden, weight, ids, offsets, targets, *_ = make_sets(5, [1, 3], vocab=4)
    ids = torch.tensor([3, 0, 1, 2])
    targets = torch.tensor([3, 1])
    with torch.no_grad():
        hidden[0] = math.nan
        weight[3] = math.nan
    out = restricted_logprobs(hidden, weight, ids, offsets, targets)
    assert out.logprobs[0] == out.entropy[0] == 0
    grads = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_that_is_not_allowed_is_no_number_where_nobody_checks(backend, monkeypatch):
    hidden, weight, ids, offsets, targets, *_ = make_sets(5, [2, 3], vocab=6)
    monkeypatch.setattr("flexrec.ops.restricted_logprobs.values_are_checked", lambda tensor: False)
    targets[1] = next(token for token in range(6) if token not in ids[2:])
    out = restricted_logprobs(hidden, weight, ids, offsets, targets, backend=backend)
    assert out.logprobs.isnan().tolist() == [False, True]
    assert out.entropy.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_logits_serve_as_reference(backend):
    """Log-probs, or logits up to a constant per row, say the same as the model that they come from."""
    hidden, weight, ids, offsets, targets, values, bias = make_sets(6, [3, 1, 7])
    other = make_sets(7, [3, 1, 7], dim=6)
    options = {"bias": bias, "temperature": TEMPERATURE, "backend": backend}
    want = restricted_logprobs_with_kl(
        hidden, weight, ids, offsets, targets, ref_hidden=other[0], ref_weight=other[1], ref_bias=other[-1], **options
    )
    saved = [log_p for _, _, log_p in row_log_probs(other[0], other[1], ids, offsets, other[-1])]
    for shift in (0.0, 5.0):
        got = restricted_logprobs_with_kl(
            hidden, weight, ids, offsets, targets, ref_logits=torch.cat(saved) + shift, values=values, **options
        )
        torch.testing.assert_close(got.kl, want.kl)
        torch.testing.assert_close(got.logprobs, want.logprobs)
        assert want.expectations is None
        assert got.expectations.shape == (3, 2)
    with pytest.raises(ValueError, match="ref_logits take the place of"):
        restricted_logprobs_with_kl(
            hidden, weight, ids, offsets, targets, ref_logits=torch.cat(saved), ref_hidden=hidden, ref_weight=weight
        )
    with pytest.raises(ValueError, match="a reference is needed"):
        restricted_logprobs_with_kl(hidden, weight, ids, offsets, targets, ref_hidden=hidden)


def test_kl_equals_brute_force(weighted_sum):
    hidden, weight, ids, offsets, _, _, bias = make_sets(6, [3, 1, 7])
    other = make_sets(7, [3, 1, 7], dim=6)
    kl = restricted_kl(
        hidden,
        weight,
        other[0],
        other[1],
        ids,
        offsets,
        bias=bias,
        ref_bias=other[-1],
        temperature=TEMPERATURE,
    )
    want = []
    reference = row_log_probs(other[0], other[1], ids, offsets, other[-1])
    for (_, _, log_p), (_, _, log_q) in zip(row_log_probs(hidden, weight, ids, offsets, bias), reference, strict=True):
        want.append((log_p.exp() * (log_p - log_q.detach())).sum())
    torch.testing.assert_close(kl, torch.stack(want))
    assert kl[1] == 0
    got = torch.autograd.grad(weighted_sum(kl), (hidden, weight, bias, *other[:2], other[-1]), allow_unused=True)
    torch.testing.assert_close(got[:3], torch.autograd.grad(weighted_sum(torch.stack(want)), (hidden, weight, bias)))
    assert got[3:] == (None, None, None)
    same = restricted_kl(hidden, weight, hidden, weight, ids, offsets)
    assert (same == 0).all()


def test_kl_where_one_of_the_two_cannot_go():
    hidden, weight, ids, offsets, _, _, bias = make_sets(8, [4, 4])
    blocked = bias.detach().clone()
    blocked[ids[0]] = -math.inf
    first_only = not (ids[4:] == ids[0]).any()
    kl = restricted_kl(hidden, weight, hidden, weight, ids, offsets, bias=bias, ref_bias=blocked)
    assert kl.isinf().tolist() == [True, not first_only]
    kl = restricted_kl(hidden, weight, hidden, weight, ids, offsets, bias=blocked, ref_bias=bias)
    assert kl.isfinite().all()
    assert torch.autograd.grad(kl.sum(), hidden)[0].isfinite().all()
    for backend in BACKENDS:  # an infinite divergence has no gradient
        kl = restricted_kl(hidden, weight, hidden, weight, ids, offsets, bias=bias, ref_bias=blocked, backend=backend)
        assert (torch.autograd.grad(kl[0], hidden)[0] == 0).all()


def test_no_rows_and_rows_without_tokens():
    *arguments, values, bias = make_sets(9, [])
    out = restricted_logprobs(*arguments, values=values, bias=bias)
    assert out.logprobs.shape == out.entropy.shape == (0,)
    assert out.expectations.shape == (0, 2)
    hidden, weight = torch.zeros(2, 3), torch.zeros(5, 3)
    kl = restricted_kl(hidden, weight, hidden, weight, torch.tensor([4]), torch.tensor([0, 0, 1]))
    assert kl.tolist() == [0, 0]


WRONG = {
    "target": (
        {"targets": [0, 3]},
        ValueError,
        r"targets must be among .*; row 1 has target 3 and 2 allowed: \[1, 4\]",
    ),
    "no token": ({"allowed_offsets": [0, 0, 4]}, ValueError, r"row 0 has target 0 and 0 allowed: \[\]"),
    "twice": ({"allowed_ids": [0, 2, 4, 4]}, ValueError, "allowed_ids .* once per row; row 1 has 4 twice"),
    "token": ({"allowed_ids": [0, 2, 1, 5]}, ValueError, r"allowed_ids must lie in \[0, 4\], got 5"),
    "offsets' end": ({"allowed_offsets": [0, 2, 3]}, ValueError, "from 0 to len.* = 4, got 0 to 3"),
    "offsets' order": ({"allowed_offsets": [0, 5, 4]}, ValueError, "allowed_offsets must not descend.*entry 1"),
    "offsets' shape": ({"allowed_offsets": [0, 4]}, ValueError, r"allowed_offsets must have shape \(3,\)"),
    "targets' shape": ({"targets": [0]}, ValueError, r"targets must have shape \(2,\)"),
    "ids' dtype": ({"allowed_ids": [0.0, 2.0, 1.0, 4.0]}, TypeError, "allowed_ids must have an integer dtype"),
    "values": ({"values": [[1.0]]}, ValueError, r"values must have shape \(4, C\)"),
    "values NaN": ({"values": [[1.0], [math.nan], [1.0], [1.0]]}, ValueError, "values must be finite"),
    "temperature": ({"temperature": -1}, ValueError, "temperature must be positive"),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of 'auto', 'triton', 'numba', 'torch'; got 'cuda'",
    ),
    "way of the gradient": ({"weight_grad": "sparse"}, ValueError, "weight_grad must be one of 'dense', 'rows'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
    change, error, message = WRONG[name]
    arguments = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "allowed_ids": torch.tensor([0, 2, 1, 4]),
        "allowed_offsets": torch.tensor([0, 2, 4]),
        "targets": torch.tensor([0, 4]),
    }
    arguments |= {k: torch.tensor(v) if isinstance(v, list) else v for k, v in change.items()}
    with pytest.raises(error, match=message):
        restricted_logprobs(**arguments)


def test_second_derivatives_are_refused():
    """By the kernels; plain torch has them."""
    hidden, weight, ids, offsets, targets, _, bias = make_sets(0, [3, 1, 5])
    for backend in BACKENDS:
        out = restricted_logprobs(hidden, weight, ids, offsets, targets, bias=bias, backend=backend)
        (grad,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), hidden, create_graph=True)
        if backend == "torch":
            assert torch.autograd.grad(grad.sum(), hidden)[0].abs().sum() > 0
        else:
            with pytest.raises(RuntimeError, match="no second derivatives; use backend='torch'"):
                torch.autograd.grad(grad.sum(), hidden)
