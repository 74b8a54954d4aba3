"""Where log lines go: stderr, as long as it takes them.

Owns the rule that the log never stops the server. A line is dropped and counted if the disk is
full, the reader has gone, or the reader has been slow for a moment. Knows nothing of what a line
says.
"""

from __future__ import annotations

import io
import os
import select

# Of a pipe that is ready, the kernel takes this much without waiting: PIPE_BUF, pipe(7).
ATOMIC_BYTES = 4096
# A reader that falls behind for longer loses lines, until it has caught up.
PATIENCE_MS = 100


class LogStream(io.TextIOBase):
    """Writes to a descriptor without a buffer. No write raises or waits for long."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._is_stuck = False
        self._num_lost = 0

    encoding = "utf-8"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "backslashreplace")
        try:
            while data:
                self._wait_until_writable()
                data = data[os.write(self._descriptor, data[:ATOMIC_BYTES]) :]
        except OSError:
            self._num_lost += 1
            self._is_stuck = True
        else:
            self._is_stuck = False
        return len(text)

    def take_num_lost(self) -> int:
        """How many writes were lost before the last one, which was not; 0 afterwards."""
        if self._is_stuck:
            return 0
        lost, self._num_lost = self._num_lost, 0
        return lost

    def _wait_until_writable(self) -> None:
        """Raises BlockingIOError. A regular file is always writable, or full."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        if not poll.poll(0 if self._is_stuck else PATIENCE_MS):
            raise BlockingIOError("the reader of the log does not read")
