"""Places for work that keys share: one line a key, served in turn.

Owns the places of one resource (image fetches, decoders, grammar compiles), which requests wait for
them, and the bounds on waiting. Knows nothing of what the work is. The order between keys is
`router/fair_shares.py`: the key that has used the least time goes first, so one key that fills a
lane delays another key by at most the rest of one piece of work.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from ...router.fair_shares import FairShares
from ..errors import OverloadedError

T = TypeVar("T")

# What a piece of work is taken to last before any has ended.
FIRST_GUESS_S = 0.1
# Weight of the newest duration in the running mean.
NEWEST = 0.2


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """num_places: work done at once. max_waiting: most that wait, of all keys and of one.

    max_wait_s: refuse work that would wait longer, by the mean duration of work, and work that has
    waited so long; None for any time.
    keeps_room: a key takes a place only while it has fewer than are free. One key then gets half
    of the places, and `n` keys get 1 / (n + 1) each, so that a new key starts at once. For work
    that mostly waits (downloads, name lookups). Source: Choudhury and Hahne (1998), "Dynamic
    Queue Length Thresholds for Shared-Memory Packet Switches", with alpha 1.
    """

    num_places: int
    max_waiting: int = 4096
    max_waiting_by_key: int = 1024
    max_wait_s: float | None = None
    keeps_room: bool = False


class Place:
    """A place in a lane, until `free`."""

    __slots__ = ("_key", "_lane", "_started")

    def __init__(self, lane: FairLane, key: str) -> None:
        self._lane: FairLane | None = lane
        self._key = key
        self._started = lane.clock()

    def free(self) -> None:
        """Give the place to the next. Does nothing the second time."""
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.give_back(self._key, lane.clock() - self._started)


class FairLane:
    """Places that keys share. `async with lane.place(key):` waits for one and frees it.

    name: what the lane is for, in errors and metrics. weight_of: a key's part, where several wait.
    on_refusal: called with the name when a
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
        self.clock = clock
        self._limits = limits
        self._weight_of = weight_of
        self._shares = FairShares(weight_of)
        self._on_refusal = on_refusal
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        self._running: Counter[str] = Counter()
        self._mean_s = FIRST_GUESS_S

    @property
    def num_running(self) -> int:
        return self._running.total()

    @property
    def num_waiting(self) -> int:
        return sum(len(line) for line in self._lines.values())

    @property
    def num_keys(self) -> int:
        """The number of keys that are remembered; 0 when the lane is idle."""
        return len(self._shares)

    @asynccontextmanager
    async def place(self, key: str, *, is_bounded: bool = True) -> AsyncIterator[None]:
        """Wait for a place, keep it for the block, free it. Raises as `take` does."""
        taken = await self.take(key, is_bounded=is_bounded)
        try:
            yield
        finally:
            taken.free()

    async def run_in_thread(
        self, key: str, function: Callable[[], T], *, is_bounded: bool = True
    ) -> T:
        """The result of a function that a thread runs. Arguments and errors are those of `take`.

        A cancelled caller returns at once; the place is taken until the thread ends.
        """
        taken = await self.take(key, is_bounded=is_bounded)
        context = contextvars.copy_context()
        job = asyncio.get_running_loop().run_in_executor(None, context.run, function)
        job.add_done_callback(lambda done: _end(done, taken))
        try:
            return await asyncio.shield(job)
        finally:
            del job  # a failure refers to this frame: no cycle may keep what the function reads

    async def take(self, key: str, *, is_bounded: bool = True) -> Place:
        """Wait for a place, which the caller frees. Cancelling while waiting costs nothing.

        is_bounded: max_wait_s applies. The second and later pieces of work of one request set it
        to False: the request was admitted with its first.
        Raises OverloadedError at once if the line is full or the wait would be too long, and later
        if it becomes too long.
        """
        limit_s = self._limits.max_wait_s if is_bounded else None
        if not self._can_start(key):
            self._refuse_if_full(key, limit_s)
        self._shares.join(key)
        try:
            await self._wait(key, limit_s)
            return Place(self, key)
        except BaseException:
            self._shares.leave(key)
            raise

    def give_back(self, key: str, used_s: float) -> None:
        """End a piece of work: charge its key, and start the next."""
        self._mean_s += NEWEST * (used_s - self._mean_s)
        self._shares.charge(key, used_s)
        self._free(key)
        self._shares.leave(key)

    def _can_start(self, key: str) -> bool:
        num_free = self._limits.num_places - self.num_running
        if self._limits.keeps_room:
            return self._running[key] < num_free
        return num_free > 0

    def _refuse_if_full(self, key: str, limit_s: float | None) -> None:
        limits, num_own = self._limits, len(self._lines.get(key, ()))
        wait_s = self._wait_s(key)
        if num_own >= limits.max_waiting_by_key:
            raise self._refusal(f"{num_own:,} of this key wait", wait_s)
        if self.num_waiting >= limits.max_waiting:
            raise self._refusal(f"{self.num_waiting:,} wait", wait_s)
        if limit_s is not None and wait_s > limit_s:
            raise self._refusal(
                f"the wait would be about {wait_s:.1f} s, the limit is {limit_s:g} s", wait_s
            )

    def _refusal(self, reason: str, retry_after_s: float) -> OverloadedError:
        """The error for work that is refused, which is counted."""
        self._on_refusal(self.name)
        return OverloadedError(
            f"too much work waits for {self.name}: {reason}. Try again later",
            retry_after_s=retry_after_s,
        )

    def _wait_s(self, key: str) -> float:
        """Seconds until a newcomer of `key` starts, behind its own line and others' turns."""
        own = len(self._lines.get(key, ())) + 1
        turns = own / self._weight_of(key)
        others = sum(
            min(len(line), turns * self._weight_of(other))
            for other, line in self._lines.items()
            if other != key
        )
        return (own + others) * self._mean_s / self._limits.num_places

    async def _wait(self, key: str, limit_s: float | None) -> None:
        """Return with a place."""
        if self._can_start(key):
            self._running[key] += 1
            return
        try:
            async with asyncio.timeout(limit_s):
                await self._stand_in_line(key)
        except TimeoutError:
            reason = f"it waited {limit_s:g} s, the limit"
            raise self._refusal(reason, self._wait_s(key)) from None

    async def _stand_in_line(self, key: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line = self._lines.setdefault(key, deque())
        line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the place came in the same moment
                self._free(key)
            elif turn in self._lines.get(key, ()):
                self._leave_line(key, turn)
            raise

    def _leave_line(self, key: str, turn: asyncio.Future[None]) -> None:
        line = self._lines[key]
        line.remove(turn)
        if not line:
            del self._lines[key]

    def _expected(self, key: str) -> float:
        """What a key has used, with its running work taken to last as long as the mean.

        Without it one key would get every place that comes free before its first work ends. It is
        not charged in advance: a key that joins meanwhile would start at what is then given back.
        """
        return self._shares.used(key) + self._running[key] * self._mean_s / self._weight_of(key)

    def _free(self, key: str) -> None:
        """Give back a place, and start the keys that are next."""
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        while ready := [one for one in self._lines if self._can_start(one)]:
            chosen = min(ready, key=self._expected)
            turn = self._lines[chosen][0]
            self._leave_line(chosen, turn)
            if not turn.cancelled():  # else its task is about to notice
                self._running[chosen] += 1
                turn.set_result(None)


def _end(job: asyncio.Future[T], taken: Place) -> None:
    """Free the place of a thread's work, which may have no caller any more."""
    taken.free()
    if not job.cancelled():
        job.exception()
