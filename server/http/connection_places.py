"""Which connections a worker keeps, and which one it closes when it has no place for another.

Owns the places: most are for any request, a few serve health checks only when the others are
taken. A connection that still owes the server a request is closed first, the one that owes it for
the longest time before all others. So a client that opens connections and sends nothing on them
delays only itself. Knows nothing of sockets or of HTTP.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

# Beside `max_connections`: for health checks, and for connections that close softly.
NUM_RESERVED_PLACES = 16
MAX_LINGERING = 128
# Of --metrics-port, in all.
NUM_PROBE_PLACES = 32


class Connection(Hashable, Protocol):
    """What the places need of a connection."""

    def evict(self) -> None:
        """Close the connection, because another one needs its place."""


class ConnectionPlaces:
    """The places of one worker.

    max_connections: for any request. num_reserved: for health checks, beside the others.
    max_lingering: connections without a place that may still be closed softly.
    """

    def __init__(self, max_connections: int, num_reserved: int, max_lingering: int) -> None:
        self._limit = max_connections
        self._num_reserved = num_reserved
        self._max_lingering = max_lingering
        self._open: set[Connection] = set()
        self._reserved: set[Connection] = set()
        self._lingering: set[Connection] = set()
        # Ordered by when the server started to wait for a request, or for its next part.
        self._waiting: dict[Connection, None] = {}

    def enter(self, connection: Connection) -> bool:
        """Give a new connection a place. False if there is none, not even a reserved one."""
        if self._has_room(self._open, self._limit):
            self._open.add(connection)
        elif self._has_room(self._reserved, self._num_reserved):
            self._reserved.add(connection)
        else:
            return False
        self.expect(connection)
        return True

    def is_reserved(self, connection: Connection) -> bool:
        """Whether the connection may only check the health."""
        return connection in self._reserved

    def promote(self, connection: Connection) -> bool:
        """Move a connection from a reserved place to one for any request, if there is one."""
        if not self._has_room(self._open, self._limit):
            return False
        self._reserved.discard(connection)
        self._open.add(connection)
        return True

    def expect(self, connection: Connection) -> None:
        """From now on the connection owes the server a request, or the next part of it."""
        self._waiting.pop(connection, None)
        if connection in self._open or connection in self._reserved:
            self._waiting[connection] = None

    def serve(self, connection: Connection) -> None:
        """The server has the whole request: the connection keeps its place until the answer."""
        self._waiting.pop(connection, None)

    def leave(self, connection: Connection) -> None:
        """Free the connection's place."""
        self._waiting.pop(connection, None)
        self._open.discard(connection)
        self._reserved.discard(connection)
        self._lingering.discard(connection)

    def linger(self, connection: Connection) -> bool:
        """Free the place of a connection that closes softly. False: close it at once."""
        self.leave(connection)
        if len(self._lingering) >= self._max_lingering:
            return False
        self._lingering.add(connection)
        return True

    def _has_room(self, places: set[Connection], limit: int) -> bool:
        """Whether a place is free, after closing a connection for it if need be."""
        if len(places) < limit:
            return True
        victim = next((one for one in self._waiting if one in places), None)
        if victim is None:
            return False
        self.leave(victim)
        victim.evict()
        return True
