"""Small drawings in SVG: lines with bands, marks with intervals, bars.

No plotting library: these few marks are all that the report needs, a page made of them needs no package, and their
colours are variables of the page's style, so that one drawing serves light and dark. All are drawn for a width of 360,
which a phone has; who looks at them gets every number as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape as escape_html

WIDTH = 360.0
FONT = 11.5  # in units of the drawing, which a phone shows as they are
LETTER = 0.56 * FONT  # how wide one is on average
BOLD = 0.65 * FONT  # a fat one
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"  # what stands where there is no number
MAX_POINTS = 240  # of a line; more are averaged

# Colours by what they stand for; the page's style says what they are in light and in dark.
INK, QUIET, RULE, ACCENT = "var(--ink)", "var(--quiet)", "var(--rule)", "var(--accent)"
SHADES = ("var(--shade-1)", "var(--shade-2)", "var(--shade-3)", "var(--shade-4)")  # of one colour, the strongest first
KINDS = ("var(--kind-1)", "var(--kind-2)", "var(--kind-3)", "var(--kind-4)", "var(--kind-5)")  # told apart


@dataclass(frozen=True)
class Line:
    """A line of a chart: its points, by what it is called at its end, and an interval around every point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = ACCENT
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dots: bool = False
    dashed: bool = False
    faint: Sequence[float] | None = None  # what the line is the smooth form of


@dataclass(frozen=True)
class Row:
    """A mark with its interval, in a row of its own."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    color: str = QUIET
    strong: bool = False


def escape(text: str) -> str:
    """Text as XML takes it, which knows no control characters."""
    return escape_html("".join(letter for letter in text if letter >= " " and letter not in "\ufffe\uffff"))


def number(value: float, digits: int = 3) -> str:
    """As short as it can be said: 0.819, 12.5, 3400."""
    if not math.isfinite(value):
        return NONE
    size = abs(value)
    text = f"{value:.{digits if size < 10 else 1 if size < 1000 else 0}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-")


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str,
    marks: Sequence[tuple[float, str]] = (),
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
    height: float = 200.0,
) -> str:
    """Lines that are named where they end; ``marks`` are places on the x axis where something changes."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return ""
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for part in (line.y, line.low, line.high) if part is not None for y in part]
    ys += [y for line in lines for y in line.faint or ()]
    x_low, x_high = x_range or (min(xs), max(xs))
    y_low, y_high = y_range or _padded(min(ys), max(ys))
    y_ticks = _ticks(y_low, y_high, 4)
    widest = max(len(_tick(tick, y_ticks)) for tick in y_ticks)
    left, right = 8 + widest * LETTER, WIDTH - 12 - max(len(line.name) for line in lines) * BOLD
    top, bottom = 26.0 if marks else 10.0, height - 36.0
    at_x = _scale(x_low, x_high, left, right)
    at_y = _scale(y_low, y_high, bottom, top)
    parts = []
    for tick in y_ticks:
        parts.append(_rule(left, at_y(tick), right, at_y(tick)))
        parts.append(_text(left - 6, at_y(tick) + 4, _tick(tick, y_ticks), QUIET, "end"))
    x_ticks = _ticks(x_low, x_high, 5, least=1.0 if all(x == round(x) for x in xs) else 0.0)
    for tick in x_ticks:
        parts.append(_text(at_x(tick), bottom + 16, _tick(tick, x_ticks), QUIET, "middle"))
    parts.append(_text((left + right) / 2, height - 4, x_label, QUIET, "middle"))
    shown_to = left - 1.0
    for x, what in marks:
        parts.append(f'<path d="M{at_x(x):.1f} {top:.1f}V{bottom:.1f}" style="stroke:{QUIET};stroke-dasharray:2 3"/>')
        start = min(at_x(x) + 4, WIDTH - len(what) * LETTER)
        if what and start >= shown_to:
            parts.append(_text(start, top - 5, what, QUIET))
            shown_to = start + (len(what) + 1) * LETTER
    for line in lines:
        parts += _line(line, at_x, at_y)
    parts += _end_labels(lines, at_x, at_y, top, bottom)
    return _svg(parts, height, label)


def interval_chart(rows: Sequence[Row], *, label: str, reference: float | None = None) -> str:
    """Values with their intervals, one row each: the name before, the number behind; ``reference`` is a line."""
    if not rows:
        return ""
    step, top = 22.0, 6.0
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None and math.isfinite(end)]
    low, high = _padded(min([*ends, reference if reference is not None else ends[0]]), max(ends))
    names = max(len(row.name) for row in rows)
    left, right = 8 + min(names, 22) * LETTER, WIDTH - 12 - 6 * LETTER
    height = top + step * len(rows) + 24
    at = _scale(low, high, left, right)
    parts = []
    ticks = _ticks(low, high, 4)
    for tick in ticks:
        parts.append(_rule(at(tick), top, at(tick), height - 22))
        parts.append(_text(at(tick), height - 6, _tick(tick, ticks), QUIET, "middle"))
    if reference is not None:
        parts.append(
            f'<path d="M{at(reference):.1f} {top}V{height - 22:.1f}" style="stroke:{ACCENT};stroke-dasharray:2 3"/>'
        )
    for n, row in enumerate(rows):
        y = top + step * (n + 0.5)
        weight = "600" if row.strong else "400"
        ink = INK if row.strong else QUIET
        parts.append(f"<g><title>{_said(row)}</title>")
        parts.append(f'<path d="M0 {y:.1f}H{WIDTH}" style="stroke:transparent;stroke-width:{step}"/>')
        parts.append(_text(0, y + 4, short(row.name, 22), ink, weight=weight))
        if row.low is not None and row.high is not None and math.isfinite(row.low):
            parts.append(
                f'<path d="M{at(row.low):.1f} {y:.1f}H{at(row.high):.1f}" '
                f'style="stroke:{row.color};stroke-width:{3 if row.strong else 2};stroke-linecap:round;opacity:.55"/>'
            )
        parts.append(
            f'<circle cx="{at(row.value):.1f}" cy="{y:.1f}" r="{5 if row.strong else 4}" style="fill:{row.color}"/>'
        )
        parts.append(_text(WIDTH, y + 4, number(row.value), INK, "end", weight) + "</g>")
    return _svg(parts, height, label)


