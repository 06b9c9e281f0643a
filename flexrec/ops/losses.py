"""The policy loss: a clipped surrogate on importance ratios of items, tokens or sequences, exact KL, entropy bonus."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flexrec.checks import check_choice, check_finite, check_number, check_tensor, values_are_checked
from flexrec.metrics import IMPORTANCE_LEVELS

LOSS_AGGREGATIONS = ("item-mean", "token-mean", "seq-mean-item-mean", "seq-mean-item-sum", "sum")


def _max_log_ratio(dtype: torch.dtype) -> float:
    """What log-ratios are clamped to.

    exp(20) = 5e8 is far beyond any clip range and far from the end of float32; in float16, to which the gradients
    return, exp(8) leaves room for an advantage.
    """
    return 8.0 if dtype == torch.float16 else 20.0


def policy_loss(
    per_token_logps: torch.Tensor,
    old_per_token_logps: torch.Tensor | None,
    advantages: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    item_ids: torch.Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    kl: torch.Tensor | None = None,
    ref_per_token_logps: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    importance_level: str = "item",
    advantage_level: str | None = None,
    loss_agg: str = "item-mean",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy-gradient loss of B completions of T tokens, with item-level importance ratios by default.

    A unit u (an item, a token or a sequence) has the ratio of the probability of all its tokens,

        rho_u = prod_{t in u} pi(t) / pi_old(t) = exp sum_{t in u} (logp_t - old_t),

    and the surrogate min(rho_u A_u, clip(rho_u, 1 - epsilon_low, 1 + epsilon_high) A_u) of PPO (arXiv 1707.06347).
    The loss is aggregate(-surrogate + beta KL - entropy_coef H). A policy that has not moved has rho = 1 exactly, and
    the gradient is then REINFORCE's, -A_t grad logp_t, at every level: with ``loss_agg="item-mean"`` the three levels
    differ in what is clipped, not in the direction of the first step.

    Advantages may be finer than the unit (an advantage per item under a ratio per sequence): every token keeps its
    own advantage, multiplied and clipped by its unit's ratio (GSPO-token, arXiv 2507.18071), so credit is never
    averaged away. GSPO itself takes the geometric mean over the tokens of a sequence where this takes the product.

    Args:
        per_token_logps: (B, T) floating, differentiable, of the restricted distribution that was sampled from.
        old_per_token_logps: (B, T) at sampling time, or None for a policy that has not moved since.
        advantages: (B, K) per item, (B, T) per token or (B,) per sequence.
        completion_mask: (B, T) bool or 0/1; whatever stands where it is 0 (NaN too) has no influence.
        item_ids: (B, T) integer, the rank of the item a token belongs to, -1 for none. None: every token is an item
            of its own, as in the output of ``ranking_logprobs``. Tokens of no item carry no gradient, KL or entropy,
            except under ``importance_level="sequence"``, which takes the whole completion.
        epsilon_low, epsilon_high: clip range of the ratio, [1 - low, 1 + high]; high None takes the value of low.
        beta: weight of the KL divergence from the reference policy.
        kl: (B, T) exact KL(pi || pi_ref) at every token, differentiable.
        ref_per_token_logps: (B, T), used where ``kl`` is not given: the single-sample estimator
            exp(ref - logp) - (ref - logp) - 1, never negative ("k3", Schulman 2020), its ratio clamped as the others.
        entropy: (B, T) entropy of the restricted distribution at every token, differentiable.
        entropy_coef: weight of the entropy bonus.
        importance_level: the unit, "item", "token" or "sequence".
        advantage_level: what the columns of 2-D ``advantages`` are, "item" or "token". None reads it from the shape:
            (B, T) is per token, (B, K) per item. Say it where K may equal T by chance (where each token is an item
            the two are the same); a case that looks mistaken is an error while values are checked.
        loss_agg: see ``aggregate``.

    Returns:
        The loss, a scalar in float32 (float64 for float64 log-probs), and metrics, detached 0-dim tensors:
        "policy_loss"; over units "ratio_mean", "approx_kl" (k3 estimate of KL(pi_old || pi)), "clip_fraction_low" and
        "clip_fraction_high" (held back by the lower, the upper bound); over tokens "entropy" and "kl" where known.
        Nothing but masked tokens gives 0, with a gradient of 0.

    Raises:
        ValueError, TypeError: wrong shape, dtype or choice; NaN or infinite values at tokens that count; ``beta``
            without ``kl`` or reference; ``entropy_coef`` without ``entropy``.

    Example:
        >>> logprobs = torch.log(torch.tensor([[0.5, 0.25]])).requires_grad_()
        >>> old, advantages = torch.log(torch.tensor([[0.25, 0.25]])), torch.tensor([[1.0, -1.0]])
        >>> loss, metrics = flexrec.policy_loss(logprobs, old, advantages, torch.ones(1, 2), epsilon_high=0.5)
        >>> round(loss.item(), 3)  # the first ratio is 2, of which 1.5 counts; the second is 1
        -0.25
        >>> loss.backward()
        >>> logprobs.grad  # nothing for what was held back
        tensor([[-0.0000, 0.5000]])
    """
    check_choice("importance_level", importance_level, IMPORTANCE_LEVELS)
    check_choice("loss_agg", loss_agg, LOSS_AGGREGATIONS)
    check_tensor("per_token_logps", per_token_logps, ("B", "T"))
    shape = per_token_logps.shape
    for name, value in (
        ("old_per_token_logps", old_per_token_logps),
        ("kl", kl),
        ("ref_per_token_logps", ref_per_token_logps),
        ("entropy", entropy),
    ):
        if value is not None:
            check_tensor(name, value, shape)
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    for name, coefficient in (("beta", beta), ("entropy_coef", entropy_coef)):
        check_number(name, coefficient)
    for name, bound in (("epsilon_low", epsilon_low), ("epsilon_high", epsilon_high)):
        check_number(name, bound)
        if not bound >= 0:
            raise ValueError(f"{name} must be >= 0, got {bound}")
    if beta != 0 and kl is None and ref_per_token_logps is None:
        raise ValueError(f"beta={beta} needs kl or ref_per_token_logps, got neither")
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy, got None")

    mask = _as_mask(completion_mask, shape)
    items = _items(item_ids, mask)
    counted = mask if importance_level == "sequence" else items.mask
    token_advantages = _token_advantages(advantages, advantage_level, item_ids, counted)
    check_finite("per_token_logps", per_token_logps, counted)
    logps, furthest = _prepare(per_token_logps, counted), _max_log_ratio(per_token_logps.dtype)  # (B, T)

    with torch.no_grad():
        log_ratio = torch.zeros_like(logps)
        if old_per_token_logps is not None:
            check_finite("old_per_token_logps", old_per_token_logps, counted)
            log_ratio = logps - _prepare(old_per_token_logps, counted)
        if importance_level == "item":
            log_ratio, unit_size = items.total(log_ratio), items.size  # (B, T)
        elif importance_level == "sequence":
            log_ratio = log_ratio.sum(1, keepdim=True).expand(shape)
            unit_size = counted.sum(1, keepdim=True).clamp(min=1).expand(shape)
        else:
            unit_size = torch.ones_like(items.size)
        log_ratio = log_ratio.clamp(-furthest, furthest)
        ratio = log_ratio.exp()
        free = ratio * token_advantages
        bounded = ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * token_advantages
        flows = free <= bounded  # where min takes the free side, its gradient passes
    # d rho_u / d theta = rho_u sum_{t in u} d logp_t / d theta: every token of the unit receives rho_u A_t, while the
    # values, A_t rho_u / |u|, add up to one surrogate per unit. `moved` is 0 and carries the gradient.
    moved = logps - logps.detach()
    surrogate = torch.minimum(free, bounded) / unit_size + free.where(flows, 0.0) * moved
    loss = _aggregate(-surrogate, counted, items, loss_agg)
    metrics = {"policy_loss": loss.detach()}

    if kl is None and ref_per_token_logps is not None:
        check_finite("ref_per_token_logps", ref_per_token_logps, counted)
        log_ref_ratio = (_prepare(ref_per_token_logps, counted) - logps).detach()
        excess = torch.expm1(log_ref_ratio.clamp(-furthest, furthest))
        kl = (excess - log_ref_ratio) - excess * moved  # the gradient, too, of the clamped ratio
    for name, per_token, coefficient in (("kl", kl, beta), ("entropy", entropy, -entropy_coef)):
        if per_token is None:
            continue
        check_finite(name, per_token, counted)
        per_token = _prepare(per_token, counted)
        if coefficient != 0:
            loss = loss + coefficient * _aggregate(per_token, counted, items, loss_agg)
        metrics[name] = per_token.detach().sum() / counted.sum().clamp(min=1)

    per_unit = counted.to(logps.dtype) / unit_size  # (B, T) adds up to 1 over the tokens of a unit
    num_units = per_unit.sum()
    per_unit = per_unit / num_units.where(num_units > 0, 1.0)
    metrics["ratio_mean"] = 1 + (per_unit * torch.expm1(log_ratio)).sum()  # exactly 1 if nothing has moved
    metrics["approx_kl"] = (per_unit * (torch.expm1(log_ratio) - log_ratio)).sum()
    metrics["clip_fraction_low"] = (per_unit * (~flows & (ratio < 1))).sum()
    metrics["clip_fraction_high"] = (per_unit * (~flows & (ratio > 1))).sum()
    return loss, metrics


