"""Quality on test users over steps and over seconds of training, from the first step on, of runs of ``flexrec train``.

    python examples/plot_curves.py runs/*-seed? --need interest --output docs/credits.png
    python examples/plot_curves.py runs/all-seed? --rankers sequence_grpo rank_grpo listwise --output baselines.png

Every stage of a run ends in a point; with --eval-every there are points on the way. A square is the base, a star the
warm start. Runs whose names differ only in "-seedN" are averaged; a thin line is one seed. --rankers draws
baselines that are trained as well, each from where it began. Needs matplotlib (the extra "report").
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

BEFORE = {"listwise": ("format",)}  # what a baseline comes from, if not from the warm start
MARKS = {"format": "s", "listwise warm-up": "*"}


def curve(folder: Path, need: str, metric: str, ranker: str = "reinforcement") -> tuple[np.ndarray, dict[str, int]]:
    """(evaluations, 3): steps and seconds since training began, mean of the metric; and which point ends a stage."""
    stages = (*BEFORE.get(ranker, ("format", "listwise warm-up")), ranker)
    points, ends = [], {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["stage"] == "evaluation" and entry["of"] in stages:
            ends[entry["of"]] = len(points)
            points.append((entry["steps"], entry["seconds"], entry["means"][need][metric]))
    return np.array(points), ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--need", default="interest")
    parser.add_argument("--metric", default="ndcg@5")
    parser.add_argument("--rankers", nargs="*", default=[], metavar="NAME", help="listwise, sequence_grpo, rank_grpo")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()

    seeds: dict[str, list[tuple[np.ndarray, dict[str, int]]]] = defaultdict(list)
    for folder in arguments.runs:
        name = folder.name.partition("-seed")[0]
        for ranker in ("reinforcement", *arguments.rankers):
            label = name if ranker == "reinforcement" else f"{name}: {ranker}"
            seeds[label].append(curve(folder, arguments.need, arguments.metric, ranker))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for color, (name, curves) in enumerate(seeds.items()):
        for axis, column in zip(axes, (0, 1), strict=True):
            for one, _ in curves:
                axis.plot(one[:, column], one[:, 2], color=f"C{color}", alpha=0.3, linewidth=1)
            shortest = min(len(one) for one, _ in curves)
            mean = np.mean([one[:shortest] for one, _ in curves], axis=0)
            label = f"{name} ({len(curves)} seeds)"
            axis.plot(mean[:, column], mean[:, 2], color=f"C{color}", marker="o", markersize=3, label=label)
            for stage, mark in MARKS.items():
                if curves[0][1].get(stage, shortest) < shortest:
                    at = mean[curves[0][1][stage]]
                    axis.plot(at[column], at[2], color=f"C{color}", marker=mark, markersize=10)
    for axis, label in zip(axes, ("steps of training", "seconds of training"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{arguments.metric}, {arguments.need}, test users")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
