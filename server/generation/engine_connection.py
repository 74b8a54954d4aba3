"""A worker's connection to one engine, which reconnects after each restart of the engine.

Owns the client and the task that keeps it connected. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ...router.client.engine_client import EngineClient
from ...router.errors import EngineDeadError
from ...router.processes.tasks import end_tasks

logger = logging.getLogger(__name__)


class EngineConnection:
    """Stays connected from `open` to `stop`. name: for logs. on_dead: called if it dies."""

    def __init__(self, path: str, name: str, on_dead: Callable[[], None] = lambda: None) -> None:
        self.client = EngineClient(path, on_dead=self._lose)
        self._name = name
        self._on_dead = on_dead
        self._is_dead = asyncio.Event()
        self._connecting: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start to connect to the engine, which may still be loading."""
        self._connecting = asyncio.create_task(self._stay_connected())

    async def stop(self) -> None:
        """Stop reconnecting."""
        if self._connecting is not None:
            await end_tasks(self._connecting)

    async def close(self) -> None:
        """Cancel all requests in the engine."""
        await self.client.close()

    def _lose(self) -> None:
        self._on_dead()
        self._is_dead.set()

    async def _stay_connected(self) -> None:
        while True:
            self._is_dead.clear()
            try:
                await self.client.connect()
            except EngineDeadError as error:
                logger.warning("%s: %s", self._name, error)
                continue
            await self._is_dead.wait()
            logger.error("lost the connection to %s: its requests failed", self._name)
