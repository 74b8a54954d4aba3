"""The errors that a client may see, and the one JSON body they all become.

    ApiError
    |- BadRequestError         400  the client's own mistake
    |  `- DeadEndError           the form of the answer cannot be completed
    |- AuthenticationError     401  the API key is missing or wrong
    |- NotFoundError           404  nothing of that id is kept here
    |  `- ModelNotFoundError   404  the model is not served here
    |- UnsupportedMediaError   415  the body is compressed
    |- OverloadedError         429  a queue is full; retry after Retry-After seconds
    |- RateLimitError          429  the API key's own limit; retry after Retry-After seconds
    |- InternalError           500  a model step failed
    |- NotReadyError           503  no engine is connected, or it is loading
    `- DeadlineError           504  the request's time is over

Owns status, type and JSON form of each. Knows nothing of Sanic or of where an error is raised.
"""

from __future__ import annotations

from typing import Literal, TypedDict


class ErrorDetails(TypedDict):
    """param: the path of the field at fault. code: OpenAI's name of the error."""

    message: str
    type: str
    param: str | None
    code: str | None


class FrameDetails(ErrorDetails):
    """object: what NIM's clients know an error by; without it they read the stream as complete."""

    object: Literal["error"]


class FrameError(TypedDict):
    """An error inside a stream: one frame, the last with content."""

    error: FrameDetails


class ErrorBody(TypedDict):
    """The body of every error answer: OpenAI's nested form and the older flat form together.

    The flat `code` is the HTTP status.
    """

    error: ErrorDetails
    object: Literal["error"]
    message: str
    type: str
    param: str | None
    code: int


class ApiError(Exception):
    """An error that the client reads, in OpenAI's terms. retry_after_s: for Retry-After."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequestError(ApiError):
    status = 400
    type = "invalid_request_error"


class DeadEndError(BadRequestError):
    """No token can follow the answer so far, though the form that `field` asks for wants more."""

    code = "form_dead_end"

    def __init__(self, field: str) -> None:
        super().__init__(
            f"{field} has a dead end: no token can follow the answer so far, and it is not complete"
            " yet. Change the form so that every start of a text can be completed",
            param=field,
        )


class AuthenticationError(ApiError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class NotFoundError(ApiError):
    status = 404
    type = "invalid_request_error"
    code: str | None = "not_found"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class UnsupportedMediaError(ApiError):
    status = 415
    type = "invalid_request_error"


class OverloadedError(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class RateLimitError(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class InternalError(ApiError):
    status = 500


class NotReadyError(ApiError):
    status = 503
    type = "service_unavailable_error"


class DeadlineError(ApiError):
    status = 504
    type = "timeout_error"
    code = "timeout"


def type_of_status(status: int) -> str:
    """The `type` of an error that has only an HTTP status."""
    if status == 429:
        return OverloadedError.type
    if status == 503:
        return NotReadyError.type
    return BadRequestError.type if status < 500 else ApiError.type


def frame_body(error: ApiError) -> FrameError:
    """`{"error": {"object": "error", ...}}`: a failure inside a stream."""
    return {"error": {"object": "error", **_details(error)}}


def _details(error: ApiError) -> ErrorDetails:
    return {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }


def error_body(error: ApiError) -> ErrorBody:
    """Both documented forms in one body: the nested form and the older flat keys.

    The nested `code` is OpenAI's name or null; the flat one is the HTTP status.
    """
    return {
        "error": _details(error),
        "object": "error",
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.status,
    }
