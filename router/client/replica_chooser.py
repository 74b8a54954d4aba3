"""Which of several engines gets a request: the least loaded, or the one that has it cached.

Owns the loads, the affinities and their limit. Knows nothing of sockets, tensors or HTTP: engines
are numbers here, and the caller passes the numbers to choose from.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..messages import AddRequest

# This many uncomputed prompt tokens count as much as one answer.
TOKENS_OF_ONE_ANSWER = 512
# A replica with the request's prefix cached is preferred while its load exceeds the lowest load by
# at most max_num_seqs / MARGIN_SHARE.
MARGIN_SHARE = 8
# Keys of images and of prompt prefixes, about 150 bytes each.
MAX_AFFINITIES = 16_384
# The keys of a prompt cover its first 64, 128, 256 ... tokens; a shorter one is cheap to compute.
LEAST_PREFIX, LONGEST_PREFIX = 64, 131_072


def margin_of(max_num_seqs: int) -> float:
    """How much more load than the least loaded a replica with a known key may have."""
    return max(1.0, max_num_seqs / MARGIN_SHARE)


def affinity_keys(request: AddRequest) -> list[bytes]:
    """The keys of a request, the most specific first; empty for a short prompt.

    The key of its first image, or else those of its prompt's first 64, 128, 256 ... tokens. Every
    key includes the tenant, because tenants do not share caches.
    """
    owner = hashlib.sha256(request.tenant.encode()).digest()
    if request.images:
        return [hashlib.sha256(owner + b"image" + request.images[0].content_hash).digest()]
    tokens = array("q", request.prompt_token_ids[:LONGEST_PREFIX])
    prefix = hashlib.sha256(owner + b"text")
    keys: list[bytes] = []
    done, length = 0, LEAST_PREFIX
    while length <= len(tokens):
        prefix.update(tokens[done:length].tobytes())
        keys.append(prefix.digest())
        done, length = length, 2 * length
    return keys[::-1]


def weight_of(request: AddRequest) -> float:
    """A request's load before its first token: its answers, and its prompt's tokens."""
    return len(request.answer_ids) + len(request.prompt_token_ids) / TOKENS_OF_ONE_ANSWER


@dataclass(slots=True)
class Load:
    """How much one replica has to do, in answers, as far as this worker knows.

    own: the load of this worker's open requests; own_answers: their answers. reported: answers of
    all workers in the engine's last heartbeat; own_at_report: own_answers at that time.
    """

    own: float = 0.0
    own_answers: int = 0
    reported: int = 0
    own_at_report: int = 0

    def report(self, num_answers: int) -> None:
        """Record how many answers of all workers run or wait in the engine."""
        self.reported, self.own_at_report = num_answers, self.own_answers

    @property
    def now(self) -> float:
        """This worker's load now, plus that of the other workers at the last report."""
        of_others = max(0, self.reported - self.own_at_report)
        return self.own + of_others


class Affinities:
    """The replica to which each key went last, for the `limit` most recently used keys."""

    def __init__(self, limit: int = MAX_AFFINITIES) -> None:
        self._limit = limit
        self._places: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._lives: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def find(self, keys: Sequence[bytes]) -> int | None:
        """The replica of the first known key, unless it has died since."""
        for key in keys:
            place = self._places.get(key)
            if place is None:
                continue
            replica, life = place
            if life == self._lives.get(replica, 0):
                return replica
            del self._places[key]
        return None

    def record(self, keys: Sequence[bytes], replica: int) -> None:
        """Record that a request with these keys went to `replica`; evict the oldest keys."""
        place = (replica, self._lives.get(replica, 0))
        # The most specific key last, so that it is evicted last.
        for key in reversed(keys):
            self._places[key] = place
            self._places.move_to_end(key)
        while len(self._places) > self._limit:
            self._places.popitem(last=False)

    def forget(self, replica: int) -> None:
        """Forget all keys of this replica: its caches are lost."""
        self._lives[replica] = self._lives.get(replica, 0) + 1


class ReplicaChooser:
    """Chooses among `count` replicas. first: the replica to choose while all are equal."""

    def __init__(self, count: int, *, first: int = 0, affinities: Affinities | None = None) -> None:
        self.loads = [Load() for _ in range(count)]
        self.affinities = affinities or Affinities()
        # Among equal loads, the replica that was chosen longest ago.
        self._last_turns = [(number - first) % count - count for number in range(count)]
        self._num_turns = 0

    def choose(self, keys: Sequence[bytes], able: Collection[int], margin: float) -> int | None:
        """The replica for a request with these keys; None if `able` is empty.

        A replica that knows a key is preferred, unless its load exceeds the lowest by more than
        `margin`.
        """
        if not able:
            return None
        chosen = min(able, key=lambda replica: (self.loads[replica].now, self._last_turns[replica]))
        known = self.affinities.find(keys)
        if known in able and known is not None:
            lead = self.loads[known].now - self.loads[chosen].now
            chosen = known if lead <= margin else chosen
        self._last_turns[chosen] = self._num_turns
        self._num_turns += 1
        self.affinities.record(keys, chosen)
        return chosen

    def died(self, replica: int) -> None:
        """Reset a replica that died. Callers subtract their own requests from its load."""
        self.affinities.forget(replica)
        self.loads[replica].report(0)
