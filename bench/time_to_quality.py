"""NDCG@5 over seconds of training: a run of ``flexrec train`` against TRL's GRPO from the same base.

    flexrec train --dataset movielens --data DIR --need interest --eval-every 5 --output RUN
    python bench/time_to_quality.py RUN --output DIR                    20 to 50 minutes
    python bench/time_to_quality.py RUN --output DIR --answers free     a further curve: TRL as it comes
    python bench/time_to_quality.py RUN --output DIR --only plot        the figure anew, from the curves

The second command loads RUN's base (the model after the format stage), trains it by TRL's GRPOTrainer with the list's
NDCG as its reward (of the same gains, the critic's among them; its rollouts constrained as ours are), evaluates it on
the same test lists after every few steps, and draws both curves. Evaluation counts for neither. FlexRec's seconds are
wall-clock from the base on, its supervised warm-up included; TRL's are the processor's, which wall-clock cannot fall
below in a process of one thread (run both with OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.peer_trl import grpo_trainer
from flexrec.evaluation.evaluate import rank_examples
from flexrec.evaluation.statistics import rank_metrics
from flexrec.experiment.run_folder import RunInfo
from flexrec.experiment.stages import load_dataset
from flexrec.task.critic import Critic
from flexrec.task.examples import RankingTask, TrainingExamples
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder

# What TRL's policy samples. TRL itself samples free text, of the whole vocabulary. The base's prompts name the
# candidates, as item tokens, but it learnt rankings by log-probs among the candidates alone, which say nothing about
# other tokens: it hardly ever names a candidate, so that most of a ranking is the repair of what it left out.
ANSWERS = {"constrained": "rankings only", "free": "free text"}


class _Curve(TrainerCallback):
    """Evaluates before the first step and after every few; what that takes is not counted."""

    def __init__(self, evaluate: Any, every: int, path: Path) -> None:
        self.evaluate, self.every, self.path = evaluate, every, path
        self.points: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        self._add(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._add(state.global_step, model)

    def _add(self, step: int, model: Any) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        point = {"step": step, "seconds": round(wall - self.wall, 1), "cpu_seconds": round(cpu - self.cpu, 1)}
        point["ndcg@5"] = self.evaluate(model)
        self.points.append(point)
        self.path.write_text(json.dumps(self.points, indent=1) + "\n")
        print(point, flush=True)
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def train_with_trl(
    run: Path, output: Path, answers: str, steps: int, prompts: int, generations: int, every: int, lr: float
) -> None:
    """Writes the curve to ``output`` as it goes."""
    info = RunInfo.load(run / "base")
    model = AutoModelForCausalLM.from_pretrained(run / "base")
    builder = PromptBuilder(
        AutoTokenizer.from_pretrained(run / "base"),
        encoding=info.encoding,
        show_titles=info.show_titles,
        show_rising=info.show_rising,
    )
    dataset = load_dataset(info.dataset, info.data, info.seed)
    needs = [get_need(name) for name in info.needs]
    # TRL gets what FlexRec gets: the same base, prompts and gains, missing ones filled in by the same critic.
    critic = Critic.fit(dataset.log, dataset.catalogue, seed=info.seed) if dataset.unobserved == "critic" else None
    task = RankingTask(dataset.catalogue, needs, builder, critic)
    tests = [task.test_example(lst, need) for need in needs for lst in dataset.test]
    training = TrainingExamples(task, dataset.train, resample=dataset.resample, seed=info.seed)
    examples = [training[i] for i in range(min(len(training), steps * prompts))]

    def evaluate(model: Any) -> float:
        rankings = rank_examples(model, tests, builder, num_ranked=10)
        gains = np.zeros((len(tests), max(len(example.gains) for example in tests)))
        for n, (example, ranking) in enumerate(zip(tests, rankings, strict=True)):
            rest = np.setdiff1d(np.arange(len(example.gains)), ranking)
            gains[n, : len(example.gains)] = example.gains[np.concatenate([ranking, rest])]
        lengths = np.array([len(example.gains) for example in tests])
        return float(rank_metrics(gains, ["ndcg@5"], lengths=lengths)["ndcg@5"].mean())

    items = max(len(example.candidates) for example in examples)
    longest = max(len(sequence) for example in examples for sequence in example.candidates)
    curve = _Curve(evaluate, every, output)
    trainer = grpo_trainer(
        model,
        examples,
        separator=builder.separator,
        end=builder.end,
        prompts_per_step=prompts,
        num_generations=generations,
        answer_length=items * (longest + len(builder.separator)),
        constrained=answers == "constrained",
        steps=steps,
        learning_rate=lr,
        seed=info.seed,
        callbacks=[curve],
        output_dir=str(output.parent / "trl"),
    )
    trainer.train()


def flexrec_curve(run: Path) -> list[dict[str, Any]]:
    """Steps and seconds since the base, and NDCG@5, of a run of ``flexrec train``, the warm-up counted."""
    entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    trained = ("format", "listwise warm-up", "reinforcement")
    evaluations = [entry for entry in entries if entry["stage"] == "evaluation" and entry["of"] in trained]
    base = next(entry for entry in reversed(evaluations) if entry["of"] == "format")
    return [
        {
            "step": entry["steps"] - base["steps"],
            "seconds": round(entry["seconds"] - base["seconds"], 2),
            "ndcg@5": float(np.mean([of_need["ndcg@5"] for of_need in entry["means"].values()])),
        }
        for entry in evaluations
        if entry["steps"] >= base["steps"]
    ]


def time_to_reach(curve: list[dict[str, Any]], quality: float, clock: str) -> float | None:
    """Seconds at the first point of the curve that has ``quality``, None if there is none."""
    return next((point[clock] for point in curve if point["ndcg@5"] >= quality), None)


def verdict(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """How long FlexRec takes to where TRL ended (or was stopped), and to the best that TRL reached on the way."""
    last = theirs[-1]
    best = max(theirs, key=lambda point: point["ndcg@5"])
    lines = [f"TRL after {last['step']} steps, {last['cpu_seconds']:.0f} s: NDCG@5 {last['ndcg@5']:.3f}. "]
    lines[0] += _reached(ours, last)
    if best is not last:
        lines.append(
            f"TRL's best, after {best['step']} steps, {best['cpu_seconds']:.0f} s: NDCG@5 {best['ndcg@5']:.3f}. "
        )
        lines[1] += _reached(ours, best)
    return "\n".join(lines)


def _reached(ours: list[dict[str, Any]], point: dict[str, Any]) -> str:
    needed = time_to_reach(ours, point["ndcg@5"], "seconds")
    if needed is None:
        return f"FlexRec ended at {ours[-1]['ndcg@5']:.3f}, below it."
    return (
        f"FlexRec was there at its evaluation after {needed:.0f} s ({needed / point['cpu_seconds']:.1%} of the time)."
    )


def draw(ours: list[dict[str, Any]], trl: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """``trl``: a curve for each kind of answers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "flexrec"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    curves = [("FlexRec", ours, "seconds"), *((f"TRL GRPO, {name}", c, "cpu_seconds") for name, c in trl.items())]
    for name, curve, clock in curves:
        axes.plot([p[clock] for p in curve], [p["ndcg@5"] for p in curve], marker="o", markersize=3, label=name)
    axes.set(xlabel="seconds of training from the same base", ylabel="NDCG@5 on users never trained on", title=title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of `flexrec train --eval-every N`")
    parser.add_argument("--output", type=Path, required=True, help="folder for the curves and the figure")
    parser.add_argument("--answers", choices=list(ANSWERS), default="constrained", help="what TRL samples")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--every", type=int, default=25, help="evaluate every so many steps")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of TRL, cosine to 0")
    parser.add_argument("--only", choices=["plot"], help="draw the curves that --output holds, train nothing")
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    if arguments.only != "plot":
        curve = flexrec_curve(arguments.run)
        (output / "flexrec.json").write_text(json.dumps(curve, indent=1) + "\n")
        train_with_trl(
            arguments.run,
            output / f"trl_{arguments.answers}.json",
            arguments.answers,
            arguments.steps,
            arguments.prompts,
            arguments.generations,
            arguments.every,
            arguments.learning_rate,
        )
    ours = json.loads((output / "flexrec.json").read_text())
    files = {description: output / f"trl_{answers}.json" for answers, description in ANSWERS.items()}
    trl = {description: json.loads(file.read_text()) for description, file in files.items() if file.is_file()}
    draw(ours, trl, RunInfo.load(arguments.run / "base").dataset, output / "time_to_quality.svg")
    for description, theirs in trl.items():
        print(f"{description}: {verdict(ours, theirs)}")


if __name__ == "__main__":
    main()
