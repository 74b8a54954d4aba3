"""When a request's time is over, and the error that says so.

Owns the one bound that every wait of a request stands under. Knows nothing of what is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator

from ..errors import DeadlineError


@contextlib.asynccontextmanager
async def until(deadline: float) -> AsyncGenerator[None, None]:
    """Raise DeadlineError where the block takes longer than to this time of the loop's."""
    try:
        async with asyncio.timeout_at(None if deadline == math.inf else deadline) as scope:
            yield
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise deadline_error() from error


def deadline_error() -> DeadlineError:
    """What a client reads whose request took too long."""
    return DeadlineError(
        "the request took longer than its timeout: ask for fewer tokens, raise timeout_s or"
        " start the server with a larger --max-request-time"
    )
