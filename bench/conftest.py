"""Fixtures of the benchmarks, and the table of ratios at the end. How to run and read them: bench/NOTES.md."""

from __future__ import annotations

import gc
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `pytest bench` without `python -m` lacks it

from bench.inputs import SMALL
from bench.measure import Ceilings, Step, measure_ceilings, time_steps, trial
from bench.model import Cost
from bench.ratios import FOOTNOTE, HEADER, OURS, cells, from_session, rows, show_ratios

CEILINGS = pytest.StashKey[Ceilings]()
STARTED = pytest.StashKey[float]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU what it computes comes first, in case that time runs out; then what the host does."""
    first = ["test_ranking_logprobs", "test_swap_rewards", "test_restricted_logprobs"]
    if torch.cuda.is_available():
        items.sort(key=lambda item: first.index(item.path.stem) if item.path.stem in first else len(first))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def ceilings(device: torch.device, pytestconfig: pytest.Config) -> Ceilings:
    """Copy bandwidth and GEMM rate, measured once in this run."""
    measured = measure_ceilings(device, SMALL)
    pytestconfig.stash[CEILINGS] = measured
    return measured


@pytest.fixture(autouse=True)
def fresh_start() -> Iterator[None]:
    """Forget what was compiled: beyond a few shapes of one function torch.compile silently runs it eagerly. And give
    back the GPU's memory: that of a captured graph serves no other one, and 20 benchmarks had taken 130 GiB of it."""
    yield
    torch._dynamo.reset()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def measure(benchmark: BenchmarkFixture, device: torch.device, ceilings: Ceilings) -> Callable[..., None]:
    """Time an operation and record what the table needs; see :func:`_measure`."""

    def measure(op: str, shape: str, method: str, *args: Any, **kwargs: Any) -> None:
        try:
            _measure(benchmark, device, ceilings, op, shape, method, *args, **kwargs)
        except torch.OutOfMemoryError:
            if method.startswith(OURS):
                raise
            pytest.skip(f"{method} needs more memory than there is")

    return measure


def _measure(
    benchmark: BenchmarkFixture,
    device: torch.device,
    ceilings: Ceilings,
    op: str,
    shape: str,
    method: str,
    steps: Sequence[Step],
    *,
    cost: Cost | None = None,
    check: Callable[[Any], None] | None = None,
    warm: bool = True,
    capturable: bool = True,
    **extra: Any,
) -> None:
    """Time one method of an operation at a shape.

    Args:
        op, shape: what is computed, the same for all that are compared.
        method: who computes it; "ours" is what the others are compared with.
        steps: the method on one or several sets of inputs.
        cost: what the operation must move and compute, for the floor.
        check: is given what the first step returns, before anything is timed, and fails the test if it is wrong.
        warm: whether to call once before all else, so that nothing is compiled in what is measured. Not for what
            takes seconds and compiles nothing.
        capturable: see :func:`bench.measure.time_steps`.
        extra: goes to the results as it is; ``other_distribution=True`` marks a peer that computes something else.
    """
    benchmark.group = f"{op}, {shape}" if shape else op
    info = {"op": op, "shape": shape, "method": method, **extra}
    if warm:
        steps[0]()
    first = trial(steps[0], device)
    if check is not None:
        check(first.outputs)
    info["peak_memory"], seconds = first.peak_memory, first.seconds
    del first
    info["timed_by"] = time_steps(benchmark, steps, device, seconds, capturable=capturable)
    if cost is not None:
        floor = ceilings.floor(cost)
        info |= {"bytes": cost.bytes, "flops": cost.flops, "floor_s": floor}
        if benchmark.stats:
            info["fraction_of_floor"] = floor / benchmark.stats.stats.min
    benchmark.extra_info |= info


# --- what is saved ----------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_json(benchmarks: list[Any]) -> None:
    """Leave out a benchmark that an interrupt cut off: it has no times, and pytest-benchmark would save nothing."""
    benchmarks[:] = [bench for bench in benchmarks if bench.stats.data]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The versions and the device that a result depends on, and not a page of CPU flags."""
    cpu = machine_info.get("cpu", {})
    for noise in ("flags", "hz_actual", "hz_advertised", "hz_actual_friendly", "hz_advertised_friendly"):
        cpu.pop(noise, None)
    machine_info.pop("node", None)
    machine_info |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    for package in ("triton", "numba", "transformers", "liger_kernel", "trl", "cut_cross_entropy", "flash_attn"):
        machine_info[package] = _version(package)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Ceilings in; the time of every single round out, and digits beyond what was measured."""
    if CEILINGS in config.stash:
        output_json["ceilings"] = config.stash[CEILINGS].as_dict()
    output_json["small"] = SMALL
    for bench in output_json["benchmarks"]:
        bench["stats"].pop("data", None)
        bench.pop("options", None)
        for values in (bench["stats"], bench["extra_info"]):
            values |= {k: float(f"{v:.5g}") for k, v in values.items() if isinstance(v, float)}


# --- what is printed --------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = time.perf_counter()
    if not config.getoption("benchmark_verbose", False) and not config.getoption("benchmark_compare", None):
        config.option.benchmark_quiet = True  # its tables fill pages; the one below says what matters


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of ratios, losses as plain as wins."""
    session = getattr(config, "_benchmarksession", None)
    table = rows(from_session(session.benchmarks)) if session else []
    if not table:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ratios")
    write(f"{HEADER[0]}, {HEADER[1]}: {HEADER[2]}, share of the floor; then {HEADER[5]}")
    for row in table:
        op, shape, ours, floor, _, _ = cells(row)
        write(f"{op}, {shape}: {ours}" + (f", {floor} of the floor" if floor else ""), bold=True)
        unbroken = ", ".join(entry.replace(" ", "\xa0") for entry in show_ratios(row))
        for line in textwrap.wrap(unbroken, 116):
            write("    " + line.replace("\xa0", " "))
    write(FOOTNOTE)
    if CEILINGS in config.stash:
        measured = config.stash[CEILINGS]
        largest = max(measured.copy)
        write(
            f"ceilings of this run: copy {measured.bandwidth(largest) / 1e9:.0f} GB/s in memory, "
            f"{max(measured.copy.values()) / 1e9:.0f} GB/s at best, GEMM {measured.gemm / 1e9:.0f} GFLOP/s in "
            f"{measured.dtype}; {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, "
            f"torch {torch.__version__}; {time.perf_counter() - config.stash[STARTED]:.0f} s"
        )
