"""Which of several engines takes a request: the least loaded, or the one that has seen it before.

Owns the loads, the affinities and their bound. Knows nothing of sockets, tensors or HTTP:
engines are numbers here, and who asks says which of them may be chosen.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..messages import AddRequest

# A prompt that is yet to be computed weighs as much as one answer for each so many tokens.
TOKENS_OF_ONE_ANSWER = 512
# A replica that has seen a request before is preferred until it is ahead of the least loaded by
# this share of the requests that it runs at once.
MARGIN_SHARE = 8
# Of pictures and beginnings of prompts, some 150 bytes each.
MAX_AFFINITIES = 16_384
# A prompt is known again by its first 64, 128, 256 ... tokens; a shorter one costs little.
LEAST_PREFIX, LONGEST_PREFIX = 64, 131_072


def margin_of(max_num_seqs: int) -> float:
    """How far ahead of the least loaded a replica may be that has seen a request before."""
    return max(1.0, max_num_seqs / MARGIN_SHARE)


def affinity_keys(request: AddRequest) -> list[bytes]:
    """What a request is known by, the most telling key first; empty for a short prompt.

    Its first image, or else the beginnings of its prompt, of 64 tokens and doublings of that.
    The tenant is in every key: caches are a tenant's own.
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
    """What a request weighs before its first token: its answers, and its prompt's tokens."""
    return len(request.answer_ids) + len(request.prompt_token_ids) / TOKENS_OF_ONE_ANSWER


@dataclass(slots=True)
class Load:
    """How much one replica has to do, in answers, by what is known here.

    own: what this worker has sent and is not over. told: what the engine said last of all workers'
    requests; own_then: `own` at that time, in answers.
    """

    own: float = 0.0
    own_answers: int = 0
    told: int = 0
    own_then: int = 0

    def tell(self, num_requests: int) -> None:
        """The engine says how many requests of all workers it runs and keeps waiting."""
        self.told, self.own_then = num_requests, self.own_answers

    @property
    def now(self) -> float:
        """What was told, less what has ended since, and what was sent since; own at least."""
        of_others = max(0, self.told - self.own_then)
        return self.own + of_others


class Affinities:
    """Which replica a key went to last: the `limit` keys used last, for all tenants together."""

    def __init__(self, limit: int = MAX_AFFINITIES) -> None:
        self._limit = limit
        self._places: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._lives: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def find(self, keys: Sequence[bytes]) -> int | None:
        """The replica that the first known of `keys` went to, if it has not died since."""
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
        """Remember that a request known by `keys` went there; forget what was not used longest."""
        place = (replica, self._lives.get(replica, 0))
        # The most telling key last, so that it is forgotten last.
        for key in reversed(keys):
            self._places[key] = place
            self._places.move_to_end(key)
        while len(self._places) > self._limit:
            self._places.popitem(last=False)

    def forget(self, replica: int) -> None:
        """What this replica had cached died with it."""
        self._lives[replica] = self._lives.get(replica, 0) + 1


class ReplicaChooser:
    """Chooses among `count` replicas. first: whose turn it is where all are equal."""

    def __init__(self, count: int, *, first: int = 0, affinities: Affinities | None = None) -> None:
        self.loads = [Load() for _ in range(count)]
        self.affinities = affinities or Affinities()
        # Of equals the one that was chosen longest ago, so that none is passed over for ever.
        self._last_turns = [(number - first) % count - count for number in range(count)]
        self._num_turns = 0

    def choose(self, keys: Sequence[bytes], able: Collection[int], margin: float) -> int | None:
        """The replica for a request known by `keys`, of those that are `able`; None without any.

        The one that the request is known to goes first, unless it is ahead of the least loaded by
        more than `margin`.
        """
        if not able:
            return None
        chosen = min(able, key=lambda one: (self.loads[one].now, self._last_turns[one]))
        known = self.affinities.find(keys)
        if known in able and known is not None:
            lead = self.loads[known].now - self.loads[chosen].now
            chosen = known if lead <= margin else chosen
        self._last_turns[chosen] = self._num_turns
        self._num_turns += 1
        self.affinities.record(keys, chosen)
        return chosen

    def died(self, replica: int) -> None:
        """Its caches are empty and its requests are over; who sent them takes those off."""
        self.affinities.forget(replica)
        self.loads[replica].tell(0)
