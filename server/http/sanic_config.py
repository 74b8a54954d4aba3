"""Sanic's configuration from a worker's settings. Knows nothing of routes."""

from __future__ import annotations

from typing import Any

from ..settings import ServerSettings

DAY_S = 24 * 3600
# For connections to send their last bytes after every request has ended.
CLOSING_TIME_S = 1.0


def sanic_config(settings: ServerSettings) -> dict[str, Any]:
    """The values of `app.config` that differ from Sanic's own."""
    return {
        "ACCESS_LOG": False,
        "AUTO_EXTEND": False,
        "FALLBACK_ERROR_FORMAT": "json",
        "GRACEFUL_SHUTDOWN_TIMEOUT": CLOSING_TIME_S,
        "KEEP_ALIVE_TIMEOUT": settings.keep_alive_timeout_s,
        "MOTD": False,
        "NOISY_EXCEPTIONS": False,
        "REQUEST_MAX_SIZE": settings.max_body_bytes,
        "REQUEST_TIMEOUT": settings.request_timeout_s,
        # Sanic's timer would cut a long unstreamed answer. Requests have their own deadlines.
        "RESPONSE_TIMEOUT": DAY_S,
    }
