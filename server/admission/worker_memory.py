"""Ends admission while this worker uses too much memory, before the system would end the worker.

Knows the memory in use and the bodies that are being received. Requests that were admitted go on:
their memory is bounded by the limits on bodies, images and answers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ...models.settings.byte_text import shown_bytes
from ..errors import NotReadyError

RETRY_AFTER_S = 1.0
# A reading takes up to 0.1 ms; memory grows by some megabytes at most in this time.
READ_EVERY_S = 0.01
PAGE_BYTES = 4096
STATM = Path("/proc/self/statm")


def own_bytes(statm: Path = STATM) -> int:
    """This process's memory that is not shared with files; 0 if the system does not report it."""
    try:
        _, resident, shared, *_ = statm.read_text("ascii").split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * PAGE_BYTES


class WorkerMemory:
    """Admits requests while the memory in use and the bodies on their way stay below the limit.

    limit_bytes: None for no limit. num_open: how many requests are being answered. If there are
    none, a request is always admitted: nothing could free memory.
    """

    def __init__(
        self,
        limit_bytes: int | None,
        num_open: Callable[[], int],
        read: Callable[[], int] = own_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._num_open = num_open
        self._read = read
        self._clock = clock
        self._used_bytes = 0
        self._read_at = -READ_EVERY_S
        self._num_receiving = 0
        self._coming_bytes = 0

    @contextlib.contextmanager
    def receiving(self, body_bytes: int) -> Iterator[None]:
        """Count a body that is received within the context. Raises NotReadyError, a 503."""
        self._check(body_bytes)
        self._num_receiving += 1
        self._coming_bytes += body_bytes
        try:
            yield
        finally:
            self._num_receiving -= 1
            self._coming_bytes -= body_bytes

    def _check(self, body_bytes: int) -> None:
        if self._limit_bytes is None or not (self._num_receiving or self._num_open()):
            return
        now = self._clock()
        if now - self._read_at >= READ_EVERY_S:
            self._used_bytes, self._read_at = self._read(), now
        if self._used_bytes + self._coming_bytes + body_bytes > self._limit_bytes:
            raise NotReadyError(
                "the server is short of memory: try again later, or start it with a larger "
                f"--max-memory-worker (now {shown_bytes(self._limit_bytes)})",
                retry_after_s=RETRY_AFTER_S,
            )
