"""Sanic's HTTP protocol behind a strict reader of the bytes on the wire.

Owns when bytes are read, how long a client may take, and how the server closes a connection
whose request it rejected: one answer, then a lingering close. `head.py` judges every head
before Sanic's parser sees it, and `chunked.py` reads chunked bodies instead of Sanic. Each
connection moves through the table of `connection_states.py`. Knows nothing of routes. TCP and
TLS connections are handled alike.
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
from sanic.http import Http
from sanic.server import HttpProtocol

from ...router.state_table import next_state
from ..admission.bytes_in_flight import keep_bytes
from ..errors import ApiError, NotReadyError, error_body
from ..settings import ServerSettings
from .answer_writer import AnswerWriter
from .auth import OPEN_PATHS
from .chunked import ChunkReader
from .connection_places import ConnectionPlaces
from .connection_states import TRANSITIONS, ConnectionEvent, ConnectionState
from .head import HeadLimits, canonical, end_of_head, read_head
from .targets import plain_url

logger = logging.getLogger(__name__)

MIN_BYTES_PER_S = 65_536
# How long a lingering close reads on, and how long if the client sends nothing. A connection
# that is closed while bytes are unread is reset, and the client may lose the answer.
LINGER_S = 2.0
SILENCE_S = 0.25
# A body that makes this progress is not among the first to go when a place is needed.
PROGRESS_BYTES = 65_536
OWES_REQUEST = {
    ConnectionState.IDLE,
    ConnectionState.READING_HEAD,
    ConnectionState.READING_BODY,
}
TOO_MANY_CONNECTIONS = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b"
)


class SlowBodyError(ApiError):
    status = 408
    type = "invalid_request_error"


class StrictHttp(AnswerWriter):
    """The requests of one connection, one after the other."""

    # `HeadLimits` is the limit; Sanic's own would apply before it.
    HEADER_CEILING = HEADER_MAX_SIZE = 2**31
    __slots__ = ("chunks", "progress_bytes")

    def init_for_request(self) -> None:
        super().init_for_request()
        self.chunks: ChunkReader | None = None
        self.progress_bytes = 0
        if self._connection.phase is ConnectionState.ANSWERING:
            self._connection.advance(ConnectionEvent.ANSWERED)

    @property
    def _connection(self) -> StrictProtocol:
        protocol = self.protocol
        assert isinstance(protocol, StrictProtocol), "StrictProtocol creates this object"
        return protocol

    async def http1_request_header(self) -> None:
        """Receive and judge a head, then let Sanic parse it."""
        self._connection.advance(ConnectionEvent.HEAD_STARTED)
        limits = _limits_of(self.protocol.app)
        try:
            async with asyncio.timeout(self.protocol.request_timeout):
                head = await self._receive_head(limits)
        except TimeoutError:
            raise RequestTimeout("the request's head did not arrive in time") from None
        # Set before the head is judged: the answer to a bad HEAD request must have no body.
        self.head_only = head.startswith(b"HEAD ")
        read = read_head(head, limits)
        self.recv_buffer[: len(head)] = canonical(head, read)
        self.chunks = ChunkReader(limits) if read.is_chunked else None
        await super().http1_request_header()
        # Sanic keeps the request in the task's context, and so in each copy of it: an idle
        # connection and every cancelled timer would keep a body of up to 64 MiB.
        Request._current.set(None)  # type: ignore[arg-type]
        if self.chunks:
            # Sanic leaves the last line end of the head for its own reader of chunks.
            del self.recv_buffer[:2]
        # No other protocol is spoken here: an upgrade is answered like any request.
        self.upgrade_websocket = False
        has_body = bool(self.request_body)
        self._connection.advance(
            ConnectionEvent.HEAD_READ if has_body else ConnectionEvent.REQUEST_READ
        )
        self._check_place()

    def _check_place(self) -> None:
        """Serve a health check on a reserved place; for any other request find another place."""
        places = self._connection.places
        if not places.is_reserved(self._connection):
            return
        if self.request.path in OPEN_PATHS:
            self.keep_alive = False
        elif not places.promote(self._connection):
            raise _too_many_connections()

    async def _receive_head(self, limits: HeadLimits) -> bytes:
        buffer = self.recv_buffer
        num_passed = 0
        while True:
            # A client may send an extra line end after its last body (RFC 9112, 2.2).
            if buffer.startswith(b"\r\n"):
                del buffer[:2]
            end = end_of_head(buffer, limits, num_passed)
            if end is not None:
                return bytes(buffer[:end])
            num_passed = len(buffer)
            await self._receive_more()

    async def read(self) -> bytes | None:
        """The next piece of the body; None at its end. Raises ApiError or PayloadTooLarge."""
        data = await (self._read_chunked(self.chunks) if self.chunks else self._read_plain())
        if not self.request_body and self._connection.phase is ConnectionState.READING_BODY:
            self._connection.advance(ConnectionEvent.REQUEST_READ)
        self._note_progress(len(data or b""))
        return data

    def _note_progress(self, num_bytes: int) -> None:
        self.progress_bytes += num_bytes
        if self.progress_bytes >= PROGRESS_BYTES and self.request_body:
            self.progress_bytes = 0
            self._connection.places.expect(self._connection)

    async def _read_plain(self) -> bytes | None:
        self._check_size(self.request_bytes or 0)
        data: bytes | None = await super().read()
        return data

    async def _read_chunked(self, chunks: ChunkReader) -> bytes:
        await self._continue()
        data = chunks.take(self.recv_buffer, int(self.request_max_size))
        self._check_size(chunks.declared_bytes)
        if chunks.is_complete:
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
        """Send the head of an answer. An answer before the end of the body is the last one."""
        if self.request_body or self.request is None or self.request.method == "NONE":
            self.request_body = None
            self.expecting_continue = False
            self.keep_alive = False
            self._connection.advance(ConnectionEvent.REJECTED)
        await super().http1_response_header(data, end_stream)


class StrictProtocol(HttpProtocol):  # type: ignore[misc]
    """One connection, and its state in the table of `connection_states.py`.

    After a rejected request the connection stays open while the client still sends. It does
    not stay open for a client that reads nothing, whose unsent answer would be kept for ever.
    """

    HTTP_CLASS = StrictHttp
    # Whether the connection serves only health checks and metrics, and needs no key for them.
    is_probe_port = False
    __slots__ = ("_is_silent", "_linger_timer", "_reader_timer", "phase")

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.phase = ConnectionState.IDLE
        self._is_silent = False
        self._linger_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    @property
    def places(self) -> ConnectionPlaces:
        """The places that the connection is counted in."""
        places: ConnectionPlaces = self.app.ctx.connection_places
        return places

    def advance(self, event: ConnectionEvent) -> None:
        """Move to the next state. Raises IllegalTransitionError.

        A handler may still be at work for a client that has left: then nothing changes.
        """
        if self.phase is ConnectionState.CLOSED:
            return
        self.phase = next_state(TRANSITIONS, self.phase, event)
        places = self.places
        if self.phase is ConnectionState.CLOSED:
            places.leave(self)
        elif self.phase in OWES_REQUEST:
            places.expect(self)
        else:
            places.serve(self)

    def connection_made(self, transport: Any) -> None:
        """Limit what the kernel buffers of an answer; accept or reject the connection."""
        size = _settings_of(self.app).send_buffer_bytes
        if (raw := transport.get_extra_info("socket")) is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        if self.places.enter(self):
            super().connection_made(transport)
        else:
            self._reject(transport)

    def evict(self) -> None:
        """Close an idle connection; answer 503 to one whose request has not arrived completely."""
        if self.phase is ConnectionState.IDLE or self.http is None or self._task is None:
            self.close()
            return
        # Sanic answers a cancelled request with this exception.
        self.http.exception = _too_many_connections()
        self._task.cancel()

    def _reject(self, transport: Any) -> None:
        """Answer 503 before anything is read: every place serves a request."""
        # Sanic's own protocol would start to read requests here.
        super(HttpProtocol, self).connection_made(transport)
        self.recv_buffer = bytearray()
        content = orjson.dumps(error_body(_too_many_connections()))
        transport.write(TOO_MANY_CONNECTIONS % (len(content), content))
        self.advance(ConnectionEvent.REJECTED)
        self.close()

    def pause_writing(self) -> None:
        """The client does not keep up: writers wait, and a client that reads nothing is cut."""
        super().pause_writing()
        self._check_reader(None)

    def resume_writing(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
        super().resume_writing()

    def _check_reader(self, num_unsent: int | None) -> None:
        """Abort the connection if the client has read nothing since the last check."""
        transport = self.transport
        if transport is None:
            return
        now = transport.get_write_buffer_size()
        if num_unsent is not None and now >= num_unsent:
            logger.warning(
                "closed a connection with %d bytes unsent: its client reads nothing", now
            )
            transport.abort()
            return
        timeout_s = _settings_of(self.app).reader_timeout_s
        self._reader_timer = self.loop.call_later(timeout_s, self._check_reader, now)

    def close(self, timeout: float | None = None) -> None:
        """Close the connection; after a rejected request by a lingering close."""
        transport = self.transport
        if transport is None or transport.is_closing():
            super().close(timeout)
            return
        self.advance(ConnectionEvent.CLOSE)
        if self.phase is ConnectionState.DRAINING and not self.places.linger(self):
            self.advance(ConnectionEvent.CLOSE)
        if self.phase is not ConnectionState.DRAINING:
            super().close(timeout)
            return
        self.recv_buffer.clear()
        if transport.can_write_eof():
            transport.write_eof()
        transport.resume_reading()
        self._drain_until(self.loop.time() + LINGER_S)

    def _drain_until(self, deadline: float) -> None:
        """Close if the client sent nothing since the last check, or at the deadline."""
        if self._linger_timer is not None and (self._is_silent or self.loop.time() >= deadline):
            self.close()
            return
        self._is_silent = True
        self._linger_timer = self.loop.call_later(SILENCE_S, self._drain_until, deadline)

    def data_received(self, data: bytes) -> None:
        self._is_silent = False
        if self.phase is not ConnectionState.DRAINING:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        self.advance(ConnectionEvent.LOST)
        super().connection_lost(exc)


class ProbeProtocol(StrictProtocol):
    """A connection to --metrics-port. It takes no place of the API's connections, nor they its."""

    is_probe_port = True
    __slots__ = ()

    @property
    def places(self) -> ConnectionPlaces:
        places: ConnectionPlaces = self.app.ctx.probe_places
        return places


