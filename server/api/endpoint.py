"""Declarations of routes, with their requests and answers, next to their handlers.

Owns the declaration and its conversion to Sanic's routes; `openapi.py` makes the API's document
from it. The declared type of a body also decodes it, so they cannot differ. Knows no endpoint.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from sanic import HTTPResponse, Request, Sanic

from .services import read_body

T = TypeVar("T", bound=msgspec.Struct)
Handler = Callable[..., Coroutine[Any, Any, HTTPResponse | None]]
BodyHandler = Callable[[Request, T], Coroutine[Any, Any, HTTPResponse | None]]

JSON = "application/json"
EVENTS = "text/event-stream"

# Error statuses of endpoints that generate, beside those of every endpoint.
GENERATION_REFUSALS = (404, 429, 503, 504)


@dataclass(slots=True, frozen=True, kw_only=True)
class Reply:
    """One kind of answer. type: of its body; in a stream, of each frame.

    links: OpenAPI's links by name: how to use the answer in another request.
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

    path: in Sanic's notation. parameters: the meaning of each name in the path. examples:
    bodies by name.
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
        """A unique name, from method and path."""
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
        """Declare the handler of POST under these paths; it gets the decoded body."""

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

    def add_to(self, app: Sanic[Any, Any]) -> None:
        """Add the routes, each by itself: a blueprint would register every one of them twice."""
        for one in self.endpoints:
            methods = ["GET", "HEAD"] if one.method == "GET" else [one.method]
            name = f"{self._name}.{one.name}"
            # Otherwise Sanic parses each handler's source to guess the format.
            app.add_route(one.handler, one.path, methods=methods, name=name, error_format="json")


def _reading(body: type[T], handler: BodyHandler[T]) -> Handler:
    @functools.wraps(handler)
    async def handle(request: Request) -> HTTPResponse | None:
        return await handler(request, await read_body(request, body))

    return handle
