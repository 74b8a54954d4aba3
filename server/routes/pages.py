"""The pages: the playground at /, and the API's document with Swagger UI at /docs.

Owns how pages and their files are sent; no file comes from another host. Also what the playground
asks the server for: its limits, and the engine's counts as they change. Knows nothing of the
document's content (`..api.openapi`).
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from sanic import HTTPResponse, Request
from sanic.exceptions import NotFound

from ... import __version__
from ...models.bundled import CHECKPOINT
from ..api.endpoint import EVENTS, Reply, Routes
from ..api.services import Services, json_response, services_of
from ..api.sse import CONTENT_TYPE, STREAM_HEADERS, frame
from ..http.page_files import DOCS_FILES, HTML, PLAYGROUND, UI_FILES
from ..images.tiling import TilingConfig
from ..schemas.service_answers import PlaygroundInfo
from ..telemetry.live import LiveCounts
from . import samples

ROUTES = Routes("pages", "Documentation")
# Not served with --no-ui.
PLAYGROUND_ROUTES = Routes("playground", "Playground")

_COMMON_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# Only scripts and requests of this server. Swagger UI sets styles inline and has images in its CSS.
_DOCS_HEADERS = _COMMON_HEADERS | {
    "Content-Security-Policy": "default-src 'none'; script-src 'self';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
# Nothing inline, and no text ever becomes HTML: the trusted types of the page are none.
_UI_HEADERS = _COMMON_HEADERS | {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "X-Frame-Options": "DENY",
}

LIVE_INTERVAL_S = 1.0


class _Context(Protocol):
    def document(self) -> bytes: ...


@ROUTES.get("/openapi.json", replies=[Reply(type=dict[str, Any], description="OpenAPI 3.1.")])
async def openapi(request: Request) -> HTTPResponse:
    """This document: every request that the server accepts, and every answer."""
    context: _Context = request.app.ctx
    return HTTPResponse(context.document(), content_type="application/json")


@ROUTES.get("/docs", replies=[Reply(type=str, media_type=HTML, description="A page.")])
async def docs(request: Request) -> HTTPResponse:
    """The document as a page, with a form for each request (Swagger UI)."""
    return HTTPResponse(_own("docs.html"), headers=_DOCS_HEADERS, content_type=HTML)


@PLAYGROUND_ROUTES.get(
    PLAYGROUND,
    replies=[Reply(type=str, media_type=HTML, description="A page.")],
    refusals=(404,),
)
async def playground(request: Request) -> HTTPResponse:
    """The playground: a page that sends pictures and questions to this server.

    A client that accepts JSON and no HTML gets a 404: it looks for an API here.
    """
    accepted = request.headers.getone("accept", "")
    if "json" in accepted and "html" not in accepted and "*/*" not in accepted:
        raise NotFound
    return HTTPResponse(_ui("index.html"), headers=_UI_HEADERS, content_type=HTML)


def _add_file(
    routes: Routes,
    path: str,
    media_type: str,
    read: Callable[[], bytes],
    headers: dict[str, str],
    text: str,
) -> None:
    """Serve a file of a page."""

    async def send(request: Request) -> HTTPResponse:
        return HTTPResponse(read(), headers=headers, content_type=media_type)

    send.__doc__ = text
    reply = Reply(type=str, media_type=media_type, description="The file.")
    routes.get(path, replies=[reply])(send)


@functools.cache
def _own(name: str) -> bytes:
    return files(__package__).joinpath("../api/pages", name).read_bytes()


@functools.cache
def _ui(name: str) -> bytes:
    return files(__package__).joinpath("../api/pages/ui", name).read_bytes()


@functools.cache
def _swagger_ui(name: str) -> bytes:
    """A file of Swagger UI's distribution, from the package swagger-ui-py."""
    return files("swagger_ui").joinpath("static", name).read_bytes()


for _name, _type in DOCS_FILES.items():
    _source = _own if _name == "initializer.js" else _swagger_ui
    _read = functools.partial(_source, _name)
    _add_file(ROUTES, f"/docs/{_name}", _type, _read, _DOCS_HEADERS, "A file of the page at /docs.")
for _name, _type in UI_FILES.items():
    _read = functools.partial(_ui, _name)
    _text = "A file of the playground."
    _add_file(PLAYGROUND_ROUTES, f"/ui/{_name}", _type, _read, _UI_HEADERS, _text)


@PLAYGROUND_ROUTES.get(
    "/v1/playground",
    replies=[
        Reply(
            type=PlaygroundInfo,
            description="The limits of this server.",
            example=samples.PLAYGROUND_INFO,
        )
    ],
)
async def playground_info(request: Request) -> HTTPResponse:
    """What the playground must know of this server: limits of pictures, tiles, context."""
    services = services_of(request)
    settings, limits = services.settings, services.settings.images
    tiling = _tiling(settings.model)
    answer: PlaygroundInfo = {
        "version": __version__,
        "is_bundled_model": _is_bundled(settings.model),
        "max_model_len": services.max_model_len,
        "tile_size": tiling.tile_size,
        "max_image_tiles": tiling.max_image_tiles,
        "max_images": limits.max_images,
        "max_image_bytes": limits.max_image_bytes,
        "max_request_bytes": limits.max_request_bytes,
        "max_pixels": limits.max_pixels,
        "max_side": limits.max_side,
        "max_body_bytes": settings.max_body_bytes,
    }
    return json_response(answer)


@functools.cache
def _is_bundled(folder: str) -> bool:
    return Path(folder).resolve() == CHECKPOINT.resolve()


@functools.cache
def _tiling(folder: str) -> TilingConfig:
    return TilingConfig.from_checkpoint(folder)


@PLAYGROUND_ROUTES.get(
    "/v1/live",
    replies=[
        Reply(
            type=LiveCounts,
            media_type=EVENTS,
            description="A frame each second until the client leaves.",
        )
    ],
    refusals=(429,),
)
async def live(request: Request) -> HTTPResponse | None:
    """The counts of the engines and caches, as server-sent events; nothing runs without a reader.

    Counters only grow while the server runs: rates are differences divided by those of `time_s`.
    """
    if request.method == "HEAD":
        return HTTPResponse(headers=STREAM_HEADERS, content_type=CONTENT_TYPE)
    services = services_of(request)
    with services.live.watched():
        response = await request.respond(headers=STREAM_HEADERS, content_type=CONTENT_TYPE)
        assert response is not None, "sanic gives a response to fill"
        async for _ in _seconds(services):
            await response.send(frame(services.live.counts(is_ready=services.is_ready)))
        await response.eof()
    return None


async def _seconds(services: Services) -> AsyncIterator[None]:
    """Now and each second, until the server stops."""
    while not services.generator.is_draining:
        yield
        await asyncio.sleep(LIVE_INTERVAL_S)
