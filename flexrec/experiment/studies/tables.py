"""What a study's runs say, as rows of CSV files: means of conditions, comparisons of its tables, and what it cost."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexrec.evaluation.statistics import relative_change
from flexrec.experiment.studies.design import Study, Table

VALUES, COMPARISONS, COSTS = "values.csv", "comparisons.csv", "costs.csv"
NUM_SAMPLES = 20_000  # a p-value is at least 1 / 20,001, which stays below 0.01 among 200 comparisons
_GENERATED = "simulated", "none"  # worlds of their own for every seed; else a user is the same in all


@dataclass(frozen=True)
class Result:
    """What one run found of one row of a table: the mean of a metric, and the units that it is the mean of."""

    labels: Mapping[str, str]
    seed: int
    metric: str
    mean: float
    units: Mapping[str, tuple[float, int]]  # unit -> its value, and of how many lists

    @property
    def condition(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(self.labels.items()))


def results_of(lines: Iterable[Mapping[str, Any]]) -> list[Result]:
    """The results of all runs; those of a result's own labels count where a run has the same."""
    found = []
    for line in lines:
        world = f"{line['seed']}/" if line["labels"].get("dataset") in _GENERATED else ""
        for one in line["results"]:
            own = {
                name: str(v) for name, v in one.items() if name not in ("metric", "mean", "units", "values", "counts")
            }
            values = one.get("values", ())
            counts = one.get("counts", [1] * len(values))
            units = one.get("units", range(len(values)))
            of_units = {f"{world}{u}": (v, n) for u, v, n in zip(units, values, counts, strict=True)}
            found.append(Result({**line["labels"], **own}, line["seed"], one["metric"], one["mean"], of_units))
    return found


def values_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each condition and metric: labels, how many seeds, their mean and standard deviation."""
    names = list(dict.fromkeys(name for result in results for name in result.labels))
    found: dict[tuple[Any, str], list[float]] = defaultdict(list)
    for result in results:
        found[tuple(result.labels.get(name, "") for name in names), result.metric].append(result.mean)
    return [
        {
            **dict(zip(names, levels, strict=True)),
            "metric": metric,
            "seeds": len(means),
            "mean": _number(float(np.mean(means))),
            "sd": _number(float(np.std(means, ddof=1))) if len(means) > 1 else "",
        }
        for (levels, metric), means in found.items()
    ]


def cost_rows(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each part and data set: how many runs, the most steps and rollouts of one, and CPU minutes of all."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["labels"].get("part", ""), line["labels"].get("dataset", "")].append(line)
    found = []
    for (part, dataset), of_group in groups.items():
        own = sum(line["cpu_seconds"][1] for line in of_group)
        starts = {(line["seed"], line["cpu_seconds"][0]) for line in of_group}
        found.append(
            {
                "part": part,
                "dataset": dataset,
                "runs": len(of_group),
                "seeds": len({line["seed"] for line in of_group}),
                "steps": max(line["steps"] for line in of_group),
                "rollouts": max(line["rollouts"] for line in of_group),
                "cpu_minutes": f"{(own + sum(seconds for _, seconds in starts)) / 60:.1f}",
            }
        )
    return found


def comparison_rows(study: Study, results: Sequence[Result], *, num_samples: int = NUM_SAMPLES) -> list[dict[str, Any]]:
    """A row for each comparison of the study's tables.

    Differences are means over the units of all seeds that have both, with 95 % intervals by a paired bootstrap of
    units and two-sided p-values by flipping the signs of units; ``p_holm`` is adjusted over the table. ``effect`` is
    the mean difference of a unit over the standard deviation of these differences.
    """
    found = []
    for table in study.tables:
        if table.only_means:
            continue
        rows = list(_compared(study, table, results, num_samples))
        adjusted = holm([row["p"] for row in rows])
        found += [{**row, "p": f"{row['p']:.5f}", "p_holm": f"{p:.5f}"} for row, p in zip(rows, adjusted, strict=True)]
    return found


def _compared(study: Study, table: Table, results: Sequence[Result], num_samples: int) -> Iterable[dict[str, Any]]:
    chosen = [result for result in results if belongs(table, result.labels, result.metric)]
    by_column: dict[str, dict[str, dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
    for result in chosen:
        of_row = by_column[column_of(table, result.labels)][result.labels[table.rows]]
        if result.seed in of_row:
            more = sorted(set(result.labels) - {table.rows, *table.columns})
            raise ValueError(f"table {table.name!r} has several results in a cell: it must say which of {more}")
        of_row[result.seed] = result

    def place(column: str) -> list[int]:
        one = next(result for result in chosen if column_of(table, result.labels) == column)
        return [study.rank(one.labels[name]) for name in table.columns]

    for column in sorted(by_column, key=place):
        of_rows = by_column[column]
        base = of_rows.get(table.base, {})
        for row in sorted(of_rows, key=study.rank):
            of_seeds = of_rows[row]
            seeds = sorted(set(of_seeds) & set(base))
            if row == table.base or not seeds:
                continue
            new, old = (base, of_seeds) if table.turned else (of_seeds, base)
            pairs = [
                (unit, new[seed].units[unit], old[seed].units[unit])
                for seed in seeds
                for unit in new[seed].units
                if unit in old[seed].units
            ]
            if len({unit for unit, _, _ in pairs}) < 2:
                continue
            counts = [count for _, (_, count), _ in pairs]
            clusters = np.repeat([unit for unit, _, _ in pairs], counts)
            a, b = (np.repeat([pair[i][0] for pair in pairs], counts) for i in (1, 2))
            change = relative_change(a, b, clusters=clusters, num_samples=num_samples)
            of_units = np.array([x - y for _, (x, _), (y, _) in pairs])
            spread = float(of_units.std(ddof=1))
            yield {
                "table": table.name,
                "column": column,
                "row": row,
                "base": table.base,
                "metric": table.metric,
                "seeds": len(seeds),
                "units": len(set(clusters)),
                "mean": _number(change.mean_new),
                "mean_base": _number(change.mean_base),
                "difference": _number(change.difference),
                "low": _number(change.difference_low),
                "high": _number(change.difference_high),
                "percent": _number(change.percent, 2) if change.mean_base else "",
                "percent_low": _number(change.percent_low, 2) if change.mean_base else "",
                "percent_high": _number(change.percent_high, 2) if change.mean_base else "",
                "effect": _number(float(of_units.mean()) / spread, 3) if spread else "",
                "p": change.p_value,
            }


def belongs(table: Table, labels: Mapping[str, str], metric: str) -> bool:
    """Whether a result stands in a table."""
    has = table.rows in labels and all(name in labels for name in table.columns)
    return has and metric == table.metric and all(labels.get(name) == level for name, level in table.where.items())


def column_of(table: Table, labels: Mapping[str, str]) -> str:
    return ", ".join(labels[name] for name in table.columns)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are (Holm 1979), in the order given.

    Example:
        >>> from flexrec.experiment.studies.tables import holm
        >>> holm([0.04, 0.01])
        [0.04, 0.02]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _number(value: float, digits: int = 5) -> str:
    return f"{value:.{digits}f}"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a CSV file; nothing for none."""
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
