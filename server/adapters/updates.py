"""Loads and unloads adapters while the server runs.

Owns the order: an adapter is read by every engine before its name is served, and its name is gone
before the engines forget it. Knows nothing of HTTP, or of who asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Protocol

from ...models.batch import AdapterInfo, AdapterRef
from ...models.errors import AdapterError
from ...models.lora.files import digest_of
from ...router.errors import AdapterUnusableError, EngineDeadError
from ...router.processes.tasks import end_tasks
from ..errors import BadRequestError, NotFoundError, NotReadyError
from .names import folder_below, why_not
from .registry import AdapterRegistry
from .settings import Origin, ServedAdapter


class AdapterEngine(Protocol):
    """The part of `router.client.EngineClient` that is used here."""

    @property
    def is_ready(self) -> bool: ...
    async def load_adapter(self, adapter: AdapterRef) -> AdapterInfo: ...
    async def unload_adapter(self, digest: str) -> None: ...


class AdapterUpdates:
    """root: the folder below which requests may load; None: nowhere."""

    def __init__(self, registry: AdapterRegistry, engine: AdapterEngine, root: Path | None) -> None:
        self._registry = registry
        self._engine = engine
        self._root = root
        # Reading takes a core for seconds: one at a time.
        self._loading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def load_for_client(self, name: str, path: str, *, in_place: bool) -> None:
        """Load what a request names. Raises BadRequestError, NotFoundError or NotReadyError."""
        if (reason := why_not(name)) is not None:
            raise BadRequestError(reason, param="lora_name")
        assert self._root is not None, "without a folder the route is not served"
        self._registry.check_free(name, lambda origin: in_place)
        folder = await asyncio.to_thread(folder_below, path, self._root)
        await self.load(name, folder, path, "request", in_place=in_place)

    async def load(
        self, name: str, folder: Path, root: str, origin: Origin, *, in_place: bool
    ) -> ServedAdapter:
        """Have the engines read an adapter, then serve it. Raises as `load_for_client`."""
        async with self._loading:
            try:
                digest = await asyncio.to_thread(digest_of, folder)
                ref = AdapterRef(name, str(folder), digest)
                await self._engine.load_adapter(ref)
            except (AdapterError, AdapterUnusableError) as error:
                raise BadRequestError(
                    f"the adapter {name!r} cannot be used: {error}", param="lora_path"
                ) from error
            except EngineDeadError as error:
                raise NotReadyError("Service is not ready.", retry_after_s=1.0) from error
            served = ServedAdapter(ref, root, int(time.time()), origin)
            before = self._registry.find(name)
            self._registry.add(
                served, lambda other: in_place if origin == "request" else other == origin
            )
        if before is not None:
            self.forget_later(before)
        return served

    async def unload(self, name: str) -> None:
        """Serve a name no longer; return when no request uses its adapter.

        Raises NotFoundError.
        """
        removed = self._registry.remove(name)
        if removed is None:
            raise NotFoundError(f"the lora adapter {name!r} cannot be found", param="lora_name")
        await self._forget(removed)

    def forget_later(self, removed: ServedAdapter) -> None:
        """Have the engines forget an adapter whose name is gone, without waiting for it."""
        task = asyncio.create_task(self._forget(removed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop waiting for the engines."""
        await end_tasks(*self._tasks)

    async def _forget(self, removed: ServedAdapter) -> None:
        """Return when no request uses the adapter. Another name may still serve its weights."""
        digest = removed.ref.digest
        if any(one.ref.digest == digest for one in self._registry.all()):
            return
        with contextlib.suppress(EngineDeadError):  # a dead engine has forgotten it too
            await self._engine.unload_adapter(digest)
