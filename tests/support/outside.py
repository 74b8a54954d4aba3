"""A site on loopback, a scripted resolver and a connector: the outside world of a fetch in tests.

No packet leaves the machine: a script resolves names, and every connection goes to loopback,
whatever address was judged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import httpcore2

from vlmserve.server.images.fetch import TcpConnector

PUBLIC = "93.184.215.14"
BODY = b"\x89PNG what stands here does not matter to a fetch"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class ScriptedResolver:
    """Answers a host with its next list of addresses; the last one stays."""

    def __init__(self, answers: dict[str, list[list[str]]]) -> None:
        self._answers = {host: list(lists) for host, lists in answers.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        lists = self._answers.get(host)
        if lists is None:
            raise OSError("unknown name")
        return lists.pop(0) if len(lists) > 1 else lists[0]


class LoopbackConnector:
    """Connects to a test server on loopback and notes the address that was meant."""

    def __init__(self, port: int | None = None, dead: Sequence[str] = ()) -> None:
        self._tcp = TcpConnector()
        self._port = port
        self._dead = dead
        self.connected: list[tuple[str, int]] = []

    async def connect(
        self, address: str, port: int, timeout_s: float | None
    ) -> httpcore2.AsyncNetworkStream:
        self.connected.append((address, port))
        if self._port is None or address in self._dead:
            raise httpcore2.ConnectError("nobody there")
        return await self._tcp.connect("127.0.0.1", self._port, timeout_s)


def plain_response(body: bytes = BODY, status: str = "200 OK", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return plain_response(b"", status, f"Location: {location}\r\n")


class Site:
    """A server on loopback that answers by path, and what it was asked."""

    def __init__(self, answers: dict[str, bytes | Handler]) -> None:
        self._answers = answers
        self.heads: list[str] = []
        self.was_asked = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            self.was_asked.set()
            answer = self._answers[head.split()[1]]
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


FORBIDDEN = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1",
    "172.31.255.255", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.127.255.255",
    "100.100.100.200", "168.63.129.16", "192.0.0.8", "192.0.2.1", "192.88.99.1", "198.18.0.1",
    "198.19.255.255", "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255", "::", "::1", "::127.0.0.1", "::93.184.215.14", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "::ffff:93.184.215.14", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::5db8:d70e", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:4136:e378::1",
    "2001:db8::1", "2001:10::1", "2002:7f00:1::1", "2002:5db8:d70e::1", "3fff::1", "5f00::1",
    "fc00::1", "fd12:3456::1", "fd00:ec2::254", "fe80::1", "febf::1", "fec0::1", "ff02::1",
    "ff0e::1", "4000::1", "fe80::1%eth0", "2606:4700::1111%eth0",
]  # fmt: skip


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A body without declared length or end."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not writer.is_closing():
        writer.write(bytes(500))
        await writer.drain()


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A byte every 20 ms: no gap is long, the whole is endless."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)
