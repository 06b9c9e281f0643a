"""Seconds by part: what is charged to whom, and that a training's parts add up to its time."""

import time

import pytest

from flexrec.profiling import active_profile, profile_steps, span


def test_a_part_is_charged_for_what_no_inner_part_is():
    with profile_steps() as profile:
        with span("backward"):
            time.sleep(0.02)
            with span("forward"):
                time.sleep(0.05)
            time.sleep(0.02)
        time.sleep(0.01)
    assert profile.seconds["forward"] == pytest.approx(0.05, abs=0.02)
    assert profile.seconds["backward"] == pytest.approx(0.04, abs=0.02)
    assert profile.seconds["other"] == pytest.approx(0.01, abs=0.02)


def test_laps_add_up_and_the_evaluation_is_no_part_of_a_step():
    with profile_steps() as profile:
        laps = []
        for _ in range(3):
            with span("decode"):
                time.sleep(0.01)
            with span("evaluation"):
                time.sleep(0.01)
            profile.steps += 1
            laps.append(profile.lap())
    assert sum(lap["decode"] for lap in laps) == pytest.approx(profile.seconds["decode"])
    assert "evaluation" not in profile.per_step()
    assert profile.per_step()["decode"] == pytest.approx(profile.seconds["decode"] / 3)
    assert "mean of 3 steps" in profile.table()


def test_a_span_that_raises_is_closed():
    with profile_steps() as profile:
        with pytest.raises(ValueError, match="broken"), span("decode"):
            raise ValueError("broken")
        time.sleep(0.02)
    assert profile.seconds["other"] >= 0.02
    assert active_profile() is None
    with span("decode"):  # nobody listens
        pass
