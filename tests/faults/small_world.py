"""A run and its rankings as they are when nothing disturbs them, and how others compare with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from processes import Outcome, command
from safetensors.numpy import load_file

MOMENTS = range(int(os.environ.get("FLEXREC_FAULTS", "1")))  # of each kind; in make test-faults more
OPTIONS = "--steps 4 --save-every 1 --warmup-steps 1 --listwise-steps 1 --prompts-per-step 2 --num-generations 2"
OPTIONS += " --beta 0.05 --need interest --no-critic --baselines random"
REQUESTS, BATCH = 60, 4


class SmallWorld:
    """An undisturbed run, its answers to requests, and what each of the two took."""

    def __init__(self, folder: Path) -> None:
        self.run, self.requests, self.answers = folder / "run", folder / "requests.jsonl", folder / "answers.jsonl"
        self.train = command(training(self.run), folder / "train.log")
        assert self.train.code == 0, self.train.said
        ids = json.loads((self.run / "catalogue.json").read_text())["ids"]
        with self.requests.open("w") as file:
            for n in range(REQUESTS):
                candidates = [{"id": ids[(n + 7 * k) % len(ids)]} for k in range(5)]
                request = {"need": "interest", "history": ids[n % 9 : n % 9 + 3], "candidates": candidates}
                file.write(json.dumps(request) + "\n")
        self.rank = command(self.ranking(self.requests, self.answers), folder / "rank.log")
        assert self.rank.code == 0, self.rank.said

    def ranking(self, requests: Path, answers: Path) -> list[str]:
        files = ["--input", str(requests), "--output", str(answers)]
        return ["rank", "--run", str(self.run), *files, "--batch-size", str(BATCH)]

    def check(self, run: Path) -> None:
        """Every weight, every metric of every list and every step of the log are those of the undisturbed run."""
        ours, theirs = load_file(self.run / "model.safetensors"), load_file(run / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            np.testing.assert_array_equal(theirs[name], values, err_msg=name)
        with np.load(self.run / "per_list.npz") as expected, np.load(run / "per_list.npz") as found:
            assert found.files == expected.files
            for name in expected.files:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        assert logged(run) == logged(self.run)
        assert not list(run.rglob("*.partial"))


def training(run: Path) -> list[str]:
    return ["train", "--output", str(run), *OPTIONS.split()]


def resume(run: Path, log: Path) -> Outcome:
    """Go on with a run that was disturbed, unless it had come to its end."""
    if (run / "metrics.json").is_file():
        return Outcome(0, "finished before", 0.0, 0)
    return command([*training(run), "--resume"], log)


def logged(run: Path) -> list[tuple[str, int]]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(line["stage"], line["step"]) for line in lines]
