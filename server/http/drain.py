"""What a worker does from SIGTERM to its exit.

Owns the order: reject new requests, wait for open ones, end the rest with an error, stop.
Knows nothing of processes or of what a request is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.05
# For the last frames of requests that the drain ended.
LAST_FRAMES_S = 1.0


class Drain:
    """Runs once, from SIGTERM on.

    num_open: returns the number of open requests. end_requests: ends all with an error.
    stop: stops the server.
    """

    def __init__(
        self,
        time_s: float,
        num_open: Callable[[], int],
        end_requests: Callable[[], Awaitable[None]],
        stop: Callable[[], None],
    ) -> None:
        self._time_s = time_s
        self._num_open = num_open
        self._end_requests = end_requests
        self._stop = stop
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to drain. Does nothing if it has started."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="drain")

    async def _run(self) -> None:
        if not await self._all_done(self._time_s):
            logger.warning("drain time is over: ending %d open requests", self._num_open())
            await self._end_requests()
            await self._all_done(LAST_FRAMES_S)
        self._stop()

    async def _all_done(self, time_s: float) -> bool:
        """Whether no request was open at two checks in a row, within the time.

        Two checks, because a request between two of its stages is open and not counted.
        """
        deadline = asyncio.get_running_loop().time() + time_s
        num_checks = 0
        while num_checks < 2:
            num_checks = 0 if self._num_open() else num_checks + 1
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(CHECK_INTERVAL_S)
        return True
