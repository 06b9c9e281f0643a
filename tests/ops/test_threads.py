"""Kernels by the calling thread alone and on two: the same numbers, to the last bit."""

import os
import subprocess
import sys

PROGRAM = """
import torch, flexrec
from flexrec.numba_kernels import threads, tiles

torch.set_num_threads(2)
torch.manual_seed(0)
gains, hidden, weight, bias = torch.rand(60, 20), torch.randn(24, 9, 16), torch.randn(90, 16), torch.randn(90)
candidates, ranking = torch.rand(8, 90).argsort(1)[:, :12], torch.rand(24, 9).argsort(1)
lengths = torch.arange(24) % 4 + 9
allowed, offsets = torch.rand(24, 90).argsort(1)[:, :7].flatten(), torch.arange(0, 24 * 7 + 1, 7)
values = torch.randn(24, 12, 2)

def numbers(few):
    threads.FEW = tiles.FEW = few
    h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
    found = flexrec.ranking_logprobs(h, w, candidates, ranking, values=values, bias=b, lengths=lengths)
    sets = flexrec.restricted_logprobs(h[:, 0], w, allowed, offsets, allowed[::7], bias=b)
    results = [*found, *sets[:2], flexrec.ranking_kl(h, w, hidden + 1, weight, candidates, ranking)]
    sum(x.square().sum() for x in results).backward()
    rewards = flexrec.swap_rewards_with_variance(gains, gains / 10, "ndcg")
    return [x.detach() for x in (*results, *rewards, h.grad, w.grad, b.grad)]

for alone, together in zip(numbers(2**62), numbers(0), strict=True):
    assert torch.equal(alone, together)
"""


def test_threads_change_no_bit() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_pool_is_there_where_one_thread_will_do() -> None:
    """Compiled code refers to it: without it numba 0.60 ends the process when it loads such code from its cache."""
    program = """
import numba, torch
from flexrec.numba_kernels.threads import parts_for

torch.set_num_threads(1)
assert parts_for(1) == 1
numba.threading_layer()  # raises where there is none
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
