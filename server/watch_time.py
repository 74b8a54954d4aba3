"""The time that passes for whoever watches another process.

Owns one rule: time in which the watch itself was held up counts against nobody, as what the other
one said then has not been read yet. So it is where a machine slept or a container was paused.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class WatchTime:
    """Seconds between one look and the next. clock: seconds, monotonic."""

    def __init__(self, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """interval_s: how often one means to look."""
        self._most_s = 2 * interval_s
        self._clock = clock
        self._looked = clock()

    def passed_s(self) -> float:
        """The seconds since the last look that count: two intervals at most."""
        now = self._clock()
        passed_s = min(now - self._looked, self._most_s)
        self._looked = now
        return passed_s
