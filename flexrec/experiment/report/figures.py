"""The figures of one run: what each shows, how it is read, and the numbers that it is drawn of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from flexrec.evaluation.statistics import HEADLINE, bootstrap_interval, headline_of
from flexrec.experiment.report.charts import (
    ACCENT,
    INK,
    KINDS,
    MINUS,
    NONE,
    QUIET,
    SHADES,
    Line,
    Row,
    averaged,
    bar_chart,
    interval_chart,
    line_chart,
    number,
    smooth,
)
from flexrec.experiment.report.read import Record
from flexrec.experiment.results import BASE, TRAINED, WARM_START, Results
from flexrec.experiment.run_folder import FORMAT, REINFORCEMENT, WARM_UP
from flexrec.profiling import PARTS

MAX_ROWS = 200  # of a table; of more lines of a log every so many-th is shown
COLORS = {BASE: INK, WARM_START: SHADES[2], TRAINED: ACCENT}


@dataclass(frozen=True)
class Figure:
    """Charts that belong together, each with a heading, and the table of their numbers."""

    name: str  # of its pictures
    title: str
    text: str  # how it is read, and what it says
    charts: Sequence[tuple[str, str]] = ()  # (heading, SVG)
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=list)


def figures_of(record: Record) -> list[Figure]:
    """Every figure that the run's folder has the numbers for, in the order of a report."""
    made = (rankers, wordings, curves, reward_by_rank, reliability, steps, weights, seconds, answers)
    return [figure for make in made if (figure := make(record)) is not None]


def metric_of(results: Results, need: str) -> str:
    """What a need is compared by; an older run may lack the usual metric."""
    metrics = next(iter(results.per_list.values()))[need]
    found = headline_of(metrics)
    return found if found in metrics else next(iter(metrics))


def rankers(record: Record) -> Figure | None:
    results = record.results
    if results is None or TRAINED not in results.per_list:
        return None
    charts, table = [], []
    for need in record.needs:
        metric = metric_of(results, need)
        rows = []
        for name, needs in results.per_list.items():
            values = needs[need][metric]
            low, high = bootstrap_interval(values, clusters=results.users)
            color, strong = COLORS.get(name, QUIET), name in COLORS
            rows.append(Row(name, float(values.mean()), low, high, color, strong))
            apart = ["", "", ""]
            if name != TRAINED:
                change = results.compare(TRAINED, name, need, metric)
                interval = f"{signed(change.difference_low)} to {signed(change.difference_high)}"
                apart = [signed(change.difference), interval, p_value(change.p_value)]
            interval = f"{number(low)} to {number(high)}"
            table.append([need, name, metric, number(rows[-1].value), interval, *apart])
        rows.sort(key=lambda row: -row.value)
        trained = next(row.value for row in rows if row.name == TRAINED)
        heading = f"{need}: {metric_name(metric)}"
        charts.append((heading, interval_chart(rows, label=_listed(heading, rows), reference=trained)))
    users = len(set(results.users.tolist()))
    return Figure(
        "rankers",
        "Who ranks best",
        f"Means over {len(results.users)} lists of {users} users who were never trained on, with 95 % intervals over "
        f"users. The dotted line is the trained model.",
        charts,
        ("need", "ranker", "metric", "mean", "95 % interval", "trained minus it", "95 % interval", "p"),
        table,
    )


def wordings(record: Record) -> Figure | None:
    """Of each need, what it gets by lists that are asked in unseen words of this need, and of the others."""
    found = record.metrics.get("unseen wordings") or {}
    if len(found) < 2:
        return None
    charts, table = [], []
    for name in found:
        worth = {asked: values[name] for asked, values in found.items()}
        rows = [
            Row(f"asked: {asked}", v["mean"], v["low"], v["high"], ACCENT if asked == name else QUIET, asked == name)
            for asked, v in worth.items()
        ]
        heading = f"Worth for {name}"
        charts.append((heading, interval_chart(rows, label=_listed(heading, rows), reference=worth[name]["mean"])))
        table += [
            [asked, name, number(v["mean"]), f"{number(v['low'])} to {number(v['high'])}"] for asked, v in worth.items()
        ]
    return Figure(
        "wordings",
        "Does it listen",
        "Lists of the trained model, asked in words that it was never trained on, and what they are worth for each "
        "need. A model that listens brings a need most where it is asked for it; one that does not brings it the same "
        "whatever is asked.",
        charts,
        ("asked", "worth for", "mean", "95 % interval"),
        table,
    )


