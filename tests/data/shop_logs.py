"""A small log with its items, as files, for the tests of logs of one's own."""

import random

from flexrec.data import RankingDataset, load_interactions

NUM_USERS, NUM_ITEMS = 40, 30
SMALL = {"num_candidates": 8, "num_positives": 3, "min_history": 3, "history_length": 6, "lists_per_user": 6}


def make_rows(seed=0):
    """(user, item, rating, time): pairs occur again, moments are days, some of them equal."""
    rng = random.Random(seed)
    return [
        (f"u{rng.randrange(NUM_USERS)}", f"i{min(int(rng.paretovariate(0.7)), NUM_ITEMS) - 1}", rng.randint(1, 5), day)
        for day in (1_600_000_000 + 86_400 * rng.randrange(400) for _ in range(1500))
    ]


def write(folder, rows, columns=("user", "item", "rating", "timestamp"), items=True):
    lines = [",".join(map(str, row)) for row in rows]
    (folder / "interactions.csv").write_text("\n".join([",".join(columns), *lines]) + "\n")
    if items:
        names = [f"i{i},Item {i},{'AB'[i % 2]}|{'CDE'[i % 3]}" for i in range(NUM_ITEMS)]
        (folder / "items.csv").write_text("\n".join(["id,title,categories", *names]) + "\n")
    return folder


def load(folder, **options) -> RankingDataset:
    return load_interactions(folder, **{**SMALL, **options})
