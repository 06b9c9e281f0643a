"""The core from several Python threads."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from flexrec.rankings import RankingState, parse_rankings

sys.path.insert(0, str(Path(__file__).parent))

from enumeration import csr_rows, sampled_long_lists


def test_the_gil_is_released() -> None:
    """While one thread parses, another goes on running Python."""
    tokens = np.ones((1, 6_000_000), dtype=np.int64)
    candidates = [[[1] * 300 + [2]]]
    interval: list[float] = []

    def parse() -> None:
        started = time.perf_counter()
        parse_rankings(tokens, candidates)
        interval.extend((started, time.perf_counter()))

    thread = threading.Thread(target=parse)
    thread.start()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    started, ended = interval
    assert ended - started > 0.1, "too quick to tell"
    middle = [t for t in ticks if started + (ended - started) / 4 < t < ended - (ended - started) / 4]
    assert len(middle) >= 5


def test_threads_with_a_state_each_and_with_one_in_common() -> None:
    candidates, _ = sampled_long_lists(8, seed=7)
    options: dict[str, Any] = {"separator": [90], "end": [91]}
    common = RankingState(candidates, **options)
    rankings: list[np.ndarray] = []

    def walk() -> None:
        state = RankingState(candidates, **options)
        while not state.done().all():
            state.advance([ids[-1] if ids else 0 for ids in csr_rows(*state.allowed())])
            common.advance(*common.forced())
            ids, offsets = common.allowed()
            assert offsets[-1] == len(ids)
        rankings.append(state.rankings())

    threads = [threading.Thread(target=walk) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rankings) == 3
    for other in rankings[1:]:
        np.testing.assert_array_equal(rankings[0], other)
