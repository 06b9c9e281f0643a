"""What a long run of a language model takes besides the model: what the C library and oneDNN keep."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexrec.experiment import stages, training
from flexrec.experiment.config import ExperimentConfig
from flexrec.trainer.callbacks import Clock, ProgressBar, Stage, StepLog


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what the process takes, and glibc to give it back")
def test_memory_between_what_is_kept_is_given_back():
    def taken():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    states = [torch.ones(16_384) for _ in range(4096)]  # 64 KiB each, 256 MiB
    kept = states[::64]
    del states
    before = taken()
    training.trim_memory()
    assert taken() < before - 2**27
    assert all(bool((state == 1).all()) for state in kept)


@pytest.mark.parametrize(("model", "times"), [("some/model", 1), ("embedded", 0)])
def test_a_language_model_gives_memory_back_after_every_step(tmp_path, monkeypatch, model, times):
    calls = []
    monkeypatch.setattr(training, "trim_memory", lambda: calls.append(1))
    config = ExperimentConfig(output=str(tmp_path), model=model)
    log = StepLog(tmp_path / "log.jsonl", append=False)
    run = training.Training(config, examples=None, builder=None, log=log, clock=Clock(), evaluate=None)
    for listener in run._listeners("a stage", Stage("a stage")):
        if not isinstance(listener, ProgressBar):
            listener.on_step_end(None, None, None)
    assert len(calls) == times


PRODUCTS = """
import ctypes, sys, torch
from pathlib import Path
from flexrec.experiment.training import keep_few_kernels

def taken():
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.set_num_threads(1)
if sys.argv[1] == "few":
    keep_few_kernels()
weight = torch.ones(256, 512, dtype=torch.bfloat16)
states = torch.ones(400, 256, dtype=torch.bfloat16)
states[:100] @ weight
before = taken()
for length in range(101, 400):
    states[:length] @ weight
print(taken() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what the process takes, and glibc to give it back")
def test_kernels_of_past_shapes_are_not_kept():
    """Where oneDNN makes kernels for bfloat16 at all; elsewhere nothing is kept either way."""
    environment = {name: value for name, value in os.environ.items() if name not in training.KERNEL_CACHES}
    command = [sys.executable, "-c", PRODUCTS]
    all_of_them, few = (
        int(subprocess.run([*command, kept], env=environment, capture_output=True, check=True).stdout)
        for kept in ("all", "few")
    )
    assert few < 60e6
    if all_of_them > 80e6:
        assert few < all_of_them / 2


def test_a_users_own_number_of_kernels_stands(monkeypatch):
    first, second = training.KERNEL_CACHES
    monkeypatch.setenv(first, "7")
    monkeypatch.setenv(second, "")  # so that it is put back
    monkeypatch.delenv(second)
    training.keep_few_kernels()
    assert (os.environ[first], os.environ[second]) == ("7", "64")


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_in_half_precision_keeps_few_kernels(tmp_path, monkeypatch, recorded, bf16):
    calls = []
    monkeypatch.setattr(stages, "keep_few_kernels", lambda: calls.append(1))
    recorded.run(tmp_path / "run", bf16=bf16)
    assert len(calls) == bf16
