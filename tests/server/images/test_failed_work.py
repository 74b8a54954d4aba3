"""Requests whose images fail leave nothing behind: no body, and no memory of the process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from support.collections_off import without_collections
from support.engine_side import engine_at
from support.fake_runner import OrdinaryRunner
from support.http_side import MODEL, ScriptedEngine, running_server, write_checkpoint
from support.http_to_engine import until_ready
from support.invariants import CHAT, body_for
from support.outside import Site, plain_response
from support.pictures import encoded, picture
from support.polling import until
from support.worker_process import worker_process

from vlmserve.server.images.fetch import ImageFetcher
from vlmserve.server.images.settings import ImageError, ImageSettings
from vlmserve.server.images.sources import RemoteImage
from vlmserve.server.settings import ServerSettings

# Far beyond any run: other work may take the cores.
DEADLINE_S = 580.0
NUM_PICTURES = 16


class Body(bytes):
    """A downloaded body that counts how many of its kind are alive."""

    alive = 0

    def __init__(self, data: bytes) -> None:
        Body.alive += 1

    def __del__(self) -> None:
        Body.alive -= 1


class CountedFetcher(ImageFetcher):
    """Gives a counted body for each URL, the same file for all."""

    def __init__(self, file: bytes) -> None:
        self._file = file

    async def fetch(
        self,
        source: RemoteImage,
        spend: Callable[[int], None] | None = None,
        owner: str = "",
        *,
        is_first: bool = True,
    ) -> bytes:
        body = Body(self._file)
        await asyncio.sleep(0)
        assert spend is not None
        spend(len(body))
        if source.target == "/fails":
            raise ImageError("image URL's server answered with status 404")
        return body


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG of this size, and no pixels."""
    sides = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + b"IHDR" + sides + bytes(9)


WAYS = {
    "a header over the limits": (png_header(100_000, 100_000), {}, []),
    "no image": (b"nothing that is an image" * 1_000, {}, []),
    "bytes over the request's limit": (encoded(picture()), {"max_request_bytes": 2_000}, []),
    "pixels over the request's limit": (png_header(4_000, 4_000), {}, []),
    "a download that fails": (encoded(picture()), {}, ["http://a.example/fails"]),
    "a decoder that rejects": (png_header(100, 100) + bytes(5_000), {}, []),
}
ORDINARY_WAYS = ("no image", "a download that fails", "a decoder that rejects")


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=() if way in ORDINARY_WAYS else pytest.mark.slow) for way in WAYS],
)
def test_row_49_failed_image_requests_free_their_bodies_without_a_garbage_collection(tmp_path, way):
    """72 requests of 16 oversized pictures, each a correct 400, took the worker to 6.2 GB."""
    file, limits, more = WAYS[way]
    images = ImageSettings(tile_cache_bytes=0, **limits)
    options = ServerSettings(
        model=str(write_checkpoint(tmp_path)),
        engine_socket="",
        served_model_names=[MODEL],
        images=images,
    )
    urls = ["http://a.example/x"] * (NUM_PICTURES - len(more)) + more

    async def run() -> None:
        engine = ScriptedEngine(lambda request: [])
        parts = {"engine_client": engine, "fetcher": CountedFetcher(file)}
        async with (
            running_server(options, **parts) as url,
            httpx2.AsyncClient(base_url=url, timeout=DEADLINE_S) as client,
        ):
            body = body_for(CHAT, images=urls) | {"model": MODEL}
            with without_collections():
                for _ in range(4):
                    assert (await client.post(CHAT, json=body)).status_code == 400
                    # The answer is sent a moment before the request's frames end.
                    await asyncio.sleep(0.02)
                assert Body.alive == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    "count",
    [
        60,
        pytest.param(300, marks=pytest.mark.slow),
        pytest.param(10_000, marks=pytest.mark.torture),
    ],
)
def test_row_49_memory_after_failed_image_requests_is_that_after_the_first_tenth(tmp_path, count):
    """Freed bodies of many sizes stayed in the allocator's heap: 16 MB a request of 16 pictures."""

    async def serve_pictures(stack: contextlib.AsyncExitStack) -> int:
        answers = {
            f"/{number}": plain_response(png_header(100_000, 100_000) + bytes(number * 70_000))
            for number in range(1, NUM_PICTURES + 1)
        }
        server = await asyncio.start_server(Site(answers), "127.0.0.1", 0)
        await stack.enter_async_context(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def run() -> None:
        path = str(Path(tmp_path) / "engine.sock")
        images = ImageSettings(allow_private_addresses=True)
        async with (
            contextlib.AsyncExitStack() as stack,
            engine_at(path, OrdinaryRunner()),
            worker_process(path, images=images) as worker,
            httpx2.AsyncClient(base_url=worker.url, timeout=DEADLINE_S) as client,
        ):
            await until_ready(client)
            port = await serve_pictures(stack)
            urls = [f"http://127.0.0.1:{port}/{number}" for number in range(1, NUM_PICTURES + 1)]
            body = body_for(CHAT, images=urls) | {"model": "m"}
            after_tenth = 0
            for number in range(1, count + 1):
                assert (await client.post(CHAT, json=body)).status_code == 400
                if number <= count // 10:
                    after_tenth = max(after_tenth, worker.resident_bytes)
            # The last request's downloads may still be on their way out.
            await until(lambda: worker.resident_bytes <= after_tenth * 1.05)

    asyncio.run(run())


def test_row_49_a_download_that_is_cancelled_at_any_point_leaves_no_request_in_the_pool():
    """Cancelled while its response closed, each left 11 KB: a worker grew with failed requests."""

    async def run() -> None:
        site = Site({"/a": plain_response(png_header(10, 10) + bytes(100_000))})
        settings = ImageSettings(allow_private_addresses=True)
        fetcher = ImageFetcher(settings)
        async with await asyncio.start_server(site, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            source = RemoteImage("http", "127.0.0.1", port, "/a")
            whole = await fetcher.fetch(source)
            num_cancelled = 0
            for num_turns in range(400):
                task = asyncio.ensure_future(fetcher.fetch(source))
                for _ in range(num_turns):
                    await asyncio.sleep(0)
                task.cancel()
                try:
                    assert await task == whole
                    break
                except asyncio.CancelledError:
                    num_cancelled += 1
            assert num_cancelled > 10
            await until(lambda: "Requests: 0 active, 0 queued" in repr(fetcher._pool))
        await fetcher.close()

    asyncio.run(run())
