"""The sequences that wait for their first step, or for their next step after preemption.

Owns their order (by priority, then first in, first out) and the limits on requests, prompt tokens
and image bytes. Knows nothing of blocks, steps or workers.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import QueueFullError
from .sequence import Sequence
from .throughput import WaitEstimator


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait at once."""

    max_requests: int
    max_tokens: int
    max_bytes: int


class RequestQueue:
    """A bounded queue with one asyncio reader.

    `put` never waits: it accepts or rejects the request, so the client gets its answer at once. A
    sequence whose grammar is still being compiled counts toward the limits and keeps its place,
    but cannot run before `make_ready`. wait_estimator: gives a rejected client its retry time.
    """

    def __init__(self, limits: QueueLimits, wait_estimator: WaitEstimator | None = None) -> None:
        self._limits = limits
        self._wait_estimator = wait_estimator or WaitEstimator()
        self._ready: list[Sequence] = []  # by rank
        self._unready: set[Sequence] = set()
        self._num_arrivals = 0
        self._has_ready = asyncio.Event()
        self.num_tokens = 0
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._ready) + len(self._unready)

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences: those that can run by rank, then the others."""
        yield from self._ready
        yield from self._unready

    def num_ahead(self, priority: int) -> int:
        """How many waiting answers would run before a new request of this priority."""
        ahead = (sequence for sequence in self if sequence.request.priority <= priority)
        return sum(1 + len(sequence.followers) for sequence in ahead)

    def put(self, sequence: Sequence) -> None:
        """Add `sequence` after all of its priority. Raises QueueFullError, naming the limit.

        Its followers count as requests; they join the queue only if they cannot fork. An empty
        queue accepts any sequence, since a larger one could otherwise never run.
        """
        self.reject_if_full(1 + len(sequence.followers))
        self._reject_over(
            "prompt tokens",
            self.num_tokens + sequence.num_tokens,
            self._limits.max_tokens,
            "--max-queue-tokens",
        )
        self._reject_over(
            "image bytes",
            self.num_bytes + sequence.num_image_bytes,
            self._limits.max_bytes,
            "--max-queue-bytes",
        )
        self._num_arrivals += 1
        for answer in (sequence, *sequence.followers):
            answer.arrival = self._num_arrivals
        self.requeue(sequence)

    def reject_if_full(self, num_more: int = 1) -> None:
        """Raises QueueFullError if this many more requests exceed the limit."""
        num_waiting = sum(1 + len(sequence.followers) for sequence in self)
        limit = self._limits.max_requests
        self._reject_over("requests", num_waiting + num_more, limit, "--max-queue-requests")

    def requeue(self, sequence: Sequence) -> None:
        """Add an accepted sequence at its place by rank, whatever the limits."""
        self.num_tokens += sequence.num_tokens
        self.num_bytes += sequence.num_image_bytes
        if sequence.lacks_matcher:
            self._unready.add(sequence)
        else:
            self._add_ready(sequence)

    def peek(self) -> Sequence | None:
        """The sequence that runs next, or None if none can run yet."""
        return self._ready[0] if self._ready else None

    def remove(self, sequence: Sequence) -> None:
        """Remove `sequence`, wherever it is in the queue."""
        self.num_tokens -= sequence.num_tokens
        self.num_bytes -= sequence.num_image_bytes
        if sequence in self._unready:
            self._unready.remove(sequence)
            return
        self._ready.remove(sequence)
        if not self._ready:
            self._has_ready.clear()

    def make_ready(self, sequence: Sequence) -> None:
        """Let `sequence` run: it has its matcher now."""
        self._unready.remove(sequence)
        self._add_ready(sequence)

    async def wait(self) -> None:
        """Return when a sequence can run."""
        await self._has_ready.wait()

    def _add_ready(self, sequence: Sequence) -> None:
        bisect.insort(self._ready, sequence, key=lambda waiting: waiting.rank)
        self._has_ready.set()

    def _reject_over(self, what: str, wanted: int, limit: int, option: str) -> None:
        if len(self) and wanted > limit:
            raise QueueFullError(
                f"the queue is full: with this request {wanted:,} {what} would wait, the limit is "
                f"{limit:,}. Try again later or start the server with a larger {option}",
                self._wait_estimator.seconds_for(self.num_tokens),
            )
