"""A lookup that is kept finds what a new one would, whatever the pool did meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmserve.router.blocks import text_pool
from vlmserve.router.blocks.prefix_lookup import PrefixLookup
from vlmserve.router.blocks.text_pool import TextPool

KEYS = [bytes([number]) for number in range(6)]
OPERATIONS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=60)


@pytest.mark.parametrize("num_kept", [2, 4096])
@settings(max_examples=100)
@given(operations=OPERATIONS)
def test_it_finds_what_the_pool_finds(num_kept: int, operations: list[tuple[int, int]]) -> None:
    """0: allocate and commit; 1: return a handle; 2: share a prefix; 3: allocate without keys;
    4: ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_pool, "EVICTIONS_KEPT", num_kept)
        pool, handles = TextPool(8), list[list[int]]()
        lookup = PrefixLookup(pool)
        for operation, number in operations:
            if operation in (0, 3) and pool.can_allocate(number):
                handles.append(pool.allocate(number))
                for block_id, key in zip(handles[-1], KEYS, strict=False):
                    if operation == 0:
                        pool.commit(block_id, key)
            elif operation == 1 and handles:
                pool.free(handles.pop(number % len(handles)))
            elif operation == 2:
                handles.append(pool.find(KEYS[:number]))
                pool.share(handles[-1])
            elif operation == 4:
                found = pool.find(KEYS[:5])
                assert lookup.find(KEYS, 5) == found
                for count in (number, len(found)):
                    cached = [one for one in found[:count] if pool.num_references(one) == 0]
                    assert lookup.num_unused(count) == len(cached)


def test_it_reads_only_what_the_pool_got_or_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = TextPool(8)
    keys, read = KEYS, list[bytes]()
    find = pool.find
    monkeypatch.setattr(pool, "find", lambda asked: read.extend(asked) or find(asked))
    handle = pool.allocate(5)
    for block_id, key in zip(handle[:3], keys, strict=False):
        pool.commit(block_id, key)
    lookup = PrefixLookup(pool)
    assert lookup.find(keys, 5) == handle[:3]
    assert read == keys[:4]
    read.clear()
    assert lookup.find(keys, 5) == handle[:3]
    assert read == keys[3:4]
    read.clear()
    pool.commit(handle[3], keys[3])
    assert lookup.find(keys, 5) == handle[:4]
    assert read == keys[3:5]
    read.clear()
    pool.free(handle)
    pool.allocate(5)  # the fourth block's, the last one of the prefix, is taken
    assert lookup.find(keys, 5) == handle[:3]
    assert read == keys[3:4]
