"""Which adapters may run at once: as many as there are places for their weights.

Owns how many running sequences use each adapter, and which adapter ends to make way for another.
Knows adapters by their digests only; knows nothing of weights, of sequences or of their order.

An adapter has a place while a sequence that uses it runs. So an adapter whose requests never stop
would keep its place for ever. If the first request in the queue's order lacks a place, one adapter
closes: none of its waiting requests start, so its running ones are its last, and its place is free
when they end. Requests of the other adapters, and of the base model, go on meanwhile.
"""

from __future__ import annotations

from collections import Counter


class AdapterPlaces:
    """Counts the running sequences of each adapter. The digest "" is the base model, which needs
    no place.
    """

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._num_running: Counter[str] = Counter()
        self._closing = ""

    @property
    def num_taken(self) -> int:
        return len(self._num_running)

    def can_start(self, digest: str) -> bool:
        """True if a sequence with this adapter may start now."""
        if not digest:
            return True
        if digest in self._num_running:
            return digest != self._closing
        return self.num_taken < self._num_places

    def start(self, digest: str) -> None:
        """A sequence with this adapter starts."""
        if digest:
            self._num_running[digest] += 1
            assert self.num_taken <= self._num_places, "more adapters run than there are places"

    def stop(self, digest: str) -> None:
        """A sequence with this adapter has ended, or was preempted."""
        if digest:
            self._num_running[digest] -= 1
            if not self._num_running[digest]:
                del self._num_running[digest]
                self._closing = "" if self._closing == digest else self._closing

    def make_way(self, digest: str) -> None:
        """The first request in the queue's order uses this adapter and cannot start.

        If its own adapter is closing, that opens again, because the request comes before the one
        for which it closed. Else the adapter with the fewest running sequences closes, unless one
        does already.
        """
        if digest in self._num_running:
            self._closing = ""
        elif not self._closing:
            self._closing = min(self._num_running, key=lambda one: self._num_running[one])

    def keep_all(self) -> None:
        """No request lacks a place: no adapter closes."""
        self._closing = ""
