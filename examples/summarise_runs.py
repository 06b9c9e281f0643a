"""Tables for a report from the folders of finished runs: means over seeds, and paired tests over test users.

    python examples/summarise_runs.py runs/interest-seed0 runs/interest-seed1 runs/interest-seed2
    python examples/summarise_runs.py --against runs/swap-seed{0,1,2} -- runs/all_actions-seed{0,1,2}

The runs given together are seeds of one configuration. With --against, a second configuration on the same data and
seeds is compared with the first, list by list; users are resampled whole.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from flexrec.evaluation import METRICS, comparison_markdown, relative_change


def load(folders: list[Path]) -> tuple[np.ndarray, dict[str, dict[str, dict[str, np.ndarray]]]]:
    """Users (L,), and system -> need -> metric -> (L,) of all runs one after the other.

    A user of two seeds stands for two: the seeds split the users differently.
    """
    users: list[str] = []
    values: dict[str, dict[str, dict[str, list[np.ndarray]]]] = {}
    for folder in folders:
        stored = np.load(folder / "per_list.npz")
        seed = json.loads((folder / "metrics.json").read_text())["config"]["seed"]
        users += [f"{seed}/{user}" for user in stored["users"]]
        for key in stored.files:
            if key.count("/") == 2:  # the lists of new items alone have tables of their own in each run
                system, need, metric = key.split("/")
                values.setdefault(system, {}).setdefault(need, {}).setdefault(metric, []).append(stored[key])
    joined = {
        system: {need: {m: np.concatenate(v) for m, v in metrics.items()} for need, metrics in needs.items()}
        for system, needs in values.items()
    }
    return np.array(users), joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--against", nargs="+", type=Path, help="runs of another configuration, same data and seeds")
    arguments = parser.parse_args()
    users, systems = load(arguments.runs)
    order = ["base", *(name for name in systems if name not in ("base", "trained")), "trained"]
    start = "warm start" if "warm start" in systems else "base"
    pairs = {"reinforcement": ("trained", start)}  # what it changed of where it started from
    print(comparison_markdown({name: systems[name] for name in order}, clusters=users, pairs=pairs))
    for name in order[:-1]:
        for need in systems["trained"]:
            describe(f"trained against {name}, {need}", systems["trained"][need], systems[name][need], users)
    if arguments.against:
        other_users, others = load(arguments.against)
        if not np.array_equal(users, other_users):
            raise SystemExit("the two configurations have not the same test lists: same data and seeds are needed")
        for need in systems["trained"]:
            describe(f"runs against --against, {need}", systems["trained"][need], others["trained"][need], users)


def describe(title: str, new: dict[str, np.ndarray], base: dict[str, np.ndarray], users: np.ndarray) -> None:
    parts = []
    for metric in METRICS:
        c = relative_change(new[metric], base[metric], clusters=users)
        parts.append(
            f"{metric} {c.difference:+.4f} [{c.difference_low:+.4f}, {c.difference_high:+.4f}] p={c.p_value:.4f}"
        )
    print(f"- {title}: " + "; ".join(parts))


if __name__ == "__main__":
    main()
