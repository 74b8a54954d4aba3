"""When a child that ended is started again, and when that is given up.

Owns the counting. Knows nothing of processes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class RestartBudget:
    """At most `max_restarts` restarts in any `window_s` seconds, further and further apart.

    A child that fails once is started again at once: it may have been killed. clock:
    seconds, monotonic.
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

    def pause_s(self) -> float | None:
        """Count a failure: how long to wait before the restart, or None to give up."""
        now = self._clock()
        while self._failures and self._failures[0] <= now - self.window_s:
            self._failures.popleft()
        self._failures.append(now)
        num_before = len(self._failures) - 1
        if num_before >= self.max_restarts:
            return None
        if num_before == 0:
            return 0.0
        # No power that a long run of failures could overflow.
        return min(FIRST_PAUSE_S * 2.0 ** min(num_before - 1, 16), LONGEST_PAUSE_S)
