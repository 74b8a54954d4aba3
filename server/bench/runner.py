"""Decides when each request is sent: at a fixed concurrency, or at random times of a given rate.

Owns arrival times and the client's CPU time. Knows nothing of the content of requests.

At a given rate a request is due at its time whether or not earlier ones have ended, and its
latencies count from then. So a slow server cannot slow down the requests, and a slow client shows
in the latencies (this avoids coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .client import Sample
from .settings import Level


class Chat(Protocol):
    """Sends a body: `Client`, or a test double."""

    async def chat(self, body: bytes, due: float | None = None) -> Sample:
        """Return the sample of one request. Never raises for a failed request."""


@dataclass(slots=True)
class Run:
    """A level's samples, its wall time in seconds, and the client's CPU time."""

    samples: list[Sample]
    seconds: float
    client_cpu_seconds: float


OnSample = Callable[[Sample], None]


def ignore(sample: Sample) -> None:
    """Do nothing."""


async def run_level(
    client: Chat, bodies: Sequence[bytes], level: Level, seed: int = 0, on_sample: OnSample = ignore
) -> Run:
    """Send every body once, at the level's load. on_sample: called after each request."""
    samples: list[Sample] = []

    def keep(sample: Sample) -> None:
        samples.append(sample)
        on_sample(sample)

    cpu, start = time.process_time(), time.perf_counter()
    if level.request_rate is not None:
        due = start + poisson_arrivals(level.request_rate, len(bodies), seed)
        await _send_when_due(client, bodies, due.tolist(), keep)
    else:
        await _send_in_turn(client, bodies, level.concurrency or 1, keep)
    return Run(samples, time.perf_counter() - start, time.process_time() - cpu)


def poisson_arrivals(rate: float, count: int, seed: int) -> np.ndarray:
    """[count] times in seconds of a Poisson process with `rate` arrivals a second; the first is 0.

    Gaps are drawn from an exponential distribution and scaled to the requested mean, so
    that short runs have that rate too.
    """
    gaps = np.random.default_rng([seed, 2]).exponential(1.0, count - 1)
    scale = (count - 1) / (rate * gaps.sum()) if count > 1 else 0.0
    return np.concatenate([[0.0], np.cumsum(gaps * scale)])


async def _send_in_turn(
    client: Chat, bodies: Sequence[bytes], concurrency: int, keep: OnSample
) -> None:
    waiting = iter(bodies)

    async def user() -> None:
        for body in waiting:
            keep(await client.chat(body))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(bodies))):
            group.create_task(user())


async def _send_when_due(
    client: Chat, bodies: Sequence[bytes], due: Sequence[float], keep: OnSample
) -> None:
    async def one(body: bytes, at: float) -> None:
        keep(await client.chat(body, at))

    async with asyncio.TaskGroup() as group:
        for body, at in zip(bodies, due, strict=True):
            await asyncio.sleep(at - time.perf_counter())
            group.create_task(one(body, at))
