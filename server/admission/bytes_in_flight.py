"""A bound on the bytes of bodies and downloads that a worker keeps at once, shared by keys.

Owns the counts. Each key may keep as many bytes as are left free for all (Choudhury and Hahne,
1998: dynamic thresholds). So one key alone gets half of the bound, two keys get a third each, and
what one key keeps never leaves another with nothing. Knows nothing of what the bytes are.
"""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar

from ..errors import OverloadedError

RETRY_AFTER_S = 1.0
MEBI = 1024 * 1024


class BytesInFlight:
    """The bytes of all open requests of a worker."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._by_key: Counter[str] = Counter()
        self.num_bytes = 0

    def reserve(self, key: str) -> Reservation:
        """A reservation of no bytes yet, for one request of `key`."""
        return Reservation(self, key)

    @property
    def num_keys(self) -> int:
        """The number of keys that keep bytes; 0 when no request is open."""
        return len(self._by_key)

    def add(self, key: str, num_bytes: int) -> None:
        """Count bytes of a key. Raises OverloadedError if they are too many."""
        free = self._max_bytes - self.num_bytes - num_bytes
        if self._by_key[key] + num_bytes > free:
            if not self._by_key[key]:
                del self._by_key[key]
            raise OverloadedError(
                f"open requests keep {self.num_bytes // MEBI:,} MiB of bodies and images; the limit"
                f" is {self._max_bytes // MEBI:,} MiB for all and half of it for one API key: try"
                " again later",
                retry_after_s=RETRY_AFTER_S,
            )
        self._by_key[key] += num_bytes
        self.num_bytes += num_bytes

    def free(self, key: str, num_bytes: int) -> None:
        """Stop counting bytes of a key."""
        self.num_bytes -= num_bytes
        self._by_key[key] -= num_bytes
        if not self._by_key[key]:
            del self._by_key[key]


class Reservation:
    """The bytes that one request keeps, until `release`."""

    def __init__(self, owner: BytesInFlight, key: str) -> None:
        self._owner = owner
        self._key = key
        self._is_released = False
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count more bytes. Raises OverloadedError if there is no room for them."""
        if self._is_released:
            return  # a cancelled task's last bytes, which nothing keeps
        self._owner.add(self._key, num_bytes)
        self.num_bytes += num_bytes

    def release(self) -> None:
        """The request is over. Does nothing a second time."""
        if not self._is_released:
            self._is_released = True
            self._owner.free(self._key, self.num_bytes)


_current: ContextVar[Reservation | None] = ContextVar("reservation", default=None)


def set_current_reservation(reservation: Reservation) -> None:
    """Make it the reservation of this task and of the tasks that it starts."""
    _current.set(reservation)


def release_current_reservation() -> None:
    """The request that this task works for is over."""
    reservation = _current.get()
    if reservation is not None:
        reservation.release()
        _current.set(None)


def keep_bytes(num_bytes: int) -> None:
    """Count bytes for the request that this task works for. Raises OverloadedError.

    Does nothing outside of a request.
    """
    reservation = _current.get()
    if reservation is not None:
        reservation.add(num_bytes)
