"""Triton's kernels as they are compiled for NVIDIA's GPUs, run on a CPU: an emulator of their PTX in NumPy.

The interpreter runs what a kernel says, not what Triton makes of it. Here Triton compiles a launch as far as PTX, and
all threads of its programs run that in lockstep. Under ``python -m pytest -p ptx``, with ``tests`` on the path and
TRITON_INTERPRET=0, every launch of a test happens so (``ops/test_triton_ptx.py`` starts it); FLEXREC_PTX says for which
target, sm_90 unless given. For sm_80 products are mma.sync, which is emulated, and not wgmma, which is not.

Every access must be aligned and within a tensor's memory or the program's shared memory, which holds garbage at first.
Copies that are asynchronous arrive when they are waited for. Who takes part in an exchange or waits at a barrier must
be there with all others that it is for.

What it cannot see: races, as no thread of a program is ahead of another; what the assembler makes of PTX; roundings of
ex2.approx and div.full, and of sums within tensor cores, which are better here. An instruction that is not emulated,
wgmma among them, is an error that names it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_machine import Machine, Memory, Program, parse
from torch import Tensor

GUARD = 512  # bytes between tensors, which nobody may touch
LANES = 4096  # threads that run at once, but at least a program's: what bounds the memory of their registers

_programs: dict[str, Program] = {}


def compiled(launch: Any, target: str) -> Program:
    """What Triton makes of a launch (``flexrec.triton_kernels.launch.Launch``) for "sm_80" or "sm_90".

    The interpreter must not be on. Triton's assembler, which comes after PTX, is left out.
    """
    key = f"{target} {launch}"
    if key not in _programs:
        from triton._C.libtriton import ir
        from triton.compiler.compiler import make_backend

        from flexrec.triton_kernels.aot import _to_compile

        source, gpu, named = _to_compile(launch, target)
        backend, context = make_backend(gpu), ir.context()
        options = backend.parse_options(named)
        ir.load_dialects(context)
        backend.load_dialects(context)
        code = source.make_ir(
            gpu, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        )
        stages: dict[str, Callable[..., Any]] = {}
        backend.add_stages(stages, options, source.language)
        metadata = {"target": gpu, **vars(options)}
        for name, stage in stages.items():
            if name != "cubin":
                code = stage(code, metadata)
        _programs[key] = parse(code, metadata["shared"])
    return _programs[key]


def run(program: Program, arguments: list[Any], grid: tuple[int, ...]) -> None:
    """Run every program of a grid.

    Args:
        program: as :func:`compiled` gives it.
        arguments: those that are not constant, in order: tensors on the CPU, which are read and written; numbers, a
            float being a float32.
        grid: programs along up to three axes.

    Raises:
        EmulationError: what a GPU would not do, or not surely, and what is not emulated.
    """
    grid = (*grid, 1, 1)[:3]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in arguments if isinstance(x, Tensor)}
    bases, size = {}, GUARD
    for pointer, storage in storages.items():
        bases[pointer] = size + pointer % 64
        size += storage.nbytes() + -storage.nbytes() % GUARD + GUARD
    memory, hosts = Memory(size), {}
    for pointer, base in bases.items():
        count = storages[pointer].nbytes()
        hosts[pointer] = np.frombuffer((ctypes.c_uint8 * count).from_address(pointer or 1), np.uint8)
        memory.bytes[base : base + count], memory.owned[base : base + count] = hosts[pointer], True
    values = [
        bases[x.untyped_storage().data_ptr()] + x.storage_offset() * x.element_size()
        if isinstance(x, Tensor)
        else int.from_bytes(struct.pack("<f", x), "little")
        if isinstance(x, float)
        else x
        for x in arguments
    ]
    values += [0] * (len(program.params) - len(values))  # scratch memory, which no kernel has
    programs, together = int(np.prod(grid)), max(1, LANES // program.threads)
    with np.errstate(all="ignore"):
        for first in range(0, programs, together):
            count = min(together, programs - first)
            named = dict(zip(program.params, values, strict=True))
            Machine(program, memory, named, grid, first, count).run()
    for pointer, base in bases.items():
        hosts[pointer][:] = memory.bytes[base : base + len(hosts[pointer])]


def emulate(target: str) -> None:
    """From now on Triton's kernels run here when they are launched, on tensors on the CPU."""
    from triton.runtime.jit import JITFunction

    from flexrec.ops import library
    from flexrec.triton_kernels.launch import INTERPRETED, _noted

    if INTERPRETED:
        raise RuntimeError("Triton's interpreter is on, and nothing is compiled; set TRITON_INTERPRET=0")

    def launched(
        kernel: Any, *arguments: Any, grid: Any, warmup: bool, num_warps: int, enable_fp_fusion: bool, **named: Any
    ):
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        noted = _noted(kernel, given, num_warps)
        run(compiled(noted, target), [given[name] for name in noted.types], grid)

    JITFunction.run = launched
    library.triton_interprets = lambda: True  # which lets tensors on the CPU through


def pytest_configure() -> None:
    emulate(os.environ.get("FLEXREC_PTX", "sm_90"))
