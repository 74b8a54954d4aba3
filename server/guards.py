"""What is refused by a request's head alone, before its body is read.

Owns the order of these checks. Knows nothing of how a head is read, nor of routes or keys.
"""

from __future__ import annotations

from sanic import Request

from .errors import UnsupportedMediaError
from .http.auth import Access


class HeadGuard:
    """Checks every request, whatever its path, its key among the rest."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def check(self, request: Request) -> None:
        """Raises ApiError; the connection closes then, its body being unread."""
        self._access.check(request)
        _check_encoding(request)


def _check_encoding(request: Request) -> None:
    encoding = request.headers.getone("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaError("compressed bodies are not taken: send it uncompressed")
