"""What is done with the critic's uncertainty, compared: the table of docs/notes/uncertainty.md.

    python examples/uncertainty_table.py run --results runs.jsonl     # one line for every run; goes on where it stopped
    python examples/uncertainty_table.py table --results runs.jsonl   # prints the table
    python examples/uncertainty_table.py critics                      # another table: how good the critics' models are

For every condition (which feedback is missing, how much of it is collected) and seed there are one world, one critic
and one start, which all variants share; then every variant reinforces it for the same few steps. "format" starts from a
model that has seen no label, so that reinforcement does all of the learning; "listwise" from one that has imitated the
critic.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from flexrec.data.lists import RankingDataset
from flexrec.data.simulator import simulate
from flexrec.evaluation.critic import critic_quality
from flexrec.evaluation.evaluate import Evaluation, rank_examples
from flexrec.evaluation.statistics import Comparison, relative_change
from flexrec.policy.small_model import build_model, build_tokenizer, item_vectors, starting_rows
from flexrec.task.critic import MODELS, Critic
from flexrec.task.examples import RankingTask, TrainingExamples
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer
from flexrec.trainer.supervised import SupervisedTrainer

NEED = "interest"
METRIC = "ndcg@5"


@dataclass(frozen=True)
class Variant:
    """What a run does with what the critic does not know."""

    fuse: bool = True  # observed feedback and critic, by precision
    uncertainty: str = "none"
    shuffle_weights: bool = False
    pessimism: float = 0.0
    sample_gains: bool = False

    def of_trainer(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("uncertainty", "shuffle_weights", "pessimism", "sample_gains")}


VARIANTS = {
    "none": Variant(fuse=False),
    "fused": Variant(),
    "rollout": Variant(uncertainty="rollout"),
    "item": Variant(uncertainty="item"),
    "shuffled": Variant(uncertainty="item", shuffle_weights=True),
    "pessimism": Variant(pessimism=1.0),
    "posterior": Variant(sample_gains=True),
}


@dataclass(frozen=True)
class Budget:
    """How much is computed; steps are optimiser steps of ``prompts`` prompts, a ranking each."""

    users: int = 1500
    test_users: int = 300
    hidden_size: int = 64
    layers: int = 2
    history: int = 12
    prompts: int = 64
    format_steps: int = 20
    listwise_steps: int = 40
    steps: int = 40
    early: int = 12  # after so many steps runs are measured, too
    learning_rate: float = 2e-3


@dataclass
class Start:
    """What the variants of a condition, a seed and a start share."""

    dataset: RankingDataset
    critic: Critic
    quality: dict[str, float]
    model: Any
    builder: PromptBuilder
    evaluate: Evaluation


def make_start(missing: str, rate: float, seed: int, kind: str, budget: Budget) -> Start:
    set_seed(seed)
    dataset = simulate(
        num_users=budget.users,
        num_test_users=budget.test_users,
        history_length=budget.history,
        missing=missing,
        observed_share=rate / 100,
        seed=seed,
    )
    catalogue, need = dataset.catalogue, get_need(NEED)
    critic = Critic.fit(dataset.log, catalogue, lists=dataset.train, noise=dataset.noise, seed=seed)
    tokenizer = build_tokenizer(catalogue, need.wordings)
    vectors = item_vectors(dataset.log, len(catalogue), budget.hidden_size, seed=seed)
    model = build_model(
        tokenizer,
        rows=starting_rows(catalogue, vectors, seed=seed),
        hidden_size=budget.hidden_size,
        num_layers=budget.layers,
        seed=seed,
    )
    builder = PromptBuilder(tokenizer, encoding="item_token", show_titles=False, described=True)
    task = RankingTask(catalogue, [need], builder)
    tests = {NEED: [task.test_example(lst, need) for lst in dataset.test]}
    start = Start(
        dataset, critic, critic_quality(critic, dataset.test), model, builder, Evaluation(tests, builder, num_ranked=5)
    )
    stages = [("format", budget.format_steps)] + [("listwise", budget.listwise_steps)] * (kind == "listwise")
    for stage, steps in stages:
        trainer = SupervisedTrainer(
            model,
            TrainingArguments(**_arguments(budget, steps, seed)),
            examples_of(start, Variant(), seed),
            stage=stage,
            num_imitated=5,
            separator=builder.separator,
            end=builder.end,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return start


def examples_of(start: Start, variant: Variant, seed: int) -> TrainingExamples:
    start.critic.fuse = variant.fuse
    task = RankingTask(start.dataset.catalogue, [get_need(NEED)], start.builder, start.critic)
    return TrainingExamples(task, start.dataset.train, seed=seed)


def reinforced(start: Start, variant: Variant, seed: int, budget: Budget) -> tuple[np.ndarray, np.ndarray]:
    """(L,) the metric of every test list after the early steps and after all steps of this variant."""
    model = copy.deepcopy(start.model)
    early = _Early(start, budget.early)
    trainer = FlexRecTrainer(
        model,
        FlexRecConfig(**_arguments(budget, budget.steps, seed), metric=METRIC, temperature=0.3, **variant.of_trainer()),
        examples_of(start, variant, seed),
        separator=start.builder.separator,
        end=start.builder.end,
        callbacks=[early],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return early.values, measured(start, model)


def measured(start: Start, model: Any) -> np.ndarray:
    rankings = rank_examples(model, start.evaluate.tests[NEED], start.builder, num_ranked=5)
    return start.evaluate.of_rankings({NEED: rankings})[NEED][METRIC]


class _Early(TrainerCallback):
    def __init__(self, start: Start, step: int) -> None:
        self.start, self.step, self.values = start, step, np.zeros(0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            model.eval()
            self.values = measured(self.start, model)
            model.train()


def _arguments(budget: Budget, steps: int, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(Path(tempfile.gettempdir()) / "uncertainty_table"),  # nothing is written
        "max_steps": steps,
        "per_device_train_batch_size": budget.prompts,
        "learning_rate": budget.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(5, steps // 4),
        "weight_decay": 0.01,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": seed,
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": False,
    }


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    budget = replace(Budget(), **json.loads(options.budget))
    done = {_key(line) for line in read(options.results)}
    for seed in options.seeds:
        for rate in options.rates:
            for missing in options.missing:
                key = (missing, rate, seed, options.start)
                todo = [name for name in options.variants if (*key, name) not in done]
                if todo:
                    run_variants(key, todo, budget, options.results)


def run_variants(key: tuple[str, float, int, str], names: list[str], budget: Budget, results: Path) -> None:
    missing, rate, seed, kind = key
    before = time.process_time()
    start = make_start(*key, budget)
    setup = time.process_time() - before
    users = np.array([lst.user for lst in start.dataset.test])
    about = {"missing": missing, "rate": rate, "seed": seed, "start": kind}
    for name in names:
        before = time.process_time()
        early, values = reinforced(start, VARIANTS[name], seed, budget)
        of_users = [round(float(values[users == user].mean()), 4) for user in np.unique(users)]
        line = {
            **about,
            "variant": name,
            "mean": round(float(values.mean()), 5),
            "early": round(float(early.mean()), 5),
            "cpu_seconds": [round(setup, 1), round(time.process_time() - before, 1)],
            "critic": start.quality,
            "users": of_users,
        }
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(*about.values(), name, line["early"], line["mean"], line["cpu_seconds"], flush=True)


def critics(options: argparse.Namespace) -> None:
    """Means over the seeds, on users who are not in the log and against their expected interest."""
    torch.set_num_threads(1)
    names = ("rmse", "bias", "nll", "coverage@50", "coverage@80", "coverage@95")
    print(f"| missing | % | model | {' | '.join(names)} | CPU s |\n|---|---:|---|{'---:|' * 7}")
    for missing in options.missing:
        for rate in sorted(options.rates):
            found: dict[str, list[list[float]]] = {name: [] for name in MODELS}
            for seed in options.seeds:
                data = simulate(missing=missing, observed_share=rate / 100, seed=seed)
                for name, of_seeds in found.items():
                    before = time.process_time()
                    critic = Critic.fit(
                        data.log, data.catalogue, model=name, lists=data.train, noise=data.noise, seed=seed
                    )
                    seconds = time.process_time() - before
                    quality = critic_quality(critic, data.test)
                    of_seeds.append([*(quality[measure] for measure in names), seconds])
            for name, of_seeds in found.items():
                *measures, seconds = np.mean(of_seeds, axis=0)
                cells = [f"{v:.3f}" for v in measures[:3]] + [f"{v:.0f}" for v in measures[3:]]
                print(f"| {missing} | {rate:g} | {name} | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("missing", "rate", "seed", "start", "variant"))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for all of the table (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def table(options: argparse.Namespace) -> None:
    found = {_key(line): line for line in read(options.results)}
    for kind in sorted({key[3] for key in found}):
        conditions = sorted({key[:2] for key in found if key[3] == kind}, key=lambda c: (c[0] != "random", c[1]))
        changes = {}
        for missing, rate in conditions:
            for name in VARIANTS:
                key = (missing, rate, kind, name)
                if name != "fused" and (change := _change(found, *key)) is not None:
                    changes[key] = change
        adjusted = dict(zip(changes, holm([change.p_value for change in changes.values()]), strict=True))
        seeds = [sum(key[:2] == c and key[3:] == (kind, "fused") for key in found) for c in conditions]
        print(f"\nStart: {kind}. {METRIC} of fused, 1000 x the change against it; * p < 0.05 after Holm over the table")
        print(f"\n| | {' | '.join(f'{missing}, {rate:g} %' for missing, rate in conditions)} |")
        print(f"|---|{'---:|' * len(conditions)}")
        print(f"| seeds | {' | '.join(map(str, seeds))} |")
        for name in VARIANTS:
            cells = []
            for missing, rate in conditions:
                key = (missing, rate, kind, name)
                means = [line["mean"] for k, line in found.items() if k == (missing, rate, k[2], kind, name)]
                if name == "fused":
                    cells.append(f"{np.mean(means):.3f}" if means else "")
                elif change := changes.get(key):
                    ends = f"[{1000 * change.difference_low:+.0f}, {1000 * change.difference_high:+.0f}]"
                    cells.append(f"{1000 * change.difference:+.1f} {ends}{'*' if adjusted[key] < 0.05 else ''}")
                else:
                    cells.append("")
            print(f"| {name} | {' | '.join(cells)} |")
        print(f"\n| | runs | {METRIC}, mean change against fused | p | the same early on | p |")
        print("|---|---:|---:|---:|---:|---:|")
        for name in VARIANTS:
            if name != "fused":
                ends_of = [_over_runs(found, kind, name, measure) for measure in ("mean", "early")]
                if ends_of[0][0] > 1:
                    cells = [f"{mean:+.4f} (se {error:.4f}) | {p:.3f}" for _, mean, error, p in ends_of]
                    print(f"| {name} | {ends_of[0][0]} | {' | '.join(cells)} |")


def _change(found: dict[Any, Any], missing: str, rate: float, kind: str, name: str) -> Comparison | None:
    """Against fused, over the test users of all seeds that have both."""
    seeds = [key[2] for key in found if key == (missing, rate, key[2], kind, name)]
    both = [seed for seed in seeds if (missing, rate, seed, kind, "fused") in found]
    if not both:
        return None
    new, base = (
        np.concatenate([found[missing, rate, seed, kind, one]["users"] for seed in both]) for one in (name, "fused")
    )
    return relative_change(new, base, num_samples=10_000)


def _over_runs(found: dict[Any, Any], kind: str, name: str, measure: str) -> tuple[int, float, float, float]:
    """Over all conditions and seeds: how many runs, their mean change against fused, its standard error, and the p of
    flipping the signs of whole runs."""
    changes = [
        line[measure] - found[(*key[:4], "fused")][measure]
        for key, line in found.items()
        if key[3:] == (kind, name) and (*key[:4], "fused") in found
    ]
    runs = np.array(changes)
    if len(runs) < 2:
        return len(runs), 0.0, 0.0, 1.0
    p = relative_change(runs, np.zeros_like(runs), num_samples=10_000).p_value
    return len(runs), float(runs.mean()), float(runs.std(ddof=1) / len(runs) ** 0.5), p


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "critics"))
    parser.add_argument("--results", type=Path, default=Path("uncertainty.jsonl"), help="a line of JSON for every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=[10.0, 3.0, 30.0], help="percent of the feedback")
    parser.add_argument("--missing", nargs="+", default=["random", "exposure"])
    parser.add_argument("--start", choices=("format", "listwise"), default="format")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--budget", default="{}", help="what to change of the budget, as JSON")
    options = parser.parse_args()
    {"run": run, "table": table, "critics": critics}[options.action](options)


if __name__ == "__main__":
    main()
