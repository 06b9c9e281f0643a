"""Whether what the tests launch would compile, None arguments and flags and all, on a machine without a GPU.

Triton's interpreter runs the branches that are taken; a compiler reads those that are not, too, unless a flag or an
argument that is None rules them out. So each form that a kernel is launched in is read by Triton's front end, in a
process of its own, because the interpreter replaces ``triton.jit`` at import.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexrec.triton_kernels.launch import Launch

ROOT = Path(__file__).resolve().parents[1]
TARGET = "sm_90"
# Constants that are sizes: none, one and several may be different code, more of them are not.
SIZES = ("C", "D", "D_REF", "D_TILES", "LONG", "MAX_GAIN", "PIECE", "TILES", "TOP", "V", "sharing")


def form(launch: Launch) -> tuple[object, ...]:
    """What decides which of a kernel's branches are compiled: what is None, flags, and whether numbers are float64."""
    few = {name: min(value, 2) for name, value in launch.constants.items() if name in SIZES and value is not None}
    rest = {n: value for n, value in launch.constants.items() if n not in few and not n.startswith("BLOCK")}
    wide = any(kind.startswith("*fp64") for kind in launch.types.values())
    top, block = launch.constants.get("TOP", 0), launch.constants.get("BLOCK_K", 0)  # a list's best order: three ways
    return (
        launch.kernel.__name__,
        wide,
        top < block,
        top > block,
        *sorted(few.items()),
        *sorted(rest.items(), key=str),
    )


class FrontEnd:
    """Reads each form once."""

    def __init__(self) -> None:
        self.forms: set[tuple[object, ...]] = set()
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )

    def complaints(self, launches: Iterable[Launch]) -> list[str]:
        """Of the forms that had not been read before: those that do not compile, and why."""
        new = [launch for launch in launches if (key := form(launch)) not in self.forms and not self.forms.add(key)]
        found = []
        for launch in new:
            module, name = launch.kernel.fn.__module__, launch.kernel.__name__
            request = module, name, launch.types, launch.constants, launch.num_warps
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            if answer != "null\n":
                error = json.loads(answer) if answer else "Triton's front end ended its process"
                found.append(f"{name} does not compile with {launch.constants}:\n{error}")
        return found


@functools.cache
def front_end() -> FrontEnd:
    """The one of this process, which ends with it."""
    return FrontEnd()


def read_launch(launch: Launch, target: str) -> None:
    """Let Triton read the kernel's code as this launch has it, which takes hundredths of a second, and go no further.

    What is None, and every flag, is decided here: the branches that remain are code of their own. The caller must not
    have Triton's interpreter on; what cannot be compiled raises Triton's own error.
    """
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    from flexrec.triton_kernels.aot import _to_compile

    source, gpu, named = _to_compile(launch, target)
    backend, context = make_backend(gpu), ir.context()
    options = backend.parse_options(named)
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(gpu, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def answer_requests() -> None:
    """A line of JSON for each on standard input: null, or what Triton says against it."""
    import importlib

    from flexrec.triton_kernels.launch import Launch

    for line in sys.stdin:
        module, name, types, constants, num_warps = json.loads(line)
        kernel = getattr(importlib.import_module(module), name)
        error = None
        try:
            read_launch(Launch(kernel, types, constants, num_warps), TARGET)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"[-1500:]
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    answer_requests()
