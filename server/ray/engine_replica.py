"""A replica of Ray Serve with an engine: an ordinary server as a child, and a way to it.

The child is `vlmserve serve` on a free port of loopback: supervisor, HTTP worker and engine as on
one machine. This process passes bytes on. It knows nothing of the API, and never imports torch.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
from ray import serve

from ..children.private_server import PrivateServer
from .messages import Accepted, AnswerHead, ForwardedRequest, Headers, WholeAnswer
from .request_router import IS_READY, OPEN

logger = logging.getLogger("ray.serve")

READY_PATH = "/v1/health/ready"
HEALTH_TIMEOUT_S = 5.0
# Headers of one connection, not of the answer; and those that Ray's proxy sets itself.
DROPPED = frozenset(
    (b"connection", b"keep-alive", b"transfer-encoding", b"date", b"server", b"x-request-id")
)


class ServerLostError(Exception):
    """The server's process ended before it answered."""


class EngineReplica:
    """Owns a server and answers requests with it.

    options: of `vlmserve serve`, as the values of its environment variables. stop_timeout_s: how
    long the server has to stop. unready_limit_s: how long it may be unready, for example because
    its engine restarts, before Ray replaces this replica.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        options: Mapping[str, str],
        stop_timeout_s: float,
        unready_limit_s: float,
    ) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        self._stop_timeout_s = stop_timeout_s
        self._unready_limit_s = unready_limit_s
        self._key_file = _KeyFile(options.get("VLMSERVE_API_KEY_FILE"))
        self._open: Counter[str] = Counter()
        self._server = await PrivateServer.start(
            ["--replica-name", self._name], options, logger.info
        )
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=HEALTH_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )
        self._last_ready = time.monotonic()

    async def forward(
        self, request: ForwardedRequest
    ) -> AsyncIterator[Accepted | AnswerHead | bytes]:
        """Yield Accepted, then AnswerHead, then the pieces of the body.

        A caller that cancels closes the connection, which cancels the request in the engine.
        Raises ServerLostError.
        """
        yield Accepted(self._name)
        self._open[request.sender] += 1
        try:
            async for item in self._answer(request):
                yield item
        except httpx2.TransportError as error:
            raise ServerLostError(f"the replica's server is gone: {error}") from None
        finally:
            self._open[request.sender] -= 1

    async def forward_whole(self, request: ForwardedRequest) -> WholeAnswer:
        """The answer in one piece, for routes that every replica is asked."""
        try:
            answer = await self._client.send(self._request(request))
        except httpx2.TransportError as error:
            raise ServerLostError(f"the replica's server is gone: {error}") from None
        head = AnswerHead(answer.status_code, _kept(answer.headers.raw), answer.content)
        return WholeAnswer(self._name, head)

    async def check_health(self) -> None:
        """Called by Ray; raises if this replica must be replaced."""
        if self._server.has_ended:
            raise RuntimeError("the replica's server has ended")
        if self._key_file.has_changed():
            self._server.reread_keys()
        if await self._is_ready():
            self._last_ready = time.monotonic()
        elif time.monotonic() - self._last_ready > self._unready_limit_s:
            # Ray would wait for its open requests, which a hung server never ends.
            self._server.kill()
            raise RuntimeError(f"the replica was not ready for {self._unready_limit_s:g} s")

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Ray; the report that routers read."""
        # Only senders with open requests are kept: others may be gone.
        self._open = +self._open
        return {IS_READY: await self._is_ready(), OPEN: dict(self._open)}

    async def __del__(self) -> None:
        """Called by Ray when all requests have ended, or its own time for that is over."""
        await self._client.aclose()
        await self._server.stop(self._stop_timeout_s)

    async def _answer(self, request: ForwardedRequest) -> AsyncIterator[AnswerHead | bytes]:
        answer = await self._client.send(self._request(request), stream=True)
        try:
            headers = _kept(answer.headers.raw)
            if "content-length" in answer.headers:
                body = b"".join([piece async for piece in answer.aiter_raw()])
                yield AnswerHead(answer.status_code, headers, body)
                return
            yield AnswerHead(answer.status_code, headers)
            async for piece in answer.aiter_raw():
                yield piece
        finally:
            await answer.aclose()

    def _request(self, request: ForwardedRequest) -> httpx2.Request:
        url = httpx2.URL(self._server.url).copy_with(raw_path=request.target)
        return self._client.build_request(
            request.method, url, headers=request.headers, content=request.body or None
        )

    async def _is_ready(self) -> bool:
        try:
            url = self._server.url + READY_PATH
            return (await self._client.get(url, timeout=HEALTH_TIMEOUT_S)).status_code == 200
        except httpx2.TransportError:
            return False


class _KeyFile:
    """The file of API keys: whether it is another than at the last look."""

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._state = self._look()

    def has_changed(self) -> bool:
        before, self._state = self._state, self._look()
        return self._state != before

    def _look(self) -> tuple[int, int] | None:
        try:
            found = None if self._path is None else self._path.stat()
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_ino)


def _kept(headers: Headers) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in DROPPED]
