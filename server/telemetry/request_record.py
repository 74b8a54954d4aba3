"""The record of one HTTP request until it ends: its route, its times and its counts.

Owns the record, its id, and how the tasks that work for the request find it. Contains nothing
that a client wrote, except a request id that is harmless. Knows nothing of how a record is
reported: as a log line, in metrics or as a trace.
"""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from sanic import Request

from ...router.processes.logs import request_id_of_task

UNMATCHED = "unmatched"
OTHER_METHOD = "other"
CLIENT_CLOSED_REQUEST = 499

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class RequestRecord:
    """One request. Times are of `time.monotonic()`; None for a stage that was not reached.

    route: the pattern of the route, never the requested path. traceparent, tracestate: as the
    client sent them, used for the trace only. queue_s: measured by the engine. A request of
    several prompts sums tokens and images, and keeps the first queue time and first token.
    ignored_fields: of a form that could not be obeyed in full. image_digests: hexadecimal, equal
    for equal files. replica: which engine computed, None if there is one only.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    method: str = OTHER_METHOD
    route: str = UNMATCHED
    status: int = 0
    traceparent: str | None = None
    tracestate: str | None = None
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)
    ended: float | None = None
    images_started: float | None = None
    images_ended: float | None = None
    admitted: float | None = None
    queue_s: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_images: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    ignored_fields: list[str] = field(default_factory=list)
    image_digests: list[str] = field(default_factory=list)
    replica: int | None = None
    is_handled: bool = False

    @classmethod
    def of(cls, request: Request) -> RequestRecord:
        """The record of a request whose head has just been read."""
        method = request.method if request.method in _METHODS else OTHER_METHOD
        return cls(
            request_id=_request_id(request),
            method=method,
            traceparent=request.headers.getone("traceparent", None),
            tracestate=request.headers.getone("tracestate", None),
        )

    @property
    def total_s(self) -> float:
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the request's arrival to its first token."""
        return None if self.first_token is None else self.first_token - self.started

    @property
    def is_generation(self) -> bool:
        return self.admitted is not None


@dataclass(slots=True, frozen=True)
class Timings:
    """Where the time of a request went, in seconds. ttft_s, total_s: since its arrival.

    images_s: to fetch and decode its images. queue_s: in the engine's queue. vision_s: in the
    vision encoder, 0 for cached images. prefill_s: from its first step to its first token,
    vision_s included. decode_s: from the first token to the last.
    """

    images_s: float = 0.0
    queue_s: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0


_record_of_task: ContextVar[RequestRecord | None] = ContextVar("record_of_task", default=None)


def current_record() -> RequestRecord:
    """The record of the request that this task works for; a new record if there is none."""
    record = _record_of_task.get()
    return RequestRecord() if record is None else record


def note_replica(replica: int) -> None:
    """Write into this task's record which replica its request was sent to."""
    current_record().replica = replica


def set_current_record(record: RequestRecord | None) -> None:
    """Make `record` the record of this task and of the tasks that it starts."""
    _record_of_task.set(record)
    request_id_of_task.set(None if record is None else record.request_id)


def record_of(request: Request) -> RequestRecord | None:
    """The request's record; None if it has none yet."""
    record: RequestRecord | None = getattr(request.ctx, "record", None)
    return record


def _request_id(request: Request) -> str:
    """The client's X-Request-Id if it is harmless, else a new id."""
    given = str(request.headers.getone("x-request-id", ""))
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
