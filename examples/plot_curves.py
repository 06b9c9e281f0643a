"""Quality on test users over steps and over seconds of reinforcement, from runs trained with --eval-every.

    python examples/plot_curves.py runs/*-seed? --need interest --output docs/credits.png

Runs whose names differ only in "-seedN" are averaged; a thin line is one seed. Needs matplotlib (the extra "report").
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def curve(folder: Path, need: str, metric: str) -> np.ndarray:
    """(evaluations, 3): step, seconds, mean of the metric; the base stands at 0."""
    base = json.loads((folder / "metrics.json").read_text())["base"][need][metric]
    points = [(0.0, 0.0, base)]
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["stage"] == "evaluation":
            points.append((entry["step"], entry["seconds"], entry["means"][need][metric]))
    return np.array(points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--need", default="interest")
    parser.add_argument("--metric", default="ndcg@5")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()

    seeds: dict[str, list[np.ndarray]] = defaultdict(list)
    for folder in arguments.runs:
        seeds[folder.name.partition("-seed")[0]].append(curve(folder, arguments.need, arguments.metric))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for color, (name, curves) in enumerate(seeds.items()):
        for axis, column in zip(axes, (0, 1), strict=True):
            for one in curves:
                axis.plot(one[:, column], one[:, 2], color=f"C{color}", alpha=0.3, linewidth=1)
            mean = np.mean([one[: min(map(len, curves))] for one in curves], axis=0)
            axis.plot(mean[:, column], mean[:, 2], color=f"C{color}", marker="o", label=f"{name} ({len(curves)} seeds)")
    for axis, label in zip(axes, ("steps", "seconds of reinforcement"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{arguments.metric}, {arguments.need}, test users")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
