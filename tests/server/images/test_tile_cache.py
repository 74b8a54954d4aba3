"""The same picture by many at once: decoded once, one object, and each gets its own failure."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from support.fake_runner import fake_image

from vlmserve.models.batch import ImageTiles
from vlmserve.server.errors import OverloadedError
from vlmserve.server.images.settings import ImageError
from vlmserve.server.images.tile_cache import TileCache, TileKey

KEY = TileKey("", b"p", None)


class Body:
    """What a request holds until its picture is decoded."""


class Decoder:
    """Decodes when told to; counts."""

    def __init__(self) -> None:
        self.num_begun = self.num_cancelled = 0
        self.results: asyncio.Queue[ImageTiles | Exception] = asyncio.Queue()

    async def decode(self) -> ImageTiles:
        self.num_begun += 1
        try:
            result = await self.results.get()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if isinstance(result, Exception):
            raise result
        return result


async def waiting(
    cache: TileCache, decoder: Decoder, count: int, key: TileKey = KEY
) -> list[asyncio.Task[ImageTiles]]:
    """Tasks that all wait for the same picture."""
    tasks = [asyncio.create_task(cache.get_or_decode(key, decoder.decode)) for _ in range(count)]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


def test_sixteen_at_once_decode_once_and_share_one_object() -> None:
    async def scenario() -> None:
        cache, decoder = TileCache(0), Decoder()
        tasks = await waiting(cache, decoder, 16)
        decoder.results.put_nowait(fake_image("p"))
        found = await asyncio.gather(*tasks)
        assert decoder.num_begun == 1
        assert len({id(tiles) for tiles in found}) == 1
        # While a request has them they are found, and then, without a cache, no longer.
        assert cache.get(KEY) is found[0]
        assert len(cache) == cache.num_bytes == 0
        del tasks, found
        await asyncio.sleep(0)  # the loop drops what it returned
        gc.collect()
        assert cache.get(KEY) is None

    asyncio.run(scenario())


def test_other_tenants_decode_for_themselves() -> None:
    async def scenario() -> None:
        cache, decoder = TileCache(100), Decoder()
        tasks = await waiting(cache, decoder, 1)
        tasks += await waiting(cache, decoder, 1, TileKey("t", b"p", None))
        assert decoder.num_begun == 2
        for _ in tasks:
            decoder.results.put_nowait(fake_image("p"))
        first, second = await asyncio.gather(*tasks)
        assert first is not second

    asyncio.run(scenario())


def test_who_leaves_first_takes_nothing_from_the_others() -> None:
    async def scenario() -> None:
        cache, decoder = TileCache(100), Decoder()
        first, *others = await waiting(cache, decoder, 3)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        decoder.results.put_nowait(fake_image("p"))
        assert (await others[0]) is (await others[1])
        assert (decoder.num_begun, decoder.num_cancelled) == (1, 0)

    asyncio.run(scenario())


def test_the_last_who_leaves_ends_the_work_and_a_newcomer_begins_it_again() -> None:
    async def scenario() -> None:
        cache, decoder = TileCache(100), Decoder()
        tasks = await waiting(cache, decoder, 2)
        for task in tasks:
            task.cancel()
        newcomer = cache.get_or_decode(KEY, decoder.decode)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert decoder.num_cancelled == 1
        decoder.results.put_nowait(fake_image("p"))
        assert (await newcomer).num_tiles == 1
        assert decoder.num_begun == 2

    asyncio.run(scenario())


def test_an_image_that_cannot_be_decoded_fails_each_with_an_error_of_its_own() -> None:
    async def scenario() -> None:
        cache, decoder = TileCache(100), Decoder()
        tasks = await waiting(cache, decoder, 3)
        decoder.results.put_nowait(ImageError("broken"))
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(error) for error in errors] == ["broken"] * 3
        assert len({id(error) for error in errors}) == 3  # each is given its image's place
        assert decoder.num_begun == 1

    asyncio.run(scenario())


def test_a_lane_that_refuses_one_request_does_not_refuse_the_others() -> None:
    async def scenario() -> None:
        cache, decoder = TileCache(100), Decoder()
        first, *others = await waiting(cache, decoder, 3)
        decoder.results.put_nowait(OverloadedError("full", retry_after_s=1.0))
        with pytest.raises(OverloadedError):
            await first
        decoder.results.put_nowait(fake_image("p"))
        assert (await others[0]) is (await others[1])
        assert decoder.num_begun == 2

    asyncio.run(scenario())


def test_a_picture_that_is_rejected_is_freed_without_a_garbage_collection() -> None:
    """The failure's frames kept the task that kept the failure, and the picture's bytes."""

    async def scenario() -> None:
        cache = TileCache(0)

        async def ask(body: Body) -> None:
            async def decode() -> ImageTiles:
                await asyncio.sleep(0)
                raise ImageError(f"{body} is no picture")

            with pytest.raises(ImageError, match="no picture"):
                await cache.get_or_decode(KEY, decode)

        gc.disable()
        try:
            bodies = [Body() for _ in range(3)]
            alive = [weakref.ref(body) for body in bodies]
            await asyncio.gather(*(ask(body) for body in bodies))
            bodies.clear()
            await asyncio.sleep(0)  # the loop drops what it returned
            assert [ref() for ref in alive] == [None] * 3
        finally:
            gc.enable()

    asyncio.run(scenario())
