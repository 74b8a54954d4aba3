"""Stored responses: whose they are, how long and how many bytes are kept."""

import asyncio

import pytest

from vlmserve.server.api.response_store import (
    IN_MEMORY,
    ResponseStore,
    StoredResponse,
    StoreError,
)


class Clock:
    def __init__(self):
        self.now = 1_000.0

    def __call__(self):
        return self.now


def response(number, previous=None, num_bytes=100):
    return StoredResponse(f"resp_{number}", previous, b"[]", b"x" * (num_bytes - 2))


def store_of(file=IN_MEMORY, max_bytes=10_000, ttl_s=60.0, clock=None):
    return ResponseStore(file, max_bytes, ttl_s, clock or Clock())


def test_a_response_is_its_owner_s_alone():
    async def scenario():
        store = store_of()
        await store.put("a", response(1))
        assert await store.get("a", "resp_1") == response(1)
        assert await store.get("b", "resp_1") is None
        assert await store.chain("b", "resp_1") is None
        assert not await store.delete("b", "resp_1")
        assert await store.delete("a", "resp_1")
        assert await store.get("a", "resp_1") is None

    asyncio.run(scenario())


def test_a_chain_is_whole_or_missing():
    async def scenario():
        store = store_of()
        await store.put("a", response(1))
        await store.put("a", response(2, "resp_1"))
        await store.put("a", response(3, "resp_2"))
        chain = await store.chain("a", "resp_3")
        assert [one.id for one in chain] == ["resp_1", "resp_2", "resp_3"]
        await store.delete("a", "resp_2")
        assert await store.chain("a", "resp_3") is None

    asyncio.run(scenario())


def test_a_response_is_forgotten_after_its_time():
    async def scenario():
        clock = Clock()
        store = store_of(clock=clock)
        await store.put("a", response(1))
        clock.now += 59
        assert await store.get("a", "resp_1") is not None
        clock.now += 1
        assert await store.get("a", "resp_1") is None
        await store.put("a", response(2))
        assert await store.num_bytes() == 100

    asyncio.run(scenario())


def test_the_owner_who_keeps_the_most_loses_the_oldest():
    async def scenario():
        store = store_of(max_bytes=1_000)
        await store.put("small", response(0))
        for number in range(1, 20):
            assert await store.put("large", response(number))
        assert await store.num_bytes() == 1_000
        assert await store.get("small", "resp_0") is not None
        assert await store.get("large", "resp_1") is None
        assert await store.get("large", "resp_19") is not None

    asyncio.run(scenario())


def test_a_response_larger_than_the_store_is_not_kept_and_evicts_nothing():
    async def scenario():
        store = store_of(max_bytes=1_000)
        await store.put("a", response(1))
        assert not await store.put("a", response(2, num_bytes=1_001))
        assert await store.get("a", "resp_1") is not None

    asyncio.run(scenario())


def test_a_file_is_shared_by_workers_and_outlives_them(tmp_path):
    async def scenario():
        first, second = store_of(tmp_path / "db"), store_of(tmp_path / "db")
        await first.put("a", response(1))
        assert await second.get("a", "resp_1") == response(1)
        first.close()
        second.close()
        assert await store_of(tmp_path / "db").get("a", "resp_1") == response(1)

    asyncio.run(scenario())


def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path):
    with pytest.raises(StoreError, match="cannot be used") as caught:
        store_of(tmp_path / "missing" / "db")
    assert "\n" not in str(caught.value)
    (tmp_path / "text").write_text("no database at all, but a text " * 99)
    with pytest.raises(StoreError, match="cannot be used"):
        store_of(tmp_path / "text")
