"""The page itself, and pictures of its figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flexrec.experiment.files import write_text
from flexrec.experiment.report.charts import number
from flexrec.experiment.report.compare import compare, names_of, option_name, said
from flexrec.experiment.report.figures import Figure, figures_of, metric_name, metric_of, p_value, signed
from flexrec.experiment.report.read import Record
from flexrec.experiment.results import BASE, TRAINED, WARM_START

PAGE = "report.html"  # in the folder of a run
COLUMNS = 3  # of a wide page
PIXELS = 1080  # width of a picture
_HERE = "flexrec.experiment.report"


@dataclass(frozen=True)
class Tile:
    """What a run comes to on one need."""

    need: str
    metric: str
    value: str
    change: str  # against the base
    by_reinforcement: str


def write_report(folders: Sequence[Path], output: Path, png: Path | None = None) -> list[str]:
    """Write the page of one run or of several, and, where ``png`` says, a picture of each figure.

    Args:
        folders: of runs, finished or not; of several, others are compared with the first.
        output: the page, one file that asks nobody for anything.
        png: a folder for pictures.

    Returns:
        What is to be told, in sentences.

    Raises:
        FileNotFoundError: a folder that is none of a run.
        ValueError: a file of a run that is damaged.
        ImportError: pictures, without the package that draws them.
    """
    if png is not None and find_spec("resvg_py") is None:
        raise ImportError("--png needs resvg: .venv/bin/pip install -e '.[report]'; the page itself needs nothing")
    records = [Record.read(folder) for folder in folders]
    alone = [figures_of(record) for record in records]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page_of(records))
    if png is None:
        return []
    together = compare(records) if len(records) > 1 else []
    png.mkdir(parents=True, exist_ok=True)
    count = 0
    several = len(records) > 1
    prefixed = [("", figure) for figure in together]
    prefixed += [
        (f"{_file_name(name)}-" if several else "", figure)
        for name, figures in zip(names_of(records), alone, strict=True)
        for figure in figures
    ]
    for prefix, figure in prefixed:
        for n, (_, svg) in enumerate(figure.charts, start=1):
            suffix = f"-{n}" if len(figure.charts) > 1 else ""
            (png / f"{prefix}{figure.name}{suffix}.png").write_bytes(_picture(svg))
            count += 1
    return [f"{count} pictures are in {png}"]


def page_of(records: Sequence[Record]) -> str:
    """The page of one run or of several, as HTML."""
    return str(
        _template().render(
            names=names_of(records),
            together=compare(records) if len(records) > 1 else [],
            runs=[_context(record, figures_of(record)) for record in records],
        )
    )


def _context(record: Record, figures: Sequence[Figure]) -> dict[str, Any]:
    config = {**record.config, **(record.config.get("data_options") or {})}
    known = [name for name in config if name not in ("data_options", "resume")]
    return {
        "about": _about(record),
        "notes": record.data.get("notes") or [],
        "figures": figures,
        "tiles": _tiles(record),
        "summary": record.results.summary()
        if record.results is not None and TRAINED in record.results.per_list
        else [],
        "users": record.shown.get("users", []),
        "options": [(option_name(name), said(config[name])) for name in known],
    }


def _about(record: Record) -> str:
    """What was trained, on what and for what, in a line."""
    data, config = record.data, record.config
    parts = [str(data.get("name") or config.get("dataset") or record.name)]
    if {"items", "train", "test"} <= set(data):
        tested = data["test"] if record.results is None else len(record.results.users)  # not always all of them
        parts[0] += f": {data['items']:,} items, {data['train']:,} training lists, {tested:,} test lists"
    parts += [f"{name} {config[name]}" for name in ("model", "credit", "metric", "seed") if name in config]
    return "; ".join(parts)


def _tiles(record: Record) -> list[Tile]:
    results = record.results
    if results is None or TRAINED not in results.per_list:
        return []
    tiles = []
    for need in record.needs:
        metric = metric_of(results, need)
        against_base = against_start = ""
        if BASE in results.per_list:
            found = results.compare(TRAINED, BASE, need, metric)
            more = found.percent == found.percent
            against_base = f"{signed(found.percent)} % over base" if more else f"{signed(found.difference)} over base"
        if WARM_START in results.per_list:
            found = results.compare(TRAINED, WARM_START, need, metric)
            against_start = f"{signed(found.difference)} by reinforcement, p {p_value(found.p_value)}"
        mean = float(results.per_list[TRAINED][need][metric].mean())
        tiles.append(Tile(need, metric_name(metric), number(mean), against_base, against_start))
    return tiles


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader(_HERE, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup(_style())
    environment.filters["anchor"] = _file_name
    environment.filters["drawn"] = Markup  # an SVG of ours, in which every text was escaped
    environment.filters["number"] = number
    environment.filters["spanned"] = _spanned
    return environment.get_template("page.html")


def _spanned(figures: Sequence[Figure]) -> list[tuple[Figure, int]]:
    """How many of a wide page's columns each figure takes: as many as it has charts, and what its row would leave."""
    spans: list[int] = []
    taken = 0
    for figure in figures:
        wanted = min(len(figure.charts), COLUMNS) or COLUMNS
        if taken + wanted > COLUMNS:
            spans[-1] += COLUMNS - taken
            taken = 0
        spans.append(wanted)
        taken = (taken + wanted) % COLUMNS
    if spans and taken:
        spans[-1] += COLUMNS - taken
    return list(zip(figures, spans, strict=True))


def _style() -> str:
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"


def _picture(svg: str) -> bytes:
    """A PNG of a chart as the page shows it in light."""
    import resvg_py

    light = dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]+)", _style().partition("@media")[0]))
    plain = re.sub(r"var\(--([\w-]+)\)", lambda name: light[name[1]], svg)
    plain = plain.replace("<svg ", '<svg font-family="DejaVu Sans, Arial, sans-serif" ', 1)
    drawn = resvg_py.svg_to_bytes(svg_string=plain, width=PIXELS, background=light["card"], font_dirs=_fonts())
    return bytes(drawn)


def _fonts() -> list[str] | None:
    """Matplotlib brings a font, which a bare machine has not."""
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        return None
    return [str(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf")]
