"""Watches a folder whose subfolders are adapters, each under its folder's name.

Owns what was seen of the folder at the last look. One worker of a server watches: the one that has
the lock, which the kernel gives to another when it dies. The folder is the operator's: unlike the
paths of requests, its subfolders may be symlinks to anywhere.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from pathlib import Path

from ...models.lora.files import CONFIG, WEIGHTS
from ..errors import ApiError, NotReadyError
from .names import why_not
from .registry import AdapterRegistry
from .updates import AdapterEngine, AdapterUpdates

logger = logging.getLogger(__name__)

LOCK_NAME = "adapters.source.lock"
# While the engine is not ready, or another worker watches.
RETRY_S = 0.5

# A change of any of these is a change of the adapter: both files' inode, size and time.
Signature = tuple[int, ...]


class AdapterSource:
    """folder: the watched one. shared: the folder of the lock; None: there is one worker only."""

    def __init__(
        self,
        folder: Path,
        interval_s: float,
        registry: AdapterRegistry,
        updates: AdapterUpdates,
        engine: AdapterEngine,
        shared: Path | None,
    ) -> None:
        self._folder = folder
        self._interval_s = interval_s
        self._registry = registry
        self._updates = updates
        self._engine = engine
        self._shared = shared
        self._lock: int | None = None
        self._seen: dict[str, Signature] = {}

    async def watch(self) -> None:
        """Look again and again until cancelled."""
        try:
            while True:
                is_due = self._engine.is_ready and self._may_watch()
                if is_due:
                    await self._look_safely()
                await asyncio.sleep(self._interval_s if is_due else RETRY_S)
        finally:
            self._release()

    async def look(self) -> None:
        """Serve what was added or changed since the last look, and no longer what is gone."""
        found = await asyncio.to_thread(subfolders, self._folder)
        for name, signature in found.items():
            if self._seen.get(name) != signature and await self._serve(name):
                self._seen[name] = signature
        self._seen = {name: one for name, one in self._seen.items() if name in found}
        for adapter in self._registry.all():
            if adapter.origin == "source" and adapter.name not in found:
                self._remove(adapter.name, "its folder is gone")

    async def _look_safely(self) -> None:
        try:
            await self.look()
        except OSError as error:
            logger.error("cannot read the folder of --lora-source: %s", error.strerror)

    async def _serve(self, name: str) -> bool:
        """Serve one subfolder; False to try it again at the next look."""
        if (reason := why_not(name)) is not None:
            logger.warning("skipped a folder of --lora-source: %s", reason)
            return True
        try:
            await self._updates.load(name, self._folder / name, name, "source", in_place=True)
        except NotReadyError:
            return False
        except ApiError as error:
            logger.warning("skipped a folder of --lora-source: %s", error.message)
            present = self._registry.find(name)
            if present is not None and present.origin == "source":
                self._remove(name, "its files have changed")
        else:
            logger.info("the adapter %s is served", name)
        return True

    def _remove(self, name: str, reason: str) -> None:
        removed = self._registry.remove(name)
        if removed is not None:
            logger.info("the adapter %s is no longer served: %s", name, reason)
            self._updates.forget_later(removed)

    def _may_watch(self) -> bool:
        """Whether no other worker watches."""
        if self._shared is None or self._lock is not None:
            return True
        descriptor = os.open(self._shared / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._lock = descriptor
        return True

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def subfolders(folder: Path) -> dict[str, Signature]:
    """The subfolders that have both files of an adapter, by name. Raises OSError."""
    found: dict[str, Signature] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            if entry.name.startswith("."):
                continue
            try:
                files = [os.stat(Path(entry.path, name)) for name in (CONFIG, WEIGHTS)]
            except OSError:
                continue  # no folder, or no adapter in it yet
            found[entry.name] = tuple(
                number for one in files for number in (one.st_ino, one.st_size, one.st_mtime_ns)
            )
    return found
