"""A server of this process alone: `vlmserve serve` as a child, on a free port of this machine.

It stops with `stop`, and is killed if this process ends for whatever reason. Used for a batch run,
and by each replica of Ray Serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence

from ...router.processes.parent_death import die_with_parent

READY = re.compile(r"vlmserve is ready on (\S+) ")
# For a server without a drain time: to end by itself.
STOP_TIMEOUT_S = 60.0


class PrivateServerError(Exception):
    """The server did not start; the message has its last line."""


class PrivateServer:
    """A server that is ready. url: where it listens."""

    def __init__(self, process: Process, url: str, reading: asyncio.Task[None]) -> None:
        self.url = url
        self._process = process
        self._reading = reading

    @classmethod
    async def start(
        cls,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        log: Callable[[str], None],
    ) -> PrivateServer:
        """Start it and wait until it is ready.

        arguments, variables: of `vlmserve serve`, beside this process's own variables. log: gets
        each line that the server logs. Raises PrivateServerError.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vlmserve.server", "serve", *arguments),
            *("--host", "127.0.0.1", "--port", "0", "--log-format", "text"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=PIPE,
            env={**os.environ, **variables},
            preexec_fn=die_with_parent,
        )
        assert process.stderr is not None
        try:
            url = await _url_of(process.stderr, log)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        return cls(process, url, asyncio.create_task(_pass_on(process.stderr, log)))

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    def reread_keys(self) -> None:
        """Have it read its key file again."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """End it at once, with all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop it as SIGTERM does, which drains; kill it after `timeout_s`."""
        if not self.has_ended:
            self._process.terminate()
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reading


async def _url_of(lines: asyncio.StreamReader, log: Callable[[str], None]) -> str:
    """Pass the log on until the server is ready."""
    last = ""
    async for line in lines:
        text = line.decode(errors="replace").rstrip()
        if ready := READY.search(text):
            return ready[1]
        last = text or last
        log(text)
    raise PrivateServerError(f"the server did not start: {last}")


async def _pass_on(lines: asyncio.StreamReader, log: Callable[[str], None]) -> None:
    async for line in lines:
        log(line.decode(errors="replace").rstrip())
