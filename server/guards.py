"""What is refused by a request's head alone, before its body is read.

Owns the shapes of heads that proxies and servers read in two ways, and how fast a body
must come. Knows nothing of routes or keys.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from sanic import Request
from sanic.compat import Header
from sanic.exceptions import BadURL
from sanic.http import Http

from .access import Access
from .errors import ApiError, BadRequestError, UnsupportedMediaError

MAX_HEADERS = 100
MIN_BYTES_PER_S = 65_536

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class HeadTooLargeError(ApiError):
    status = 431
    type = "invalid_request_error"


class HeadGuard:
    """Checks every request's head, whatever its path, its key among the rest."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def check(self, request: Request) -> None:
        """Raises ApiError; the connection closes then, its body being unread."""
        try:
            _check_shape(request)
            self._access.check(request)
            _check_encoding(request)
        except ApiError:
            if isinstance(request.stream, Http):
                request.stream.keep_alive = False
            raise


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


class SlowBodyError(ApiError):
    status = 408
    type = "invalid_request_error"


async def receive_body(request: Request, timeout_s: float) -> None:
    """Read the whole body, which must keep coming.

    timeout_s: how long it may take, and longer by what came already at
    `MIN_BYTES_PER_S`, so that a large body is not a slow one.
    Raises SlowBodyError; Sanic raises PayloadTooLarge where it passes its cap.
    """
    stream = request.stream
    if not isinstance(stream, Http) or not stream.request_body:
        return
    chunks: list[bytes] = []
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    try:
        async with asyncio.timeout_at(deadline) as timer:
            async for chunk in stream:
                chunks.append(chunk)
                deadline += len(chunk) / MIN_BYTES_PER_S
                timer.reschedule(deadline)
    except TimeoutError as error:
        # The rest is not waited for.
        stream.keep_alive, stream.request_body = False, None
        raise SlowBodyError(f"the body did not come within {timeout_s:g} s") from error
    request.body = b"".join(chunks)


def _check_shape(request: Request) -> None:
    if len(request.headers) > MAX_HEADERS:
        raise HeadTooLargeError(f"the request has over {MAX_HEADERS} headers")
    for name, value in request.headers.items():
        if not _TOKEN.fullmatch(name) or _CONTROL.search(value):
            raise BadRequestError("a header's name or value holds a character it must not")
    if len(request.headers.getall("host", [])) != 1 and request.version != "1.0":
        raise BadRequestError("the request must have one Host header")
    if not request.headers.getone("content-length", "0").isascii():
        raise BadRequestError("Content-Length must be digits")


def _check_encoding(request: Request) -> None:
    encoding = request.headers.getone("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaError("compressed bodies are not taken: send it uncompressed")
