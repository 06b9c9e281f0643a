"""What rankings that share a prompt cost to train on: with a mask, without one, and a row for each ranking.

    python bench/shared_prefix.py --output DIR      shared_prefix.json, and a table on the terminal

A point is the update of a training step with the embedded default's shape: log-probs of every ranking and their
gradients. Sampling, rewards and the optimiser are the same for all. Methods take turns; of each the least seconds of
the rounds are kept, by the wall and of the processor, and the medians of the rounds' ratios to the method that the
trainer chooses. Memory is the peak of a second round besides the model. Points that the file holds already are kept.
The table has the processor's times: milliseconds for what is chosen, and for the others how often as long they take.
Below it whole steps of the trainer, sampling and optimiser included, and attention alone (bench/shared_attention.py).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import shared_attention
from bench.measure import trial
from bench.training_task import TrainingTask, one_step
from flexrec.policy import packing
from flexrec.policy.batch import RankingBatch, make_batch
from flexrec.policy.packing import attention_inputs, rankings_per_row, sharing
from flexrec.policy.scores import ranking_scores, ranking_states

# (prompt, generations, candidates): one size changed at a time, and corners
SIZES = (
    *((prompt, 8, 30) for prompt in (20, 50, 100, 150, 500, 1000, 2000, 4000)),
    *((500, generations, 30) for generations in (1, 2, 4, 16, 32)),
    *((1000, 8, candidates) for candidates in (10, 150)),
    (20, 2, 10),
    (20, 32, 10),
    (100, 1, 30),
    (100, 2, 10),
    (100, 8, 10),
    (100, 32, 10),
    (100, 32, 30),
    (100, 8, 150),
    (2000, 32, 30),
    (4000, 2, 10),
    (4000, 32, 10),
)
POINTS = (  # and the shortest prompt in parts of the longest
    *((*sizes, 1.0) for sizes in SIZES),
    *((prompt, 8, 30, 0.5) for prompt in (50, 150, 500, 1000)),
    (30, 4, 10, 0.5),
    (200, 2, 10, 1.0),  # where both are reckoned to cost the same
    (200, 2, 10, 0.5),
)
MOST_TOKENS = 34_000  # that a row for each ranking may have; beyond, it is not measured
# With what numbers the choice is one's own.
ALWAYS = {
    "row_each": {"_PER_ROW": packing._PER_ROW},
    "mask": {"_PER_PRODUCT": float("inf")},
    "prefix": {"_PER_PRODUCT": 0, "_PER_ROW": 0},
}
METHODS = ("prefix", "mask", "row_each")
LEAST_ROUNDS = 9
# Whole steps of eight prompts: prompt, generations, candidates
WHOLE = ((150, 8, 30), (500, 8, 30), (2000, 8, 30), (500, 32, 30), (500, 8, 150))
STEPS = 6


@dataclass(frozen=True)
class Updates:
    """The update of a training step on one task, by every method."""

    task: TrainingTask
    shortest: float

    @cached_property
    def model(self) -> Any:
        return self.task.model()

    @cached_property
    def lists(self) -> tuple[list[list[int]], list[list[list[int]]]]:
        lengths = np.linspace(1, self.shortest, self.task.prompts) * self.task.prompt_length
        examples = self.task.examples
        prompts = [example.prompt[: round(length)] for example, length in zip(examples, lengths, strict=True)]
        return prompts, [example.candidates for example in examples]

    @cached_property
    def rankings(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        return np.stack([rng.permutation(self.task.candidates) for _ in range(self.task.rankings)])

    @property
    def by_mask(self) -> int:
        """Rankings a row by the cost of a mask."""
        task = self.task
        return rankings_per_row(task.prompt_length, task.candidates, task.num_generations, task.config.hidden_size)

    def batch(self, per_row: int) -> RankingBatch:
        return make_batch(
            *self.lists, self.rankings, num_generations=self.task.num_generations, rankings_per_row=per_row
        )

    def chosen(self) -> str:
        """The method that the trainer takes."""
        rows = self.batch(sharing(self.model, *self.lists, num_generations=self.task.num_generations)).tokens
        if not rows.shared:
            return "row_each"
        return "prefix" if "prefix_layout" in attention_inputs(self.model, rows) else "mask"

    def step(self, method: str) -> None:
        per_row = {"row_each": 1, "mask": self.by_mask, "prefix": self.task.num_generations}[method]
        with patch.multiple(packing, **ALWAYS[method]):
            batch = self.batch(per_row)
            scores = ranking_scores(ranking_states(self.model, batch), batch)
            scores.logprobs.mean().backward()
        self.model.zero_grad()


def measured(task: TrainingTask, shortest: float, seconds: float) -> dict[str, Any]:
    updates = Updates(task, shortest)
    names = ["prefix", "mask"]
    if task.num_generations == 1 or updates.by_mask == 1:
        names.remove("mask")  # as a row for each
    if task.num_generations == 1 or task.rankings * (task.prompt_length + task.candidates) <= MOST_TOKENS:
        names.append("row_each")
    if task.num_generations == 1:
        names.remove("prefix")
    chosen = updates.chosen()
    peaks: dict[str, int | None] = {}
    for name in names:
        updates.step(name)  # what is only done once: kernels, pages of memory
        peaks[name] = trial(partial(updates.step, name), torch.device("cpu")).peak_memory
    rounds: list[dict[str, tuple[float, float]]] = []
    order = np.random.default_rng(0)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(rounds) < LEAST_ROUNDS:
        one = {}
        for name in order.permutation(names).tolist():
            if name == "row_each" and name != chosen and len(rounds) % 3:
                continue  # takes long
            start = time.perf_counter(), time.process_time()
            updates.step(name)
            one[name] = time.perf_counter() - start[0], time.process_time() - start[1]
        rounds.append(one)

    def least(name: str, clock: int) -> float:
        return min(one[name][clock] for one in rounds if name in one)

    def ratio(name: str, clock: int) -> float:
        return median(one[name][clock] / one[chosen][clock] for one in rounds if name in one)

    return {
        "chosen": chosen,
        "rankings_per_row_by_mask": updates.by_mask,
        "rounds": len(rounds),
        "wall": {name: least(name, 0) for name in names},
        "processor": {name: least(name, 1) for name in names},
        "ratio_wall": {name: ratio(name, 0) for name in names},
        "ratio": {name: ratio(name, 1) for name in names},
        "peak_memory": peaks,
    }


def whole_step(task: TrainingTask) -> dict[str, Any]:
    """Seconds of the processor of a trainer's whole step, sampling and optimiser included, without a mask and with."""
    clocks: dict[str, list[float]] = {"prefix": [], "mask": []}
    with one_step("ours", task) as step:
        step()
        for i in range(2 * STEPS):
            name = ("prefix", "mask", "mask", "prefix")[i % 4]
            with patch.multiple(packing, **ALWAYS[name]):
                start = time.process_time()
                step()
                clocks[name].append(time.process_time() - start)
    ratio = median(mask / prefix for prefix, mask in zip(clocks["prefix"], clocks["mask"], strict=True))
    return {"processor": {name: min(times) for name, times in clocks.items()}, "ratio": ratio}


