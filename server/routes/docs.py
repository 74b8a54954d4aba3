"""The API's document, and Swagger UI to browse it and to try requests.

Owns how the page and its files are sent; no file comes from another host. Knows nothing of the
document's content (`..api.openapi`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.resources import files
from typing import Any, Protocol

from sanic import HTTPResponse, Request

from ..api.endpoint import Reply, Routes

ROUTES = Routes("docs", "Documentation")

HTML = "text/html; charset=utf-8"
SCRIPT = "text/javascript; charset=utf-8"
STYLE = "text/css; charset=utf-8"
PNG = "image/png"

# Only scripts and requests of this server. Swagger UI sets styles inline and has images in its CSS.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _Context(Protocol):
    def document(self) -> bytes: ...


@ROUTES.get("/openapi.json", replies=[Reply(type=dict[str, Any], description="OpenAPI 3.1.")])
async def openapi(request: Request) -> HTTPResponse:
    """This document: every request that the server accepts, and every answer."""
    context: _Context = request.app.ctx
    return HTTPResponse(context.document(), content_type="application/json")


@ROUTES.get("/docs", replies=[Reply(type=str, media_type=HTML, description="A page.")])
async def page(request: Request) -> HTTPResponse:
    """The document as a page, with a form for each request (Swagger UI)."""
    return _file(_own("docs.html"), HTML)


def _add_file(name: str, media_type: str, read: Callable[[str], bytes], text: str) -> None:
    """Serve a file of the page under /docs/."""
    reply = Reply(type=str, media_type=media_type, description=f"{text}.")

    async def send(request: Request) -> HTTPResponse:
        return _file(read(name), media_type)

    send.__doc__ = f"{text} of Swagger UI."
    ROUTES.get(f"/docs/{name}", replies=[reply])(send)


def _file(content: bytes, content_type: str) -> HTTPResponse:
    return HTTPResponse(content, headers=_HEADERS, content_type=content_type)


@functools.cache
def _own(name: str) -> bytes:
    return files(__package__).joinpath("../api/pages", name).read_bytes()


@functools.cache
def _swagger_ui(name: str) -> bytes:
    """A file of Swagger UI's distribution, from the package swagger-ui-py."""
    return files("swagger_ui").joinpath("static", name).read_bytes()


_add_file("initializer.js", SCRIPT, _own, "The settings")
_add_file("swagger-ui-bundle.js", SCRIPT, _swagger_ui, "The code")
_add_file("swagger-ui.css", STYLE, _swagger_ui, "The styles")
_add_file("favicon-32x32.png", PNG, _swagger_ui, "The icon")
