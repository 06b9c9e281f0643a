"""Memory and time of a step of reinforcement, on paper: the tables of docs/scaling.md.

    python examples/scaling_table.py            # prints them
    python examples/scaling_table.py --check    # says whether docs/scaling.md has them

Nothing here was measured; change the numbers of Workload and Gpu to those of your own.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama or Qwen2 family, as its config.json states it."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def query(self) -> int:
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def layer_parameters(self) -> int:
        """Attention with biases on queries, keys and values, a gated MLP, two norms."""
        attention = 2 * self.hidden * self.query + 2 * self.hidden * self.key + self.query + 2 * self.key
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def output_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.hidden + self.output_parameters * (1 if self.tied else 2)

    @property
    def kv_bytes(self) -> int:
        """Of a token in the cache, in bfloat16."""
        return 2 * 2 * self.layers * self.key


MODELS = (
    Shape("0.5B", 896, 24, 14, 2, 64, 4864, 151936, True),
    Shape("3B", 2048, 36, 16, 2, 128, 11008, 151936, True),
    Shape("7B", 3584, 28, 28, 4, 128, 18944, 152064, False),
    Shape("32B", 5120, 64, 40, 8, 128, 27648, 152064, False),
)


@dataclass(frozen=True)
class Workload:
    """What one GPU does in a step; an answer names 32 candidates in 4 tokens each, of which 2 are choices."""

    prompts: int = 8
    generations: int = 8
    prompt_tokens: int = 1024
    candidates: int = 32
    answer_tokens: int = 128
    decisions: int = 64

    @property
    def row_tokens(self) -> int:
        """Of a prompt and its rankings, which share it."""
        return self.prompt_tokens + self.generations * self.answer_tokens

    @property
    def tokens(self) -> int:
        return self.prompts * self.row_tokens

    @property
    def unshared_tokens(self) -> int:
        """If every ranking had a row of its own."""
        return self.prompts * self.generations * (self.prompt_tokens + self.answer_tokens)

    @property
    def rankings(self) -> int:
        return self.prompts * self.generations


@dataclass(frozen=True)
class Gpu:
    """An H100 of 80 GB in hosts of eight, and what is assumed of programs that run on it."""

    memory: float = 80 * GB
    usable: float = 0.9  # of the memory: the rest is the context, NCCL and fragments
    flops: float = 989e12  # dense bfloat16
    utilisation: float = 0.4  # of these, by everything that is computed, recomputation included
    bandwidth: float = 0.6 * 3.35e12  # bytes a second, as decoding reaches them
    launch: float = 0.8e-3  # seconds of a layer in a decoding step, whatever its size, in eager mode
    link: float = 0.8 * 400e9  # bytes a second into a GPU: NVLink inside of a host, a 400 Gb/s port per GPU outside


def state_bytes(shape: Shape, engine: str, gpus: int) -> float:
    """Parameters, gradient and Adam's moments in float32, on each GPU, whatever is being done.

    DDP has the gradient a second time, in the buckets that it reduces; FSDP2 and ZeRO-3 have 1/gpus of everything.
    """
    if engine == "DDP":
        return (16 if gpus == 1 else 20) * shape.parameters
    return 16 * shape.parameters / gpus


def compute_copy_bytes(shape: Shape, engine: str) -> float:
    """bfloat16 weights while training: of all layers under autocast; of two layers and the output layer where they are
    gathered, with that layer's gradient and what it is reduced in."""
    if engine == "DDP":
        return 2 * shape.parameters
    return 2 * 2 * shape.layer_parameters + (2 + 2 + 2) * shape.output_parameters


