"""Offers a server twice its capacity: accepted requests must hardly be slower.

Answers have different lengths, as in real loads: answers of one length would start and end in the
same steps. The loads take short turns, each after a measurement of the capacity, so that a slow
phase of the machine affects all of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from processes import serving
from server_state import descendants, machine_cpu_seconds, process_cpu_seconds
from vlmserve.server.bench.client import Client, Sample
from vlmserve.server.bench.load import request_bodies
from vlmserve.server.bench.runner import Chat, Run, run_level
from vlmserve.server.bench.settings import Level, Load

MODEL = "torture"
REFUSED = "HTTP 429"
BELOW, ABOVE = 0.9, 2.0
# One turn of a load, and its start, which does not count: places and queue fill first.
TURN_S, FILLING_S = 5.0, 1.0
PAUSE_AFTER_REFUSAL_S = 0.05
# Requests of the first guess at the capacity.
MIN_REQUESTS = 64
P99_RATIO, REFUSAL_P99_S, GOODPUT = 1.5, 0.05, 0.95


@dataclass(slots=True)
class Served:
    """The results of one load in all its turns. seconds: in which num_served were answered."""

    samples: list[Sample] = field(default_factory=list)
    num_served: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.num_served / self.seconds

    def add(self, run: Run) -> None:
        """Add a turn: it counts from when places are full to its last arrival."""
        first, last = (pick(max(one.due, one.sent) for one in run.samples) for pick in (min, max))
        first += min(FILLING_S, (last - first) / 4)
        ends = [one.end for one in run.samples if one.error is None]
        self.samples += run.samples
        self.num_served += sum(first < end <= last for end in ends)
        self.seconds += last - first


class Patient:
    """A client that sends a refused request again, so that every place stays wanted.

    While the machine is slow the server may refuse all that waits; nothing would be served then.
    """

    def __init__(self, client: Chat) -> None:
        self._client = client

    async def chat(self, body: bytes, due: float | None = None) -> Sample:
        """The sample of the try that was not refused."""
        while (sample := await self._client.chat(body, due)).error == REFUSED:  # noqa: ASYNC110 - asks again
            await asyncio.sleep(PAUSE_AFTER_REFUSAL_S)
        return sample


class Offering:
    """Loads for one server, drawn from a seed. max_tokens: the mean of an answer."""

    def __init__(self, client: Client, max_num_seqs: int, max_tokens: int, seed: int) -> None:
        self._client = client
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max_tokens
        self._rng = random.Random(seed)

    async def saturate(self, count: int) -> Run:
        """Let as many requests wait as run, so that no place is ever empty."""
        level = Level(concurrency=2 * self._max_num_seqs)
        return await self._offer(Patient(self._client), level, count)

    async def at_rate(self, rate: float, seconds: float) -> Run:
        level = Level(request_rate=rate)
        return await self._offer(self._client, level, max(2, int(rate * seconds)))

    async def _offer(self, client: Chat, level: Level, count: int) -> Run:
        seed = self._rng.randrange(2**31)
        load = Load(count, num_images=1, image_pool=8, ignore_eos=True, seed=seed)
        bodies = [self._of_any_length(body) for body in request_bodies(load, MODEL)]
        return await run_level(client, bodies, level, seed)

    def _of_any_length(self, body: bytes) -> bytes:
        half = self._max_tokens // 2
        length = self._rng.randint(self._max_tokens - half, self._max_tokens + half)
        return json.dumps(json.loads(body) | {"max_tokens": length}).encode()


async def run_overload(
    seconds: float,
    max_queue_wait: float,
    max_num_seqs: int,
    max_tokens: int,
    seed: int,
    slack: float,
) -> tuple[dict[str, Any], list[str]]:
    """Measure the capacity and offer 0.9 and 2 times as much; see `run_kills`."""
    options = ["--max-num-seqs", str(max_num_seqs), "--max-queue-wait", str(max_queue_wait)]
    with serving(None, "float32", *options, "--no-spare-engine", name=MODEL) as (server, url):
        async with Client(f"{url}/v1") as client:
            offering = Offering(client, max_num_seqs, max_tokens, seed)
            await offering.saturate(4 * max_num_seqs)  # start everything that starts at first use
            cpu = CpuShares(server.pid)
            saturated, below, above = await _in_turns(offering, seconds)
            shares = cpu.since_start()
    figures: dict[str, Any] = {
        "capacity_rps": round(saturated.rate, 2),
        "max_queue_wait_s": max_queue_wait,
        "max_num_seqs": max_num_seqs,
        "max_tokens": max_tokens,
        "at_0.9": _summary(below, saturated.rate),
        "at_2": _summary(above, saturated.rate),
        "cores": shares,
    }
    ratio = figures["at_2"]["accepted_p99_s"] / figures["at_0.9"]["accepted_p99_s"]
    figures["p99_ratio"] = round(ratio, 3)
    return figures, _broken(figures["at_2"], ratio, slack)


async def _in_turns(offering: Offering, seconds: float) -> tuple[Served, Served, Served]:
    """The capacity, and both loads, each offered for `seconds` in all."""
    saturated, below, above = Served(), Served(), Served()
    num_turns = max(1, round(seconds / TURN_S))
    turn_s = seconds / num_turns
    saturated.add(await offering.saturate(MIN_REQUESTS))
    for _ in range(num_turns):
        count = max(MIN_REQUESTS, int(saturated.rate * turn_s))
        saturated.add(await offering.saturate(count))
        for factor, served in ((BELOW, below), (ABOVE, above)):
            served.add(await offering.at_rate(factor * saturated.rate, turn_s))
    return saturated, below, above


class CpuShares:
    """Cores in use from now on: by the server, by this load, and by all else on the machine."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._start = self._now()

    def since_start(self) -> dict[str, float]:
        seconds, everything, server, load = self._now() - self._start
        shares = {"server": server, "load": load, "others": everything - server - load}
        return {name: round(float(spent / seconds), 2) for name, spent in shares.items()}

    def _now(self) -> np.ndarray:
        server = sum(map(process_cpu_seconds, [self._server, *descendants(self._server)]))
        load = process_cpu_seconds(os.getpid())
        return np.array([time.monotonic(), machine_cpu_seconds(), server, load])


