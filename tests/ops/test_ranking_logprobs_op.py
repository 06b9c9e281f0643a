"""How ranking_logprobs lives in torch: weight gradients, registered operations, compilation, autocast, determinism."""

import copy

import pytest
import torch

from flexrec.ops import ranking_logprobs as op
from flexrec.ops.all_actions import all_actions_objective
from flexrec.ops.ranking_logprobs import (
    RankedLists,
    check_lists,
    evaluate_lists,
    ranking_logprobs,
    ranking_logprobs_with_kl,
    ranking_probs,
)


@pytest.fixture
def case(ranked_case):
    """Tokens repeat within and between lists."""
    return ranked_case(1, lists=4, group=2, steps=5, size=6, dim=16, vocab=7, dtype=torch.float32)


def home(backend, device):
    """Where tensors lie: Triton's on the GPU if there is one, everybody else's on the CPU."""
    return device if backend == "triton" else torch.device("cpu")


def total(outputs):
    return sum(
        (x * torch.linspace(-1, 2, x.numel(), device=x.device).view(x.shape)).sum() for x in outputs if x is not None
    )


def inputs_of(case, *, reference=False, backend="numba"):
    """Arguments of the registered operation; any order of the candidates will do."""
    generator = torch.Generator().manual_seed(0)
    n, k = len(case.hidden), case.candidates.shape[1]
    position = torch.stack([torch.randperm(k, generator=generator) for _ in range(n)]).int().to(case.hidden.device)
    ref = (case.hidden.detach() + 1, case.weight.detach(), None) if reference else (None, None, None)
    tensors = case.hidden, case.weight, case.bias, case.candidates, position, case.values
    return RankedLists(*tensors, *ref, None, 0.7, False, backend)


# --- weight gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_dense_gradient(backend, dtype, case, device):
    case = case.to(dtype, home(backend, device))
    dense = torch.autograd.grad(total(ranking_logprobs(*case.positional, backend=backend, **case.options)), case.leaves)
    out = ranking_logprobs(*case.positional, backend=backend, weight_grad="rows", **case.options)
    hidden, rows, bias = torch.autograd.grad(total(out), case.leaves)
    assert rows.layout == torch.sparse_coo
    assert rows.dtype == dtype
    torch.testing.assert_close(rows.to_dense(), dense[1])
    assert torch.equal(hidden, dense[0])
    torch.testing.assert_close(bias, dense[2])


def test_rows_reach_an_optimizer_that_takes_them(case):
    """And where the embedding is used twice, autograd adds a dense gradient to them."""
    twin = copy.deepcopy(case.weight)
    for weight, mode in ((case.weight, "rows"), (twin, "dense")):
        optimizer = torch.optim.SGD([weight], lr=0.1)
        out = ranking_logprobs(case.hidden, weight, case.candidates, case.ranking, weight_grad=mode)
        total(out).backward()
        optimizer.step()
    assert case.weight.grad.is_sparse
    torch.testing.assert_close(case.weight, twin)
    case.weight.grad = None
    out = ranking_logprobs(case.hidden, case.weight, case.candidates, case.ranking, weight_grad="rows")
    (total(out) + case.weight.sum()).backward()
    assert case.weight.grad.layout == torch.strided


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("buffer", ["grad", "nothing", "main_grad"])
def test_accumulates(buffer, backend, case, device):
    case = case.to(device=home(backend, device))
    options = {"backend": backend, **case.options}
    dense = torch.autograd.grad(total(ranking_logprobs(*case.positional, **options)), case.leaves)
    case = case.to(torch.float32 if buffer != "main_grad" else torch.bfloat16, home(backend, device))
    expected = dense[1].clone()
    if buffer == "grad":
        case.weight.grad = torch.ones_like(case.weight)
        expected += 1
    elif buffer == "main_grad":
        case.weight.main_grad = torch.ones_like(case.weight, dtype=torch.float32)
        expected += 1
    before = case.weight.grad
    total(ranking_logprobs(*case.positional, weight_grad="accumulate", **options | {"bias": case.bias})).backward()
    if buffer == "main_grad":
        assert case.weight.grad is None
        torch.testing.assert_close(case.weight.main_grad, expected, rtol=0.05, atol=0.1)
        return
    assert before is None or case.weight.grad is before
    torch.testing.assert_close(case.weight.grad, expected)
    torch.testing.assert_close(case.bias.grad, dense[2])


