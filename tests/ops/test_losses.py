"""policy_loss against a Python loop that follows its formula with autograd through the ratios, and its promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrec.ops.losses import IMPORTANCE_LEVELS, LOSS_AGGREGATIONS, aggregate, policy_loss


def loop_loss(logps, old, advantages, mask, item_ids, level, low, high, loss_agg):
    """Sum over units of min(rho A, clip(rho) A), with rho = exp(sum over the unit's tokens), through plain autograd."""
    surrogate = logps.new_zeros(())
    rows, row_surrogates, items_in_row, num_tokens = [], [], [], 0
    for b in range(len(logps)):
        units: dict[object, list[int]] = {}
        items = set()
        for t in range(logps.shape[1]):
            if not mask[b, t]:
                continue
            item = int(item_ids[b, t])
            if item >= 0:
                items.add(item)
            if level == "sequence":
                units.setdefault("all", []).append(t)
            elif item >= 0:
                units.setdefault(item if level == "item" else t, []).append(t)
        total = logps.new_zeros(())
        for tokens in units.values():
            log_ratio = logps.new_zeros(())
            for t in tokens:
                log_ratio = log_ratio + logps[b, t] - old[b, t]
            ratio = log_ratio.exp()
            if advantages.dim() == 1:
                advantage = advantages[b]
            else:
                advantage = advantages[b, item_ids[b, tokens[0]]]
            total = total + torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            num_tokens += len(tokens)
        if units:
            rows.append(b)
            row_surrogates.append(total)
            items_in_row.append(len(items))
        surrogate = surrogate + total
    if loss_agg == "sum":
        return -surrogate
    if loss_agg == "item-mean":
        return -surrogate / max(sum(items_in_row), 1)
    if loss_agg == "token-mean":
        return -surrogate / max(num_tokens, 1)
    if loss_agg == "seq-mean-item-mean":
        row_surrogates = [total / max(n, 1) for total, n in zip(row_surrogates, items_in_row, strict=True)]
    return -sum(row_surrogates, logps.new_zeros(())) / max(len(rows), 1)


def example(seed, rows=3, length=7, num_items=4, moved=0.3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, length, generator=generator, dtype=dtype)
    logps = (old + moved * torch.randn(rows, length, generator=generator, dtype=dtype)).requires_grad_()
    item_ids = torch.randint(-1, num_items, (rows, length), generator=generator)
    mask = torch.rand(rows, length, generator=generator) > 0.25
    per_item = torch.randn(rows, num_items, generator=generator, dtype=dtype)
    per_row = torch.randn(rows, generator=generator, dtype=dtype)
    return logps, old, per_item, per_row, item_ids, mask


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(IMPORTANCE_LEVELS),
    st.sampled_from(LOSS_AGGREGATIONS),
    st.booleans(),
    st.sampled_from([(0.2, None), (0.1, 0.4), (0.0, 0.0), (5.0, 100.0)]),
    st.integers(0, 10**6),
)
def test_value_and_gradient_equal_the_definition(level, loss_agg, per_sequence, epsilons, seed):
    logps, old, per_item, per_row, item_ids, mask = example(seed)
    advantages = per_row if per_sequence or level == "sequence" else per_item
    low, high = epsilons
    loss, _ = policy_loss(
        logps,
        old,
        advantages,
        mask,
        item_ids=item_ids,
        epsilon_low=low,
        epsilon_high=high,
        importance_level=level,
        loss_agg=loss_agg,
    )
    high = low if high is None else high
    expected = loop_loss(logps, old, advantages, mask, item_ids, level, low, high, loss_agg)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    # (0, 0) puts every ratio at the corner or beyond: min then takes either side with the same value.
    if epsilons != (0.0, 0.0):
        torch.testing.assert_close(gradient(loss, logps), gradient(expected, logps), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
def test_gradcheck(level):
    # A loss of which no ratio stands near a corner of the clip is smooth: finite differences see the gradient.
    logps, old, _, per_row, item_ids, mask = example(3, moved=0.02)

    def loss(logps, kl, entropy):
        return policy_loss(
            logps,
            old,
            per_row,
            mask,
            item_ids=item_ids,
            beta=0.3,
            kl=kl,
            entropy=entropy,
            entropy_coef=0.2,
            importance_level=level,
        )[0]

    kl = torch.rand_like(logps).requires_grad_()
    entropy = torch.rand_like(logps).requires_grad_()
    assert torch.autograd.gradcheck(loss, (logps, kl, entropy))


def test_gradcheck_of_the_reference_estimate():
    logps, old, per_item, _, item_ids, mask = example(4, moved=0.02)
    ref = old.detach() - 0.3 + 0.4 * torch.rand_like(old)

    def loss(x, beta=0.5):
        return policy_loss(x, old, per_item, mask, item_ids=item_ids, beta=beta, ref_per_token_logps=ref)[0]

    assert torch.autograd.gradcheck(loss, (logps,))
    belongs = mask & (item_ids >= 0)
    estimates = [
        math.exp(r - x) - (r - x) - 1 for r, x in zip(ref[belongs].tolist(), logps[belongs].tolist(), strict=True)
    ]
    num_items = sum(len(set(row[own].tolist())) for row, own in zip(item_ids, belongs, strict=True))
    assert (loss(logps) - loss(logps, beta=0.0)).item() == pytest.approx(0.5 * sum(estimates) / num_items)


def test_the_reference_estimate_is_the_kl_in_the_policys_expectation():
    """Of the policy from the reference, not the other way round: by enumeration of all tokens."""
    policy, reference = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    estimates = []
    for token in range(6):
        _, metrics = policy_loss(
            policy[token].view(1, 1),
            None,
            torch.zeros(1, 1),
            torch.ones(1, 1),
            beta=1.0,
            ref_per_token_logps=reference[token].view(1, 1),
        )
        estimates.append(metrics["kl"])
    kl = (policy.exp() * (policy - reference)).sum()
    other_way = (reference.exp() * (reference - policy)).sum()
    assert abs(kl - other_way) > 0.01
    torch.testing.assert_close((policy.exp() * torch.stack(estimates)).sum(), kl)


def test_the_moved_estimate_is_the_kl_in_the_old_policys_expectation():
    """approx_kl is of the old policy from the new: by enumeration of all tokens."""
    old, new = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    estimates = [
        policy_loss(new[token].view(1, 1), old[token].view(1, 1), torch.zeros(1, 1), torch.ones(1, 1))[1]["approx_kl"]
        for token in range(6)
    ]
    torch.testing.assert_close((old.exp() * torch.stack(estimates)).sum(), (old.exp() * (old - new)).sum())


@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
@pytest.mark.parametrize("old_given", [True, False])
def test_unmoved_policy_is_reinforce(level, old_given):
    logps, _, per_item, _, item_ids, mask = example(5)
    old = logps.detach().clone() if old_given else None
    loss, metrics = policy_loss(logps, old, per_item, mask, item_ids=item_ids, importance_level=level)
    assert metrics["ratio_mean"] == 1
    assert metrics["approx_kl"] == 0
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0
    # Item credit reaches an item's tokens at every level, under a ratio per sequence too.
    belongs = mask & (item_ids >= 0)
    advantage = per_item.gather(1, item_ids.clamp(min=0)).where(belongs, torch.zeros(()).double())
    num_items = sum(len(set(item_ids[b][belongs[b]].tolist())) for b in range(len(mask)))
    reinforce = gradient(-(advantage * logps).sum() / num_items, logps)
    torch.testing.assert_close(gradient(loss, logps), reinforce, rtol=1e-12, atol=0)


def test_an_item_counts_once_however_many_tokens_it_has():
    # Item 0 has one token, item 1 three, with the same ratio e^0.1 of the item: the same surrogate.
    logps = torch.tensor([[0.1, 0.02, 0.03, 0.05]], dtype=torch.float64) - 1
    old = torch.full_like(logps, -1.0)
    item_ids = torch.tensor([[0, 1, 1, 1]])
    loss, metrics = policy_loss(logps, old, torch.tensor([[1.0, 3.0]]), torch.ones(1, 4), item_ids=item_ids)
    assert loss.item() == pytest.approx(-math.exp(0.1) * (1 + 3) / 2)
    assert metrics["ratio_mean"].item() == pytest.approx(math.exp(0.1))


def test_without_item_ids_every_token_is_an_item():
    logps, old, *_, mask = example(6)
    advantages = torch.randn(3, 7, dtype=torch.float64)
    own = torch.arange(7).expand(3, 7)
    plain = policy_loss(logps, old, advantages, mask)
    named = policy_loss(logps, old, advantages, mask, item_ids=own)
    token = policy_loss(logps, old, advantages, mask, importance_level="token")
    for other in (named, token):
        torch.testing.assert_close(plain[0], other[0])
        torch.testing.assert_close(gradient(plain[0], logps), gradient(other[0], logps))


def test_advantages_spread_over_tokens_equal_advantages_per_item():
    logps, old, per_item, _, item_ids, mask = example(7)
    spread = per_item.gather(1, item_ids.clamp(min=0))
    by_item = policy_loss(logps, old, per_item, mask, item_ids=item_ids)[0]
    by_token = policy_loss(logps, old, spread, mask, item_ids=item_ids)[0]
    torch.testing.assert_close(by_item, by_token)
    torch.testing.assert_close(gradient(by_item, logps), gradient(by_token, logps))


def test_sequence_level_moves_the_tokens_of_no_item_too():
    logps, old, _, per_row, item_ids, mask = example(8, moved=0.0)
    none = mask & (item_ids < 0)
    assert none.any()
    by_sequence = policy_loss(logps, old, per_row, mask, item_ids=item_ids, importance_level="sequence")[0]
    by_item = policy_loss(logps, old, per_row, mask, item_ids=item_ids)[0]
    assert (gradient(by_sequence, logps)[none] != 0).all()
    assert (gradient(by_item, logps)[none] == 0).all()


def test_clip_fractions_count_the_units_held_back():
    log_ratio = torch.tensor([[-1.0, -1.0, 1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 0.0]])
    logps = log_ratio.clone().requires_grad_()
    loss, metrics = policy_loss(logps, torch.zeros_like(logps), advantages, torch.ones(1, 6, dtype=torch.long))
    # Held back: low ratio with negative advantage, high ratio with positive advantage; a zero advantage never is.
    assert metrics["clip_fraction_low"].item() == pytest.approx(1 / 6)
    assert metrics["clip_fraction_high"].item() == pytest.approx(1 / 6)
    assert (gradient(loss, logps)[0, [1, 2]] == 0).all()
    assert (gradient(loss, logps)[0, [0, 3, 4]] != 0).all()
    log_ratios = log_ratio.flatten()
    assert metrics["approx_kl"].item() == pytest.approx((log_ratios.exp() - 1 - log_ratios).mean().item())


def test_kl_and_entropy_enter_with_their_weights():
    logps, old, per_item, _, item_ids, mask = example(9)
    kl, entropy = torch.rand_like(logps), torch.rand_like(logps)
    plain = policy_loss(logps, old, per_item, mask, item_ids=item_ids)[0]
    loss, metrics = policy_loss(
        logps, old, per_item, mask, item_ids=item_ids, beta=0.01, kl=kl, entropy=entropy, entropy_coef=0.005
    )
    belongs = mask & (item_ids >= 0)
    expected = 0.01 * aggregate(kl, mask, item_ids=item_ids) - 0.005 * aggregate(entropy, mask, item_ids=item_ids)
    torch.testing.assert_close(loss - plain, expected)
    torch.testing.assert_close(metrics["kl"], kl[belongs].mean())
    torch.testing.assert_close(metrics["entropy"], entropy[belongs].mean())
    torch.testing.assert_close(metrics["policy_loss"], plain.detach())


def test_given_kl_goes_before_the_reference():
    logps, old, per_item, _, item_ids, mask = example(10)
    kl = torch.rand_like(logps)
    arguments = {"item_ids": item_ids, "beta": 0.1, "kl": kl}
    with_ref = policy_loss(logps, old, per_item, mask, ref_per_token_logps=old - 1, **arguments)[0]
    torch.testing.assert_close(with_ref, policy_loss(logps, old, per_item, mask, **arguments)[0])


def test_reference_estimate_is_zero_at_the_reference_and_positive_elsewhere():
    logps, old, per_item, _, item_ids, mask = example(11)
    at = policy_loss(logps, old, per_item, mask, item_ids=item_ids, beta=1.0, ref_per_token_logps=logps.detach())
    away = policy_loss(logps, old, per_item, mask, item_ids=item_ids, beta=1.0, ref_per_token_logps=old)
    assert at[1]["kl"] == 0
    assert away[1]["kl"] > 0


@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_but_masked_tokens_gives_zero_with_a_gradient(level, loss_agg, rows):
    logps = torch.full((rows, 3), math.nan, requires_grad=True)
    loss, metrics = policy_loss(
        logps,
        torch.full((rows, 3), -math.inf),
        torch.ones(rows, 2),
        torch.zeros(rows, 3),
        item_ids=torch.full((rows, 3), -1),
        beta=0.1,
        ref_per_token_logps=torch.zeros(rows, 3),
        entropy=torch.zeros(rows, 3),
        entropy_coef=0.1,
        importance_level=level,
        loss_agg=loss_agg,
    )
    assert loss == 0
    assert (gradient(loss, logps) == 0).all()
    assert metrics.pop("ratio_mean") == 1
    assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("loss_agg", ["seq-mean-item-mean", "seq-mean-item-sum"])
def test_a_row_that_counts_nothing_is_no_row(loss_agg):
    per_token = torch.tensor([[1.0, 2.0, 4.0], [8.0, 8.0, 8.0], [3.0, 5.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    expected = {"seq-mean-item-mean": (1.5 + 5) / 2, "seq-mean-item-sum": (3 + 15) / 2}[loss_agg]
    assert aggregate(per_token, mask, loss_agg=loss_agg).item() == pytest.approx(expected)


def test_masked_tokens_may_hold_anything():
    logps, old, per_item, _, item_ids, mask = example(12)
    loss = policy_loss(logps, old, per_item, mask, item_ids=item_ids)[0]
    dirty = logps.detach().masked_fill(~mask, -math.inf).requires_grad_()
    dirty_ids = item_ids.masked_fill(~mask, 10**6)
    dirty_loss = policy_loss(dirty, old.masked_fill(~mask, math.nan), per_item, mask, item_ids=dirty_ids)[0]
    torch.testing.assert_close(dirty_loss, loss)
    torch.testing.assert_close(gradient(dirty_loss, dirty), gradient(loss, logps))


def test_a_ratio_beyond_float32_stays_finite():
    logps = torch.zeros(1, 1, requires_grad=True)
    loss, metrics = policy_loss(logps, torch.full((1, 1), -1000.0), torch.tensor([-1.0]), torch.ones(1, 1))
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient(loss, logps)).all()
    assert torch.isfinite(metrics["approx_kl"])


def test_half_precision_is_computed_in_float32():
    logps, old, per_item, _, item_ids, mask = example(13, dtype=torch.float32)
    low = logps.detach().bfloat16().requires_grad_()
    loss, metrics = policy_loss(low, old.bfloat16(), per_item.bfloat16(), mask, item_ids=item_ids)
    assert loss.dtype == torch.float32
    assert gradient(loss, low).dtype == torch.bfloat16
    assert not any(value.requires_grad for value in metrics.values())


def test_advantages_carry_no_gradient():
    logps, old, per_item, _, item_ids, mask = example(14)
    per_item.requires_grad_()
    loss, _ = policy_loss(logps, old, per_item, mask, item_ids=item_ids)
    assert torch.autograd.grad(loss, per_item, allow_unused=True)[0] is None


def test_square_advantages_that_could_be_either_are_asked_about():
    logps, old, *_ = example(15, rows=1, length=4)
    item_ids = torch.tensor([[0, 0, 1, 1]])
    per_item = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.float64)  # 4 candidates of which 2 are ranked
    mask = torch.ones(1, 4)
    with pytest.raises(ValueError, match="advantage_level='token' or 'item'"):
        policy_loss(logps, old, per_item, mask, item_ids=item_ids)
    by_item = policy_loss(logps, old, per_item, mask, item_ids=item_ids, advantage_level="item")[0]
    torch.testing.assert_close(by_item, policy_loss(logps, old, per_item[:, :2], mask, item_ids=item_ids)[0])
    by_token = policy_loss(logps, old, per_item, mask, item_ids=item_ids, advantage_level="token")[0]
    assert by_token != by_item


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"per_token_logps": torch.zeros(3)}, ValueError, r"per_token_logps must have shape \(B, T\), got \(3,\)"),
        ({"per_token_logps": torch.zeros(2, 3).long()}, TypeError, "per_token_logps must have a floating dtype"),
        ({"per_token_logps": torch.full((2, 3), math.nan)}, ValueError, "per_token_logps must be finite"),
        ({"old_per_token_logps": torch.zeros(2, 4)}, ValueError, r"old_per_token_logps must have shape \(2, 3\)"),
        ({"old_per_token_logps": torch.full((2, 3), -math.inf)}, ValueError, "old_per_token_logps must be finite"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages must have shape \(2,\), got \(3,\)"),
        ({"advantages": torch.zeros(2, 4)}, ValueError, r"advantages must have shape \(2, 3\), got \(2, 4\)"),
        ({"advantages": torch.full((2,), math.nan)}, ValueError, "advantages must be finite"),
        ({"advantages": [1.0, 2.0]}, TypeError, "advantages must be a torch.Tensor"),
        ({"completion_mask": torch.ones(2, 2)}, ValueError, r"completion_mask must have shape \(2, 3\), got \(2, 2\)"),
        ({"completion_mask": torch.full((2, 3), 0.5)}, ValueError, "completion_mask must hold 0 and 1, got 0.5"),
        ({"completion_mask": None}, TypeError, "completion_mask must be a torch.Tensor"),
        ({"item_ids": torch.zeros(2, 2).long()}, ValueError, r"item_ids must have shape \(2, 3\)"),
        ({"item_ids": torch.zeros(2, 3)}, TypeError, "item_ids must have an integer dtype"),
        (
            {"item_ids": torch.full((2, 3), 5), "advantages": torch.zeros(2, 2)},
            ValueError,
            r"item_ids must be below 2, the number of items in advantages \(2, 2\), got 5",
        ),
        ({"beta": 0.1}, ValueError, "beta=0.1 needs kl or ref_per_token_logps"),
        ({"entropy_coef": 0.1}, ValueError, "entropy_coef=0.1 needs entropy"),
        ({"kl": torch.zeros(2)}, ValueError, "kl must have shape"),
        ({"entropy": torch.full((2, 3), math.nan), "entropy_coef": 0.1}, ValueError, "entropy must be finite"),
        ({"epsilon_low": -0.1}, ValueError, "epsilon_low must be >= 0, got -0.1"),
        ({"importance_level": "list"}, ValueError, "importance_level must be one of 'item', 'token', 'sequence'"),
        ({"loss_agg": "mean"}, ValueError, "loss_agg must be one of"),
        ({"advantage_level": "item", "advantages": torch.zeros(2, 3)}, ValueError, "needs item_ids, got None"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {
        "per_token_logps": torch.zeros(2, 3),
        "old_per_token_logps": torch.zeros(2, 3),
        "advantages": torch.zeros(2),
        "completion_mask": torch.ones(2, 3),
    } | change
    with pytest.raises(error, match=message):
        policy_loss(**arguments)
