"""Which blocks of both pools each running sequence holds.

Owns the two pools and every move of blocks: what the prefix cache has of a sequence,
whether there is room to start or to grow, sharing when answers fork, and giving all
back. Knows nothing of queues, of budgets or of who runs when.
"""

from __future__ import annotations

from collections import Counter

from ...models.batch import BlockCopy, PoolSizes
from ..blocks.block_pool import ImagePool
from ..blocks.text_pool import TextPool
from .sequence import Sequence


class BlockManager:
    """Holds and gives up the blocks of sequences. The caches keep what is given up."""

    def __init__(self, sizes: PoolSizes, *, prefix_cache: bool, image_cache: bool) -> None:
        self.text_pool = TextPool(sizes.num_text_blocks)
        self.image_pool = ImagePool(sizes.num_image_blocks, image_cache)
        self.num_prefix_tokens_queried = 0
        self.num_prefix_tokens_hit = 0
        self._block_size = sizes.block_size
        self._prefix_cache = prefix_cache

    def num_blocks(self, num_tokens: int) -> int:
        """How many text blocks hold so many tokens."""
        return -(-num_tokens // self._block_size)

    # Starting

    def cached_blocks(self, sequence: Sequence, max_num_images: int) -> list[int]:
        """The blocks that are here of the beginning of `sequence`, as far as it may use them.

        Cut where the first token behind them sees more images that are not here than
        the `max_num_images` that a step may encode: that token could never be computed.
        """
        if not self._prefix_cache:
            return []
        num_whole = sequence.num_reusable_tokens // self._block_size
        found = self.text_pool.find(sequence.full_block_keys(self._block_size)[:num_whole])
        return found[: self._num_usable(sequence, len(found), max_num_images)]

    def _num_usable(self, sequence: Sequence, num_found: int, max_num_images: int) -> int:
        """How many of the blocks that were found may be used: see `cached_blocks`."""
        pairs = zip(sequence.image_keys, sequence.request.spans, strict=True)
        missing = [(key, span) for key, span in pairs if not self.image_pool.has_encoded(key)]
        while num_found > 0:
            position = num_found * self._block_size
            due = [(key, span) for key, span in missing if span.covers(position)]
            if len({key for key, _ in due}) <= max_num_images:
                break
            # Behind every block from the last one's start on all of these are seen.
            num_found = (max(span.start for _, span in due) - 1) // self._block_size
        return max(num_found, 0)

    def can_start(self, sequence: Sequence, shared: list[int], num_spare: int) -> bool:
        """True if `sequence` can start now, behind the `shared` blocks that are here of it.

        num_spare: text blocks that must be left over.
        """
        num_blocks = self.num_blocks(sequence.num_tokens) - len(shared) + num_spare
        return self.text_pool.can_share_and_allocate(
            shared, num_blocks
        ) and self.image_pool.can_acquire(sequence.image_keys)

    def start(self, sequence: Sequence, shared: list[int]) -> None:
        """Give `sequence` the blocks of all its known tokens and of its images."""
        self.text_pool.share(shared)
        num_blocks = self.num_blocks(sequence.num_tokens) - len(shared)
        sequence.block_ids = shared + self.text_pool.allocate(num_blocks)
        sequence.num_kept_blocks = len(shared)
        sequence.num_computed_tokens = len(shared) * self._block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_prefix_tokens_queried += sequence.num_tokens
            self.num_prefix_tokens_hit += sequence.num_cached_tokens
            self.image_pool.count_lookups(sequence.image_keys)
        sequence.images = self.image_pool.acquire(sequence.image_keys, sequence.request.images)

    # Forking

    def can_fork(self, num_spare: int) -> bool:
        """True if one more answer to a computed prompt can start, `num_spare` blocks left over."""
        return self.text_pool.can_allocate(1 + num_spare)

    def fork(self, leader: Sequence, follower: Sequence) -> BlockCopy | None:
        """Share what lies before the prompt's last token; the copy due of the block that it is in.

        None where that token begins a block of its own.
        """
        last = len(follower.request.prompt_token_ids) - 1
        num_shared, num_copied = divmod(last, self._block_size)
        shared = leader.block_ids[:num_shared]
        self.text_pool.share(shared)
        follower.block_ids = shared + self.text_pool.allocate(1)
        follower.num_kept_blocks = min(num_shared, leader.num_kept_blocks)
        follower.block_keys = leader.block_keys[:num_shared]
        follower.num_computed_tokens = last
        self.image_pool.share(leader.images)
        follower.images = list(leader.images)
        if not num_copied:
            return None
        return BlockCopy(leader.block_ids[num_shared], follower.block_ids[-1])

    # Running

    def can_grow(self, sequence: Sequence) -> bool:
        """True if there is room for the newest token of `sequence`."""
        return self.text_pool.can_allocate(self._num_missing(sequence))

    def grow(self, sequence: Sequence) -> None:
        """Cover the newest token of `sequence` with a block."""
        sequence.block_ids += self.text_pool.allocate(self._num_missing(sequence))

    def grow_ahead(self, sequence: Sequence) -> bool:
        """Cover the token behind the newest one too; False if no block is free for it."""
        if self.num_blocks(sequence.num_tokens + 1) > len(sequence.block_ids):
            if self.text_pool.num_free == 0:
                return False
            sequence.block_ids += self.text_pool.allocate(1)
        return True

    def _num_missing(self, sequence: Sequence) -> int:
        return self.num_blocks(sequence.num_tokens) - len(sequence.block_ids)

    def keep(self, sequence: Sequence) -> None:
        """Let the blocks that `sequence` has filled be found by others."""
        num_full = sequence.num_computed_tokens // self._block_size
        if num_full == sequence.num_kept_blocks or not self._prefix_cache:
            return
        keys = sequence.full_block_keys(self._block_size)
        for index in range(sequence.num_kept_blocks, num_full):
            self.text_pool.keep(sequence.block_ids[index], keys[index])
        sequence.num_kept_blocks = num_full

    def release(self, sequence: Sequence) -> None:
        """Give up all blocks of `sequence`."""
        self.text_pool.free(sequence.block_ids)
        self.image_pool.release(sequence.images)
        sequence.block_ids, sequence.images = [], []

    def check(self, running: list[Sequence]) -> None:
        """Assert that blocks are held by `running` alone. For tests and debugging."""
        self.text_pool.check()
        self.image_pool.check()
        owners = Counter(block_id for one in running for block_id in one.block_ids)
        assert len(owners) == self.text_pool.num_used, "a used text block has no owner"
        for block_id, num_owners in owners.items():
            assert num_owners == self.text_pool.num_references(block_id), "a lost reference"
        for one in running:
            unfilled = one.block_ids[one.num_computed_tokens // self._block_size :]
            assert all(owners[block_id] == 1 for block_id in unfilled), "a shared block is written"
