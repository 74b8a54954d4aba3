"""How a test waits for what has no event: it looks again and again, with a bound far off.

The bound only ends a test that hangs. It is no promise of the server's, and no test measures by it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

FAR_S = 120.0
LOOK_EVERY_S = 0.01


def wait_until(
    is_true: Callable[[], object], timeout_s: float = FAR_S, every_s: float = LOOK_EVERY_S
) -> bool:
    """Whether the condition comes true; for `assert wait_until(...), "what was expected"`."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


async def until(is_true: Callable[[], object], timeout_s: float = FAR_S) -> None:
    """Wait in an event loop; raises AssertionError if the condition does not come true."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not true within {timeout_s:g} s"
        await asyncio.sleep(LOOK_EVERY_S / 2)
