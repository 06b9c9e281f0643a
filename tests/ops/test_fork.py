"""Processes forked after kernels have run in parallel: GNU OpenMP's threads do not come along."""

import os
import signal
import subprocess
import sys

import pytest

# Every kernel, on two threads, and what it returned.
WORK = """
import multiprocessing, numpy, sys, torch, flexrec
from torch.utils.data import DataLoader

from flexrec.numba_kernels import threads, tiles

torch.set_num_threads(2)
torch.manual_seed(0)
threads.FEW = tiles.FEW = 0
gains, hidden, weight = torch.rand(600, 60), torch.randn(64, 12, 32), torch.randn(500, 32)
candidates, ranking = torch.rand(64, 500).argsort(1)[:, :12], torch.rand(64, 12).argsort(1)
allowed, offsets = candidates.flatten(), torch.arange(0, 64 * 12 + 1, 12)

def numbers(_):
    results = [flexrec.swap_rewards(gains, "ndcg")]
    results += [flexrec.swap_scores(gains[:50], "ndcg")]
    results += flexrec.swap_rewards_with_variance(gains, gains / 10, "ndcg")
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    flexrec.ranking_logprobs(h, w, candidates, ranking).logprobs.sum().backward()
    restricted = flexrec.restricted_logprobs(h[:, 0], w, allowed, offsets, candidates[:, 0])
    restricted.logprobs.sum().backward()
    return [x.detach().numpy() for x in (*results, restricted.logprobs, h.grad, w.grad)]

expected = numbers(0)
if sys.argv[1] == "pool":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(numbers, range(3))
else:
    found = list(DataLoader(range(3), batch_size=1, num_workers=2, collate_fn=numbers, multiprocessing_context="fork"))
assert len(found) == 3
for of_child in found:
    for one, other in zip(of_child, expected, strict=True):
        numpy.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("children", ["pool", "loader"])
def test_a_forked_child_computes_what_its_parent_computes(children):
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, children],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, said