def test_accumulation_that_cannot_be_is_refused(case):
    with pytest.raises(ValueError, match="weight to be a leaf"):
        ranking_logprobs(
            case.hidden, case.weight * 2, case.candidates, case.ranking, weight_grad="accumulate", bias=case.bias
        )
    case.weight.grad = torch.zeros_like(case.weight).to_sparse()
    out = ranking_logprobs(*case.positional, weight_grad="accumulate", **case.options)
    with pytest.raises(ValueError, match="dense contiguous gradient"):
        total(out).backward()
    with pytest.raises(ValueError, match="weight_grad='rows' is not possible with backend='torch'"):
        ranking_logprobs(*case.positional, weight_grad="rows", backend="torch")
    gains = torch.rand(len(case.hidden), 6)
    with pytest.raises(ValueError, match="needs a linear metric"):
        all_actions_objective(*case.positional, gains, "mrr", weight_grad="rows")


def test_all_actions_pass_the_mode_on(case):
    gains = torch.rand(len(case.hidden), 6, generator=torch.Generator().manual_seed(0))
    (dense,) = torch.autograd.grad(all_actions_objective(*case.positional, gains, "ndcg").objective.sum(), case.weight)
    out = all_actions_objective(*case.positional, gains, "ndcg", weight_grad="rows")
    (rows,) = torch.autograd.grad(out.objective.sum(), case.weight)
    torch.testing.assert_close(rows.to_dense(), dense)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_deterministic_mode_repeats_every_bit(backend, ranked_case, device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch refuses a library's products on a GPU
    case = ranked_case(2, lists=16, group=2, steps=4, size=8, dim=16, vocab=5, dtype=torch.float32)
    case = case.to(device=home(backend, device))
    torch.use_deterministic_algorithms(True)
    try:
        grads = [
            torch.autograd.grad(total(ranking_logprobs(*case.positional, backend=backend, **case.options)), case.leaves)
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    free = torch.autograd.grad(total(ranking_logprobs(*case.positional, backend=backend, **case.options)), case.leaves)
    torch.testing.assert_close(grads[0], free)


def test_only_requested_gradients_are_computed(case):
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    inputs = inputs_of(case)
    out = torch.ops.flexrec.ranking_logprobs(*inputs)
    upstream = [torch.ones_like(x) for x in out[:4]]
    detached = (x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
    grads = torch.ops.flexrec.ranking_logprobs_backward(
        upstream, [x.detach() for x in out[1:]], *detached, [True, False, False]
    )
    assert [grad.numel() for grad in grads] == [case.hidden.numel(), 0, 0]
    ranking_logprobs(*case.positional, **case.options).logprobs.sum().backward()
    assert case.hidden.grad is not None
    assert case.weight.grad is None
    assert case.bias.grad is None


# --- registered operations, torch.compile -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("reference", [False, True])
def test_operations_are_registered_correctly(reference, backend, case, device):
    case = case.to(device=home(backend, device))
    torch.library.opcheck(
        torch.ops.flexrec.ranking_logprobs.default, inputs_of(case, reference=reference, backend=backend)
    )


def test_eager_and_registered_agree(case):
    inputs = inputs_of(case, reference=True)
    registered = torch.ops.flexrec.ranking_logprobs(*inputs)[:4]
    wanted = torch.autograd.grad(total(registered), case.leaves)
    eager = op._operation(inputs, "dense")
    assert all(torch.equal(a, b) for a, b in zip(eager, registered, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(total(eager), case.leaves), wanted, strict=True))


def test_compiles_whole_and_once_for_all_lengths(ranked_case):
    """One graph without breaks; a second compilation at most when the number of ranks changes for the first time."""

    def f(hidden, weight, ref_hidden, candidates, ranking, values):
        out = ranking_logprobs_with_kl(
            hidden, weight, candidates, ranking, values=values, ref_hidden=ref_hidden, ref_weight=weight
        )
        return out.logprobs, out.entropy, out.expectations, out.kl

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for steps in (4, 6, 5, 3):
        case = ranked_case(steps, lists=4, group=2, steps=steps, size=7, dtype=torch.float32)
        arguments = case.hidden, case.weight, case.hidden.detach() + 1, case.candidates, case.ranking, case.values
        got, want = compiled(*arguments), f(*arguments)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(total(got), (case.hidden, case.weight)),
            torch.autograd.grad(total(want), (case.hidden, case.weight)),
        )
    assert counter.frame_count <= 2


def test_ragged_lists_compile(ranked_case):
    case = ranked_case(3, lists=4, group=2, ragged="list", dtype=torch.float32)
    compiled = torch.compile(ranking_logprobs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(*case.positional, values=case.values, **case.options),
        ranking_logprobs(*case.positional, values=case.values, **case.options),
    )


def test_other_weight_gradients_need_eager_mode(case):
    compiled = torch.compile(
        lambda hidden: ranking_logprobs(hidden, *case.positional[1:], weight_grad="rows").logprobs.sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(Exception, match="weight_grad"):
        compiled(case.hidden)


# --- autocast, memory, host -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_autocast_changes_nothing_inside(backend, ranked_case, device):
    """Operands are taken as they are: half-precision states with a float32 embedding give float32 results."""
    case = ranked_case(4, lists=2, group=2, steps=4, size=8, dim=32, dtype=torch.float32)
    case = case.to(device=home(backend, device))
    hidden = case.hidden.detach().bfloat16().requires_grad_()
    want = ranking_logprobs(hidden.float(), *case.positional[1:], values=case.values, backend="torch", **case.options)
    wanted = torch.autograd.grad(total(want), (hidden, case.weight))
    with torch.autocast(case.hidden.device.type, dtype=torch.bfloat16):
        got = ranking_logprobs(hidden, *case.positional[1:], values=case.values, backend=backend, **case.options)
        grads = torch.autograd.grad(total(got), (hidden, case.weight))
        probs = ranking_probs(hidden, *case.positional[1:], **case.options)
    assert all(x.dtype == torch.float32 for x in (*got, probs))
    torch.testing.assert_close(got, want)
    assert [x.dtype for x in grads] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(grads, wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(probs[:, range(4), range(4)].log(), want.logprobs)


def test_no_graph_is_made_without_need(case, monkeypatch):
    """Neither under no_grad nor for operands without gradients does autograd see a function."""

    def fail(*_):
        raise AssertionError("an autograd function was called")

    monkeypatch.setattr("flexrec.ops.library._Eager.apply", fail)
    with torch.no_grad():
        assert ranking_logprobs(*case.positional).logprobs.grad_fn is None
    detached = (x.detach() for x in case.positional)
    assert not ranking_logprobs(*detached).logprobs.requires_grad


def test_eager_mode_does_not_go_through_torch_library(case, monkeypatch):
    """Which costs more than the host may spend on a call."""

    def fail(*_):
        raise AssertionError("the registered operation was called")

    monkeypatch.setattr(op._operation, "registered", fail)
    monkeypatch.setattr(op._operation, "registered_backward", fail)
    weight = torch.nn.Parameter(case.weight.detach())
    total(ranking_logprobs(case.hidden, weight, case.candidates, case.ranking)).backward()
    assert weight.grad is not None


def test_second_derivatives_are_refused(case):
    out = ranking_logprobs(*case.positional, **case.options)
    (grad,) = torch.autograd.grad(total(out), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; use backend='torch'"):
        (grad.sum() + case.hidden.sum()).backward()


def test_results_without_values_or_reference_are_none(case):
    result = evaluate_lists(check_lists(*case.positional), None)
    assert result.expectations is None
    assert result.kl is None


def test_numba_is_what_auto_takes_on_a_cpu(case):
    """One calling convention: every operation takes backend="numba"."""
    got = ranking_logprobs(*case.positional, backend="numba", **case.options)
    want = ranking_logprobs(*case.positional, **case.options)
    assert torch.equal(got.logprobs, want.logprobs)
    assert torch.equal(got.entropy, want.entropy)
