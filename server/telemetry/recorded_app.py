"""A Sanic application with a record of each request, closed exactly once for every outcome.

Owns when a record starts and which status it ends with. Sanic answers some failures outside
its request handling, and a client that has left gets no answer at all. Knows nothing of what
happens with a closed record.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from sanic import Request, Sanic
from sanic.exceptions import SanicException

from .request_record import (
    CLIENT_CLOSED_REQUEST,
    UNMATCHED,
    RequestRecord,
    record_of,
    set_current_record,
)

logger = logging.getLogger(__name__)


class RecordedApp(Sanic[Any, Any]):
    """Calls `ctx.on_closed` with the record of each request that has ended."""

    async def handle_request(self, request: Request) -> None:
        """Serve a request whose head is valid."""
        record = _start_record(request)
        record.is_handled = True
        try:
            await super().handle_request(request)
        except asyncio.CancelledError:
            record.is_handled = False
            if _has_left(request):
                self._close(request, record, CLIENT_CLOSED_REQUEST)
            elif _status_of(request):
                # The server stops in the middle of the answer: no error can be sent.
                self._close(request, record, _status_of(request))
            raise  # handle_exception answers a request that has no answer yet
        except BaseException:
            record.is_handled = False
            raise
        self._close(request, record, _status_of(request))

    async def handle_exception(
        self, request: Request, exception: BaseException, run_middleware: bool = True
    ) -> None:
        """Answer a failure of a handler, or of a head that reached no handler."""
        record = record_of(request) or _start_record(request)
        try:
            await super().handle_exception(request, exception, run_middleware)
        finally:
            if not record.is_handled:
                left = _has_left(request)
                status = CLIENT_CLOSED_REQUEST if left else _status_of(request)
                self._close(request, record, status)

    def _close(self, request: Request, record: RequestRecord, status: int) -> None:
        if record.ended is not None:
            return
        record.ended = time.monotonic()
        record.status = status
        record.route = self._route_of(request)
        try:
            self.ctx.on_closed(record)
        except Exception:
            # The client has its answer: a failed report must not close the connection.
            logger.exception("cannot log a request that has ended")
        set_current_record(None)

    def _route_of(self, request: Request) -> str:
        """The pattern of the request's route, even if the request failed before it."""
        if request.route is not None:
            return f"/{request.route.path.lstrip('/')}"
        try:
            route, _, _ = self.router.get(request.path, request.method, None)
        except (SanicException, ValueError):
            return UNMATCHED
        return f"/{route.path.lstrip('/')}"


def _start_record(request: Request) -> RequestRecord:
    record = RequestRecord.of(request)
    request.ctx.record = record
    set_current_record(record)
    return record


def _has_left(request: Request) -> bool:
    """Whether the client has closed the connection."""
    info = request.conn_info
    if info is not None and info.lost:
        return True
    return request.transport is None or request.transport.is_closing()


def _status_of(request: Request) -> int:
    """The status that was sent; 0 if none was."""
    response = None if request.stream is None else request.stream.response
    return 0 if response is None else int(response.status)
