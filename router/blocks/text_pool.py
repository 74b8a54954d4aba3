"""Text blocks, shared by sequences with the same beginning.

Owns which full block has which key, and how many sequences refer to it; `contract.py` has the
rules. Knows nothing of how keys are made (`prefix_keys.py`) or of tensors.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from ..errors import OutOfBlocksError
from .block_pool import BlockPool
from .contract import PoolSnapshot, TextBlocks

# How many evictions are remembered: more than one step makes, with blocks of a usual size.
EVICTIONS_KEPT = 4096


class TextPool(TextBlocks):
    """A block that is not full has one owner, which writes it. A full block is never written again.

    A sequence frees its blocks from its tail, so that a shared prefix is evicted last.
    num_moves: how often a block became cached, or used again.
    """

    def __init__(self, num_blocks: int) -> None:
        self.blocks = BlockPool(num_blocks)
        self.num_evictions = 0
        self.num_moves = 0
        self._evicted: deque[int] = deque(maxlen=EVICTIONS_KEPT)
        self._num_references = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    def find(self, keys: Iterable[bytes]) -> list[int]:
        found: list[int] = []
        for key in keys:
            block_id = self._block_of.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def evicted_since(self, num_evictions: int) -> list[int] | None:
        """The blocks evicted since there were so many evictions; None if they are not known."""
        num_new = self.num_evictions - num_evictions
        if num_new > len(self._evicted):
            return None
        return list(islice(reversed(self._evicted), num_new))

    def can_allocate(self, num_blocks: int, num_unused: int = 0) -> bool:
        return self.num_lacking(num_blocks, num_unused) == 0

    def num_lacking(self, num_blocks: int, num_unused: int = 0) -> int:
        return max(0, num_unused + num_blocks - self.blocks.num_available)

    def share(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                del self._unused[block_id]
                self.blocks.uncache([block_id])
                self.num_moves += 1
            self._num_references[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        if num_blocks > self.blocks.num_available:
            raise OutOfBlocksError(
                f"{num_blocks} blocks requested, {self.blocks.num_available} are available"
            )
        while self.blocks.num_free < num_blocks:
            self._evict()
        block_ids = self.blocks.allocate(num_blocks)
        for block_id in block_ids:
            self._num_references[block_id] = 1
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        # Tail first, so that the prefix, which others may share, is evicted last.
        for block_id in reversed(block_ids):
            assert self._num_references[block_id] > 0, f"block {block_id} is freed twice"
            self._num_references[block_id] -= 1
            if self._num_references[block_id] > 0:
                continue
            if block_id in self._key_of:
                self._unused[block_id] = None
                self.blocks.cache([block_id])
                self.num_moves += 1
            else:
                self.blocks.free([block_id])

    def commit(self, block_id: int, key: bytes) -> None:
        if key not in self._block_of:
            self._block_of[key] = block_id
            self._key_of[block_id] = key

    def num_references(self, block_id: int) -> int:
        """How many handles include this block."""
        return self._num_references[block_id]

    def snapshot(self) -> PoolSnapshot:
        return replace(
            self.blocks.snapshot(), num_keys=len(self._block_of), num_evictions=self.num_evictions
        )

    def check(self) -> None:
        self.blocks.check()
        num_referenced = sum(count > 0 for count in self._num_references)
        assert num_referenced == self.blocks.num_used, "a used block has no reference"
        assert self._block_of == {key: block_id for block_id, key in self._key_of.items()}
        unused = {block_id for block_id in self._key_of if self._num_references[block_id] == 0}
        assert unused == set(self._unused), "a block is cached without a key or while it is used"
        assert len(unused) == self.blocks.num_cached, "a cached block has no key"

    def _evict(self) -> None:
        block_id, _ = self._unused.popitem(last=False)
        del self._block_of[self._key_of.pop(block_id)]
        self.blocks.uncache([block_id])
        self.blocks.free([block_id])
        self._evicted.append(block_id)
        self.num_evictions += 1
