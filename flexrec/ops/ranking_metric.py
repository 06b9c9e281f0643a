"""The value of a ranking metric, and what it is made of in torch: checked lists, term gains, discounts, normalisers.

Which metrics there are, and by what names, stands in ``flexrec.metrics``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from flexrec import metrics
from flexrec.checks import check_finite, check_range, check_tensor, lies_within, values_are_checked
from flexrec.metrics import (
    FAMILIES,
    LN2,
    MAX_GAIN,
    OF_TOPICS,
    TIE,
    TINY,
    Metric,
    discount_table,
    largest_gain,
    tie_weights,
)
from flexrec.numba_kernels import OutOfRange
from flexrec.ops.library import kernels, numba_reads


def metric_of(name: str | Metric) -> Metric:
    """:func:`flexrec.metrics.parse_metric`; without its cache under torch.compile, which warns of caches."""
    is_plain = isinstance(name, str) and torch.compiler.is_compiling()
    return metrics.read_name(name) if is_plain else metrics.parse_metric(name)  # type: ignore[arg-type]


def ranking_metric(
    gains: torch.Tensor,
    metric: str | Metric,
    *,
    lengths: int | torch.Tensor | None = None,
    num_ranked: int | torch.Tensor | None = None,
    topics: torch.Tensor | Topics | None = None,
) -> torch.Tensor:
    """The value of a metric for each ranked list.

    Args:
        gains: (N, K) floating, >= 0; the gain of the item at each rank. Any device.
        metric: a name such as "ndcg@10" (see ``flexrec.metrics``) or a registered one (CPU only).
        lengths: int or (N,) integer, the number of candidates of each list; positions beyond it are ignored.
        num_ranked: int or (N,) integer, how many ranks are shown. The rest has discount 0 but counts in normalisers.
        topics: with "alpha_ndcg" and "err_ia" only: (N, K, C) floating in [0, 1], how much the item at each rank is
            about each topic, or :class:`Topics`.

    Returns:
        (N,) float64 for float64 gains, else float32. No gradient.

    Raises:
        ValueError, TypeError: unknown metric, wrong shape or dtype, a gain that is negative, NaN or infinite, a length
            or ``num_ranked`` outside [0, K], topics where there must be none or none where there must be.

    Example:
        >>> gains = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])  # two lists, in rank order
        >>> flexrec.ranking_metric(gains, "mrr")
        tensor([0.5000, 1.0000])
        >>> flexrec.ranking_metric(gains, "recall@2")
        tensor([1.0000, 0.5000])
        >>> about = torch.eye(2)[torch.tensor([[0, 0, 1], [0, 0, 1]])]  # the first two items have the same topic
        >>> flexrec.ranking_metric(torch.ones(2, 3), "alpha_ndcg@2", topics=about)  # more of the same is worth less
        tensor([0.8066, 0.8066])
    """
    metric = metric_of(metric)
    by_numba = metric.definition.form not in ("custom", "topics") and isinstance(gains, torch.Tensor)
    by_numba = by_numba and numba_reads(gains)
    lists = check_lists(gains, lengths, num_ranked)
    if not by_numba:
        check_gain_values(lists, metric)
    about = check_topics(topics, metric, lists)
    if by_numba and lists.gains.shape[1]:
        rewards = call_kernels("numba", "swap_rewards", lists, metric, "sequence")[0]  # each is the value of the list
        return as_result(rewards[:, 0].contiguous(), lists.gains)
    if metric.definition.form == "custom":
        value = of_registered("custom_prefix_values", lists, metric)[:, -1]
        check_finite(f"the value of metric {metric}", value)
    else:
        value = metric_terms(ingredients(lists, metric, topics=about), metric).sum(-1)
    return as_result(value, lists.gains)


def register_metric(name: str, f: Callable[[Any, int], float]) -> None:
    """Make ``f(gains_in_rank_order, num_ranked) -> float`` usable under ``name`` wherever a metric name is, on the CPU.

    Args:
        name: lower-case letters, digits and "_"; a name registered before is replaced. "name@n" then calls ``f`` with
            ``num_ranked`` at most n.
        f: a function that numba can compile. It gets the gains of one list (all K of them, float64, rank order) and the
            number of ranks that are shown, and must not write to the gains. It is not called for a list without a
            positive gain: such a list has value 0.

    Raises:
        ValueError: the name is malformed or belongs to a built-in metric.
        TypeError: ``f`` is not callable, or numba cannot compile it, or it does not return a float.

    Example:
        >>> def last_word(gains, num_ranked):
        ...     return gains[num_ranked - 1]
        ...
        >>> flexrec.register_metric("last_word", last_word)
        >>> flexrec.ranking_metric(torch.tensor([[0.0, 1.0, 3.0]]), "last_word@2")
        tensor([1.])
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name must be lower-case letters, digits and '_', starting with a letter; got {name!r}")
    if name in FAMILIES:
        raise ValueError(f"name must not be that of a built-in metric, got {name!r}")
    if not callable(f):
        raise TypeError(f"f must be a function f(gains_in_rank_order, num_ranked) -> float, got {type(f).__name__}")
    metrics.custom_metrics[name] = kernels("numba", "custom_metrics").compile_custom_metric(name, f)


