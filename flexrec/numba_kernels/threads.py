"""How many threads the numba kernels run on."""

from __future__ import annotations

import numba
import torch

# So many multiplications one thread does for itself: 0.2 ms, at some 30 in a nanosecond as callers count them. Between
# torch's operations, whose threads spin on the same cores, a parallel region was measured to cost 0.2 to 0.34 ms more
# than in a loop of its own (two cores), and tens of ms where other processes keep the cores busy.
FEW = 6_000_000
_PARTS = 8  # shares of the work per thread, so that none waits long for another


def follow_torch_threads() -> None:
    """Run numba on as many threads as torch.

    The two may share one OpenMP runtime, in which the start of numba's threads overrides ``torch.set_num_threads``;
    torch's number is put back.
    """
    threads = torch.get_num_threads()
    wanted = min(threads, numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def parts_for(work: int) -> int:
    """How many shares to cut some multiplications into: one where threads would cost more than they save, see FEW."""
    # Also where one thread will do: compiled code refers to numba's pool, and where none was started old versions of
    # numba (0.60) end the process when they load that code from their cache.
    follow_torch_threads()
    threads = torch.get_num_threads()
    if threads == 1 or work < FEW:
        return 1  # by the thread that asks, and none of the pool is woken
    return _PARTS * threads
