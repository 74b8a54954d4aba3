"""Reads adapters while their requests wait, and forgets those that were not used for longest.

Owns the thread that reads, which adapters are in memory, and which answers use them. Knows nothing
of queues, of steps or of what an adapter changes.

An adapter with an open answer is in use and stays. The others are forgotten, the least recently
used first, when all together have more than `max_bytes`. If those in use have as many alone, the
next one is read when one of them is no longer in use. So memory exceeds the bound by one adapter.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor

from ...models.batch import AdapterInfo, AdapterRef
from ..errors import AdapterUnusableError
from ..scheduler.sequence import Sequence
from .runner_protocol import Adapters

logger = logging.getLogger("vlmserve.engine")

OnRead = Callable[[list[Sequence], AdapterInfo | AdapterUnusableError], None]


class AdapterLoader:
    """Reads one adapter at a time, in its own thread.

    on_read: called on the loop with the answers that waited for an adapter, and what it is, or why
    it cannot be used.
    """

    def __init__(self, adapters: Adapters, max_bytes: int, on_read: OnRead) -> None:
        self._adapters = adapters
        self._max_bytes = max_bytes
        self._on_read = on_read
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        # in memory, the least recently used first
        self._known: OrderedDict[str, AdapterInfo] = OrderedDict()
        self._users: dict[str, set[Sequence]] = {}
        self._reading: dict[str, asyncio.Task[AdapterInfo | AdapterUnusableError]] = {}
        self._released = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    # Answers

    def find(self, ref: AdapterRef) -> AdapterInfo | None:
        """What an adapter is; None if it must be read first."""
        info = self._known.get(ref.digest)
        if info is not None:
            self._known.move_to_end(ref.digest)
        return info

    def use(self, ref: AdapterRef, sequences: list[Sequence]) -> None:
        """These answers of one request use an adapter from now on; it is read if it must be."""
        self._users.setdefault(ref.digest, set()).update(sequences)
        if ref.digest not in self._known:
            self._start(self._read_for_answers(ref))

    def leave(self, sequence: Sequence) -> None:
        """An answer has ended."""
        digest = sequence.adapter_digest
        users = self._users.get(digest, set())
        users.discard(sequence)
        if digest in self._users and not users:
            del self._users[digest]
            self._forget_oldest()
            self._start(self._notify())

    async def _read_for_answers(self, ref: AdapterRef) -> None:
        async with self._released:
            await self._released.wait_for(lambda: self._may_read(ref) or not self._waiting_for(ref))
        if not self._waiting_for(ref):
            return
        result = await self._read(ref)
        # Nothing is awaited from here on, so no answer can end in between.
        if waiting := self._waiting_for(ref):
            self._on_read(waiting, result)

    def _waiting_for(self, ref: AdapterRef) -> list[Sequence]:
        return [one for one in self._users.get(ref.digest, ()) if one.adapter is None]

    # Checks of workers

    async def load(self, ref: AdapterRef) -> AdapterInfo:
        """Read an adapter, so that its first request need not wait. Raises AdapterUnusableError."""
        result = self.find(ref) or await self._read(ref)
        if isinstance(result, AdapterUnusableError):
            raise result
        return result

    async def unload(self, digest: str) -> None:
        """Forget an adapter as soon as no answer uses it."""
        async with self._released:
            await self._released.wait_for(lambda: digest not in self._users)
        if (forgetting := self._forget(digest)) is not None:
            await asyncio.wrap_future(forgetting)

    def close(self) -> None:
        """Cancel what waits; a file that is being read is read to its end."""
        for task in (*self._tasks, *self._reading.values()):
            task.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    # Memory

    def _may_read(self, ref: AdapterRef) -> bool:
        """Whether those in use leave room for another; not known while one is being read."""
        if ref.digest in self._known or ref.digest in self._reading:
            return True
        in_use = (info.num_bytes for digest, info in self._known.items() if digest in self._users)
        return not self._reading and sum(in_use) < self._max_bytes

    def _forget_oldest(self) -> None:
        """Forget unused adapters until all together are within the bound."""
        num_bytes = sum(info.num_bytes for info in self._known.values())
        for digest, info in list(self._known.items()):
            if num_bytes <= self._max_bytes:
                return
            if digest not in self._users:
                self._forget(digest)
                num_bytes -= info.num_bytes

    def _forget(self, digest: str) -> Future[None] | None:
        """Release an adapter in the thread, which may be busy with reading another one."""
        if self._known.pop(digest, None) is None:
            return None
        return self._executor.submit(self._adapters.forget, digest)

    async def _notify(self) -> None:
        async with self._released:
            self._released.notify_all()

    async def _read(self, ref: AdapterRef) -> AdapterInfo | AdapterUnusableError:
        """Read an adapter once, however many wait for it."""
        task = self._reading.get(ref.digest)
        if task is None:
            task = asyncio.create_task(self._result(ref), name="adapter")
            self._reading[ref.digest] = task
            task.add_done_callback(lambda _: self._end_reading(ref.digest))
        return await asyncio.shield(task)

    def _end_reading(self, digest: str) -> None:
        del self._reading[digest]
        self._start(self._notify())

    async def _result(self, ref: AdapterRef) -> AdapterInfo | AdapterUnusableError:
        if (known := self._known.get(ref.digest)) is not None:
            return known
        loop = asyncio.get_running_loop()
        try:
            info = await loop.run_in_executor(self._executor, self._adapters.read, ref)
        except ValueError as problem:
            return AdapterUnusableError(str(problem))
        except Exception as error:
            logger.exception("reading the adapter %s failed", ref.name)
            return AdapterUnusableError(f"reading it failed: {type(error).__name__}")
        self._known[ref.digest] = info
        self._forget_oldest()
        return info

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
