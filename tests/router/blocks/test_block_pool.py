"""The two pools: nothing is lost, owned twice or freed twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_runner import fake_image

from vlmserve.router.blocks.block_pool import BlockPool
from vlmserve.router.blocks.image_pool import ImageKey, ImagePool
from vlmserve.router.errors import OutOfBlocksError


@given(st.lists(st.integers(-5, 5)))
def test_free_and_used_always_add_up_to_total(sizes):
    pool = BlockPool(12)
    held: list[list[int]] = []
    for size in sizes:
        if 0 <= size <= pool.snapshot().free:
            held.append(pool.allocate(size))
        elif held:
            pool.free(held.pop(size % len(held)))
        pool.check()
        counts = pool.snapshot()
        assert counts.free + counts.used == counts.total == 12
        owned = [block_id for block_ids in held for block_id in block_ids]
        assert len(set(owned)) == len(owned) == counts.used


def test_blocks_come_in_order_and_in_the_same_order_again():
    pool = BlockPool(4)
    block_ids = pool.allocate(3)
    assert block_ids == [0, 1, 2]
    pool.free(block_ids)
    assert pool.allocate(4) == [0, 1, 2, 3]


def test_an_allocation_that_does_not_fit_takes_nothing():
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(OutOfBlocksError, match="2 blocks requested, 1 are free"):
        pool.allocate(2)
    assert pool.snapshot().free == 1


def test_a_double_free_is_found_at_once():
    pool = BlockPool(3)
    block_ids = pool.allocate(2)
    pool.free(block_ids)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(block_ids)


def test_check_finds_a_corrupted_pool():
    pool = BlockPool(3)
    pool._free.append(pool._free[0])
    with pytest.raises(AssertionError):
        pool.check()


def acquire(pool: ImagePool, *names: str, tenant: str = ""):
    images = [fake_image(name, num_tiles=int(name[-1])) for name in names]
    return pool.acquire([ImageKey.of(image, tenant) for image in images])


def test_one_picture_has_one_entry_until_its_last_reference_goes():
    pool = ImagePool(4)
    (first,) = acquire(pool, "p3")
    (second,) = acquire(pool, "p3")
    assert first is second
    assert pool.snapshot().used == 3
    pool.release([first])
    pool.check()
    assert pool.snapshot().used == 3
    pool.release([second])
    pool.check()
    assert pool.snapshot().used == 0
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([second])


def test_without_caching_a_picture_must_be_encoded_again_after_its_release():
    pool = ImagePool(4, is_caching=False)
    (entry,) = acquire(pool, "p3")
    entry.is_encoded = True
    pool.release([entry])
    assert not acquire(pool, "p3")[0].is_encoded


def test_images_that_do_not_all_fit_take_nothing():
    pool = ImagePool(4)
    held = acquire(pool, "p3")
    with pytest.raises(OutOfBlocksError):
        acquire(pool, "q1", "r1")
    pool.check()
    assert pool.snapshot().used == 3
    assert held[0].num_references == 1
    assert len(acquire(pool, "p3", "q1", "q1")) == 3


def test_other_tenant_other_content_other_tiles_are_other_keys():
    pool = ImagePool(16)
    entries = acquire(pool, "p2", "q2", "p3") + acquire(pool, "p2", tenant="t")
    assert len({id(entry) for entry in entries}) == 4
    assert pool.snapshot().used == 9
