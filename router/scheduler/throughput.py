"""Estimates how long a request will wait and a step will take, from recent requests and steps.

Owns the tokens computed in the last seconds, the run times of the last requests, the times of steps
by their size, and how many drafts a step has for them. Knows nothing of the queue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median_low
from typing import NamedTuple

WINDOW_S = 10.0
SHORTEST_S, LONGEST_S = 1.0, 60.0
# The average run time covers at most MAX_RUNS requests; with fewer than MIN_RUNS it is unknown.
MAX_RUNS, MIN_RUNS = 64, 4
# Times of steps of one size that are kept: their median ignores two that something held up.
NUM_TIMES = 5
# Steps after which the times of steps with drafts are measured anew. Up to 14 of these are trials.
NUM_REMEMBERED = 1024
# How long a step may take to be clearly shorter than another. Where all steps take as long, as on a
# GPU, none is.
SHORTER = 0.75
# How many times the expected tokens a second drafts must give: less may be noise in the times.
LEAST_GAIN = 1.05
# How much the right drafts of a step count after the next one, against those of that one, and how
# many right drafts that were expected are assumed at the start.
OLDER_STEPS, NUM_ASSUMED = 0.9, 8.0
# The part of earlier rows' time that a further row takes at least, and below how many rows of a
# step nothing is known of further ones: CPUs multiply few rows in another way than many.
LEAST_ROW, FEW_ROWS = 0.75, 8
# A step with so many times the tokens takes longer on a CPU, also if no such step was measured.
MANY_TIMES = 8


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
    """The usual seconds of a step, by its size: the median of the last five of that size.

    Sizes are powers of two and half-way between them: 8 to 11 tokens are one size, 12 to 15 the
    next. Only steps that encode no image count.
    """

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}

    def record(self, num_tokens: int, seconds: float) -> None:
        """Record the time of a step."""
        self._times.setdefault(size_of(num_tokens), deque(maxlen=NUM_TIMES)).append(seconds)

    def seconds(self, num_tokens: int) -> float | None:
        """The usual time of a step of this size; None if fewer than two were measured.

        The first step of a size may be slow, for example because kernels are compiled.
        """
        times = self._times.get(size_of(num_tokens), ())
        return median_low(times) if len(times) > 1 else None

    def is_shorter(self, num_tokens: int, num_more: int) -> bool:
        """Whether a step of num_tokens takes at most 3/4 as long as one of num_more tokens.

        True, so that it is measured, if no step of the first size was. Of the second size, the
        next smaller one that was measured counts; False without any.
        """
        sizes = [size for size in self._times if size <= num_more]
        if not sizes:
            return False
        alone, both = self._times.get(size_of(num_tokens)), self._times[max(sizes)]
        return alone is None or median_low(alone) <= SHORTER * median_low(both)

    def is_certainly_shorter(self, num_tokens: int, num_more: int) -> bool:
        """Whether a step of num_tokens is short against one of many times as many on a CPU.

        False if the second size was measured: then `is_shorter` knows better.
        """
        return size_of(num_more) not in self._times and num_more >= MANY_TIMES * num_tokens


class DraftTimes:
    """How many drafts of a step are worth their time, from the times of recent steps.

    Only steps of decodes alone count. Those with drafts are apart from those without: a device may
    compute them in another way. Chances are reduced by the share of expected right drafts that were
    right: requests whose texts are alike fail together, and of many chances the highest are often
    too high. After NUM_REMEMBERED steps all is measured anew, since texts grow and other programs
    come and go.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._plain, self._drafted, self._num_steps = StepTimes(), StepTimes(), 0
        self._num_right = self._num_expected = NUM_ASSUMED

    def record(self, num_decodes: int, num_drafts: int, seconds: float) -> None:
        """Record the time of a step of decodes alone."""
        if self._num_steps == NUM_REMEMBERED:
            self._forget()
        self._num_steps += 1
        times = self._drafted if num_drafts else self._plain
        times.record(num_decodes + num_drafts, seconds)

    def record_right(self, num_right: int, num_expected: float) -> None:
        """Record how many drafts of a step were right, and how many were expected to be."""
        if num_expected > 0:
            self._num_right = OLDER_STEPS * self._num_right + num_right
            self._num_expected = OLDER_STEPS * self._num_expected + num_expected

    def are_known(self, num_decodes: int) -> bool:
        """Whether decodes of this number were measured without drafts; else none is worth it."""
        return self._plain.seconds(num_decodes) is not None

    def num_worth(self, num_decodes: int, chances: list[float]) -> int:
        """How many drafts give the most expected tokens a second; 0 if they gain under 5 %.

        chances: of each draft that there is, that it counts, the largest first. A size that was
        not measured is tried, the smallest first, if at least half of its drafts are expected to
        count: then the trial wastes little, even where each row costs the same. Beside eight
        decodes or more it must be worth its time if a further row costs at least 3/4 of what those
        of the next smaller size cost.
        """
        plain_s = self._plain.seconds(num_decodes)
        if plain_s is None:
            return 0
        trust = min(1.0, self._num_right / self._num_expected)
        if trust * sum(chances) < (LEAST_GAIN - 1) * num_decodes:
            return 0  # also if they cost nothing
        best, most_per_s = 0, LEAST_GAIN * num_decodes / plain_s
        num_before, num_right, row_s, step_s = 0, 0.0, 0.0, plain_s
        for num_drafts in _ends_of_sizes(num_decodes, len(chances)):
            num_right += trust * sum(chances[num_before:num_drafts])
            measured_s = self._drafted.seconds(num_decodes + num_drafts)
            if measured_s is None:
                step_s += row_s * (num_drafts - num_before)  # at least
            else:
                step_s = measured_s
                if num_decodes >= FEW_ROWS:
                    row_s = max(0.0, LEAST_ROW * (step_s - plain_s) / num_drafts)
            num_before, per_s = num_drafts, (num_decodes + num_right) / step_s
            if measured_s is None and per_s > most_per_s and 2 * num_right >= num_drafts:
                return num_drafts
            if measured_s is not None and per_s > most_per_s:
                best, most_per_s = num_drafts, per_s
        return best


def size_of(num_tokens: int) -> int:
    """The smallest number of tokens of the same size of step: its first two bits."""
    return num_tokens & ~_later_bits(num_tokens)


def _later_bits(num_tokens: int) -> int:
    """All bits behind the first two of a number."""
    return (1 << max(0, num_tokens.bit_length() - 2)) - 1


def _ends_of_sizes(num_decodes: int, most: int) -> Iterator[int]:
    """Numbers of drafts, 1 to most, with which a step is the last of its size, or has most."""
    count = 0
    while count < most:
        following = num_decodes + count + 1
        count = min(most, (following | _later_bits(following)) - num_decodes)
        yield count
