"""The pages of studies, made from their CSV files: docs/results/NAME.md, and their list in docs/results.md.

python -m flexrec.experiment.studies.pages docs      every page anew, from what is in docs/results
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexrec.experiment.files import read_json
from flexrec.experiment.studies.catalogue import STUDIES
from flexrec.experiment.studies.design import Study, Table
from flexrec.experiment.studies.figures import SIGNIFICANT, forest
from flexrec.experiment.studies.tables import COMPARISONS, COSTS, VALUES, belongs, column_of, read_csv

ABOUT, NOTES = "about.json", "notes.md"
BEGIN, END = "<!-- generated from docs/results -->", "<!-- end of the generated part -->"
FIGURE_ROWS = 3  # comparisons from which on a figure says more than the table


def page(study: Study, folder: Path) -> str:
    """A study's page from the files in its folder, and from ``notes.md`` there, which a person wrote."""
    values, comparisons, costs = (read_csv(folder / name) for name in (VALUES, COMPARISONS, COSTS))
    about = read_json(folder / ABOUT)
    parts = [f"# {study.title}", study.asks, _how(about, costs)]
    if (folder / NOTES).is_file():
        parts.append((folder / NOTES).read_text(encoding="utf-8").strip())
    for table in study.tables:
        of_table = [row for row in comparisons if row["table"] == table.name]
        if shown := table_of(study, table, values, of_table):
            parts.append(f"## {table.title}")
            if len(of_table) >= FIGURE_ROWS:
                parts.append(f"![{table.title}]({folder.name}/{table.name}.svg)")
            parts.append(shown)
    if examples := about.get("examples"):
        parts += ["## One user under every need", *_side_by_side(examples)]
    return "\n\n".join(parts) + "\n"


def _how(about: Mapping[str, Any], costs: Sequence[Mapping[str, str]]) -> str:
    rows = ["| part | data | runs | seeds | steps | rollouts | CPU minutes |", "|---|---|---:|---:|---:|---:|---:|"]
    for row in costs:
        cells = (row[name] for name in ("part", "dataset", "runs", "seeds", "steps", "rollouts", "cpu_minutes"))
        rows.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    missing = f"\n\nNot run yet: {'; '.join(about['not_run'])}." if about["not_run"] else ""
    return (
        f"```bash\n{about['command']}\n```\n\n" + "\n".join(rows) + f"\n\nSteps and rollouts are the most of a run, "
        f"supervised steps included; CPU minutes are of all runs, on {about['machine']}. {versions}.{missing}"
    )


def table_of(
    study: Study,
    table: Table,
    values: Sequence[Mapping[str, str]],
    comparisons: Sequence[Mapping[str, str]],
) -> str:
    """Markdown: means over seeds, and differences with intervals; empty where there is nothing of it.

    Rows and columns are in the order of the study's axes, others in that of the runs.
    """
    means: dict[tuple[str, str], str] = {}
    places: dict[str, list[int]] = {}
    for row in values:
        labels = {name: value for name, value in row.items() if value != ""}
        if belongs(table, labels, row["metric"]):
            column = column_of(table, labels)
            places.setdefault(column, [study.rank(labels[name]) for name in table.columns])
            means[labels[table.rows], column] = row["mean"]
    if not means:
        return ""
    found = {(row["row"], row["column"]): row for row in comparisons}
    names = sorted(dict.fromkeys(row for row, _ in means), key=study.rank)
    columns = sorted(places, key=places.__getitem__)
    lines = [
        f"| {table.rows} | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name in names:
        cells = [_cell(table, means.get((name, column)), found.get((name, column))) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return f"{_legend(table, comparisons)}\n\n" + "\n".join(lines)


def _cell(table: Table, found: str | None, change: Mapping[str, str] | None) -> str:
    if found is None:
        return ""
    mean = f"{float(found):.{table.digits}f}"
    if change is None:
        return mean
    star = "*" if float(change["p_holm"]) < SIGNIFICANT else ""
    difference, low, high = (f"{float(change[name]):+.{table.digits}f}" for name in ("difference", "low", "high"))
    return f"{mean} ({difference} [{low}, {high}]{star})"


def _legend(table: Table, comparisons: Sequence[Mapping[str, str]]) -> str:
    legend = f"Means of {table.metric} over seeds"
    if not comparisons:
        return legend + "."
    seeds = sorted({int(row["seeds"]) for row in comparisons})
    said = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    what = f"`{table.base}` minus the row" if table.turned else f"the row minus `{table.base}`"
    return (
        f"{legend}; in brackets {what}, with 95 % intervals; * p < {SIGNIFICANT} after Holm over the table's "
        f"{len(comparisons)} comparisons. Seeds: {said}."
    )


def _side_by_side(examples: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    found = []
    for run, shown in examples.items():
        lists = {name: rows for name, rows in shown.items() if name != "history"}
        longest = max(len(rows) for rows in lists.values())
        lines = [f"| | {' | '.join(lists)} |", f"|---|{'---|' * len(lists)}"]
        for rank in range(longest):
            cells = [rows[rank] if rank < len(rows) else "" for rows in lists.values()]
            lines.append(f"| {rank + 1} | {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        of_history = "; ".join(shown["history"])
        found.append(
            f"`{run}`. Seen last: {of_history}. Behind each item what it is truly worth.\n\n" + "\n".join(lines)
        )
    return found


def figures(study: Study, folder: Path) -> dict[str, str]:
    """File name -> SVG of every table that has enough comparisons."""
    comparisons = read_csv(folder / COMPARISONS)
    found = {}
    for table in study.tables:
        of_table = [row for row in comparisons if row["table"] == table.name]
        if len(of_table) >= FIGURE_ROWS:
            found[f"{table.name}.svg"] = forest(table.title, of_table)
    return found


def listed(docs: Path) -> str:
    """The studies that have a page, and those that were not run, as a list."""
    lines = []
    for study in STUDIES.values():
        folder = docs / "results" / study.name
        if (folder / ABOUT).is_file():
            minutes = sum(float(row["cpu_minutes"]) for row in read_csv(folder / COSTS))
            runs = sum(int(row["runs"]) for row in read_csv(folder / COSTS))
            lines.append(f"- [{study.title}](results/{study.name}.md): {runs} runs, {minutes:.0f} CPU minutes.")
        else:
            lines.append(f"- {study.title}: not run yet (`flexrec study {study.name} --output DIR`).")
    return "\n".join(lines)


def everything(docs: Path) -> dict[Path, str]:
    """File -> content of all that is generated under ``docs``."""
    found = {}
    for study in STUDIES.values():
        folder = docs / "results" / study.name
        if (folder / ABOUT).is_file():
            found[docs / "results" / f"{study.name}.md"] = page(study, folder)
            found |= {folder / name: svg for name, svg in figures(study, folder).items()}
    results = docs / "results.md"
    text = results.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    found[results] = f"{head}{BEGIN}\n\n{listed(docs)}\n\n{END}{rest.partition(END)[2]}"
    return found


def main() -> None:
    for path, text in everything(Path(sys.argv[1])).items():
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
