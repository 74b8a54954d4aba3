"""The pools against their contract: complete, and true after any series of operations."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_runner import fake_image

from vlmserve.router.blocks.block_pool import BlockPool
from vlmserve.router.blocks.contract import BlockStates, Checked, ImageBlocks, TextBlocks
from vlmserve.router.blocks.image_pool import ImageEntry, ImageKey, ImagePool
from vlmserve.router.blocks.text_pool import TextPool

# Public methods beside the contract: counters and the debug mode, which change no block.
EXTRA = {
    BlockPool: {"record_freed", "take_freed"},
    TextPool: {"evicted_since", "num_references"},
    ImagePool: {"count_lookups"},
}


def methods_of(kind: type) -> set[str]:
    return {
        name
        for one in kind.__mro__[:-1]
        for name, value in vars(one).items()
        if callable(value) and not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("pool", "contract"),
    [(BlockPool, BlockStates), (TextPool, TextBlocks), (ImagePool, ImageBlocks)],
)
def test_every_method_that_changes_a_pool_is_in_its_contract(pool, contract):
    assert issubclass(pool, contract)
    assert issubclass(contract, Checked)
    assert methods_of(pool) - EXTRA[pool] == methods_of(contract)
    assert all(getattr(contract, name).__doc__ for name in methods_of(contract))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=40))
def test_text_handles_and_the_pool_agree_after_any_operations(operations):
    """0: allocate and commit; 1: share a handle; 2: return a handle; 3: find and share a prefix."""
    pool, handles = TextPool(8), list[list[int]]()
    keys = [bytes([number]) for number in range(6)]
    for operation, number in operations:
        if operation == 0 and pool.can_allocate(number):
            block_ids = pool.allocate(number)
            handles.append(block_ids)
            for block_id, key in zip(block_ids, keys, strict=False):
                pool.commit(block_id, key)
        elif operation == 1 and handles:
            pool.share(handles[number % len(handles)])
            handles.append(handles[number % len(handles)])
        elif operation == 2 and handles:
            pool.free(handles.pop(number % len(handles)))
        elif operation == 3:
            found = pool.find(keys[:number])
            pool.share(found)
            handles.append(found)
        pool.check()
        references = Counter(block_id for handle in handles for block_id in handle)
        counts = pool.snapshot()
        assert counts.used == len(references)
        assert counts.free + counts.cached + counts.used == counts.total == 8
        assert all(pool.num_references(block_id) == references[block_id] for block_id in range(8))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=40))
def test_image_handles_and_the_pool_agree_after_any_operations(operations):
    """0: acquire an image, and encode it if its number is even; 1: share; 2: release."""
    pool, handles = ImagePool(6), list[ImageEntry]()
    for operation, number in operations:
        if operation == 0:
            image = fake_image(f"p{number}", num_tiles=1 + number % 3)
            key = ImageKey.of(image, "")
            if pool.can_acquire([key]):
                (entry,) = pool.acquire([key])
                entry.is_encoded |= number % 2 == 0
                handles.append(entry)
        elif operation == 1 and handles:
            pool.share([handles[number % len(handles)]])
            handles.append(handles[number % len(handles)])
        elif operation == 2 and handles:
            pool.release([handles.pop(number % len(handles))])
        pool.check()
        counts = pool.snapshot()
        held = {block_id for entry in handles for block_id in entry.block_ids}
        assert counts.used == len(held)
        assert counts.free + counts.cached + counts.used == counts.total == 6
