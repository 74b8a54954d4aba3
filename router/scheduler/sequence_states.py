"""The states of a sequence, and the events that move it between them.

Owns the table. `Sequence.move` applies it; the scheduler names the events.
`docs/explanation/states.md` shows the table, and a test compares the two.
"""

from __future__ import annotations

from enum import Enum


class Status(Enum):
    """Where a sequence is. The values are what `docs/explanation/states.md` explains."""

    FOLLOWING = "another answer to a prompt that its leader computes for both"
    WAITING = "in the request queue, without blocks"
    RUNNING = "in the scheduler's batch, with blocks for all its tokens and images"
    FINISHED = "over; its blocks are released"


class SequenceEvent(Enum):
    """What moves a sequence. The values are what `docs/explanation/states.md` explains."""

    FORK = "its leader computed the prompt, and there is room: it shares the leader's blocks"
    DETACH = "its leader ended early, or there is no room to fork: it computes the prompt itself"
    ADMIT = "the scheduler takes it from the queue and allocates its blocks"
    PREEMPT = "another sequence needs a block or its place: its own blocks are released"
    FINISH = "it generated a stop token or reached its maximum length"
    ABORT = "the client cancelled it, its worker disconnected or its grammar failed to compile"
    FAIL = "the step that computed it failed"


TRANSITIONS: dict[Status, dict[SequenceEvent, Status]] = {
    Status.FOLLOWING: {
        SequenceEvent.FORK: Status.RUNNING,
        SequenceEvent.DETACH: Status.WAITING,
        SequenceEvent.ABORT: Status.FINISHED,
    },
    Status.WAITING: {
        SequenceEvent.ADMIT: Status.RUNNING,
        SequenceEvent.ABORT: Status.FINISHED,
    },
    Status.RUNNING: {
        SequenceEvent.PREEMPT: Status.WAITING,
        SequenceEvent.FINISH: Status.FINISHED,
        SequenceEvent.ABORT: Status.FINISHED,
        SequenceEvent.FAIL: Status.FINISHED,
    },
    Status.FINISHED: {},
}
