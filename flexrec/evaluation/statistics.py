"""How good rankings are, and how sure that is: metrics per list, confidence intervals, paired comparisons, tables.

Lists of one user resemble each other, so resampling and sign flips act on whole users ("clusters"): treating such lists
as independent would give intervals that are too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from flexrec.checks import check_number
from flexrec.metrics import parse_metric
from flexrec.ops.ranking_metric import ranking_metric

ONE_USER = "one user: no interval"
METRICS = ("ndcg@5", "ndcg@10", "ndcg@30", "recall@5", "mrr@5")
HEADLINE = "ndcg@5"

# ranker -> need -> metric -> (N,) values per list
_Results: TypeAlias = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]

# Resampled values held in memory at once (float64: 16 MB).
MAX_SAMPLES = 10_000_000
_CHUNK = 2_000_000


def rank_metrics(
    gains: np.ndarray | torch.Tensor | Sequence[np.ndarray],
    metrics: Sequence[str] = METRICS,
    *,
    lengths: np.ndarray | torch.Tensor | None = None,
    num_ranked: int | np.ndarray | torch.Tensor | None = None,
    topics: np.ndarray | torch.Tensor | None = None,
) -> dict[str, np.ndarray]:
    """The value of every metric for every list.

    Args:
        gains: the gains in rank order, >= 0: (N, K), or N arrays of their own lengths.
        metrics: names as in ``flexrec.metrics``.
        lengths: (N,) integer, the real K of ragged lists that are padded to one (N, K) array.
        num_ranked: int or (N,) integer, how many ranks are shown; the rest counts in ideals and totals only.
        topics: (N, K, C) in [0, 1], how much the item at each rank is about each topic, for those metrics that take it.

    Returns:
        For every metric (N,) float64.

    Raises:
        ValueError, TypeError: as ``flexrec.ranking_metric``; ``lengths`` beside a sequence of arrays.

    Example:
        >>> gains = np.array([[0.0, 1.0], [1.0, 0.0]])  # in rank order
        >>> values = flexrec.rank_metrics(gains, ["mrr", "recall@1"])
        >>> values["mrr"], values["recall@1"]
        (array([0.5, 1. ]), array([0., 1.]))
    """
    if not isinstance(gains, np.ndarray | torch.Tensor):
        if lengths is not None:
            raise ValueError("lengths are those of the arrays where gains is a sequence of arrays: pass None")
        rows = [np.asarray(row, dtype=np.float64) for row in gains]
        wrong = next((i for i, row in enumerate(rows) if row.ndim != 1), None)
        if wrong is not None:
            raise ValueError(f"gains[{wrong}] must have shape (K,), got {rows[wrong].shape}")
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        gains = np.zeros((len(rows), int(lengths.max(initial=0))))
        for padded, row in zip(gains, rows, strict=True):
            padded[: len(row)] = row
    table = torch.as_tensor(gains).double()
    sizes = None if lengths is None else torch.as_tensor(lengths)
    shown = num_ranked if num_ranked is None or isinstance(num_ranked, int) else torch.as_tensor(num_ranked)
    about = None if topics is None else torch.as_tensor(topics)

    def value(name: str) -> np.ndarray:
        of_topics = about if parse_metric(name).definition.form == "topics" else None
        return ranking_metric(table, name, lengths=sizes, num_ranked=shown, topics=of_topics).cpu().numpy()

    return {name: value(name) for name in metrics}


@dataclass(frozen=True)
class Comparison:
    """A ranker against another on the same lists.

    ``difference`` is mean_new - mean_base, ``percent`` the same in per cent of mean_base (NaN where that is 0); low and
    high are the ends of their confidence intervals, ``p_value`` is two-sided. The lists of a single user say nothing
    of others: intervals and p-value are NaN.

    Example:
        >>> found = flexrec.relative_change(np.array([0.6, 0.3]), np.array([0.4, 0.2]))
        >>> round(found.difference, 2), round(found.percent)
        (0.15, 50)
    """

    mean_new: float
    mean_base: float
    difference: float
    difference_low: float
    difference_high: float
    percent: float
    percent_low: float
    percent_high: float
    p_value: float


def bootstrap_interval(
    values: np.ndarray,
    *,
    clusters: np.ndarray | None = None,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron & Tibshirani 1993, chapter 13).

    Args:
        values: (N,) a value per list.
        clusters: (N,) the user of each list; whole users are resampled. None: every list is its own.
        level: coverage in (0, 1).
        num_samples: bootstrap samples.
        seed: of the resampling.

    Returns:
        The two ends. With a single cluster both are NaN: one user says nothing about the spread over users.

    Raises:
        ValueError: wrong shapes, no values, a value that is not finite, a level outside (0, 1).

    Example:
        >>> users = np.arange(100) // 2  # two lists of each
        >>> low, high = flexrec.bootstrap_interval(np.arange(100.0), clusters=users)
        >>> low < 49.5 < high
        True
    """
    sums, counts = cluster_sums([_values("values", values)], clusters)
    check_resampling(level, num_samples)
    if len(counts) == 1:
        return float("nan"), float("nan")
    means = np.concatenate([total[:, 0] / size for total, size in resampled(sums, counts, num_samples, seed)])
    return interval_of(means, level)


