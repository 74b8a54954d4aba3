"""The states of one client connection, as a table of transitions.

Owns the states, the events and the table. `protocol.py` moves each connection through it,
a test enumerates it, and docs/states.md shows it. Knows nothing of sockets or of Sanic.
Modelled on h11's `_state.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class ConnectionState(Enum):
    """What a connection is doing. The value is its description in the docs."""

    IDLE = "No byte of the next request has arrived."
    READING_HEAD = "The request line and the headers are arriving."
    READING_BODY = "The head was accepted; the body is arriving."
    ANSWERING = "The whole request has arrived; its answer is computed and sent."
    REJECTING = "An answer goes out before the whole request was read; it is the last one."
    DRAINING = "Lingering close: the answer was sent; what still arrives is read and discarded."
    CLOSED = "The connection is closed, or closes as soon as its last bytes are sent."


class ConnectionEvent(Enum):
    """What moves a connection. The value is its description in the docs."""

    HEAD_STARTED = "The first byte of a request arrived."
    HEAD_READ = "The head is complete and valid, and a body follows."
    REQUEST_READ = "The request is complete."
    ANSWERED = "The answer is complete, and the connection is kept."
    REJECTED = "The server answers a request that it has not read to its end."
    CLOSE = "The server closes the connection."
    LOST = "The client closed the connection, or it broke."


class InvalidTransitionError(RuntimeError):
    """The protocol reported an event that its state does not allow: a defect of the server."""


_State, _Event = ConnectionState, ConnectionEvent
_ENDS = {_Event.CLOSE: _State.CLOSED, _Event.LOST: _State.CLOSED}

# Every pair that may occur. An event that a state does not list is a defect.
TRANSITIONS: Mapping[ConnectionState, Mapping[ConnectionEvent, ConnectionState]] = {
    _State.IDLE: {
        _Event.HEAD_STARTED: _State.READING_HEAD,
        _Event.REJECTED: _State.REJECTING,
        **_ENDS,
    },
    _State.READING_HEAD: {
        _Event.HEAD_READ: _State.READING_BODY,
        _Event.REQUEST_READ: _State.ANSWERING,
        _Event.REJECTED: _State.REJECTING,
        **_ENDS,
    },
    _State.READING_BODY: {
        _Event.REQUEST_READ: _State.ANSWERING,
        _Event.REJECTED: _State.REJECTING,
        **_ENDS,
    },
    _State.ANSWERING: {_Event.ANSWERED: _State.IDLE, **_ENDS},
    _State.REJECTING: {
        # Sanic answers a second time where sending the first answer failed.
        _Event.REJECTED: _State.REJECTING,
        _Event.CLOSE: _State.DRAINING,
        _Event.LOST: _State.CLOSED,
    },
    _State.DRAINING: _ENDS,
    # A handler may still be at work for a client that has left: its events change nothing.
    _State.CLOSED: dict.fromkeys(_Event, _State.CLOSED),
}


def next_state(state: ConnectionState, event: ConnectionEvent) -> ConnectionState:
    """The state after `event`. Raises InvalidTransitionError if the table lists no such pair."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise InvalidTransitionError(
            f"a connection cannot take the event {event.name} in the state {state.name}"
        ) from None


def transition_table() -> str:
    """The table in Markdown, as docs/states.md shows it."""
    states = [f"| `{state.name}` | {state.value} |" for state in ConnectionState]
    events = [f"| `{event.name}` | {event.value} |" for event in ConnectionEvent]
    rows = [
        f"| `{state.name}` | `{event.name}` | `{target.name}` |"
        for state, targets in TRANSITIONS.items()
        for event, target in targets.items()
        if state is not ConnectionState.CLOSED
    ]
    return "\n".join(
        [
            *("| state | meaning |", "|---|---|", *states, ""),
            *("| event | meaning |", "|---|---|", *events, ""),
            *("| in | on | goes to |", "|---|---|---|", *rows),
        ]
    )
