"""Which key's turn it is when several share a resource.

Owns a counter of service for each key that has work, in units of the caller's choice (tokens,
seconds). Knows nothing of requests, places or waiting: the engine's queue and the HTTP side's
lanes keep those, and ask here who is next.

The rule is the virtual token counter of Sheng et al. (2024), "Fairness in Serving Large Language
Models": serve the active key with the smallest counter, charge what it used divided by its weight,
and lift a key that joins to the smallest counter among the active ones, so that idle time earns
no credit.
"""

from __future__ import annotations

from collections.abc import Callable


def _equal_weights(key: str) -> float:
    return 1.0


class FairShares:
    """Counters of service by key. weight_of: a key's weight, above 0; all 1 by default."""

    def __init__(self, weight_of: Callable[[str], float] = _equal_weights) -> None:
        self._weight_of = weight_of
        self._counters: dict[str, float] = {}
        self._num_active: dict[str, int] = {}

    def __len__(self) -> int:
        """The number of keys that are remembered."""
        return len(self._counters)

    def join(self, key: str) -> None:
        """Add one piece of work of `key`. Its first lifts the key to the smallest counter."""
        if key not in self._num_active:
            floor = self._floor()
            self._counters[key] = max(self._counters.get(key, floor), floor)
        self._num_active[key] = self._num_active.get(key, 0) + 1

    def lift(self, key: str) -> None:
        """Raise an active key to the smallest counter of the others.

        For a key that begins to wait: what it left unused while it had little work is no credit.
        """
        others = (self._counters[one] for one in self._num_active if one != key)
        self._counters[key] = max(self._counters[key], min(others, default=0.0))

    def used(self, key: str) -> float:
        """The counter of an active key."""
        return self._counters[key]

    def leave(self, key: str) -> None:
        """Remove one piece of work of `key`; with its last the key is no longer active.

        A counter above the smallest active one is kept: leaving and joining again does not
        clear what a key has used.
        """
        self._num_active[key] -= 1
        if self._num_active[key]:
            return
        del self._num_active[key]
        floor = self._floor()
        idle = [one for one in self._counters if one not in self._num_active]
        for one in idle:
            if not self._num_active or self._counters[one] <= floor:
                del self._counters[one]

    def charge(self, key: str, service: float) -> None:
        """Count `service` used by `key`, in the caller's unit. Negative amounts give back.

        A key that is neither active nor remembered has nothing left to balance.
        """
        if key in self._counters:
            self._counters[key] += service / self._weight_of(key)

    def _floor(self) -> float:
        return min((self._counters[key] for key in self._num_active), default=0.0)
