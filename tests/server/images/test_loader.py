"""Loading: budgets, order and failures of the images of one request."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable

import pytest
from support.pictures import SETTINGS, TILING, encoded, picture

from vlmserve.models.batch import ImageTiles
from vlmserve.server.images import loader as image_loader
from vlmserve.server.images.decoders import DecoderPool
from vlmserve.server.images.fetch import ImageFetcher
from vlmserve.server.images.loader import ImageLoader
from vlmserve.server.images.settings import ImageError, ImageRequest, ImageSettings
from vlmserve.server.images.sources import InlineImage, RemoteImage, parse_source
from vlmserve.server.images.tiling import cut


class ScriptedFetcher(ImageFetcher):
    """Gives bytes by host name; never connects."""

    def __init__(self, files: dict[str, bytes | ImageError | None]) -> None:
        self._files = files
        self.fetched: list[str] = []
        self.num_cancelled = 0

    async def fetch(
        self,
        source: RemoteImage,
        spend: Callable[[int], None] | None = None,
        owner: str = "",
        *,
        is_first: bool = True,
    ) -> bytes:
        self.fetched.append(source.host)
        found = self._files[source.host]
        if found is None:
            try:
                await asyncio.Event().wait()
            finally:
                self.num_cancelled += 1
        if isinstance(found, ImageError):
            raise found
        assert found is not None
        assert spend is not None
        spend(len(found))
        return found


def inline(data: bytes) -> ImageRequest:
    return ImageRequest("data:image/png;base64," + base64.b64encode(data).decode())


def remote(host: str, max_tiles: int | None = None) -> ImageRequest:
    return ImageRequest(f"https://{host}/x", max_tiles)


def load(
    images: list[ImageRequest],
    files: dict[str, bytes | ImageError | None] | None = None,
    settings: ImageSettings = SETTINGS,
    deadline_s: float | None = None,
) -> tuple[list[ImageTiles] | Exception, ScriptedFetcher]:
    fetcher = ScriptedFetcher(files or {})

    async def run() -> list[ImageTiles] | Exception:
        async with asyncio.timeout(60), DecoderPool(settings, TILING) as pool:
            loader = ImageLoader(settings, fetcher, pool)
            now = asyncio.get_running_loop().time()
            deadline = None if deadline_s is None else now + deadline_s
            try:
                return await loader.load(images, deadline)
            except (ImageError, TimeoutError) as error:
                return error

    return asyncio.run(run()), fetcher


def failure(result: list[ImageTiles] | Exception) -> ImageError:
    assert isinstance(result, ImageError), result
    return result


def test_images_are_loaded_in_the_order_of_the_request() -> None:
    wide, tall = picture(200, 50), picture(50, 200)
    result, _ = load(
        [remote("a.example"), inline(encoded(tall)), remote("a.example", 1)],
        {"a.example": encoded(wide)},
    )
    assert isinstance(result, list)
    expected = [cut(wide, TILING), cut(tall, TILING), cut(wide, TILING, 1)]
    assert [tiles.data for tiles in result] == [tiles.data for tiles in expected]


def test_long_data_url_is_read_in_a_thread_and_a_short_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All were read on the event loop, which stood still for 0.1 s with each 20 MB."""
    threads: dict[int, int] = {}

    def parse(url: str, settings: ImageSettings) -> InlineImage | RemoteImage:
        threads[len(url)] = threading.get_ident()
        return parse_source(url, settings)

    monkeypatch.setattr(image_loader, "parse_source", parse)
    short, long = inline(encoded(picture())), inline(encoded(picture()) + b"\0" * 300_000)
    result, _ = load([short, long])
    assert isinstance(result, list)
    assert result[0].data == result[1].data
    assert threads[len(short.url)] == threading.get_ident() != threads[len(long.url)]


def test_no_images_are_no_work() -> None:
    assert load([])[0] == []


def test_too_many_images_are_refused_before_any_fetch() -> None:
    images = [remote("a.example")] * 3
    result, fetcher = load(images, {"a.example": b""}, ImageSettings(max_images=2))
    assert failure(result).index == 2
    assert fetcher.fetched == []


def test_bad_url_is_named_by_its_place_before_any_fetch() -> None:
    result, fetcher = load([remote("a.example"), ImageRequest("file:///etc/passwd")])
    assert failure(result).index == 1
    assert fetcher.fetched == []


def test_bytes_of_all_data_urls_are_counted_before_any_fetch() -> None:
    data = encoded(picture())
    settings = ImageSettings(max_request_bytes=len(data) + 10)
    result, fetcher = load([remote("a.example"), inline(data), inline(data)], {}, settings)
    assert failure(result).index == 2
    assert "together" in failure(result).message
    assert fetcher.fetched == []


def test_pixels_of_all_data_urls_are_counted_before_any_fetch() -> None:
    settings = ImageSettings(max_request_pixels=2 * 70 * 50)
    images = [inline(encoded(picture()))] * 2
    assert isinstance(load(images, {}, settings)[0], list)
    result, fetcher = load([remote("a.example"), *images, images[0]], {}, settings)
    assert failure(result).index == 3
    assert "7,000 pixels together" in failure(result).message
    assert fetcher.fetched == []


def test_pixels_of_fetches_count_into_the_same_budget() -> None:
    settings = ImageSettings(max_request_pixels=2 * 70 * 50 - 1)
    data = encoded(picture())
    result, _ = load([inline(data), remote("a.example")], {"a.example": data}, settings)
    assert failure(result).index == 1
    assert "pixels together" in failure(result).message


def test_bytes_of_fetches_count_into_the_same_budget() -> None:
    data = encoded(picture())
    settings = ImageSettings(max_request_bytes=len(data) + 10)
    result, _ = load([inline(data), remote("a.example")], {"a.example": data}, settings)
    assert failure(result).index == 1
    assert "together" in failure(result).message


def test_first_failure_cancels_the_other_fetches() -> None:
    files: dict[str, bytes | ImageError | None] = {
        "slow.example": None, "bad.example": ImageError("no such picture"),
    }  # fmt: skip
    result, fetcher = load([remote("slow.example"), remote("bad.example")], files)
    assert failure(result).index == 1
    assert failure(result).message == "no such picture"
    assert fetcher.num_cancelled == 1


def test_fetched_bytes_that_are_no_image_are_refused_with_their_place() -> None:
    result, _ = load(
        [inline(encoded(picture())), remote("a.example")], {"a.example": b"<html>login</html>"}
    )
    assert failure(result).index == 1
    assert "HTML" in failure(result).message


def test_deadline_ends_a_load() -> None:
    result, fetcher = load([remote("slow.example")], {"slow.example": None}, deadline_s=0.1)
    assert isinstance(result, TimeoutError)
    assert fetcher.num_cancelled == 1
