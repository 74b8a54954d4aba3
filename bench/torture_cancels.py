"""Clients disconnect from a real server at any moment: nothing of their requests may remain."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from itertools import islice
from typing import Any

from processes import serving
from server_state import engine_pid, gauges, num_descriptors
from vlmserve.server.bench.load import request_bodies, unique_pictures
from vlmserve.server.bench.settings import Load

MODEL = "torture"
# What a client waits for before it disconnects.
STAGES = ("queued", "fetching", "decoding", "prefill", "stream", "plain")
LONGEST_DELAY_S = 0.05
NUM_PICTURES = 16
# The signature and the first chunk; other chunks may follow.
PNG_HEAD_BYTES = 33
REST_S = 5.0


async def run_cancels(count: int, clients: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Leave `count` requests; returns figures and broken promises."""
    options = ["--max-num-seqs", "4", "--no-spare-engine", "--allow-private-image-urls"]
    options += ["--max-queue-requests", "64"]
    with serving(None, "float32", *options, name=MODEL) as (server, url):
        async with _never_ending_pictures() as picture_url:
            canceller = Canceller(int(url.rpartition(":")[2]), picture_url, seed)
            await canceller.run(clients * 4, clients)  # start everything that starts at first use
            base = await _at_rest(url, server.pid)
            engine, started = engine_pid(server.pid), time.monotonic()
            canceller.left.clear()
            await canceller.run(count, clients)
            seconds = time.monotonic() - started
            after = await _at_rest(url, server.pid, base["descriptors"])
            is_same = engine_pid(server.pid) == engine
    figures = {
        "cancels": sum(canceller.left.values()),
        "stages": dict(canceller.left),
        "seconds": round(seconds, 1),
        "before": base,
        "after": after,
        "same_engine": is_same,
    }
    broken = [] if is_same else ["the engine is another process"]
    broken += [
        f"{name}: {after[name]}, was {base[name]}" for name in base if after[name] > base[name]
    ]
    return figures, broken


class Canceller:
    """Sends requests and leaves each at a moment of its stage."""

    def __init__(self, port: int, picture_url: str, seed: int) -> None:
        self._port = port
        self._rng = random.Random(seed)
        drawn = islice(unique_pictures([(224, 224), (1120, 560)], seed), NUM_PICTURES)
        self._pictures = [base64.b64decode(url.partition(",")[2]) for url in drawn]
        self._bodies = {stage: _body_of(stage, seed) for stage in STAGES}
        self._picture_url = picture_url
        self.left: Counter[str] = Counter()

    async def run(self, count: int, num_clients: int) -> None:
        """Send and leave `count` requests, a stage after the other."""
        stages = iter([STAGES[i % len(STAGES)] for i in range(count)])

        async def client() -> None:
            for stage in stages:
                await self._leave(stage)
                self.left[stage] += 1

        await asyncio.gather(*(client() for _ in range(num_clients)))

    async def _leave(self, stage: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(_post(self._body(stage)))
            if stage == "stream":
                await reader.readuntil(b"data: ")
                await reader.readuntil(b"data: ")
            else:
                # The server waits for the picture that never comes at any moment.
                await asyncio.sleep(self._rng.uniform(0.0, LONGEST_DELAY_S))
        except asyncio.IncompleteReadError:
            pass  # rejected: the queue is full
        finally:
            writer.transport.abort()

    def _body(self, stage: str) -> bytes:
        """A new body, so that nothing of it is cached."""
        body = json.loads(self._bodies[stage])
        content = body["messages"][0]["content"]
        content[-1]["text"] = f"{self._rng.randrange(2**64):x} {content[-1]['text']}"
        if stage == "fetching":
            content.insert(0, _picture_part(self._picture_url))
        elif stage == "decoding":
            png = _with_comment(self._rng.choice(self._pictures), self._rng.randbytes(8).hex())
            url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            content.insert(0, _picture_part(url))
        return json.dumps(body).encode()


def _body_of(stage: str, seed: int) -> bytes:
    num_words, stream = 300 if stage == "prefill" else 5, stage == "stream"
    load = Load(1, 200, 0, prompt_words=num_words, stream=stream, ignore_eos=True, seed=seed)
    return request_bodies(load, MODEL)[0]


def _picture_part(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


def _with_comment(png: bytes, text: str) -> bytes:
    """The same picture in other bytes; cheaper than a new picture."""
    chunk = b"tEXtComment\0" + text.encode()
    checked = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:PNG_HEAD_BYTES] + checked + png[PNG_HEAD_BYTES:]


def _post(body: bytes) -> bytes:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextlib.asynccontextmanager
async def _never_ending_pictures() -> AsyncIterator[str]:
    """The URL of a picture on loopback whose bytes never come."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
            await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/picture.png"


async def _at_rest(
    url: str, supervisor: int, most_descriptors: float | None = None
) -> dict[str, float]:
    """Blocks, requests and descriptors once they are at rest, or after REST_S.

    most_descriptors: the most at rest; None: at rest when their number no longer changes.
    """
    deadline, before = time.monotonic() + REST_S, most_descriptors
    while True:
        state = await asyncio.to_thread(gauges, url)
        descriptors = await asyncio.to_thread(num_descriptors, supervisor)
        is_at_rest = not any(state.values()) and before is not None and descriptors <= before
        if is_at_rest or time.monotonic() > deadline:
            return state | {"descriptors": float(descriptors)}
        before = descriptors if most_descriptors is None else most_descriptors
        await asyncio.sleep(0.1)
