"""Every Triton kernel compiles ahead of time for the GPUs it is meant for, on a machine that has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Run without the interpreter, which replaces triton.jit at import.
PROGRAM = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from flexrec.triton_kernels import ranking_logprobs as logprobs
from flexrec.triton_kernels import swap_rewards as swaps

backend, architecture, warp = json.loads(sys.argv[1])
target = GPUTarget(backend, architecture, warp)

def compile_kernel(kernel, types, constants, **options):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)
    return compiled.metadata.shared, len(compiled.asm["cubin" if backend == "cuda" else "hsaco"])

def pointers(kind, names):
    return {f"{name}_ptr": f"*{kind}" for name in names.split()}

integers = dict.fromkeys("rows size row_stride max_ranked cutoff T K D rows_per_list".split(), "i32")
found = {}
for name, block_n, block_k, normaliser in (("short", 16, 64, swaps.IDEAL), ("long", 1, 2048, swaps.GIVEN)):
    found[f"swap_rewards {name}"] = compile_kernel(
        swaps._swap_rewards_linear_kernel,
        {**integers, **pointers("fp32", "gains rewards"), **pointers("i64", "lengths num_ranked"),
         **pointers("fp64", "inverse_norms")},
        dict(HAS_LENGTHS=True, HAS_NUM_RANKED=True, DISCOUNT=swaps.LOG.value, P=0.0, LOG2_P=0.0,
             GAIN_KIND=swaps.GAIN.value, NORMALISER=normaliser.value, ACCUMULATOR=tl.float32,
             BLOCK_N=block_n, BLOCK_K=block_k),
        num_warps=max(1, min(16, block_n * block_k // 256)),
    )
shared = {**integers, "temperature": "fp32", **pointers("i64", "candidates"), **pointers("i32", "position"),
          **pointers("fp32", "values logprobs entropy expectations logits norm grad_logprobs grad_entropy "
                             "grad_expectations weight_grad bias_grad")}
for kind in ("fp32", "bf16"):
    types = {**shared, **pointers(kind, "hidden weight bias hidden_grad")}
    tiles = dict(C=3, BLOCK_T=32, BLOCK_K=64, BLOCK_D=64)
    found[f"forward {kind}"] = compile_kernel(
        logprobs.ranking_logprobs_forward_kernel, types,
        dict(**tiles, HAS_BIAS=True, NATIVE=True, BLOCK_C=4, K_TILES=2, D_TILES=4))
    found[f"hidden gradient {kind}"] = compile_kernel(
        logprobs.ranking_logprobs_hidden_grad_kernel, types, dict(**tiles, K_TILES=2))
    found[f"weight gradient {kind}"] = compile_kernel(
        logprobs.ranking_logprobs_weight_grad_kernel, types, dict(**tiles, WEIGHT=True, BIAS=True, ROW_TILES=2))
print(json.dumps(found))
"""


@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=str)
def test_kernels_compile(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(target)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert len(found) == 8
    limit = {80: 166912, 90: 232448, "gfx942": 65536}[target[1]]  # bytes of shared memory that a program may take
    for name, (shared, size) in found.items():
        assert size > 0, name
        assert shared <= limit, f"{name} takes {shared} bytes of shared memory"
