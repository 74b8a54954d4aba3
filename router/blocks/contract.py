"""The contract of the caches: what each pool does, what it changes and which handle you need.

    models/kv_cache/paged_cache.py    router/blocks
    text tensors  [block, slot, ..]   TextPool ───┐
    image tensors [block, patch, ..]  ImagePool ──┴─ a BlockPool each: the state of every block

A pool assigns block numbers; `models/kv_cache` has a tensor row for each number and never decides.
A text block stores `block_size` tokens of every self-attention layer. An image block holds one tile
of every cross-attention layer. A block has exactly one state:

    free      holds nothing that can be found
    used      at least one handle refers to it; it is never evicted
    cached    no handle refers to it, but its key finds it; it may be evicted at any allocation

A handle is what a caller got and must return exactly once. A text handle is a list of block ids,
with one reference to each block (`allocate` or `share`, returned by `free`). An image handle is an
`ImageEntry` (`acquire` or `share`, returned by `release`). A result of `find` or `has_encoded` is
not a handle: it is valid only until the next call that may evict. Pools are not thread-safe; the
engine's event loop alone calls them. OutOfBlocksError is raised before anything changes; an
assertion error is a bug of the caller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .image_pool import ImageEntry, ImageKey


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """Block counts of a pool at one moment, and what its cache did so far.

    num_keys: how many keys find something. num_hits, num_misses: images of requests that started.
    """

    total: int
    free: int
    cached: int
    used: int
    num_keys: int = 0
    num_hits: int = 0
    num_misses: int = 0
    num_evictions: int = 0


class Checked(ABC):
    """What every pool offers to metrics and tests."""

    @abstractmethod
    def snapshot(self) -> PoolSnapshot:
        """Counts at this moment. Changes nothing."""

    @abstractmethod
    def check(self) -> None:
        """Assert the pool's invariants, computed from scratch. Changes nothing.

        Every pool: each block has one state, and free + cached + used == total.
        Text: used blocks are those with references; cached blocks are those with a key and without
        references; keys and blocks map one to one.
        Images: entries own disjoint blocks, and every block that is not free; cached blocks belong
        to the entries without references.
        """


class BlockStates(Checked):
    """Which blocks are free, used and cached. The pools below are built on it."""

    @abstractmethod
    def allocate(self, num_blocks: int) -> list[int]:
        """free -> used. Returns block ids, which the caller owns.

        Raises OutOfBlocksError if fewer blocks are free. Never evicts.
        """

    @abstractmethod
    def free(self, block_ids: list[int]) -> None:
        """used -> free. The caller must own the blocks."""

    @abstractmethod
    def cache(self, block_ids: list[int]) -> None:
        """used -> cached. The caller must own the blocks and remember what finds them."""

    @abstractmethod
    def uncache(self, block_ids: list[int]) -> None:
        """cached -> used. The caller owns the blocks again."""


class TextBlocks(Checked):
    """Text blocks with reference counts. A full block with a key is cached after its last use."""

    @abstractmethod
    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Block ids of the longest run of `keys`, from the first, that the pool has.

        Changes nothing, needs no handle and returns none: `share` the blocks before you allocate.
        """

    @abstractmethod
    def can_allocate(self, num_blocks: int, num_unused: int = 0) -> bool:
        """True if `num_blocks` can be allocated after num_unused cached blocks are shared.

        Changes nothing.
        """

    @abstractmethod
    def num_lacking(self, num_blocks: int, num_unused: int = 0) -> int:
        """How many blocks are missing for `can_allocate`; 0 if it is true. Changes nothing."""

    @abstractmethod
    def share(self, block_ids: list[int]) -> None:
        """Add one reference to each block: found just now, or in another handle.

        Cached blocks become used. The caller now holds a handle to these blocks.
        """

    @abstractmethod
    def allocate(self, num_blocks: int) -> list[int]:
        """A new handle to blocks with one reference and no key. The caller may write them.

        Evicts cached blocks, least recently used first, if too few are free.
        Raises OutOfBlocksError if fewer blocks are free or cached.
        """

    @abstractmethod
    def commit(self, block_id: int, key: bytes) -> None:
        """Register a full, computed block under `key`. The caller must hold a handle to it.

        The block must not be written from now on. Does nothing if another block has this key.
        """

    @abstractmethod
    def free(self, block_ids: list[int]) -> None:
        """Return a handle, its blocks in the sequence's order.

        Blocks without other references become cached if they have a key, else free.
        """


class ImageBlocks(Checked):
    """Image blocks by content. An encoded image is cached after its last use."""

    @abstractmethod
    def has_encoded(self, key: ImageKey) -> bool:
        """True if the pool has the image's keys and values. Changes nothing, needs no handle."""

    @abstractmethod
    def can_acquire(self, keys: list[ImageKey]) -> bool:
        """True if `acquire` would succeed for these images. Changes nothing."""

    @abstractmethod
    def num_lacking(self, keys: list[ImageKey]) -> int:
        """How many blocks are missing for `acquire`; 0 if it would succeed. Changes nothing."""

    @abstractmethod
    def acquire(self, keys: list[ImageKey]) -> list[ImageEntry]:
        """A handle to each image, in order, with one reference each.

        New images get blocks and are not encoded yet. Evicts cached images, least recently used
        first, if too few blocks are free. Raises OutOfBlocksError if the images do not all fit.
        """

    @abstractmethod
    def share(self, entries: list[ImageEntry]) -> None:
        """Add one reference to each entry. Another handle to it must exist."""

    @abstractmethod
    def release(self, entries: list[ImageEntry]) -> None:
        """Return handles. Images without other references become cached if encoded, else free."""
