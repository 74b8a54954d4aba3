"""Decides how long a client waits before it connects to an engine again. Knows no socket."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
# A connection that lasted this long was a good one: the next attempt comes at once.
GOOD_S = 5.0


class ReconnectPause:
    """Pauses that double while connections are lost soon after they were made.

    An engine that accepts connections and closes them would otherwise be dialed thousands of times
    a second. clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause_s = 0.0
        self._connected_at = 0.0
        self._due_at = 0.0

    def connected(self) -> None:
        """A connection was made now."""
        self._connected_at = self._clock()

    def lost(self) -> None:
        """The connection was lost now."""
        now = self._clock()
        is_good = now - self._connected_at >= GOOD_S
        longer_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        self._pause_s = 0.0 if is_good else longer_s
        self._due_at = now + self._pause_s

    def left_s(self) -> float:
        """Seconds until the next attempt is due; 0 if it may be made now."""
        return max(0.0, self._due_at - self._clock())
