"""Sanic with a record for each request, closed exactly once however the request ends.

Owns where a record begins and what status it ends with: Sanic answers some failures outside
of its handling of requests, and a client that went away is answered not at all. Knows nothing
of what is done with a closed record.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from sanic import Request, Sanic
from sanic.exceptions import SanicException

from .request_record import CLIENT_CLOSED_REQUEST, UNMATCHED, Record, record_of, remember

logger = logging.getLogger(__name__)

OnClosed = Callable[[Record], None]


class RecordingSanic(Sanic[Any, Any]):
    """Calls `ctx.on_closed` with the record of each request that has ended."""

    async def handle_request(self, request: Request) -> None:
        """Serve a request whose head was read."""
        record = _begin(request)
        record.is_handled = True
        try:
            await super().handle_request(request)
        except asyncio.CancelledError:
            record.is_handled = False
            if _is_left(request):
                self._close(request, record, CLIENT_CLOSED_REQUEST)
            elif _status_of(request):
                # Cut in its middle, by a server that stops: nothing more can be said.
                self._close(request, record, _status_of(request))
            raise  # what has no answer yet is given one by handle_exception
        except BaseException:
            record.is_handled = False
            raise
        self._close(request, record, _status_of(request))

    async def handle_exception(
        self, request: Request, exception: BaseException, run_middleware: bool = True
    ) -> None:
        """Answer a failure: of a handler, or of a head that reached none."""
        record = record_of(request) or _begin(request)
        try:
            await super().handle_exception(request, exception, run_middleware)
        finally:
            if not record.is_handled:
                left = _is_left(request)
                status = CLIENT_CLOSED_REQUEST if left else _status_of(request)
                self._close(request, record, status)

    def _close(self, request: Request, record: Record, status: int) -> None:
        if record.ended is not None:
            return
        record.ended = time.monotonic()
        record.status = status
        record.route = self._route_of(request)
        try:
            self.ctx.on_closed(record)
        except Exception:
            # The client has its answer: what is told of it must not cost the connection.
            logger.exception("a request's end could not be told")
        remember(None)

    def _route_of(self, request: Request) -> str:
        """The pattern of the request's route, also where the request never came to it."""
        if request.route is not None:
            return f"/{request.route.path.lstrip('/')}"
        try:
            route, _, _ = self.router.get(request.path, request.method, None)
        except (SanicException, ValueError):
            return UNMATCHED
        return f"/{route.path.lstrip('/')}"


def _begin(request: Request) -> Record:
    record = Record.of(request)
    request.ctx.record = record
    remember(record)
    return record


def _is_left(request: Request) -> bool:
    """Whether the client has closed the connection."""
    info = request.conn_info
    if info is not None and info.lost:
        return True
    return request.transport is None or request.transport.is_closing()


def _status_of(request: Request) -> int:
    """The status that was sent, 0 where none was."""
    response = None if request.stream is None else request.stream.response
    return 0 if response is None else int(response.status)
