"""Places for work that keys share: one line a key, served in turn.

Owns the places of one resource (image fetches, decoders, grammar compiles), who waits for them,
and the bounds on waiting. Knows nothing of what the work is. The order between keys is
`router/fair_shares.py`: the key that has used the least time goes first, so one key that fills a
lane delays another key by at most the rest of one piece of work.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ...router.fair_shares import FairShares
from ..errors import OverloadedError

# What a piece of work is taken to last before any has ended.
FIRST_GUESS_S = 0.1
# Weight of the newest duration in the running mean.
NEWEST = 0.2


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """num_places: work done at once. num_waiting: most that wait, of all keys and of one.

    max_wait_s: refuse who would wait longer, by the mean duration of work; None for any time.
    """

    num_places: int
    max_waiting: int = 4096
    max_waiting_by_key: int = 1024
    max_wait_s: float | None = None


class FairLane:
    """Places that keys share. `async with lane.place(key):` waits for one and frees it.

    name: what the lane is for, in errors and metrics. on_refusal: called with the name when a
    piece of work is refused. clock: seconds, monotonic.
    """

    def __init__(
        self,
        name: str,
        limits: LaneLimits,
        *,
        weight_of: Callable[[str], float] = lambda key: 1.0,
        on_refusal: Callable[[str], None] = lambda name: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._limits = limits
        self._shares = FairShares(weight_of)
        self._on_refusal = on_refusal
        self._clock = clock
        self._lines: dict[str, deque[asyncio.Future[float]]] = {}
        self._num_running = 0
        self._mean_s = FIRST_GUESS_S

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_waiting(self) -> int:
        return sum(len(line) for line in self._lines.values())

    @property
    def num_keys(self) -> int:
        """The number of keys that are remembered; 0 when the lane is idle."""
        return len(self._shares)

    @asynccontextmanager
    async def place(self, key: str) -> AsyncIterator[None]:
        """Wait for a place, keep it for the block, free it. Cancelling while waiting costs nothing.

        Raises OverloadedError at once where the line is full or the wait would be too long.
        """
        self._refuse_if_full(key)
        self._shares.join(key)
        try:
            guess_s = await self._take(key)
            started = self._clock()
            try:
                yield
            finally:
                used_s = self._clock() - started
                self._mean_s += NEWEST * (used_s - self._mean_s)
                self._free(key, used_s - guess_s)
        finally:
            self._shares.leave(key)

    def _refuse_if_full(self, key: str) -> None:
        limits, line = self._limits, self._lines.get(key, ())
        if self._num_running < limits.num_places:
            return
        wait_s = self._wait_s(key)
        if len(line) >= limits.max_waiting_by_key:
            reason = f"{len(line):,} of this key wait"
        elif self.num_waiting >= limits.max_waiting:
            reason = f"{self.num_waiting:,} wait"
        elif limits.max_wait_s is not None and wait_s > limits.max_wait_s:
            reason = f"the wait would be about {wait_s:.1f} s, the limit is {limits.max_wait_s:g} s"
        else:
            return
        self._on_refusal(self.name)
        raise OverloadedError(
            f"too much work waits for {self.name}: {reason}. Try again later",
            retry_after_s=wait_s,
        )

    def _wait_s(self, key: str) -> float:
        """Seconds until a newcomer of `key` starts, behind its own line and others' turns."""
        own = len(self._lines.get(key, ())) + 1
        others = sum(min(len(line), own) for other, line in self._lines.items() if other != key)
        return (own + others) * self._mean_s / self._limits.num_places

    async def _take(self, key: str) -> float:
        """Return with a place; the seconds that `key` was charged for it in advance."""
        if self._num_running < self._limits.num_places:
            return self._start(key)
        turn: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        line = self._lines.setdefault(key, deque())
        line.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the place came in the same moment
                self._free(key, -turn.result())
            elif turn in self._lines.get(key, ()):
                self._leave_line(key, turn)
            raise

    def _leave_line(self, key: str, turn: asyncio.Future[float]) -> None:
        line = self._lines[key]
        line.remove(turn)
        if not line:
            del self._lines[key]

    def _start(self, key: str) -> float:
        """Take a place, charged by the mean until its time is known; what was charged.

        Without it one key would get every place that comes free before its first work ends.
        """
        self._num_running += 1
        self._shares.charge(key, self._mean_s)
        return self._mean_s

    def _free(self, key: str, correction_s: float) -> None:
        """Give back a place, correct the charge of `key`, and start who is next."""
        self._num_running -= 1
        self._shares.charge(key, correction_s)
        while self._lines and self._num_running < self._limits.num_places:
            chosen = self._shares.next_key(self._lines)
            turn = self._lines[chosen][0]
            self._leave_line(chosen, turn)
            if not turn.cancelled():  # else its task is about to notice
                turn.set_result(self._start(chosen))
