"""The requests that wait for their first step, or for their next after preemption.

Owns the order (by priority, then first in, first out) and the limits by count,
prompt tokens and image bytes. Knows nothing of blocks, steps or workers.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import QueueFullError
from .sequence import Sequence
from .throughput import Pace


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait at once."""

    max_requests: int
    max_tokens: int
    max_bytes: int


class RequestQueue:
    """A bounded asyncio queue of sequences that only its reader waits for.

    `put` never waits: it takes the request or refuses it, so the client hears at once.
    A sequence whose grammar is still being compiled counts like any other and keeps its
    place, but its turn comes only after `let_on`. pace: tells a refused client when to come back.
    """

    def __init__(self, limits: QueueLimits, pace: Pace | None = None) -> None:
        self._limits = limits
        self._pace = pace or Pace()
        self._ready: list[Sequence] = []  # by rank
        self._unready: set[Sequence] = set()
        self._num_arrivals = 0
        self._has_ready = asyncio.Event()
        self.num_tokens = 0
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._ready) + len(self._unready)

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, in no order that matters."""
        yield from self._ready
        yield from self._unready

    def num_ahead(self, priority: int) -> int:
        """How many answers wait that would run before a newcomer of this priority."""
        ahead = (one for one in self if one.request.priority <= priority)
        return sum(1 + len(one.followers) for one in ahead)

    def put(self, sequence: Sequence) -> None:
        """Take `sequence` behind all of its priority. Raises QueueFullError, naming the limit.

        Its followers count as requests; they wait outside until their prompt is computed.
        An empty queue takes any sequence: what came alone would else be refused for ever.
        """
        self.refuse_if_full(1 + len(sequence.followers))
        self._refuse_over(
            "prompt tokens",
            self.num_tokens + sequence.num_tokens,
            self._limits.max_tokens,
            "--max-queue-tokens",
        )
        self._refuse_over(
            "image bytes",
            self.num_bytes + sequence.num_image_bytes,
            self._limits.max_bytes,
            "--max-queue-bytes",
        )
        self._num_arrivals += 1
        for one in (sequence, *sequence.followers):
            one.arrival = self._num_arrivals
        self._insert(sequence)

    def refuse_if_full(self, num_more: int = 1) -> None:
        """Raises QueueFullError if so many more requests are too many."""
        num_waiting = sum(1 + len(one.followers) for one in self)
        limit = self._limits.max_requests
        self._refuse_over("requests", num_waiting + num_more, limit, "--max-queue-requests")

    def put_back(self, sequence: Sequence) -> None:
        """Take a preempted sequence, or a follower, to its place by arrival.

        It was accepted before: no limit.
        """
        self._insert(sequence)

    def peek(self) -> Sequence | None:
        """The sequence whose turn it is, or None where none may run yet."""
        return self._ready[0] if self._ready else None

    def remove(self, sequence: Sequence) -> None:
        """Take `sequence` out, from wherever it stands."""
        self.num_tokens -= sequence.num_tokens
        self.num_bytes -= sequence.num_image_bytes
        if sequence in self._unready:
            self._unready.remove(sequence)
            return
        self._ready.remove(sequence)
        if not self._ready:
            self._has_ready.clear()

    def let_on(self, sequence: Sequence) -> None:
        """Let `sequence`, which has its matcher now, take its turn."""
        self._unready.remove(sequence)
        self._line_up(sequence)

    async def wait(self) -> None:
        """Return when some sequence's turn has come."""
        await self._has_ready.wait()

    def _insert(self, sequence: Sequence) -> None:
        self.num_tokens += sequence.num_tokens
        self.num_bytes += sequence.num_image_bytes
        if sequence.lacks_matcher:
            self._unready.add(sequence)
        else:
            self._line_up(sequence)

    def _line_up(self, sequence: Sequence) -> None:
        bisect.insort(self._ready, sequence, key=lambda one: one.rank)
        self._has_ready.set()

    def _refuse_over(self, what: str, wanted: int, limit: int, option: str) -> None:
        if len(self) and wanted > limit:
            raise QueueFullError(
                f"the queue is full: with this request {wanted:,} {what} would wait, the limit is "
                f"{limit:,}. Try again later or start the server with a larger {option}",
                self._pace.seconds_for(self.num_tokens),
            )
