"""Image blocks by content, with reference counts.

Owns which image is in which blocks, and the order of eviction; `contract.py` has the rules. Knows
nothing of tensors, or of when a running sequence releases its images.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...models.batch import ImageRef
from ..errors import OutOfBlocksError
from .block_pool import BlockPool
from .contract import ImageBlocks, PoolSnapshot


class ImageKey(NamedTuple):
    """What makes two images the same to the cache: tenant, content, tiles and adapter.

    The tenant prevents one client from learning that another client sent the same image. adapter:
    the digest of the adapter that encodes it; empty for the base model, and for adapters that do
    not change what image blocks contain.
    """

    tenant: str
    content_hash: bytes
    num_tiles: int
    tile_size: int
    aspect_ratio_id: int
    adapter: str = ""

    @classmethod
    def of(cls, image: ImageRef, tenant: str, adapter: str = "") -> ImageKey:
        """The key of `image` when `tenant` sends it and `adapter` encodes it."""
        return cls(
            tenant,
            image.content_hash,
            image.num_tiles,
            image.tile_size,
            image.aspect_ratio_id,
            adapter,
        )


@dataclass(slots=True, eq=False)
class ImageEntry:
    """A handle to an image in the pool: its blocks, one for each real tile, in order.

    is_encoded: a step has written the image's keys and values into the blocks; before that,
    num_layers of the encoder have run. vision_s: seconds that the encoder has spent on it.
    """

    key: ImageKey
    block_ids: list[int]
    num_references: int = 0
    is_encoded: bool = False
    num_layers: int = 0
    vision_s: float = 0.0


class ImagePool(ImageBlocks):
    """Several running requests with the same image share its blocks; it is encoded once.

    An image that was never encoded is freed with its last reference. With is_caching False, every
    image is.
    """

    def __init__(self, num_blocks: int, is_caching: bool = True) -> None:
        self.blocks = BlockPool(num_blocks)
        self.num_hits = 0
        self.num_misses = 0
        self.num_evictions = 0
        self._is_caching = is_caching
        self._entries: dict[ImageKey, ImageEntry] = {}
        self._unused: OrderedDict[ImageKey, ImageEntry] = OrderedDict()

    def has_encoded(self, key: ImageKey) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.is_encoded

    def can_acquire(self, keys: list[ImageKey]) -> bool:
        return self.num_lacking(keys) == 0

    def num_lacking(self, keys: list[ImageKey]) -> int:
        wanted = {key for key in keys if key not in self._entries or key in self._unused}
        return max(0, sum(key.num_tiles for key in wanted) - self.blocks.num_available)

    def count_lookups(self, keys: list[ImageKey]) -> None:
        """Count each image of a request that starts, once, as a hit or a miss."""
        for key in set(keys):
            if key in self._entries:
                self.num_hits += 1
            else:
                self.num_misses += 1

    def acquire(self, keys: list[ImageKey]) -> list[ImageEntry]:
        if not self.can_acquire(keys):
            raise OutOfBlocksError(
                f"{len(keys)} images do not fit: {self.blocks.num_available} blocks are available"
            )
        # Cached images first, so that none of them is evicted for another of this request.
        for key in keys:
            if (entry := self._unused.pop(key, None)) is not None:
                self.blocks.uncache(entry.block_ids)
        return [self._acquire(key) for key in keys]

    def share(self, entries: list[ImageEntry]) -> None:
        for entry in entries:
            assert entry.num_references > 0, "an image without references is shared"
            entry.num_references += 1

    def release(self, entries: list[ImageEntry]) -> None:
        for entry in entries:
            assert entry.num_references > 0, "an image is released twice"
            entry.num_references -= 1
            if entry.num_references > 0:
                continue
            if self._is_caching and entry.is_encoded:
                self._unused[entry.key] = entry
                self.blocks.cache(entry.block_ids)
            else:
                del self._entries[entry.key]
                self.blocks.free(entry.block_ids)

    def snapshot(self) -> PoolSnapshot:
        return replace(
            self.blocks.snapshot(),
            num_keys=len(self._entries),
            num_hits=self.num_hits,
            num_misses=self.num_misses,
            num_evictions=self.num_evictions,
        )

    def check(self) -> None:
        self.blocks.check()
        owned = [block_id for entry in self._entries.values() for block_id in entry.block_ids]
        assert len(set(owned)) == len(owned), "two images own the same block"
        assert len(owned) == self.blocks.num_total - self.blocks.num_free, "a block has no owner"
        for key, entry in self._entries.items():
            assert (entry.num_references == 0) == (key in self._unused), "a reference is miscounted"
        cached = sum(len(entry.block_ids) for entry in self._unused.values())
        assert cached == self.blocks.num_cached, "a cached block has no image"

    def _acquire(self, key: ImageKey) -> ImageEntry:
        entry = self._entries.get(key)
        if entry is None:
            while self.blocks.num_free < key.num_tiles:
                self._evict()
            entry = ImageEntry(key, self.blocks.allocate(key.num_tiles))
            self._entries[key] = entry
        entry.num_references += 1
        return entry

    def _evict(self) -> None:
        key, entry = self._unused.popitem(last=False)
        del self._entries[key]
        self.blocks.uncache(entry.block_ids)
        self.blocks.free(entry.block_ids)
        self.num_evictions += 1
