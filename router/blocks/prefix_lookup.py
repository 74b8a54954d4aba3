"""What a text pool has cached of one prompt's beginning, looked up once and kept up to date.

Owns the result while a request waits for blocks. Each step asks again, and pays only for what the
pool evicted or got since then. Knows nothing of requests or of images.
"""

from __future__ import annotations

from .text_pool import TextPool


class PrefixLookup:
    """The longest run of a prompt's keys that a pool has, from the first: `TextPool.find`, kept."""

    __slots__ = ("_block_ids", "_known", "_num_evictions", "_places", "_pool", "_unused")

    def __init__(self, pool: TextPool) -> None:
        self._pool = pool
        self._block_ids: list[int] = []
        self._places: dict[int, int] = {}
        self._num_evictions = pool.num_evictions
        # What `num_unused` was computed for last.
        self._known: tuple[int, int] | None = None
        self._unused = 0

    def find(self, keys: list[bytes], num_keys: int) -> list[int]:
        """The blocks of the first num_keys keys. The keys are the same in every call.

        As a result of `TextPool.find` it is not a handle; and the next call may change it.
        """
        evicted = self._pool.evicted_since(self._num_evictions)
        self._num_evictions = self._pool.num_evictions
        # If they are not known, the first block counts as evicted too.
        self._forget(self._block_ids[:1] if evicted is None else evicted)
        found = self._block_ids
        while len(found) < num_keys:
            more = self._pool.find(keys[len(found) : len(found) + 1])
            if not more:
                break
            self._places[more[0]] = len(found)
            found += more
            self._known = None
        return found

    def num_unused(self, num_blocks: int) -> int:
        """How many of the first num_blocks found blocks are cached: to share them uses them up."""
        known = num_blocks, self._pool.num_moves
        if self._known != known:
            found = self._block_ids[:num_blocks]
            self._unused = sum(self._pool.num_references(block_id) == 0 for block_id in found)
            self._known = known
        return self._unused

    def _forget(self, evicted: list[int]) -> None:
        """Cut the run before the first evicted block."""
        for block_id in evicted:
            place = self._places.get(block_id)
            if place is not None:
                for lost in self._block_ids[place:]:
                    del self._places[lost]
                del self._block_ids[place:]
                self._known = None
