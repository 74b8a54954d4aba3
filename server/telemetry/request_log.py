"""Reports each request that has ended: one log line, the metrics, a trace.

Owns the fields of the log line. Knows nothing of when a request ends or of how logs are
written.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .metrics import Metrics
from .request_record import RequestRecord

if TYPE_CHECKING:
    from .tracing import Tracer

logger = logging.getLogger("vlmserve.access")

HEALTH_ROUTES = frozenset({"/health", "/v1/health/live", "/v1/health/ready"})


class RequestLog:
    """Reports each closed record to the metrics, and to the log and the tracer if enabled."""

    def __init__(self, is_logged: bool, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self._is_logged = is_logged
        self._metrics = metrics
        self._tracer = tracer

    def add(self, record: RequestRecord) -> None:
        """Count the request, trace it, and log it in one line."""
        self._metrics.count_http(record)
        if self._tracer is not None:
            self._tracer.add(record)
        if self._is_logged:
            # Probes come every second, for as long as a server runs.
            is_probe = record.route in HEALTH_ROUTES and record.status == 200
            level = logging.DEBUG if is_probe else logging.INFO
            logger.log(level, "request", extra={"fields": fields_of(record)})


def fields_of(record: RequestRecord) -> dict[str, Any]:
    """The fields of a request's log line, without its content or its sender.

    Times in seconds; None for a stage that the request did not reach.
    """
    fields: dict[str, Any] = {
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "total_s": round(record.total_s, 4),
    }
    if not record.is_generation and not record.num_images:
        return fields
    return fields | {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "images": record.num_images,
        "queue_s": _rounded(record.queue_s),
        "ttft_s": _rounded(record.ttft_s),
        "finish_reasons": record.finish_reasons,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
