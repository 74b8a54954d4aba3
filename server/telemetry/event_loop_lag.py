"""How late the event loop runs what is due: what every client of a worker feels at once.

Owns the measuring. Knows nothing of what holds the loop up, or of who is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.25


async def watch_lag(observe: Callable[[float], None], interval_s: float = INTERVAL_S) -> None:
    """Tell `observe` each interval by how many seconds the loop was late; never returns."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        observe(max(0.0, loop.time() - due))
