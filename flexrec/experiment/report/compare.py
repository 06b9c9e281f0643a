"""Several runs beside each other: paired tests where they ranked the same lists, and what they were configured with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexrec.evaluation.statistics import bootstrap_interval, headline_of, relative_change
from flexrec.experiment.arguments import shown
from flexrec.experiment.report.charts import KINDS, NONE, QUIET, Row, interval_chart, line_chart, number
from flexrec.experiment.report.figures import Figure, curve_of, metric_name, metric_of, p_value, signed
from flexrec.experiment.report.read import Record
from flexrec.experiment.results import TRAINED

MAX_SAID = 6  # differences in the text; the table has all
_OF_A_PLACE = {"output", "resume"}  # options that say nothing of what was done


def compare(records: Sequence[Record]) -> list[Figure]:
    """The figures of a comparison of two or more runs, of which the first is what others are compared with."""
    made = (trained, curves, options)
    return [figure for make in made if (figure := make(records)) is not None]


def names_of(records: Sequence[Record]) -> list[str]:
    """What runs are called: by their folders, with a number where several are called so."""
    names = [record.name for record in records]
    return [name if names.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(names, start=1)]


def color_of(number: int) -> str:
    """Of so many colours; what comes after them is told apart by its name alone."""
    return KINDS[number] if number < len(KINDS) else QUIET


def same_lists(one: Record, other: Record) -> bool:
    """Whether two runs ranked the same test lists, which paired tests need."""
    if one.results is None or other.results is None:
        return False
    prints = [record.data.get("fingerprint") for record in (one, other)]
    options = [{k: r.config.get(k) for k in ("data_options", "cold_items", "num_ranked")} for r in (one, other)]
    same = prints[0] == prints[1] and options[0] == options[1]
    return same and np.array_equal(one.results.users, other.results.users)


def trained(records: Sequence[Record]) -> Figure | None:
    finished = [
        (name, record, color_of(n))
        for n, (name, record) in enumerate(zip(names_of(records), records, strict=True))
        if record.results is not None and TRAINED in record.results.per_list
    ]
    if len(finished) < 2:
        return None
    first_name, first, _ = finished[0]
    paired = [name for name, record, _ in finished[1:] if same_lists(first, record)]
    unpaired = [name for name, _, _ in finished[1:] if name not in paired]
    charts, table, changes = [], [], []
    for need in dict.fromkeys(need for _, record, _ in finished for need in record.needs):
        rows = []
        for name, record, color in finished:
            results = record.results
            if results is None or need not in results.per_list[TRAINED]:
                continue
            metric = metric_of(results, need)
            values = results.per_list[TRAINED][need][metric]
            low, high = bootstrap_interval(values, clusters=results.users)
            rows.append(Row(name, float(values.mean()), low, high, color, strong=True))
            apart = ["", "", ""]
            theirs = first.results.per_list[TRAINED].get(need, {}).get(metric) if first.results is not None else None
            if name in paired and theirs is not None:
                change = relative_change(values, theirs, clusters=results.users)
                interval = f"{signed(change.difference_low)} to {signed(change.difference_high)}"
                apart = [signed(change.difference), interval, p_value(change.p_value)]
                changes.append(f"{name} on {need}: {apart[0]} [{interval.replace(' to ', ', ')}], p {apart[2]}")
            table.append([need, name, metric, number(rows[-1].value), f"{number(low)} to {number(high)}", *apart])
        heading = f"{need}: {metric_name(metric)}"
        said = f"{heading}: {', '.join(f'{row.name} {number(row.value)}' for row in rows)}"
        charts.append((heading, interval_chart(rows, label=said)))
    text = f"The trained model of each run, with 95 % intervals over users. Differences are against {first_name}"
    text += f", list by list, with paired tests: {'; '.join(changes[:MAX_SAID])}." if changes else "."
    if unpaired:
        text += f" {', '.join(unpaired)}: other test lists than those of {first_name}, so that nothing can be paired."
    header = ("need", "run", "metric", "mean", "95 % interval", f"minus {first_name}", "95 % interval", "p")
    return Figure("runs", "Which run is best", text, charts, header, table)


def curves(records: Sequence[Record]) -> Figure | None:
    named = [
        (name, record, color_of(n))
        for n, (name, record) in enumerate(zip(names_of(records), records, strict=True))
        if len(record.points) > 1
    ]
    if len(named) < 2:
        return None
    charts, table = [], []
    for need in dict.fromkeys(need for _, record, _ in named for need in record.needs):
        lines = []
        for name, record, color in named:
            means = record.points[0]["means"].get(need, {})
            if (metric := headline_of(means)) in means:
                lines.append(curve_of(record, need, metric, name, color))
                table += [[need, name, f"{x:g}", number(y)] for x, y in zip(lines[-1].x, lines[-1].y, strict=True)]
        if lines:
            heading = f"{need}: {metric_name(metric)}"
            said = f"{heading} at the end: {', '.join(f'{line.name} {number(line.y[-1])}' for line in lines)}"
            charts.append((heading, line_chart(lines, label=said, x_label="steps of training", height=220)))
    text = "Quality on test users over steps of training; bands are 95 % intervals over users."
    return Figure("runs-curves", "How they got there", text, charts, ("need", "run", "step", "mean"), table)


def options(records: Sequence[Record]) -> Figure | None:
    """A table alone: every option in which the runs differ."""
    flat = [{**record.config, **(record.config.get("data_options") or {})} for record in records]
    known = list(dict.fromkeys(name for config in flat for name in config))
    different = [
        name
        for name in known
        if name not in _OF_A_PLACE | {"data_options"} and any(config.get(name) != flat[0].get(name) for config in flat)
    ]
    if not different:
        return None
    rows = [[option_name(name), *(said(config.get(name)) for config in flat)] for name in different]
    return Figure("runs-options", "In which options they differ", "", (), ("option", *names_of(records)), rows)


def option_name(name: str) -> str:
    """What the command line calls an option."""
    return "--" + {"needs": "need", "needs_file": "needs"}.get(name, name).replace("_", "-")


def said(value: object) -> str:
    """A value of an option as a person would write it."""
    if value is None:
        return NONE
    if isinstance(value, dict):
        return ", ".join(f"{name}={said(one)}" for name, one in value.items())
    return shown(value)
