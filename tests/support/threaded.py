"""A server of this project on an event loop of its own, for clients that block.

Owns the thread. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx2
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    meta_like_tokenizer,
    running_server,
    tokens_one_by_one,
)

from vlmserve.server.settings import ServerSettings

TIMEOUT_S = 30.0


@contextlib.contextmanager
def server_in_thread(
    checkpoint: Path, *, tls: Any = None, engine: Any = None, images: Any = None, **settings: Any
) -> Iterator[int]:
    """The port of a server whose engine answers "What?"; it ends with the block."""
    tokenizer = meta_like_tokenizer()
    fake = engine or ScriptedEngine(lambda request: list(tokens_one_by_one(tokenizer, "What?")))
    options = ServerSettings(
        model=str(checkpoint), engine_socket="", **{"served_model_names": [MODEL]} | settings
    )
    parts = {"engine_client": fake, "images": images or OneTileImages()}
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        async with running_server(options, tls=tls, **parts) as url:
            end = asyncio.Event()
            started.set_result((httpx2.URL(url).port or 0, asyncio.get_running_loop(), end))
            await end.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    port, loop, end = started.result(TIMEOUT_S)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "the server does not end"
