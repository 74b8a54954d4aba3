"""The time limit of a request, and its error.

Owns the limit that applies to every wait of a request. Knows nothing of the things waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator

from ..errors import DeadlineError


@contextlib.asynccontextmanager
async def until(deadline: float) -> AsyncGenerator[None, None]:
    """Raise DeadlineError if the block runs beyond this time of the event loop's clock."""
    try:
        async with asyncio.timeout_at(None if deadline == math.inf else deadline) as scope:
            yield
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise deadline_error() from error


def deadline_error() -> DeadlineError:
    """The error for a request that took too long."""
    return DeadlineError(
        "the request took longer than its timeout: ask for fewer tokens, raise timeout_s or"
        " start the server with a larger --max-request-time"
    )
