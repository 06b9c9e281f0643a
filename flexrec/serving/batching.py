"""Requests that arrive together are answered together, in one thread that alone touches the model.

A request waits for others for a moment, or for the batch before it to be answered. So many may wait and no more; one
that has waited too long is dropped before it costs anything.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from flexrec.serving.options import ServeOptions
from flexrec.serving.refused import Refused

Answer = dict[str, Any]
Work = Callable[[Sequence[dict[str, Any]]], Sequence[Answer]]
logger = logging.getLogger(__name__)


class _Job(NamedTuple):
    kind: str
    request: dict[str, Any]
    answer: asyncio.Future[Answer]
    since: float


class Batcher:
    """Answers single requests of several kinds in batches. Everything but the work happens on one event loop.

    Args:
        work: what answers requests of a kind, as many answers in the same order.
        observe: is told the size of every batch.
    """

    def __init__(
        self, work: dict[str, Work], options: ServeOptions, observe: Callable[[int], None] = lambda size: None
    ) -> None:
        self._work, self._options, self._observe = work, options, observe
        self._waiting: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ranker")
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._seconds = 0.0  # of a batch, lately

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Answer what waits, then end."""
        self._stopping = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        await asyncio.to_thread(self._thread.shutdown)

    async def answer(self, kind: str, requests: Sequence[dict[str, Any]]) -> list[Answer]:
        """The answers of requests that came as one.

        Raises:
            Refused: 503 where so many cannot wait, 504 where they have waited too long, 500 where the work fails.
        """
        options = self._options
        if len(requests) > options.queue:
            raise Refused(413, f"a list of requests has at most {options.queue}, got {len(requests)}")
        if len(self._waiting) + len(requests) > options.queue:
            batches = math.ceil(len(self._waiting) / options.max_batch)
            seconds = max(1, math.ceil(batches * self._seconds))
            message = f"{len(self._waiting)} requests wait already: try again in {seconds} s"
            raise Refused(503, message, "", {"Retry-After": str(seconds)})
        loop = asyncio.get_running_loop()
        jobs = [_Job(kind, request, loop.create_future(), time.perf_counter()) for request in requests]
        self._waiting.extend(jobs)
        self._arrived.set()
        answers = asyncio.gather(*(job.answer for job in jobs))
        try:
            return await asyncio.wait_for(answers, options.timeout)
        except asyncio.TimeoutError:
            raise Refused(504, f"there was no answer within {options.timeout:g} s") from None

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            if self._stopping and not self._waiting:
                return
            await self._wait_for_others()
            batch = self._take()
            if not self._waiting and not self._stopping:
                self._arrived.clear()
            if batch:
                self._observe(len(batch))
                start = time.perf_counter()
                await self._answer(batch)
                self._seconds = 0.5 * self._seconds + 0.5 * (time.perf_counter() - start)

    async def _wait_for_others(self) -> None:
        end = self._waiting[0].since + self._options.max_wait / 1000
        while (left := end - time.perf_counter()) > 0:
            if self._stopping or len(self._waiting) >= self._options.max_batch:
                return
            await asyncio.sleep(min(left, 0.001))

    def _take(self) -> list[_Job]:
        """The longest waiting, without those that nobody waits for any more."""
        batch: list[_Job] = []
        while self._waiting and len(batch) < self._options.max_batch:
            job = self._waiting.popleft()
            if not job.answer.done():
                batch.append(job)
        return batch

    async def _answer(self, batch: Sequence[_Job]) -> None:
        for kind in dict.fromkeys(job.kind for job in batch):
            jobs = [job for job in batch if job.kind == kind]
            if len(jobs) > 1:
                try:
                    await self._answer_together(kind, jobs)
                    continue
                except Exception:
                    logger.exception("a batch failed, its requests are answered one by one")
            for job in jobs:  # whoever is to blame pays alone
                await self._answer_alone(kind, job)

    async def _answer_together(self, kind: str, jobs: Sequence[_Job]) -> None:
        loop = asyncio.get_running_loop()
        requests = [job.request for job in jobs]
        for job, answer in zip(jobs, await loop.run_in_executor(self._thread, self._work[kind], requests), strict=True):
            if not job.answer.done():
                job.answer.set_result(answer)

    async def _answer_alone(self, kind: str, job: _Job) -> None:
        try:
            await self._answer_together(kind, [job])
        except Exception:
            logger.exception("a request failed")
            if not job.answer.done():
                job.answer.set_exception(Refused(500, "the ranker failed at this request; its log says how"))
