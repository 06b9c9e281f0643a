"""How many threads the numba kernels run on."""

from __future__ import annotations

import numba
import torch

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
    """How many shares to cut some multiplications into: one where threads would cost more than they save."""
    follow_torch_threads()
    return 1 if work < 100_000 else _PARTS * torch.get_num_threads()
