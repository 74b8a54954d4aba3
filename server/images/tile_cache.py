"""Decoded tiles, so that the same bytes are not decoded again, and not twice at the same time.

Owns the cached tiles, bounded in bytes, and which images are being decoded. Knows nothing of
decoders, URLs or requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ...models.batch import ImageTiles
from .settings import ImageError

# Hashing takes about a millisecond per MiB: larger images would block the event loop.
MAX_INLINE_BYTES = 512 * 1024


@dataclass(frozen=True, slots=True)
class TileKey:
    """Everything that decides the tiles, and the tenant.

    digest: SHA-256 of the encoded bytes. tenant: so that the response time never shows one
    client that another sent the same image.
    """

    tenant: str
    digest: bytes
    max_tiles: int | None


@dataclass(slots=True)
class _Decoding:
    """An image that is being decoded, and how many wait for it."""

    task: asyncio.Task[ImageTiles]
    num_waiting: int = 0


class TileCache:
    """Evicts the least recently used tiles. Serves one checkpoint, so its settings are no key.

    Tiles that a request still has are found too, without counting: one object for all of them.
    """

    def __init__(self, max_bytes: int) -> None:
        """max_bytes 0: nothing is kept that no request has."""
        self._max_bytes = max_bytes
        self._tiles: OrderedDict[TileKey, ImageTiles] = OrderedDict()
        self._alive: weakref.WeakValueDictionary[TileKey, ImageTiles] = (
            weakref.WeakValueDictionary()
        )
        self._decoding: dict[TileKey, _Decoding] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._tiles)

    async def key_of(self, data: bytes, max_tiles: int | None, tenant: str) -> TileKey:
        """The key of one encoded image. A large image is hashed in a thread."""
        if len(data) <= MAX_INLINE_BYTES:
            return TileKey(tenant, _digest(data), max_tiles)
        return TileKey(tenant, await asyncio.to_thread(_digest, data), max_tiles)

    async def get_or_decode(
        self, key: TileKey, decode: Callable[[], Coroutine[Any, Any, ImageTiles]]
    ) -> ImageTiles:
        """The tiles, from the cache or from `decode`, which runs once for all that wait.

        It is cancelled with the last of them. Each gets the error of an image that cannot be
        decoded. Any other error is the first one's alone: the others decode it themselves.
        """
        while True:
            if (tiles := self.get(key)) is not None:
                return tiles
            decoding = self._decoding.get(key)
            if is_first := decoding is None or decoding.task.done():
                decoding = self._start(key, decode)
            assert decoding is not None
            try:
                return await self._wait_for(key, decoding)
            except ImageError as error:
                if is_first:
                    raise
                # A copy: each request sets which of its images it is.
                raise ImageError(error.message) from None
            except Exception:
                if is_first:
                    raise
            finally:
                # The task keeps its failure, whose frames include this one: a cycle.
                del decoding

    def _start(
        self, key: TileKey, decode: Callable[[], Coroutine[Any, Any, ImageTiles]]
    ) -> _Decoding:
        async def run() -> ImageTiles:
            tiles = await decode()
            self.put(key, tiles)
            return tiles

        decoding = self._decoding[key] = _Decoding(asyncio.create_task(run()))
        decoding.task.add_done_callback(lambda task: self._end(key, decoding, task))
        return decoding

    def _end(self, key: TileKey, decoding: _Decoding, task: asyncio.Task[ImageTiles]) -> None:
        if self._decoding.get(key) is decoding:
            del self._decoding[key]
        if not task.cancelled():
            task.exception()  # seen, also if its last reader has just left

    async def _wait_for(self, key: TileKey, decoding: _Decoding) -> ImageTiles:
        decoding.num_waiting += 1
        try:
            return await asyncio.shield(decoding.task)
        finally:
            decoding.num_waiting -= 1
            if not decoding.num_waiting and not decoding.task.done():
                decoding.task.cancel()
                # No other request may wait for what is being cancelled.
                if self._decoding.get(key) is decoding:
                    del self._decoding[key]
            del decoding  # as in get_or_decode

    def get(self, key: TileKey) -> ImageTiles | None:
        """The tiles, which become the most recently used; None if they are gone."""
        tiles = self._tiles.get(key)
        if tiles is None:
            return self._alive.get(key)
        self._tiles.move_to_end(key)
        return tiles

    def put(self, key: TileKey, tiles: ImageTiles) -> None:
        """Cache `tiles`, and evict the least recently used ones to make room."""
        self._alive[key] = tiles
        if len(tiles.data) > self._max_bytes or key in self._tiles:
            return
        self._tiles[key] = tiles
        self.num_bytes += len(tiles.data)
        while self.num_bytes > self._max_bytes:
            _, oldest = self._tiles.popitem(last=False)
            self.num_bytes -= len(oldest.data)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
