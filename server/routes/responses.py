"""POST /v1/responses, and the routes of stored responses."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import msgspec
import orjson
from sanic import HTTPResponse, Request

from ..api.endpoint import EVENTS, GENERATION_REFUSALS, Reply, Routes
from ..api.response_store import ResponseStore, StoredResponse, StoreError
from ..api.services import (
    check_model,
    json_response,
    prepare,
    services_of,
    tenant_of,
)
from ..api.sse import send_stream
from ..api.whole_answer import send_parts
from ..errors import BadRequestError, NotFoundError, NotReadyError
from ..schemas.json_parts import json_parts
from ..schemas.openai.response_answers import ResponseAnswers
from ..schemas.openai.response_items import InputItem
from ..schemas.openai.response_types import DeletedResponse, InputItems, Response, ResponseEvent
from ..schemas.openai.responses import ResponsesRequest, responses_generation
from . import samples

logger = logging.getLogger(__name__)

ROUTES = Routes("responses", "Responses")

PATH = "/v1/responses/<response_id:str>"
PARAMETERS = {"response_id": "The id of a response."}
RETRY_AFTER_S = 1.0
DEFAULT_LIMIT = 20
MAX_LIMIT = 100


@ROUTES.post(
    "/v1/responses",
    body=ResponsesRequest,
    examples={"picture": samples.RESPONSES_REQUEST, "streamed": samples.STREAMED_RESPONSES_REQUEST},
    replies=[
        Reply(
            type=Response,
            description="The whole response.",
            example=samples.RESPONSE,
        ),
        Reply(
            type=ResponseEvent,
            media_type=EVENTS,
            description="With stream: true, an event in each frame, named by its type."
            " A failure is an event response.failed.",
        ),
    ],
    refusals=GENERATION_REFUSALS,
)
async def responses(request: Request, body: ResponsesRequest) -> HTTPResponse | None:
    """A response to input items, in OpenAI's newer format.

    It is stored for previous_response_id unless store is false.
    """
    check_model(request, body.model)
    services = services_of(request)
    store = _store_for(body, services.responses)
    owner = tenant_of(request)
    earlier = await _earlier_items(body.previous_response_id, services.responses, owner)
    prepared = await prepare(request, responses_generation(body, earlier))
    keep = None if store is None else functools.partial(_keep, store, owner, body)
    answers = ResponseAnswers(body, keep)
    if body.stream:
        await send_stream(request, prepared, answers)
        return None

    async def parts() -> list[bytes]:
        response = answers.plain(await services.generator.answer(prepared, answers.new_log))
        if keep is not None:
            response["store"] = await keep(response)
        return json_parts(response)

    return await send_parts(request, await parts())


@ROUTES.get(
    PATH,
    parameters=PARAMETERS,
    replies=[Reply(type=Response, description="The response.", example=samples.RESPONSE)],
    refusals=[404, 503],
)
async def retrieve(request: Request, response_id: str) -> HTTPResponse:
    """A stored response."""
    stored = await _found(request, response_id)
    if request.args.get("stream") == "true":
        # A client that waits for events would find none.
        raise BadRequestError(
            "a stored response is not streamed again: leave stream out", param="stream"
        )
    return HTTPResponse(stored.response, content_type="application/json")


@ROUTES.delete(
    PATH,
    parameters=PARAMETERS,
    replies=[Reply(type=DeletedResponse, description="It is deleted.")],
    refusals=[404, 503],
)
async def delete(request: Request, response_id: str) -> HTTPResponse:
    """Delete a response; responses that continue it can no longer be continued."""
    store = services_of(request).responses
    with _or_503():
        is_deleted = store is not None and await store.delete(tenant_of(request), response_id)
    if not is_deleted:
        raise _not_found(response_id)
    answer: DeletedResponse = {"id": response_id, "object": "response", "deleted": True}
    return json_response(answer)


@ROUTES.post_without_body(
    f"{PATH}/cancel",
    parameters=PARAMETERS,
    replies=[Reply(type=Response, description="Never: no response runs in the background.")],
    refusals=[404, 503],
)
async def cancel(request: Request, response_id: str) -> HTTPResponse:
    """Always an error: responses do not run in the background. Close the connection to cancel."""
    await _found(request, response_id)
    raise BadRequestError(
        "only a response in the background can be cancelled, and this server runs none: close the"
        " connection of the request instead"
    )


@ROUTES.get(
    f"{PATH}/input_items",
    parameters=PARAMETERS,
    replies=[Reply(type=InputItems, description="The response's own input.")],
    refusals=[404, 503],
)
async def input_items(request: Request, response_id: str) -> HTTPResponse:
    """The items of a response's own input, newest first.

    Query: limit (1 to 100), order (asc or desc), after (the id of an item).
    """
    stored = await _found(request, response_id)
    return json_response(_page(orjson.loads(stored.input), request))


def _store_for(body: ResponsesRequest, store: ResponseStore | None) -> ResponseStore | None:
    """The store for this response, if any. Raises BadRequestError if it is required and missing."""
    if body.store is False:
        return None
    if store is None and body.store:
        raise BadRequestError(
            "store is true, but this server keeps no responses: leave it out, or start the server"
            " with --responses-store memory",
            param="store",
        )
    return store


async def _earlier_items(
    previous: str | None, store: ResponseStore | None, owner: str
) -> list[InputItem]:
    """The items of all responses before this one. Raises BadRequestError."""
    if previous is None:
        return []
    with _or_503():
        chain = None if store is None else await store.chain(owner, previous)
    if chain is None:
        raise BadRequestError(
            f"previous_response_id is {previous[:128]!r}, which is the id of no response that this"
            " server keeps: send the earlier items as input",
            param="previous_response_id",
        )
    items: list[Any] = []
    for stored in chain:
        items += orjson.loads(stored.input) + orjson.loads(stored.response)["output"]
    return msgspec.convert(items, list[InputItem])


async def _keep(
    store: ResponseStore, owner: str, body: ResponsesRequest, response: Response
) -> bool:
    """Whether the response was stored: a full disk must not cost the client its answer."""
    # In a thread: the input may have many megabytes of images.
    stored = await asyncio.to_thread(_stored, body, response)
    try:
        return await store.put(owner, stored)
    except StoreError as error:
        logger.warning("%s; the response %s is not stored", error, stored.id)
        return False


@contextlib.contextmanager
def _or_503() -> Iterator[None]:
    """Raises NotReadyError for a StoreError: the client is not at fault."""
    try:
        yield
    except StoreError as error:
        logger.warning("%s", error)
        raise NotReadyError(
            "the stored responses cannot be read at the moment: try again, or send the earlier"
            " items as input",
            retry_after_s=RETRY_AFTER_S,
        ) from error


def _stored(body: ResponsesRequest, response: Response) -> StoredResponse:
    items = []
    for index, item in enumerate(body.items):
        content = {key: one for key, one in msgspec.to_builtins(item).items() if one is not None}
        content.setdefault("type", "message")
        content.setdefault("id", f"item_{response['id'].removeprefix('resp_')}_{index}")
        items.append(content)
    return StoredResponse(
        response["id"],
        body.previous_response_id,
        orjson.dumps(items),
        b"".join(json_parts(response)),
    )


async def _found(request: Request, response_id: str) -> StoredResponse:
    store = services_of(request).responses
    with _or_503():
        stored = None if store is None else await store.get(tenant_of(request), response_id)
    if stored is None:
        raise _not_found(response_id)
    return stored


def _not_found(response_id: str) -> NotFoundError:
    return NotFoundError(f"this server keeps no response with the id {response_id[:128]!r}")


def _page(items: list[dict[str, Any]], request: Request) -> InputItems:
    """One page of the items. Raises BadRequestError."""
    limit = request.args.get("limit", str(DEFAULT_LIMIT))
    order, after = request.args.get("order", "desc"), request.args.get("after")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit) <= MAX_LIMIT):
        raise BadRequestError(f"limit is {limit[:32]!r}: send 1 to {MAX_LIMIT}", param="limit")
    if order not in ("asc", "desc"):
        raise BadRequestError(f"order is {order[:32]!r}: send asc or desc", param="order")
    if order == "desc":
        items = items[::-1]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise BadRequestError(f"after is {after[:128]!r}: no item has it", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(page) < len(items),
    }