def table(points: list[dict[str, Any]]) -> str:
    lines = [
        "| prompt | rankings | tokens each | no mask | mask | a row each | MiB, no mask | mask | a row each |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for point in points:
        longest, shortest = point["prompt"], round(point["shortest"] * point["prompt"])
        lengths = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
        chosen = point["chosen"]
        times = [f"{point['ratio'][name]:.2f}x" if name in point["ratio"] else "" for name in METHODS]
        times[METHODS.index(chosen)] = f"{1e3 * point['processor'][chosen]:.1f} ms"
        memory = [f"{peak / 2**20:.0f}" if (peak := point["peak_memory"].get(name)) else "" for name in METHODS]
        sizes = lengths, f"{point['prompts']} x {point['generations']}", str(point["candidates"])
        lines.append(f"| {' | '.join([*sizes, *times, *memory])} |")
    return "\n".join(lines)


def attention_tables(found: dict[str, Any]) -> str:
    lines = [
        "| prompt, rankings, tokens | mask over the row | parts merged | prompt's keys copied to every ranking "
        "| mask over rankings only | a row each |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found["attention"]:
        lines.append(f"| {one['shape']} | {' | '.join(f'{1e3 * x:.1f}' for x in one['processor'].values())} |")
    lines += ["", "| rows, prompt, rankings, tokens so far | mask | in parts |", "| --- | ---: | ---: |"]
    for one in found["decoding"]:
        lines.append(f"| {one['shape']} | {' | '.join(f'{1e6 * x:.0f}' for x in one['processor'].values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for shared_prefix.json")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each point")
    parser.add_argument("--only", choices=["table"], help="print what the file holds, measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "shared_prefix.json"
    found = json.loads(path.read_text()) if path.is_file() else {"points": []}
    known = {(p["prompt"], p["generations"], p["candidates"], p["shortest"]) for p in found["points"]}
    for prompt, generations, candidates, shortest in () if arguments.only else POINTS:
        if (prompt, generations, candidates, shortest) in known:
            continue
        prompts = max(1, min(8, 8000 // (prompt + generations * candidates)))
        task = TrainingTask(prompts=prompts, num_generations=generations, candidates=candidates, prompt_length=prompt)
        sizes = {
            "prompt": prompt,
            "shortest": shortest,
            "prompts": prompts,
            "generations": generations,
            "candidates": candidates,
        }
        found["points"].append(sizes | measured(task, shortest, arguments.seconds))
        found |= {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": 1,
        }
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(table(found["points"][-1:]).splitlines()[-1], flush=True)
    whole = found.setdefault("whole_steps", [])
    for prompt, generations, candidates in () if arguments.only else WHOLE[len(whole) :]:
        task = TrainingTask(prompts=8, num_generations=generations, candidates=candidates, prompt_length=prompt)
        whole.append({"shape": task.shape, **whole_step(task)})
        path.write_text(json.dumps(found, indent=1) + "\n")
    alone = (
        ("attention", shared_attention.training, shared_attention.TRAINING),
        (
            "decoding",
            shared_attention.decoding,
            shared_attention.DECODING,
        ),
    )
    for name, measure, shapes in alone:
        times = found.setdefault(name, [])
        for shape in () if arguments.only else shapes[len(times) :]:
            times.append({"shape": ", ".join(f"{size:,}" for size in shape), "processor": measure(*shape)})
            path.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["points"]))
    for one in whole:
        print(f"{one['shape']}: {one['processor']['prefix']:.2f} s, by a mask {one['ratio']:.2f}x")
    print(attention_tables(found))


if __name__ == "__main__":
    main()
