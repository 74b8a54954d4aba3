"""Whether an engine gets on with its work, by what its heartbeats say.

Owns the limits and the connection over which the supervisor listens. Knows nothing of
processes: who is told that an engine hangs ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from ...router.client.engine_client import EngineClient
from ...router.errors import EngineDeadError
from .settings import EngineTimeouts
from .watchdog import watch


class EngineWatchdog:
    """Listens to one engine until it goes away or hangs. clock: seconds, monotonic."""

    def __init__(
        self,
        client: EngineClient,
        limits: EngineTimeouts,
        *,
        interval_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._limits = limits
        self._interval_s = interval_s
        self._clock = clock
        self._silent_s = 0.0
        self._last_heartbeat: float | None = None

    async def until_it_hangs(self) -> str:
        """Why the engine is taken to hang. Never returns while it gets on, nor after its end."""
        return await watch(self._pass_interval, self.judge, self._interval_s, self._clock)

    def judge(self, passed_s: float) -> str | None:
        """Take in `passed_s` more seconds; in words why the engine hangs, or None."""
        client, limits = self._client, self._limits
        is_ready = client.info is not None
        if client.last_heartbeat != self._last_heartbeat:
            self._last_heartbeat, self._silent_s = client.last_heartbeat, 0.0
        else:
            self._silent_s += passed_s
        if self._silent_s > (limits.heartbeat_s if is_ready else limits.loading_s):
            return f"gave no heartbeat for {self._silent_s:.0f} s"
        # Between two heartbeats the figure stands still.
        step_limit_s = limits.first_step_s if client.may_compile else limits.step_s
        if is_ready and client.stall_s > step_limit_s:
            return f"has been in a step without progress for {client.stall_s:.0f} s"
        return None

    async def _pass_interval(self) -> None:
        """Sleep, or try to connect where there is no connection.

        An engine that does not listen yet is silent. All the time is spent on trying: one
        that is ready and dies at once must have been heard.
        """
        if self._client.is_connected:
            await asyncio.sleep(self._interval_s)
        else:
            with contextlib.suppress(EngineDeadError):
                await self._client.connect(self._interval_s)
