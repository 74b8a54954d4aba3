"""Text blocks, shared by sequences that begin alike.

Owns which full block holds what (by its key) and how many sequences need it. Knows
nothing of how keys are made (`prefix_keys.py`) or of what a block holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from ..errors import OutOfBlocksError
from .block_pool import BlockPool


class TextPool(BlockPool):
    """Blocks counted by reference; those with a key outlive their last owner.

    A block that is not full yet is its one owner's; a full one is never written again
    and may have several. Unreferenced blocks with a key are evicted when there is need of
    room, least recently used first; a sequence gives its blocks back from its tail,
    so that a shared prefix is evicted last.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._num_references = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= self.num_available

    def can_share_and_allocate(self, shared: list[int], num_blocks: int) -> bool:
        """True if `num_blocks` can be allocated after `shared` are shared."""
        num_unused = sum(self._num_references[block_id] == 0 for block_id in shared)
        return num_unused + num_blocks <= self.num_available

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of `keys`, from the first, that is here."""
        found: list[int] = []
        for key in keys:
            block_id = self._block_of.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def share(self, block_ids: list[int]) -> None:
        """Take one reference to each of these blocks, found just now or another owner's."""
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                del self._unused[block_id]
                self.unpark([block_id])
            self._num_references[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """The ids of `num_blocks` blocks without a key, now the caller's alone.

        Raises OutOfBlocksError, having taken and evicted none, if fewer are available.
        """
        if num_blocks > self.num_available:
            raise OutOfBlocksError(
                f"{num_blocks} blocks asked for, {self.num_available} are available"
            )
        while self.num_free < num_blocks:
            self._evict_one()
        block_ids = super().allocate(num_blocks)
        for block_id in block_ids:
            self._num_references[block_id] = 1
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        """Give back one reference to each block of a sequence, given in its order."""
        # Tail first, so that the prefix, which others may share, is evicted last.
        for block_id in reversed(block_ids):
            assert self._num_references[block_id] > 0, f"block {block_id} is freed twice"
            self._num_references[block_id] -= 1
            if self._num_references[block_id] > 0:
                continue
            if block_id in self._key_of:
                self._unused[block_id] = None
                self.park([block_id])
            else:
                super().free([block_id])

    def keep(self, block_id: int, key: bytes) -> None:
        """Let a used block that is computed to its end be found by `key`.

        Where another block has the key already, this one stays its owner's alone.
        """
        if key not in self._block_of:
            self._block_of[key] = block_id
            self._key_of[block_id] = key

    def num_references(self, block_id: int) -> int:
        """How many sequences need a block."""
        return self._num_references[block_id]

    def check(self) -> None:
        """Assert that references, keys and states agree. For tests and debugging."""
        super().check()
        assert sum(count > 0 for count in self._num_references) == self.num_used
        assert self._block_of == {key: block_id for block_id, key in self._key_of.items()}
        unused = {one for one in self._key_of if self._num_references[one] == 0}
        assert unused == set(self._unused), "a block is cached without a key or while it is used"
        assert len(unused) == self.num_cached

    def _evict_one(self) -> None:
        block_id, _ = self._unused.popitem(last=False)
        del self._block_of[self._key_of.pop(block_id)]
        self.unpark([block_id])
        super().free([block_id])
