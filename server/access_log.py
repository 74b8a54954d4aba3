"""One line of the log a request, when it has ended.

Owns the line's fields. Knows nothing of when a request ends, or of how a line is written.
"""

from __future__ import annotations

import logging
from typing import Any

from .metrics import Metrics
from .records import Record

logger = logging.getLogger("vlmserve.access")


class RequestLog:
    """Tells of each closed record: to the log, unless that is not wanted, and to the metrics."""

    def __init__(self, is_logged: bool, metrics: Metrics) -> None:
        self._is_logged = is_logged
        self._metrics = metrics

    def add(self, record: Record) -> None:
        """Count the request, and write its line."""
        self._metrics.count_http(record)
        if self._is_logged:
            logger.info("request", extra={"fields": fields_of(record)})


def fields_of(record: Record) -> dict[str, Any]:
    """What an operator may know of a request: no word of it, nor who sent it.

    Times in seconds; None for what a request never came to.
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
