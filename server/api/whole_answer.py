"""Answers that are not streamed: collected, made into JSON in parts, sent part by part.

Owns where the JSON is made and how long the event loop is busy with it. Knows nothing of any
API's shapes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from sanic import HTTPResponse, Request

from ..generation.completion import Completion, EntryLog
from ..generation.preparer import PreparedGeneration
from ..schemas.json_parts import PART_BYTES, json_parts
from .services import services_of

R = TypeVar("R")

JSON = "application/json"
# Of so many the JSON is made in about ten milliseconds.
MAX_INLINE_LOGPROBS = 2_000


async def send_whole(
    request: Request,
    prepared: PreparedGeneration,
    plain: Callable[[Completion], Any],
    new_log: Callable[[], EntryLog] | None = None,
) -> HTTPResponse | None:
    """Generate the answers and send them as one JSON document. Raises as `Generator.answer`.

    plain: the document. new_log: for one answer's log-probabilities, where the API has any.
    """
    completion = await services_of(request).generator.answer(prepared, new_log)
    return await send_parts(request, await _parts_of(plain, completion))


async def _parts_of(plain: Callable[[Completion], Any], completion: Completion) -> list[bytes]:
    return await made_of(completion, lambda: json_parts(plain(completion)))


async def made_of(completion: Completion, make: Callable[[], R]) -> R:
    """What `make` makes of whole answers; in a thread if their prompts have many entries."""
    if completion.num_prompt_logprobs <= MAX_INLINE_LOGPROBS:
        return make()
    return await asyncio.to_thread(make)


async def send_parts(request: Request, texts: Iterable[bytes]) -> HTTPResponse | None:
    """Answer with JSON that comes in parts; a short one is returned in one piece.

    The event loop does other work between the parts, and each part is freed once it is sent.
    """
    parts = deque(texts)
    del texts
    num_bytes = sum(map(len, parts))
    if num_bytes <= PART_BYTES:
        return HTTPResponse(b"".join(parts), content_type=JSON)
    headers = {"content-length": str(num_bytes)}
    response = await request.respond(headers=headers, content_type=JSON)
    assert response is not None, "sanic gives a response to fill"
    while parts:
        await response.send(parts.popleft())
        await asyncio.sleep(0)
    return None
