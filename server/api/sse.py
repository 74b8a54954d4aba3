"""Sends an answer in pieces: server-sent events with comments to fill silence.

Owns framing, headers, keep-alive comments and what a stream does with an error.
Knows nothing of any API's shapes: those come as `StreamedAnswers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence

import orjson
from sanic import HTTPResponse, Request

from ...router.processes.tasks import end_tasks
from ..errors import ApiError, InternalError
from ..generation.events import Event
from ..generation.generator import PreparedGeneration
from ..schemas.streamed_answers import StreamedAnswers
from .services import services_of

logger = logging.getLogger(__name__)

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_LINE_SEPARATORS = (
    (b"\xc2\x85", b"\\u0085"),
    (b"\xe2\x80\xa8", b"\\u2028"),
    (b"\xe2\x80\xa9", b"\\u2029"),
)
# With its charset: some clients else read any text as Latin-1.
CONTENT_TYPE = "text/event-stream; charset=utf-8"
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def send_stream(
    request: Request, prepared: PreparedGeneration, answers: StreamedAnswers
) -> None:
    """Answer with a stream of `data:` frames.

    Raises ApiError while nothing has been sent: the engine's refusal has a status.
    """
    services = services_of(request)
    settings = services.settings
    framed = named_frame if answers.is_named else frame
    async with (
        contextlib.aclosing(services.generator.stream(prepared)) as events,
        _first_of(events, settings.first_output_wait_s) as first,
    ):
        response = await request.respond(headers=STREAM_HEADERS, content_type=CONTENT_TYPE)
        assert response is not None, "sanic gives a response to fill"
        async with _pings(response, settings.stream_ping_interval_s):
            async for chunks in _chunks(answers, first, events):
                if chunks:
                    await response.send(b"".join(map(framed, chunks)))
        if answers.has_done:
            await response.send(DONE)
        await response.eof()


async def _all_of(first: asyncio.Task[Event], events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    yield await first
    async for event in events:
        yield event


def frame(content: Mapping[str, object]) -> bytes:
    """One server-sent event. Line separators of Unicode are escaped, as httpx ends lines there."""
    text = orjson.dumps(content)
    for character, escaped in _LINE_SEPARATORS:
        text = text.replace(character, escaped)
    return b"data: " + text + b"\n\n"


def named_frame(content: Mapping[str, object]) -> bytes:
    """One server-sent event, named by its content's type."""
    return b"event: " + str(content["type"]).encode() + b"\n" + frame(content)


async def _chunks(
    answers: StreamedAnswers, first: asyncio.Task[Event], events: AsyncIterator[Event]
) -> AsyncIterator[Sequence[Mapping[str, object]]]:
    """The chunks of every event, as they come; an error becomes the last one."""
    try:
        yield answers.first()
        async for event in _all_of(first, events):
            await answers.store(event)
            yield answers.chunks(event)
    except ApiError as error:
        yield [answers.failure(error)]
    except Exception:
        logger.exception("a stream failed")
        yield [answers.failure(InternalError("internal error"))]


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
