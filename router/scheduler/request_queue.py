"""The sequences that wait for their first step, or for their next step after preemption.

Owns one line for each owner (by priority, then first in, first out), whose turn it is, and the
limits on requests, prompt tokens and image bytes. Knows nothing of blocks, steps or workers.

Owners share the limits: the whole queue belongs to an owner that is alone. While others wait, each
may wait up to its part of a limit by weight, even if the others fill the queue, and at least with
one request. So `n` owners with equal weights keep at most limit * (1 + 1/2 + ... + 1/n) waiting.
"""

from __future__ import annotations

import asyncio
import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..blocks.adapter_places import AdapterPlaces
from ..blocks.image_pool import ImageKey, ImagePool
from ..blocks.tile_store import TileStore
from ..errors import QueueFullError
from ..messages import ImagePiece
from .owners import Owners
from .sequence import Sequence
from .throughput import WaitEstimator


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait at once."""

    max_requests: int
    max_tokens: int
    max_bytes: int


@dataclass(slots=True)
class Amounts:
    """How much waits: answers with their followers, tokens, image bytes and images."""

    num_answers: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_images: int = 0

    def add(self, sequence: Sequence, times: int = 1) -> None:
        """Add what this sequence counts for; times=-1 subtracts it."""
        self.num_answers += times * (1 + len(sequence.followers))
        self.num_tokens += times * sequence.num_tokens
        self.num_bytes += times * sequence.num_image_bytes
        self.num_images += times * len(sequence.request.images)


@dataclass(slots=True)
class Line:
    """The waiting sequences of one owner. ready: those that can run, by rank."""

    ready: list[Sequence] = field(default_factory=list)
    unready: set[Sequence] = field(default_factory=set)
    amounts: Amounts = field(default_factory=Amounts)

    def __len__(self) -> int:
        return len(self.ready) + len(self.unready)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.ready
        yield from self.unready

    def first(self, can_start: Callable[[str], bool]) -> Sequence | None:
        """The first that can run and whose adapter can start."""
        return next((one for one in self.ready if can_start(one.adapter_digest)), None)


class RequestQueue:
    """A bounded queue with one asyncio reader.

    `put` never waits: it accepts or rejects the request, so the client gets its answer at once. A
    sequence whose grammar is still being compiled, whose adapter is being read, or whose images are
    on their way, counts toward the limits and keeps its place, but cannot run before `make_ready`;
    others pass it. wait_estimator: gives a rejected client its retry time.
    owners: the owners of all open sequences, running ones included. tiles: asks for images that
    sequences lack; places: of adapters; the scheduler sets both.
    """

    def __init__(self, limits: QueueLimits, wait_estimator: WaitEstimator | None = None) -> None:
        self._limits = limits
        self._wait_estimator = wait_estimator or WaitEstimator()
        self._lines: dict[str, Line] = {}
        self._total = Amounts()
        self._num_waiting = 0
        self._num_ready = 0
        self._num_arrivals = 0
        self._has_ready = asyncio.Event()
        self.owners = Owners()
        self.tiles: TileStore[Sequence] = TileStore(ImagePool(0))
        self.places = AdapterPlaces(0)

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, owner by owner: those that can run by rank, then the others."""
        for line in self._lines.values():
            yield from line

    @property
    def num_tokens(self) -> int:
        return self._total.num_tokens

    @property
    def num_bytes(self) -> int:
        return self._total.num_bytes

    @property
    def has_ready(self) -> bool:
        """True if a sequence can run."""
        return self._num_ready > 0

    @property
    def lines(self) -> dict[str, Line]:
        """The owners that wait, with their lines."""
        return self._lines

    # Adding

    def put(self, sequence: Sequence) -> None:
        """Add `sequence` after all of its owner's priority. Raises QueueFullError with the limit.

        Its followers count as requests; they join the queue only if they cannot fork.
        """
        self._reject_if_over(sequence)
        self._num_arrivals += 1
        for answer in (sequence, *sequence.followers):
            answer.arrival = self._num_arrivals
            self.owners.open(answer)
        self.requeue(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """Add an accepted sequence at its place by rank, whatever the limits."""
        line = self._lines.get(sequence.owner)
        if line is None:
            line = self._lines[sequence.owner] = Line()
            self.owners.begin_waiting(sequence.owner)
        line.amounts.add(sequence)
        self._total.add(sequence)
        self._num_waiting += 1
        self._want(sequence)
        if sequence.may_run:
            self._add_ready(line, sequence)
        else:
            line.unready.add(sequence)

    def make_ready(self, sequence: Sequence) -> None:
        """Let `sequence` run if it has its matcher, its adapter and its images now."""
        self._want(sequence)
        line = self._lines[sequence.owner]
        if sequence.may_run:
            line.unready.remove(sequence)
            self._add_ready(line, sequence)

    def receive(self, worker_id: int, piece: ImagePiece) -> None:
        """Take a piece of an image that was asked for. Raises MalformedFrameError."""
        for sequence in self.tiles.receive(worker_id, piece):
            self.make_ready(sequence)

    def take_stored(self, key: ImageKey, data: memoryview | None) -> None:
        """Take what host memory has of an image; None: it must be encoded."""
        for sequence in self.tiles.take_stored(key, data):
            self.make_ready(sequence)

    def _want(self, sequence: Sequence) -> None:
        """Ask for images that are lacking. Their keys are known when the adapter is."""
        if not sequence.lacks_adapter:
            self.tiles.want(sequence)

    def _add_ready(self, line: Line, sequence: Sequence) -> None:
        bisect.insort(line.ready, sequence, key=lambda waiting: waiting.rank)
        self._num_ready += 1
        self._has_ready.set()

    def _remove_ready(self, line: Line, sequence: Sequence) -> None:
        line.ready.remove(sequence)
        self._num_ready -= 1
        if not self._num_ready:
            self._has_ready.clear()

    # Taking

    def next(self, may_go: Callable[[str], bool]) -> Sequence | None:
        """As `peek`; and if the first in order lacks a place for its adapter, another closes."""
        first = self._head(may_go, lambda adapter: True)
        if first is not None and self.places.can_start(first.adapter_digest):
            self.places.keep_all()
        elif first is not None:
            self.places.make_way(first.adapter_digest)
        return self.peek(may_go)

    def peek(self, may_go: Callable[[str], bool] = lambda owner: True) -> Sequence | None:
        """The sequence that runs next, or None if none can run yet.

        may_go: whether an owner may be chosen. The head of the owner whose turn it is goes first,
        unless a key that may cross owners gave another head a better priority. A sequence whose
        adapter lacks a place is passed. One whose cached images were evicted is set aside, and they
        are asked for.
        """
        while (head := self._head(may_go, self.places.can_start)) and self.tiles.want(head):
            line = self._lines[head.owner]
            self._remove_ready(line, head)
            line.unready.add(head)
        return head

    def _head(
        self, may_go: Callable[[str], bool], can_start: Callable[[str], bool]
    ) -> Sequence | None:
        found = (line.first(can_start) for owner, line in self._lines.items() if may_go(owner))
        heads = [head for head in found if head is not None]
        if len(heads) < 2:
            return heads[0] if heads else None
        return min(heads, key=self._turn)

    def _turn(self, head: Sequence) -> tuple[float, ...]:
        return head.level, *self.owners.turn(head.owner), head.arrival

    def remove(self, sequence: Sequence) -> None:
        """Remove `sequence`, wherever it is in the queue."""
        line = self._lines[sequence.owner]
        if sequence in line.unready:
            line.unready.remove(sequence)
        else:
            self._remove_ready(line, sequence)
        line.amounts.add(sequence, times=-1)
        self._total.add(sequence, times=-1)
        self._num_waiting -= 1
        if not line:
            del self._lines[sequence.owner]

    def count_ended_follower(self, leader: Sequence) -> None:
        """A follower of this waiting sequence has ended: it counts no longer."""
        self._lines[leader.owner].amounts.num_answers -= 1
        self._total.num_answers -= 1

    async def wait(self) -> None:
        """Return when a sequence can run."""
        await self._has_ready.wait()

    # Limits

    def position(self, owner: str, weight: float, priority: int) -> int:
        """Where a new request of this owner would stand, from 1, counted in answers.

        Before it run those of its owner's line with its priority or a better one, and meanwhile
        the other owners' turns by their weights.
        """
        own = [one for one in self._lines.get(owner, ()) if one.request.priority <= priority]
        position = 1 + sum(1 + len(sequence.followers) for sequence in own)
        turns = position / weight
        others = (
            min(line.amounts.num_answers, math.ceil(turns * self.owners.weight(other)))
            for other, line in self._lines.items()
            if other != owner
        )
        return position + sum(others)

    def reject_if_full(self, owner: str, weight: float = 1.0, num_more: int = 1) -> None:
        """Raises QueueFullError if this owner may not wait with this many more answers."""
        own = self._lines.get(owner, Line()).amounts
        limit = self._limits.max_requests
        wanted, wanted_own = self._total.num_answers + num_more, own.num_answers + num_more
        self._reject_over(
            owner, weight, "requests", wanted, wanted_own, limit, "--max-queue-requests"
        )

    def _reject_if_over(self, sequence: Sequence) -> None:
        owner, weight, limits = sequence.owner, sequence.request.policy.weight, self._limits
        total, own = self._total, self._lines.get(owner, Line()).amounts
        self.reject_if_full(owner, weight, 1 + len(sequence.followers))
        more = sequence.num_tokens
        self._reject_over(
            owner, weight, "prompt tokens", total.num_tokens + more, own.num_tokens + more,
            limits.max_tokens, "--max-queue-tokens",
        )  # fmt: skip
        more = sequence.num_image_bytes
        self._reject_over(
            owner, weight, "image bytes", total.num_bytes + more, own.num_bytes + more,
            limits.max_bytes, "--max-queue-bytes",
        )  # fmt: skip

    def _reject_over(
        self, owner: str, weight: float, what: str, wanted: int, own: int, limit: int, option: str
    ) -> None:
        """wanted, own: what would wait with the request, of all owners and of this one."""
        if wanted <= limit or owner not in self._lines:
            # An owner without a waiting request may always add one: it could else never run.
            return
        others = sum(self.owners.weight(other) for other in self._lines if other != owner)
        if others and own <= limit * weight / (weight + others):
            return
        of_own = f", {own:,} of them of this API key" if others else ""
        raise QueueFullError(
            f"the queue is full: with this request {wanted:,} {what} would wait{of_own}, the "
            f"limit is {limit:,}. Try again later or start the server with a larger {option}",
            self._wait_estimator.seconds_for(self.num_tokens),
        )
