"""Batches: what comes together is answered together, in one thread, within limits."""

import asyncio
import threading
import time

import pytest

from flexrec.serving.batching import Batcher
from flexrec.serving.options import ServeOptions
from flexrec.serving.refused import Refused


class Work:
    """Doubles numbers, slowly; remembers its batches."""

    def __init__(self, seconds=0.0):
        self.seconds, self.batches, self.threads = seconds, [], set()

    def __call__(self, requests):
        self.threads.add(threading.get_ident())
        self.batches.append([one["n"] for one in requests])
        time.sleep(self.seconds)
        if any(one["n"] == 13 for one in requests):
            raise RuntimeError("thirteen")
        return [{"n": 2 * one["n"]} for one in requests]


def run(steps, work, observe=lambda size: None, **options):
    """The outcome of ``steps(batcher)`` on a loop of its own."""

    async def whole():
        batcher = Batcher({"double": work, "other": work}, ServeOptions(**options), observe)
        batcher.start()
        try:
            return await steps(batcher)
        finally:
            await batcher.stop()

    return asyncio.run(whole())


async def together(batcher, numbers, kind="double"):
    asked = [batcher.answer(kind, [{"n": n}]) for n in numbers]
    return await asyncio.gather(*asked, return_exceptions=True)


def test_what_comes_together_is_answered_together():
    work, sizes = Work(), []
    answers = run(lambda batcher: together(batcher, range(7)), work, sizes.append, max_batch=4, max_wait=200)
    assert answers == [[{"n": 2 * n}] for n in range(7)]
    assert work.batches == [[0, 1, 2, 3], [4, 5, 6]]
    assert sizes == [4, 3]
    assert len(work.threads) == 1
    assert threading.get_ident() not in work.threads


def test_nobody_waits_longer_than_asked_for_others():
    work = Work()

    async def steps(batcher):
        start = time.perf_counter()
        await batcher.answer("double", [{"n": 1}])
        return time.perf_counter() - start

    assert 0.1 <= run(steps, work, max_wait=100) < 2
    assert run(steps, work, max_wait=0, max_batch=64) < 0.09


def test_a_busy_thread_gathers_the_next_batch():
    work = Work(0.1)

    async def steps(batcher):
        first = asyncio.create_task(batcher.answer("double", [{"n": 0}]))
        await asyncio.sleep(0.05)
        await together(batcher, [1, 2, 3])
        await first

    run(steps, work, max_wait=0)
    assert work.batches == [[0], [1, 2, 3]]


def test_kinds_are_answered_apart():
    work = Work()

    async def steps(batcher):
        return await asyncio.gather(together(batcher, [1, 2]), together(batcher, [3], "other"))

    assert run(steps, work, max_wait=100) == [[[{"n": 2}], [{"n": 4}]], [[{"n": 6}]]]
    assert work.batches == [[1, 2], [3]]


def test_a_failing_request_costs_no_other(caplog):
    work = Work()
    one, bad, other = run(lambda batcher: together(batcher, [1, 13, 2]), work, max_wait=100)
    assert (one, other) == ([{"n": 2}], [{"n": 4}])
    assert isinstance(bad, Refused)
    assert bad.status == 500
    assert work.batches == [[1, 13, 2], [1], [13], [2]]
    assert "thirteen" in caplog.text


def test_beyond_the_queue_nobody_waits():
    work = Work(0.1)

    async def steps(batcher):
        first = asyncio.create_task(batcher.answer("double", [{"n": 0}]))
        await asyncio.sleep(0.05)
        answers = await together(batcher, [1, 2, 3, 4])
        await first
        return answers

    *waited, refused, other = run(steps, work, max_wait=0, max_batch=1, queue=2)
    assert waited == [[{"n": 2}], [{"n": 4}]]
    assert [refused.status, other.status] == [503, 503]
    assert int(refused.headers["Retry-After"]) >= 1
    assert all(3 not in batch for batch in work.batches)


def test_a_list_is_taken_whole_or_not_at_all():
    work = Work()

    async def steps(batcher):
        answers = await batcher.answer("double", [{"n": n} for n in range(5)])
        with pytest.raises(Refused, match="at most 5, got 6") as refused:
            await batcher.answer("double", [{"n": n} for n in range(6)])
        return answers, refused.value.status

    answers, status = run(steps, work, max_batch=2, queue=5)
    assert answers == [{"n": 2 * n} for n in range(5)]
    assert status == 413


def test_what_has_waited_too_long_is_told_so_and_costs_nothing():
    work = Work(0.4)

    async def steps(batcher):
        answers = await together(batcher, [0, 1])
        await asyncio.sleep(0.4)
        work.seconds = 0
        return *answers, await batcher.answer("double", [{"n": 2}])

    first, late, third = run(steps, work, max_wait=0, max_batch=1, timeout=0.2)
    assert [first.status, late.status] == [504, 504]
    assert third == [{"n": 4}]
    assert work.batches == [[0], [2]]


def test_stopping_answers_what_waits():
    work = Work(0.05)

    async def whole():
        batcher = Batcher({"double": work}, ServeOptions(max_batch=1, max_wait=60_000, timeout=10))
        batcher.start()
        asked = asyncio.gather(*(batcher.answer("double", [{"n": n}]) for n in range(3)))
        await asyncio.sleep(0)
        await batcher.stop()
        return await asked

    assert asyncio.run(whole()) == [[{"n": 0}], [{"n": 2}], [{"n": 4}]]
