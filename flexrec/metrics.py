"""Ranking metrics by name, and the ingredients that their swap rewards are built from.

Names follow ranx and ir_measures, values trec_eval. With g_k >= 0 the gain of the item at rank k (1-based), K
candidates of which the first T are ranked ("shown"), and n the cutoff (K where the name has no ``@n``):

====================  ============================================================================================
``dcg@n``             sum over k <= n of g_k / log2(k + 1)
``ndcg@n``            the same, divided by its value for the best order of all K candidates
``dcg_burges@n``,     the same two with gain 2^g - 1
``ndcg_burges@n``
``recall@n``          relevant items (g > 0) among the first n, divided by all relevant ones
``precision@n``       the same, divided by n, also where the list is shorter than n
``rbp.8@n``           (1 - p) sum of p^(k-1) over relevant items; the digits are the decimals of p, here 0.8
``hit_rate@n``        1 if any of the first n is relevant
``mrr@n``             1 / rank of the first relevant item, 0 if that is beyond n
``map@n``             sum of precision@k over relevant ranks k <= n, divided by the number of relevant items
``err@n``             sum of theta_k / k times the product of (1 - theta_i) over i < k, with
                      theta = (2^g - 1) / 2^g_max; g_max is the list's largest gain, or 4 when written ``err.4@n``
``alpha_ndcg@n``      sum over topics c and ranks k <= n of J_kc / log2(k + 1) times the product of (1 - J_ic / 2) over
                      i < k, with J_kc = m_kc g_k / g_max; divided by its value for the greedy order
``err_ia@n``          the mean over topics of err, with theta_kc = m_kc theta_k
====================  ============================================================================================

The last two are metrics of a list as a whole: m_kc in [0, 1] says how much the item at rank k is about topic c, so that
what an item is worth depends on what stands above it, and every function that takes such a metric takes ``topics=``.
alpha_ndcg is that of Clarke et al. (SIGIR 2008) with alpha = 1/2, to which it is equal where gains and topics are 0 or
1. Its best order is hard to find, and as is the custom (and as ndeval does) the normaliser is the value of the greedy
order, which takes at each rank what adds most; another order may have a value above 1. err_ia is that of Chapelle et
al. (2011). Topics count by their weights, equal unless given; err_ia divides by the weight of those topics that an item
of positive gain has, its intents.

Ranks beyond T have discount 0. Normalisers count all K candidates, ranked or not. A list without a positive gain has
value 0. ``flexrec.register_metric`` adds further names.

Nothing here needs torch or numba: kernels of every backend read a metric as what stands here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

import numpy as np

Form = Literal["linear", "first", "average_precision", "cascade", "topics", "custom"]
Discount = Literal["log", "uniform", "geometric", "reciprocal"]
Gain = Literal["gain", "burges", "burges_scaled", "binary", "stop", "share"]
Normaliser = Literal["one", "ideal", "relevant", "cutoff", "greedy", "intents"]


@dataclass(frozen=True)
class Family:
    """How a metric is computed: sum over ranks of discount x (term gain), combined as ``form`` says, / normaliser.

    ``decay``, of topics: how much of a topic an item uses up that has all of it, alpha of alpha_ndcg.
    """

    form: Form
    discount: Discount = "uniform"
    gain: Gain = "gain"
    normaliser: Normaliser = "one"
    decay: float = 1.0


FAMILIES: dict[str, Family] = {
    "dcg": Family("linear", "log", "gain"),
    "ndcg": Family("linear", "log", "gain", "ideal"),
    "dcg_burges": Family("linear", "log", "burges"),
    "ndcg_burges": Family("linear", "log", "burges_scaled", "ideal"),
    "recall": Family("linear", "uniform", "binary", "relevant"),
    "precision": Family("linear", "uniform", "binary", "cutoff"),
    "rbp": Family("linear", "geometric", "binary"),
    "hit_rate": Family("first", "uniform", "binary"),
    "mrr": Family("first", "reciprocal", "binary"),
    "map": Family("average_precision", "reciprocal", "binary", "relevant"),
    "err": Family("cascade", "reciprocal", "stop"),
    "alpha_ndcg": Family("topics", "log", "share", "greedy", decay=0.5),
    "err_ia": Family("topics", "reciprocal", "stop", "intents"),
}
OF_TOPICS = tuple(name for name, family in FAMILIES.items() if family.form == "topics")

CUSTOM = Family("custom")  # of registered metrics

# Gains above this overflow somewhere in float32; normalisers below TINY count as "no positive gain".
MAX_GAIN = 1e30
MAX_EXPONENT = 100.0  # the largest gain whose 2^g may appear in a result (dcg_burges)
TINY = 1e-300
LN2 = math.log(2.0)

CREDITS = ("swap", "noncausal", "independent", "rank", "sequence", "policy")  # see ``flexrec.swap_rewards``
BASELINES, SCALES = ("none", "rank", "group"), ("rank", "group", "batch", "none")  # see ``flexrec.item_advantages``
IMPORTANCE_LEVELS = ("item", "token", "sequence")  # see ``flexrec.policy_loss``

custom_metrics: dict[str, Any] = {}  # name -> numba-compiled f(gains float64[:], num_ranked int64) -> float64
_NAME = re.compile(r"(?P<family>[a-z][a-z0-9_]*)(?:\.(?P<parameter>[0-9]+(?:\.[0-9]+)?))?(?:@(?P<cutoff>[0-9]+))?")


@dataclass(frozen=True)
class Metric:
    """A metric: its family, cutoff (None: the list's length), ``rbp``'s persistence p, the largest gain of ``err`` and
    ``err_ia``.

    ``definition`` is how it is computed; its form is "custom" for registered ones.
    """

    family: str
    cutoff: int | None = None
    p: float | None = None
    max_gain: float | None = None
    definition: Family = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "definition", FAMILIES.get(self.family, CUSTOM))
        if self.family not in FAMILIES and self.family not in custom_metrics:
            raise ValueError(_unknown(self.family))
        if self.cutoff is not None and (not isinstance(self.cutoff, int) or self.cutoff < 1):
            raise ValueError(f"metric {self.family!r}: the cutoff after '@' must be an integer >= 1, got {self.cutoff}")
        if self.family == "rbp" and (self.p is None or not 0.0 < self.p < 1.0):
            raise ValueError(
                f"metric 'rbp' needs a persistence strictly between 0 and 1, written as its decimals: "
                f"'rbp.8' is p = 0.8; got {self.p}"
            )
        if self.family != "rbp" and self.p is not None:
            raise ValueError(f"metric {self.family!r} takes no parameter, got p = {self.p}; only 'rbp' has one")
        if self.max_gain is not None and (self.definition.gain != "stop" or not 0.0 < self.max_gain <= MAX_EXPONENT):
            raise ValueError(
                f"metric {self.family!r}: a largest gain goes with 'err' and 'err_ia' only ('err.4@10') and lies in "
                f"(0, {MAX_EXPONENT:g}], got {self.max_gain}"
            )

    def __str__(self) -> str:
        parameter = ""
        if self.p is not None:
            parameter = format(Decimal(repr(self.p)), "f").removeprefix("0")
        elif self.max_gain is not None:
            parameter = "." + format(Decimal(repr(self.max_gain)), "f").removesuffix(".0")
        return self.family + parameter + ("" if self.cutoff is None else f"@{self.cutoff}")


def _unknown(name: str) -> str:
    own = f"; registered: {', '.join(sorted(custom_metrics))}" if custom_metrics else ""
    return f"metric must be one of {', '.join(FAMILIES)}, each with an optional cutoff ('ndcg@10'){own}; got {name!r}"


def parse_metric(name: str | Metric) -> Metric:
    """Read a metric name such as "ndcg@10", "rbp.8", "rbp.95@20", "err.4@10" or the name of a registered metric.

    Raises:
        ValueError: the name is malformed or unknown, the cutoff is below 1, or a parameter is missing or out of range.
        TypeError: ``name`` is neither a string nor a Metric.
    """
    if isinstance(name, Metric):
        return name
    if not isinstance(name, str):
        raise TypeError(f"metric must be a string or a Metric, got {type(name).__name__}")
    return _read_cached(name)


def read_name(name: str) -> Metric:
    """:func:`parse_metric` of a string, without its cache."""
    match = _NAME.fullmatch(name)
    if match is None or (match["family"] not in FAMILIES and match["family"] not in custom_metrics):
        raise ValueError(_unknown(name))
    family, parameter = match["family"], match["parameter"]
    cutoff = None if match["cutoff"] is None else int(match["cutoff"])
    if parameter is None:
        return Metric(family, cutoff)
    if family in ("err", "err_ia"):
        return Metric(family, cutoff, max_gain=float(parameter))
    # ".8" is written without its 0; "rbp.0.8" says the same.
    return Metric(family, cutoff, p=float(parameter if "." in parameter else "0." + parameter))


_read_cached = lru_cache(maxsize=256)(read_name)  # names are never forgotten, and errors are not kept


def largest_gain(metric: Metric) -> float:
    """Gains above it are an error."""
    return metric.max_gain or (MAX_EXPONENT if metric.family == "dcg_burges" else MAX_GAIN)


@lru_cache(maxsize=256)
def discount_table(metric: Metric, size: int) -> np.ndarray:
    """(size,) float64: the discount of each rank, before any cutoff. Cached: do not write to it."""
    rank = np.arange(1, size + 1, dtype=np.float64)
    kind = metric.definition.discount
    if kind == "log":
        return 1.0 / np.log2(rank + 1.0)
    if kind == "reciprocal":
        return 1.0 / rank
    if kind == "geometric":
        assert metric.p is not None
        return (1.0 - metric.p) * metric.p ** (rank - 1.0)
    return np.ones(size)


# Ties in the greedy order of a metric of topics are broken by what an item is, never by where it stands, so that every
# backend finds the same order for all rankings of a list.
TIE = 1e-9  # what adds less than the best by no more than this share of it adds as much


def tie_weights(num_topics: int) -> np.ndarray:
    """(C,) float64 in [1, 2), of each topic another: of items that add as much, the one whose worth to the topics has
    the largest sum by these weights is taken."""
    return 1.0 + np.arange(1, num_topics + 1) * (math.sqrt(5.0) - 1.0) / 2.0 % 1.0
