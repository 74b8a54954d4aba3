"""The requests that wait for their first step, or for their next after preemption.

Owns the order (by priority, then first in, first out) and the limits by count,
prompt tokens and image bytes. Knows nothing of blocks, steps or workers.
"""

from __future__ import annotations

import asyncio
import bisect
from dataclasses import dataclass

from .errors import QueueFullError
from .pace import Pace
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait at once."""

    max_requests: int
    max_tokens: int
    max_bytes: int


class RequestQueue:
    """A bounded asyncio queue of sequences that only its reader waits for.

    `put` never waits: it takes the request or refuses it, so the client hears at once.
    pace: tells a refused client when to come back.
    """

    def __init__(self, limits: QueueLimits, pace: Pace | None = None) -> None:
        self._limits = limits
        self._pace = pace or Pace()
        self._sequences: list[Sequence] = []
        self._num_arrivals = 0
        self._not_empty = asyncio.Event()
        self.num_tokens = 0
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def num_ahead(self, priority: int) -> int:
        """How many answers wait that would run before a newcomer of this priority."""
        ahead = (one for one in self._sequences if one.request.priority <= priority)
        return sum(1 + len(one.followers) for one in ahead)

    def put(self, sequence: Sequence) -> None:
        """Take `sequence` behind all of its priority. Raises QueueFullError, naming the limit.

        Its followers count as requests; they wait outside until their prompt is computed.
        An empty queue takes any sequence: what came alone would else be refused for ever.
        """
        self._refuse_over(
            "requests",
            sum(1 + len(one.followers) for one in (*self._sequences, sequence)),
            self._limits.max_requests,
            "--max-queue-requests",
        )
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

    def put_back(self, sequence: Sequence) -> None:
        """Take a preempted sequence, or a follower, to its place by arrival.

        It was accepted before: no limit.
        """
        self._insert(sequence)

    def peek(self) -> Sequence | None:
        """The sequence whose turn it is, or None."""
        return self._sequences[0] if self._sequences else None

    def remove(self, sequence: Sequence) -> None:
        """Take `sequence` out, from wherever it stands."""
        self._sequences.remove(sequence)
        self.num_tokens -= sequence.num_tokens
        self.num_bytes -= sequence.num_image_bytes
        if not self._sequences:
            self._not_empty.clear()

    async def wait(self) -> None:
        """Return when the queue is not empty."""
        await self._not_empty.wait()

    def _insert(self, sequence: Sequence) -> None:
        bisect.insort(self._sequences, sequence, key=lambda one: one.rank)
        self.num_tokens += sequence.num_tokens
        self.num_bytes += sequence.num_image_bytes
        self._not_empty.set()

    def _refuse_over(self, what: str, wanted: int, limit: int, option: str) -> None:
        if self._sequences and wanted > limit:
            raise QueueFullError(
                f"the queue is full: with this request {wanted:,} {what} would wait, the limit is "
                f"{limit:,}. Try again later or start the server with a larger {option}",
                self._pace.seconds_for(self.num_tokens),
            )
