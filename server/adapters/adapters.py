"""A worker's adapters: the names that it shares with others, and what may change them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from ...router.processes.tasks import end_tasks
from .registry import AdapterRegistry
from .settings import AdapterSettings
from .source import AdapterSource
from .updates import AdapterEngine, AdapterUpdates


class WorkerAdapters:
    """shared: the folder of the names; None: this worker is alone."""

    def __init__(
        self,
        settings: AdapterSettings,
        model_names: Iterable[str],
        engine: AdapterEngine,
        shared: Path | None,
    ) -> None:
        root = settings.updates_root
        self.registry = AdapterRegistry(settings.at_start, model_names, shared)
        self.updates = AdapterUpdates(self.registry, engine, None if root is None else Path(root))
        self._source: AdapterSource | None = None
        self._watching: asyncio.Task[None] | None = None
        if settings.lora_source is not None:
            self._source = AdapterSource(
                Path(settings.lora_source),
                settings.lora_refresh_s,
                self.registry,
                self.updates,
                engine,
                shared,
            )

    def open(self) -> None:
        """Start to watch the folder, if there is one."""
        if self._source is not None:
            self._watching = asyncio.create_task(self._source.watch(), name="adapters")

    async def close(self) -> None:
        """Stop watching."""
        if self._watching is not None:
            await end_tasks(self._watching)
        await self.updates.close()
