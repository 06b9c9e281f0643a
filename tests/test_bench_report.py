"""Results of the benchmarks become a table of ratios, with losses named, and plots."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import report
from bench.ratios import cells, from_json, rows, show_bytes, show_seconds


def benchmark(method: str, seconds: float, **extra: Any) -> dict[str, Any]:
    info = {"op": "swap rewards, ndcg", "shape": "64 x 100", "method": method, "lists": 64, "size": 100} | extra
    group = f"{info['op']}, {info['shape']}"
    return {"name": f"test[{method}]", "group": group, "stats": {"min": seconds}, "extra_info": info}


def results(*benchmarks: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine_info": {
            "cpu": {"brand_raw": "A CPU"},
            "cores": 2,
            "threads": 1,
            "python_version": "3.11",
            "torch": "2.13",
        },
        "datetime": "2026-01-02T03:04:05",
        "ceilings": {"copy": {"65536": 8e10, "1048576": 1e10}, "gemm": 1.4e11, "dtype": "float32"},
        "benchmarks": list(benchmarks),
    }


EXAMPLE = results(
    benchmark("pairwise", 40e-3, peak_memory=2**24),
    benchmark("ours", 1e-3, fraction_of_floor=0.5, peak_memory=2**20),
    benchmark("suffix_sums", 0.5e-3),
    benchmark("ours_in_torch", 0.8e-3),
    benchmark("log_softmax", 2.0, other_distribution=True),
    benchmark("pairwise", 80e-3, shape="64 x 200", size=200),
    benchmark("ours", 1e-3, shape="64 x 200", size=200),
    benchmark("ours", 2e-6, op="host overhead", shape="swap_rewards"),
    benchmark("alone", 1.0, op="something without ours"),
)


def test_times_between_torch_operations_come_first_where_there_are_any():
    assert "between torch" not in report.markdown(EXAMPLE, {})
    found = report.markdown(
        results(
            benchmark("ours", 1e-3, between_torch=2e-3),
            benchmark("pairwise", 40e-3, between_torch=44e-3),
            benchmark("suffix_sums", 50e-3, between_torch=42e-3),
            benchmark("log_softmax", 1.0, between_torch=1e-3, other_distribution=True),
        ),
        {},
    )
    line = "| swap rewards, ndcg | 64 x 100 | 2 ms | suffix sums 21x | 1 ms | pairwise 40x |"
    assert line in found
    assert found.index(line) < found.index("of floor")


def test_rows_compare_within_operation_and_shape():
    table = rows(from_json(EXAMPLE))
    assert [(row.ours.op, row.ours.shape) for row in table] == [
        ("swap rewards, ndcg", "64 x 100"),
        ("swap rewards, ndcg", "64 x 200"),
        ("host overhead", "swap_rewards"),
    ]
    first = table[0]
    assert [peer.method for peer in first.peers] == ["suffix_sums", "pairwise", "log_softmax"]  # fastest first
    assert [variant.method for variant in first.variants] == ["ours_in_torch"]
    assert [first.ratio(peer) for peer in first.peers] == pytest.approx([0.5, 40, 2000])


def test_losses_are_marked_among_peers_only():
    *_, floor, best, ratios = cells(rows(from_json(EXAMPLE))[0])
    assert floor == "50%"
    assert best == "suffix sums 500 us"
    assert ratios == "suffix sums 0.5x (loss), pairwise 40x, log softmax* 2000x, ours in torch 0.8x"


def test_markdown_names_machine_losses_overhead_and_memory():
    text = report.markdown(EXAMPLE, {"A plot": "performance/a.svg"})
    assert "Machine: A CPU, 2 cores, 1 threads. Python 3.11, torch 2.13. Measured 2026-01-02." in text
    assert "copy 10 GB/s from memory and up to 80 GB/s in the caches, GEMM 140 GFLOP/s" in text
    assert "- swap rewards, ndcg, 64 x 100: suffix sums takes 500 us, ours 1 ms, 0.5x" in text
    assert "| `swap_rewards` | 2 us |" in text
    assert "| swap rewards, ndcg | 64 x 100 | 1 MiB |  | pairwise 16 MiB |" in text
    assert "![A plot](performance/a.svg)" in text


def test_generated_part_replaces_what_is_between_the_markers(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    path.write_text(report.between_markers(path, "new\n"))
    assert path.read_text() == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.between_markers(path, "new\n") == path.read_text()


def test_a_file_without_markers_is_left_alone(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text("prose")
    with pytest.raises(SystemExit, match="has no lines"):
        report.between_markers(path, "new")


def test_plots_are_drawn_where_there_is_a_line_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    plots = report.draw(rows(from_json(EXAMPLE)), tmp_path)
    assert {path.name for path in plots.values()} == {"swap_rewards_over_k.svg", "floor.svg"}
    drawn = {path: path.read_bytes() for path in plots.values()}
    report.draw(rows(from_json(EXAMPLE)), tmp_path)
    assert drawn == {path: path.read_bytes() for path in drawn}  # the same results, the same files


def test_units():
    assert [show_seconds(s) for s in (2.0, 3e-3, 4.5e-6, 7e-9)] == ["2 s", "3 ms", "4.5 us", "7 ns"]
    assert [show_bytes(b) for b in (None, 2048, 3 * 2**20, 2**30)] == ["?", "2 KiB", "3 MiB", "1 GiB"]
