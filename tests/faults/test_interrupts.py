"""Ctrl-C, and Ctrl-C again: what was written is kept, whole, and the run goes on."""

import numpy as np
import pytest
from processes import InterruptTwice, command
from small_world import MOMENTS, resume, training


@pytest.mark.parametrize("number", MOMENTS)
def test_an_impatient_user_loses_nothing(world, tmp_path, number):
    rng = np.random.default_rng([4, number])
    folder, log = tmp_path / "run", tmp_path / "log"
    twice = InterruptTwice(rng.uniform(0.02, 1.0) * world.train.seconds, rng.choice([0.001, 0.01, 0.1]))
    stopped = command(training(folder), log, twice)
    assert stopped.code in (0, 1, 130), stopped.said  # 1: the second came after the command had caught the first
    resumed = resume(folder, log)
    assert resumed.code == 0, resumed.said
    world.check(folder)
