"""How fast the engine gets through its work, for clients that are told to come back.

Owns the steps of the last seconds and how long the last requests ran. Knows nothing of who waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

WINDOW_S = 10.0
SHORTEST_S, LONGEST_S = 1.0, 60.0
# Of so many requests that ended last is taken how long one runs; of fewer, nothing is known.
MAX_RUNS, MIN_RUNS = 64, 4


class _Step(NamedTuple):
    began: float
    num_tokens: int


class Pace:
    """Counts the tokens of recent steps. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[_Step] = deque()
        self._num_tokens = 0
        self._run_seconds: deque[float] = deque(maxlen=MAX_RUNS)

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

    def count_run(self, run_s: float) -> None:
        """Take in how long a request ran that has just ended, however it ended."""
        self._run_seconds.append(run_s)

    def wait_s(self, place: int, num_places: int) -> float | None:
        """How long the `place`-th of those who wait (from 1) will wait for its first step.

        All places are taken, and come free as requests end: one every run time / num_places
        (Little's law). None where too few have ended to tell.
        """
        runs = self._run_seconds
        if len(runs) < MIN_RUNS:
            return None
        return place * sum(runs) / len(runs) / num_places

    def _forget(self) -> None:
        """Drop the steps that began too long ago, but for the last."""
        oldest = self._clock() - WINDOW_S
        while len(self._steps) > 1 and self._steps[0].began < oldest:
            self._num_tokens -= self._steps.popleft().num_tokens
