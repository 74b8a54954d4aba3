"""Kills engines under load: no client may hang, and the server must come back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from processes import free_port, running, serving
from server_state import engine_pid, gauges, is_ready
from vlmserve.server.bench.client import Client, Sample
from vlmserve.server.bench.load import request_bodies
from vlmserve.server.bench.settings import Load

MODEL = "vlmserve-tiny-vision"
HASHING_SERVER = Path(__file__).parents[1] / "tests" / "support" / "faulty_server.py"
# A client that waits longer hangs: a restart takes a tenth of that.
HANG_S = 60.0
# From an engine's death to the end of its open requests.
TOLD_S = 1.0
ALLOWED = {"answered", "HTTP 503", "error event", "timeout"}
# The value of Retry-After.
PAUSE_AFTER_ERROR_S = 1.0


@dataclass(slots=True)
class Record:
    """The results of a run. told_s: from a kill to the end of each open request."""

    outcomes: Counter[str] = field(default_factory=Counter)
    told_s: list[float] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)
    open_at_kill: list[int] = field(default_factory=list)


class Crowd:
    """Clients that ask again and again, streamed and plain, with and without a picture."""

    def __init__(self, client: Client, num_clients: int, seed: int) -> None:
        self._client = client
        self._bodies = [
            *request_bodies(Load(32, max_tokens=48, ignore_eos=True, seed=seed), MODEL),
            *request_bodies(Load(32, 48, num_images=0, ignore_eos=True, stream=False), MODEL),
        ]
        self._rng = random.Random(seed)
        self._is_over = False
        self.open: dict[int, float] = {}
        self.ended: list[tuple[float, float, Sample]] = []
        self._tasks = [asyncio.create_task(self._ask(i)) for i in range(num_clients)]

    async def _ask(self, number: int) -> None:
        while not self._is_over:
            started = self.open[number] = time.monotonic()
            sample = await self._client.chat(self._rng.choice(self._bodies))
            del self.open[number]
            self.ended.append((started, time.monotonic(), sample))
            if sample.error is not None:
                await asyncio.sleep(PAUSE_AFTER_ERROR_S)

    async def stop(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._tasks)


async def run_kills(
    count: int, clients: int, engine: str, seed: int, slack: float
) -> tuple[dict[str, Any], list[str]]:
    """Kill `count` engines while requests are open; returns figures and broken promises.

    engine: "bundled", or "hashing" for the tests' engine, which loads nothing. All other processes
    are the real ones.
    """
    record, rng = Record(), random.Random(seed)
    with _server(engine, max_restarts=count + 1) as (server, url):
        async with Client(f"{url}/v1", timeout_s=HANG_S) as client:
            crowd = Crowd(client, clients, seed)
            for number in range(count):
                await asyncio.sleep(rng.uniform(0.2, 1.0))
                await _kill_one(server.pid, url, crowd, record)
                if number % 20 == 19:
                    print(f"{number + 1} engines killed", flush=True)
            await crowd.stop()
        record.outcomes.update(sample.error or "answered" for _, _, sample in crowd.ended)
        left = {name: value for name, value in gauges(url).items() if value}
    return {"engine": engine} | _figures(record, count), _broken(record, left, slack)


@contextlib.contextmanager
def _server(engine: str, max_restarts: int) -> Iterator[Any]:
    if engine == "bundled":
        with serving(None, "float32", "--max-restarts", str(max_restarts), name=MODEL) as found:
            yield found
        return
    port = free_port()
    options = {"port": port, "supervision": {"max_restarts": max_restarts, "has_standby": False}}
    command = [sys.executable, str(HASHING_SERVER), json.dumps(options)]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/v1/health/ready") as server:
        yield server, url


async def _kill_one(supervisor: int, url: str, crowd: Crowd, record: Record) -> None:
    pid = await asyncio.to_thread(engine_pid, supervisor)
    assert pid is not None, "an engine runs where the server is ready"
    while not crowd.open:  # noqa: ASYNC110 - a client may be between two requests
        await asyncio.sleep(0.01)
    killed, num_before = time.monotonic(), len(crowd.ended)
    record.open_at_kill.append(len(crowd.open))
    os.kill(pid, signal.SIGKILL)
    while True:
        await asyncio.sleep(0.02)
        now = await asyncio.to_thread(engine_pid, supervisor)
        if now not in (pid, None) and await asyncio.to_thread(is_ready, url):
            break
    record.ready_s.append(time.monotonic() - killed)
    for started, ended, _ in crowd.ended[num_before:]:
        if started < killed:
            record.told_s.append(ended - killed)


def _figures(record: Record, count: int) -> dict[str, Any]:
    return {
        "kills": count,
        "requests": sum(record.outcomes.values()),
        "outcomes": dict(record.outcomes),
        "hanging": record.outcomes["timeout"],
        "open_at_kill_mean": float(np.mean(record.open_at_kill)),
        "told_s": _spread(record.told_s),
        "ready_again_s": _spread(record.ready_s),
    }


def _spread(values: list[float]) -> dict[str, float]:
    found = np.percentile(values, [50, 99, 100])
    return {n: round(float(v), 3) for n, v in zip(("p50", "p99", "max"), found, strict=True)}


def _broken(record: Record, left: dict[str, float], slack: float) -> list[str]:
    broken = []
    if record.outcomes["timeout"]:
        broken.append(f"{record.outcomes['timeout']} clients hang")
    others = {name for name in record.outcomes if name not in ALLOWED}
    if others:
        broken.append(f"requests ended by {', '.join(sorted(others))}")
    if max(record.told_s) > TOLD_S * slack:
        broken.append(f"a request ended {max(record.told_s):.2f} s after the death, not 1 s")
    if left:
        broken.append(f"kept after the end: {left}")
    return broken
