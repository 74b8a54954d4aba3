"""Steps that are computed inside another one, between two of its layers.

On a CPU a step of many answers takes many times as long as one short prompt, and cannot be stopped.
Between two layers its thread can compute another step first. Owns the hand-over of such steps to
the thread and of their results to the loop, one at a time. The scheduler decides which.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future

from ...models.batch import StepBatch, StepResult
from ..scheduler.interface import Progress
from ..scheduler.scheduler import Scheduler
from ..scheduler.sequence import Sequence

logger = logging.getLogger("vlmserve.engine")


class _Insertion:
    """A step for the thread. seconds: how long it took; 0 before its end."""

    def __init__(self, batch: StepBatch) -> None:
        self.batch = batch
        self.result: Future[StepResult] = Future()
        self.is_taken = False
        self.seconds = 0.0


class Insertions:
    """Inserts steps into the running one.

    execute: computes a step, in the thread of `executor`. Called on the loop: started when a step
    is inserted; deliver, fail with what a step changed, or the sequences of a failed one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        execute: Callable[[StepBatch], StepResult],
        started: Callable[[], None],
        deliver: Callable[[list[Progress]], None],
        fail: Callable[[list[Sequence]], None],
    ) -> None:
        self._scheduler, self._execute = scheduler, execute
        self._started, self._deliver, self._fail = started, deliver, fail
        self._seconds = 0.0
        self._current: _Insertion | None = None
        self._task: asyncio.Task[None] | None = None

    def insert(self) -> None:
        """On the loop, while a step is computed: insert a newcomer's if it is due."""
        batch = self._scheduler.insert() if self._current is None else None
        if batch is None:
            return
        self._started()
        self._current = _Insertion(batch)
        self._task = asyncio.create_task(self._finish(self._current))

    def compute(self) -> None:
        """In the thread, before each layer of a step, or after the step: compute what waits."""
        current = self._current
        if current is None or current.is_taken:
            return
        current.is_taken = True
        started_at = time.monotonic()
        try:
            result = self._execute(current.batch)
        except Exception as error:
            current.seconds = time.monotonic() - started_at
            current.result.set_exception(error)
        else:
            current.seconds = time.monotonic() - started_at
            current.result.set_result(result)

    @property
    def seconds(self) -> float:
        """How much of the running step's time inserted ones have taken."""
        return self._seconds + (0.0 if self._current is None else self._current.seconds)

    async def end(self, executor: Executor) -> None:
        """After the step: wait for the inserted one, which is computed now if it came too late."""
        while self._current is not None and (task := self._task) is not None:
            if not self._current.is_taken:
                await asyncio.get_running_loop().run_in_executor(executor, self.compute)
            await task
        self._seconds = 0.0

    def close(self) -> None:
        """Forget what is not finished. Call it after the last step."""
        if self._task is not None:
            self._task.cancel()

    async def _finish(self, insertion: _Insertion) -> None:
        try:
            result = await asyncio.wrap_future(insertion.result)
        except Exception:
            logger.exception("a step of a new request failed")
            self._fail(self._scheduler.fail_step(is_inserted=True))
        else:
            self._deliver(self._scheduler.update(result, insertion.seconds, is_inserted=True))
        self._seconds += insertion.seconds
        self._current = self._task = None
        self.insert()  # a newcomer may have come meanwhile
