"""Decides whether a worker hangs: its event loop writes a byte per beat to a pipe.

Owns both ends of the pipe. The caller kills a hung worker. A health request would not do: a
worker at its connection limit would reject it, and any of several workers could answer it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable
from types import TracebackType

from .settings import WorkerTimeouts
from .watchdog import watch

INTERVAL_S = 0.5
# More than the capacity of a pipe.
READ_BYTES = 1 << 20


async def beat(fd: int, interval_s: float = INTERVAL_S) -> None:
    """Write a byte to the pipe `fd` in each interval; never returns."""
    os.set_blocking(fd, False)
    while True:
        # A full pipe contains enough beats for the next read.
        with contextlib.suppress(BlockingIOError):
            os.write(fd, b".")
        await asyncio.sleep(interval_s)


class LivenessPipe:
    """The supervisor's end of one worker's pipe; a context manager.

    The worker inherits `worker_fd`; after that, `hand_over` closes it here. clock: seconds,
    monotonic.
    """

    def __init__(
        self,
        limits: WorkerTimeouts,
        *,
        interval_s: float = INTERVAL_S / 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._interval_s = interval_s
        self._clock = clock
        self._fd, self.worker_fd = os.pipe()
        os.set_blocking(self._fd, False)
        self._is_handed_over = False
        self._has_beaten = False
        self._silent_s = 0.0

    def __enter__(self) -> LivenessPipe:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.hand_over()
        os.close(self._fd)

    def hand_over(self) -> None:
        """Close the worker's end here. Further calls do nothing."""
        if not self._is_handed_over:
            self._is_handed_over = True
            os.close(self.worker_fd)

    async def until_it_stops(self) -> str:
        """Return the reason once the worker hangs; wait forever if it beats or has exited."""
        pause = functools.partial(asyncio.sleep, self._interval_s)
        return await watch(pause, self.judge, self._interval_s, self._clock)

    def judge(self, passed_s: float) -> str | None:
        """Count `passed_s` more seconds; the reason if the worker hangs now, else None."""
        if self._is_beating():
            self._has_beaten, self._silent_s = True, 0.0
        else:
            self._silent_s += passed_s
        limit_s = self._limits.stall_s if self._has_beaten else self._limits.starting_s
        if self._silent_s > limit_s:
            return f"has not run its event loop for {self._silent_s:.0f} s"
        return None

    def _is_beating(self) -> bool:
        """Whether a beat arrived since the last call; False once the worker has exited."""
        try:
            return bool(os.read(self._fd, READ_BYTES))
        except BlockingIOError:
            return False
