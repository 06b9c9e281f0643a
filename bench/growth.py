"""How a training step grows with candidates, generations and prompt length, ours and TRL's: speed and memory.

    python bench/growth.py --output DIR            growth.json and growth.svg; ten minutes on two cores
    python bench/growth.py --output DIR --only plot     the figure anew, from growth.json

Ours twice: rankings decoded rank by rank, and drawn from one pass over the prompt (``mode="one-pass"``). One size
changes at a time, the others stay as the file says; the model has the embedded default's shape. Seconds are
the faster of two steps after a first one, memory is that of the first besides the model and its optimiser's state.
Points that growth.json already holds are kept, so that a run that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import trial
from bench.training_task import TrainingTask, one_step

BASE = TrainingTask(prompts=8)
METHODS = {"ours": "ours, decoded", "ours_one_pass": "ours, one pass", "trl_grpo": "TRL's GRPO"}
PEER = "trl_grpo"
AIM = 8  # times the peer's rankings a second
SWEEPS = {
    "candidates": (10, 30, 100, 200),
    "num_generations": (4, 8, 16, 32),
    "prompt_length": (100, 500, 1000, 2000),
}
LABELS = {"candidates": "candidates K", "num_generations": "generations G", "prompt_length": "prompt length, tokens"}


def measured(method: str, task: TrainingTask) -> dict[str, Any]:
    with one_step(method, task) as step:
        peak = trial(step, torch.device("cuda" if torch.cuda.is_available() else "cpu")).peak_memory
        times = []
        for _ in range(2):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    return {"seconds": min(times), "rankings_per_second": task.rankings / min(times), "peak_memory": peak}


def sweep(path: Path) -> list[dict[str, Any]]:
    """Every point, written to ``path`` as it comes."""
    points: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    known = {(point["size"], point["value"], point["method"]) for point in points}
    for size, values in SWEEPS.items():
        for value in values:
            task = BASE.varied(**{size: value})
            for method in METHODS:
                if (size, value, method) in known:
                    continue
                points.append({"size": size, "value": value, "method": method, **measured(method, task)})
                path.write_text(json.dumps(points, indent=1) + "\n")
                print(points[-1], flush=True)
    return points


def draw(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "flexrec"
    from matplotlib import pyplot

    sizes = [size for size in SWEEPS if any(point["size"] == size for point in points)]  # of a run that was cut short
    figure, panels = pyplot.subplots(3, len(sizes), figsize=(3.5 * len(sizes), 7.5), sharey="row", squeeze=False)
    for column, size in enumerate(sizes):
        found = {(p["method"], p["value"]): p for p in points if p["size"] == size}
        for method, name in METHODS.items():
            at = [value for value in SWEEPS[size] if (method, value) in found]
            speed = {value: found[method, value]["rankings_per_second"] for value in at}
            memory = [(found[method, value]["peak_memory"] or 0) / 2**20 for value in at]
            panels[0, column].plot(at, speed.values(), marker="o", label=name)
            panels[2, column].plot(at, memory, marker="o", label=name)
            both = [value for value in at if (PEER, value) in found]
            ratios = [speed[value] / found[PEER, value]["rankings_per_second"] for value in both]
            panels[1, column].plot(both, ratios, marker="o", label=name)
        panels[1, column].axhline(AIM, color="gray", linestyle="--", linewidth=1)
        for panel in panels[:, column]:
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(SWEEPS[size], SWEEPS[size], minor=False)
            panel.minorticks_off()
        panels[1, column].set_yticks([1, 2, 4, AIM, 16, 32, 64], ["1", "2", "4", f"{AIM}: the aim", "16", "32", "64"])
        panels[2, column].set_xlabel(LABELS[size])
    panels[0, 0].set_ylabel("rankings per second")
    panels[1, 0].set_ylabel("times TRL's")
    panels[2, 0].set_ylabel("peak memory, MiB")
    panels[0, 0].legend()
    figure.suptitle(f"A training step: {BASE.shape}, one size changed at a time")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for growth.json and growth.svg")
    parser.add_argument("--only", choices=["plot"], help="draw what growth.json holds, measure nothing")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "growth.json"
    points = json.loads(path.read_text()) if arguments.only == "plot" else sweep(path)
    draw(points, arguments.output / "growth.svg")
    print(f"wrote {path} and {arguments.output / 'growth.svg'}")


if __name__ == "__main__":
    main()
