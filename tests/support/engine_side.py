"""A real engine on a real socket, for tests that bring their own runner."""

from __future__ import annotations

import asyncio
import os
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


def engine_socket(pid: int) -> str:
    """The path of the socket that an engine process listens on."""
    links = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    with open("/proc/net/unix", encoding="ascii") as table:
        rows = [line.split() for line in table]
    (path,) = {
        row[7] for row in rows if len(row) > 7 and row[7].endswith(".sock")
        and f"socket:[{row[6]}]" in links and row[3] == "00010000"
    }  # fmt: skip
    return path
