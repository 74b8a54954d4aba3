"""How a test waits for what has no event: it looks again and again, with a bound far off.

The bound only ends a test that hangs. It is no promise of the server's, and no test measures by it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

FAR_S = 120.0
LOOK_EVERY_S = 0.01
# What takes long is looked at less often: looking takes cores from what it waits for.
SLOWER, SELDOM_S = 1.2, 0.1


def wait_until(
    is_true: Callable[[], object], timeout_s: float = FAR_S, every_s: float | None = None
) -> bool:
    """Whether the condition comes true; for `assert wait_until(...), "what was expected"`.

    every_s: seconds between two looks; None looks often at first, then less.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = every_s or LOOK_EVERY_S
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        if every_s is None:
            pause_s = min(pause_s * SLOWER, SELDOM_S)
    return True


async def until(is_true: Callable[[], object], timeout_s: float = FAR_S) -> None:
    """Wait in an event loop; raises AssertionError if the condition does not come true."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not true within {timeout_s:g} s"
        await asyncio.sleep(LOOK_EVERY_S / 2)
