"""Measuring: the machine's ceilings, the time of an operation, and the memory it takes besides its inputs."""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.model import Cost

Step = Callable[[], Any]

SECONDS = 0.3  # to spend on the rounds of one benchmark
MAX_ROUNDS = 200
GRAPH_SECONDS = 2e-3  # of work in one replay of a CUDA graph: long beside the launch of the graph
MAX_CALLS = 256  # in one graph


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do in this run.

    Attributes:
        copy: bytes read and written per second, by how many of them a copy moves. One entry on a GPU, where inputs are
            rotated through memory; on a CPU one per power of two, because a small input stays in the caches there, and
            a floor taken from main memory would be no floor.
        gemm: FLOPs per second of a large square product in ``dtype``.
        dtype: of the product.
    """

    copy: dict[int, float]
    gemm: float
    dtype: str

    def bandwidth(self, moved: int) -> float:
        """Bytes per second of a copy that moves about this many bytes."""
        return self.copy[min(self.copy, key=lambda measured: abs(math.log2(measured / max(moved, 1))))]

    def floor(self, cost: Cost) -> float:
        """Seconds that nothing on this device can beat by much: the larger of the two bounds."""
        return max(cost.bytes / self.bandwidth(cost.bytes), cost.flops / self.gemm)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_ceilings(device: torch.device, small: bool = False) -> Ceilings:
    """Copy bandwidth and GEMM rate: best of several, a few seconds in all."""
    on_cpu = device.type == "cpu"
    sizes = [2**p for p in range(16, 22 if small else 31)] if on_cpu else [2**31]
    copy = {}
    for moved in sizes:
        source = torch.zeros(moved // 8, device=device)  # float32: half the bytes are read, half are written
        target = torch.empty_like(source)
        copy[moved] = moved / _best_seconds(functools.partial(target.copy_, source), device)
    side = (256 if small else 2048) if on_cpu else 8192
    dtype = torch.float32 if on_cpu else torch.bfloat16
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    gemm = 2 * side**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device)
    return Ceilings(copy, gemm, str(dtype).removeprefix("torch."))


def _best_seconds(step: Step, device: torch.device, seconds: float = 0.15) -> float:
    """The fastest of several calls, synchronised; on a GPU timed by events, several calls apiece."""
    step()
    calls = 1 if device.type == "cpu" else 10
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        times.append(_seconds_of(step, calls, device))
    return min(times)


def _seconds_of(step: Step, calls: int, device: torch.device) -> float:
    """Seconds per call of ``calls`` calls in a row."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def buffers_needed(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs of ``nbytes`` to rotate through, so that none is still in the GPU's L2 when it is due."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(32, math.ceil(3 * cache / max(nbytes, 1))))


def nbytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def time_steps(
    benchmark: BenchmarkFixture,
    steps: Sequence[Step],
    device: torch.device,
    seconds: float,
    *,
    capturable: bool = True,
) -> str:
    """Time one operation on rotated inputs and return how: "call", "graph", or "stream" and why.

    Args:
        benchmark: pytest-benchmark's fixture, which gets the seconds per call.
        steps: the operation on each set of inputs.
        seconds: what a call takes, about; decides on the rounds.
        device: the CPU (one set of inputs, plain calls) or a GPU. There a host timer is wrong for what takes
            microseconds, so that many calls are captured in a CUDA graph, and a replay of it is timed.
        capturable: whether the operation can be captured. One that waits for the GPU cannot: it is called in a row
            instead, and its time includes the waiting, which its users have to bear too.
    """
    if benchmark.disabled:
        benchmark.pedantic(steps[0])
        return "call"
    if device.type == "cpu":
        benchmark.pedantic(steps[0], rounds=_rounds(seconds))
        benchmark.extra_info["between_torch"] = between_torch(steps[0], _rounds(seconds))
        return "call"
    seconds = max(_seconds_of(step, 3, device) for step in steps)
    calls = min(MAX_CALLS, max(1, math.ceil(GRAPH_SECONDS / seconds)))
    calls = math.ceil(calls / len(steps)) * len(steps)
    in_a_row = [steps[i % len(steps)] for i in range(calls)]
    work, how = _launcher(in_a_row, capturable)
    benchmark.pedantic(_Iterations(work, calls), rounds=_rounds(seconds * calls), warmup_rounds=1, iterations=calls)
    return how


def between_torch(step: Step, rounds: int) -> float:
    """Seconds of the fastest call right after a product by torch on all its threads, as calls come in training.

    In a loop of its own an operation finds its threads awake and spinning; here they have to be woken, or wait for a
    core on which torch's spin.
    """
    square = torch.randn(512, 512)
    times = []
    for _ in range(rounds):
        torch.mm(square, square)
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def _launcher(steps: Sequence[Step], capturable: bool) -> tuple[Step, str]:
    """What launches all steps once, and "graph", or "stream" where they cannot be captured, with the reason."""
    if capturable:
        try:
            return _capture(steps).replay, "graph"
        except RuntimeError as error:
            torch.cuda.synchronize()
            cause: BaseException = error  # which the end of the capture, failing in turn, covers up
            while cause.__context__ is not None:
                cause = cause.__context__
            return lambda: [step() for step in steps], f"stream, as capturing failed: {str(cause).splitlines()[0]}"
    return lambda: [step() for step in steps], "stream"


def _rounds(seconds: float) -> int:
    return max(1, min(MAX_ROUNDS, int(SECONDS / seconds)))


class _Iterations:
    """The work of ``count`` iterations, done in the first and awaited in the last.

    pytest-benchmark divides the time of a round by its iterations; what is timed here is one replay for all of them.
    """

    def __init__(self, work: Step, count: int) -> None:
        self.work, self.count, self.done = work, count, 0

    def __call__(self) -> None:
        if self.done == 0:
            self.work()
        self.done = (self.done + 1) % self.count
        if self.done == 0:
            torch.cuda.synchronize()


def _capture(steps: Sequence[Step]) -> torch.cuda.CUDAGraph:
    """A CUDA graph that runs the steps one after the other."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capturing needs libraries and autograd warmed up on a stream of its own
        for step in dict.fromkeys(steps):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph


@dataclass(frozen=True)
class Trial:
    """One call: what it returned, seconds it took, and bytes it needed at its peak (None: not known)."""

    outputs: Any
    seconds: float
    peak_memory: int | None


def trial(step: Step, device: torch.device) -> Trial:
    """Call once and see what that needs besides what was there before: results and everything in between.

    On a GPU torch's allocator knows. On a CPU the resident set's high-water mark is reset and read (Linux), which sees
    every allocator; None where the system has no such thing. Pages are its unit, so below a megabyte it is rough.
    """
    gc.collect()
    before = restart_peak(device)
    start = time.perf_counter()
    outputs = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = None if before is None else max(0, peak_bytes(device) - before)
    return Trial(outputs, seconds, peak)


def restart_peak(device: torch.device) -> int | None:
    """Forget the peak so far; the bytes now in use."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps in reserve would hide what the call takes
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def peak_bytes(device: torch.device) -> int:
    """The peak since :func:`restart_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))