def curves(record: Record) -> Figure | None:
    points = record.points
    if len(points) < 2:
        return None
    ends = {point["of"]: float(point["steps"]) for point in points}  # in the order of the stages
    marks = [(ends[before], _STAGE[after]) for before, after in pairwise(ends)]
    more = " --eval-every N adds points on the way." if len(points) == len(ends) else ""
    charts, table = [], []
    for need in record.needs:
        metric = headline_of(points[0]["means"][need])
        if metric not in points[0]["means"][need]:
            continue
        line = curve_of(record, need, metric, "")
        heading = f"{need}: {metric_name(metric)}"
        said = (
            f"{heading} from {number(line.y[0])} at step {line.x[0]:g} to {number(line.y[-1])} at step {line.x[-1]:g}"
        )
        charts.append((heading, line_chart([line], label=said, x_label="steps of training", marks=marks)))
        for n, point in enumerate(points):
            interval = f"{number(line.low[n])} to {number(line.high[n])}" if line.low and line.high else ""
            table.append([need, _STAGE.get(point["of"], point["of"]), str(point["steps"]), number(line.y[n]), interval])
    return Figure(
        "curves",
        "Learning curves",
        "Quality on the same test users from the first step of training on; bands are 95 % intervals over users. "
        f"Dotted lines are where a stage ends and the next begins.{more}",
        charts,
        ("need", "stage", "step", "mean", "95 % interval"),
        table,
    )


_STAGE = {FORMAT: "format", WARM_UP: "listwise", REINFORCEMENT: "reinforcement"}


def curve_of(record: Record, need: str, metric: str, name: str, color: str = ACCENT) -> Line:
    """The evaluations of a run on its way, with their intervals where its log has them."""
    points = record.points
    intervals = [point.get("intervals", {}).get(need, {}).get(metric) for point in points]
    known = all(pair and None not in pair for pair in intervals)
    return Line(
        name,
        [float(point["steps"]) for point in points],
        [float(point["means"][need][metric]) for point in points],
        color,
        low=[pair[0] for pair in intervals] if known else None,
        high=[pair[1] for pair in intervals] if known else None,
        dots=True,
    )


def reward_by_rank(record: Record) -> Figure | None:
    ranks = [int(name) for name in record.named("reward/rank_")]
    if not ranks:
        return None
    groups = [group for low, high in _GROUPS if (group := [rank for rank in ranks if low <= rank <= high])]
    lines = []
    for group, color in zip(groups, SHADES, strict=False):
        columns = [record.series(f"reward/rank_{rank}") for rank in group]
        steps = columns[0][0]
        means = [sum(values) / len(values) for values in zip(*(column for _, column in columns), strict=False)]
        x, y = averaged(steps, means)
        name = f"rank {group[0]}" if len(group) == 1 else f"ranks {group[0]} to {group[-1]}"
        lines.append(Line(name, x, smooth(y), color, faint=y if len(y) >= 30 else None))
    first, last = lines[0].y[0], lines[0].y[-1]
    label = f"Reward of the item at rank 1 from {number(first)} to {number(last)} over {len(record.steps)} steps"
    rows = [
        [str(line["step"]), *(number(line.get(f"reward/rank_{rank}") or 0.0, 4) for rank in ranks)]
        for line in _thinned(record.steps)
    ]
    metric = record.config.get("metric", "metric")
    return Figure(
        "reward-by-rank",
        "Reward by rank",
        f"What an item earned where it was placed: how much {metric} would be lost, on average, by exchanging it with "
        f"one that was left. Ranks near 0 have nothing more to teach.",
        [("Reward of an item", line_chart(lines, label=label, x_label="step of reinforcement", height=220))],
        ("step", *(f"rank {rank}" for rank in ranks)),
        rows,
    )


