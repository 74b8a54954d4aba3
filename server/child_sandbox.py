"""What the worker's killable children have in common: how they are started and ended.

Owns their environment and their end. Knows nothing of what they do.
"""

from __future__ import annotations

import contextlib
import os
from asyncio.subprocess import Process

# A child reads strangers' files: it is given what Python needs, and none of the server's keys.
KEPT_VARIABLES = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "VIRTUAL_ENV"),
    *("LANG", "LC_ALL", "LC_CTYPE", "MALLOC_ARENA_MAX"),
)
# One thread a child: its parallelism is the number of children.
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def child_environment() -> dict[str, str]:
    """The environment variables that a child is started with."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return kept | SINGLE_THREAD


async def end_child(process: Process) -> None:
    """Kill the process and reap it; does nothing to one that has ended."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    if process.stdin is not None:
        process.stdin.close()
    await process.wait()