def activation_bytes(shape: Shape, tokens: int, engine: str) -> float:
    """With gradient checkpointing: each layer's input, and all of one layer while it is computed again.

    A layer keeps, in bfloat16, both norms' outputs, both residuals and the inputs of both additions (6 hidden), queries
    and attention's output, keys and values, four of the MLP; in float32 each norm's input and normalised input (as
    transformers computes them). Autocast gives the states of all layers out in float32 as well.
    """
    kept = 2 * shape.hidden * (shape.layers + 1)
    layer = 2 * (6 * shape.hidden + 2 * shape.query + 2 * shape.key + 4 * shape.intermediate) + 16 * shape.hidden
    given_out = 4 * shape.hidden * (shape.layers + 1) if engine == "DDP" else 0
    return tokens * (kept + max(layer, given_out))


def operation_bytes(work: Workload) -> float:
    """Ours, for the log-probs: logits of the candidates (float32) and 16 bytes a decision, and in the backward pass the
    logits' gradient (bfloat16). Every decision is counted as if it were among all candidates."""
    decisions = work.rankings * work.decisions
    return decisions * (4 * work.candidates + 16 + 2 * work.candidates)


def vocabulary_bytes(shape: Shape, work: Workload) -> float:
    """What logits of the whole vocabulary would take in its place: bfloat16, float32 and the gradient of each."""
    return work.rankings * work.answer_tokens * shape.vocabulary * (2 + 4 + 4 + 2)


def training_bytes(shape: Shape, work: Workload, engine: str, gpus: int) -> float:
    """The most that a GPU holds in the forward and backward pass."""
    states = state_bytes(shape, engine, gpus) + compute_copy_bytes(shape, engine)
    return states + activation_bytes(shape, work.tokens, engine) + operation_bytes(work)


def rollout_bytes(shape: Shape, work: Workload, engine: str, gpus: int) -> float:
    """The most that a GPU holds while rankings are sampled: the whole model, gathered (DDP: there already), the cache,
    and the states of the prefill, of all layers where the model is FSDP2's."""
    whole = 0 if engine == "DDP" else 2 * shape.parameters
    states = 0 if engine == "DDP" else 2 * shape.hidden * (shape.layers + 1) * work.prompts * work.prompt_tokens
    return state_bytes(shape, engine, gpus) + whole + states + work.tokens * shape.kv_bytes


def engine_of(shape: Shape, work: Workload, gpus: int, gpu: Gpu) -> str:
    """What carries the model: the simplest that has the memory."""
    room = gpu.memory * gpu.usable
    for engine in ("DDP", "FSDP2"):
        training = training_bytes(shape, work, engine, gpus)
        if max(training, rollout_bytes(shape, work, engine, gpus)) <= room and (engine == "DDP" or gpus > 1):
            return {"DDP": "one process" if gpus == 1 else "DDP", "FSDP2": "FSDP2 or ZeRO-3"}[engine]
    if gpus > 1:
        # vLLM has weights and cache split among the GPUs of a host, while the training states wait on the host.
        generating = 2 * shape.parameters / min(gpus, 8) + work.tokens * shape.kv_bytes
        offloaded = training_bytes(shape, work, "FSDP2", gpus) - 8 * shape.parameters / gpus
        if max(training, generating) <= room:
            return "verl + vLLM"
        if max(offloaded, generating) <= room:
            return "verl + vLLM, optimiser on the host"
    return "none"


def flops_of_tokens(shape: Shape, tokens: int, row: int) -> float:
    """Forward pass of the layers; attention over the whole row, as a mask of one's own makes it."""
    return tokens * shape.layers * (2 * shape.layer_parameters + 4 * row * shape.query)


def seconds(shape: Shape, work: Workload, engine: str, gpus: int, gpu: Gpu) -> dict[str, float]:
    """Of the parts of a step. Nothing is taken to overlap with anything else."""
    rate = gpu.flops * gpu.utilisation
    prompt_tokens = work.prompts * work.prompt_tokens
    answer_tokens = work.rankings * work.answer_tokens
    read = 2 * shape.layers * shape.layer_parameters + work.tokens * shape.kv_bytes  # in one decoding step
    computed = flops_of_tokens(shape, answer_tokens, work.row_tokens) / work.decisions
    decoding = max(gpu.launch * shape.layers, read / gpu.bandwidth, computed / rate)
    # The gradient there and back in float32; or bfloat16 parameters three times and the gradient once.
    moved = 2 * 4 * shape.parameters if engine == "DDP" else 4 * 2 * shape.parameters
    states = shape.parameters / (1 if engine == "DDP" else gpus)
    return {
        "prefill": flops_of_tokens(shape, prompt_tokens, work.prompt_tokens) / rate,
        "decoding": work.decisions * decoding,
        # Forward, the same again by checkpointing, and twice as much backward.
        "training": 4 * flops_of_tokens(shape, work.tokens, work.row_tokens) / rate,
        "optimiser": 28 * states / gpu.bandwidth,
        "communication": moved * (gpus - 1) / gpus / gpu.link,
    }