def bar_chart(rows: Sequence[Row], *, label: str, said: Callable[[float], str] = number, top: float = 0.0) -> str:
    """Bars from 0, one row each; ``top`` is the end of the axis, if not the longest bar."""
    if not rows:
        return ""
    step = 24.0
    whole = max([top, *(row.value for row in rows)]) or 1.0
    left = 8 + min(max(len(row.name) for row in rows), 24) * LETTER
    numbers = max(len(said(row.value)) for row in rows) * LETTER
    right = WIDTH - 8 - numbers
    parts = []
    for n, row in enumerate(rows):
        y = step * n
        length = max((right - left) * row.value / whole, 1.0)
        parts.append(f"<g><title>{escape(row.name)}: {escape(said(row.value))}</title>")
        parts.append(_text(0, y + 16, short(row.name, 24), INK if row.strong else QUIET))
        parts.append(
            f'<rect x="{left:.1f}" y="{y + 5:.1f}" width="{length:.1f}" height="14" rx="3" style="fill:{row.color}"/>'
        )
        parts.append(_text(left + length + 6, y + 16, said(row.value), INK) + "</g>")
    return _svg(parts, step * len(rows) + 4, label)


def averaged(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most ``MAX_POINTS`` points: means of neighbours."""
    size = -(-len(x) // MAX_POINTS) or 1
    parts = [slice(start, start + size) for start in range(0, len(x), size)]
    return [_mean(x[part]) for part in parts], [_mean(y[part]) for part in parts]


def smooth(values: Sequence[float]) -> list[float]:
    """Means of each value and its neighbours, a fifteenth of the whole."""
    reach = len(values) // 30
    return [_mean(values[max(0, n - reach) : n + reach + 1]) for n in range(len(values))]


def _line(line: Line, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> list[str]:
    points = [(at_x(x), at_y(y)) for x, y in zip(line.x, line.y, strict=True)]
    parts = []
    if line.low is not None and line.high is not None:
        around = [*zip(line.x, line.high, strict=True), *reversed([*zip(line.x, line.low, strict=True)])]
        shape = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in around)
        parts.append(f'<path d="M{shape}Z" style="fill:{line.color};opacity:.16"/>')
    if line.faint is not None:
        faint = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in zip(line.x, line.faint, strict=True))
        parts.append(f'<path d="M{faint}" style="fill:none;stroke:{line.color};opacity:.3"/>')
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = ";stroke-dasharray:4 4" if line.dashed else ""
    parts.append(
        f'<path d="M{path}" style="fill:none;stroke:{line.color};stroke-width:2;stroke-linejoin:round{dash}"/>'
    )
    if line.dots or len(points) == 1:
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:{line.color};stroke:var(--card);stroke-width:1.5">'
            f"<title>{escape(line.name)} at {number(line.x[n])}: {number(line.y[n])}</title></circle>"
            for n, (x, y) in enumerate(points)
        ]
    return parts


def _end_labels(
    lines: Sequence[Line],
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
    top: float,
    bottom: float,
) -> list[str]:
    """The names of lines where they end, moved apart where they would lie on each other."""
    ends = [(at_y(line.y[-1]), at_x(line.x[-1]), line) for line in lines if line.name]
    ends.sort(key=lambda end: end[0])
    apart, places = FONT + 1.5, [y for y, _, _ in ends]
    for n in range(1, len(places)):
        places[n] = max(places[n], places[n - 1] + apart)
    over = max(0.0, places[-1] - bottom) if places else 0.0
    for n in range(len(places) - 1, -1, -1):
        limit = bottom if n == len(places) - 1 else places[n + 1] - apart
        places[n] = min(places[n], limit) if over else places[n]
    furthest = max((x for _, x, _ in ends), default=0.0)
    return [
        _text(furthest + 8, y + 4, line.name, INK if line.color in SHADES else line.color, weight="600")
        for y, (_, _, line) in zip(places, ends, strict=True)
    ]


def _said(row: Row) -> str:
    interval = "" if row.low is None or row.high is None else f" [{number(row.low)}, {number(row.high)}]"
    return escape(f"{row.name}: {number(row.value)}{interval}")


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}" font-size="{FONT}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, color: str, anchor: str = "start", weight: str = "400") -> str:
    more = "" if anchor == "start" else f' text-anchor="{anchor}"'
    more += "" if weight == "400" else f' font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{more} style="fill:{color}">{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" style="stroke:{RULE}"/>'


def short(name: str, size: int) -> str:
    """A name of at most so many letters."""
    return name if len(name) <= size else name[: size - 1] + "…"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range with air around it, which has a size even where all values are the same."""
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    size = (high - low) or 1.0
    return lambda value: start + (end - start) * (value - low) / size


def _ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """Round numbers inside of a range, about so many, and so far apart at least."""
    if high <= low:
        return [low]
    rough = max((high - low) / count, least)
    unit = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if least else (1, 2, 2.5, 5, 10)
    step = unit * next(factor for factor in factors if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """A tick with as many digits as tell it from its neighbours."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    digits = next((d for d in range(8) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 8)
    return f"{value:.{digits}f}".replace("-", MINUS) if value else "0"
