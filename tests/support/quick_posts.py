"""Posts JSON on one kept connection, for tests of thousands of requests.

An HTTP library takes more than half of the processor time of such a test, and what it does with
connections is not what they test.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2


class QuickPosts:
    """One connection at a time to a server, opened again when the server closes it."""

    def __init__(self, url: httpx2.URL) -> None:
        self._url = url
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._requests: dict[str, httpx2.Request] = {}

    async def post(self, path: str, body: Any) -> httpx2.Response:
        """The whole answer to this body."""
        if self._streams is None:
            assert self._url.port is not None
            self._streams = await asyncio.open_connection(self._url.host, self._url.port)
        reader, writer = self._streams
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._url.host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = httpx2.Headers([line.split(": ", 1) for line in lines if line])
        content = await _content(reader, headers)
        if headers.get("connection") == "close":
            await self.close()
        if path not in self._requests:
            self._requests[path] = httpx2.Request("POST", self._url.join(path))
        status = int(status_line.split(" ")[1])
        return httpx2.Response(
            status, headers=headers, content=content, request=self._requests[path]
        )

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            await self._streams[1].wait_closed()
        self._streams = None


async def _content(reader: asyncio.StreamReader, headers: httpx2.Headers) -> bytes:
    """What follows a head, of a given length or in chunks."""
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers["content-length"]))
    content = b""
    while length := int(await reader.readuntil(b"\r\n"), 16):
        content += (await reader.readexactly(length + 2))[:-2]
    assert await reader.readexactly(2) == b"\r\n"
    return content


@asynccontextmanager
async def quick_posts(client: httpx2.AsyncClient) -> AsyncIterator[QuickPosts]:
    """Posts to the server of this client."""
    posts = QuickPosts(client.base_url)
    try:
        yield posts
    finally:
        await posts.close()
