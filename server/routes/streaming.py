"""Sends an answer in pieces: server-sent events with comments to fill silence.

Owns framing, headers, keep-alive comments and what a stream does with an error.
Knows nothing of any API's shapes: those come as an `Answers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import orjson
from sanic import Request

from ..errors import ApiError, InternalError, nested_body
from ..generation import Event, PreparedGeneration
from .services import Services, services_of

logger = logging.getLogger(__name__)

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Answers(Protocol):
    """The shapes of one API's chunks."""

    def first(self) -> dict[str, Any]: ...
    def chunks(self, event: Event) -> list[dict[str, Any]]: ...


async def send_stream(
    request: Request, prepared: PreparedGeneration, answers: Answers, *, with_done: bool
) -> None:
    """Answer with a stream of `data:` frames.

    with_done: end it by `data: [DONE]`, which OpenAI's clients wait for and
    Llama Stack's raise on.
    Raises ApiError while nothing has been sent: the engine's refusal has a status.
    """
    services = services_of(request)
    events = services.generator.stream(prepared)
    async with contextlib.aclosing(_paced(events, services)) as items:  # type: ignore[type-var]
        event = await anext(items)
        response = await request.respond(headers=_HEADERS, content_type="text/event-stream")
        assert response is not None, "sanic gives a response to fill"
        await response.send(frame(answers.first()))
        try:
            while True:
                await response.send(_frames(answers, event))
                event = await anext(items)
        except StopAsyncIteration:
            pass
        except ApiError as error:
            await response.send(frame(nested_body(error)))
        except Exception:
            logger.exception("a stream failed")
            await response.send(frame(nested_body(InternalError("internal error"))))
        if with_done:
            await response.send(DONE)
        await response.eof()


def frame(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


def _frames(answers: Answers, event: Event | None) -> bytes:
    if event is None:
        return PING
    return b"".join(map(frame, answers.chunks(event)))


async def _paced(events: AsyncIterator[Event], services: Services) -> AsyncIterator[Event | None]:
    """The events, and None for each interval in which none came.

    The first wait is short: it only gives a refusal the time to become a status.
    """
    wait_s = services.settings.first_output_wait_s
    pending: asyncio.Task[Event] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(_next(events))
            done, _ = await asyncio.wait({pending}, timeout=wait_s)
            wait_s = services.settings.stream_ping_interval_s
            if not done:
                yield None
                continue
            task, pending = pending, None
            try:
                event = task.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        await _close(events, pending)


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


async def _close(events: AsyncIterator[Event], pending: asyncio.Task[Event] | None) -> None:
    """End the source, whether it is waiting or not: that aborts the request."""
    if pending is not None:
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
    await events.aclose()  # type: ignore[attr-defined]
