"""How one process watches another.

Owns one rule: time in which the watch itself was held up counts against nobody, as what the other
one said then has not been read yet. So it is where a machine slept or a container was paused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable


async def watch(
    pause: Callable[[], Awaitable[object]],
    judge: Callable[[float], str | None],
    interval_s: float,
    clock: Callable[[], float],
) -> str:
    """The first reason that `judge` gives, which looks after each `pause`.

    pause: takes about `interval_s`. judge: told the seconds that count since it last looked, two
    intervals at most. clock: seconds, monotonic.
    """
    looked = clock()
    while True:
        await pause()
        now = clock()
        reason = judge(min(now - looked, 2 * interval_s))
        looked = now
        if reason is not None:
            return reason
