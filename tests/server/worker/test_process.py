"""What a worker process does beside its requests."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable

from vlmserve.server.worker.process import _freeze_startup_objects


class App:
    """Takes the listener that Sanic would call after the start."""

    def after_server_start(self, listener: Callable[[App], Awaitable[None]]) -> None:
        self.start = listener


def test_objects_of_the_start_are_left_out_of_garbage_collections():
    """Each full collection looked at all modules and stopped the loop for up to 225 ms."""
    app = App()
    # What the run froze when all tests were collected; the start freezes it again.
    gc.unfreeze()
    _freeze_startup_objects(app)
    assert gc.get_freeze_count() == 0
    asyncio.run(app.start(app))
    assert gc.get_freeze_count() > 10_000
