"""Sanic's writer of answers, with large bodies in parts and streams for HTTP/1.0.

Owns how the bytes of an answer reach the transport. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio

from sanic.headers import format_http1_response
from sanic.helpers import has_message_body
from sanic.http import Http, Stage

PART_BYTES = 64 * 1024


class AnswerWriter(Http):  # type: ignore[misc]
    """The answers of one connection, one after the other."""

    async def http1_response_header(self, data: bytes, end_stream: bool) -> None:
        """Send the head of an answer, and what is known of its body."""
        response = self.response
        whole = data or getattr(response, "body", None) or b""
        if not data and whole:
            end_stream = True  # Sanic's form of an answer in one piece
        is_old = self.request is not None and self.request.version == "1.0"
        if end_stream and len(whole) > PART_BYTES and self._sends_body(response.status):
            await self._send_in_parts(memoryview(whole))
        elif is_old and not end_stream and "content-length" not in response.headers:
            await self._stream_until_close(data)
        else:
            await super().http1_response_header(data, end_stream)

    def _sends_body(self, status: int) -> bool:
        return has_message_body(status) and not self.head_only

    async def _send_in_parts(self, body: memoryview) -> None:
        """Send the head, then the body: nothing is copied whole, and others run in between."""
        self.response.headers["content-length"] = str(len(body))
        await super().http1_response_header(bytes(body[:PART_BYTES]), end_stream=False)
        for begin in range(PART_BYTES, len(body), PART_BYTES):
            await asyncio.sleep(0)
            part = bytes(body[begin : begin + PART_BYTES])
            await self.http1_response_normal(part, end_stream=False)

    async def _stream_until_close(self, data: bytes) -> None:
        """HTTP/1.0 has no chunks: a stream ends where its connection does (RFC 9112, 6.1)."""
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
