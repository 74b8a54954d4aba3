"""A worker that is short of memory rejects new requests; the system does not end it."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import AsyncIterator

import pytest
from support.fake_clock import Clock
from support.http_side import MODEL, ScriptedEngine, client_of, error_of
from support.invariants import CHAT, body_for
from support.polling import until

from vlmserve.router.messages import AddRequest, SequenceOutput
from vlmserve.server.admission.worker_memory import READ_EVERY_S, WorkerMemory, own_bytes
from vlmserve.server.errors import NotReadyError


def test_own_memory_counts_what_this_process_allocates():
    before = own_bytes()
    # Not from the heap, where another test may have left as much free.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, 64 << 20, flags=flags) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert own_bytes() - before > 60 << 20


def test_bodies_on_their_way_count_and_memory_is_read_rarely():
    clock, num_reads = Clock(), 0

    def read() -> int:
        nonlocal num_reads
        num_reads += 1
        return 100

    memory = WorkerMemory(1000, lambda: 1, read, clock)
    with memory.receiving(500):
        with pytest.raises(NotReadyError, match="--max-memory-worker") as caught:
            memory.receiving(500).__enter__()
        assert caught.value.retry_after_s == 1.0
        with memory.receiving(400):
            pass
    with memory.receiving(900):
        pass
    assert num_reads == 1
    clock.now += 2 * READ_EVERY_S
    with memory.receiving(1):
        assert num_reads == 2


def test_a_request_that_is_alone_is_admitted_and_without_a_limit_every_one():
    """Otherwise a worker that cannot free its memory would never answer again."""
    memory = WorkerMemory(1, lambda: 0, lambda: 1000)
    with memory.receiving(10), pytest.raises(NotReadyError):
        memory.receiving(10).__enter__()
    with memory.receiving(10):
        pass
    with WorkerMemory(None, lambda: 5, lambda: 1 << 60).receiving(1 << 60):
        pass


class HeldEngine(ScriptedEngine):
    """Answers nothing before it is released."""

    def __init__(self) -> None:
        super().__init__(
            lambda request: [SequenceOutput(request_id="", token_ids=[1], finish_reason="length")]
        )
        self.released = asyncio.Event()

    async def generate(self, *requests: AddRequest) -> AsyncIterator[SequenceOutput]:
        self.requests += requests
        await self.released.wait()
        async with contextlib.aclosing(super().generate(*requests)) as outputs:
            async for output in outputs:
                yield output


def test_row_63_a_worker_above_its_limit_rejects_and_goes_on_with_what_it_has(checkpoint):
    """The first request is answered, the second is a 503, health stays, then all is as before."""

    async def main() -> None:
        engine = HeldEngine()
        async with client_of(checkpoint, engine, max_memory_bytes=1) as client:
            body = body_for(CHAT, max_tokens=1) | {"model": MODEL}
            first = asyncio.create_task(client.post(CHAT, json=body))
            await until(lambda: engine.requests)
            second = await client.post(CHAT, json=body)
            error = error_of(second, 503)
            assert "short of memory" in error["message"]
            assert second.headers["retry-after"] == "1"
            assert (await client.get("/v1/health/live")).status_code == 200
            engine.released.set()
            assert (await first).status_code == 200
            assert (await client.post(CHAT, json=body)).status_code == 200

    asyncio.run(main())
