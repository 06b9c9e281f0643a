"""FlexRecGRPOTrainer where accelerate spreads the parameters over processes (FSDP2), on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_trl import make_model, make_tokenizer

CONFIGURATION = Path(__file__).resolve().parents[2] / "examples" / "accelerate" / "fsdp2.yaml"
FSDP2 = ["accelerate.commands.launch", "--config_file", str(CONFIGURATION), "--num_processes", "2"]
FSDP2 += ["--mixed_precision", "no", "--main_process_port", "0"]
DDP = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


CREDITS = ["swap", "all_actions"]


def train(engine, launcher, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = [str(Path(__file__).with_name("tiny_trl.py")), str(folder), engine, *CREDITS]
    command = [sys.executable, "-m", *launcher, *script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{engine}-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The model before, and what two processes found with the whole of it and with half of it each."""
    folder = tmp_path_factory.mktemp("fsdp")
    model = make_model(make_tokenizer(items=16))
    model.save_pretrained(folder / "model")
    return model, train("ddp", DDP, folder), train("fsdp2", FSDP2, folder)


@pytest.mark.parametrize("credit", CREDITS)
def test_shards_learn_what_whole_models_do(trained, credit):
    """The same rankings, losses and parameters, with a reference and with several updates of a generation."""
    model, *found = trained
    whole, parts = ([of_process[credit] for of_process in processes] for processes in found)
    size = sum(p.numel() for p in model.parameters())
    assert sum(found["held"] for found in parts) < 1.1 * size < 2 * size == sum(found["held"] for found in whole)
    for found, expected in zip(parts, whole, strict=True):
        assert found["seen"] == expected["seen"]
        for name, value in expected["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-4, atol=1e-5)
    assert whole[0]["seen"] != whole[1]["seen"]
    moved = [not torch.equal(value, whole[0]["state"][name]) for name, value in model.state_dict().items()]
    assert all(moved)
    for name in ("loss", "kl", "entropy", "grad_norm", "ndcg/mean"):
        curve, expected = ([entry[name] for entry in found[0]["log"] if name in entry] for found in (parts, whole))
        assert len(curve) == (2 if name == "ndcg/mean" else 4)
        assert curve == pytest.approx(expected, rel=1e-3, abs=1e-5), name