def relative_change(
    new: np.ndarray,
    base: np.ndarray,
    *,
    clusters: np.ndarray | None = None,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare a ranker with another, list by list.

    The intervals are paired percentile bootstraps: every sample takes the same users for both rankers, and yields a
    difference and a ratio of the two means. The p-value is of the paired permutation test: were the rankers equal, the
    sign of every user's summed difference would be a coin flip (Fisher 1935; Smucker et al. 2007 for ranking).
    p = (1 + flips at least as extreme as what was seen) / (1 + ``num_samples``).

    Args:
        new, base: (N,) values of one metric on the same lists, in the same order.
        clusters: (N,) the user of each list. None: every list is its own.
        level, num_samples, seed: as ``bootstrap_interval``.

    Returns:
        A ``Comparison``. Samples whose base mean is 0 count as an endless increase, or as no change if both are 0.

    Raises:
        ValueError: as ``bootstrap_interval``, and arrays of different lengths.

    Example:
        >>> before, after = np.array([0.2, 0.4, 0.3, 0.5]), np.array([0.3, 0.5, 0.4, 0.6])
        >>> found = flexrec.relative_change(after, before)
        >>> round(found.percent, 1), found.percent_low < found.percent < found.percent_high
        (28.6, True)
    """
    new, base = _values("new", new), _values("base", base)
    if len(new) != len(base):
        raise ValueError(f"new and base must have the same lists, got {len(new)} and {len(base)}")
    check_resampling(level, num_samples)
    sums, counts = cluster_sums([new, base], clusters)
    differences, percents = [], []
    for totals, size in resampled(sums, counts, num_samples, seed):
        differences.append((totals[:, 0] - totals[:, 1]) / size)
        percents.append(_percent(totals[:, 0], totals[:, 1]))
    difference_low, difference_high = interval_of(np.concatenate(differences), level)
    mean_new, mean_base = float(new.mean()), float(base.mean())
    if mean_base != 0:
        percent_low, percent_high = interval_of(np.concatenate(percents), level)
        percent = float(_percent(np.array(mean_new), np.array(mean_base)))
    else:
        percent = percent_low = percent_high = float("nan")
    p_value = _sign_flip_p_value(sums[:, 0] - sums[:, 1], num_samples, seed)
    if len(counts) == 1:
        difference_low = difference_high = percent_low = percent_high = p_value = float("nan")
    return Comparison(
        mean_new=mean_new,
        mean_base=mean_base,
        difference=mean_new - mean_base,
        difference_low=difference_low,
        difference_high=difference_high,
        percent=percent,
        percent_low=percent_low,
        percent_high=percent_high,
        p_value=p_value,
    )


def headline_of(metrics: Iterable[str], otherwise: str = HEADLINE) -> str:
    """What a need is compared by: its own metric of whole lists, if it was evaluated by one."""
    return next((name for name in metrics if parse_metric(name).definition.form == "topics"), otherwise)


def comparison_table(
    results: _Results,
    *,
    base: str = "base",
    headline: str = HEADLINE,
    clusters: np.ndarray | None = None,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
    pairs: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    title: str | None = None,
    caption: str | None = None,
    width: int | None = None,
) -> Table:
    """A table for the terminal: rankers per need, their means, and the change of ``headline`` against ``base``.

    A metric that is the same for every ranker tells them apart nowhere: it has no column, or an empty cell where that
    holds of one need only.

    Args:
        results: ranker -> need -> metric -> (N,) values per list, as ``rank_metrics`` gives them; all rankers have
            ranked the same lists in the same order. The order of the mappings is the order of the rows.
        base: the ranker that all others are compared with.
        headline: the metric of the comparison, but for needs that have a metric of their own.
        clusters: (N,) the user of each list.
        level, num_samples, seed: as ``bootstrap_interval``.
        pairs: further comparisons, each a row of differences below the rankers of a need: its name, and which ranker is
            compared with which.
        title, caption: above and below the table.
        width: of the terminal, in letters: metrics for which there is no room are left out, the last first, and the
            caption names them; None leaves none out.

    Raises:
        ValueError: no ``base``, a ranker without a need or a metric that ``base`` has, and as ``relative_change``.

    Example:
        >>> from flexrec.evaluation import comparison_table
        >>> def values(*numbers):
        ...     return {"interest": {"ndcg@5": np.array(numbers)}}
        ...
        >>> results = {"base": values(0.2, 0.4, 0.3), "trained": values(0.3, 0.6, 0.4)}
        >>> comparison_table(results).row_count  # the need, and a row for each ranker
        3
    """
    compare = partial(relative_change, clusters=clusters, level=level, num_samples=num_samples, seed=seed)
    header, rows = _table_cells(results, base, headline, level, compare, pairs)
    metrics = header[2:-3]
    for count in range(len(metrics), 0, -1):
        table = _table(header, rows, metrics[:count], pairs, title, _with_left_out(caption, metrics[count:]))
        if width is None or _width_of(table) <= width:
            break
    else:
        table = _table(header, rows, [], pairs, title, _with_left_out(caption, metrics))
    return table


def _table(
    header: list[str],
    rows: list[list[str]],
    metrics: list[str],
    pairs: Collection[str],
    title: str | None,
    caption: str | None,
) -> Table:
    """The need heads its rows, the interval stands behind its change, so that five metrics fit into some 90 letters."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, highlight=False, pad_edge=False, padding=0)
    table.add_column("ranker", no_wrap=True)
    for name in metrics:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(header[-3].replace(" against ", " vs "), justify="right", no_wrap=bool(metrics))
    previous = None
    for need, ranker, *cells, change, interval, p_value in rows:
        if need != previous:
            table.add_section()
            table.add_row(need, style="bold")
        said = f"{change} [{interval}]" if p_value else " ".join(filter(None, (change, interval)))
        said = f"{said} p {p_value}" if ranker in pairs and p_value else said
        table.add_row(f" {ranker}", *cells[: len(metrics)], said)
        previous = need
    return table


def _width_of(table: Table) -> int:
    """How many letters a table takes where there is room for any number of them."""
    wide = Console(width=10_000)
    return wide.measure(table).maximum


def _with_left_out(caption: str | None, left_out: list[str]) -> str | None:
    more = f"no room for {', '.join(left_out)}: see metrics.json" if left_out else None
    return ". ".join(filter(None, (caption, more))) or None


def comparison_markdown(
    results: _Results,
    *,
    base: str = "base",
    headline: str = HEADLINE,
    clusters: np.ndarray | None = None,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
    pairs: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> str:
    """The rows of ``comparison_table`` as a Markdown table (same arguments, same errors).

    Example:
        >>> from flexrec.evaluation import comparison_markdown
        >>> def values(*numbers):
        ...     return {"interest": {"ndcg@5": np.array(numbers)}}
        ...
        >>> results = {"base": values(0.2, 0.4, 0.3), "trained": values(0.3, 0.6, 0.4)}
        >>> print(comparison_markdown(results, num_samples=100).splitlines()[-1])
        | interest | trained | 0.433 | +44.4 % | +33.3, +50.0 | 0.257 |
    """
    compare = partial(relative_change, clusters=clusters, level=level, num_samples=num_samples, seed=seed)
    header, rows = _table_cells(results, base, headline, level, compare, pairs)
    rule = ["---" if column < 2 else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows]) + "\n"


def _table_cells(
    results: _Results,
    base: str,
    headline: str,
    level: float,
    compare: Callable[[np.ndarray, np.ndarray], Comparison],
    pairs: Mapping[str, tuple[str, str]],
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: need, row, metrics, change, its interval and p-value (or why there are none)."""
    if base not in results:
        raise ValueError(f"results must hold {base!r} to compare with, got {', '.join(results)}")
    constant = _constant_metrics(results, base)
    shown = {need: [m for m in values if m not in constant[need]] for need, values in results[base].items()}
    metrics = list(dict.fromkeys(metric for of_need in shown.values() for metric in of_need))
    headlines = {need: headline_of(values, headline) for need, values in results[base].items()}
    compared_by = " or ".join(dict.fromkeys(headlines.values())) or headline
    header = ["need", "ranker", *metrics, f"{compared_by} against {base}", f"{100 * level:g} % interval", "p"]

    def change(need: str, new: str, old: str) -> list[str]:
        if headline in constant[need]:
            return ["", "", ""]
        metric = headlines[need]
        return _change_cells(compare(results[new][need][metric], results[old][need][metric]))

    def cells(need: str, values: Mapping[str, float], form: str) -> list[str]:
        return [format(values[metric], form) if metric in shown[need] else "" for metric in metrics]

    rows = []
    for need in results[base]:
        means = {}
        for name, needs in results.items():
            values = needs.get(need, {})
            missing = [metric for metric in dict.fromkeys([*shown[need], headlines[need]]) if metric not in values]
            if missing:
                raise ValueError(f"results[{name!r}][{need!r}] has no {', '.join(missing)}")
            means[name] = {metric: float(np.mean(values[metric])) for metric in shown[need]}
            compared = ["", "", ""] if name == base else change(need, name, base)
            rows.append([need, name, *cells(need, means[name], ".3f"), *compared])
        for name, (new, old) in pairs.items():
            differences = {metric: means[new][metric] - means[old][metric] for metric in shown[need]}
            rows.append([need, name, *cells(need, differences, "+.3f"), *change(need, new, old)])
    return header, rows


def _change_cells(change: Comparison) -> list[str]:
    """Change, interval and p-value as a table shows them; differences where there is no per cent of 0."""
    if np.isnan(change.percent):
        values, unit = (change.difference, change.difference_low, change.difference_high), ("+.3f", "")
    else:
        values, unit = (change.percent, change.percent_low, change.percent_high), ("+.1f", " %")
    value, low, high = (format(number, unit[0]) for number in values)
    if np.isnan(change.p_value):
        return [value + unit[1], ONE_USER, ""]
    p_value = f"{change.p_value:.3f}" if change.p_value >= 0.001 else "< 0.001"
    return [value + unit[1], f"{low}, {high}", p_value]


def _constant_metrics(results: _Results, base: str) -> dict[str, set[str]]:
    """Of each need the metrics that are, list by list, the same for every ranker, of which there are several."""
    rankers = [name for name in results if name != base]
    return {
        need: {
            metric
            for metric, values in of_base.items()
            if rankers and all(np.array_equal(results[name].get(need, {}).get(metric, ()), values) for name in rankers)
        }
        for need, of_base in results[base].items()
    }


def _values(name: str, values: np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must have shape (N,) with N >= 1, got {array.shape}")
    if not np.isfinite(array).all():
        where = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, got {array[where]} at index {where}")
    return array


def check_resampling(level: float, num_samples: int) -> None:
    check_number("level", level)
    check_number("num_samples", num_samples, whole=True)
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"num_samples must be at least 1 and at most {MAX_SAMPLES}, got {num_samples}")


def cluster_sums(columns: list[np.ndarray], clusters: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums (C, len(columns)) of the values of each cluster, and their counts (C,)."""
    if clusters is None:
        return np.stack(columns, 1), np.ones(len(columns[0]))
    clusters = np.asarray(clusters)
    if clusters.shape != columns[0].shape:
        raise ValueError(f"clusters must have shape {columns[0].shape}, got {clusters.shape}")
    _, member = np.unique(clusters, return_inverse=True)
    return np.stack([np.bincount(member, column) for column in columns], 1), np.bincount(member).astype(np.float64)


def resampled(
    sums: np.ndarray, counts: np.ndarray, num_samples: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for chunks of S bootstrap samples of the C clusters, the totals (S, columns) and the sizes (S,)."""
    rng = np.random.default_rng(seed)
    num_clusters = len(counts)
    chunk = max(1, _CHUNK // num_clusters)
    for start in range(0, num_samples, chunk):
        size = min(chunk, num_samples - start)
        chosen = rng.integers(num_clusters, size=(size, num_clusters))
        # How often each cluster was drawn; one product then serves every column.
        flat = (chosen + num_clusters * np.arange(size)[:, None]).ravel()
        times = np.bincount(flat, minlength=size * num_clusters).reshape(size, num_clusters).astype(np.float64)
        yield times @ sums, times @ counts


def _sign_flip_p_value(differences: np.ndarray, num_samples: int, seed: int) -> float:
    """Two-sided p-value of the sum of the clusters' ``differences`` (C,) under random signs."""
    rng = np.random.default_rng([seed, 1])
    seen = abs(differences.sum())
    # Flips that give the same sum in another order of addition are as extreme as what was seen.
    threshold = seen - 1e-12 * np.abs(differences).sum()
    chunk = max(1, _CHUNK // len(differences))
    extreme = 0
    for start in range(0, num_samples, chunk):
        size = min(chunk, num_samples - start)
        signs = rng.integers(2, size=(size, len(differences)), dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ differences) >= threshold).sum())
    return (1 + extreme) / (1 + num_samples)


def _percent(new: np.ndarray, base: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((base == 0) & (new == 0), 0.0, 100 * (new - base) / base)


def interval_of(samples: np.ndarray, level: float) -> tuple[float, float]:
    # Order statistics, not interpolation: between two infinite samples that would be NaN.
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)
