"""What can go wrong between a worker and the engine, as one exception tree.

    RouterError
    ├── EngineError            a request's end, as the worker sees it
    │   ├── EngineDeadError        the engine is gone, stopping or not ready yet
    │   ├── QueueFullError         rejected for now: retry after `retry_after_s`
    │   ├── TooManyRequestsError   the owner's own limit: retry when an answer of it has ended
    │   ├── InvalidRequestError    can never be served: the message names the remedy
    │   ├── AdapterUnusableError   its adapter cannot be read: only the operator can help
    │   └── EngineInternalError    the step that computed the request failed
    ├── WireError              a peer violated the protocol
    │   ├── FrameTooLargeError
    │   └── MalformedFrameError
    ├── OutOfBlocksError       more blocks requested than a pool has free
    └── IllegalTransitionError a bug: an event that a state does not allow

Owns the names, and how a `RequestFailed` message maps to them. Knows nothing of HTTP status codes.
"""

from __future__ import annotations

from .messages import FailureKind, RequestFailed


class RouterError(Exception):
    """Base of all exceptions that this package defines."""


class EngineError(RouterError):
    """A request failed; the message may be shown to the client."""

    kind: FailureKind = "internal"
    retry_after_s: float | None = None


class EngineDeadError(EngineError):
    """The engine is gone, is stopping, or has not loaded its model yet.

    has_started: the request was being computed, so it may be why the engine died.
    """

    kind: FailureKind = "engine_dead"
    has_started: bool = False


class QueueFullError(EngineError):
    """The queue is full by count, tokens or bytes."""

    kind: FailureKind = "queue_full"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s: float = retry_after_s


class TooManyRequestsError(EngineError):
    """The owner has as many answers in the engine as its policy allows."""

    kind: FailureKind = "too_many"
    retry_after_s: float | None = 1.0


class InvalidRequestError(EngineError):
    """The request can never be served; the message names the remedy."""

    kind: FailureKind = "invalid"


class AdapterUnusableError(EngineError):
    """The adapter cannot be used: its files are gone, damaged or do not fit the model."""

    kind: FailureKind = "adapter"


class EngineInternalError(EngineError):
    """The model step that computed the request failed."""

    kind: FailureKind = "internal"


class WireError(RouterError):
    """A peer sent bytes that are not a frame of the protocol."""


class FrameTooLargeError(WireError):
    """A frame has more bytes than the limit."""


class MalformedFrameError(WireError):
    """A frame's bytes are not one of the expected messages."""


class OutOfBlocksError(RouterError):
    """A pool has fewer free blocks than were requested."""


class IllegalTransitionError(RouterError):
    """A bug of ours: a table of states has no transition for this state and event."""


def error_of(failed: RequestFailed) -> EngineError:
    """The exception for a `RequestFailed` message."""
    if failed.kind == "queue_full":
        return QueueFullError(failed.message, failed.retry_after_s or 1.0)
    if failed.kind == "too_many":
        return TooManyRequestsError(failed.message)
    if failed.kind == "invalid":
        return InvalidRequestError(failed.message)
    if failed.kind == "adapter":
        return AdapterUnusableError(failed.message)
    if failed.kind == "engine_dead":
        return EngineDeadError(failed.message)
    return EngineInternalError(failed.message)


def failure_of(request_id: str, error: EngineError) -> RequestFailed:
    """The `RequestFailed` message for `error`."""
    return RequestFailed(
        request_id=request_id,
        kind=error.kind,
        message=str(error),
        retry_after_s=error.retry_after_s,
    )
