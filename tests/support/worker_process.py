"""A real HTTP worker process in front of an engine's socket, without a supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vlmserve.models import bundled
from vlmserve.server.settings import ServerSettings

BUNDLED = Path(bundled.__file__).parent / "checkpoint"
PAGE_BYTES = 4096


@dataclass(slots=True)
class Worker:
    """A running worker and its base URL."""

    process: Process
    url: str

    @property
    def resident_bytes(self) -> int:
        """The memory of the worker that is in RAM."""
        statm = Path(f"/proc/{self.process.pid}/statm").read_text("ascii")
        return int(statm.split()[1]) * PAGE_BYTES


@contextlib.asynccontextmanager
async def worker_process(engine_socket: str, **settings: Any) -> AsyncIterator[Worker]:
    """A worker process with these settings, killed at the end if it still runs."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        options = ServerSettings(
            model=str(BUNDLED),
            engine_socket=engine_socket,
            served_model_names=["m"],
            listen_fd=listening.fileno(),
            **settings,
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vlmserve.server.worker.process"),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=[listening.fileno()],
        )
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(options))
    process.stdin.close()
    try:
        yield Worker(process, url)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