def model_table(work: Workload) -> list[str]:
    lines = [
        "| model | parameters | of them embeddings | 16 bytes a parameter | bfloat16 | cache, a token | cache, a GPU "
        "| activations, a GPU | if prompts were not shared | our ops | logits of the vocabulary |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in MODELS:
        embeddings = shape.output_parameters * (1 if shape.tied else 2)
        cells = [
            shape.name,
            f"{shape.parameters:,}",
            f"{embeddings / shape.parameters:.0%}",
            _gb(16 * shape.parameters),
            _gb(2 * shape.parameters),
            f"{shape.kv_bytes / 1e3:.1f} kB",
            _gb(work.tokens * shape.kv_bytes),
            _gb(activation_bytes(shape, work.tokens, "FSDP2")),
            _gb(activation_bytes(shape, work.unshared_tokens, "FSDP2")),
            f"{operation_bytes(work) / 1e6:.1f} MB",
            _gb(vocabulary_bytes(shape, work)),
        ]
        lines.append(_row(cells))
    return lines


def memory_table(work: Workload, gpu: Gpu) -> list[str]:
    lines = [
        "| model | GPUs | DDP: training | DDP: rollouts | FSDP2 or ZeRO-3: training | rollouts | carried by |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in MODELS:
        for gpus in (1, 8, 64):
            found = [
                _gb(memory(shape, work, engine, gpus)) if gpus > 1 or engine == "DDP" else "-"
                for engine in ("DDP", "FSDP2")
                for memory in (training_bytes, rollout_bytes)
            ]
            lines.append(_row([shape.name, str(gpus), *found, engine_of(shape, work, gpus, gpu)]))
    return lines


def time_table(work: Workload, gpu: Gpu) -> list[str]:
    parts = list(seconds(MODELS[0], work, "DDP", 1, gpu))
    lines = [
        f"| model | GPUs | engine | {' | '.join(parts)} | step | rankings a second |",
        "|---" * (len(parts) + 5) + "|",
    ]
    for shape in MODELS:
        for gpus in (1, 8, 64):
            carrier = engine_of(shape, work, gpus, gpu)
            if carrier.startswith(("verl", "none")):  # vLLM decodes in other ways than are counted here
                continue
            engine = "FSDP2" if carrier.startswith("FSDP2") else "DDP"
            spent = seconds(shape, work, engine, gpus, gpu)
            step = sum(spent.values())
            cells = [f"{value:.2f}" for value in (*spent.values(), step)]
            lines.append(_row([shape.name, str(gpus), carrier, *cells, f"{gpus * work.rankings / step:.0f}"]))
    return lines


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size < 100 * GB else f"{size / GB:.0f} GB"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tables(work: Workload | None = None, gpu: Gpu | None = None) -> list[str]:
    """The tables in the order of the page, each as Markdown."""
    work, gpu = work or Workload(), gpu or Gpu()
    return ["\n".join(lines) for lines in (model_table(work), memory_table(work, gpu), time_table(work, gpu))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"compare with {PAGE.name} instead of printing")
    arguments = parser.parse_args()
    if not arguments.check:
        print("\n\n".join(tables()))
        return 0
    page = PAGE.read_text()
    missing = [table for table in tables() if table not in page]
    print(f"{PAGE.name} lacks {len(missing)} of {len(tables())} tables as they are computed now")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
