"""The loop with which the supervisor watches another process.

Time in which the watching process itself was blocked does not count, because it has not yet read
what the other process sent: after a suspend of the machine or a pause of the container.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable


async def watch(
    pause: Callable[[], Awaitable[object]],
    judge: Callable[[float], str | None],
    interval_s: float,
    clock: Callable[[], float],
) -> str:
    """Call `judge` after each `pause`; return its first reason.

    pause: takes about `interval_s`. judge: gets the seconds since its last call, at most two
    intervals. clock: seconds, monotonic.
    """
    checked_at = clock()
    while True:
        await pause()
        now = clock()
        reason = judge(min(now - checked_at, 2 * interval_s))
        checked_at = now
        if reason is not None:
            return reason
