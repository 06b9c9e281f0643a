"""A data set made in Python, trained on and asked: what run_experiment takes in place of files.

    python examples/own_data.py --output runs/own

The readers here are invented: each reads two of six sections most of the time.
"""

import argparse
from pathlib import Path

import numpy as np

from flexrec import Ranker
from flexrec.data import Catalogue, Interactions, build_dataset
from flexrec.experiment import ExperimentConfig, run_experiment

SECTIONS = ("politics", "sports", "health", "travel", "music", "science")


def made_up_news(num_users: int = 150, num_items: int = 120, reads: int = 25, seed: int = 0):
    """A data set from plain arrays: who read what, when, and how much of it."""
    rng = np.random.default_rng(seed)
    section = np.arange(num_items) % len(SECTIONS)
    catalogue = Catalogue(
        ids=tuple(f"n{i}" for i in range(num_items)),
        titles=tuple(f"{SECTIONS[section[i]]} story {i}" for i in range(num_items)),
        topics=tuple((SECTIONS[section[i]],) for i in range(num_items)),
    )
    users, items, interest = [], [], []
    for user in range(num_users):
        liked = np.isin(section, rng.choice(len(SECTIONS), size=2, replace=False))
        weight = np.where(liked, 8.0, 1.0)
        read = rng.choice(num_items, size=reads, replace=False, p=weight / weight.sum())
        users += [user] * reads
        items += read.tolist()
        interest += np.where(liked[read], rng.uniform(0.5, 1.0, reads), rng.uniform(0.0, 0.5, reads)).tolist()
    order = rng.permutation(len(users))  # the log is sorted by time, here a step for each event
    log = Interactions(
        users=np.array(users)[order],
        items=np.array(items)[order],
        interest=np.array(interest, dtype=np.float32)[order],
        times=np.arange(len(users), dtype=np.float64),
    )
    return build_dataset(
        "news", catalogue, log, trend_window=400.0, num_candidates=12, num_positives=4, min_history=5, seed=seed
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args()

    dataset = made_up_news()
    config = ExperimentConfig(
        output=str(options.output),
        needs=("interest",),
        steps=options.steps,
        warmup_steps=options.steps,
        listwise_steps=options.steps,
        prompts_per_step=options.prompts,
        baselines=("random", "item-knn"),
    )
    results = run_experiment(config, dataset=dataset)
    for name in ("random", "item-knn", "trained"):
        print(f"{name}: ndcg@5 {results.means(name)['interest']['ndcg@5']:.3f}")

    candidates = [{"id": f"n{i}"} for i in range(60, 72)]
    request = {"history": ["n0", "n6", "n12", "n18"], "need": "interest", "candidates": candidates}
    (answer,) = Ranker(options.output).rank([request])
    titles = dict(zip(dataset.catalogue.ids, dataset.catalogue.titles, strict=True))
    print("for a reader of politics:", [titles[entry["id"]] for entry in answer["ranking"][:3]])


if __name__ == "__main__":
    main()
