"""The states of a supervised child, an engine or an HTTP worker, and the events between them.

`ChildSlot.move` in `supervisor.py` applies the table. `docs/states.md` shows it, and a test
compares the two.
"""

from __future__ import annotations

from enum import Enum


class ChildState(Enum):
    """Where a child is in its life. The values are what `docs/states.md` explains."""

    STARTING = "the process starts: it imports its code, and an engine loads the model"
    SERVING = "an engine has loaded its model; a worker has run for 3 seconds"
    ENDED = "the process has ended, or it hung and was killed; a restart is due"
    SUSPENDED = "an engine ended too often while others serve: no restart for five minutes"
    FAILED = "the supervisor gave up: the server exits with code 1"
    STOPPED = "the server stops"


class ChildEvent(Enum):
    """What moves a child. The values are what `docs/states.md` explains."""

    READY = "an engine reports that it is ready (again after a lost connection); a worker ran 3 s"
    END = "the process exits, hangs and is killed, or the system cannot start it"
    RESTART = "the pause is over, and a new process starts"
    SUSPEND = "the engine used up its restarts, and another engine is not suspended"
    GIVE_UP = "no restart is left, or the first start failed: an error that a restart cannot fix"
    STOP = "SIGINT or SIGTERM, or another child failed"


TRANSITIONS: dict[ChildState, dict[ChildEvent, ChildState]] = {
    ChildState.STARTING: {
        ChildEvent.READY: ChildState.SERVING,
        ChildEvent.END: ChildState.ENDED,
        ChildEvent.STOP: ChildState.STOPPED,
    },
    ChildState.SERVING: {
        ChildEvent.READY: ChildState.SERVING,
        ChildEvent.END: ChildState.ENDED,
        ChildEvent.STOP: ChildState.STOPPED,
    },
    ChildState.ENDED: {
        ChildEvent.RESTART: ChildState.STARTING,
        ChildEvent.SUSPEND: ChildState.SUSPENDED,
        ChildEvent.GIVE_UP: ChildState.FAILED,
        ChildEvent.STOP: ChildState.STOPPED,
    },
    ChildState.SUSPENDED: {
        ChildEvent.RESTART: ChildState.STARTING,
        ChildEvent.STOP: ChildState.STOPPED,
    },
    ChildState.FAILED: {},
    ChildState.STOPPED: {},
}
