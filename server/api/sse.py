"""Sends an answer in pieces: server-sent events with comments to fill silence.

Owns framing, headers, keep-alive comments and what a stream does with an error.
Knows nothing of any API's shapes: those come as an `Answers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

import orjson
from sanic import HTTPResponse, Request

from ..errors import ApiError, InternalError, nested_body
from ..generation.events import Event
from ..generation.generator import PreparedGeneration
from ..tasks import end_tasks
from .services import services_of

logger = logging.getLogger(__name__)

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Answers(Protocol):
    """The shapes of one API's chunks."""

    def first(self) -> Sequence[Mapping[str, object]]: ...
    def chunks(self, event: Event) -> Sequence[Mapping[str, object]]: ...


async def send_stream(
    request: Request, prepared: PreparedGeneration, answers: Answers, *, with_done: bool
) -> None:
    """Answer with a stream of `data:` frames.

    with_done: end it by `data: [DONE]`, which OpenAI's clients wait for and
    Llama Stack's raise on.
    Raises ApiError while nothing has been sent: the engine's refusal has a status.
    """
    services = services_of(request)
    settings = services.settings
    async with (
        contextlib.aclosing(services.generator.stream(prepared)) as events,
        _first_of(events, settings.first_output_wait_s) as first,
    ):
        response = await request.respond(headers=_HEADERS, content_type="text/event-stream")
        assert response is not None, "sanic gives a response to fill"
        async with _pings(response, settings.stream_ping_interval_s):
            await _send_events(response, answers, first, events)
        if with_done:
            await response.send(DONE)
        await response.eof()


def frame(content: Mapping[str, object]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def _send_events(
    response: HTTPResponse,
    answers: Answers,
    first: asyncio.Task[Event],
    events: AsyncIterator[Event],
) -> None:
    """Send every event's chunks; an error becomes the last frame."""
    try:
        await _send_chunks(response, answers.first())
        await _send_chunks(response, answers.chunks(await first))
        async for event in events:
            await _send_chunks(response, answers.chunks(event))
    except ApiError as error:
        await response.send(frame(nested_body(error)))
    except Exception:
        logger.exception("a stream failed")
        await response.send(frame(nested_body(InternalError("internal error"))))


async def _send_chunks(response: HTTPResponse, chunks: Sequence[Mapping[str, object]]) -> None:
    if chunks:
        await response.send(b"".join(map(frame, chunks)))


@contextlib.asynccontextmanager
async def _first_of(
    events: AsyncIterator[Event], wait_s: float
) -> AsyncIterator[asyncio.Task[Event]]:
    """The task of the first event, which had `wait_s` to come.

    Raises what the first event raised in that time.
    """
    first = asyncio.ensure_future(_next(events))
    try:
        await asyncio.wait({first}, timeout=wait_s)
        if first.done():
            first.result()
        yield first
    finally:
        # The events cannot be closed while a task waits for one.
        await end_tasks(first)


@contextlib.asynccontextmanager
async def _pings(response: HTTPResponse, interval_s: float) -> AsyncIterator[None]:
    """Send a comment every interval, whatever else is sent: each send is one whole frame."""
    task = asyncio.ensure_future(_ping(response, interval_s))
    try:
        yield
    finally:
        await end_tasks(task)


async def _ping(response: HTTPResponse, interval_s: float) -> None:
    while True:
        await asyncio.sleep(interval_s)
        await response.send(PING)


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)
