"""Simulates a fleet: conversations about pictures over N replicas, chosen by the router's own code.

    python bench/fleet.py --replicas 1,3,10,100,1000
    python bench/fleet.py --trace requests.jsonl --replicas 3

Virtual time; no server is started. The choice is `ReplicaChooser` of the router, beside two others:
the least loaded replica without affinity, and a random one. A replica has places for answers, a
queue, and an image cache that evicts the least recently used. A request encodes its picture unless
the cache has it, then computes its prompt, then its answer; what is computed before the first token
runs one after the other, as steps with a picture do. The load of each replica is that of
`--requests-per-replica` a second, whatever their number. A line of a trace is a JSON object with
`at` (seconds), `picture` (any text), `prompt_s`, `answer_s`. The last line printed is one JSON
document.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from processes import numbers, print_document
from vlmserve.router.client.replica_chooser import Affinities, ReplicaChooser, margin_of

POLICIES = ("affinity", "least loaded", "random")


@dataclass(slots=True, frozen=True)
class Ask:
    """One request. at: seconds; prompt_s, answer_s: seconds of work, without the picture's."""

    at: float
    picture: str
    prompt_s: float
    answer_s: float


@dataclass(slots=True, frozen=True)
class Machine:
    """A replica: places in its batch, pictures in its cache, seconds to encode one."""

    places: int
    pictures: int
    vision_s: float


@dataclass(slots=True)
class Replica:
    """The state of one replica. busy_until: when the work before a first token is done."""

    running: int = 0
    served: int = 0
    busy_until: float = 0.0
    queue: deque[Ask] = field(default_factory=deque)
    cache: OrderedDict[str, None] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class Figures:
    """What one run measured. hits: of requests after the first about a picture."""

    hits: int = 0
    repeats: int = 0
    ttfts: list[float] = field(default_factory=list)
    served: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Shares and seconds."""
        ordered = sorted(self.ttfts)
        return {
            "hit_rate": round(self.hits / max(1, self.repeats), 4),
            "ttft_p50_s": round(ordered[len(ordered) // 2], 3),
            "ttft_p99_s": round(ordered[int(len(ordered) * 0.99)], 3),
            "busiest_over_mean": round(max(self.served) / statistics.mean(self.served), 2),
        }


def conversations(count: int, rate: float, turns: int, think_s: float, seed: int) -> list[Ask]:
    """Conversations that start at random, each about one picture. rate: conversations a second."""
    rng = random.Random(seed)
    asks, start = [], 0.0
    for number in range(count):
        start += rng.expovariate(rate)
        at = start
        for _ in range(turns):
            asks.append(Ask(at, f"picture {number}", 0.02, rng.uniform(0.5, 3.0)))
            at += asks[-1].answer_s + rng.expovariate(1 / think_s)
    return sorted(asks, key=lambda ask: ask.at)


def read_trace(path: Path) -> list[Ask]:
    """The requests of a file of JSON lines, in the order of their time."""
    asks = [Ask(**json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
    return sorted(asks, key=lambda ask: ask.at)


class Fleet:
    """Runs a trace over `count` replicas under one policy."""

    def __init__(self, count: int, machine: Machine, policy: str, seed: int) -> None:
        self._machine, self._policy = machine, policy
        self._rng = random.Random(seed)
        self._replicas = [Replica() for _ in range(count)]
        self._able = range(count)
        # A gateway of many replicas remembers more pictures than a worker of a few.
        self._chooser = ReplicaChooser(self._able, affinities=Affinities(count * machine.pictures))
        self._ends: list[tuple[float, int]] = []
        self._seen: set[str] = set()
        self.figures = Figures()

    def run(self, asks: Iterable[Ask]) -> Figures:
        """Serve all requests to their end."""
        for ask in asks:
            self._end_until(ask.at)
            number = self._choose(ask)
            self._chooser.loads[number].own += 1
            replica = self._replicas[number]
            replica.served += 1
            replica.queue.append(ask)
            self._start(number, ask.at)
        self._end_until(float("inf"))
        self.figures.served = [one.served for one in self._replicas]
        return self.figures

    def _choose(self, ask: Ask) -> int:
        if self._policy == "random":
            return self._rng.choice(self._able)
        keys = [ask.picture.encode()] if self._policy == "affinity" else []
        chosen = self._chooser.choose(keys, self._able, margin_of(self._machine.places))
        assert chosen is not None
        return chosen

    def _end_until(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            at, number = heapq.heappop(self._ends)
            self._replicas[number].running -= 1
            self._chooser.loads[number].own -= 1
            self._start(number, at)

    def _start(self, number: int, now: float) -> None:
        replica = self._replicas[number]
        while replica.queue and replica.running < self._machine.places:
            ask = replica.queue.popleft()
            replica.running += 1
            work_s = ask.prompt_s + (0.0 if self._finds(replica, ask) else self._machine.vision_s)
            replica.busy_until = max(now, replica.busy_until) + work_s
            self.figures.ttfts.append(replica.busy_until - ask.at)
            heapq.heappush(self._ends, (replica.busy_until + ask.answer_s, number))

    def _finds(self, replica: Replica, ask: Ask) -> bool:
        is_hit = ask.picture in replica.cache
        if ask.picture in self._seen:
            self.figures.repeats += 1
            self.figures.hits += is_hit
        self._seen.add(ask.picture)
        replica.cache[ask.picture] = None
        replica.cache.move_to_end(ask.picture)
        if len(replica.cache) > self._machine.pictures:
            replica.cache.popitem(last=False)
        return is_hit


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--replicas", default="1,3,10,100", help="comma-separated numbers")
    parser.add_argument("--trace", type=Path, help="JSON lines; default: drawn conversations")
    parser.add_argument("--conversations", type=int, default=50, help="per replica")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--requests-per-replica", type=float, default=8.0, help="a second")
    parser.add_argument("--think", type=float, default=10.0, help="mean seconds between turns")
    parser.add_argument("--places", type=int, default=64, help="--max-num-seqs of a replica")
    parser.add_argument("--pictures", type=int, default=128, help="pictures in a replica's cache")
    parser.add_argument("--vision", type=float, default=0.065, help="seconds to encode a picture")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def runs(options: argparse.Namespace, counts: Sequence[int]) -> Iterator[dict[str, object]]:
    """The figures of each number of replicas under each policy."""
    machine = Machine(options.places, options.pictures, options.vision)
    for count in counts:
        rate = count * options.requests_per_replica / options.turns
        number = count * options.conversations
        asks = (
            read_trace(options.trace)
            if options.trace
            else conversations(number, rate, options.turns, options.think, options.seed)
        )
        for policy in POLICIES:
            figures = Fleet(count, machine, policy, options.seed).run(asks)
            yield {"replicas": count, "policy": policy, **figures.summary()}


def main() -> None:
    options = parse_arguments()
    rows: list[dict[str, object]] = []
    print(f"{'replicas':>8} {'policy':>13} {'hits':>6} {'p50 s':>7} {'p99 s':>7} {'max/mean':>8}")
    for row in runs(options, numbers(options.replicas)):
        rows.append(row)
        print(
            f"{row['replicas']:>8} {row['policy']:>13} {row['hit_rate']:>6.1%}"
            f" {row['ttft_p50_s']:>7} {row['ttft_p99_s']:>7} {row['busiest_over_mean']:>8}",
            flush=True,
        )
    options.trace = options.trace and str(options.trace)
    print_document(options, rows=rows)


if __name__ == "__main__":
    main()
