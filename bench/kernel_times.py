"""What each kernel of an operation takes: where the gap between a call and its floor lies.

    python bench/kernel_times.py --output DIR           a table per call, in DIR/kernel-times.md
    python bench/kernel_times.py --output DIR --tiles   and ranking_logprobs' kernels with other tiles, warps and stages

Forward and backward pass as in ``pytest bench``, at its first shapes, by torch's profiler. On a GPU a line is a kernel,
on a CPU an operator of torch; FLEXREC_BENCH_SMALL=1 takes small shapes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import test_ranking_logprobs as rankings
from bench import test_restricted_logprobs as restricted
from bench import test_swap_rewards as swaps
from bench.inputs import ranking_inputs, set_inputs
from bench.measure import Step
from flexrec import all_actions_objective, swap_rewards, swap_rewards_with_variance, swap_scores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CALLS = 10  # that a time is the mean of
SHOWN = 16  # lines of a table

# Steps, candidates and columns of a tile, warps, stages of the pipeline: of the forward pass, of dz and dh, of dW.
TILES = {
    "softmax_tiles": """64 128 64 8 3, 64 128 64 4 3, 64 128 64 8 4, 64 64 64 4 3, 64 64 128 4 3, 128 128 64 8 3,
        64 32 64 4 4, 32 32 128 4 4""",
    "slopes_tiles": """64 128 64 8 3, 64 128 64 4 3, 32 128 64 4 3, 64 128 32 4 3, 64 128 128 4 3, 64 64 64 8 3,
        64 64 64 4 3, 64 32 64 4 3, 32 32 128 4 3, 32 32 128 4 4""",
    "weight_grad_tiles": """64 64 128 8 3, 64 128 128 8 3, 64 128 64 4 3, 64 64 128 4 3, 32 32 128 4 3,
        64 32 128 4 3""",
}


def calls() -> Iterator[tuple[str, Step]]:
    """What is profiled: a name, and the call."""
    for size in rankings.SHAPES:
        inputs = ranking_inputs(size, DEVICE, rankings.DTYPE)[0]
        for method in ("ours", "ours_rows", "ours_accumulate", "gather_bmm"):
            yield f"ranking log-probs, {size}, {method}", rankings.step_of(rankings.METHODS[method], inputs)
    inputs = ranking_inputs(rankings.MAIN, DEVICE, rankings.DTYPE)[0]
    gains = torch.rand(rankings.MAIN.rankings, rankings.MAIN.candidates, device=DEVICE)

    def all_actions() -> None:
        objective = all_actions_objective(*inputs, gains, "ndcg").objective
        torch.autograd.grad(objective.sum(), (inputs.hidden, inputs.weight))

    yield f"all actions, {rankings.MAIN}", all_actions
    for shape in swaps.SHAPES:
        of_lists = torch.rand(shape, device=DEVICE)
        for metric in ("ndcg", "ndcg@10"):
            yield f"swap rewards, {metric}, {swaps.show(shape)}", lambda g=of_lists, m=metric: swap_rewards(g, m)
    of_lists = torch.rand(swaps.METRICS_SHAPE, device=DEVICE)
    for metric in ("map", "err"):
        yield f"swap rewards, {metric}, {swaps.show(swaps.METRICS_SHAPE)}", lambda m=metric: swap_rewards(of_lists, m)
    yield "swap rewards with variance, ndcg", lambda: swap_rewards_with_variance(of_lists, of_lists, "ndcg")
    few = torch.rand(swaps.SCORES, device=DEVICE)
    yield f"swap scores, ndcg, {swaps.show(swaps.SCORES)}", lambda: swap_scores(few, "ndcg")
    for name, (counts, width, vocabulary) in restricted.CASES.items():
        sets = set_inputs(counts, width, vocabulary, DEVICE, restricted.DTYPE)
        yield f"restricted log-probs, {name}", lambda s=sets: step_of_sets(s)


def step_of_sets(sets: Any) -> None:
    logprobs, entropy = restricted.ours(sets)
    torch.autograd.grad((logprobs + restricted.ENTROPY_COEF * entropy).sum(), (sets.hidden, sets.weight))


def times(call: Step) -> tuple[float, float, list[tuple[str, float, float]]]:
    """Seconds of a call until it is done and until it returns, and of each kernel: name, how often, microseconds."""
    for _ in range(3):
        call()
    wait()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    returned = time.perf_counter() - start
    wait()
    done = time.perf_counter() - start
    on_gpu = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(CALLS):
            call()
        wait()
    spent: Counter[str] = Counter()
    often: Counter[str] = Counter()
    for event in seen.events():
        if (event.device_type == torch.autograd.DeviceType.CUDA) == on_gpu:
            spent[event.name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
            often[event.name] += 1
    lines = [(name, often[name] / CALLS, spent[name] / CALLS) for name, _ in spent.most_common()]
    return done / CALLS, returned / CALLS, lines


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def table(name: str, call: Step) -> str:
    done, returned, lines = times(call)
    text = [
        f"## {name}",
        "",
        f"{done * 1e6:.0f} us in a row, of which {returned * 1e6:.0f} until it returns; "
        f"{sum(x[2] for x in lines):.0f} us in {sum(x[1] for x in lines):.0f} kernels:",
        "",
        "| us | times | kernel |",
        "|---:|---:|---|",
    ]
    text += [f"| {spent:.1f} | {often:g} | `{kernel[:100]}` |" for kernel, often, spent in lines[:SHOWN]]
    return "\n".join(["", *text])


def tile_tables() -> Iterator[str]:
    """Line by line, microseconds of ranking_logprobs' kernels with each set of tiles, or why it does not compile."""
    from flexrec.triton_kernels import ranking_logprobs as module
    from flexrec.triton_kernels import ranking_logprobs_problem as problem

    for size in rankings.SHAPES:
        inputs = ranking_inputs(size, DEVICE, rankings.DTYPE)[0]
        for name, choices in TILES.items():
            yield f"\n## {name}, {size}\n\n| T x K x D | warps | stages | us of each kernel |\n|---|---:|---:|---|"
            for choice in choices.split(","):
                *tiles, warps, stages = map(int, choice.split())
                chosen = problem.Tiles(*tiles, warps)

                def launch(kernel: Any, grid: Any, *arguments: Any, stages: int = stages, **named: Any) -> None:
                    kernel[grid](*arguments, **named, num_stages=stages)

                patches = [mock.patch.object(module, "launch", launch)]
                patches += [
                    mock.patch.object(where, name, lambda *_, c=chosen: c)
                    for where in (module, problem)
                    if hasattr(where, name)
                ]
                try:
                    for patch in patches:
                        patch.start()
                    found = times(rankings.step_of(rankings.METHODS["ours_rows"], inputs))[2]
                    kernels = [(kernel, spent) for kernel, _, spent in found if kernel.startswith("ranking_")]
                    cell = ", ".join(
                        f"{kernel.removeprefix('ranking_logprobs_')} {spent:.1f}" for kernel, spent in kernels
                    )
                except Exception as error:  # too much shared memory, say
                    cell = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                finally:
                    mock.patch.stopall()
                yield f"| {'x'.join(map(str, tiles))} | {warps} | {stages} | {cell} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for kernel-times.md")
    parser.add_argument("--tiles", action="store_true", help="other tiles, too; needs a GPU")
    arguments = parser.parse_args()
    if arguments.tiles and DEVICE.type != "cuda":
        parser.error("--tiles needs a GPU, and torch sees none")
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    path = arguments.output / "kernel-times.md"
    path.write_text(f"# What each kernel takes\n\n{name}, torch {torch.__version__}.\n")

    def write(text: str) -> None:  # at once: what comes later may be cut off
        with path.open("a") as file:
            file.write(text + "\n")
        print(text, flush=True)

    sources: list[Callable[[], Iterator[str]]] = [lambda: (table(name, call) for name, call in calls())]
    if arguments.tiles:
        sources.append(tile_tables)
    for source in sources:
        for text in source():
            write(text)


if __name__ == "__main__":
    main()
