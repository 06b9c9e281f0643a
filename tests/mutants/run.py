"""Run the tests against every fault of this folder: ``python tests/mutants/run.py [NAME ..] [--sample N] [--jobs J]``.

Each job works on a copy of the tree. It loads the heavy packages once and forks for every fault, in the copy of which
only the tests that the fault names are run. Exits with 1 if a fault survives, does not apply, or breaks the import of
what it is in, which would prove nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutants import ROOT, Mutant, load_mutants

HEAVY = ("numpy", "torch", "transformers", "numba", "triton", "triton.language", "accelerate", "hypothesis", "pytest")
PASSED, FAILED = 0, 1  # pytest's exit codes
TIMEOUT_S = 600


def copy_tree(target: Path) -> None:
    """What git tracks or would track, as it stands, with the compiled core, importable from its own root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    cores = [str(path.relative_to(ROOT)) for path in (ROOT / "flexrec").glob("_core*.so")]
    for name in [*filter(None, listed), *cores]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / "flexrec" / "triton_kernels").symlink_to("../triton_kernels")  # an install maps it


class Job:
    """One copy of the tree, in which faults are tried one after the other."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.folder = folder
        copy_tree(self.tree)
        os.environ |= {"PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py, before Triton is imported
        os.environ.setdefault("FLEXREC_TEST_DATA", str(ROOT.parent / "shared" / "data"))
        sys.dont_write_bytecode = True
        for package in HEAVY:
            __import__(package)

    def try_mutant(self, mutant: Mutant) -> tuple[str, float]:
        """(killed, survived, or what else happened; seconds)."""
        start = time.monotonic()
        path = self.tree / mutant.file
        source = path.read_text(encoding="utf-8")
        try:
            faulty = mutant.applied_to(source)
        except ValueError as error:
            return str(error), 0.0
        try:
            path.write_text(faulty, encoding="utf-8")
            if mutant.file.startswith("csrc/"):
                self.build()
            # Numba's cache does not notice a change in what a cached function calls.
            code = self.run_tests(mutant.tests, cache="mutant" if "numba" in mutant.file else "shared")
        except subprocess.CalledProcessError:
            return "does not compile", time.monotonic() - start
        finally:
            path.write_text(source, encoding="utf-8")
            if mutant.file.startswith("csrc/"):
                self.build()
        outcome = {PASSED: "survived", FAILED: "killed"}.get(code, f"broken (pytest's exit code {code})")
        return outcome, time.monotonic() - start

    def build(self) -> None:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=self.tree, check=True, capture_output=True)

    def run_tests(self, tests: tuple[str, ...], cache: str) -> int:
        """pytest's exit code, of a process forked from this one; minus the signal that ended it."""
        child = os.fork()
        if child == 0:
            os.setsid()
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os._exit(self._pytest(tests, self.folder / f"numba-{cache}"))
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > deadline:  # a fault that hangs is noticed, too
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return FAILED
            time.sleep(0.05)
        if cache == "mutant":
            shutil.rmtree(self.folder / "numba-mutant", ignore_errors=True)
        return os.waitstatus_to_exitcode(status)

    def _pytest(self, tests: tuple[str, ...], numba_cache: Path) -> int:
        import numba
        import pytest

        numba.config.CACHE_DIR = str(numba_cache)
        os.environ["NUMBA_CACHE_DIR"] = str(numba_cache)
        os.chdir(self.tree)
        sys.path[0] = str(self.tree)
        try:
            return int(pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


_job: Job


def _start(folder: str, numbers: multiprocessing.Queue[int]) -> None:
    global _job
    _job = Job(Path(folder) / str(numbers.get()))


def _try(mutant: Mutant) -> tuple[Mutant, str, float]:
    return (mutant, *_job.try_mutant(mutant))


def _pass_unchanged(tests: tuple[str, ...]) -> str:
    """What pytest printed where the tests do not pass without a fault; else an empty text."""
    code = _job.run_tests(tests, cache="shared")
    return "" if code == PASSED else f"exit code {code}\n{(_job.folder / 'log').read_text()[-4000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests against every fault of tests/mutants.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these mutants (or those whose name begins so)")
    parser.add_argument("--sample", type=int, metavar="N", help="a random sample of N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="J", help="processes")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a fault first")
    arguments = parser.parse_args()
    mutants = load_mutants()
    if arguments.names:
        mutants = [m for m in mutants if any(m.name.startswith(name) for name in arguments.names)]
    if arguments.sample:
        mutants = random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants)))
    if not mutants:
        parser.error("no mutant has such a name")

    context = multiprocessing.get_context("spawn")
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        numbers = context.Queue()
        jobs = min(arguments.jobs, len(mutants))
        for number in range(jobs):
            numbers.put(number)
        with context.Pool(jobs, _start, (folder, numbers)) as pool:
            if not arguments.no_baseline:
                tests = sorted({test for mutant in mutants for test in mutant.tests})
                print(f"{len(tests)} tests without a fault ..", flush=True)
                for output in pool.imap(_pass_unchanged, [tuple(tests[n::jobs]) for n in range(jobs)]):
                    if output:
                        print(f"they must pass before faults prove anything: {output}")
                        return 1
            for count, (mutant, outcome, seconds) in enumerate(pool.imap_unordered(_try, mutants), start=1):
                expected = "survived" if mutant.equivalent else "killed"
                print(f"{count:4d}/{len(mutants)}  {outcome:9s} {seconds:6.1f} s  {mutant.name}", flush=True)
                if outcome != expected:
                    bad.append(f"{mutant.name} ({mutant.file}): {outcome}")
    print(f"{len(mutants) - len(bad)} of {len(mutants)} mutants as expected")
    for line in bad:
        print(f"  {line}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
