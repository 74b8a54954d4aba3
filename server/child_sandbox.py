"""What all killable child processes of a worker share: their environment and their end.

Owns the environment variables of a child, and killing it. Knows nothing of what a child does.
"""

from __future__ import annotations

import contextlib
import os
from asyncio.subprocess import Process

# A child reads untrusted input: it gets what Python needs, and none of the server's secrets.
KEPT_VARIABLES = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "VIRTUAL_ENV"),
    *("LANG", "LC_ALL", "LC_CTYPE", "MALLOC_ARENA_MAX"),
)
# One thread per child: the parallelism is the number of children.
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


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