class LenientRequest(Request):
    """A request that also accepts a URL that no parser takes.

    To answer a head that it could not read, Sanic creates an empty request (method NONE) with
    the same URL. That would fail a second time, and close the connection without an answer.
    Doubled slashes of a path, and slashes at its end, count as absent.
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
        url_bytes = plain_url(url_bytes)
        try:
            super().__init__(url_bytes, headers, version, method, *args, **kwargs)
        except BadURL:
            if method != "NONE":
                raise
            super().__init__(b"*", headers, version, method, *args, **kwargs)


async def receive_body(request: Request, timeout_s: float) -> None:
    """Read the whole body, which must keep arriving.

    timeout_s: the time limit for a small body. Bytes that have arrived extend it, at
    `MIN_BYTES_PER_S`, so that a large body may take longer.
    Raises SlowBodyError, BadRequestError for broken framing, PayloadTooLarge, or OverloadedError
    if open requests keep too many bytes already.
    """
    stream = request.stream
    if not isinstance(stream, Http) or not stream.request_body:
        return
    # One buffer: a list would cost a Python object for each piece, however small.
    body = bytearray()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    try:
        async with asyncio.timeout_at(deadline) as timer:
            async for piece in stream:
                keep_bytes(len(piece))
                body += piece
                deadline += len(piece) / MIN_BYTES_PER_S
                timer.reschedule(deadline)
    except TimeoutError as error:
        raise SlowBodyError(f"the body did not arrive within {timeout_s:g} s") from error
    request.body = bytes(body)


def _too_many_connections() -> NotReadyError:
    return NotReadyError("too many connections are open: try again", retry_after_s=1.0)


def _settings_of(app: Any) -> ServerSettings:
    settings: ServerSettings = app.ctx.services.settings
    return settings


def _limits_of(app: Any) -> HeadLimits:
    limits: HeadLimits = app.ctx.head_limits
    return limits
