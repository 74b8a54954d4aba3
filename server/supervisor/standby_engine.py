"""Starts engines, and keeps one standby process with all imports done, shared by all engines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from ...router.config import EngineConfig
from ..children.processes import ChildStartError
from .child import Child

logger = logging.getLogger(__name__)

STANDBY_OPTION = "--standby"
# Until the next attempt after the system could not start the standby process.
RETRY_S = 30.0


class EngineStarter:
    """Starts engine processes, from the standby process if there is one.

    command: Python's arguments that run an engine. delay_s: seconds between the first engine's
    ready message and the start of the standby, so that it takes no core from the first requests;
    None disables it. Later standby processes start at once.
    """

    def __init__(self, command: Sequence[str], delay_s: float | None) -> None:
        self._command = list(command)
        self._delay_s = delay_s
        self._standby: Child | None = None
        self._preparing: asyncio.Task[None] | None = None

    @property
    def has_standby(self) -> bool:
        """Whether a standby process runs."""
        return self._standby is not None and not self._standby.has_ended

    async def start(self, config: EngineConfig) -> Child:
        """A new engine process with its settings. Raises ChildStartError."""
        child, self._standby = self._standby, None
        if child is None or child.has_ended:
            child = await Child.start(self._command)
        await child.configure(config)
        return child

    def prepare(self) -> None:
        """Start a standby after the delay, unless there is one or one is being started."""
        is_preparing = self._preparing is not None and not self._preparing.done()
        if self._delay_s is not None and not self.has_standby and not is_preparing:
            self._preparing = asyncio.create_task(self._prepare(self._delay_s))

    async def _prepare(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while not self.has_standby:
            try:
                self._standby = await Child.start([*self._command, STANDBY_OPTION])
            except ChildStartError as error:
                # The server works without it; only a restart takes longer.
                logger.warning("no standby engine: %s; trying again in %g s", error, RETRY_S)
                await asyncio.sleep(RETRY_S)
        self._delay_s = 0.0

    async def close(self) -> None:
        """Kill the standby process."""
        if self._preparing is not None:
            self._preparing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._preparing
        if self._standby is not None:
            self._standby.kill()
            await self._standby.wait()
