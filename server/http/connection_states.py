"""The states of one client connection, and the events that move it between them.

Owns the table. `StrictProtocol.advance` applies it. `docs/states.md` shows the table, and a test
compares the two. Knows nothing of sockets or of Sanic. Modelled on h11's `_state.py`.
"""

from __future__ import annotations

from enum import Enum


class ConnectionState(Enum):
    """What a connection is doing. The values are what `docs/states.md` explains."""

    IDLE = "open; no byte of the next request has arrived"
    READING_HEAD = "the request line and the headers are arriving"
    READING_BODY = "the head is accepted; the body is arriving"
    ANSWERING = "the whole request has arrived; its answer is computed and sent"
    REJECTING = "an answer is sent before the whole request was read; it is the last one"
    DRAINING = "lingering close: the answer is sent; what still arrives is read and discarded"
    CLOSED = "closed, or closing as soon as the last bytes are sent"


class ConnectionEvent(Enum):
    """What moves a connection. The values are what `docs/states.md` explains."""

    HEAD_STARTED = "the first byte of a request arrives"
    HEAD_READ = "the head is complete and valid, and a body follows"
    REQUEST_READ = "the request is complete"
    ANSWERED = "the answer is complete, and the connection is kept"
    REJECTED = "the server answers a request that it has not read completely"
    CLOSE = "the server closes the connection"
    LOST = "the client closed the connection, or it broke"


_State, _Event = ConnectionState, ConnectionEvent
_ENDS = {_Event.CLOSE: _State.CLOSED, _Event.LOST: _State.CLOSED}

TRANSITIONS: dict[ConnectionState, dict[ConnectionEvent, ConnectionState]] = {
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
        # Sanic answers a second time if sending the first answer failed.
        _Event.REJECTED: _State.REJECTING,
        _Event.CLOSE: _State.DRAINING,
        _Event.LOST: _State.CLOSED,
    },
    _State.DRAINING: _ENDS,
    _State.CLOSED: {},
}
