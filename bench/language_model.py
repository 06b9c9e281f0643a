"""A training step of a language model's shape, ours by every way to name candidates, and TRL's: speed and memory.

    python bench/language_model.py --output DIR                      smollm2-135m: a quarter of an hour on two cores
    python bench/language_model.py --output DIR --models qwen2.5-0.5b qwen2.5-3b    on a GPU, in bfloat16

Weights are random and prompts are random tokens, as speed depends on neither; all methods get the same ones, the same
candidates, and as many rankings of each prompt. Rounds are interleaved, the fastest of each method counts, memory is
that of a first step besides the model and its optimiser's state. All of it is written to DIR/language-model.json, and a
table to standard output. Where TRL is not installed, ours are measured alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.inputs import SMALL
from bench.measure import trial
from bench.training_task import DEVICE, IDS, TrainingTask, one_step, qwen_shape
from flexrec.profiling import profile_steps

OUR_OPS = ("rewards", "log-probs and loss", "bookkeeping")


def smollm_shape() -> PretrainedConfig:
    """SmolLM2-135M."""
    return LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **IDS,
    )


MODELS = {
    "smollm2-135m": smollm_shape,
    "qwen2.5-0.5b": qwen_shape,
    "qwen2.5-3b": lambda: qwen_shape(layers=36, hidden_size=2048, heads=16),
    "tiny": lambda: qwen_shape(layers=1, hidden_size=64, heads=4, vocabulary=500),
}


@dataclass(frozen=True)
class Method:
    trainer: str
    encoding: str

    @property
    def name(self) -> str:
        ours = {"ours": "FlexRec", "ours_one_pass": "FlexRec, one pass", "trl_grpo": "TRL GRPOTrainer"}[self.trainer]
        return f"{ours}, {'a token each' if self.encoding == 'items' else 'labels such as [12]'}"


PEER = "trl_grpo"
METHODS = [
    Method(trainer, encoding)
    for trainer, encoding in (
        ("ours_one_pass", "items"),
        ("ours", "items"),
        (PEER, "items"),
        ("ours", "labels"),
        (PEER, "labels"),
    )
    if trainer != PEER or find_spec("trl")
]


def measured(model: str, prompts: int, generations: int, candidates: int, length: int, rounds: int) -> dict[str, Any]:
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    base = TrainingTask(
        prompts=prompts,
        num_generations=generations,
        candidates=candidates,
        prompt_length=length,
        model_name=model,
        config=MODELS[model](),
        dtype=dtype,
    )
    found: dict[str, Any] = {}
    for method in METHODS:  # what is compiled and imported by the first of all steps is not theirs
        with one_step(method.trainer, TrainingTask(method.encoding, prompts=2, config=MODELS["tiny"]())) as step:
            step()
    for _ in range(rounds):  # one trainer at a time is in memory
        for method in METHODS:
            task = base.varied(encoding=method.encoding)
            with ExitStack() as stack:
                profile = stack.enter_context(profile_steps())
                step = stack.enter_context(one_step(method.trainer, task))
                peak = trial(step, DEVICE).peak_memory  # warms up
                before_step = dict(profile.seconds)
                start, processor = time.perf_counter(), time.process_time()
                step()
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                seconds, processor = time.perf_counter() - start, time.process_time() - processor
                spent = sum(profile.seconds.get(part, 0.0) - before_step.get(part, 0.0) for part in OUR_OPS)
            before = found.get(method.name)
            if before is None or seconds < before["seconds"]:
                found[method.name] = {
                    "seconds": seconds,
                    "processor_seconds": processor,
                    "rankings": task.rankings,
                    "tokens_per_second": task.rankings * (length + task.answer_length) / seconds,
                    "peak_memory": max(peak or 0, before["peak_memory"] if before else 0),
                    "share_of_our_ops": spent / seconds if method.trainer != PEER else None,
                }
            print(f"{model}, {method.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return {
        "model": model,
        "shape": base.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "methods": found,
    }


def table(result: dict[str, Any]) -> str:
    """The methods of a model as a table in Markdown; ratios are TRL's with the same kind of answer."""
    clock = "seconds" if result["device"] != "CPU" else "processor_seconds"  # which other work leaves as they are
    lines = [
        f"{result['model']}, {result['shape']}, {result['dtype']}, {result['device']}, {result['threads']} threads:",
        "",
        f"| a training step | {clock.replace('_', ' ')} | rankings a second | as TRL's | memory, MiB | of TRL's | "
        f"in our operations |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method in METHODS:
        one, peer = result["methods"][method.name], result["methods"].get(Method(PEER, method.encoding).name)
        ops, memory = one["share_of_our_ops"], one["peak_memory"]
        times = f"{peer[clock] / one[clock]:.1f}x" if peer else ""
        less = f"{memory / peer['peak_memory']:.2f}" if peer and peer["peak_memory"] else ""
        lines.append(
            f"| {method.name} | {one[clock]:.1f} | {one['rankings'] / one[clock]:.2f} | {times} | "
            f"{memory / 2**20:.0f} | {less} | {'' if ops is None else f'{ops:.1%}'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for language-model.json")
    default = ["tiny"] if SMALL else ["smollm2-135m"] if DEVICE.type == "cpu" else ["qwen2.5-0.5b", "qwen2.5-3b"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=default, help=f"default here: {default}")
    small = DEVICE.type == "cpu"
    parser.add_argument("--prompts", type=int, default=2 if small else 8, help="in a step; default here: %(default)s")
    parser.add_argument("--generations", type=int, default=8, help="rankings of each; default: %(default)s")
    parser.add_argument("--candidates", type=int, default=15, help="in a list; default: %(default)s")
    parser.add_argument("--length", type=int, default=40 if SMALL else 390, help="of a prompt; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="of every method; default: %(default)s")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "language-model.json"
    results = []
    for model in arguments.models:
        sizes = (arguments.prompts, arguments.generations, arguments.candidates, arguments.length)
        results.append(measured(model, *sizes, arguments.rounds))
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(table(results[-1]))


if __name__ == "__main__":
    main()
