"""Triton's kernels as they are compiled: their tests once more, the PTX of each launch emulated (``tests/ptx.py``).

In processes of their own, as the interpreter replaces ``triton.jit`` at import: one for each target.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # that a target's tests may take; on one core they take a twentieth

# Target, file, and a test, with all of its parameters or some, that must pass: each kernel; lists of one tile and of
# several, ragged and cut off; the metrics' forms and the credits; each element type. Compiling takes most of the time.
SM_90, SM_80 = "sm_90", "sm_80"  # where products of large tiles are not emulated, and where they are
SWAPS, RANKINGS = "swap_rewards_triton", "ranking_logprobs_triton"
CHOSEN = [
    (SM_90, SWAPS, "test_lists_of_several_tiles[ndcg@30-noncausal]"),  # which came out wrong on a GPU
    (SM_90, SWAPS, "test_lists_of_several_tiles[ndcg-swap]"),
    (SM_90, SWAPS, "test_lists_of_several_tiles[map-noncausal]"),
    (SM_90, SWAPS, "test_lists_of_several_tiles[err-swap]"),
    (SM_90, SWAPS, "test_lists_of_several_tiles[mrr-swap]"),
    (SM_90, SWAPS, "test_every_metric_and_credit[dcg-noncausal]"),  # @3, float64
    (SM_90, SWAPS, "test_every_metric_and_credit[ndcg-noncausal]"),  # bfloat16
    (SM_90, SWAPS, "test_every_metric_and_credit[ndcg_burges-swap]"),  # float16
    (SM_90, SWAPS, "test_every_metric_and_credit[recall-independent]"),  # @3, bfloat16
    (SM_90, SWAPS, "test_every_metric_and_credit[mrr-rank]"),  # @3, float16
    (SM_90, SWAPS, "test_every_metric_and_credit[map-swap]"),  # float64
    (SM_90, SWAPS, "test_every_metric_and_credit[err-sequence]"),  # bfloat16
    (SM_90, SWAPS, "test_variance[ndcg@7-noncausal]"),
    (SM_90, SWAPS, "test_variance_of_lists_of_several_tiles[ndcg-swap-True]"),
    (SM_90, SWAPS, "test_swap_scores_and_policy_rewards[recall@5-7]"),
    (SM_90, SWAPS, "test_swap_scores_and_policy_rewards[err-40]"),
    (SM_90, SWAPS, "test_swap_scores_and_policy_rewards[map@20-40]"),
    (SM_90, SWAPS, "test_swap_scores_of_several_tiles_of_columns"),
    (SM_90, "topics_triton", "test_all_credits_equal_torch[4-5-3-dtype0]"),
    (SM_90, "topics_triton", "test_all_credits_equal_torch[5-6-17-dtype2]"),
    (SM_90, "segment_sum_triton", "test_sums_by_token"),
    (SM_90, "restricted_logprobs_triton", "test_error_is_at_most_twice_that_of_torch[dtype0-ragged]"),
    (SM_90, "restricted_logprobs_triton", "test_error_is_at_most_twice_that_of_torch[dtype1-ragged]"),
    (SM_90, "restricted_logprobs_triton", "test_ways_to_sum_up_the_weights_gradient"),
    (SM_90, RANKINGS, "test_equals_reference[dtype0-K17D63]"),
    (SM_90, RANKINGS, "test_equals_reference[dtype1-K7D5]"),
    (SM_80, RANKINGS, "test_equals_reference[dtype1-K65D65]"),
    (SM_80, f"{RANKINGS}_kernels", "test_outputs_and_gradients[(1,1,70,135,40,200)-bfloat16-chosen-True-hidden]"),
    (SM_80, f"{RANKINGS}_kernels", "test_outputs_and_gradients[(1,2,33,65,65,99)-float16-chosen-False-hidden]"),
    (SM_80, f"{RANKINGS}_kernels", "test_a_dense_gradient_in_half_precision_goes_through_rows[3-chosen]"),
    (SM_80, f"{RANKINGS}_kernels", "test_lists_of_many_lengths[canonical]"),
]


@functools.cache
def outcomes(target: str, chosen: tuple[str, ...]) -> dict[str, str]:
    """What becomes of some tests, by file::name[parameters]: "passed", or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ("-q", "-p", "ptx", "-p", "no:cacheprovider", f"--junitxml={report}", *chosen)
        result = emulated("-m", "pytest", *options, environment={"FLEXREC_PTX": target})
        assert report.exists(), result.stdout[-3000:] + result.stderr[-3000:]
        cases = ElementTree.parse(report).iter("testcase")
        return {
            f"{case.get('classname').rpartition('.')[2]}::{case.get('name')}": "passed"
            if not len(case)
            else f"{case[0].tag}: {case[0].get('message')}\n{case[0].text}"
            for case in cases
        }


