"""A cache of decoded tiles, so that the same bytes are not decoded again.

Owns the cached tiles, bounded in bytes. Knows nothing of decoders, URLs or requests.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from ...models.batch import ImageTiles

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


class TileCache:
    """Evicts the least recently used tiles. Serves one checkpoint, so its settings are no key."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes 0 disables the cache."""
        self._max_bytes = max_bytes
        self._tiles: OrderedDict[TileKey, ImageTiles] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._tiles)

    async def key_of(self, data: bytes, max_tiles: int | None, tenant: str) -> TileKey:
        """The key of one encoded image. A large image is hashed in a thread."""
        if not self._max_bytes or len(data) <= MAX_INLINE_BYTES:
            return TileKey(tenant, _digest(data) if self._max_bytes else b"", max_tiles)
        return TileKey(tenant, await asyncio.to_thread(_digest, data), max_tiles)

    def get(self, key: TileKey) -> ImageTiles | None:
        """The tiles, which become the most recently used; None if they are not cached."""
        tiles = self._tiles.get(key)
        if tiles is not None:
            self._tiles.move_to_end(key)
        return tiles

    def put(self, key: TileKey, tiles: ImageTiles) -> None:
        """Cache `tiles`, and evict the least recently used ones to make room."""
        if len(tiles.data) > self._max_bytes or key in self._tiles:
            return
        self._tiles[key] = tiles
        self.num_bytes += len(tiles.data)
        while self.num_bytes > self._max_bytes:
            _, oldest = self._tiles.popitem(last=False)
            self.num_bytes -= len(oldest.data)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