# --- checked lists ----------------------------------------------------------------------------------------------------


class Lists(NamedTuple):
    """A checked batch of ranked lists: gains (N, K), and how much of each row counts."""

    gains: torch.Tensor  # (N, K) floating, rank order
    lengths: torch.Tensor | None  # (N,) int64, the real K of each list; None: K
    num_ranked: torch.Tensor | None  # (N,) int64, ranks shown; None: max_ranked
    max_ranked: int  # no list shows more ranks than this

    @property
    def real_lengths(self) -> torch.Tensor:
        """(N,) int64: candidates of each list."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((self.gains.shape[0],), self.gains.shape[1], device=self.gains.device)

    @property
    def real_ranked(self) -> torch.Tensor:
        """(N,) int64: ranks that each list shows."""
        shown = self.real_lengths.clamp(max=self.max_ranked)
        return shown if self.num_ranked is None else torch.minimum(shown, self.num_ranked)

    @property
    def inside(self) -> torch.Tensor:
        """(N, K) bool: each list's own positions."""
        return torch.arange(self.gains.shape[1], device=self.gains.device) < self.real_lengths[:, None]


def check_lists(
    gains: torch.Tensor, lengths: int | torch.Tensor | None, num_ranked: int | torch.Tensor | None
) -> Lists:
    """Check the arguments that all functions of this kind share, see ``ranking_metric`` for their meaning; but for the
    values of the gains (``check_gain_values``)."""
    check_tensor("gains", gains, ("N", "K"))
    gains = gains.detach() if gains.requires_grad else gains
    size = gains.shape[1]
    ragged = _counts("lengths", lengths, gains)
    if isinstance(num_ranked, torch.Tensor) or num_ranked is None:
        return Lists(gains, ragged, _counts("num_ranked", num_ranked, gains), size)
    return Lists(gains, ragged, None, _count("num_ranked", num_ranked, size))


def _count(name: str, value: object, size: int) -> int:
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} must be an int or an integer tensor of shape (N,), got {type(value).__name__}"
        ) from None
    if not 0 <= count <= size:
        raise ValueError(f"{name} must lie in [0, {size}], got {count}")
    return count


def _counts(name: str, value: int | torch.Tensor | None, gains: torch.Tensor) -> torch.Tensor | None:
    if value is None:
        return None
    rows, size = gains.shape
    if not isinstance(value, torch.Tensor):
        return torch.full((rows,), _count(name, value, size), device=gains.device)
    check_tensor(name, value, (rows,), "integer")
    if value.device != gains.device:
        raise ValueError(f"{name} must be on the device of gains, {gains.device}; got {value.device}")
    check_range(name, value, 0, size)
    return value.to(torch.int64)


