"""How fast the engine gets through its work, for clients that are told to come back.

Owns the steps of the last seconds. Knows nothing of who waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

WINDOW_S = 10.0
SHORTEST_S, LONGEST_S = 1.0, 60.0


class _Step(NamedTuple):
    began: float
    num_tokens: int


class Pace:
    """Counts the tokens of recent steps. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[_Step] = deque()
        self._num_tokens = 0

    def count(self, began: float, num_tokens: int) -> None:
        """Take in a step that began then and has just ended."""
        self._steps.append(_Step(began, num_tokens))
        self._num_tokens += num_tokens
        self._forget()

    def seconds_for(self, num_tokens: int) -> float:
        """How long so many tokens take at the pace of the last seconds, from 1 to 60.

        Where no step was computed lately nothing is known: 1.
        """
        self._forget()
        if not self._num_tokens:
            return SHORTEST_S
        spent_s = self._clock() - self._steps[0].began
        return min(max(num_tokens * spent_s / self._num_tokens, SHORTEST_S), LONGEST_S)

    def _forget(self) -> None:
        """Drop the steps that began too long ago, but for the last."""
        oldest = self._clock() - WINDOW_S
        while len(self._steps) > 1 and self._steps[0].began < oldest:
            self._num_tokens -= self._steps.popleft().num_tokens