def emulated(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A Python program with the emulator on its path, and without the interpreter."""
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, cwd=ROOT, timeout=SECONDS)


@pytest.mark.parametrize(("target", "file", "test"), CHOSEN, ids=lambda x: x.removesuffix("_triton"))
def test_compiled_kernels_pass(target, file, test, request):
    asked = [item.callspec.params for item in request.session.items if item.function is request.function]
    chosen = tuple(f"tests/ops/test_{x['file']}.py::{x['test']}" for x in asked if x["target"] == target)
    wanted = f"test_{file}::{test}"
    found = {name: what for name, what in outcomes(target, chosen).items() if wanted in (name, name.partition("[")[0])}
    assert found, f"no such test: {wanted}"
    wrong = [f"{name} {what}" for name, what in found.items() if what != "passed"]
    assert not wrong, "\n\n".join(wrong)


PROBES = """
import json
import torch, triton, triton.language as tl
import ptx
from flexrec.triton_kernels.launch import launch

@triton.jit
def halved(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIT: tl.constexpr):
    row = tl.arange(0, ROWS)
    x = tl.load(x_ptr + row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])  # (ROWS, COLUMNS)
    pairs = tl.sum(x.reshape(ROWS, COLUMNS >> (BIT + 1), 2, 1 << BIT), axis=2)  # from here on lanes hold copies
    tl.store(y_ptr + row, tl.sum(pairs.reshape(ROWS, COLUMNS // 2), axis=1))

@triton.jit
def copied(x_ptr, y_ptr, SIZE: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, SIZE), tl.load(x_ptr + tl.arange(0, SIZE)))

ptx.emulate("sm_90")
x, y = torch.arange(1024.0).view(16, 64), torch.zeros(16)
errors = []
for bit in range(5):
    launch(halved, (1,), x, y, 16, 64, bit)
    errors.append((y - x.sum(1)).abs().max().item())
given, found = torch.arange(514.0), torch.zeros(514)
copies = []
for first in range(3):  # from there on, 0, 4 and 8 bytes behind a multiple of 16
    launch(copied, (1,), given[first:], found[first:], 512)
    copies.append(torch.equal(found[first : first + 512], given[first : first + 512]))
print(json.dumps([errors, copies]))
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> tuple[list[float], list[bool]]:
    """The largest errors of sums, whose rows lie in ever other lanes, and whether copies came out right."""
    program = tmp_path_factory.mktemp("probes") / "probes.py"  # a file, because Triton reads the source of a kernel
    program.write_text(PROBES)
    result = emulated(str(program))
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_a_sum_that_triton_3_6_compiles_wrongly_is_wrong(probes):
    """A row in lanes that are no neighbours, as in the first run on a GPU: the sum was that of other lanes."""
    errors, _ = probes
    assert errors[0] == 0  # there the row's lanes are neighbours
    if triton.__version__.startswith("3.6."):
        assert max(errors) > 1000
    elif not any(errors):
        pytest.skip(f"Triton {triton.__version__} adds up the right lanes")


def test_tensors_that_begin_between_multiples_of_16_bytes_are_not_read_16_at_a_time(probes):
    assert probes[1] == [True] * 3
