"""Ahead-of-time compilation of every kernel configuration a launcher can choose, on a machine without a GPU.

``python -m flexrec.triton_kernels.aot`` records what the calls of ``examples`` launch, compiles it for every target and
prints what each takes of the GPU; ``--write docs/kernels.md`` keeps it. Registers and spills are what the assembler
reports for the binary, the tensor-core instruction is read from the disassembly.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flexrec.triton_kernels.examples import examples
from flexrec.triton_kernels.launch import FP_FUSION, Launch, recorded

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes one program may take
TARGETS = tuple(SHARED_LIMIT)
COMMAND = "python -m flexrec.triton_kernels.aot --write docs/kernels.md"


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes.

    Args:
        registers: per thread; on AMD vector registers, accumulators included.
        spills: bytes of memory per thread that registers are spilled to.
        scalar_spills: scalar registers kept in lanes of vector registers (AMD only): moves, no memory.
        shared_bytes: shared memory.
        instruction: the tensor-core instruction used most, or "" for none.
        lanes_apart: reductions that some version of Triton gets wrong, see :func:`reductions_of_lanes_apart`.
    """

    registers: int
    spills: int
    scalar_spills: int
    shared_bytes: int
    instruction: str
    lanes_apart: int


class Variant(NamedTuple):
    """What is compiled: the kernel's file, a unique name ("swap_rewards ndcg swap fp32 16x128"), and the launch."""

    module: str
    name: str
    launch: Launch


@dataclass(frozen=True)
class Row:
    """One variant compiled for one target."""

    module: str
    variant: str
    num_warps: int
    target: str
    resources: Resources
    seconds: float


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Everything different that the examples launch, file by file."""
    found: list[Variant] = []
    for label, call in examples():
        with recorded() as launches:
            call()
        for launch in launches:
            if all(launch != variant.launch for variant in found):
                found.append(Variant(launch.kernel.fn.__module__.rpartition(".")[2], _name(launch, label), launch))
    repeated = [name for name, count in Counter(variant.name for variant in found).items() if count > 1]
    if repeated:
        raise ValueError(
            f"different launches need different names, by the labels of their examples; got twice {repeated}"
        )
    return tuple(sorted(found, key=lambda variant: variant.module))


def _name(launch: Launch, label: str) -> str:
    blocks = [name for name in launch.constants if name.startswith("BLOCK")]
    tiles = [launch.constants[name] for name in blocks if name != "BLOCK_C" or "C" not in launch.constants]
    if launch.constants.get("TILES", 1) != 1:
        tiles.append(launch.constants["TILES"])
    kernel = launch.kernel.__name__.removesuffix("_kernel")
    return " ".join(filter(None, (kernel, label, "x".join(map(str, tiles)))))


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile for one of TARGETS; the caller must not have Triton's interpreter on."""
    import triton

    source, gpu, options = _to_compile(launch, target)
    compiled = triton.compile(source, target=gpu, options=options)
    apart = reductions_of_lanes_apart(compiled.asm["ttgir"])
    if target.startswith("sm_"):
        products = "mma" in compiled.asm["ptx"]
        return _nvidia_resources(compiled.asm["cubin"], compiled.metadata.shared, apart, products=products)
    return _amd_resources(compiled.asm["amdgcn"], compiled.metadata.shared, apart)


def _to_compile(launch: Launch, target: str) -> tuple[Any, Any, dict[str, Any]]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {name: launch.types.get(name, "constexpr").removesuffix(":16") for name in names}
    source = ASTSource(
        launch.kernel,
        signature,
        {(names.index(name),): value for name, value in launch.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name, kind in launch.types.items() if ":16" in kind},
    )
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    return source, gpu, {"num_warps": launch.num_warps, "enable_fp_fusion": FP_FUSION}


def reductions_of_lanes_apart(ttgir: str) -> int:
    """Reductions along an axis that lies in lanes of a warp with others, or copies, between them.

    Triton 3.6 takes the first of the lanes and goes on with its neighbours, whatever these hold (seen on an H200: the
    best order's value was twice the sum of every other rank). ``scans.sum_of_rows`` does without.

    Args:
        ttgir: a kernel in the form in which Triton has chosen layouts, whose linear ones say what each bit of the lane
            adds to every coordinate. Those of other layouts are neighbours.
    """
    lanes = {
        name: json.loads(bases)
        for name, bases in re.findall(r"^#(\w+) = #ttg\.linear<.*?lane = (\[.*?\]\])", ttgir, re.M)
    }
    count = 0
    for axis, layout in re.findall(
        r'"tt\.reduce"\(.*?<\{axis = (\d+) .*?\}\) : \(tensor<[^#]*, (.*?)>\) ->', ttgir, re.S
    ):
        sliced = [int(axis) for axis in reversed(re.findall(r"#ttg\.slice<\{dim = (\d+)", layout))]
        bases = lanes.get(re.findall(r"#(\w+)", layout)[-1], [])
        for dropped in sliced:
            bases = [base[:dropped] + base[dropped + 1 :] for base in bases]
        along = "".join("x" if base[int(axis)] else " " for base in bases)
        count += " " in along.strip()
    return count


