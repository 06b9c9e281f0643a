"""A table's differences as a figure: SVG of a transparent ground, with colours for light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from flexrec.experiment.report.charts import short

_ROW, _HEAD, _LABEL, _PLOT, _GAP = 16, 40, 260, 150, 14  # pixels
_LETTERS = 42  # of a name
# Text and rules are mid-tones that can be read on white and on black, and sharper where the page says which it is.
_STYLE = """
text { font: 11px sans-serif; fill: #6e7781 } .title { font-weight: bold } .rule { stroke: #8c959f; stroke-width: 0.5 }
.line { stroke: #3d85c6; stroke-width: 1.5 } .dot { fill: #3d85c6 }
.weak .line { stroke: #8c959f } .weak .dot { fill: #8c959f }
@media (prefers-color-scheme: dark) { text { fill: #b1bac4 } .line { stroke: #6cb6ff } .dot { fill: #6cb6ff } }
@media (prefers-color-scheme: light) { text { fill: #424a53 } }
"""
SIGNIFICANT = 0.05


def forest(title: str, rows: Sequence[Mapping[str, str]]) -> str:
    """Differences with their intervals: a line for each row of a table, side by side its columns, a scale for all.

    Args:
        rows: of ``comparisons.csv``, of one table. What is significant after Holm is in colour.
    """
    columns, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("column", "row"))
    low, high = min(0.0, *(float(row["low"]) for row in rows)), max(0.0, *(float(row["high"]) for row in rows))
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin
    width = _LABEL + len(columns) * (_PLOT + _GAP)
    height = _HEAD + _ROW * len(names) + 24

    def x(column: int, value: float) -> float:
        return _LABEL + column * (_PLOT + _GAP) + _PLOT * (value - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text class="title" x="0" y="12">{escape(title)}</text>',
    ]
    bottom = _HEAD + _ROW * len(names)
    for number, column in enumerate(columns):
        parts.append(f'<text x="{x(number, low):.1f}" y="30">{escape(short(column, _LETTERS))}</text>')
        zero = x(number, 0.0)
        parts.append(f'<line class="rule" x1="{zero:.1f}" x2="{zero:.1f}" y1="{_HEAD - 4}" y2="{bottom}"/>')
        for value, anchor in ((low + margin, "start"), (high - margin, "end")):
            if value:
                where = f'x="{x(number, value):.1f}" y="{bottom + 14}" text-anchor="{anchor}"'
                parts.append(f"<text {where}>{value:+.2g}</text>")
    for place, name in enumerate(names):
        y = _HEAD + _ROW * place + _ROW / 2
        parts.append(f'<text x="{_LABEL - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(short(name, _LETTERS))}</text>')
    for row in rows:
        number, y = columns.index(row["column"]), _HEAD + _ROW * names.index(row["row"]) + _ROW / 2
        at, start, end = (x(number, float(row[key])) for key in ("difference", "low", "high"))
        weak = "" if float(row["p_holm"]) < SIGNIFICANT else ' class="weak"'
        parts.append(
            f'<g{weak}><line class="line" x1="{start:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="dot" cx="{at:.1f}" cy="{y:.1f}" r="3"/></g>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
