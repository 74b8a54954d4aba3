"""Two API keys on one server: one attacks, the other asks for something small again and again.

The neighbour's latency alone and beside each attack, and their ratio. The bound of each attack is
a multiple of the neighbour's own service time; see docs/reliability.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2

from neighbour_attacks import (
    CHAT,
    HALF_OPEN,
    MODEL,
    NAMES,
    NameServer,
    Target,
    attack,
    chat,
    environment,
    form,
    image,
    png_url,
    serve_picture,
)
from processes import serving
from server_state import worker_rss_mib

ATTACKER, NEIGHBOUR = "attacker-key", "neighbour-key"
MAX_NUM_SEQS = 64
MAX_ANSWERS = MAX_NUM_SEQS // 4
UNDER_WAY_S = 300.0
# The neighbour's longest wait, in multiples of its median alone. Where the neighbour waits for a
# piece of the attacker's work (a compile, a decode, a step of a full batch), that work is in it.
BOUNDS = {
    "slow_grammars": 20.0,
    "silent_names": 3.0,
    "flat_pictures": 20.0,
    "slow_image_servers": 3.0,
    "all_places": 10.0,
    "flood": 10.0,
    "whole_answers": 10.0,
    "oversized_pictures": 10.0,
    HALF_OPEN: 3.0,
}

# Of a neighbour before each of its requests.
MAX_PAUSE_S = 0.5


def _plain(rng: random.Random, port: int) -> dict[str, Any]:
    return chat(f"hello {rng.random()}", max_tokens=1)


def _grammar(rng: random.Random, port: int) -> dict[str, Any]:
    name = f"a{rng.randrange(10**9)}"
    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
    return chat("write", max_tokens=4, **form(schema))


def _by_url(rng: random.Random, port: int) -> dict[str, Any]:
    url = f"http://pictures{rng.randrange(10**9)}.test:{port}/{rng.randrange(10**9)}.png"
    return chat("look", image(url), max_tokens=1)


def _picture(rng: random.Random, port: int) -> dict[str, Any]:
    color = rng.randrange(256), rng.randrange(256), rng.randrange(256)
    return chat("look", image(png_url(64, 64, color)), max_tokens=1)


# What the neighbour asks for: it needs what the attack takes.
SMALL: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "slow_grammars": _grammar,
    "silent_names": _by_url,
    "flat_pictures": _picture,
    "slow_image_servers": _by_url,
    "oversized_pictures": _by_url,
}


class Neighbour:
    """A client that asks one thing after the other, each on a new connection.

    It waits a random time before each, so that it asks for less than its share, at any moment of a
    step. Without a pause its next question would come right behind its last answer.
    """

    def __init__(self, url: str, site_port: int, seed: int) -> None:
        self._url = url
        self._site_port = site_port
        self._rng = random.Random(seed)
        self.failures: list[str] = []

    async def latencies(self, name: str, count: int) -> list[float]:
        """Seconds from each request to the end of its answer."""
        make, found = SMALL.get(name, _plain), []
        for _ in range(count):
            await asyncio.sleep(self._rng.uniform(0, MAX_PAUSE_S))
            found.append(await self._ask(make(self._rng, self._site_port)))
        return found

    async def _ask(self, body: dict[str, Any]) -> float:
        headers = {"Authorization": f"Bearer {NEIGHBOUR}", "Connection": "close"}
        started = time.monotonic()
        try:
            async with httpx2.AsyncClient(timeout=UNDER_WAY_S, verify=False) as http:
                started = time.monotonic()  # the client's own start is no part of it
                response = await http.post(self._url + CHAT, json=body, headers=headers)
            if response.status_code != 200:
                self.failures.append(f"{response.status_code} {response.text[:200]}")
        except httpx2.HTTPError as error:
            self.failures.append(repr(error))
        return time.monotonic() - started


async def run_neighbours(
    attacks: str, size: float, count: int, checkpoint: str, dtype: str, seed: int, slack: float
) -> tuple[dict[str, Any], list[str]]:
    """Run each attack beside the neighbour; see `run_kills`. Prints a JSON line for each."""
    names = [name for name in attacks.split(",") if name] or list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise SystemExit(f"{unknown[0]} is no attack: choose from {', '.join(NAMES)}")
    rows, broken = {}, []
    async with _server(checkpoint or None, dtype) as (url, site_port, pid):
        neighbour = Neighbour(url, site_port, seed)
        for name in names:
            target = Target(url, ATTACKER, site_port, MAX_ANSWERS, seed)
            row = await _beside(neighbour, name, size, count, target, pid)
            rows[name] = row
            print(json.dumps({"attack": name, **row}), flush=True)
            broken += _broken(name, row, slack)
    return {"size": size, "attacks": rows}, broken


async def _beside(
    neighbour: Neighbour, name: str, size: float, count: int, target: Target, pid: int
) -> dict[str, Any]:
    """The neighbour's latencies alone and beside one attack."""
    neighbour.failures.clear()
    await neighbour.latencies(name, 2)  # what starts at first use has started
    alone = await neighbour.latencies(name, count)
    rss_alone = worker_rss_mib(pid)
    spawn = multiprocessing.get_context("spawn")
    is_under_way, is_over, results = spawn.Event(), spawn.Event(), spawn.Queue()
    child = spawn.Process(target=attack, args=(name, size, target, is_under_way, is_over, results))
    child.start()
    try:
        if not await asyncio.to_thread(is_under_way.wait, UNDER_WAY_S):
            raise RuntimeError(f"{name} was not under way in {UNDER_WAY_S:.0f} s")
        beside = await neighbour.latencies(name, count)
        rss_beside = worker_rss_mib(pid)
    finally:
        is_over.set()
        outcomes = await asyncio.to_thread(results.get, True, UNDER_WAY_S)
        await asyncio.to_thread(child.join, UNDER_WAY_S)
    service_s = statistics.median(alone)
    return {
        "alone_s": round(service_s, 4),
        "beside_p50_s": round(statistics.median(beside), 4),
        "beside_max_s": round(max(beside), 4),
        "ratio_p50": round(statistics.median(beside) / service_s, 2),
        "ratio_max": round(max(beside) / service_s, 2),
        "bound": BOUNDS[name],
        "failures": list(neighbour.failures),
        "attacker": outcomes,
        "worker_rss_mib": [rss_alone, rss_beside],
    }


