"""Decides when a child that ended restarts, and when to give up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class RestartBudget:
    """At most `max_restarts` restarts in any `window_s` seconds.

    A child that served before it ended restarts at once. Pauses between failed starts double, up
    to 30 seconds. clock: seconds, monotonic.
    """

    def __init__(
        self,
        max_restarts: int,
        window_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_restarts = max_restarts
        self.window_s = window_s
        self._clock = clock
        self._failures: deque[float] = deque()
        self._num_in_a_row = 0

    def pause_s(self, *, has_served: bool) -> float | None:
        """Count a failure; the seconds to wait before the restart, or None to give up."""
        now = self._clock()
        while self._failures and self._failures[0] <= now - self.window_s:
            self._failures.popleft()
        self._failures.append(now)
        if len(self._failures) > self.max_restarts:
            return None
        self._num_in_a_row = 0 if has_served else self._num_in_a_row + 1
        if has_served:
            return 0.0
        # The exponent is bounded, so that many failures cannot overflow.
        return min(FIRST_PAUSE_S * 2.0 ** min(self._num_in_a_row - 1, 16), LONGEST_PAUSE_S)
