"""A server for one run: on a free port of this machine, behind a random key, ended with the run."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import typer

from ...router.processes.parent_death import die_with_parent
from .requests import BatchError

READY = re.compile(r"vlmserve is ready on (\S+) ")
STOP_TIMEOUT_S = 60.0


@asynccontextmanager
async def private_server(arguments: Sequence[str]) -> AsyncIterator[tuple[str, str]]:
    """The URL and the key of a server that is ready; it stops when the block ends.

    arguments: of `vlmserve serve`. It ends with this process, also if that is killed.
    Raises BatchError with the server's last line if it does not start.
    """
    key = secrets.token_urlsafe(32)
    command = (sys.executable, "-m", "vlmserve.server", "serve", *arguments)
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--host", "127.0.0.1", "--port", "0", "--log-format", "text", "--no-log-requests"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=PIPE,
        env=os.environ | {"VLMSERVE_API_KEY": key},
        preexec_fn=die_with_parent,
    )
    assert process.stderr is not None
    reading: asyncio.Task[None] | None = None
    try:
        url = await _url_of(process.stderr)
        reading = asyncio.create_task(_pass_on(process.stderr))
        yield url, key
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        if reading is not None:
            await reading


async def _url_of(lines: asyncio.StreamReader) -> str:
    """Pass the log on until the server is ready."""
    last = ""
    async for line in lines:
        text = line.decode(errors="replace").rstrip()
        if ready := READY.search(text):
            return ready[1]
        last = text or last
        typer.echo(text, err=True)
    raise BatchError(f"the server did not start: {last}")


async def _pass_on(lines: asyncio.StreamReader) -> None:
    async for line in lines:
        typer.echo(line.decode(errors="replace").rstrip(), err=True)
