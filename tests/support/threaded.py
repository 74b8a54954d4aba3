"""A server of this project on an event loop of its own, for clients that block.

Owns the thread. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx2
from support.http_side import (
    MODEL,
    OneTileImages,
    Script,
    ScriptedEngine,
    meta_like_tokenizer,
    running_server,
    tokens_one_by_one,
)

from vlmserve.server.settings import ServerSettings

TIMEOUT_S = 120.0


Parts = Callable[[], AbstractAsyncContextManager[dict[str, Any]]]


@contextlib.asynccontextmanager
async def one_tile_images() -> AsyncIterator[dict[str, Any]]:
    yield {"images": OneTileImages()}


@contextlib.contextmanager
def server_in_thread(
    checkpoint: Path,
    *,
    tls: Any = None,
    parts: Parts = one_tile_images,
    script: Script | None = None,
    **settings: Any,
) -> Iterator[int]:
    """The port of a server whose engine answers "What?"; it ends with the block.

    script: other answers of the engine. parts: gives `build_app`'s own parts but the engine,
    entered in the server's event loop.
    """
    tokenizer = meta_like_tokenizer()
    engine = ScriptedEngine(script or (lambda request: list(tokens_one_by_one(tokenizer, "What?"))))
    options = ServerSettings(
        model=str(checkpoint), engine_socket="", **{"served_model_names": [MODEL]} | settings
    )
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        async with (
            parts() as given,
            running_server(options, tls=tls, engine_client=engine, **given) as url,
        ):
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
