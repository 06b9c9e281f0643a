"""How many threads the numba kernels run on."""

from __future__ import annotations

import numba
import torch


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
