"""A running engine over its real Unix socket, with a runner that hashes instead of computing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from support.fake_runner import FakeRunner, fake_image
from support.polling import until

from vlmserve.models.batch import ImageSpan
from vlmserve.router.client.engine_client import EngineClient
from vlmserve.router.client.replica_pool import ReplicaPool
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.engine.server import EngineServer
from vlmserve.router.errors import EngineDeadError
from vlmserve.router.messages import AddRequest, SequenceOutput


@dataclass
class Rig:
    """A running engine in this process, and clients of it."""

    config: EngineConfig
    runner: FakeRunner
    server: EngineServer
    engine: Engine
    clients: list[EngineClient]

    async def connect(self, **options) -> EngineClient:
        client = EngineClient(self.config.socket_path, **options)
        await client.connect(5)
        await client.wait_ready(5)
        self.clients.append(client)
        return client

    async def settled(self) -> None:
        """Wait until nothing runs or waits, then check that every block is free."""
        scheduler = self.engine.scheduler
        await until(lambda: not scheduler.has_work and not self.engine.snapshot().open)
        scheduler.check()
        assert scheduler.tiles.num_images == scheduler.tiles.num_bytes == 0
        stats = self.engine.stats()
        assert (stats.text_blocks_used, stats.image_blocks_used) == (0, 0)
        assert not self.engine.snapshot().open


@contextlib.asynccontextmanager
async def engine_of(tmp_path, runner: FakeRunner | None = None, **options) -> AsyncIterator[Rig]:
    path = str(tmp_path / "engine.sock")
    config = EngineConfig(model="fake", socket_path=path, **options)
    runner = runner or FakeRunner()
    server = EngineServer(config)
    await server.start()
    engine = Engine(runner, config, server.send)
    server.attach(engine)
    running = asyncio.create_task(engine.run())
    rig = Rig(config, runner, server, engine, [])
    try:
        yield rig
        await rig.settled()
        assert not running.done(), running
    finally:
        for client in rig.clients:
            await client.close()
        running.cancel()
        engine.close(EngineDeadError("over"))
        await server.close()


def request_of(request_id="a", prompt=(1, 2, 3), max_tokens=4, **fields) -> AddRequest:
    return AddRequest(
        request_id=request_id, prompt_token_ids=list(prompt), max_tokens=max_tokens, **fields
    )


def image_request(request_id="a", name="p", **fields) -> AddRequest:
    return request_of(request_id, images=[fake_image(name, 2)], spans=[ImageSpan(1)], **fields)


async def tokens_of(client: EngineClient | ReplicaPool, request: AddRequest) -> list[int]:
    token_ids: list[int] = []
    output: SequenceOutput | None = None
    async for output in client.generate(request):
        token_ids += output.token_ids
    assert output is not None
    assert output.finish_reason in ("stop", "length")
    return token_ids
