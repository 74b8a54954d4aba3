"""A server whose way out is scripted: it tells who would have been asked for a picture.

Owns the scripts and the server's thread. Names are resolved and connections made within the
process and its loopback only. Knows nothing of any single threat.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from support.http_side import MODEL, NO_AUTHORITIES
from support.invariants import GENERATION_ROUTES, body_for
from support.outside import (
    PUBLIC,
    LoopbackConnector,
    ScriptedResolver,
    Site,
)
from support.threaded import server_in_thread

from vlmserve.server.images.fetch import ImageFetcher
from vlmserve.server.images.settings import ImageSettings


class Outside:
    """The world as a fetcher sees it: a script for names, and one site behind every address.

    All but `script` is called in the server's event loop.
    """

    def __init__(self) -> None:
        self._site: Site | None = None
        self._server: asyncio.Server | None = None
        self.script(None, {})

    def script(self, site: Site | None, names: dict[str, list[list[str]]]) -> None:
        """From now on this site answers, or nobody does."""
        self._site = site
        self.resolver = ScriptedResolver(names)
        self.connected: list[tuple[str, int]] = []

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        return await self.resolver.resolve(host, port)

    async def connect(self, address: str, port: int, timeout_s: float | None) -> Any:
        if self._server is None:
            self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.connected.append((address, port))
        is_there = self._site is not None
        own_port = self._server.sockets[0].getsockname()[1]
        return await LoopbackConnector(own_port if is_there else None).connect(
            address, port, timeout_s
        )

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._site is not None, "it was there when it was connected to"
        await self._site(reader, writer)


@dataclass
class Asked:
    """What came of one body on each route, and who was asked on the way."""

    connected: list[tuple[str, int]]
    resolved: list[str]
    answers: list[httpx2.Response] = field(default_factory=list)

    def messages(self) -> list[str]:
        """The messages of the 400s that all answers are."""
        assert {answer.status_code for answer in self.answers} == {400}, self.answers[0].text
        errors = [answer.json() for answer in self.answers]
        assert all(error["object"] == "error" for error in errors)
        return [error["message"] for error in errors]

    def succeeded(self) -> bool:
        return {answer.status_code for answer in self.answers} == {200}


@dataclass
class GuardedServer:
    """Asks the server's routes for pictures of an outside that each question scripts anew."""

    port: int
    outside: Outside

    def ask(
        self,
        urls: list[str] | None,
        site: Site | None = None,
        *,
        names: dict[str, list[list[str]]] | None = None,
        text: str = "Hi",
        routes: Sequence[str] = GENERATION_ROUTES,
    ) -> Asked:
        """One request with these pictures on each route. Without a site nobody answers."""
        self.outside.script(site, names or {"pictures.example": [[PUBLIC]]})
        asked = Asked(self.outside.connected, self.outside.resolver.asked)
        base_url = f"http://127.0.0.1:{self.port}"
        # Reading the system's authorities would take most of a question's time.
        options = {"timeout": 60, "trust_env": False, "verify": False}
        with httpx2.Client(base_url=base_url, **options) as client:
            for route in routes:
                body = body_for(route, text, images=urls)
                body |= {name: MODEL for name in ("model", "model_id") if name in body}
                asked.answers.append(client.post(route, json=body))
        return asked


@contextlib.contextmanager
def guarded_server(checkpoint: Path, **limits: Any) -> Iterator[GuardedServer]:
    """A server with these limits of ImageSettings, real decoders, and a scripted engine."""
    images = ImageSettings(tile_cache_bytes=0, **limits)
    outside = Outside()

    @contextlib.asynccontextmanager
    async def fetching() -> AsyncIterator[dict[str, Any]]:
        """In the server's own loop, which is the one that uses and closes it."""
        fetcher = ImageFetcher(
            images, resolver=outside, connector=outside, ssl_context=NO_AUTHORITIES
        )
        try:
            yield {"fetcher": fetcher}
        finally:
            await fetcher.close()
            await outside.close()

    with server_in_thread(checkpoint, parts=fetching, images=images) as port:
        yield GuardedServer(port, outside)
