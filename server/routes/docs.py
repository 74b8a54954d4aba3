"""The API's own document, and a page that shows it without any other host.

Owns how the two are sent. Knows nothing of what the document says (`..openapi`).
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Protocol

from sanic import HTTPResponse, Request

from ..api.endpoint import Reply, Routes

ROUTES = Routes("docs", "Documentation")

HTML = "text/html; charset=utf-8"
SCRIPT = "text/javascript; charset=utf-8"
STYLE = "text/css; charset=utf-8"

_PAGES = files(__package__).joinpath("../api/pages")
# Nothing but this server's own files, and no code in the page itself.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _Context(Protocol):
    def document(self) -> bytes: ...


@ROUTES.get("/openapi.json", replies=[Reply(type=dict[str, Any], description="OpenAPI 3.1.")])
async def openapi(request: Request) -> HTTPResponse:
    """This document: what the server takes and answers."""
    context: _Context = request.app.ctx
    return HTTPResponse(context.document(), content_type="application/json")


@ROUTES.get("/docs", replies=[Reply(type=str, media_type=HTML, description="A page.")])
async def page(request: Request) -> HTTPResponse:
    """The document as a page to browse; it asks no other host for anything."""
    return _file("docs.html", HTML)


@ROUTES.get("/docs/page.js", replies=[Reply(type=str, media_type=SCRIPT, description="Its code.")])
async def script(request: Request) -> HTTPResponse:
    """What draws the page."""
    return _file("page.js", SCRIPT)


@ROUTES.get("/docs/page.css", replies=[Reply(type=str, media_type=STYLE, description="Its look.")])
async def style(request: Request) -> HTTPResponse:
    """How the page looks."""
    return _file("page.css", STYLE)


def _file(name: str, content_type: str) -> HTTPResponse:
    return HTTPResponse(
        _PAGES.joinpath(name).read_bytes(), headers=_HEADERS, content_type=content_type
    )
