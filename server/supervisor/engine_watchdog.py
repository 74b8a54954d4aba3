"""Decides from an engine's heartbeats whether the engine hangs.

Owns the connection to the engine. The caller kills a hung engine.
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
    """Watches one engine until it exits or hangs. clock: seconds, monotonic."""

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
        """Return the reason once the engine hangs; wait forever if it works or has exited."""
        return await watch(self._pass_interval, self.judge, self._interval_s, self._clock)

    def judge(self, passed_s: float) -> str | None:
        """Count `passed_s` more seconds; the reason if the engine hangs now, else None."""
        client, limits = self._client, self._limits
        is_ready = client.info is not None
        if client.last_heartbeat != self._last_heartbeat:
            self._last_heartbeat, self._silent_s = client.last_heartbeat, 0.0
        else:
            self._silent_s += passed_s
        if self._silent_s > (limits.heartbeat_s if is_ready else limits.loading_s):
            return f"gave no heartbeat for {self._silent_s:.0f} s"
        # Between two heartbeats stall_s does not change.
        step_limit_s = limits.first_step_s if client.may_compile else limits.step_s
        if is_ready and client.stall_s > step_limit_s:
            return f"has been in a step without progress for {client.stall_s:.0f} s"
        return None

    async def _pass_interval(self) -> None:
        """Sleep, or try to connect if there is no connection.

        The client pauses only between connections that did not last, so that an engine that becomes
        ready and dies at once is still noticed.
        """
        if self._client.is_connected:
            await asyncio.sleep(self._interval_s)
        else:
            with contextlib.suppress(EngineDeadError):
                await self._client.connect(self._interval_s)
