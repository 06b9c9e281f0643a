"""What an experiment measured: every metric of every test list, and the files that it is written to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flexrec.evaluation.statistics import METRICS, Comparison, rank_metrics, relative_change
from flexrec.policy.distributed import map_over_processes, process_index
from flexrec.ranker import rank_examples
from flexrec.task.examples import Example
from flexrec.task.prompts import PromptBuilder


@dataclass
class Results:
    """Per-list metrics of every system and need, and the seconds every stage took."""

    users: np.ndarray  # (L,) user of each test list
    per_list: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)  # system, need, metric: (L,)
    seconds: dict[str, float] = field(default_factory=dict)

    def means(self, system: str) -> dict[str, dict[str, float]]:
        return {
            need: {metric: float(values.mean()) for metric, values in metrics.items()}
            for need, metrics in self.per_list[system].items()
        }

    def compare(self, new: str, base: str, need: str, metric: str = "ndcg@5") -> Comparison:
        """Paired comparison over the test lists, lists of one user resampled together."""
        values = self.per_list
        return relative_change(values[new][need][metric], values[base][need][metric], clusters=self.users)


def write_results(folder: Path, config: Mapping[str, Any], results: Results) -> None:
    """Write metrics.json (means, changes, configuration, seconds) and per_list.npz (every value, for paired tests)."""
    baselines = [name for name in results.per_list if name not in ("base", "trained")]
    changes = {
        need: {base: asdict(results.compare("trained", base, need)) for base in ("base", *baselines)}
        for need in results.per_list["base"]
    }
    metrics = {
        "base": results.means("base"),
        "trained": results.means("trained"),
        "baselines": {name: results.means(name) for name in baselines},
        "changes_ndcg@5": changes,
        "config": config,
        "seconds": {name: round(seconds, 2) for name, seconds in results.seconds.items()},
    }
    arrays: dict[str, Any] = {
        f"{system}/{need}/{metric}": values
        for system, needs in results.per_list.items()
        for need, per_metric in needs.items()
        for metric, values in per_metric.items()
    }
    np.savez_compressed(folder / "per_list.npz", users=results.users, **arrays)
    partial = folder / "metrics.json.partial"
    partial.write_text(json.dumps(metrics, indent=2) + "\n")
    partial.replace(folder / "metrics.json")


class Evaluation:
    """Greedy rankings of the test examples of every need, shared out among the processes, and their metrics."""

    def __init__(self, tests: dict[str, list[Example]], builder: PromptBuilder, num_ranked: int | None) -> None:
        self.tests = tests
        self.builder = builder
        self.num_ranked = num_ranked

    def __call__(self, model: Any, name: str) -> dict[str, dict[str, np.ndarray]]:
        def rank(examples: Sequence[Example]) -> list[np.ndarray]:
            return rank_examples(
                model,
                examples,
                self.builder,
                num_ranked=self.num_ranked,
                description=f"Evaluating {name}, {examples[0].need}" if examples and process_index() == 0 else None,
            )

        return self.of_rankings({need: map_over_processes(rank, examples) for need, examples in self.tests.items()})

    def of_rankings(self, rankings: dict[str, list[np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
        """need -> metric -> (L,) values of rankings given as candidate indices, best first."""
        results = {}
        for need, examples in self.tests.items():
            lengths = np.array([len(example.gains) for example in examples])
            gains = np.zeros((len(examples), lengths.max()), dtype=np.float64)
            ranked = np.array([len(ranking) for ranking in rankings[need]])
            for n, (example, ranking) in enumerate(zip(examples, rankings[need], strict=True)):
                rest = np.setdiff1d(np.arange(lengths[n]), ranking)
                gains[n, : lengths[n]] = example.gains[np.concatenate([ranking, rest])]
            results[need] = rank_metrics(gains, METRICS, lengths=lengths, num_ranked=ranked)
        return results
