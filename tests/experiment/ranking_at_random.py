"""Whether a run ranks better than chance, by the gains of each of its needs."""

import json
from pathlib import Path

import numpy as np

from flexrec.evaluation.statistics import rank_metrics
from flexrec.experiment.needs import known_needs
from flexrec.experiment.run_folder import RunInfo
from flexrec.task.mixtures import find_need
from flexrec.task.needs import evaluation_gains


def check_above_random(folder, names, dataset, times):
    """Fails unless the NDCG@5 of every need is so many times that of random orders of the test lists."""
    trained = json.loads((Path(folder) / "metrics.json").read_text())["trained"]
    assert list(trained) == list(names)
    known, rng = known_needs(kept=RunInfo.load(Path(folder)).own_needs), np.random.default_rng(0)
    for name in names:
        gains = [evaluation_gains(find_need(name, known), lst, dataset.catalogue) for lst in dataset.test]
        at_random = rank_metrics([rng.permutation(g) for g in gains for _ in range(5)], ("ndcg@5",))["ndcg@5"].mean()
        assert trained[name]["ndcg@5"] > times * at_random > 0, (name, trained[name]["ndcg@5"], at_random)
