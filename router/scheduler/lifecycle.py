"""Starts, preempts and ends sequences: the running ones, and what each change of state entails.

Owns the list of running sequences. Decides nothing about a step: `scheduler.py` does, and
`preemption.py` chooses which sequence to preempt. `sequence_states.py` lists the states of a
sequence and the events that change them.

Further answers to a prompt (followers) start when their leader has computed it. They fork: they
share its full blocks, copy its last block, and compute only the prompt's last token. They start
before waiting requests of their owner, because their request runs already. A follower that finds
no room, or another owner's turn, or whose leader ended early, waits like a preempted sequence.
"""

from __future__ import annotations

import bisect
import time

from ...models.batch import BlockCopy
from .block_manager import BlockManager
from .preemption import victim
from .request_queue import RequestQueue
from .sequence import Sequence
from .sequence_states import SequenceEvent, Status


class Lifecycle:
    """Changes the states of sequences. running: ordered by rank, and changed in place."""

    def __init__(self, blocks: BlockManager, queue: RequestQueue, max_num_seqs: int) -> None:
        self.running: list[Sequence] = []
        self._places = queue.places
        self.num_preemptions = 0
        self._blocks = blocks
        self._queue = queue
        self._owners = queue.owners
        self._max_num_seqs = max_num_seqs
        self._started: list[Sequence] = []
        self._copies: dict[Sequence, BlockCopy] = {}

    def take_started(self) -> list[Sequence]:
        """The sequences that ran for the first time since the last call."""
        started, self._started = self._started, []
        return started

    def take_copies(self) -> dict[Sequence, BlockCopy]:
        """The copies of blocks that the next step makes for sequences that were forked."""
        copies, self._copies = self._copies, {}
        return copies

    def run(self, sequence: Sequence, event: SequenceEvent) -> None:
        """Add `sequence` to the running ones. It has its blocks already."""
        sequence.move(event)
        if sequence.ran_at is None:
            sequence.ran_at = time.monotonic()
            self._started.append(sequence)
        self._owners.start(sequence.owner)
        self._places.start(sequence.adapter_digest)
        bisect.insort(self.running, sequence, key=lambda running: running.rank)

    def wait(self, sequence: Sequence, event: SequenceEvent) -> None:
        """Return `sequence` to the queue, at its place by rank."""
        sequence.move(event)
        self._queue.requeue(sequence)

    def fork(self, leader: Sequence) -> None:
        """Start the followers of `leader`, which has just computed its prompt.

        One block stays available for each running sequence, as at admission.
        """
        for follower in _detached(leader):
            has_place = self._has_place_for(follower)
            if not has_place or not self._blocks.can_fork(num_spare=len(self.running)):
                self.wait(follower, SequenceEvent.DETACH)
                continue
            copy = self._blocks.fork(leader, follower)
            if copy is not None:
                self._copies[follower] = copy
            self.run(follower, SequenceEvent.FORK)

    def _has_place_for(self, follower: Sequence) -> bool:
        """True if a place is free, and no other owner that waits has its turn before."""
        if len(self.running) >= self._max_num_seqs:
            return False
        owner = follower.owner
        other = self._queue.peek(lambda waiting: waiting != owner)
        return other is None or self._owners.turn(owner) <= self._owners.turn(other.owner)

    def grow(self, sequence: Sequence) -> None:
        """Allocate a block for the newest token of `sequence`, preempting others if needed.

        The one to preempt may be `sequence` itself: it then waits.
        """
        while not self._blocks.can_grow(sequence):
            last = victim(self.running, self._owners)
            self.preempt(last)
            if last is sequence:
                return
        self._blocks.grow(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Release the blocks of a running sequence; it waits and computes its tokens again."""
        assert not sequence.is_in_step, "a planned sequence is never preempted"
        self._stop(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.wait(sequence, SequenceEvent.PREEMPT)

    def finish(self, sequence: Sequence, event: SequenceEvent) -> None:
        """End a sequence in any state. Its followers, if any, compute the prompt themselves."""
        if sequence.status is Status.RUNNING:
            self._stop(sequence)
        elif sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            if sequence.leader.status is Status.WAITING:
                self._queue.count_ended_follower(sequence.leader)
        else:
            self._queue.remove(sequence)
        sequence.move(event)
        self._owners.close(sequence)
        for follower in _detached(sequence):
            self.wait(follower, SequenceEvent.DETACH)
        # After them: what they want too is not asked for again.
        self._queue.tiles.leave(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """Remove a running sequence and release its blocks."""
        self.running.remove(sequence)
        self._owners.stop(sequence.owner)
        self._places.stop(sequence.adapter_digest)
        self._copies.pop(sequence, None)
        self._blocks.release(sequence)


def _detached(leader: Sequence) -> list[Sequence]:
    """The followers of `leader`, which follow it no longer."""
    followers, leader.followers = leader.followers, []
    for follower in followers:
        follower.leader = None
    return followers
