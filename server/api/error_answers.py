"""The answer to any exception of a request. Owns which status, headers and body it has."""

from __future__ import annotations

import contextlib
import logging
import math

from sanic import HTTPResponse, Request
from sanic.exceptions import MethodNotAllowed, NotFound, SanicException

from ..errors import ApiError, InternalError, error_body, type_of_status
from ..http.auth import PreflightAnswer
from ..http.targets import not_found
from ..schemas.anthropic.answers import message_error_body
from .services import json_response

logger = logging.getLogger(__name__)

# Where errors have Anthropic's types.
MESSAGES_PATH = "/v1/messages"


def answer_error(request: Request, error: Exception) -> HTTPResponse:
    """The answer to any exception: the JSON error that the API documents."""
    if isinstance(error, PreflightAnswer):
        return HTTPResponse(status=204, headers=error.headers)
    headers: dict[str, str] = {}
    if isinstance(error, SanicException):
        headers |= {name: str(value) for name, value in error.headers.items()}
        if isinstance(error, MethodNotAllowed):
            headers["Allow"] = ", ".join(_allowed_methods(request))
        error = _of_sanic(error, request.path)
    if not isinstance(error, ApiError):
        # The traceback goes to the log, never to the client.
        logger.error("a request failed", exc_info=error)
        error = InternalError("internal error")
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = message_error_body if request.path.startswith(MESSAGES_PATH) else error_body
    return json_response(body(error), error.status, headers)


def _allowed_methods(request: Request) -> list[str]:
    """The methods that the path has. Sanic names none for a path with a parameter."""
    allowed = []
    for method in ("GET", "HEAD", "POST", "DELETE"):
        with contextlib.suppress(SanicException):
            request.app.router.get(request.path, method, None)
            allowed.append(method)
    return allowed


def _of_sanic(error: SanicException, path: str) -> ApiError:
    """Sanic's own errors (404, 405, 408, 413, ...) as errors of the API."""
    status = error.status_code or 500
    message = not_found(path) if isinstance(error, NotFound) else str(error)[:300]
    converted = ApiError(message if status < 500 else "the server could not answer")
    converted.status = status
    converted.type = type_of_status(status)
    return converted