_GROUPS = ((1, 1), (2, 2), (3, 5), (6, 10))


def steps(record: Record) -> Figure | None:
    charts, columns = [], {}
    for names, heading in _STEPS:
        known = [name for name in names if record.series(name)[0]]
        if not known:
            continue
        at = record.series(known[0])[0]
        values = [sum(parts) for parts in zip(*(record.series(name)[1] for name in known), strict=False)]
        columns[heading] = dict(zip(at, values, strict=False))
        x, y = averaged(at, values)
        line = Line("", x, smooth(y), faint=y if len(y) >= 30 else None)
        label = f"{heading} from {number(y[0])} to {number(y[-1])}"
        charts.append((heading, line_chart([line], label=label, x_label="step of reinforcement", height=160)))
    if not charts:
        return None
    rows = [
        [
            str(line["step"]),
            *(number(column[line["step"]], 4) if line["step"] in column else "" for column in columns.values()),
        ]
        for line in _thinned(record.steps)
    ]
    without = [what for heading, what in _ABSENT.items() if heading not in columns]
    return Figure(
        "reinforcement",
        "Reinforcement, step by step",
        "The metric of sampled rankings, which a policy with temperature samples worse than it ranks; entropy says how "
        "much it still tries." + "".join(f" {what}" for what in without),
        charts,
        ("step", *columns),
        rows,
    )


_STEPS = (
    (("reward",), "Metric of sampled rankings"),
    (("entropy",), "Entropy of a decision"),
    (("kl",), "KL to the start"),
    (("clip_fraction_low", "clip_fraction_high"), "Share that is clipped"),
    (("grad_norm",), "Norm of the gradient"),
)
_ABSENT = {
    "KL to the start": "Without --beta no KL is measured.",
    "Share that is clipped": "The all-actions gradient has no ratio that could be clipped.",
}


def weights(record: Record) -> Figure | None:
    at, middle = record.series("weight/p50")
    if not at:
        return None
    (x, y), (_, low), (_, high) = (averaged(at, record.series(f"weight/p{level}")[1]) for level in (50, 10, 90))
    line = Line("median", x, y, low=low, high=high)
    rows = [
        [str(row["step"]), *(number(row[f"weight/p{level}"]) for level in (10, 50, 90))]
        for row in _thinned([row for row in record.steps if row.get("weight/p50") is not None])
    ]
    label = f"Median weight from {number(middle[0])} to {number(middle[-1])}"
    return Figure(
        "weights",
        "Weights by certainty",
        "Rewards that rest on doubtful predictions count less. The band holds four fifths of all "
        "weights, whose mean is 1.",
        [("Weight of a reward", line_chart([line], label=label, x_label="step of reinforcement"))],
        ("step", "a tenth is below", "median", "a tenth is above"),
        rows,
    )


def reliability(record: Record) -> Figure | None:
    shown = record.shown.get("critic", {})
    levels, bins = shown.get("intervals", []), shown.get("bins", [])
    if not levels or not bins:
        return None
    x = [100 * point["level"] for point in levels]
    inside = Line("", x, [100 * point["inside"] for point in levels], dots=True)
    ends = (0.0, max(1.0, *(point[name] for point in bins for name in ("predicted", "interest"))))
    predicted = Line("", [b["predicted"] for b in bins], [b["interest"] for b in bins], dots=True)
    far = max(abs(point["inside"] - point["level"]) for point in levels)
    off = max(abs(point["interest"] - point["predicted"]) for point in bins)
    quality = record.results.critic if record.results is not None else {}
    said = (
        f" Root mean square error {number(quality['rmse'])} over {quality['pairs']:g} pairs."
        if "rmse" in quality
        else ""
    )
    label = f"Shares inside are at most {100 * far:.0f} points from what intervals say"
    charts = [("Interests inside of intervals, %", _on_diagonal(inside, label, "level of the interval, %", (0, 100)))]
    label = f"Mean interests of tenths are at most {number(off, 2)} from the predictions"
    charts.append(("Mean interest by prediction", _on_diagonal(predicted, label, "predicted interest", ends)))
    rows = [["interval", f"{100 * p['level']:g} %", f"{100 * p['inside']:.1f} %", ""] for p in levels]
    rows += [["prediction", number(b["predicted"]), number(b["interest"]), str(b["pairs"])] for b in bins]
    return Figure(
        "critic",
        "How far the critic can be believed",
        "On test users: how many interests lie inside of intervals of each level, and what interest its predictions "
        f"met, by tenths. On the dashed line it is as sure as it should be.{said}",
        charts,
        ("of", "said", "found", "pairs"),
        rows,
    )


