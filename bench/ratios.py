"""From results of pytest-benchmark to a table: one row per operation and shape, with the ratio to every peer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

OURS = "ours"


@dataclass(frozen=True)
class Result:
    """One benchmark: seconds are the fastest round's, the least disturbed by what else the machine did."""

    op: str
    shape: str
    method: str
    seconds: float
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.method.startswith(OURS)


def from_json(report: dict[str, Any]) -> list[Result]:
    """The results in a file that ``--benchmark-json`` wrote."""
    return [_result(b["group"], b["name"], b["stats"]["min"], b["extra_info"]) for b in report["benchmarks"]]


def from_session(benchmarks: Iterable[Any]) -> list[Result]:
    """The results that pytest-benchmark's session holds when the tests are over."""
    return [_result(b.group, b.name, b.stats.min, b.extra_info) for b in benchmarks if b.stats and not b.has_error]


def _result(group: str | None, name: str, seconds: float, extra: dict[str, Any]) -> Result:
    op = extra.get("op", group or name)
    return Result(op, extra.get("shape", ""), extra.get("method", name), seconds, extra)


@dataclass(frozen=True)
class Row:
    """An operation at one shape: ours, what else of ours there is, and the peers, fastest first."""

    ours: Result
    variants: list[Result]
    peers: list[Result]

    def ratio(self, other: Result) -> float:
        """How many times as long the other takes; below 1 it is faster than ours."""
        return other.seconds / self.ours.seconds


def rows(results: Iterable[Result]) -> list[Row]:
    """One row per operation and shape that has a result of ours, in the order of measuring."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.op, result.shape), []).append(result)
    table = []
    for group in groups.values():
        ours = next((r for r in group if r.method == OURS), None)
        if ours is None:
            continue
        others = sorted((r for r in group if r is not ours), key=lambda r: r.seconds)
        table.append(Row(ours, [r for r in others if r.is_ours], [r for r in others if not r.is_ours]))
    return table


def show_seconds(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def show_bytes(count: int | None) -> str:
    if count is None:
        return "?"
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 2**10:.3g} KiB"


def show_ratio(row: Row, other: Result) -> str:
    """The ratio to another method, and whether it is a peer that wins."""
    ratio = row.ratio(other)
    text = f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"
    return f"{text} (loss)" if ratio < 1 and not other.is_ours else text


def show_floor(result: Result) -> str:
    share = result.extra.get("fraction_of_floor")
    return "" if share is None else f"{share:.0%}"


def show_method(result: Result) -> str:
    """A method's name; a star marks peers that compute another distribution, of which only the cost compares."""
    star = "*" if result.extra.get("other_distribution") else ""
    return result.method.replace("_", " ") + star


def show_ratios(row: Row) -> list[str]:
    """Every peer and variant with its ratio, the hardest to beat first."""
    return [f"{show_method(r)} {show_ratio(row, r)}" for r in [*row.peers, *row.variants]]


HEADER = ("operation", "shape", "ours", "of floor", "best peer", "time of others / ours (below 1, ours is slower)")


def cells(row: Row) -> tuple[str, ...]:
    """The row's entries under ``HEADER``."""
    best = f"{show_method(row.peers[0])} {show_seconds(row.peers[0].seconds)}" if row.peers else ""
    return (
        row.ours.op,
        row.ours.shape,
        show_seconds(row.ours.seconds),
        show_floor(row.ours),
        best,
        ", ".join(show_ratios(row)),
    )


FOOTNOTE = "* computes something else (a softmax over the whole vocabulary, say), so that only the cost compares"
