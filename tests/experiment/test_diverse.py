"""The need `diverse` from the command line, in short: rewards of whole lists teach what no label of an item says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flexrec.cli import main
from flexrec.data import simulate
from flexrec.evaluation import relative_change
from flexrec.experiment import stages

WORLD = {"num_users": 300, "num_items": 160, "num_topics": 6, "num_test_users": 80, "num_candidates": 12}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run on a small world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            stages, "simulate", lambda seed, **_: simulate(**WORLD, history_length=10, observed_share=0.3, seed=seed)
        )
        folder = tmp_path_factory.mktemp("diverse") / "run"
        options = "--need diverse --metric ndcg@5 --warmup format --warmup-steps 4"  # no order is imitated
        options += " --steps 80 --prompts-per-step 64 --learning-rate 2e-3"
        assert main(["train", *options.split(), "--output", str(folder)]) == 0
    return folder


def values(folder, ranker, metric="alpha_ndcg@5"):
    with np.load(folder / "per_list.npz") as stored:
        return stored[f"{ranker}/diverse/{metric}"], stored["users"]


def test_the_trained_policy_is_above_labels_and_above_mmr(run):
    """The critic's row ranks by the labels of items, the best that can be done with them one by one."""
    trained, users = values(run, "trained")
    for rival in ("base", "random", "popularity", "trend", "item-knn", "critic", "mmr"):
        change = relative_change(trained, values(run, rival)[0], clusters=users)
        assert change.difference_low > 0, (rival, change)


def test_what_is_good_for_the_list_is_not_what_is_good_item_by_item(run):
    trained, users = values(run, "trained", "ndcg@5")
    assert relative_change(trained, values(run, "critic", "ndcg@5")[0], clusters=users).difference_high < 0


def test_the_table_compares_by_the_metric_of_the_need(run):
    changes = json.loads((run / "metrics.json").read_text())["changes_alpha_ndcg@5"]["diverse"]
    assert set(changes) >= {"base", "critic", "mmr", "greedy", "random"}
    assert changes["mmr"]["difference"] == pytest.approx(
        values(run, "trained")[0].mean() - values(run, "mmr")[0].mean()
    )
