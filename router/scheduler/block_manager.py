"""Which blocks of both pools each running sequence uses.

Owns the two pools and every change to a sequence's blocks: start behind a cached prefix, grow,
fork, release. Knows nothing of queues, of budgets or of the order in which sequences run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ...models.batch import BlockCopy, PoolSizes, StepBatch
from ..blocks.image_pool import ImagePool
from ..blocks.prefix_lookup import PrefixLookup
from ..blocks.text_pool import TextPool
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Lack:
    """How many blocks of both pools a sequence lacks to start."""

    num_text_blocks: int
    num_image_blocks: int

    @property
    def is_left(self) -> bool:
        return self.num_text_blocks > 0 or self.num_image_blocks > 0

    def after(self, victim: Sequence) -> Lack:
        """What is lacking once `victim` is preempted, if it shares no block."""
        # One block more: none must stay available for it.
        return Lack(
            self.num_text_blocks - len(victim.block_ids) - 1,
            self.num_image_blocks - sum(len(entry.block_ids) for entry in victim.images),
        )


NO_LACK = Lack(0, 0)


class BlockManager:
    """Allocates and releases the blocks of sequences. The pools cache what is released."""

    def __init__(self, sizes: PoolSizes, *, prefix_cache: bool, image_cache: bool) -> None:
        self.text_pool = TextPool(sizes.num_text_blocks)
        self.image_pool = ImagePool(sizes.num_image_blocks, image_cache)
        self.num_prefix_tokens_queried = 0
        self.num_prefix_tokens_hit = 0
        self._block_size = sizes.block_size
        self._prefix_cache = prefix_cache

    def num_blocks(self, num_tokens: int) -> int:
        """How many text blocks are needed for this many tokens."""
        return -(-num_tokens // self._block_size)

    # Starting

    def cached_blocks(self, sequence: Sequence, max_num_images: int) -> list[int]:
        """The cached blocks of the beginning of `sequence` that it may use.

        max_num_images: how many images a step may encode. If the first token behind the cached
        blocks sees more missing images, it could never be computed: the run is cut before them.
        """
        if not self._prefix_cache:
            return []
        num_whole = sequence.num_reusable_tokens // self._block_size
        if sequence.lookup is None:
            sequence.lookup = PrefixLookup(self.text_pool)
        found = sequence.lookup.find(sequence.full_block_keys(self._block_size), num_whole)
        num_usable = self._num_usable(sequence, len(found), max_num_images)
        return found if num_usable == len(found) else found[:num_usable]

    def _num_usable(self, sequence: Sequence, num_found: int, max_num_images: int) -> int:
        """How many of the found blocks may be used: see `cached_blocks`."""
        pairs = zip(sequence.image_keys, sequence.request.spans, strict=True)
        missing = [(key, span) for key, span in pairs if not self.image_pool.has_encoded(key)]
        while num_found > 0:
            position = num_found * self._block_size
            due = [(key, span) for key, span in missing if span.covers(position)]
            if len({key for key, _ in due}) <= max_num_images:
                break
            # Every block behind the start of the last of these images sees all of them.
            num_found = (max(span.start for _, span in due) - 1) // self._block_size
        return max(num_found, 0)

    def has_images(self, sequence: Sequence) -> bool:
        """True if all of its images are encoded."""
        return all(map(self.image_pool.has_encoded, sequence.image_keys))

    def num_uncached(self, sequence: Sequence, shared: list[int]) -> int:
        """How many known tokens of a sequence are behind its `shared` cached blocks."""
        return sequence.num_tokens - len(shared) * self._block_size

    def can_start(self, sequence: Sequence, shared: list[int], num_spare: int) -> bool:
        """True if `sequence` can start now, behind its `shared` cached blocks.

        num_spare: text blocks that must stay available.
        """
        return not self.lack(sequence, shared, num_spare).is_left

    def lack(self, sequence: Sequence, shared: list[int], num_spare: int) -> Lack:
        """What `sequence` lacks to start; see `can_start`."""
        num_blocks = self.num_blocks(sequence.num_tokens) - len(shared) + num_spare
        num_unused = 0 if sequence.lookup is None else sequence.lookup.num_unused(len(shared))
        return Lack(
            self.text_pool.num_lacking(num_blocks, num_unused),
            self.image_pool.num_lacking(sequence.image_keys),
        )

    def start(self, sequence: Sequence, shared: list[int]) -> None:
        """Allocate blocks for all known tokens of `sequence` and for its images."""
        sequence.lookup = None
        self.text_pool.share(shared)
        num_blocks = self.num_blocks(sequence.num_tokens) - len(shared)
        sequence.block_ids = shared + self.text_pool.allocate(num_blocks)
        sequence.num_committed_blocks = len(shared)
        sequence.num_computed_tokens = len(shared) * self._block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_prefix_tokens_queried += sequence.num_tokens
            self.num_prefix_tokens_hit += sequence.num_cached_tokens
            self.image_pool.count_lookups(sequence.image_keys)
        sequence.images = self.image_pool.acquire(sequence.image_keys)
        if sequence.ran_at is None:
            sequence.known_vision_s = sequence.images_vision_s

    # Forking

    def can_fork(self, num_spare: int) -> bool:
        """True if one more answer to a computed prompt can start; num_spare as in `can_start`."""
        return self.text_pool.can_allocate(1 + num_spare)

    def fork(self, leader: Sequence, follower: Sequence) -> BlockCopy | None:
        """Share the full blocks before the prompt's last token; allocate a block for that token.

        Returns the copy of the leader's block that is due, or None if the token begins a block.
        """
        last = len(follower.request.prompt_token_ids) - 1
        num_shared, num_copied = divmod(last, self._block_size)
        shared = leader.block_ids[:num_shared]
        self.text_pool.share(shared)
        follower.block_ids = shared + self.text_pool.allocate(1)
        follower.num_committed_blocks = min(num_shared, leader.num_committed_blocks)
        follower.block_keys = leader.block_keys[:num_shared]
        follower.num_computed_tokens = last
        self.image_pool.share(leader.images)
        follower.images = list(leader.images)
        if not num_copied:
            return None
        return BlockCopy(leader.block_ids[num_shared], follower.block_ids[-1])

    # Running

    def can_grow(self, sequence: Sequence) -> bool:
        """True if a block for the newest token of `sequence` is available, or it has one."""
        return self.text_pool.can_allocate(self._num_missing(sequence))

    def grow(self, sequence: Sequence) -> None:
        """Allocate a block for the newest token of `sequence` if it needs one."""
        sequence.block_ids += self.text_pool.allocate(self._num_missing(sequence))

    def grow_ahead(self, sequence: Sequence) -> bool:
        """As `grow`, for the next token. Never evicts; returns False if no block is free."""
        if self.num_blocks(sequence.num_tokens + 1) > len(sequence.block_ids):
            if self.text_pool.blocks.num_free == 0:
                return False
            sequence.block_ids += self.text_pool.allocate(1)
        return True

    def grow_for_drafts(self, sequence: Sequence, num_drafts: int, num_spare: int) -> int:
        """Allocate blocks for drafts behind the newest token; returns for how many there is room.

        num_spare: text blocks that must stay available. Blocks of drafts that turn out wrong stay
        with the sequence, for its next tokens.
        """
        lack = self.num_blocks(sequence.num_tokens + num_drafts) - len(sequence.block_ids)
        while lack > 0 and not self.text_pool.can_allocate(lack + num_spare):
            lack -= 1
        if lack > 0:
            sequence.block_ids += self.text_pool.allocate(lack)
        num_places = len(sequence.block_ids) * self._block_size
        return min(num_drafts, num_places - sequence.num_tokens)

    def _num_missing(self, sequence: Sequence) -> int:
        num_blocks = self.num_blocks(sequence.num_tokens)
        return max(0, num_blocks - len(sequence.block_ids))  # drafts may have left blocks

    def commit(self, sequence: Sequence) -> None:
        """Let other sequences find the blocks that `sequence` has filled."""
        num_full = sequence.num_computed_tokens // self._block_size
        if num_full == sequence.num_committed_blocks or not self._prefix_cache:
            return
        keys = sequence.full_block_keys(self._block_size)
        for index in range(sequence.num_committed_blocks, num_full):
            self.text_pool.commit(sequence.block_ids[index], keys[index])
        sequence.num_committed_blocks = num_full

    def release(self, sequence: Sequence) -> None:
        """Release all blocks of `sequence`."""
        self.text_pool.free(sequence.block_ids)
        self.image_pool.release(sequence.images)
        sequence.block_ids, sequence.images = [], []

    # Debugging

    def record_freed(self) -> None:
        """From now on collect freed blocks of both pools, for `poison_freed`."""
        self.text_pool.blocks.record_freed()
        self.image_pool.blocks.record_freed()

    def poison_freed(self, batch: StepBatch) -> None:
        """Let the step overwrite the blocks that were freed since the last one."""
        batch.freed_image_blocks = self.image_pool.blocks.take_freed()
        # The step writes the targets of copies before it poisons.
        targets = {copy.target for copy in batch.copies}
        freed = self.text_pool.blocks.take_freed()
        batch.freed_text_blocks = [block_id for block_id in freed if block_id not in targets]

    def check(self, running: list[Sequence]) -> None:
        """Assert both pools' invariants, and that exactly the `running` sequences use blocks."""
        self.text_pool.check()
        self.image_pool.check()
        owners = Counter(block_id for sequence in running for block_id in sequence.block_ids)
        assert len(owners) == self.text_pool.blocks.num_used, "a used text block has no owner"
        for block_id, num_owners in owners.items():
            assert num_owners == self.text_pool.num_references(block_id), "a lost reference"
        for sequence in running:
            unfilled = sequence.block_ids[sequence.num_computed_tokens // self._block_size :]
            assert all(owners[block_id] == 1 for block_id in unfilled), "a shared block is written"