def _summary(served: Served, capacity: float) -> dict[str, Any]:
    accepted = [one for one in served.samples if one.error is None]
    refused = [one for one in served.samples if one.error == REFUSED]
    return {
        "offered": len(served.samples),
        "accepted": len(accepted),
        "refused": len(refused),
        "other_errors": len(served.samples) - len(accepted) - len(refused),
        "accepted_p50_s": _percentile(accepted, 50),
        "accepted_p99_s": _percentile(accepted, 99),
        "refused_p50_s": _percentile(refused, 50, from_sent=True),
        "refused_p99_s": _percentile(refused, 99, from_sent=True),
        "goodput_rps": round(served.rate, 2),
        "goodput_of_capacity": round(served.rate / capacity, 3),
    }


def _percentile(samples: list[Sample], rank: int, *, from_sent: bool = False) -> float | None:
    """Seconds from when each was due, or sent, to its end."""
    if not samples:
        return None
    spent = [one.end - (one.sent if from_sent else one.due) for one in samples]
    return round(float(np.percentile(spent, rank)), 4)


def _broken(above: dict[str, Any], ratio: float, slack: float) -> list[str]:
    broken = []
    if ratio > P99_RATIO * slack:
        broken.append(f"the accepted requests' p99 is {ratio:.2f} times that at 0.9, not 1.5")
    if above["refused_p99_s"] is None:
        broken.append("nothing was rejected")
    elif above["refused_p99_s"] > REFUSAL_P99_S * slack:
        broken.append(f"rejections' p99 is {above['refused_p99_s'] * 1000:.0f} ms, not 50")
    if above["goodput_of_capacity"] < GOODPUT / slack:
        broken.append(f"goodput is {above['goodput_of_capacity']:.0%} of the capacity, not 95 %")
    if above["other_errors"]:
        broken.append(f"{above['other_errors']} requests failed otherwise")
    return broken
