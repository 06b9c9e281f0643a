"""A disk of a few MB fills up while a run is written: one line says so, and with more room the run goes on."""

import os
import shutil
import subprocess

import numpy as np
import pytest
from processes import command
from small_world import MOMENTS, resume, training


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of so many bytes at a folder, or changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def resized(size):
        nonlocal mounted
        how = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted = True
        return folder

    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a file system")
    yield resized
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("number", MOMENTS)
def test_a_full_disk_is_said_in_one_line_and_costs_nothing(world, tmp_path, small_disk, number):
    rng, log = np.random.default_rng([5, number]), tmp_path / "log"
    taken = sum(path.stat().st_size for path in world.run.rglob("*") if path.is_file())
    folder = small_disk(int(rng.uniform(0.05, 0.95) * taken)) / "run"
    full = command(training(folder), log)
    assert full.code == 2, full.said
    said = [line for line in full.said.splitlines() if line.startswith("flexrec train: error")]
    assert said == [
        "flexrec train: error: no space is left on the disk; what was written is kept; to continue: flexrec train "
        f"--resume --output {folder}"
    ]
    assert "Traceback" not in full.said
    again = command([*training(folder), "--resume"], log)  # nothing has changed
    assert again.code == 2, again.said
    assert "Traceback" not in again.said
    small_disk(4 * taken)
    resumed = resume(folder, log)
    assert resumed.code == 0, resumed.said
    world.check(folder)
