"""Keeps encoded images in host memory, and reads them instead of encoding them again.

Owns the two threads that write and read the files (`blocks/image_files.py`), the counts, and the
end of it all if the memory is full. An image is written when it is encoded, not when it is evicted:
so a killed engine has lost nothing, and an eviction costs nothing. If writing falls behind, images
are not kept.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from ...models.batch import ModelInfo
from ..blocks.image_files import DamagedImageError, ImageFiles
from ..blocks.image_pool import ImageKey
from ..config import EngineConfig
from ..messages import EngineStats
from ..scheduler.request_queue import RequestQueue

logger = logging.getLogger("vlmserve.engine")

# images whose copies wait to be written
MAX_PENDING = 4
# the files that decide what a checkpoint computes
WEIGHTS = (".safetensors", ".json", ".bin")

# Waits for the copy of an image's blocks, and returns it.
HostCopy = Callable[[], memoryview]
# Gets an image's bytes, or None if it must be encoded after all.
Take = Callable[[ImageKey, memoryview | None], None]


class HostImages:
    """The tier of one engine. Its methods are called from the event loop alone."""

    def __init__(self, files: ImageFiles | None, tile_bytes: int, take: Take) -> None:
        """files: None keeps nothing. tile_bytes: of one tile in the image pool. take: called in
        the loop, after a read.
        """
        self._files, self._tile_bytes, self._take = files, tile_bytes, take
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="image-reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="image-writer")
        self._tasks: set[asyncio.Task[None]] = set()
        # names that the running step copies, and these with those that are being written
        self._planned: set[str] = set()
        self._pending: set[str] = set()
        self.num_hits = self.num_misses = self.num_damaged = self.num_dropped = 0
        self._num_bytes = self._num_evictions = 0

    @classmethod
    def of(cls, config: EngineConfig, info: ModelInfo, queue: RequestQueue) -> HostImages:
        """The tier that the settings ask for, beside this queue's tiles; logs what it is."""
        made = queue.tiles.host = cls(_files_of(config, info), info.tile_bytes, queue.take_stored)
        return made

    @property
    def num_pending(self) -> int:
        """Images that are being read or written."""
        return len(self._tasks)

    def start_read(self, key: ImageKey) -> bool:
        """Read an image if it is here: `take` is called later. False: it is not here."""
        if self._files is None:
            return False
        name = self._files.name_of(key)
        if not self._files.has(name):
            self.num_misses += 1
            return False
        self._start(self._read(self._files, key, name))
        return True

    def keep_as(self, key: ImageKey) -> str:
        """The name under which to keep an image that is encoded now; empty if not at all."""
        if self._files is None:
            return ""
        name = self._files.name_of(key)
        if name in self._pending or self._files.has(name):
            return ""
        if len(self._pending) >= MAX_PENDING:
            self.num_dropped += 1
            return ""
        self._planned.add(name)
        self._pending.add(name)
        return name

    def write(self, kept: Mapping[str, HostCopy]) -> None:
        """Write the copies of the last step; without one, a planned image is not kept."""
        self._pending -= self._planned - kept.keys()
        self._planned.clear()
        for name, copy in kept.items():
            if self._files is not None:
                self._start(self._write(self._files, name, copy))

    def add_to(self, stats: EngineStats) -> None:
        """Add the counts to a report."""
        stats.image_host_hits, stats.image_host_misses = self.num_hits, self.num_misses
        stats.image_host_damaged, stats.image_host_dropped = self.num_damaged, self.num_dropped
        stats.image_host_evictions, stats.image_host_bytes = self._num_evictions, self._num_bytes

    def close(self) -> None:
        """Start nothing more."""
        self._files = None
        for executor in (self._reader, self._writer):
            executor.shutdown(wait=False, cancel_futures=True)
        for task in self._tasks:
            task.cancel()

    async def _read(self, files: ImageFiles, key: ImageKey, name: str) -> None:
        data = None
        try:
            data = await _in(self._reader, files.read, name, key.num_tiles * self._tile_bytes)
        except DamagedImageError as error:
            self.num_damaged += 1
            logger.warning("removed a damaged image from host memory: %s", error)
        except OSError as error:
            self._turn_off(error)
        if data is None:
            self.num_misses += 1
        else:
            self.num_hits += 1
        self._take(key, data)

    async def _write(self, files: ImageFiles, name: str, copy: HostCopy) -> None:
        try:
            await _in(self._writer, lambda: files.write(name, copy()))
            self._num_bytes = await _in(self._writer, files.num_bytes)
            self._num_evictions = files.num_evictions
        except OSError as error:
            self._turn_off(error)
        finally:
            self._pending.discard(name)

    def _turn_off(self, error: OSError) -> None:
        if self._files is not None:
            logger.warning(
                "images are no longer kept in host memory: %s; give /dev/shm more room, or lower "
                "--image-cache-host",
                error.strerror or error,
            )
        self._files = None

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _files_of(config: EngineConfig, info: ModelInfo) -> ImageFiles | None:
    folder, limit = config.image_folder, config.image_cache_host_bytes
    if not (folder and limit and config.image_cache):
        return None
    if not info.tile_bytes:
        logger.warning("--image-cache-host is off: it does not work with several ranks")
        return None
    logger.info("encoded images are kept in host memory, up to %.1f GiB", limit / 2**30)
    return ImageFiles(Path(folder), limit, signature_of(config, info))


async def _in(executor: ThreadPoolExecutor, work: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, work, *args)


def signature_of(config: EngineConfig, info: ModelInfo) -> bytes:
    """What an image's bytes depend on beside its key: the checkpoint's files, types and sizes."""
    files = []
    if os.path.isdir(config.model):
        for entry in sorted(os.scandir(config.model), key=lambda one: one.name):
            if entry.name.endswith(WEIGHTS):
                stat = entry.stat()
                files.append((entry.name, stat.st_size, stat.st_mtime_ns))
    sizes = (info.tile_bytes, info.tile_size, info.pools.has_int8_images)
    parts = (os.path.realpath(config.model), files, info.dtype, config.quantize, sizes)
    return msgspec.msgpack.encode(parts)
