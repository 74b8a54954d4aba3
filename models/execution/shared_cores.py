"""How many threads compute a step on a CPU while other processes use the same cores.

A step has hundreds of small parallel regions. Each ends when its last thread has run, so a thread
that the system has put aside for another process stops all of them for milliseconds. One thread
less, beside a process that takes a core, is then faster than one more.

While nothing else runs, nothing is tried. Owns when to try and what was measured; torch sets the
number of threads.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..batch import StepBatch

# How often the use of the cores is read, and how many cores the others use to be noticed, and to be
# forgotten again.
PERIOD_S = 0.5
BUSY_CORES, CALM_CORES = 0.5, 0.35
# Steps of one size that are compared, and how long a comparison counts.
NUM_TRIES = 4
VALID_S = 10.0

# What kind of step: its number of tokens as a power of two, and whether it encodes images.
Kind = tuple[int, bool]


class CoreUse:
    """What other processes use of the cores that this process may use."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")
        self._last = self._look()

    def of_others(self) -> float:
        """The cores that others used on average since the last call. Background work is left out.

        0 where the system does not report it.
        """
        before, self._last = self._last, self._look()
        passed = self._last.at - before.at
        if passed <= 0:
            return 0.0
        others = self._last.busy_s - before.busy_s - (self._last.own_s - before.own_s)
        return max(0.0, others / passed)

    def _look(self) -> _Look:
        busy = 0
        try:
            lines = self._stat.read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            name, *fields = line.split()
            if name in self._names:
                user, _nice, system, _idle, _iowait, irq, softirq = map(int, fields[:7])
                busy += user + system + irq + softirq
        return _Look(time.monotonic(), busy * self._tick_s, time.process_time())


@dataclass(slots=True, frozen=True)
class _Look:
    """The seconds that all processes and this one have used the cores until a moment."""

    at: float
    busy_s: float
    own_s: float


@dataclass(slots=True)
class _Tries:
    """The last seconds of steps of a kind with a number of threads, and when they were measured."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_TRIES))
    at: float = 0.0

    @property
    def mean_s(self) -> float:
        return sum(self.seconds) / len(self.seconds)


class SharedCores:
    """Chooses the threads of each step.

    most: the threads without other processes. num_cores: of this process. set_threads: called in
    the thread that computes. of_others: see `CoreUse`. clock: seconds, monotonic.
    """

    def __init__(
        self,
        most: int,
        num_cores: int,
        set_threads: Callable[[int], None],
        of_others: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._num_cores = most, num_cores
        self._set_threads, self._of_others, self._clock = set_threads, of_others, clock
        self._num_threads = most
        self._fewer: int | None = None
        self._read_at = clock()
        self._tries: dict[tuple[Kind, int], _Tries] = {}
        self._left_out_s = 0.0

    @property
    def num_threads(self) -> int:
        """Of the current or last step."""
        return self._num_threads

    @contextmanager
    def step(self, batch: StepBatch) -> Iterator[None]:
        """Set the threads of the step that the context computes, in this thread."""
        kind = batch.num_tokens.bit_length(), bool(batch.images)
        self._choose_threads(kind)
        started, self._left_out_s = self._clock(), 0.0
        yield
        self._record(kind, self._clock() - started - self._left_out_s)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within a step: what the context computes does not count as its time."""
        started = self._clock()
        yield
        self._left_out_s += self._clock() - started

    def _choose_threads(self, kind: Kind) -> None:
        now = self._clock()
        if now - self._read_at >= PERIOD_S:
            self._read_at = now
            self._notice(self._of_others())
        chosen = self._choose(kind, now)
        if chosen != self._num_threads:
            self._num_threads = chosen
            self._set_threads(chosen)

    def _record(self, kind: Kind, seconds: float) -> None:
        if self._fewer is None:
            return
        tries = self._tries.setdefault((kind, self._num_threads), _Tries())
        tries.seconds.append(seconds)
        if len(tries.seconds) == NUM_TRIES:
            tries.at = self._clock()

    def _notice(self, others: float) -> None:
        """Start or stop comparing, by the cores that others use."""
        if others < (BUSY_CORES if self._fewer is None else CALM_CORES):
            self._fewer = None
            self._tries.clear()
            return
        fewer = max(1, min(self._most - 1, self._num_cores - round(others)))
        if fewer != self._fewer:
            self._fewer = fewer
            self._tries.clear()

    def _choose(self, kind: Kind, now: float) -> int:
        if self._fewer is None:
            return self._most
        means = {}
        for number in (self._most, self._fewer):
            tries = self._tries.get((kind, number))
            if tries is None or len(tries.seconds) < NUM_TRIES:
                return number
            if now - tries.at > VALID_S:
                tries.seconds.clear()
                return number
            means[number] = tries.mean_s
        return min(means, key=means.__getitem__)