def check_gain_values(lists: Lists, metric: Metric, variance: torch.Tensor | None = None) -> None:
    """Raise ValueError at the first gain, or variance (N, K) of one, inside its list's length and out of its range."""
    gains, high = lists.gains, largest_gain(metric)
    if values_are_checked(gains) and not lies_within(gains, 0.0, high):
        check_finite("gains", gains, lists.inside)
        check_range("gains", gains, 0, high, lists.inside)
    if variance is not None:
        inside = lists.inside
        check_finite("variance", variance, inside)
        check_range("variance", variance, 0.0, math.inf, inside)
        if metric.definition.gain == "binary":
            check_range(f"gains, as probabilities of relevance for {metric.family},", gains, 0.0, 1.0, inside)


def call_kernels(backend: str, name: str, lists: Lists, metric: Metric, *arguments: Any, **options: Any) -> Any:
    """The function ``name`` of the backend's module ``name``; numba's checks gains and variance while it reads them."""
    counts = {"lengths": lists.lengths, "num_ranked": lists.num_ranked, "max_ranked": lists.max_ranked}
    try:
        return getattr(kernels(backend, name), name)(lists.gains, metric, *arguments, **counts, **options)
    except OutOfRange:
        check_gain_values(lists, metric, options.get("variance"))  # says where
        raise


# --- topics -----------------------------------------------------------------------------------------------------------


class Topics(NamedTuple):
    """What the items of ranked lists are about, where they share a catalogue, or where topics count differently.

    Attributes:
        matrix: (I, C) floating in [0, 1], how much each item of a catalogue is about each topic.
        items: (N, K) integer, the row of ``matrix`` of the item at each rank; None: rows are those of one list after
            the other, I = N K.
        weights: (C,) or (N, C) floating, >= 0, how much each topic counts, such as a user's interest in it; None: all
            the same.

    Example:
        >>> catalogue = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # the items 0 and 1 are about a topic each
        >>> ranked = torch.tensor([[1, 0, 1]])
        >>> topics = flexrec.Topics(catalogue, ranked, weights=torch.tensor([1.0, 0.0]))  # the second interests nobody
        >>> flexrec.ranking_metric(torch.ones(1, 3), "err_ia", topics=topics)
        tensor([0.2500])
    """

    matrix: torch.Tensor
    items: torch.Tensor | None = None
    weights: torch.Tensor | None = None


def check_topics(topics: torch.Tensor | Topics | None, metric: Metric, lists: Lists) -> Topics | None:
    """The topics of checked lists as ``Topics`` with weights (N, C) float64; None for metrics that have none."""
    if metric.definition.form != "topics":
        if topics is not None:
            raise ValueError(f"topics go with {' and '.join(OF_TOPICS)} only, got metric={str(metric)!r}")
        return None
    if topics is None:
        raise ValueError(
            f"metric {str(metric)!r} is of a list with topics: give topics=(N, K, C), how much the item at each rank "
            "is about each topic"
        )
    gains = lists.gains
    rows, size = gains.shape
    inside = lists.inside
    if isinstance(topics, torch.Tensor):
        check_tensor("topics", topics, (rows, size, "C"))
        topics = Topics(topics.reshape(rows * size, topics.shape[2]))
    matrix, items, weights = topics
    check_tensor("the matrix of topics", matrix, (rows * size if items is None else "I", "C"))
    columns = matrix.shape[1]
    if not columns:
        raise ValueError(f"topics must have at least one column, got {tuple(matrix.shape)}")
    given = {"the matrix of topics": matrix}
    if items is not None:
        given["the items of topics"] = check_tensor("the items of topics", items, (rows, size), "integer")
    if weights is not None:
        shape = (columns,) if isinstance(weights, torch.Tensor) and weights.dim() == 1 else (rows, columns)
        given["the weights of topics"] = check_tensor("the weights of topics", weights, shape)
    for name, tensor in given.items():
        if tensor.device != gains.device:
            raise ValueError(f"{name} must be on the device of gains, {gains.device}; got {tensor.device}")
    matrix = matrix.detach()
    if items is not None:
        items = torch.where(inside, items, 0).long()  # what lies beyond a list's length is not read
    if items is not None and inside.numel():
        check_range("the items of topics", items, 0, len(matrix) - 1)
    if values_are_checked(matrix) and not lies_within(matrix, 0.0, 1.0):
        used = inside.reshape(-1, 1).expand_as(matrix) if items is None else None
        check_finite("topics", matrix, used)
        check_range("topics", matrix, 0.0, 1.0, used)
    weights = torch.ones((), device=gains.device) if weights is None else weights.detach()
    check_finite("the weights of topics", weights)
    check_range("the weights of topics", weights, 0.0, MAX_GAIN)
    return Topics(matrix, items, weights.double().expand(rows, columns))


