"""Metric names, and metric values against trec_eval's own fixtures."""

import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from flexrec.metrics import FAMILIES, OF_TOPICS, Metric, parse_metric
from flexrec.ops.ranking_metric import ranking_metric, register_metric

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(os.environ.get("FLEXREC_TEST_DATA", ROOT / "../shared/data")) / "trec_fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no trec_eval fixtures in {FIXTURES}")


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("ndcg", Metric("ndcg")),
        ("ndcg_burges@10", Metric("ndcg_burges", 10)),
        ("rbp.8", Metric("rbp", None, 0.8)),
        ("rbp.95@20", Metric("rbp", 20, 0.95)),
        ("err.4@10", Metric("err", 10, max_gain=4.0)),
    ],
)
def test_names_round_trip(name, metric):
    assert parse_metric(name) == metric
    assert str(metric) == name
    assert parse_metric(metric) is metric


def test_every_parameter_survives_its_name():
    for p in (0.5, 0.123456789012345, 1e-7, 0.9999999):
        assert parse_metric(str(Metric("rbp", 3, p))).p == p


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nope",
        "NDCG",
        "ndcg@",
        "ndcg@0",
        "ndcg@-1",
        "ndcg@3.5",
        "ndcg@3 ",
        "ndcg.5",
        "rbp",
        "rbp.0",
        "rbp.",
        "err.0",
    ],
)
def test_bad_names_are_refused_with_what_was_got(name):
    with pytest.raises(ValueError, match="metric") as caught:
        parse_metric(name)
    assert repr(name) in str(caught.value) or repr(name.split("@")[0].split(".")[0]) in str(caught.value)


def test_a_name_must_be_a_string():
    with pytest.raises(TypeError, match="metric must be a string or a Metric, got int"):
        parse_metric(5)


def test_registering():
    register_metric("first_gain", lambda gains, num_ranked: gains[0])
    register_metric("first_gain", lambda gains, num_ranked: 2 * gains[0])  # replaces it, as in a notebook
    assert ranking_metric(torch.tensor([[3.0, 1.0]]), "first_gain").item() == 6.0
    with pytest.raises(ValueError, match="built-in"):
        register_metric("ndcg", lambda gains, num_ranked: 0.0)
    with pytest.raises(ValueError, match="lower-case"):
        register_metric("my@metric", lambda gains, num_ranked: 0.0)
    with pytest.raises(TypeError, match="cannot be compiled"):
        register_metric("opaque", lambda gains, num_ranked: json.dumps(gains))
    with pytest.raises(TypeError, match="must return a float"):
        register_metric("pair", lambda gains, num_ranked: (1.0, 2.0))
    with pytest.raises(TypeError, match="must be a function"):
        register_metric("number", 3)


def test_a_cutoff_bounds_what_a_registered_metric_sees():
    register_metric("ranks_shown", lambda gains, num_ranked: float(num_ranked))
    gains = torch.ones(2, 9)
    assert ranking_metric(gains, "ranks_shown@4", num_ranked=torch.tensor([3, 7])).tolist() == [3.0, 4.0]


def test_values_by_hand():
    gains = torch.tensor([[0.0, 2.0, 0.0, 1.0]], dtype=torch.float64)
    expected = {
        "dcg": 2 / np.log2(3) + 1 / np.log2(5),
        "ndcg@2": (2 / np.log2(3)) / (2 + 1 / np.log2(3)),
        "dcg_burges": 3 / np.log2(3) + 1 / np.log2(5),
        "recall@2": 1 / 2,
        "precision@8": 2 / 8,
        "precision": 2 / 4,
        "rbp.5": 0.5 * (0.5 + 0.125),
        "hit_rate@1": 0.0,
        "hit_rate@2": 1.0,
        "mrr": 1 / 2,
        "mrr@1": 0.0,
        "map": (1 / 2 + 2 / 4) / 2,
        "map@3": (1 / 2) / 2,
        "err": (1 / 2) * (3 / 4) + (1 / 4) * (1 / 4) * (1 / 4),
        "err.3": (1 / 2) * (3 / 8) + (1 / 4) * (5 / 8) * (1 / 8),
    }
    for name, value in expected.items():
        assert ranking_metric(gains, name).item() == pytest.approx(value, abs=1e-15), name


