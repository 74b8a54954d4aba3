"""Estimates how long a request will wait and a step will take, from recent requests and steps.

Owns the tokens computed in the last seconds, the run times of the last requests, and the times of
steps by their size. Knows nothing of the queue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

WINDOW_S = 10.0
SHORTEST_S, LONGEST_S = 1.0, 60.0
# The average run time covers at most MAX_RUNS requests; with fewer than MIN_RUNS it is unknown.
MAX_RUNS, MIN_RUNS = 64, 4
# The weight of a new time in the average of its size.
NEW_TIME = 0.25


class _Step(NamedTuple):
    started_at: float
    num_tokens: int


class WaitEstimator:
    """Measures throughput and run times. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[_Step] = deque()
        self._num_tokens = 0
        self._run_seconds: deque[float] = deque(maxlen=MAX_RUNS)

    def record_step(self, started_at: float, num_tokens: int) -> None:
        """Record a step that has just ended."""
        self._steps.append(_Step(started_at, num_tokens))
        self._num_tokens += num_tokens
        self._drop_old_steps()

    def record_run(self, run_s: float) -> None:
        """Record the run time of a request that has just ended, for whatever reason."""
        self._run_seconds.append(run_s)

    def seconds_for(self, num_tokens: int) -> float:
        """The time to compute this many tokens at the throughput of the last seconds, 1 to 60 s.

        1 if no step was computed lately.
        """
        self._drop_old_steps()
        if not self._num_tokens:
            return SHORTEST_S
        elapsed_s = self._clock() - self._steps[0].started_at
        return min(max(num_tokens * elapsed_s / self._num_tokens, SHORTEST_S), LONGEST_S)

    def wait_s(self, position: int, num_places: int) -> float | None:
        """The expected wait of the request at `position` in the queue (from 1).

        All places are taken; one becomes free every run time / num_places (Little's law). None if
        too few requests have ended to estimate it.
        """
        runs = self._run_seconds
        if len(runs) < MIN_RUNS:
            return None
        return position * sum(runs) / len(runs) / num_places

    def _drop_old_steps(self) -> None:
        """Drop the steps that started before the window, except the last step."""
        oldest = self._clock() - WINDOW_S
        while len(self._steps) > 1 and self._steps[0].started_at < oldest:
            self._num_tokens -= self._steps.popleft().num_tokens


class StepTimes:
    """The average seconds of a step, for each power of two of its number of tokens.

    Only steps that encode no image count.
    """

    def __init__(self) -> None:
        self._averages: dict[int, float] = {}

    def record(self, num_tokens: int, seconds: float) -> None:
        """Record the time of a step."""
        size = num_tokens.bit_length()
        average = self._averages.get(size, seconds)
        self._averages[size] = average + NEW_TIME * (seconds - average)

    def is_at_most_half(self, num_tokens: int, num_more: int) -> bool:
        """Whether a step of num_tokens takes at most half as long as one of num_more tokens.

        True, so that it is measured, if no step of the first size was. Of the second size, the
        next smaller one that was measured counts; False without any.
        """
        sizes = [size for size in self._averages if size <= num_more.bit_length()]
        if not sizes:
            return False
        alone = self._averages.get(num_tokens.bit_length(), 0.0)
        return 2 * alone <= self._averages[max(sizes)]
