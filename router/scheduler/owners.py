"""What the owners of requests have used, and how many places of the batch each has now.

Owns the order between owners: the lowest counter of `router/fair_shares.py` first. Service is
counted in tokens: a prompt's tokens as they are computed, generated tokens, and an image at its
cost. Knows nothing of an owner's own line, which `request_queue.py` keeps, nor of blocks.
"""

from __future__ import annotations

from collections import Counter

from ..fair_shares import FairShares
from ..messages import NO_POLICY, OwnerPolicy
from .sequence import Sequence


class Owners:
    """Counters of the owners that have open sequences. Memory is bounded by their number."""

    def __init__(self) -> None:
        self._policies: dict[str, OwnerPolicy] = {}
        self._shares = FairShares(self.weight)
        self._num_open: Counter[str] = Counter()
        self.num_running: Counter[str] = Counter()

    def __len__(self) -> int:
        """How many owners have open sequences."""
        return len(self._num_open)

    @property
    def num_remembered(self) -> int:
        """How many owners have a counter."""
        return len(self._shares)

    def weight(self, owner: str) -> float:
        return self._policies.get(owner, NO_POLICY).weight

    def num_open(self, owner: str) -> int:
        """How many sequences of this owner wait, follow or run."""
        return self._num_open[owner]

    def open(self, sequence: Sequence) -> None:
        """Count an accepted sequence. The owner's newest request gives its policy."""
        owner = sequence.owner
        self._policies[owner] = sequence.request.policy
        self._num_open[owner] += 1
        self._shares.join(owner)

    def close(self, sequence: Sequence) -> None:
        """Count the end of an open sequence."""
        owner = sequence.owner
        self._shares.leave(owner)
        self._num_open[owner] -= 1
        if not self._num_open[owner]:
            del self._num_open[owner], self._policies[owner]

    def start(self, owner: str) -> None:
        """Count one more place of the batch."""
        self.num_running[owner] += 1

    def stop(self, owner: str) -> None:
        """Count one place of the batch less."""
        self.num_running[owner] -= 1
        if not self.num_running[owner]:
            del self.num_running[owner]

    def begin_waiting(self, owner: str) -> None:
        """The owner's line was empty: what it has not used until now is no credit."""
        self._shares.lift(owner)

    def charge(self, owner: str, num_tokens: int) -> None:
        """Count tokens that a step computes for this owner."""
        self._shares.charge(owner, num_tokens)

    def charge_positions(self, sequence: Sequence, start: int, end: int) -> None:
        """Count the tokens start .. end - 1 of a sequence; those that a preemption lost, once."""
        num_new = end - max(start, sequence.num_charged_tokens)
        if num_new > 0:
            self.charge(sequence.owner, num_new)
            sequence.num_charged_tokens = end

    def places(self, owner: str) -> float:
        """The owner's places of the batch, by its weight."""
        return self.by_weight(owner, self.num_running[owner])

    def by_weight(self, owner: str, number: float) -> float:
        """A number of anything that an owner has, by its weight."""
        return number / self.weight(owner)

    def used(self, owner: str) -> float:
        """The tokens that an owner with open sequences has used, by its weight."""
        return self._shares.used(owner)

    def turn(self, owner: str) -> tuple[float, float]:
        """The order of owners: the least service first; of equal ones, the fewest places."""
        return self.used(owner), self.places(owner)
