"""Routes that say what they take and answer: declared once, beside their handlers.

Owns the declaration and how it becomes Sanic's route; `..openapi` tells it to clients. The
declared type of a body is the one that reads it, so the two cannot differ. Knows no endpoint.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from sanic import Blueprint, HTTPResponse, Request

from .services import read_body

T = TypeVar("T", bound=msgspec.Struct)
Handler = Callable[..., Coroutine[Any, Any, HTTPResponse | None]]
BodyHandler = Callable[[Request, T], Coroutine[Any, Any, HTTPResponse | None]]

JSON = "application/json"
EVENTS = "text/event-stream"

# What an endpoint may refuse with that generates: beside what any may.
GENERATION_REFUSALS = (404, 429, 503, 504)


@dataclass(slots=True, frozen=True, kw_only=True)
class Reply:
    """One kind of answer. type: what its body holds, in a stream what each frame holds.

    links: OpenAPI's, by their names: what the answer is good for in another request.
    """

    type: Any
    description: str
    status: int = 200
    media_type: str = JSON
    example: Any = None
    links: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, frozen=True, kw_only=True)
class Endpoint:
    """One method of one path. refusals: statuses of error bodies beside those of every route.

    path: in Sanic's form. parameters: the meaning of each name in the path. examples:
    bodies by their names.
    """

    method: str
    path: str
    handler: Handler
    tag: str
    replies: Sequence[Reply]
    body: type[msgspec.Struct] | None = None
    examples: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    refusals: Sequence[int] = ()

    @property
    def name(self) -> str:
        """A name that no other endpoint has, from method and path."""
        return f"{self.method.lower()}{re.sub(r'[^a-z0-9]+', '_', self.path)}".rstrip("_")


class Routes:
    """A group of endpoints. tag: its heading in the API's document."""

    def __init__(self, name: str, tag: str) -> None:
        self._name = name
        self._tag = tag
        self.endpoints: list[Endpoint] = []

    def get(
        self,
        *paths: str,
        replies: Sequence[Reply],
        parameters: Mapping[str, str] | None = None,
        refusals: Sequence[int] = (),
    ) -> Callable[[Handler], Handler]:
        """Declare the handler of GET and HEAD under these paths."""
        return self._declaring("GET", paths, replies, refusals, parameters)

    def post(
        self,
        *paths: str,
        body: type[T],
        replies: Sequence[Reply],
        examples: Mapping[str, Any] | None = None,
        refusals: Sequence[int] = (),
    ) -> Callable[[BodyHandler[T]], BodyHandler[T]]:
        """Declare the handler of POST under these paths; it is called with the body, read."""

        def declare(handler: BodyHandler[T]) -> BodyHandler[T]:
            reading = _reading(body, handler)
            shown = examples or {}
            self._add("POST", paths, reading, replies, refusals, body=body, examples=shown)
            return handler

        return declare

    def post_without_body(
        self,
        *paths: str,
        replies: Sequence[Reply],
        parameters: Mapping[str, str] | None = None,
        refusals: Sequence[int] = (),
    ) -> Callable[[Handler], Handler]:
        """Declare the handler of POST under these paths, which reads no body."""
        return self._declaring("POST", paths, replies, refusals, parameters)

    def delete(
        self,
        *paths: str,
        replies: Sequence[Reply],
        parameters: Mapping[str, str] | None = None,
        refusals: Sequence[int] = (),
    ) -> Callable[[Handler], Handler]:
        """Declare the handler of DELETE under these paths."""
        return self._declaring("DELETE", paths, replies, refusals, parameters)

    def _declaring(
        self,
        method: str,
        paths: Sequence[str],
        replies: Sequence[Reply],
        refusals: Sequence[int],
        parameters: Mapping[str, str] | None,
    ) -> Callable[[Handler], Handler]:
        def declare(handler: Handler) -> Handler:
            given = parameters or {}
            self._add(method, paths, handler, replies, refusals, parameters=given)
            return handler

        return declare

    def _add(
        self,
        method: str,
        paths: Sequence[str],
        handler: Handler,
        replies: Sequence[Reply],
        refusals: Sequence[int],
        **others: Any,
    ) -> None:
        self.endpoints += [
            Endpoint(
                method=method,
                path=path,
                handler=handler,
                tag=self._tag,
                replies=replies,
                refusals=refusals,
                **others,
            )
            for path in paths
        ]

    def blueprint(self) -> Blueprint:
        """The routes for one application."""
        routes = Blueprint(self._name)
        for one in self.endpoints:
            methods = ["GET", "HEAD"] if one.method == "GET" else [one.method]
            # The format is named, as Sanic would parse each handler's source to guess it.
            routes.add_route(
                one.handler, one.path, methods=methods, name=one.name, error_format="json"
            )
        return routes


def _reading(body: type[T], handler: BodyHandler[T]) -> Handler:
    @functools.wraps(handler)
    async def handle(request: Request) -> HTTPResponse | None:
        return await handler(request, await read_body(request, body))

    return handle
