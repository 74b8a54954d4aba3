"""The two pools of cache blocks, by number only.

Owns which block belongs to whom: text blocks by tokens, image blocks by tiles, and
which blocks nobody needs but somebody may need again. Knows nothing of tensors or
text, nor of when to give a running sequence's blocks up.
`free + cached + used == total` holds after every call; `check()` proves it from scratch.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from ...models.batch import ImageTiles
from ..errors import OutOfBlocksError

_FREE, _USED, _CACHED = 0, 1, 2


class BlockPool:
    """A fixed number of interchangeable blocks, each free, used or cached.

    A cached block is needed by nobody, but what it holds is kept until there is
    need of room. Whoever parks blocks decides which to evict.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_total = num_blocks
        self.num_cached = 0
        # A stack that hands out 0, 1, 2, ... first: neighbours in memory stay
        # neighbours in a sequence as long as nobody came between.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._states = bytearray(num_blocks)
        self._just_freed: set[int] | None = None

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that can be had at once, if need be by evicting."""
        return len(self._free) + self.num_cached

    @property
    def num_used(self) -> int:
        return self.num_total - len(self._free) - self.num_cached

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
            self._states[block_id] = _USED
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        """Give blocks back. Each must be in use: a double free is a fault of ours."""
        for block_id in reversed(block_ids):
            assert self._states[block_id] == _USED, f"block {block_id} is freed twice"
            self._states[block_id] = _FREE
            self._free.append(block_id)
        if self._just_freed is not None:
            self._just_freed.update(block_ids)

    def note_freed(self) -> None:
        """From now on keep the ids of freed blocks for `take_freed`."""
        self._just_freed = set()

    def take_freed(self) -> list[int]:
        """The blocks that were freed since the last call, by now perhaps somebody else's."""
        if not self._just_freed:
            return []
        freed, self._just_freed = sorted(self._just_freed), set()
        return freed

    def park(self, block_ids: list[int]) -> None:
        """Used blocks become cached ones."""
        for block_id in block_ids:
            assert self._states[block_id] == _USED, f"block {block_id} is parked but not used"
            self._states[block_id] = _CACHED
        self.num_cached += len(block_ids)

    def unpark(self, block_ids: list[int]) -> None:
        """Cached blocks become the caller's again."""
        for block_id in block_ids:
            assert self._states[block_id] == _CACHED, f"block {block_id} is not cached"
            self._states[block_id] = _USED
        self.num_cached -= len(block_ids)

    def check(self) -> None:
        """Assert that every block is free, once, or cached, or used. For tests and debugging."""
        assert len(set(self._free)) == len(self._free), "a block is in the free list twice"
        assert self._states.count(_USED) == self.num_used, "free + cached + used != total"
        assert self._states.count(_CACHED) == self.num_cached, "the cached blocks are miscounted"
        free = (self._states[block_id] for block_id in self._free)
        assert all(state == _FREE for state in free), "a free block is used"


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

    is_encoded: a step has written its keys and values into the blocks; until then
    num_layers of the encoder have run. image is None, to save its memory, from when
    nobody needs an encoded image.
    """

    key: ImageKey
    image: ImageTiles | None
    block_ids: list[int]
    num_references: int = 0
    is_encoded: bool = False
    num_layers: int = 0


class ImagePool:
    """Image blocks keyed by content and counted by reference.

    The same picture in several running requests is stored, and encoded, once. An
    encoded picture that nobody needs stays until others need its room, least
    recently used first; one that was never encoded goes at once. is_caching False
    lets every picture go with its last reference.
    """

    def __init__(self, num_blocks: int, is_caching: bool = True) -> None:
        self.blocks = BlockPool(num_blocks)
        self.num_hits = 0
        self.num_misses = 0
        self.num_evictions = 0
        self._is_caching = is_caching
        self._entries: dict[ImageKey, ImageEntry] = {}
        self._unused: OrderedDict[ImageKey, ImageEntry] = OrderedDict()

    def can_acquire(self, keys: list[ImageKey]) -> bool:
        """True if every image of `keys` is here or room for it can be made."""
        wanted = {key for key in keys if key not in self._entries or key in self._unused}
        return sum(key.num_tiles for key in wanted) <= self.blocks.num_available

    def count_lookups(self, keys: list[ImageKey]) -> None:
        """Count each picture of a request that starts, once, as here or not."""
        for key in set(keys):
            if key in self._entries:
                self.num_hits += 1
            else:
                self.num_misses += 1

    def has_encoded(self, key: ImageKey) -> bool:
        """True if the keys and values of this image are here."""
        entry = self._entries.get(key)
        return entry is not None and entry.is_encoded

    def acquire(self, keys: list[ImageKey], images: list[ImageTiles]) -> list[ImageEntry]:
        """The entries of `images`, made where they are new, one reference each taken.

        Raises OutOfBlocksError, having taken nothing, if they do not all fit.
        """
        if not self.can_acquire(keys):
            raise OutOfBlocksError(
                f"no room for {len(keys)} images: {self.blocks.num_available} blocks are available"
            )
        # Those that are here come first, so that none of them is evicted for another.
        for key in dict.fromkeys(keys):
            self._hold(key)
        return [self._acquire_one(key, image) for key, image in zip(keys, images, strict=True)]

    def share(self, entries: list[ImageEntry]) -> None:
        """Take one more reference to each entry, which somebody holds."""
        for entry in entries:
            assert entry.num_references > 0, "an image is shared that nobody holds"
            entry.num_references += 1

    def release(self, entries: list[ImageEntry]) -> None:
        """Give back one reference to each entry; the last one caches or frees its blocks."""
        for entry in entries:
            assert entry.num_references > 0, "an image is released twice"
            entry.num_references -= 1
            if entry.num_references == 0:
                self._let_go(entry)

    def check(self) -> None:
        """Assert that the entries own exactly the blocks that are not free. For tests."""
        self.blocks.check()
        owned = [block_id for entry in self._entries.values() for block_id in entry.block_ids]
        assert len(set(owned)) == len(owned), "two images own the same block"
        assert len(owned) == self.blocks.num_total - self.blocks.num_free, "a block has no owner"
        for key, entry in self._entries.items():
            assert (entry.num_references == 0) == (key in self._unused), "a reference is miscounted"
        cached = sum(len(entry.block_ids) for entry in self._unused.values())
        assert cached == self.blocks.num_cached, "a cached block has no image"

    def _hold(self, key: ImageKey) -> None:
        """Keep from eviction what is here."""
        entry = self._unused.pop(key, None)
        if entry is not None:
            self.blocks.unpark(entry.block_ids)

    def _acquire_one(self, key: ImageKey, image: ImageTiles) -> ImageEntry:
        entry = self._entries.get(key)
        if entry is None:
            self._make_room(image.num_tiles)
            entry = ImageEntry(key, image, self.blocks.allocate(image.num_tiles))
            self._entries[key] = entry
        entry.num_references += 1
        return entry

    def _make_room(self, num_blocks: int) -> None:
        while not self.blocks.can_allocate(num_blocks):
            key, entry = self._unused.popitem(last=False)
            del self._entries[key]
            self.blocks.unpark(entry.block_ids)
            self.blocks.free(entry.block_ids)
            self.num_evictions += 1

    def _let_go(self, entry: ImageEntry) -> None:
        if self._is_caching and entry.is_encoded:
            entry.image = None
            self._unused[entry.key] = entry
            self.blocks.park(entry.block_ids)
        else:
            del self._entries[entry.key]
            self.blocks.free(entry.block_ids)
