"""How late the event loop runs its callbacks, which delays every client of a worker.

Owns the measurement. Knows nothing of what blocks the loop or of how the lag is reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.25


async def watch_lag(observe: Callable[[float], None], interval_s: float = INTERVAL_S) -> None:
    """Call `observe` with the lag in seconds, once per interval; never returns."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        observe(max(0.0, loop.time() - due))
