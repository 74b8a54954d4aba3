"""A real engine on a real socket, for tests that bring their own runner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.engine.runner_protocol import Runner
from vlmserve.router.engine.server import EngineServer
from vlmserve.router.errors import EngineDeadError


@asynccontextmanager
async def engine_at(path: str | Path, runner: Runner, **options: Any) -> AsyncIterator[Engine]:
    """An engine that listens at `path`; options are fields of EngineConfig."""
    config = EngineConfig(model="fake", socket_path=str(path), **options)
    server = EngineServer(config)
    await server.start()
    engine = Engine(runner, config, server.send)
    server.attach(engine)
    running = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        running.cancel()
        engine.close(EngineDeadError("over"))
        await server.close()
