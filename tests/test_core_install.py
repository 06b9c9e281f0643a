"""The core without any extra: everything imports and trains where the optional packages are not installed."""

import os
import subprocess
import sys

EXTRAS = (
    "trl",
    "verl",
    "vllm",
    "peft",
    "deepspeed",
    "openrlhf",
    "implicit",
    "datasets",
    "matplotlib",
    "resvg_py",
    "tensorboard",
    "wandb",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "flash_attn",
    "ray",
)

# Before anything else is imported, the search for modules stops finding the extras: as if they were not installed.
WITHOUT_EXTRAS = f"""
import sys
from importlib.machinery import PathFinder

class Core(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS} else super().find_spec(name, path, target)

sys.meta_path[:] = [Core if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(script):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS + script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_module_but_the_integrations_imports_without_extras():
    shown = run("""
import importlib, pkgutil
import flexrec
names = [module.name for module in pkgutil.walk_packages(flexrec.__path__, "flexrec.")]
core = [name for name in names if not name.startswith("flexrec.integrations.")]
for name in core:
    importlib.import_module(name)
print(*core)
""")
    assert {
        "flexrec.trainer.flexrec",
        "flexrec.decoding.sample",
        "flexrec.cli",
        "flexrec.experiment.stages",
        "flexrec.numba_kernels.lanes",
    } <= set(shown.split())


def test_a_model_trains_and_ranks_without_extras(tmp_path):
    run(f"""
import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM
from flexrec.cli import main
from flexrec.decoding.sample import sample_rankings
from flexrec.task.examples import Example
from flexrec.trainer.flexrec import FlexRecConfig, FlexRecTrainer

gains = np.array([0.0, 1.0], dtype=np.float32)
example = Example([1, 2], [[3], [4]], gains, 0 * gains, (0, 1), "interest", 0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=1))
args = FlexRecConfig(output_dir={str(tmp_path)!r}, max_steps=20, per_device_train_batch_size=4, learning_rate=0.05,
                     report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True)
FlexRecTrainer(model, args, [example] * 4).train()
assert sample_rankings(model, [[1, 2]], [[[3], [4]]], greedy=True).rankings.tolist() == [[1, 0]]
assert main(["train", "--output", {str(tmp_path / "run")!r}, "--lora", "4"]) == 2  # says what to install
""")
