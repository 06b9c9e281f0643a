"""Lists of hundreds of candidates, ranked all at once and by windows: what it costs, and how good it is.

    flexrec train --dataset movielens --data ml-latest-small --need interest --output runs/interest
    python examples/long_lists.py --run runs/interest --data ml-latest-small --candidates 500 --lists 100

The run was trained on lists of 30. Test users are ranked the items they liked among hundreds that they have not seen,
the same lists by every strategy; windows are as long as the lists of training. Without --data the run's own data are
read again. Printed: NDCG@10 and Recall@10 with 95 % intervals over users, windows ranked for a list, and seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from flexrec import Ranker, bootstrap_interval, rank_metrics
from flexrec.data.lists import RankingDataset
from flexrec.data.options import all_data_options
from flexrec.decoding import Decoding
from flexrec.experiment.stages import load_dataset
from flexrec.task import get_need
from flexrec.task.needs import evaluation_gains

METRICS = ("ndcg@10", "recall@10")


def long_lists(ranker: Ranker, data: str | None, candidates: int) -> RankingDataset:
    """The run's data set with so many candidates in a list."""
    info = ranker.info
    options = {**info.data_options, "num_candidates": candidates}
    return load_dataset(info.dataset, data or info.data, info.seed, all_data_options(info.dataset, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("--data", help="folder of its data (default: where the run found them)")
    parser.add_argument("--candidates", type=int, default=500, help="in a list (default: %(default)s)")
    parser.add_argument("--lists", type=int, default=100, help="test lists (default: %(default)s)")
    parser.add_argument("--window", type=int, default=30, help="candidates shown at once (default: %(default)s)")
    parser.add_argument("--step", type=int, default=15, help="of windows (default: %(default)s)")
    arguments = parser.parse_args()
    ranker = Ranker.from_pretrained(Path(arguments.run))
    dataset, need = long_lists(ranker, arguments.data, arguments.candidates), get_need(ranker.info.needs[0])
    chosen = np.random.default_rng(0).permutation(len(dataset.test))[: arguments.lists]
    lists = [dataset.test[i] for i in np.sort(chosen)]
    ids = dataset.catalogue.ids

    def history(lst: Any) -> list[dict[str, Any]]:
        known = np.full(len(lst.history), np.nan) if lst.history_interest is None else lst.history_interest
        return [
            {"id": ids[i], "interest": None if np.isnan(how) else float(how)}
            for i, how in zip(lst.history, known, strict=True)
        ]

    requests = [
        {"need": need.name, "history": history(lst), "candidates": [ids[i] for i in lst.candidates]} for lst in lists
    ]
    gains = [evaluation_gains(need, lst, dataset.catalogue) for lst in lists]
    users = np.array([lst.user for lst in lists])
    windows = {"window": arguments.window, "step": arguments.step}
    ways = {
        "all at once": Decoding(),
        "all at once, one pass": Decoding(mode="one-pass"),
        "sliding windows": Decoding(strategy="sliding", **windows),
        "tournament": Decoding(strategy="tournament", **windows),
        "pre-ranked in one pass": Decoding(strategy="prerank", **windows),
    }
    print(f"{len(lists)} lists of {arguments.candidates} candidates, windows of {arguments.window}, {need.name}")
    print(f"{'':<24}" + "".join(f"{metric:>24}" for metric in METRICS) + f"{'windows a list':>16}{'seconds':>9}")
    for name, decoding in {"as they stand": None, **ways}.items():
        start = time.perf_counter()
        if decoding is None:
            answers = [{"ranking": [{"id": one} for one in request["candidates"]], "calls": 0} for request in requests]
        else:
            answers = ranker.rank(requests, decoding)
        seconds = time.perf_counter() - start
        in_order = []
        for request, answer, of_list in zip(requests, answers, gains, strict=True):
            place = {one: k for k, one in enumerate(request["candidates"])}
            in_order.append(of_list[[place[item["id"]] for item in answer["ranking"]]])
        line = f"{name:<24}"
        for metric in METRICS:
            values = np.array([rank_metrics(row[None], (metric,))[metric][0] for row in in_order])
            low, high = bootstrap_interval(values, clusters=users)
            line += f"{values.mean():>8.3f} [{low:.3f}, {high:.3f}]"
        calls = np.mean([answer.get("calls", 1) for answer in answers])
        print(f"{line}{calls:>16.1f}{seconds:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