def greedy(worth: torch.Tensor, weights: torch.Tensor, decay: float, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that takes at each rank the item that adds most, given those before it.

    Ties are broken as ``flexrec.metrics.tie_weights`` says: the order of the items does not matter.

    Args:
        worth: (N, K, C) float64 in [0, 1], of each item to each topic; negative where there is no item.
        weights: (N, C) float64, of the topics.
        depth: how many ranks, at most K.

    Returns:
        (N, depth) int64, the item at each rank, -1 where none is left; (N, depth) float64, what it adds.
    """
    keys = worth @ torch.from_numpy(tie_weights(worth.shape[2])).to(worth.device)  # (N, K)
    taken = (worth < 0).any(-1)  # (N, K)
    left, order, added = weights, [], []
    for _ in range(depth):
        adds = torch.where(taken, -1.0, (worth @ left[:, :, None])[:, :, 0])  # (N, K)
        best = adds.amax(-1, keepdim=True)  # (N, 1)
        chosen = torch.where(~taken & (adds >= best * (1.0 - TIE)), keys, -1.0).argmax(-1, keepdim=True)  # (N, 1)
        order.append(torch.where(best < 0.0, -1, chosen))
        added.append(best.clamp(min=0.0))
        taken = taken.scatter(1, chosen, True)
        left = left * (1.0 - decay * worth.gather(1, chosen[:, :, None].expand(-1, -1, worth.shape[2]))[:, 0])
    if not depth:
        return torch.empty_like(worth[:, :0, 0], dtype=torch.int64), worth[:, :0, 0]
    return torch.cat(order, dim=1), torch.cat(added, dim=1)


def greedy_ranking(
    gains: torch.Tensor,
    metric: str | Metric,
    *,
    topics: torch.Tensor | Topics,
    lengths: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The greedy order of a metric of topics: at each rank the candidate that adds most to what stands above it.

    Args:
        gains, topics: as of :func:`ranking_metric`, in any order of the candidates.
        metric: "alpha_ndcg" or "err_ia"; their cutoff says how many ranks are filled.
        lengths: as of :func:`ranking_metric`.

    Returns:
        (N, n) int64, the position of the candidate at each rank, -1 beyond a list's length.

    Example:
        >>> from flexrec.ops.ranking_metric import greedy_ranking
        >>> gains, about = torch.tensor([[1.0, 0.9, 0.6]]), torch.eye(2)[torch.tensor([[0, 0, 1]])]
        >>> greedy_ranking(gains, "alpha_ndcg", topics=about)  # the last one is of another topic than the first
        tensor([[0, 2, 1]])
    """
    metric = metric_of(metric)
    lists = check_lists(gains, lengths, None)
    check_gain_values(lists, metric)
    about = check_topics(topics, metric, lists)
    if about is None:
        raise ValueError(f"metric must be one of {', '.join(OF_TOPICS)}, got {str(metric)!r}")
    parts, size = ingredients(lists, metric, topics=about), gains.shape[1]
    depth = size if metric.cutoff is None else min(size, metric.cutoff)
    return greedy(parts.worth, parts.topic_weights, parts.decay, depth)[0]


# --- what metrics are made of -----------------------------------------------------------------------------------------


def term_gains(gains: torch.Tensor, metric: Metric, *, probabilities: bool = False) -> torch.Tensor:
    """(N, K) float64: what a metric makes of each gain; ``gains`` (N, K) float64 is 0 beyond a list's length.

    ``probabilities`` reads the gains of binary metrics as probabilities of relevance, instead of thresholding them.
    """
    kind = metric.definition.gain
    if kind == "binary":
        return gains if probabilities else (gains > 0).double()
    if kind == "burges":
        return torch.where(gains < 1.0, torch.expm1(gains * LN2), torch.exp2(gains) - 1.0)  # no digit lost near 0
    if kind == "gain":
        return gains
    if kind == "share":
        return gains / gains.amax(-1, keepdim=True).clamp(min=TINY)
    # (2^g - 1) / 2^top = 2^(g - top) (1 - 2^-g): no overflow, whatever the gain. Where top is the list's largest gain
    # this is ERR's theta, and for ndcg_burges a factor that the normaliser takes out again.
    top = gains.amax(-1, keepdim=True) if metric.max_gain is None else torch.full_like(gains[:, :1], metric.max_gain)
    return torch.exp2(gains - top) * -torch.expm1(gains * -LN2)


_NO_TOPICS = torch.empty(0)


@dataclass(frozen=True)
class Ingredients:
    """What every closed form is built from: R = (combination of discounts and term gains) x inverse normaliser."""

    length: torch.Tensor  # (N, 1) int64
    num_ranked: torch.Tensor  # (N, 1) int64
    inside: torch.Tensor  # (N, K) bool, the list's own positions
    discount: torch.Tensor  # (N, K) float64, 0 beyond cutoff, num_ranked and length
    weight: torch.Tensor  # (N, K) float64, the term gains; 0 beyond length
    inverse_norm: torch.Tensor  # (N, 1) float64; 0 for a list without a positive gain
    decay: float = 1.0
    about: torch.Tensor = _NO_TOPICS  # (N, K, C) float64, of metrics of topics
    topic_weights: torch.Tensor = _NO_TOPICS  # (N, C) float64

    @property
    def worth(self) -> torch.Tensor:
        """(N, K, C) float64 of each item to each topic; -1 where there is no item."""
        return torch.where(self.inside[:, :, None], self.weight[:, :, None] * self.about, -1.0)

    def by_topic(self) -> Ingredients:
        """Each topic of a list as a list of its own, (N C, K): what each item is worth to that topic alone."""
        columns = self.about.shape[2]
        weight = (self.weight[:, None] * self.about.transpose(1, 2)).flatten(0, 1)
        length, ranked, inside, discount = (
            x.repeat_interleave(columns, dim=0) for x in (self.length, self.num_ranked, self.inside, self.discount)
        )
        return Ingredients(length, ranked, inside, discount, weight, torch.ones_like(weight[:, :1]), self.decay)

    def over_topics(self, values: torch.Tensor) -> torch.Tensor:
        """(N, ..): the sum over topics, by their weights, of ``values`` (N C, ..) of ``by_topic``."""
        return torch.einsum("nc,nc...->n...", self.topic_weights, values.unflatten(0, self.topic_weights.shape))


def ingredients(
    lists: Lists, metric: Metric, *, probabilities: bool = False, topics: Topics | None = None
) -> Ingredients:
    """Discounts, term gains and normalisers of a checked batch, in float64."""
    size = lists.gains.shape[1]
    length, ranked = lists.real_lengths[:, None], lists.real_ranked[:, None]  # (N, 1)
    position = torch.arange(size, device=lists.gains.device)  # (K,)
    inside = position < length  # (N, K)
    table = torch.from_numpy(discount_table(metric, size)).to(lists.gains.device)  # (K,)
    cutoff = size if metric.cutoff is None else metric.cutoff
    discount = table * (position < ranked.clamp(max=cutoff))  # (N, K)
    gains = torch.where(inside, lists.gains.double(), 0.0)  # (N, K)
    weight = term_gains(gains, metric, probabilities=probabilities) if size else gains  # (N, K)

    parts = Ingredients(length, ranked, inside, discount, weight, torch.ones_like(length).double())
    if topics is not None and topics.weights is not None:
        about = topics.matrix.view(*weight.shape, -1) if topics.items is None else topics.matrix[topics.items]
        about = torch.where(inside[:, :, None], about.double(), 0.0)  # (N, K, C)
        parts = replace(parts, decay=metric.definition.decay, about=about, topic_weights=topics.weights)
    kind = metric.definition.normaliser
    if kind == "greedy":
        best = table[:cutoff]
        norm = (greedy(parts.worth, parts.topic_weights, parts.decay, len(best))[1] * best).sum(-1, keepdim=True)
    elif kind == "intents":
        norm = (parts.topic_weights * (parts.worth > 0).any(1)).sum(-1, keepdim=True)
    elif kind == "ideal":
        norm = (weight.sort(-1, descending=True).values * table)[:, :cutoff].sum(-1, keepdim=True)
    elif kind == "relevant":
        norm = weight.sum(-1, keepdim=True)
    elif kind == "cutoff":
        norm = length.double() if metric.cutoff is None else torch.full_like(length, metric.cutoff).double()
    else:
        return parts
    return replace(parts, inverse_norm=torch.where(norm > TINY, 1.0 / norm, 0.0))


def metric_terms(parts: Ingredients, metric: Metric) -> torch.Tensor:
    """(N, K) float64: what R gains when rank k is shown besides ranks 1..k-1. Their sum over k is R.

    Linear metrics: discount x term gain. mrr, hit_rate: all of R at the first relevant rank. map: precision@k at a
    relevant rank. err: 1/k times the probability that the user stops at rank k. alpha_ndcg, err_ia: the same of each
    topic, summed.
    """
    form, d, w = metric.definition.form, parts.discount, parts.weight
    if form == "topics":
        each = parts.by_topic()
        term = parts.over_topics(each.discount * each.weight * reach(parts.decay * each.weight))
    elif form == "first":
        term = d * w * (w.cumsum(-1) == 1)
    elif form == "average_precision":
        term = d * w * w.cumsum(-1)
    elif form == "cascade":
        term = d * w * reach(w)
    else:
        term = d * w
    return term * parts.inverse_norm


def reach(theta: torch.Tensor) -> torch.Tensor:
    """(.., K): the probability that a user who stops at rank i with probability theta_i gets as far as rank k."""
    passed = (1.0 - theta).cumprod(-1)
    return torch.cat([torch.ones_like(passed[..., :1]), passed[..., :-1]], dim=-1) if theta.shape[-1] else passed


def result_dtype(gains: torch.Tensor) -> torch.dtype:
    """float64 for float64 gains, float32 for float32, float16 and bfloat16."""
    return torch.float64 if gains.dtype == torch.float64 else torch.float32


def as_result(x: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype of results; ``Tensor.to`` takes as long as some kernels where there is nothing to do."""
    return x if x.dtype == result_dtype(gains) else x.to(result_dtype(gains))


def of_registered(name: str, lists: Lists, metric: Metric) -> torch.Tensor:
    """Of a registered metric, float64: (N, K + 1) "custom_prefix_values", its value with 0, 1, .. K ranks shown, no
    more than there are; or (N, K, K) "custom_swap_scores"."""
    if lists.gains.device.type != "cpu":
        raise ValueError(f"metric {metric} is a registered one: gains must be on the CPU, got {lists.gains.device}")
    cutoff = lists.gains.shape[1] if metric.cutoff is None else metric.cutoff
    shown, gains = lists.real_ranked.clamp(max=cutoff), lists.gains.double().contiguous()
    function = getattr(kernels("numba", "custom_metrics"), name)
    own = metrics.custom_metrics[metric.family]
    return torch.from_numpy(function(own, gains.numpy(), lists.real_lengths.numpy(), shown.numpy()))