def aggregate(
    per_token: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    item_ids: torch.Tensor | None = None,
    loss_agg: str = "item-mean",
) -> torch.Tensor:
    """One number from a loss per token; an item's loss is the sum over its tokens, as its log-prob is.

    Args:
        per_token: (B, T) floating.
        completion_mask: (B, T) bool or 0/1.
        item_ids: (B, T) integer, -1 for tokens of no item, which do not count; None: every token is an item.
        loss_agg: "item-mean", the sum over the number of items in the batch; "token-mean", over the number of tokens;
            "seq-mean-item-mean", the mean over items per row, then over rows; "seq-mean-item-sum", the sum per
            row, then the mean over rows; "sum". Rows without a counted token are no rows.

    Returns:
        A scalar in float32 (float64 for float64); 0, with a gradient of 0, where nothing counts.

    Raises:
        ValueError, TypeError: wrong shape, dtype or choice.
    """
    check_choice("loss_agg", loss_agg, LOSS_AGGREGATIONS)
    check_tensor("per_token", per_token, ("B", "T"))
    items = _items(item_ids, _as_mask(completion_mask, per_token.shape))
    return _aggregate(_prepare(per_token, items.mask), items.mask, items, loss_agg)


class _Items(NamedTuple):
    """Which tokens belong to items, and to which."""

    mask: torch.Tensor  # (B, T) bool, the token counts and belongs to an item
    slots: torch.Tensor | None  # (B, T) int64 in [0, T), the same for tokens of one item; None: every token its own
    size: torch.Tensor  # (B, T) tokens of the item that the token belongs to, at least 1
    per_row: torch.Tensor  # (B,) number of items

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T): at each token the sum of ``values`` (B, T) over the tokens of its item."""
        if self.slots is None:
            return values
        sums = torch.zeros_like(values).scatter_add(1, self.slots, values.where(self.mask, 0.0))
        return sums.gather(1, self.slots)


def _aggregate(losses: torch.Tensor, counted: torch.Tensor, items: _Items, loss_agg: str) -> torch.Tensor:
    """``aggregate`` for ``losses`` (B, T) that are 0 where ``counted`` (B, T) is False."""
    if loss_agg == "sum":
        return losses.sum()
    if loss_agg == "token-mean":
        return losses.sum() / counted.sum().clamp(min=1)
    if loss_agg == "item-mean":
        return losses.sum() / items.per_row.sum().clamp(min=1)
    per_row = losses.sum(1)
    if loss_agg == "seq-mean-item-mean":
        per_row = per_row / items.per_row.clamp(min=1)
    return per_row.sum() / counted.any(1).sum().clamp(min=1)


def _items(item_ids: torch.Tensor | None, mask: torch.Tensor) -> _Items:
    if item_ids is None:
        return _Items(mask, None, torch.ones_like(mask, dtype=torch.long), mask.sum(1))
    check_tensor("item_ids", item_ids, mask.shape, "integer")
    belongs = mask & (item_ids >= 0)
    # Number the ids of a row from 0 in ascending order: T slots are then enough, and nobody has to read the largest.
    ascending, order = item_ids.masked_fill(~belongs, -1).long().sort(1)
    steps = (ascending[:, 1:] != ascending[:, :-1]).long().cumsum(1)
    slots = torch.zeros_like(order).scatter(1, order, torch.nn.functional.pad(steps, (1, 0))[:, : mask.shape[1]])
    counts = torch.zeros_like(slots).scatter_add(1, slots, belongs.long())
    return _Items(belongs, slots, counts.gather(1, slots).clamp(min=1), (counts > 0).sum(1))


def _token_advantages(
    advantages: torch.Tensor, level: str | None, item_ids: torch.Tensor | None, counted: torch.Tensor
) -> torch.Tensor:
    """(B, T): the advantage of every token, 0 where it does not count or (at item level) belongs to no item."""
    rows, length = counted.shape
    if level is not None:
        check_choice("advantage_level", level, ("item", "token"))
        if level == "item" and item_ids is None:
            raise ValueError("advantage_level='item' needs item_ids, got None")
    if isinstance(advantages, torch.Tensor) and advantages.dim() == 1:
        check_tensor("advantages", advantages, (rows,))
        per_token = advantages.unsqueeze(1).expand(rows, length)
    elif item_ids is None or level == "token":
        per_token = check_tensor("advantages", advantages, (rows, length))
    else:
        check_tensor("advantages", advantages, (rows, "K"))
        if advantages.shape[1] != length or level == "item":
            per_token = _of_items(advantages, item_ids, counted)
        else:
            per_token = advantages
            if values_are_checked(advantages):
                _check_not_of_items(advantages, item_ids, counted)
    check_finite("advantages", per_token, counted)
    return _prepare(per_token.detach(), counted)


def _of_items(advantages: torch.Tensor, item_ids: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """(B, T) from ``advantages`` (B, K): each token takes its item's, a token of no item takes 0."""
    num_items = advantages.shape[1]
    belongs = counted & (item_ids >= 0)
    ids = item_ids.long().where(belongs, 0)
    if values_are_checked(ids) and bool((ids[belongs] >= num_items).any()):
        raise ValueError(
            f"item_ids must be below {num_items}, the number of items in advantages {tuple(advantages.shape)}, "
            f"got {int(ids.max())}"
        )
    return advantages.gather(1, ids).where(belongs, 0.0)


