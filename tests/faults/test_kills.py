"""Killed at random moments, a run goes on to what it would have become, and no answer is lost or torn."""

import json

import numpy as np
import pytest
from processes import KillAfter, KillAtFile, command
from small_world import BATCH, MOMENTS, resume, training

KINDS = ("anywhere", "at a file")


def moment(kind, undisturbed, rng):
    """A moment of a command; seconds of CPU vary from run to run, by more than a tenth on a busy machine."""
    if kind == "anywhere":
        return KillAfter(rng.uniform(0.02, 1.0) * undisturbed.seconds)
    return KillAtFile(int(rng.integers(1, undisturbed.file_events + 1)))


@pytest.mark.parametrize("number", MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_goes_on_as_if_nothing_had_been(world, tmp_path, kind, number):
    rng = np.random.default_rng([KINDS.index(kind), number])
    folder, log = tmp_path / "run", tmp_path / "log"
    killed = command(training(folder), log, moment(kind, world.train, rng))
    assert killed.code <= 0, killed.said
    if number % 2 == 0:  # once more, while it is being resumed
        command([*training(folder), "--resume"], log, moment(kind, world.train, rng))
    resumed = resume(folder, log)
    assert resumed.code == 0, resumed.said
    world.check(folder)


@pytest.mark.parametrize("number", MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_rank_has_written_is_whole(world, tmp_path, kind, number):
    """Whole lines from the first on, as many as whole batches; the rest can be asked for anew."""
    rng = np.random.default_rng([2 + KINDS.index(kind), number])
    part, rest, target = tmp_path / "part.jsonl", tmp_path / "rest.jsonl", tmp_path / "others.jsonl"
    killed = command(world.ranking(world.requests, part), tmp_path / "log", moment(kind, world.rank, rng))
    assert killed.code <= 0, killed.said
    written = part.read_text() if part.exists() else ""
    expected = world.answers.read_text()
    assert expected.startswith(written)
    done = written.count("\n")
    assert written[-1:] in ("", "\n")
    assert done % BATCH == 0
    requests = world.requests.read_text().splitlines(keepends=True)[done:]
    if not requests:
        return
    rest.write_text("".join(requests))
    assert command(world.ranking(rest, target), tmp_path / "log").code == 0
    answers = [json.loads(line)["ranking"] for line in (written + target.read_text()).splitlines()]
    assert answers == [json.loads(line)["ranking"] for line in expected.splitlines()]
