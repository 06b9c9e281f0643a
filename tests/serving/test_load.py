"""The load test of the server, in short."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the extra 'serve'")


def test_a_short_load(served, tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "bench" / "load.py"
    spec = importlib.util.spec_from_file_location("load", path)
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    options = ["--clients", "1", "3", "--seconds", "0.5", "--candidates", "5", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(load, "WARM_UP", 0.2)
    monkeypatch.setattr(sys, "argv", ["load.py", str(served), *options])
    load.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["path"], row["clients"]) for row in rows] == [
        ("/v1/rerank", 1),
        ("/v1/rerank", 3),
        ("/rank", 1),
        ("/rank", 3),
    ]
    for row in rows:
        assert row["requests_per_second"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert capsys.readouterr().out.count("|\n") == 6
