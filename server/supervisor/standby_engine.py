"""A process that has imported what an engine needs and waits to become one.

Owns the one spare that all engines share. Knows nothing of why an engine ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from ...router.config import EngineConfig
from .child import Child

STANDBY_OPTION = "--standby"


class EngineStarter:
    """Starts engine processes, from the spare where there is one.

    command: Python's arguments that run an engine. delay_s: how long after the first engine
    is ready a spare is started, so that it takes no core from the first requests; None for
    never. Where one was needed the next is made at once: it is likely to be needed too.
    """

    def __init__(self, command: Sequence[str], delay_s: float | None) -> None:
        self._command = list(command)
        self._delay_s = delay_s
        self._spare: Child | None = None
        self._preparing: asyncio.Task[None] | None = None

    async def start(self, config: EngineConfig) -> Child:
        """A new engine process with its settings."""
        child, self._spare = self._spare, None
        if child is None or child.has_ended:
            child = await Child.start(self._command)
        await child.configure(config)
        return child

    def prepare(self) -> None:
        """Start a spare after the delay, unless there is one or one is on its way."""
        has_spare = self._spare is not None and not self._spare.has_ended
        is_preparing = self._preparing is not None and not self._preparing.done()
        if self._delay_s is not None and not has_spare and not is_preparing:
            self._preparing = asyncio.create_task(self._prepare(self._delay_s))

    async def _prepare(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._spare = await Child.start([*self._command, STANDBY_OPTION])
        self._delay_s = 0.0

    async def close(self) -> None:
        """End the spare."""
        if self._preparing is not None:
            self._preparing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._preparing
        if self._spare is not None:
            self._spare.kill()
            await self._spare.wait()
