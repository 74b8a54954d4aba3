"""Sanic's HTTP protocol behind a strict reader of what comes over the wire.

Owns when bytes are read, how long a client may take, and how a client that was refused is
parted from: one answer, then the connection closes. Every head is judged by `http_head`
before Sanic's parser sees it, and a chunked body is read by `http_chunks` in its place. Knows
nothing of routes. The same for TCP and for TLS, which ends beneath it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import orjson
from sanic import Request
from sanic.compat import Header
from sanic.exceptions import BadURL, PayloadTooLarge, RequestTimeout
from sanic.headers import format_http1_response
from sanic.http import Http, Stage
from sanic.server import HttpProtocol

from ..errors import ApiError, NotReadyError, error_body
from ..settings import ServerSettings
from .chunked import ChunkReader
from .head import HeadLimits, canonical, end_of_head, read_head

logger = logging.getLogger(__name__)

MIN_BYTES_PER_S = 65_536
# How long a refused client is listened to, without effect, and how long if it is silent: a
# connection that closes with bytes unread takes the answer along that the client has not read.
LINGER_S = 2.0
FULL_HOUSE = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b"
)
SILENCE_S = 0.25


class SlowBodyError(ApiError):
    status = 408
    type = "invalid_request_error"


class StrictHttp(Http):  # type: ignore[misc]
    """One connection's requests, in turn."""

    # The limit is `HeadLimits`; Sanic's own would cut before it.
    HEADER_CEILING = HEADER_MAX_SIZE = 2**31
    __slots__ = ("chunks",)

    def init_for_request(self) -> None:
        super().init_for_request()
        self.chunks: ChunkReader | None = None

    async def http1_request_header(self) -> None:
        """Receive and judge a head, and have Sanic read what passed."""
        limits = _limits_of(self.protocol.app)
        try:
            async with asyncio.timeout(self.protocol.request_timeout):
                head = await self._receive_head(limits)
        except TimeoutError:
            raise RequestTimeout("the request's head did not come in time") from None
        # So that the answer to HEAD has no body even if the head is refused.
        self.head_only = head.startswith(b"HEAD ")
        read = read_head(head, limits)
        self.recv_buffer[: len(head)] = canonical(head, read)
        self.chunks = ChunkReader(limits) if read.is_chunked else None
        await super().http1_request_header()
        if self.chunks:
            # Sanic leaves the head's last line end for its own reader of chunks.
            del self.recv_buffer[:2]
        # Answered like any request: nothing here speaks another protocol.
        self.upgrade_websocket = False

    async def _receive_head(self, limits: HeadLimits) -> bytes:
        buffer = self.recv_buffer
        num_passed = 0
        while True:
            # A client may end its last body with a line that no length counts (RFC 9112, 2.2).
            if buffer.startswith(b"\r\n"):
                del buffer[:2]
            end = end_of_head(buffer, limits, num_passed)
            if end is not None:
                return bytes(buffer[:end])
            num_passed = len(buffer)
            await self._receive_more()

    async def read(self) -> bytes | None:
        """The next piece of the body; None at its end. Raises ApiError or PayloadTooLarge."""
        if not self.chunks:
            self._check_size(self.request_bytes or 0)
            return await super().read()
        await self._continue()
        data = self.chunks.take(self.recv_buffer, int(self.request_max_size))
        self._check_size(self.chunks.declared_bytes)
        if self.chunks.is_complete:
            self.request_body = None
        elif not data:
            await self._receive_more()
        return data

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self.request_max_size:
            raise PayloadTooLarge(
                f"the request's body is over {self.request_max_size:,} bytes: send less, or"
                " start the server with a larger --max-body-bytes"
            )

    async def _continue(self) -> None:
        if self.expecting_continue:
            self.expecting_continue = False
            await self._send(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def http1_response_header(self, data: bytes, end_stream: bool) -> None:
        """Send an answer's head. One that comes before the body's end is the last one."""
        if self.request_body or self.request is None or self.request.method == "NONE":
            self.request_body = None
            self.expecting_continue = False
            self.keep_alive = False
            assert isinstance(self.protocol, StrictProtocol), "which is what makes this class"
            self.protocol.linger()
        if not end_stream and self.request is not None and self.request.version == "1.0":
            await self._begin_until_close(data)
        else:
            await super().http1_response_header(data, end_stream)

    async def _begin_until_close(self, data: bytes) -> None:
        """HTTP/1.0 knows no chunks: a stream ends where its connection does (RFC 9112, 6.1)."""
        self.keep_alive = False
        response = self.response
        response.headers["connection"] = "close"
        self.response_func = self._send_until_close
        head = format_http1_response(response.status, response.processed_headers)
        await self._send(head + data)
        self.stage = Stage.RESPONSE

    async def _send_until_close(self, data: bytes, end_stream: bool) -> None:
        if data:
            await self._send(data)
        if end_stream:
            self.response_func = None  # type: ignore[assignment]
            self.stage = Stage.IDLE


class StrictProtocol(HttpProtocol):  # type: ignore[misc]
    """A connection that outlives its last answer for as long as a refused client sends.

    It does not outlive a client that reads nothing: what is unsent would be kept for ever.
    """

    HTTP_CLASS = StrictHttp
    __slots__ = ("_end", "_is_deaf", "_is_silent", "_lingers", "_reader_check")

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._lingers = False
        self._is_deaf = False
        self._is_silent = False
        self._end: asyncio.TimerHandle | None = None
        self._reader_check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Bound what the kernel holds of an answer, beside the 64 KiB that wait here."""
        size = _settings_of(self.app).send_buffer_bytes
        if (raw := transport.get_extra_info("socket")) is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        most = _settings_of(self.app).max_connections
        if len(self.connections) < most or self._makes_room():
            super().connection_made(transport)
        else:
            self._turn_away(transport)

    def _makes_room(self) -> bool:
        """Whether another connection, on which nobody asks anything just now, could be closed."""
        return any(connection.close_if_idle() for connection in list(self.connections))

    def _turn_away(self, transport: Any) -> None:
        """Answer without having read anything: each connection has a request on its way."""
        # Sanic's own protocol would begin to read requests here.
        super(HttpProtocol, self).connection_made(transport)
        self.recv_buffer = bytearray()
        error = NotReadyError("too many connections are open: try again", retry_after_s=1.0)
        content = orjson.dumps(error_body(error))
        transport.write(FULL_HOUSE % (len(content), content))
        self.linger()
        self.close()

    def pause_writing(self) -> None:
        """The client does not keep up: whoever writes waits, and a reader that stopped is cut."""
        super().pause_writing()
        self._check_reader(None)

    def resume_writing(self) -> None:
        if self._reader_check is not None:
            self._reader_check.cancel()
        super().resume_writing()

    def _check_reader(self, num_unsent: int | None) -> None:
        """Cut the connection unless it took something since the last time."""
        transport = self.transport
        if transport is None:
            return
        now = transport.get_write_buffer_size()
        if num_unsent is not None and now >= num_unsent:
            logger.warning("a client that reads nothing is cut, with %d bytes unsent", now)
            transport.abort()
            return
        timeout_s = _settings_of(self.app).reader_timeout_s
        self._reader_check = self.loop.call_later(timeout_s, self._check_reader, now)

    def linger(self) -> None:
        """Close softly when the time comes: what still arrives is read and forgotten."""
        self._lingers = True

    def close(self, timeout: float | None = None) -> None:
        transport = self.transport
        if not self._lingers or transport is None or transport.is_closing():
            super().close(timeout)
            return
        self._lingers, self._is_deaf = False, True
        self.recv_buffer.clear()
        if transport.can_write_eof():
            transport.write_eof()
        transport.resume_reading()
        self._listen_on(self.loop.time() + LINGER_S)

    def _listen_on(self, deadline: float) -> None:
        """Close if it was silent since the last time, or if it is time."""
        if self._end is not None and (self._is_silent or self.loop.time() >= deadline):
            self.close()
            return
        self._is_silent = True
        self._end = self.loop.call_later(SILENCE_S, self._listen_on, deadline)

    def data_received(self, data: bytes) -> None:
        self._is_silent = False
        if not self._is_deaf:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._end is not None:
            self._end.cancel()
        super().connection_lost(exc)


class HardyRequest(Request):
    """A request that can also stand for one whose URL no parser takes.

    Sanic makes an empty request (method NONE) to answer a head that it could not
    read, with the same URL: without this the second failure would close the
    connection without an answer.
    """

    def __init__(
        self,
        url_bytes: bytes,
        headers: Header,
        version: str,
        method: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        try:
            super().__init__(url_bytes, headers, version, method, *args, **kwargs)
        except BadURL:
            if method != "NONE":
                raise
            super().__init__(b"*", headers, version, method, *args, **kwargs)


async def receive_body(request: Request, timeout_s: float) -> None:
    """Read the whole body, which must keep coming.

    timeout_s: how long it may take, and longer by what came already at
    `MIN_BYTES_PER_S`, so that a large body is not a slow one.
    Raises SlowBodyError, BadRequestError for broken framing, or PayloadTooLarge.
    """
    stream = request.stream
    if not isinstance(stream, Http) or not stream.request_body:
        return
    # One buffer: a list of pieces would hold a header for each, however small they come.
    body = bytearray()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    try:
        async with asyncio.timeout_at(deadline) as timer:
            async for piece in stream:
                body += piece
                deadline += len(piece) / MIN_BYTES_PER_S
                timer.reschedule(deadline)
    except TimeoutError as error:
        raise SlowBodyError(f"the body did not come within {timeout_s:g} s") from error
    request.body = bytes(body)


def _settings_of(app: Any) -> ServerSettings:
    settings: ServerSettings = app.ctx.services.settings
    return settings


def _limits_of(app: Any) -> HeadLimits:
    limits: HeadLimits = app.ctx.head_limits
    return limits