def test_what_is_not_ranked_counts_in_normalisers_only():
    gains = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    assert ranking_metric(gains, "recall", num_ranked=2).item() == pytest.approx(1 / 3)
    assert ranking_metric(gains, "precision@2", num_ranked=1).item() == pytest.approx(1 / 2)
    assert ranking_metric(gains, "ndcg", num_ranked=0).item() == 0.0


# ---------------------------------------------------------------------------------------------------------- trec_eval


def ranked_gains(judged: dict[str, float], run: dict[str, float]) -> tuple[torch.Tensor, int]:
    """Gains (1, K) of the retrieved documents in trec_eval's order, then of judged ones that were not retrieved."""
    order = sorted(run, key=lambda doc: (np.float32(run[doc]), doc), reverse=True)
    gains = [judged.get(doc, 0) for doc in order] + [gain for doc, gain in judged.items() if doc not in run]
    return torch.tensor([gains], dtype=torch.float64).clamp(min=0), len(order)


def trec_columns(path: Path, value: int) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for line in path.read_text().splitlines():
        fields = line.split()
        table[fields[0]][fields[2]] = float(fields[value])
    return table


def our_name(measure: str) -> str | None:
    """Our name of a trec_eval measure; None for those that are not ours."""
    plain = {"map": "map", "ndcg": "ndcg", "recip_rank": "mrr"}
    cut = {"ndcg_cut": "ndcg", "recall": "recall", "P": "precision", "success": "hit_rate", "map_cut": "map"}
    family, _, n = measure.rpartition("_")
    return plain.get(measure) or (f"{cut[family]}@{n}" if family in cut and n.isdigit() else None)


@needs_fixtures
@pytest.mark.parametrize(
    ("expected", "qrels", "level"), [("out.test.aq", "qrels.test", 1), ("out.test.aql", "qrels.rel_level", 2)]
)
def test_values_equal_trec_eval(expected, qrels, level):
    folder = FIXTURES / "trec_eval"
    judged, runs = trec_columns(folder / qrels, 3), trec_columns(folder / "results.test", 4)
    compared = defaultdict(int)
    for line in (folder / expected).read_text().splitlines():
        measure, topic, value = line.split()[:3]
        name = our_name(measure)
        if name is None or topic == "all":
            continue
        gains, num_ranked = ranked_gains(judged[topic], runs[topic])
        if not name.startswith("ndcg"):
            gains = (gains >= level).double()  # binary measures count from the relevance level on
        ours = ranking_metric(gains, name, num_ranked=num_ranked).item()
        assert ours == pytest.approx(float(value), abs=5.1e-5), (measure, topic)
        compared[name.split("@")[0]] += 1
    assert dict(compared) == {"map": 30, "mrr": 3, "precision": 27, "recall": 27, "ndcg": 30, "hit_rate": 9}


@needs_fixtures
def test_values_equal_pytrec_eval():
    cases = json.loads((FIXTURES / "pytrec_eval" / "expected.json").read_text())
    assert len(cases) == 4
    for case in cases:
        gains, num_ranked = ranked_gains(case["qrel"]["q1"], case["run"]["q1"])
        family, _, cutoffs = case["measure"].partition("_cut_")
        names = [f"{family}@{n}" for n in cutoffs.split(",")] if cutoffs else [family]
        ours = [ranking_metric(gains, name, num_ranked=num_ranked).item() for name in names]
        assert ours == pytest.approx(np.atleast_1d(case["expected_q1"]).tolist(), abs=1e-12)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(OF_TOPICS)))
def test_gains_beyond_the_length_are_ignored(family):
    name = "rbp.7" if family == "rbp" else family
    ragged = torch.tensor([[1.0, 0.0, 2.0, float("nan")]])
    torch.testing.assert_close(ranking_metric(ragged, name, lengths=3), ranking_metric(ragged[:, :3], name))