def _nvidia_resources(cubin: bytes, shared: int, apart: int, *, products: bool) -> Resources:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        # Starting the disassembler takes longer than many a kernel to compile.
        code = _output_of(knobs.nvidia.nvdisasm.path, "--print-code", file.name) if products else ""
    return Resources(
        registers=_number(r"\bREG:(\d+)", usage),
        spills=_number(r"\bSTACK:(\d+)", usage) + _number(r"\bLOCAL:(\d+)", usage),
        scalar_spills=0,
        shared_bytes=shared,
        instruction=_most_common(r"\b[A-Z]G?MMA\.[\w.]+", code),
        lanes_apart=apart,
    )


def _amd_resources(assembly: str, shared: int, apart: int) -> Resources:
    return Resources(
        registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
        # The private segment holds what is spilled to memory, whether from vector or from scalar registers.
        spills=max(
            _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
            4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        ),
        scalar_spills=_number(r"\.sgpr_spill_count:\s+(\d+)", assembly),
        shared_bytes=shared,
        instruction=_most_common(r"\bv_mfma_\w+", assembly),
        lanes_apart=apart,
    )


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"nothing matches {pattern!r} in what the compiler's tools print; has their format changed?")
    return int(match[1])


def _most_common(pattern: str, text: str) -> str:
    found = Counter(re.findall(pattern, text)).most_common(1)
    return found[0][0] if found else ""


def _compile_numbered(task: tuple[int, str]) -> Row:
    # By number, because a @triton.jit function cannot be pickled into another process.
    number, target = task
    module, name, launch = variants()[number]
    start = time.perf_counter()
    try:
        resources = compile_launch(launch, target)
    except Exception as error:
        raise RuntimeError(f"{name} does not compile for {target}: {error}") from error
    return Row(module, name, launch.num_warps, target, resources, time.perf_counter() - start)


def compile_all(matching: str = "", processes: int | None = None) -> Iterator[Row]:
    """Every variant whose name contains ``matching``, for every target, in the order of :func:`variants`.

    Args:
        processes: how many compile at once, the number of processors unless given.
    """
    numbers = [number for number, variant in enumerate(variants()) if matching in variant.name]
    with ProcessPoolExecutor(processes or os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_compile_numbered, [(number, target) for number in numbers for target in TARGETS])


def table(rows: Iterable[Row], triton_version: str) -> str:
    """Markdown: one table per kernel file, one line per variant, one column per target."""
    cells: dict[str, dict[tuple[str, int], dict[str, Resources]]] = {}
    for row in rows:
        cells.setdefault(row.module, {}).setdefault((row.variant, row.num_warps), {})[row.target] = row.resources
    lines = [
        "# What the Triton kernels take of a GPU",
        "",
        f"Generated with Triton {triton_version} by `{COMMAND}`, which needs no GPU.",
        "The tests fail if this is not what the kernels compile to, or if a register is spilled to memory,",
        "but for the launch that an H200 was timed to be faster with.",
        "",
        "Cells: registers per thread / bytes spilled per thread / bytes of shared memory per program / tensor-core",
        "instruction. `+n` beside AMD's registers: n scalar registers are kept in lanes of vector registers.",
        "",
        "Registers count where they decide how many warps run side by side: 65,536 / (32 x registers, rounded up to 8)",
        "of a multiprocessor on sm_80 and sm_90, 512 / registers of a SIMD on gfx942. Within a step they are free.",
    ]
    for module, variants in cells.items():
        lines += ["", f"## {module}", "", f"| kernel | warps | {' | '.join(TARGETS)} |", "|---" * 5 + "|"]
        for (name, warps), found in variants.items():
            lines.append(f"| {name} | {warps} | {' | '.join(_cell(found[target]) for target in TARGETS)} |")
    return "\n".join(lines) + "\n"


def _cell(found: Resources) -> str:
    scalars = f"+{found.scalar_spills}" if found.scalar_spills else ""
    instruction = f"`{found.instruction}`" if found.instruction else "none"
    return f"{found.registers}{scalars} / {found.spills} / {found.shared_bytes:,} / {instruction}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flexrec.triton_kernels.aot", description=__doc__)
    parser.add_argument("--match", default="", help="only variants whose name contains this")
    parser.add_argument("--processes", type=int, help="how many compile at once (default: all processors)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--write", type=Path, help="write the table to this file")
    output.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    if arguments.write and arguments.match:
        parser.error("--write needs the whole table, so it cannot go with --match")

    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    rows = []
    for row in compile_all(arguments.match, arguments.processes):
        print(f"{row.seconds:5.1f} s  {row.target:6}  {row.variant}", file=sys.stderr, flush=True)
        rows.append(row)
    if arguments.json:
        print(json.dumps({"triton": triton.__version__, "rows": [asdict(row) for row in rows]}))
    elif arguments.write:
        arguments.write.write_text(table(rows, triton.__version__))
    else:
        print(table(rows, triton.__version__), end="")


if __name__ == "__main__":
    main()
