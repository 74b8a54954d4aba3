"""One child process of the supervisor: how it starts, gets its settings and ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from ...router.processes.tasks import end_tasks
from ..children.processes import start_python


class Child:
    """A process that reads its settings as one line of JSON on stdin.

    Not on the command line, because settings contain API keys. The process gets its own session,
    so that Ctrl-C reaches only the supervisor.
    """

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """Start Python with these arguments; the process waits for its settings.

        Raises ChildStartError.
        """
        variables = {**os.environ, **(environment or {})}
        return cls(
            await start_python(command, variables, pass_fds=pass_fds, start_new_session=True)
        )

    async def configure(self, settings: msgspec.Struct) -> None:
        """Send the settings; does nothing if the child has already ended."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(ConnectionError):
            stdin.write(msgspec.json.encode(settings) + b"\n")
            await stdin.drain()
        stdin.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative if a signal ended it."""
        return self._process.returncode

    @property
    def how_it_ended(self) -> str:
        """The exit code or signal, for the log."""
        code = self._process.returncode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def wait(self) -> None:
        """Return when it has ended."""
        await self._process.wait()

    async def wait_or_hang(self, hanging: Coroutine[Any, Any, str]) -> str | None:
        """None when it has ended, or the reason as soon as `hanging` returns one."""
        hangs = asyncio.create_task(hanging)
        ends = asyncio.create_task(self.wait())
        try:
            await asyncio.wait([hangs, ends], return_when=asyncio.FIRST_COMPLETED)
            return None if ends.done() else hangs.result()
        finally:
            await end_tasks(hangs, ends)

    def terminate(self) -> None:
        """Send SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def send_hangup(self) -> None:
        """Send SIGHUP: reread keys and certificates."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """Send SIGKILL, which also ends a stopped process."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