def _broken(name: str, row: dict[str, Any], slack: float) -> list[str]:
    broken = []
    if row["ratio_max"] > row["bound"] * slack:
        times = f"{row['ratio_max']} times its own service time, not {row['bound']:g}"
        broken.append(f"{name}: the neighbour waited {times}")
    if row["failures"]:
        broken.append(f"{name}: the neighbour got {row['failures'][0]}")
    return broken


@contextlib.asynccontextmanager
async def _server(checkpoint: str | None, dtype: str) -> AsyncIterator[tuple[str, int, int]]:
    """The server, with its outside world on loopback: its URL, the image server's port, its pid."""
    loop = asyncio.get_running_loop()
    names, _ = await loop.create_datagram_endpoint(NameServer, local_addr=("127.0.0.1", 0))
    site = await asyncio.start_server(serve_picture, "127.0.0.1", 0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        port = names.get_extra_info("sockname")[1]
        server, url = await asyncio.to_thread(_start, stack, folder, port, checkpoint, dtype)
        try:
            yield url, site.sockets[0].getsockname()[1], server.pid
        finally:
            await asyncio.to_thread(stack.close)
            site.close()
            names.close()


def _start(
    stack: contextlib.ExitStack,
    folder: str,
    name_server_port: int,
    checkpoint: str | None,
    dtype: str,
) -> Any:
    """Start the server in the stack; returns its process and its URL."""
    keys = Path(folder, "keys")
    keys.write_text(f"{ATTACKER}\n{NEIGHBOUR}\n")
    changed = environment(folder, name_server_port)
    before = {name: os.environ.pop(name, None) for name in changed}
    os.environ.update(changed)
    options = ["--api-key-file", str(keys), "--allow-private-image-urls"]
    options += ["--max-num-seqs", str(MAX_NUM_SEQS), "--no-spare-engine"]
    try:
        return stack.enter_context(serving(checkpoint, dtype, *options, name=MODEL))
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
