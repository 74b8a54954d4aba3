"""What a worker does from SIGTERM to its end.

Owns the order: refuse what is new, let open requests end by themselves, end those that
are left by an error, stop. Knows nothing of processes or of what a request is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.05
# For the last frames of requests that were ended.
LAST_FRAMES_S = 1.0


class Drain:
    """Begun once, by SIGTERM.

    num_open: how many requests are open. end_requests: gives all of them an error.
    stop: ends the server.
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

    def begin(self) -> None:
        """Start to drain; again, does nothing."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="drain")

    async def _run(self) -> None:
        if not await self._all_done(self._time_s):
            logger.warning("%d requests outlast the drain: ended", self._num_open())
            await self._end_requests()
            await self._all_done(LAST_FRAMES_S)
        self._stop()

    async def _all_done(self, time_s: float) -> bool:
        """Whether no request was open at two looks in a row, before the time was over.

        Two, as a request between two of its parts is open without being counted.
        """
        deadline = asyncio.get_running_loop().time() + time_s
        num_looks = 0
        while num_looks < 2:
            num_looks = 0 if self._num_open() else num_looks + 1
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(LOOK_INTERVAL_S)
        return True
