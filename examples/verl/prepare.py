"""The lists of a FlexRec data set as files that verl (parquet) or OpenRLHF (JSON lines) trains on.

    python examples/verl/prepare.py --dataset movielens --data ml-1m --need interest --output data/movielens
    python examples/verl/prepare.py --dataset simulated --need explore --format openrlhf --output data/simulated

A row is one list under one need: the prompt, which asks for a ranking of labels such as "[2] > [1] > [3]", and the
ground truth, what each candidate is worth (see flexrec.integrations.responses). Test lists are of other users.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flexrec.data.options import OPTIONS
from flexrec.experiment import load_dataset
from flexrec.task import NEEDS, Critic, Example, Need, PromptBuilder, RankingTask, TrainingExamples, get_need
from flexrec.task.prompts import RANKING

ANSWER = (
    "\nAnswer with the labels of all {count} candidates, best first, in the form [2] > [1] > [3], and nothing else."
)


class Characters:
    """A tokenizer whose tokens are characters, so that the prompt of a :class:`PromptBuilder` is text again."""

    bos_token_id = None
    eos_token_id = 0

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(character) for character in text]


def row_of(example: Example, split: str, index: int) -> dict[str, Any]:
    """What verl reads of one prompt: the columns of its data sets."""
    text = "".join(map(chr, example.prompt)).removesuffix(RANKING) + ANSWER.format(count=len(example.candidates))
    ground_truth: dict[str, Any] = {"gains": example.gains.tolist()}
    if np.any(example.variance > 0):
        ground_truth["gain_variance"] = example.variance.tolist()
    return {
        "data_source": f"flexrec/{example.need}",
        "prompt": [{"role": "user", "content": text}],
        "reward_model": {"style": "rule", "ground_truth": json.dumps(ground_truth)},
        "extra_info": {"split": split, "index": index, "need": example.need, "user": example.user},
    }


def write_verl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path.with_suffix(".parquet"))


def write_openrlhf(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Messages under "input", the ground truth under "label"."""
    with path.with_suffix(".jsonl").open("w") as file:
        for row in rows:
            line = {"datasource": row["data_source"], "input": row["prompt"]}
            file.write(json.dumps({**line, "label": row["reward_model"]["ground_truth"]}) + "\n")


WRITERS = {"verl": write_verl, "openrlhf": write_openrlhf}


def useful(examples: Iterable[Example], split: str, most: int | None) -> Iterator[dict[str, Any]]:
    """Rows of the examples in which some candidate is worth something; of any other every ranking scores 0."""
    index = 0
    for example in examples:
        if index == most:
            return
        if example.gains.any():
            yield row_of(example, split, index)
            index += 1


def prepare(options: argparse.Namespace) -> dict[str, Path]:
    """Write train and test; returns where."""
    dataset = load_dataset(options.dataset, options.data, options.seed)
    needs: Sequence[Need] = [get_need(name) for name in options.need]
    critic = None
    if dataset.unobserved == "critic":
        critic = Critic.fit(dataset.log, dataset.catalogue, seed=options.seed, progress=True)
    builder = PromptBuilder(Characters(), encoding="index", show_rising=any(need.name == "trend" for need in needs))
    task = RankingTask(dataset.catalogue, needs, builder, critic)
    training = TrainingExamples(task, dataset.train, seed=options.seed)
    order = np.random.default_rng(options.seed).permutation(len(training))
    splits = {
        "train": useful((training[int(i)] for i in order), "train", options.train_lists),
        "test": useful(
            (task.test_example(lst, need) for lst in dataset.test for need in needs), "test", options.test_lists
        ),
    }
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        WRITERS[options.format](folder / name, rows)
    suffix = {"verl": ".parquet", "openrlhf": ".jsonl"}[options.format]
    return {name: (folder / name).with_suffix(suffix) for name in splits}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=tuple(OPTIONS), required=True)
    parser.add_argument("--data", metavar="DIR", help="the data set's folder, in its published format")
    parser.add_argument("--need", nargs="+", choices=tuple(NEEDS), default=["interest"])
    parser.add_argument("--format", choices=tuple(WRITERS), default="verl")
    parser.add_argument("--train-lists", type=int, default=5000, help="at most (5000, as the paper)")
    parser.add_argument("--test-lists", type=int, default=1000, help="at most (1000, as the paper)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="DIR", required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    for written in prepare(parse()).values():
        print(written)