def _on_diagonal(line: Line, label: str, x_label: str, ends: tuple[float, float]) -> str:
    """A line beside the one that it should be, from one end to the other."""
    right = Line("", ends, ends, QUIET, dashed=True)
    return line_chart([right, line], label=label, x_label=x_label, x_range=ends, y_range=ends, height=240)


def answers(record: Record) -> Figure | None:
    found = record.shown.get("answers", {})
    if "valid" not in found:
        return None
    share = [
        Row("read as it stands", found["valid"], color=ACCENT, strong=True),
        Row("ranks filled by repair", found["missing"], color=QUIET),
    ]
    label = f"{_percent(found['valid'])} of the answers are rankings as they stand"
    rows = [["answers", f"{found['answers']:g}"], ["read as it stands", _percent(found["valid"])]]
    rows += [["ranks filled by repair", _percent(found["missing"])]]
    rows += [[f"{name} mentions in an answer", number(found[name], 2)] for name in ("repeated", "unknown")]
    return Figure(
        "answers",
        "Answers without a constraint",
        f"{found['answers']:g} test prompts, answered token by token with nothing that holds the model to the form. In "
        f"training and evaluation the constraint makes every answer a whole ranking.",
        [("Shares", bar_chart(share, label=label, said=_percent, top=1.0))],
        ("what", "how much"),
        rows,
    )


def seconds(record: Record) -> Figure | None:
    """The median of every part, as the first step loads what later ones have."""
    parts = {part: median(record.series(f"seconds/{part}")[1]) for part in PARTS if record.series(f"seconds/{part}")[0]}
    spent = {name: s for name, s in (record.metrics.get("seconds") or {}).items() if name != "total" and s > 0}
    total = (record.metrics.get("seconds") or {}).get("total", sum(spent.values()))
    step = f"A step of reinforcement: {_seconds(sum(parts.values()))}"
    stages = f"Stages and baselines: {_seconds(total)} in all"
    charts, rows = [], []
    for of, heading, known, color in (("step", step, parts, ACCENT), ("stage", stages, spent, KINDS[2])):
        ordered = [Row(name, value, color=color) for name, value in sorted(known.items(), key=lambda one: -one[1])]
        if ordered:
            listed = ", ".join(f"{row.name} {_seconds(row.value)}" for row in ordered[:3])
            label = f"Seconds of {'a step' if of == 'step' else 'stages'}: {listed}"
            charts.append((heading, bar_chart(ordered, label=label, said=_seconds)))
        rows += [[of, row.name, _seconds(row.value)] for row in ordered]
    if not charts:
        return None
    return Figure(
        "seconds",
        "Where the time goes",
        "Medians over the steps of reinforcement, and whole stages; evaluations in between count for the total only.",
        charts,
        ("of a", "part", "time"),
        rows,
    )


def metric_name(name: str) -> str:
    """A metric as headings call it."""
    return name.upper() if name == HEADLINE or name.startswith(("ndcg", "mrr", "map")) else name


def _listed(heading: str, rows: Sequence[Row]) -> str:
    return f"{heading}. Best first: {', '.join(f'{row.name} {number(row.value)}' for row in rows)}"


def _thinned(lines: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    every = -(-len(lines) // MAX_ROWS) or 1
    return [line for n, line in enumerate(lines) if n % every == 0 or n == len(lines) - 1]


def signed(value: float) -> str:
    """A difference."""
    text = number(value)
    return text if text.startswith(MINUS) or text == NONE or not float(text) else f"+{text}"


def p_value(value: float) -> str:
    """A p-value, which of one user there is none."""
    return NONE if value != value else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
