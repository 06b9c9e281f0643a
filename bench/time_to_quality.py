"""NDCG@5 over seconds of reinforcement: FlexRec's, and TRL's GRPO, from the same starts, over several seeds.

    python bench/time_to_quality.py --output DIR                           the simulator; 10 minutes a seed
    python bench/time_to_quality.py --output DIR --data movielens=FOLDER   real users
    python bench/time_to_quality.py --output DIR --only report             table and figures anew

For every seed there are three starts: after the format stage of ``flexrec study credit``, which knows what a ranking is
and nothing of what is good, and after 8 and 40 steps of supervision by the labels besides. From each, FlexRec's trainer
(all actions) and TRL's GRPOTrainer (the metric of a list as its reward, eight rankings of a prompt) take steps of 64
rankings with the same prompts and gains, the critic's among them. TRL reads plain token ids, so that items are a token
each here, without the descriptions that FlexRec's models read beside it.

TRL is given what it has no option for: a model that generates rankings only, and only the ranks that the metric reads.
Seconds are the processor's, in one thread; evaluation counts for neither. TRL's prompts are encoded before its clock
starts, FlexRec's are made on the way. What is there already is not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.peer_trl import grpo_trainer
from flexrec.evaluation.statistics import relative_change
from flexrec.experiment.studies.catalogue import STUDIES
from flexrec.experiment.studies.design import NO_DATA, Setting
from flexrec.experiment.studies.reinforcement import RUN, Reinforcements


class Start(NamedTuple):
    """Learning rates are the best of those that were tried on a simulated world of its own (seed 90)."""

    supervised: int  # steps, behind those of the format stage
    rates: dict[str, float]  # by method


STARTS = {
    "format": Start(0, {"FlexRec": 2e-3, "TRL": 2e-3}),
    "short warm start": Start(8, {"FlexRec": 2e-3, "TRL": 2e-3}),
    "warm start": Start(40, {"FlexRec": 3e-4, "TRL": 1e-4}),
}
METHODS = ("FlexRec", "TRL")
GROUP = 8  # rankings of a prompt, TRL's
SAMPLES = 20_000

Point = dict[str, Any]  # "step", "seconds", "mean"; at the end also "values" of users, and "users"


class Curve(TrainerCallback):
    """Measures before the first step and after every few; what that takes is not counted."""

    def __init__(self, measure: Callable[[Any], np.ndarray], every: int) -> None:
        self.measure, self.every = measure, every
        self.points: list[Point] = []
        self.values = np.zeros(0)  # of the lists, at the last point

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.since = time.process_time()
        self._add(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._add(state.global_step, model)

    def _add(self, step: int, model: Any) -> None:
        stopped = time.process_time()
        model.eval()
        self.values = self.measure(model)
        model.train()
        self.points.append({"step": step, "seconds": stopped - self.since, "mean": float(self.values.mean())})
        self.since += time.process_time() - stopped


def curve_of(
    method: str, runs: Reinforcements, steps: int, every: int, learning_rate: float, temperature: float
) -> Curve:
    """Train a copy of the start."""
    curve = Curve(runs.measure, every)
    if method == "FlexRec":
        options = {name: value for name, value in RUN.items() if name not in ("steps", "early", "fuse")}
        options["learning_rate"] = learning_rate
        runs.reinforced(steps, options, curve)
        return curve
    prompts = runs.start["rankings"] // GROUP
    examples = runs.examples()
    trainer = grpo_trainer(
        copy.deepcopy(runs.model),
        [examples[i] for i in range(min(len(examples), steps * prompts))],
        metric=runs.start["metric"],
        prompts_per_step=prompts,
        num_generations=GROUP,
        answer_length=runs.num_ranked,
        constrained=True,
        steps=steps,
        learning_rate=learning_rate,
        temperature=temperature,
        seed=runs.setting.seed,
        callbacks=[curve],
        output_dir=str(runs.setting.folder / "trl"),
    )
    trainer.train()
    return curve


def measured(curve: Curve, users: Sequence[int]) -> dict[str, Any]:
    return {
        "points": curve.points,
        "values": np.round(curve.values, 4).tolist(),
        "users": [int(user) for user in users],
    }


def run(arguments: argparse.Namespace) -> None:
    """Make the curves that are not there yet, a file each."""
    torch.set_num_threads(1)
    for seed in range(arguments.first_seed, arguments.seeds):
        for start in STARTS:
            paths = {method: path_of(arguments.output, start, seed, method) for method in METHODS}
            if all(path.is_file() for path in paths.values()):
                continue
            runs = Reinforcements(setting_of(arguments, seed, start))
            for method, path in paths.items():
                if not path.is_file():
                    options = arguments.steps, arguments.every, STARTS[start].rates[method], arguments.trl_temperature
                    curve = curve_of(method, runs, *options)
                    found = measured(curve, [lst.user for lst in runs.dataset.test])
                    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
                    print(f"seed {seed}, {start}: {method}: {curve.points[-1]}", flush=True)


def path_of(output: Path, start: str, seed: int, method: str) -> Path:
    return output / f"{start.replace(' ', '_')}-{seed}-{method.lower()}.json"


def setting_of(arguments: argparse.Namespace, seed: int, start: str) -> Setting:
    """The world of the study of credits, with items that are a token each."""
    dataset, _, folder = arguments.data.partition("=")
    labels = {"part": "credits", "dataset": dataset, "start": "format", "credit": "all_actions"}
    options = next(one.start for one in STUDIES["credit"].runs(1) if dict(one.labels) == labels)
    pairs = (pair.partition("=") for pair in arguments.start)
    smaller = {name: json.loads(value) for name, _, value in pairs}
    changed = {**options, "described": False, "listwise_steps": STARTS[start].supervised, **smaller}
    return Setting(dataset, folder or None, seed, changed, arguments.output)


def seconds_to(points: Sequence[Point], quality: float) -> float | None:
    """Seconds at the first point with this quality, in proportion between it and the last; None if there is none."""
    before = None
    for point in points:
        if point["mean"] >= quality:
            if before is None:
                return 0.0
            share = (quality - before["mean"]) / (point["mean"] - before["mean"])
            return float(before["seconds"] + share * (point["seconds"] - before["seconds"]))
        before = point
    return None


def row_of(start: str, seeds: dict[int, dict[str, dict[str, Any]]]) -> str:
    """A row of the table: where it begins, where both end and when, and when FlexRec was where TRL ended."""
    ours, theirs = ([of_seed[method] for of_seed in seeds.values()] for method in METHODS)
    begin = np.mean([one["points"][0]["mean"] for one in ours])
    ends = [np.mean([one["points"][-1]["mean"] for one in of]) for of in (theirs, ours)]
    lasts = [np.mean([one["points"][-1]["seconds"] for one in of]) for of in (theirs, ours)]
    best = np.mean([max(point["mean"] for point in one["points"]) for one in theirs])
    new, old = (np.concatenate([one["values"] for one in of]) for of in (ours, theirs))
    clusters = np.concatenate(
        [[f"{seed}/{user}" for user in one["users"]] for seed, one in zip(seeds, ours, strict=True)]
    )
    change = relative_change(new, old, clusters=clusters, num_samples=SAMPLES)
    needed = [
        (seconds_to(a["points"], b["points"][-1]["mean"]), b["points"][-1]["seconds"])
        for a, b in zip(ours, theirs, strict=True)
    ]
    shares = sorted(100 * a / b for a, b in needed if a is not None)
    when = f"{np.median(shares):.1f} % ({shares[0]:.1f} to {shares[-1]:.1f})" if shares else "never"
    if len(shares) < len(needed):
        when += f", in {len(shares)} of {len(needed)} seeds"
    difference = f"{change.difference:+.3f} [{change.difference_low:+.3f}, {change.difference_high:+.3f}]"
    return (
        f"| {start} | {len(seeds)} | {begin:.3f} | {ends[0]:.3f} after {lasts[0]:.0f} s | {best:.3f} "
        f"| {ends[1]:.3f} after {lasts[1]:.0f} s | {difference} | {when} |"
    )


def report(output: Path, title: str) -> str:
    """The table of all curves that are there; draws the figure beside them."""
    lines = [
        "| start | seeds | NDCG@5 | TRL ends | TRL's best | FlexRec ends | FlexRec less TRL | time to where TRL ends |",
        "|---|---:|---:|---|---:|---|---|---|",
    ]
    found: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    for start in STARTS:
        name, _, _ = path_of(output, start, 0, "TRL").name.partition("-")
        for seed in sorted(int(path.name.split("-")[1]) for path in output.glob(f"{name}-*-trl.json")):
            paths = {method: path_of(output, start, seed, method) for method in METHODS}
            if all(path.is_file() for path in paths.values()):
                read = {method: json.loads(path.read_text(encoding="utf-8")) for method, path in paths.items()}
                found.setdefault(start, {})[seed] = read
    lines += [row_of(start, seeds) for start, seeds in found.items()]
    draw(found, title, output / "time_to_quality.svg")
    return "\n".join(lines)


def draw(found: dict[str, dict[int, dict[str, dict[str, Any]]]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "flexrec"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(STARTS), figsize=(11, 4), sharey=True)
    for axes, start in zip(panels, STARTS, strict=True):
        for method, colour in zip(METHODS, ("tab:blue", "tab:orange"), strict=True):
            for n, of_seed in enumerate(found.get(start, {}).values()):
                points = of_seed[method]["points"]
                xs, ys = [point["seconds"] for point in points], [point["mean"] for point in points]
                axes.plot(xs, ys, color=colour, alpha=0.6, marker="o", markersize=2, label=None if n else method)
        axes.set(xlabel="processor seconds of reinforcement", xscale="symlog", title=f"{title}, from the {start}")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("NDCG@5 on users never trained on")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the curves and the figure")
    parser.add_argument("--data", default=NO_DATA[0], help="NAME or NAME=FOLDER of the data, default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="up to which, default: %(default)s")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120, help="of each, default: %(default)s")
    parser.add_argument("--every", type=int, default=10, help="evaluate every so many steps, default: %(default)s")
    temperature = RUN["temperature"]
    parser.add_argument("--trl-temperature", type=float, default=temperature, help="default: FlexRec's, %(default)s")
    parser.add_argument("--start", nargs="*", default=[], metavar="NAME=VALUE", help="other options of the start")
    parser.add_argument("--only", choices=["report"], help="train nothing")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.only != "report":
        run(arguments)
    print(report(arguments.output, arguments.data.partition("=")[0]))


if __name__ == "__main__":
    main()
