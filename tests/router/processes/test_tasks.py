"""Running tasks together: results in order, the first failure, and nothing that stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import pytest
from support.collections_off import without_collections

from vlmserve.router.processes.tasks import raise_stored, run_together


class Payload:
    """Stands for the megabytes in a failed request's frames."""

    alive = 0

    def __init__(self) -> None:
        Payload.alive += 1

    def __del__(self) -> None:
        Payload.alive -= 1


async def value(number: int) -> int:
    await asyncio.sleep(0)
    return number


async def fail(text: str) -> int:
    payload = Payload()
    await asyncio.sleep(0)
    assert payload
    raise ValueError(text)


async def forever(ended: list[str]) -> int:
    payload = Payload()
    try:
        await asyncio.Event().wait()
    finally:
        assert payload
        ended.append("cancelled")
    return 0


def test_results_come_in_order_and_no_work_is_no_result():
    assert asyncio.run(run_together(value(number) for number in range(5))) == [0, 1, 2, 3, 4]
    assert asyncio.run(run_together([])) == []


def test_the_first_failure_cancels_the_others_and_is_raised_by_itself():
    ended: list[str] = []
    with pytest.raises(ValueError, match="first"):
        asyncio.run(run_together([forever(ended), fail("first"), forever(ended)]))
    assert ended == ["cancelled", "cancelled"]


def test_a_cancelled_caller_leaves_nothing_running():
    ended: list[str] = []

    async def run() -> None:
        caller = asyncio.create_task(run_together([forever(ended), forever(ended)]))
        await asyncio.sleep(0.01)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller

    asyncio.run(run())
    assert ended == ["cancelled", "cancelled"]


def test_several_failures_at_once_are_all_retrieved(caplog):
    with pytest.raises(ValueError, match="one"):
        asyncio.run(run_together([fail("one"), fail("two"), fail("three")]))
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_failure_frees_its_frames_without_a_garbage_collection():
    """A TaskGroup's `raise group.exceptions[0]` kept every body until a full collection."""

    async def once() -> None:
        with contextlib.suppress(ValueError):
            await run_together([fail("a"), fail("b"), forever([])])

    async def run() -> None:
        for _ in range(5):
            await once()
            await asyncio.sleep(0)  # until then the loop itself refers to what woke the task
            assert Payload.alive == 0

    with without_collections():
        asyncio.run(run())


def test_a_stored_error_frees_its_frames_without_a_garbage_collection():
    def once() -> None:
        payload = Payload()
        stored = ValueError("stored")
        try:
            raise_stored(stored)
        finally:
            assert payload
            del stored

    with without_collections():
        for _ in range(5):
            with contextlib.suppress(ValueError):
                once()
            assert Payload.alive == 0
