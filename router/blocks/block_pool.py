"""Numbered cache blocks, each free, used or cached. Owns their states; `contract.py` has the rules.

Both pools are built on it. Knows nothing of references, keys or tensors.
"""

from __future__ import annotations

from ..errors import OutOfBlocksError
from .contract import BlockStates, PoolSnapshot

_FREE, _USED, _CACHED = 0, 1, 2


class BlockPool(BlockStates):
    """A fixed number of interchangeable blocks. Its owner decides which cached blocks to evict."""

    def __init__(self, num_blocks: int) -> None:
        self.num_total = num_blocks
        self.num_cached = 0
        # A stack that returns 0, 1, 2, ... first, so that a sequence's blocks are usually
        # neighbours in memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._states = bytearray(num_blocks)
        self._just_freed: set[int] | None = None

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now, if necessary after eviction."""
        return len(self._free) + self.num_cached

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_available

    def allocate(self, num_blocks: int) -> list[int]:
        if num_blocks > len(self._free):
            raise OutOfBlocksError(f"{num_blocks} blocks requested, {len(self._free)} are free")
        if num_blocks == 0:
            return []
        block_ids = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        for block_id in block_ids:
            self._states[block_id] = _USED
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        for block_id in reversed(block_ids):
            assert self._states[block_id] == _USED, f"block {block_id} is freed twice"
            self._states[block_id] = _FREE
            self._free.append(block_id)
        if self._just_freed is not None:
            self._just_freed.update(block_ids)

    def record_freed(self) -> None:
        """From now on collect the ids of freed blocks for `take_freed`."""
        self._just_freed = set()

    def take_freed(self) -> list[int]:
        """The blocks freed since the last call. They may be used again by now."""
        if not self._just_freed:
            return []
        freed, self._just_freed = sorted(self._just_freed), set()
        return freed

    def cache(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            assert self._states[block_id] == _USED, f"block {block_id} is cached but not used"
            self._states[block_id] = _CACHED
        self.num_cached += len(block_ids)

    def uncache(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            assert self._states[block_id] == _CACHED, f"block {block_id} is not cached"
            self._states[block_id] = _USED
        self.num_cached -= len(block_ids)

    def snapshot(self) -> PoolSnapshot:
        return PoolSnapshot(self.num_total, self.num_free, self.num_cached, self.num_used)

    def check(self) -> None:
        assert len(set(self._free)) == len(self._free), "a block is in the free list twice"
        assert self._states.count(_USED) == self.num_used, "free + cached + used != total"
        assert self._states.count(_CACHED) == self.num_cached, "the cached blocks are miscounted"
        free = (self._states[block_id] for block_id in self._free)
        assert all(state == _FREE for state in free), "a free block is used"
