"""The two pools of cache blocks, by number only.

Owns which block belongs to whom: text blocks by tokens, image blocks by tiles.
Knows nothing of tensors, of what a block holds, or of when to give one up.
`free + used == total` holds after every call; `check()` proves it from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..models.batch import ImageTiles
from .errors import OutOfBlocksError


class BlockPool:
    """A fixed number of interchangeable blocks, each free or used by exactly one owner."""

    def __init__(self, num_blocks: int) -> None:
        self.num_total = num_blocks
        # A stack that hands out 0, 1, 2, ... first: neighbours in memory stay
        # neighbours in a sequence as long as nobody came between.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_used = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_total - len(self._free)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """The ids of `num_blocks` blocks, now the caller's.

        Raises OutOfBlocksError, having taken none, if fewer are free.
        """
        if num_blocks > len(self._free):
            raise OutOfBlocksError(f"{num_blocks} blocks asked for, {len(self._free)} are free")
        if num_blocks == 0:
            return []
        block_ids = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        for block_id in block_ids:
            self._is_used[block_id] = 1
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        """Give blocks back. Each must be in use: a double free is a fault of ours."""
        for block_id in reversed(block_ids):
            assert self._is_used[block_id], f"block {block_id} is freed twice"
            self._is_used[block_id] = 0
            self._free.append(block_id)

    def check(self) -> None:
        """Assert that every block is either free, once, or used. For tests and debugging."""
        assert len(set(self._free)) == len(self._free), "a block is in the free list twice"
        assert sum(self._is_used) == self.num_used, "free + used != total"
        assert not any(self._is_used[block_id] for block_id in self._free), "a free block is used"


class ImageKey(NamedTuple):
    """What makes two images the same to the cache: their owner, content and tiles.

    The tenant keeps one client from learning that another sent the same picture.
    """

    tenant: str
    content_hash: bytes
    num_tiles: int
    tile_size: int
    aspect_ratio_id: int

    @classmethod
    def of(cls, image: ImageTiles, tenant: str) -> ImageKey:
        """The key of `image` when `tenant` sends it."""
        return cls(
            tenant, image.content_hash, image.num_tiles, image.tile_size, image.aspect_ratio_id
        )


@dataclass(slots=True, eq=False)
class ImageEntry:
    """An image in the pool: its blocks, one a real tile in order, and who needs them.

    is_encoded: a step has written its keys and values into the blocks.
    """

    key: ImageKey
    image: ImageTiles
    block_ids: list[int]
    num_references: int = 0
    is_encoded: bool = False


class ImagePool:
    """Image blocks keyed by content and counted by reference.

    The same picture in several running requests is stored, and encoded, once.
    """

    def __init__(self, num_blocks: int) -> None:
        self.blocks = BlockPool(num_blocks)
        self._entries: dict[ImageKey, ImageEntry] = {}

    def can_acquire(self, keys: list[ImageKey]) -> bool:
        """True if every image of `keys` is here or there is room for it."""
        missing = {key for key in keys if key not in self._entries}
        return self.blocks.can_allocate(sum(key.num_tiles for key in missing))

    def acquire(self, keys: list[ImageKey], images: list[ImageTiles]) -> list[ImageEntry]:
        """The entries of `images`, made where they are new, one reference each taken.

        Raises OutOfBlocksError, having taken nothing, if they do not all fit.
        """
        if not self.can_acquire(keys):
            raise OutOfBlocksError(f"no room for {len(keys)} images: {self.blocks.num_free} free")
        return [self._acquire_one(key, image) for key, image in zip(keys, images, strict=True)]

    def release(self, entries: list[ImageEntry]) -> None:
        """Give back one reference to each entry; the last one frees its blocks."""
        for entry in entries:
            assert entry.num_references > 0, "an image is released twice"
            entry.num_references -= 1
            if entry.num_references == 0:
                del self._entries[entry.key]
                self.blocks.free(entry.block_ids)

    def check(self) -> None:
        """Assert that the entries own exactly the used blocks. For tests and debugging."""
        self.blocks.check()
        owned = [block_id for entry in self._entries.values() for block_id in entry.block_ids]
        assert len(set(owned)) == len(owned), "two images own the same block"
        assert len(owned) == self.blocks.num_used, "a used image block has no owner"
        assert all(entry.num_references > 0 for entry in self._entries.values())

    def _acquire_one(self, key: ImageKey, image: ImageTiles) -> ImageEntry:
        entry = self._entries.get(key)
        if entry is None:
            entry = ImageEntry(key, image, self.blocks.allocate(image.num_tiles))
            self._entries[key] = entry
        entry.num_references += 1
        return entry
