"""Child processes of the server: how they start, what they inherit, and how they end.

Owns the start (whatever the system refuses is one error), the environment of children that read
untrusted input, and killing a child. Knows nothing of what a child does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from asyncio.subprocess import PIPE, Process, SubprocessStreamProtocol
from collections.abc import Mapping, Sequence
from typing import Any

# asyncio's own default.
READ_LIMIT_BYTES = 1 << 16
# A child reads untrusted input: it gets what Python needs, and none of the server's secrets.
KEPT_VARIABLES = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "VIRTUAL_ENV"),
    *("LANG", "LC_ALL", "LC_CTYPE", "MALLOC_ARENA_MAX"),
)
# One thread per child: the parallelism is the number of children.
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class ChildStartError(Exception):
    """The system cannot start a process now: no process, memory, thread or descriptor is left."""


async def start_python(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    limit: int = READ_LIMIT_BYTES,
    **options: Any,
) -> Process:
    """Start Python with these arguments and a pipe to its stdin.

    limit and options are those of asyncio.create_subprocess_exec. Raises ChildStartError.
    """
    _load_library_of_thread_ends()
    loop = asyncio.get_running_loop()
    protocol = _ChildProtocol(limit, loop)
    inherited = {"stdout": None, "stderr": None} | options
    try:
        transport, _ = await loop.subprocess_exec(
            lambda: protocol, sys.executable, *arguments, stdin=PIPE, env=environment, **inherited
        )
    # RuntimeError: Python 3.11 waits for a process in a thread, which cannot start either.
    except (OSError, RuntimeError) as error:
        protocol.is_abandoned = True
        raise ChildStartError(getattr(error, "strerror", None) or str(error)) from None
    return Process(transport, protocol, loop)


class _ChildProtocol(SubprocessStreamProtocol):
    """is_abandoned: no thread could wait for the process. It is killed once it is connected."""

    is_abandoned = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.is_abandoned:
            transport.close()
            os.waitpid(transport.get_extra_info("subprocess").pid, 0)


def _load_library_of_thread_ends() -> None:
    """Load what glibc loads when Python ends a thread, while this process can still open files.

    Python 3.11 waits for each child in a thread. A thread that is left when Python ends calls
    pthread_exit, which aborts the process if it cannot open this library.
    """
    with contextlib.suppress(OSError):  # a system without it does not need it
        ctypes.CDLL("libgcc_s.so.1")


def child_environment() -> dict[str, str]:
    """The environment variables of a child process."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return kept | SINGLE_THREAD


async def end_child(process: Process) -> None:
    """Kill and reap the process. Does nothing if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    if process.stdin is not None:
        process.stdin.close()
    await process.wait()
