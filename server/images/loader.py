"""From the image URLs of one request to their tiles, within the request's budget.

Owns the order: check count, bytes and pixels before anything is fetched, then fetch and decode
all images at once; the first failure cancels the others. Knows nothing of HTTP routes, prompts
or models.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ...models.batch import ImageTiles
from ...router.processes.tasks import run_together
from ..admission.bytes_in_flight import keep_bytes
from ..admission.fair_lane import FairLane
from ..admission.lanes import Lanes
from .decoders import DecoderPool
from .fetch import ImageFetcher
from .header import check_header, read_header
from .settings import MEBI, ImageError, ImageRequest, ImageSettings
from .sources import BASE64_SLICE_CHARS, InlineImage, RemoteImage, parse_source
from .tile_cache import TileCache

# Decoding a data URL of this length takes about a millisecond.
MAX_INLINE_CHARS = BASE64_SLICE_CHARS


class RequestBudget:
    """The encoded bytes and pixels that all images of one request may have together."""

    def __init__(self, settings: ImageSettings) -> None:
        self._settings = settings
        self._bytes_left = settings.max_request_bytes
        self._pixels_left = settings.max_request_pixels
        self._work_seen: set[str] = set()

    def is_first(self, work: str) -> bool:
        """Whether this is the request's first piece of this work; the others are admitted."""
        is_first = work not in self._work_seen
        self._work_seen.add(work)
        return is_first

    def spend_bytes(self, num_bytes: int) -> None:
        """Count bytes that arrived.

        Raises ImageError once they are over the request's limit, OverloadedError if all open
        requests keep too many.
        """
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise ImageError(
                f"the request's images have over {self._settings.max_request_bytes / MEBI:g} MiB "
                "together, the limit: send fewer or smaller ones"
            )
        keep_bytes(num_bytes)

    def spend_pixels(self, data: bytes) -> None:
        """Check an image's header and count the pixels that it declares.

        Raises ImageError if this image or all together are over a limit.
        """
        header = read_header(data)
        check_header(header, self._settings)
        self._pixels_left -= header.width * header.height
        if self._pixels_left < 0:
            raise ImageError(
                f"the request's images have over {self._settings.max_request_pixels:,} pixels "
                "together, the limit: send fewer or smaller ones"
            )


class ImageLoader:
    """Loads the images of requests; one per worker."""

    def __init__(
        self,
        settings: ImageSettings,
        fetcher: ImageFetcher,
        decoders: DecoderPool,
        threads: FairLane | None = None,
    ) -> None:
        """threads: the lane of long data URLs."""
        self._threads = threads or Lanes().threads()
        self._settings = settings
        self._fetcher = fetcher
        self._decoders = decoders
        self._cache = TileCache(settings.tile_cache_bytes)

    async def load(
        self, images: Sequence[ImageRequest], deadline: float | None = None
    ) -> list[ImageTiles]:
        """The tiles of each image, in order.

        deadline: the event loop's time by which all must be loaded. Raises ImageError with the
        index of the first image that fails (None if the request as a whole fails),
        TimeoutError past the deadline.
        """
        budget = RequestBudget(self._settings)
        async with asyncio.timeout_at(deadline):
            sources = await self._check(images, budget)
            return await self._load_all(images, sources, budget)

    async def _check(
        self, images: Sequence[ImageRequest], budget: RequestBudget
    ) -> list[InlineImage | RemoteImage]:
        """The source of each URL, checked against the budget before anything is fetched."""
        limit = self._settings.max_images
        if len(images) > limit:
            raise ImageError(f"request has {len(images)} images; the limit is {limit}", limit)
        sources = []
        for index, image in enumerate(images):
            with _blaming(index):
                source = await self._parse(image)
                if isinstance(source, InlineImage):
                    budget.spend_bytes(len(source.data))
                    budget.spend_pixels(source.data)
            sources.append(source)
        return sources

    async def _parse(self, image: ImageRequest) -> InlineImage | RemoteImage:
        """Parse a URL; megabytes of base64 in a thread, so that the event loop is not blocked."""
        if len(image.url) <= MAX_INLINE_CHARS:
            return parse_source(image.url, self._settings)
        parse = functools.partial(parse_source, image.url, self._settings)
        return await self._threads.run_in_thread(image.owner, parse)

    async def _load_all(
        self,
        images: Sequence[ImageRequest],
        sources: Sequence[InlineImage | RemoteImage],
        budget: RequestBudget,
    ) -> list[ImageTiles]:
        """Load all images at once. The first failure cancels the rest and is raised."""
        return await run_together(
            self._load_one(index, image, source, budget)
            for index, (image, source) in enumerate(zip(images, sources, strict=True))
        )

    async def _load_one(
        self,
        index: int,
        image: ImageRequest,
        source: InlineImage | RemoteImage,
        budget: RequestBudget,
    ) -> ImageTiles:
        with _blaming(index):
            if isinstance(source, InlineImage):
                data = source.data
            else:
                data = await self._fetcher.fetch(
                    source, budget.spend_bytes, image.owner, is_first=budget.is_first("fetch")
                )
                budget.spend_pixels(data)
            return await self._decode(data, image, budget)

    async def _decode(self, data: bytes, image: ImageRequest, budget: RequestBudget) -> ImageTiles:
        """The tiles of checked bytes, from the cache or from a decoder; once for all that wait."""
        key = await self._cache.key_of(data, image.max_tiles, image.tenant)

        async def decode() -> ImageTiles:
            return await self._decoders.decode(
                data, image.max_tiles, image.owner, is_first=budget.is_first("decode")
            )

        return await self._cache.get_or_decode(key, decode)


@contextmanager
def _blaming(index: int) -> Iterator[None]:
    """Set the index of the image on an ImageError that is raised inside."""
    try:
        yield
    except ImageError as error:
        if error.index is None:
            error.index = index
        raise
