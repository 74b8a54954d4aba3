"""Stores responses for their owners in SQLite, bounded in bytes and in time.

Owns the database, in memory or in a file that several workers share. An owner is a key's digest:
other keys cannot read, continue or delete a response. Knows nothing of a response's content:
input items and the response are JSON.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

T = TypeVar("T")

IN_MEMORY = ":memory:"
# Maximum number of earlier responses in a conversation.
MAX_CHAIN = 1_000
BUSY_TIMEOUT_S = 10.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    owner TEXT NOT NULL,
    id TEXT NOT NULL,
    previous TEXT,
    expires REAL NOT NULL,
    num_bytes INTEGER NOT NULL,
    input BLOB NOT NULL,
    response BLOB NOT NULL,
    PRIMARY KEY (owner, id)
);
CREATE INDEX IF NOT EXISTS by_expiry ON responses (expires);
"""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """input: the request's input items as JSON. response: the whole response as JSON."""

    id: str
    previous: str | None
    input: bytes
    response: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.input) + len(self.response)


class StoreError(Exception):
    """The database cannot be used; the message is one line for the operator."""


class ResponseStore:
    """Responses by owner and id. Every call runs in a thread, and raises StoreError if it fails.

    file: the database; IN_MEMORY lasts as long as the process. max_bytes: limit for all responses;
    above it, the oldest response of the largest owner is deleted. ttl_s: lifetime of a response.
    """

    def __init__(
        self,
        file: str | Path,
        max_bytes: int,
        ttl_s: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Raises StoreError."""
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._now = now
        self._lock = Lock()
        self._file = str(file)
        try:
            self._db = sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
            if str(file) != IN_MEMORY:
                self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise self._error(error) from error

    async def put(self, owner: str, stored: StoredResponse) -> bool:
        """Store a response; False if it is larger than max_bytes and was not stored."""
        return await self._run(lambda: self._put(owner, stored))

    async def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """The response; None if this owner has no such response, or no longer."""
        return await self._run(lambda: self._get(owner, response_id))

    async def chain(self, owner: str, response_id: str) -> list[StoredResponse] | None:
        """The response and all before it, oldest first; None if one of them is missing."""
        return await self._run(lambda: self._chain(owner, response_id))

    async def delete(self, owner: str, response_id: str) -> bool:
        """Delete a response. Returns whether it existed."""
        return await self._run(lambda: self._delete(owner, response_id))

    async def num_bytes(self) -> int:
        """The size of all responses."""
        return await self._run(self._num_bytes)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    async def _run(self, work: Callable[[], T]) -> T:
        def locked() -> T:
            with self._lock, self._db:
                return work()

        try:
            return await asyncio.to_thread(locked)
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _error(self, error: sqlite3.Error) -> StoreError:
        return StoreError(f"the responses' store {self._file!r} cannot be used: {error}")

    def _put(self, owner: str, stored: StoredResponse) -> bool:
        now = self._now()
        self._db.execute("DELETE FROM responses WHERE expires <= ?", (now,))
        if stored.num_bytes > self._max_bytes:
            return False
        row = (owner, stored.id, stored.previous, now + self._ttl_s, stored.num_bytes)
        self._db.execute(
            "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*row, stored.input, stored.response),
        )
        while self._num_bytes() > self._max_bytes:
            self._evict(stored.id)
        return True

    def _evict(self, newest: str) -> None:
        """Delete the oldest response of the owner with the most bytes, never the newest."""
        self._db.execute(
            "DELETE FROM responses WHERE rowid = (SELECT rowid FROM responses WHERE id != ? AND"
            " owner = (SELECT owner FROM responses WHERE id != ? GROUP BY owner"
            " ORDER BY SUM(num_bytes) DESC LIMIT 1) ORDER BY expires, rowid LIMIT 1)",
            (newest, newest),
        )

    def _num_bytes(self) -> int:
        [total] = self._db.execute("SELECT COALESCE(SUM(num_bytes), 0) FROM responses").fetchone()
        return int(total)

    def _get(self, owner: str, response_id: str) -> StoredResponse | None:
        row = self._db.execute(
            "SELECT id, previous, input, response FROM responses"
            " WHERE owner = ? AND id = ? AND expires > ?",
            (owner, response_id, self._now()),
        ).fetchone()
        return None if row is None else StoredResponse(*row)

    def _chain(self, owner: str, response_id: str) -> list[StoredResponse] | None:
        found: list[StoredResponse] = []
        next_id: str | None = response_id
        while next_id is not None:
            stored = self._get(owner, next_id)
            if stored is None or len(found) == MAX_CHAIN:
                return None
            found.append(stored)
            next_id = stored.previous
        return found[::-1]

    def _delete(self, owner: str, response_id: str) -> bool:
        deleted = self._db.execute(
            "DELETE FROM responses WHERE owner = ? AND id = ?", (owner, response_id)
        )
        return deleted.rowcount > 0
