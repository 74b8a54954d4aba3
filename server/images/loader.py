"""From the image URLs of one request to their tiles, within the request's budget.

Owns the order of things: count and bytes are checked before anything is fetched,
then all images are fetched and decoded at once, and the first that fails ends the
others. Knows nothing of HTTP routes, prompts or models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ...models.batch import ImageTiles
from .decoders import DecoderPool
from .fetch import ImageFetcher
from .settings import MEBI, ImageError, ImageRequest, ImageSettings
from .sources import InlineImage, RemoteImage, parse_source


class ByteBudget:
    """How many encoded bytes the images of one request may still have together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._spent = 0

    def spend(self, num_bytes: int) -> None:
        """Count bytes that have come; raises ImageError once they are too many."""
        self._spent += num_bytes
        if self._spent > self._max_bytes:
            raise ImageError(
                f"the request's images have over {self._max_bytes / MEBI:g} MiB together, the "
                "limit: send fewer or smaller ones"
            )


class ImageLoader:
    """Loads the images of requests; shared by all requests of a worker."""

    def __init__(
        self, settings: ImageSettings, fetcher: ImageFetcher, decoders: DecoderPool
    ) -> None:
        self._settings = settings
        self._fetcher = fetcher
        self._decoders = decoders

    async def load(
        self, images: Sequence[ImageRequest], deadline: float | None = None
    ) -> list[ImageTiles]:
        """The tiles of each image, in order.

        deadline: the event loop's time by which all must be there. Raises
        ImageError with the index of the first image that fails (None if the
        request as a whole does), TimeoutError past the deadline.
        """
        budget = ByteBudget(self._settings.max_request_bytes)
        sources = self._check(images, budget)
        async with asyncio.timeout_at(deadline):
            return await self._load_all(images, sources, budget)

    def _check(
        self, images: Sequence[ImageRequest], budget: ByteBudget
    ) -> list[InlineImage | RemoteImage]:
        """What each URL stands for, as far as the budget goes; nothing has been fetched yet."""
        limit = self._settings.max_images
        if len(images) > limit:
            raise ImageError(f"request has {len(images)} images; the limit is {limit}", limit)
        sources = []
        for index, image in enumerate(images):
            with _blaming(index):
                source = parse_source(image.url, self._settings)
                if isinstance(source, InlineImage):
                    budget.spend(len(source.data))
            sources.append(source)
        return sources

    async def _load_all(
        self,
        images: Sequence[ImageRequest],
        sources: Sequence[InlineImage | RemoteImage],
        budget: ByteBudget,
    ) -> list[ImageTiles]:
        """All images at once; the first failure cancels the rest and is the one raised."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._load_one(index, image, source, budget))
                    for index, (image, source) in enumerate(zip(images, sources, strict=True))
                ]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _load_one(
        self, index: int, image: ImageRequest, source: InlineImage | RemoteImage, budget: ByteBudget
    ) -> ImageTiles:
        with _blaming(index):
            if isinstance(source, InlineImage):
                data = source.data
            else:
                data = await self._fetcher.fetch(source, budget.spend)
            return await self._decoders.decode(data, image.max_tiles)


@contextmanager
def _blaming(index: int) -> Iterator[None]:
    """Give an ImageError from within the index of the image that it is about."""
    try:
        yield
    except ImageError as error:
        if error.index is None:
            error.index = index
        raise
