"""Which of several engines gets a request: the least loaded, or the one that has it cached.

Owns the loads, the affinities and their limit. Knows nothing of sockets, tensors or HTTP: engines
are names here (numbers of --replicas, identities of Ray Serve's replicas), and the caller passes
the names to choose from.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..messages import AddRequest

# The name of a replica.
R = TypeVar("R", bound=Hashable)

# This many uncomputed prompt tokens count as much as one answer.
TOKENS_OF_ONE_ANSWER = 512
# A replica with the request's prefix cached is preferred while its load exceeds the lowest load by
# at most max_num_seqs / MARGIN_SHARE.
MARGIN_SHARE = 8
# Of more replicas than this, two at random are compared: the lowest load of many is far below the
# mean, so that hardly a known key would count; and the choice takes the same time for any number.
MOST_COMPARED = 8
# Keys of images and of prompt prefixes, about 150 bytes each.
MAX_AFFINITIES = 16_384
# The keys of a prompt cover its first 64, 128, 256 ... tokens; a shorter one is cheap to compute.
LEAST_PREFIX, LONGEST_PREFIX = 64, 131_072


def margin_of(max_num_seqs: int) -> float:
    """How much more load than the least loaded a replica with a known key may have."""
    return max(1.0, max_num_seqs / MARGIN_SHARE)


def affinity_keys(request: AddRequest) -> list[bytes]:
    """The keys of a request, the most specific first; empty for a short prompt.

    The key of its first image, or else those of its prompt's prefixes; at last that of its adapter.
    All but the adapter's include the tenant, because tenants do not share caches, and the adapter.
    """
    digest = "" if request.adapter is None else request.adapter.digest
    owner = hashlib.sha256((request.tenant + digest).encode()).digest()
    of_adapter = [adapter_key(digest)] if digest else []
    if request.images:
        return [image_key(owner, request.images[0].content_hash), *of_adapter]
    tokens = array("q", request.prompt_token_ids[:LONGEST_PREFIX])
    return [*prefix_keys(owner, tokens.tobytes(), tokens.itemsize), *of_adapter]


def adapter_key(name: str) -> bytes:
    """The key of an adapter. name: its digest, or the name that stands for it in a request."""
    return hashlib.sha256(b"adapter" + name.encode(errors="surrogatepass")).digest()


def image_key(owner: bytes, content: bytes) -> bytes:
    """The key of an image. content: its hash, or the text that stands for it in a request."""
    return hashlib.sha256(owner + b"image" + content).digest()


def prefix_keys(owner: bytes, prompt: bytes, token_bytes: int) -> list[bytes]:
    """The keys of a prompt's first 64, 128, 256 ... tokens, the longest first."""
    prefix = hashlib.sha256(owner + b"text")
    keys: list[bytes] = []
    done, end = 0, LEAST_PREFIX * token_bytes
    while end <= min(len(prompt), LONGEST_PREFIX * token_bytes):
        prefix.update(prompt[done:end])
        keys.append(prefix.digest())
        done, end = end, 2 * end
    return keys[::-1]


def home_of(key: bytes, replicas: Sequence[R]) -> R:
    """The replica that the hash of a key names; it changes for few keys when replicas do.

    Rendezvous hashing (Thaler and Ravishankar, 1998).
    """
    return max(
        replicas, key=lambda one: hashlib.blake2b(key + str(one).encode(), digest_size=8).digest()
    )


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

    def report_others(self, num_answers: int) -> None:
        """Record the same where the engine reports the answers of the others alone."""
        self.reported, self.own_at_report = num_answers, 0

    @property
    def now(self) -> float:
        """This worker's load now, plus that of the other workers at the last report.

        Rounded: weights that were added and subtracted leave a remainder, and idle replicas must
        have equal loads.
        """
        of_others = max(0, self.reported - self.own_at_report)
        return round(self.own + of_others, 6)


class Affinities(Generic[R]):
    """The replica to which each key went last, for the `limit` most recently used keys."""

    def __init__(self, limit: int = MAX_AFFINITIES) -> None:
        self._limit = limit
        self._places: OrderedDict[bytes, tuple[R, int]] = OrderedDict()
        self._lives: dict[R, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def find(self, keys: Sequence[bytes]) -> R | None:
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

    def record(self, keys: Sequence[bytes], replica: R) -> None:
        """Record that a request with these keys went to `replica`; evict the oldest keys."""
        place = (replica, self._lives.get(replica, 0))
        # The most specific key last, so that it is evicted last.
        for key in reversed(keys):
            self._places[key] = place
            self._places.move_to_end(key)
        while len(self._places) > self._limit:
            self._places.popitem(last=False)

    def forget(self, replica: R) -> None:
        """Forget all keys of this replica: its caches are lost."""
        self._lives[replica] = self._lives.get(replica, 0) + 1


class ReplicaChooser(Generic[R]):
    """Chooses among replicas.

    first: the position of the replica to choose while all are equal. has_homes: a key that this
    chooser does not know counts as known to the replica that its hash names, so that many choosers,
    which do not share what they know, send it to the same one.
    """

    def __init__(
        self,
        replicas: Iterable[R] = (),
        *,
        first: int = 0,
        has_homes: bool = False,
        affinities: Affinities[R] | None = None,
    ) -> None:
        self._has_homes = has_homes
        self.loads = {replica: Load() for replica in replicas}
        self.affinities: Affinities[R] = Affinities() if affinities is None else affinities
        # Among equal loads, the replica that was chosen longest ago.
        count = len(self.loads)
        self._last_turns = {
            replica: (number - first) % count - count for number, replica in enumerate(self.loads)
        }
        self._num_turns = 0
        self._rng = random.Random(first)

    def update(self, replicas: Iterable[R]) -> None:
        """Set which replicas exist: new ones have no load, and what is gone is forgotten."""
        present = dict.fromkeys(replicas)
        for replica in [known for known in self.loads if known not in present]:
            self.affinities.forget(replica)
            del self.loads[replica], self._last_turns[replica]
        for replica in present:
            if replica not in self.loads:
                self.loads[replica] = Load()
                self._last_turns[replica] = -1

    def choose(self, keys: Sequence[bytes], able: Sequence[R], margin: float) -> R | None:
        """The replica for a request with these keys; None if `able` is empty.

        A replica that knows a key is preferred, unless its load exceeds the lowest by more than
        `margin`. Of many replicas, the lower load of two at random counts instead of the lowest
        (the power of two choices, Mitzenmacher 2001).
        """
        if not able:
            return None
        compared = able if len(able) <= MOST_COMPARED else self._rng.sample(able, 2)
        loads, turns = self.loads, self._last_turns
        chosen = min(compared, key=lambda replica: (loads[replica].now, turns[replica]))
        known = self.affinities.find(keys)
        if known is None and self._has_homes and keys:
            known = home_of(keys[-1], able)
        if known is not None and known in able:
            lead = self.loads[known].now - self.loads[chosen].now
            chosen = known if lead <= margin else chosen
        self._last_turns[chosen] = self._num_turns
        self._num_turns += 1
        self.affinities.record(keys, chosen)
        return chosen

    def died(self, replica: R) -> None:
        """Reset a replica that died. Callers subtract their own requests from its load."""
        self.affinities.forget(replica)
        self.loads[replica].report(0)
