"""The attacks of `torture.py neighbours`, and the outside world of its server.

Each attack runs in a separate process, so that its work takes nothing from the neighbour's
client but the machine's cores. It keeps its pressure up until it is stopped. Names and image
servers are on loopback.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import resource
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from typing import Any

import httpx2
from PIL import Image

MODEL = "torture"
CHAT = "/v1/chat/completions"
# What --max-answer-logprobs allows a whole answer by default.
ANSWER_LOGPROBS = 262_144
# The most images of a request by default.
NUM_IMAGES = 16
OVERSIZED_BYTES = 64 * 1024 * 1024
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
PAUSE_AFTER_REFUSAL_S = 0.2


@dataclass(frozen=True)
class Target:
    """The server and the attacker's key. site_port: of the image server that is asked."""

    url: str
    key: str
    site_port: int
    max_answers: int
    seed: int


Body = Callable[[random.Random], dict[str, Any]]


def chat(text: str, *parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A request with a text, which is new to every cache if it is, and images."""
    content = [{"type": "text", "text": text}, *parts]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def image(url: str) -> dict[str, Any]:
    """An image part."""
    return {"type": "image_url", "image_url": {"url": url}}


def png_url(width: int, height: int, color: tuple[int, int, int]) -> str:
    """A flat picture as a data URL."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return as_data_url(buffer.getvalue())


def as_data_url(file: bytes) -> str:
    """A PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(file).decode()


def with_comment(png: bytes, rng: random.Random) -> bytes:
    """The same picture, new to every cache: drawing it again would take the client longer."""
    text = b"tEXtc\0" + rng.randbytes(8).hex().encode()
    end_of_header = 33
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return png[:end_of_header] + chunk + png[end_of_header:]


def _color(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def slow_schema(rng: random.Random) -> dict[str, Any]:
    """A JSON schema that takes seconds to compile; each is new."""
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", 20)
    patterns = [{"type": "string", "pattern": f".*{letter}.*"} for letter in letters]
    return {"type": "array", "minItems": rng.randrange(10**6), "items": {"allOf": patterns}}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    """A field that asks for JSON of a schema."""
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    }


def _grammars(target: Target) -> Body:
    return lambda rng: chat("write", max_tokens=8, **form(slow_schema(rng)))


def _silent_names(target: Target) -> Body:
    def body(rng: random.Random) -> dict[str, Any]:
        url = f"http://silent-{rng.randrange(10**9)}.test:{target.site_port}/a.png"
        return chat("look", image(url), max_tokens=1)

    return body


def _pictures(target: Target) -> Body:
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 3000), (90, 120, 40)).save(buffer, "PNG")
    flat = buffer.getvalue()

    def body(rng: random.Random) -> dict[str, Any]:
        pictures = [image(as_data_url(with_comment(flat, rng))) for _ in range(NUM_IMAGES)]
        return chat("look", *pictures, max_tokens=1)

    return body


def _slow_servers(target: Target) -> Body:
    def body(rng: random.Random) -> dict[str, Any]:
        url = f"http://pictures.test:{target.site_port}/slow/{rng.randrange(10**9)}"
        return chat("look", image(url), max_tokens=1)

    return body


def _places(target: Target) -> Body:
    def body(rng: random.Random) -> dict[str, Any]:
        text = f"count {rng.random()}"
        return chat(text, n=target.max_answers, max_tokens=300, ignore_eos=True)

    return body


def _flood(target: Target) -> Body:
    return lambda rng: chat(f"count {rng.random()}", max_tokens=300, ignore_eos=True)


def _whole_answers(target: Target) -> Body:
    return lambda rng: whole_answer(rng, target.max_answers)


def whole_answer(rng: random.Random, num_answers: int) -> dict[str, Any]:
    """A request whose answer has as many log-probabilities as the server allows."""
    return chat(
        f"count {rng.random()}",
        n=num_answers,
        max_tokens=ANSWER_LOGPROBS // (21 * num_answers),
        ignore_eos=True,
        logprobs=True,
        top_logprobs=20,
    )


def _oversized(target: Target) -> Body:
    def body(rng: random.Random) -> dict[str, Any]:
        base = f"http://pictures.test:{target.site_port}/oversized"
        urls = [f"{base}/{rng.randrange(10**9)}" for _ in range(NUM_IMAGES)]
        return chat("look", *map(image, urls), max_tokens=1)

    return body


# How many requests are open at once in full size, and their bodies.
ATTACKS: dict[str, tuple[int, Callable[[Target], Body]]] = {
    "slow_grammars": (40, _grammars),
    "silent_names": (48, _silent_names),
    "flat_pictures": (30, _pictures),
    "slow_image_servers": (64, _slow_servers),
    "all_places": (8, _places),
    "flood": (300, _flood),
    "whole_answers": (4, _whole_answers),
    "oversized_pictures": (72, _oversized),
}
HALF_OPEN = "half_open_heads"
NUM_HEADS = 1_300
NAMES = (*ATTACKS, HALF_OPEN)


def attack(
    name: str, size: float, target: Target, is_under_way: Event, is_over: Event, results: Any
) -> None:
    """Run an attack until `is_over`; puts the number of each outcome into the queue `results`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if name == HALF_OPEN:
        work = _open_heads(max(2, int(size * NUM_HEADS)), target, is_under_way, is_over)
    else:
        count, make = ATTACKS[name]
        work = _send(max(2, int(size * count)), make, target, is_under_way, is_over)
    results.put(dict(asyncio.run(work)))


class _Barrier:
    """Waits until something has happened `number` times, and a moment longer."""

    def __init__(self, number: int) -> None:
        self._left = number
        self._event = asyncio.Event()

    def count(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        await asyncio.sleep(1.0)


async def _send(
    count: int, make: Callable[[Target], Body], target: Target, is_under_way: Event, is_over: Event
) -> Counter[str]:
    """Keep `count` requests open. Their image server runs in this process."""
    site = await asyncio.start_server(serve_picture, "127.0.0.1", 0)
    body = make(replace(target, site_port=site.sockets[0].getsockname()[1]))
    outcomes: Counter[str] = Counter()
    headers = {"Authorization": f"Bearer {target.key}", "Content-Type": "application/json"}
    limits = httpx2.Limits(max_connections=None)
    all_sent = _Barrier(count)

    async def client(number: int, http: httpx2.AsyncClient) -> None:
        rng = random.Random(f"{target.seed} {number}")
        while not is_over.is_set():
            content = json.dumps(body(rng)).encode()
            all_sent.count()
            try:
                response = await http.post(CHAT, content=content)
            except httpx2.HTTPError as error:
                outcomes[type(error).__name__] += 1
                await asyncio.sleep(PAUSE_AFTER_REFUSAL_S)
                continue
            outcomes[str(response.status_code)] += 1
            if response.status_code in (429, 503):
                await asyncio.sleep(PAUSE_AFTER_REFUSAL_S)

    async with httpx2.AsyncClient(
        base_url=target.url, headers=headers, timeout=None, limits=limits, verify=False
    ) as http:
        tasks = [asyncio.create_task(client(number, http)) for number in range(count)]
        await all_sent.wait()
        is_under_way.set()
        await asyncio.to_thread(is_over.wait)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes


async def _open_heads(
    count: int, target: Target, is_under_way: Event, is_over: Event
) -> Counter[str]:
    """Keep `count` connections open that never finish their heads; no key is in them."""
    outcomes: Counter[str] = Counter()
    host, port = target.url.removeprefix("http://").split(":")
    all_open = _Barrier(count)

    async def head() -> None:
        while not is_over.is_set():
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(HEAD)
                all_open.count()
                try:
                    first = await reader.read(64)
                    outcomes[first.split(b" ")[1].decode() if b" " in first else "closed"] += 1
                finally:
                    writer.close()
            await asyncio.sleep(PAUSE_AFTER_REFUSAL_S)

    tasks = [asyncio.create_task(head()) for _ in range(count)]
    await all_open.wait()
    is_under_way.set()
    await asyncio.to_thread(is_over.wait)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes


# A name that begins so gets no answer.
SILENT = b"silent-"


class NameServer(asyncio.DatagramProtocol):
    """Every name is this machine, but for those that get no answer."""

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        end = data.index(b"\0", 12) + 5
        name, kind = data[13 : end - 5], struct.unpack(">H", data[end - 4 : end - 2])[0]
        if name.lower().startswith(SILENT):
            return
        is_ipv4 = kind == 1
        head = struct.pack(">HHHHHH", struct.unpack(">H", data[:2])[0], 0x8180, 1, is_ipv4, 0, 0)
        answer = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + bytes((127, 0, 0, 1))
        self._transport.sendto(head + data[12:end] + (answer if is_ipv4 else b""), addr)


async def serve_picture(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An image server: a small picture, a slow one, or one without end."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]
        if path.startswith(b"/slow/"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.5)
        if path.startswith(b"/oversized/"):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            piece = bytes(65_536)
            for _ in range(OVERSIZED_BYTES // len(piece)):
                writer.write(piece)
                await writer.drain()
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), _color(random.Random(path))).save(buffer, "PNG")
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {buffer.tell()}\r\n\r\n"
        writer.write(head.encode() + buffer.getvalue())
        await writer.drain()
    writer.close()


# Read at the start of each Python process of the server: names are asked of the stub on loopback.
SITE_CUSTOMIZE = """
import os
import aiodns
_init = aiodns.DNSResolver.__init__
def _ask_loopback(self, nameservers=None, **options):
    _init(self, nameservers=[os.environ["NEIGHBOURS_NAME_SERVER"]], **options)
aiodns.DNSResolver.__init__ = _ask_loopback
"""


def environment(folder: str, name_server_port: int) -> dict[str, str]:
    """Variables of a server that asks the name server of this machine, on that port."""
    with open(os.path.join(folder, "sitecustomize.py"), "w") as file:
        file.write(SITE_CUSTOMIZE)
    present = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": os.pathsep.join([folder, present] if present else [folder]),
        "NEIGHBOURS_NAME_SERVER": f"127.0.0.1:{name_server_port}",
    }