def _check_not_of_items(advantages: torch.Tensor, item_ids: torch.Tensor, counted: torch.Tensor) -> None:
    """Advantages of shape (B, T) are read per token: raise where they look as if K = T and they were per item.

    They do if the two readings differ and every rank that has no token has advantage 0.
    """
    belongs = counted & (item_ids >= 0) & (item_ids < counted.shape[1])
    ids = item_ids.long().where(belongs, 0)
    ranked = torch.zeros_like(ids).scatter_add(1, ids, belongs.long()) > 0
    differ = advantages.gather(1, ids)[belongs] != advantages[belongs]
    if bool(differ.any()) and bool((advantages[~ranked] == 0).all()):
        raise ValueError(
            f"advantages of shape {tuple(advantages.shape)} may be per token or per item here: "
            "say which by advantage_level='token' or 'item'"
        )


def _as_mask(completion_mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if not isinstance(completion_mask, torch.Tensor):
        raise TypeError(f"completion_mask must be a torch.Tensor, got {type(completion_mask).__name__}")
    if completion_mask.shape != shape:
        raise ValueError(f"completion_mask must have shape {tuple(shape)}, got {tuple(completion_mask.shape)}")
    mask = completion_mask.bool()
    if completion_mask.dtype != torch.bool and values_are_checked(completion_mask):
        other = completion_mask[completion_mask != mask]
        if other.numel():
            raise ValueError(f"completion_mask must hold 0 and 1, got {other[0].item()}")
    return mask


def _prepare(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """``values`` in float32 at least, and 0 (with no gradient) where they do not count."""
    return torch.where(counted, values.to(torch.promote_types(values.dtype, torch.float32)), 0.0)
